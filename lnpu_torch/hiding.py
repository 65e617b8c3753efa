"""Keeps the ops inside emulated layers from modes that would rather be told of the layers' steps. It counts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
)

from lnpu_torch import registry


class LayerSteps(NamedTuple):
    """What a layer has just done: its forward, or in `backward` both other steps.

    `counted` is how many steps its counters hold more. `bias` is the elements of a bias, 0 without one, that was added
    to `results` elements; in backward, of its gradient, into which as many errors were summed.
    """

    backward: bool
    counted: int
    bias: int
    results: int


class LayerWatcher(TorchDispatchMode):
    """A mode that sees none of the many ops inside emulated layers, but is told of their steps. Not while `paused`."""

    paused = False

    def layer_ran(self, steps: LayerSteps) -> None:
        """What a layer has done, out of sight."""
        raise NotImplementedError


@contextmanager
def unwatched() -> Iterator[list[LayerWatcher]]:
    """Within the block this thread's LayerWatchers, which it yields, see nothing.

    Those that no other mode lies above leave the stack of modes, so that ops take no longer than without any mode.
    """
    left: list[LayerWatcher] = []
    while isinstance(mode := _get_current_dispatch_mode(), LayerWatcher):
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        left.append(mode)
    below = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, LayerWatcher) and not mode.paused]
    for mode in below:
        mode.paused = True
    try:
        yield [*left, *below]
    finally:
        for mode in below:
            mode.paused = False
        for mode in reversed(left):
            mode.__enter__()  # type: ignore[no-untyped-call]


def hidden(step: Callable[..., Any]) -> Callable[..., Any]:
    """Hides what the `forward` or `backward` of the layers' autograd function does, and tells what it was."""

    @wraps(step)
    def wrapped(ctx: Any, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return step(ctx, *args)
        if not _get_current_dispatch_mode_stack():
            with registry.direct(args):
                return step(ctx, *args)
        with unwatched() as modes, registry.direct(args):
            result = step(ctx, *args)
        for mode in modes:
            mode.layer_ran(_backward(ctx, args[0], result) if step.__name__ == "backward" else _forward(args, result))
        return result

    return wrapped


def _forward(args: Any, output: torch.Tensor) -> LayerSteps:
    bias, emulation = args[2], args[4]
    return LayerSteps(False, int(emulation.counting), 0 if bias is None else bias.numel(), output.numel())


def _backward(ctx: Any, error: torch.Tensor, gradients: Any) -> LayerSteps:
    bias, emulation = gradients[2], ctx.call.emulation
    return LayerSteps(True, 2 * int(emulation.counting), 0 if bias is None else bias.numel(), error.numel())
