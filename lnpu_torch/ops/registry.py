"""How functions become torch ops, opaque to compilers. It knows none of the ops."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch


def _free_namespace() -> str:
    """ "lnpu", or with a number where that is taken: by this package, imported before, whose layers may live on."""
    taken = {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names()}
    names = itertools.chain(["lnpu"], (f"lnpu{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


NAMESPACE = _free_namespace()
OPS = getattr(torch.ops, NAMESPACE)
"""The registered ops."""
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Thread(threading.local):
    direct = False


_thread = _Thread()


def op(mutates: Sequence[str] = (), *tags: torch.Tag) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as `torch.ops.lnpu.<its name>`, for every device; the schema is read off its signature.

    `torch.library.custom_op` does the same and more, in 29 to 45 us a call instead of 5 to 8 (torch 2.13, measured):
    as long as the launches of several kernels. Within `direct` not even torch's dispatcher is asked: after a product,
    when the caches are full of its operands, that takes 50 to 100 us a call.

    Args:
        mutates: the arguments that it writes to.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=tags)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        if schema.endswith("-> ()"):
            fake(name)(lambda *_: None)
        registered: Callable[..., Any] = getattr(OPS, name).default

        @wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return registered(*args)
            return function(*args) if _thread.direct else registered(*args)

        return call

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what an op returns, shapes and dtypes only, for compilers."""
    register: Callable[..., Any] = torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_LIBRARY)
    return register


def is_plain(args: Iterable[Any]) -> bool:
    """Whether all tensors among these are torch's own, of real memory."""
    return all(type(x) in _PLAIN and (x.is_cpu or x.is_cuda) for x in args if isinstance(x, torch.Tensor))


class direct:
    """Within the block this thread's ops are plain calls, if that is `wanted` and nobody could tell.

    That is, outside of autograd and of profiles. It may be wanted for plain tensors, if no mode sees each op.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted and not (torch._C._autograd._profiler_enabled() or torch.is_grad_enabled())

    def __enter__(self) -> None:
        self._before, _thread.direct = _thread.direct, self._wanted

    def __exit__(self, *_: object) -> None:
        _thread.direct = self._before
