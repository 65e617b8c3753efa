"""Settings of the whole test run."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

# The tests are small, and run in several processes at once: threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from lnpu_torch.profiler.op_tracer import compiled_code


def let_numbers_be_made_of_tensors() -> None:
    """Triton 3.6's interpreter makes numbers of arrays in a way that numpy deprecates, and from 2.4 on refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def patch_the_language_once_in_a_launch() -> None:
    """Triton's interpreter patches `triton.language` at each call of a device function: a third of the tests' time."""
    from triton.runtime import interpreter

    call, launch = interpreter.InterpretedFunction.__call__, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = id(self.fn.__globals__)
        if names not in patched:
            patched.add(names)
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    patch_the_language_once_in_a_launch()
    if version("triton").startswith("3.6."):
        let_numbers_be_made_of_tensors()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton chooses its interpreter when it is first imported, so that these tests need a process of their own."""
    how = "run it with TRITON_INTERPRET=1 pytest -m triton_interpreter, as `make test` does"
    for item in items:
        if item.get_closest_marker("triton_interpreter"):
            item.add_marker(pytest.mark.skipif(not INTERPRETED, reason=how))
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))  # numpy's, of infinities


@pytest.fixture(autouse=True)
def compiled_code_is_discarded() -> Iterator[None]:
    """While any is alive, vector operations are not counted: no test may decide that for another."""
    yield
    if compiled_code():
        torch._dynamo.reset()
