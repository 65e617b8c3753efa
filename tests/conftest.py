"""Settings of the whole test run."""

from collections.abc import Iterator

import pytest
import torch

from lnpu_torch.watch import compiled_code

# The tests are small, and run in several processes at once: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def compiled_code_is_discarded() -> Iterator[None]:
    """While any is alive, operations on elements are not counted: no test may decide that for another."""
    yield
    if compiled_code():
        torch._dynamo.reset()
