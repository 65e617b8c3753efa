"""How functions become torch ops, opaque to compilers. It knows none of the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("lnpu", "DEF")


def op(mutates: Sequence[str] = (), *tags: torch.Tag) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as `torch.ops.lnpu.<its name>`, for every device; the schema is read off its signature.

    `torch.library.custom_op` does the same and more, in 29 to 45 us a call instead of 5 to 8 (torch 2.13, measured):
    as long as the launches of several kernels.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=tags)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        if schema.endswith("-> ()"):
            fake(name)(lambda *_: None)
        registered: Callable[..., Any] = getattr(torch.ops.lnpu, name).default
        return registered

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what an op returns, shapes and dtypes only, for compilers."""
    register: Callable[..., Any] = torch.library.register_fake(f"lnpu::{name}", lib=_LIBRARY)
    return register
