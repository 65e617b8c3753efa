"""Lets a dispatch mode observe whole layer passes instead of the ops inside them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from lnpu_torch.ops import registry


class LayerSteps(NamedTuple):
    """What a layer has just done: its forward, or in `backward` both other steps.

    `emulation` tells which layer it was. `counted` is how many steps its counters hold more. `bias` is the elements of
    a bias, 0 without one, that was added to `results` elements; in backward, of its gradient, into which as many errors
    were summed.
    """

    emulation: Any
    backward: bool
    counted: int
    bias: int
    results: int


class _Thread(threading.local):
    hidden = False
    opaque = False


_thread = _Thread()


class LayerObserver(TorchDispatchMode):
    """A mode that sees none of the many ops inside emulated layers, but is told of their steps.

    It stays on torch's stack of modes throughout: nothing has to be put back, whatever interrupts a layer. While
    `blind`, it shall pass ops on without a look.
    """

    paused = False
    supports_higher_order_operators = True

    @property
    def blind(self) -> bool:
        """Whether this thread is inside a layer, or the watcher is paused (for backward's threads, too)."""
        return _thread.hidden or self.paused

    def layer_ran(self, steps: LayerSteps) -> None:
        """What a layer has done, out of sight."""
        raise NotImplementedError


@contextmanager
def pause_op_tracing() -> Iterator[None]:
    """Within the block this thread's LayerObservers see nothing."""
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, LayerObserver) and not mode.paused]
    try:
        for mode in modes:
            mode.paused = True
        yield
    finally:
        for mode in modes:
            mode.paused = False


def opaque() -> bool:
    """Whether the layer pass at hand shall be one op: for compilers, and for tensors without values."""
    return torch.compiler.is_compiling() or _thread.opaque


def notify_observers(step: Callable[..., Any]) -> Callable[..., Any]:
    """Hides what the `forward` or `backward` of the layers' autograd function does, and tells what it was."""

    @wraps(step)
    def wrapped(ctx: Any, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return step(ctx, *args)
        modes, plain, watchers, others = _get_current_dispatch_mode_stack(), registry.is_plain(args), [], False
        for mode in modes:
            if not isinstance(mode, LayerObserver):
                others, plain = True, plain and not mode.is_infra_mode()
            elif not mode.blind:
                watchers.append(mode)
        # where nobody else watches, ops need not ask the modes, which would take longer
        skip = torch._C._DisableTorchDispatch() if modes and not others and plain else nullcontext()
        before = _thread.hidden, _thread.opaque
        try:
            _thread.hidden, _thread.opaque = True, not plain
            with skip:
                result = step(ctx, *args)
        finally:
            _thread.hidden, _thread.opaque = before
        for mode in watchers:
            mode.layer_ran(_backward(ctx, args[0], result) if step.__name__ == "backward" else _forward(args, result))
        return result

    return wrapped


def _forward(args: Any, output: torch.Tensor) -> LayerSteps:
    bias, emulation = args[2], args[4]
    return LayerSteps(emulation, False, int(emulation.counting), 0 if bias is None else bias.numel(), output.numel())


def _backward(ctx: Any, error: torch.Tensor, gradients: Any) -> LayerSteps:
    bias, emulation = gradients[2], ctx.layer[1]
    return LayerSteps(emulation, True, 2 * int(emulation.counting), 0 if bias is None else bias.numel(), error.numel())
