"""Counts what a model would do if all values were FP16 and none zero, from shapes alone: nothing is computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lnpu_torch.counts.schema import STEPS, Counts, Step
from lnpu_torch.files import ConfigError
from lnpu_torch.nn.convert import convert
from lnpu_torch.nn.gemms import Product, product_of
from lnpu_torch.nn.sites import emulations
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape
from lnpu_torch.ops.pair_counts.reference import row_of
from lnpu_torch.ops.registry import OPS
from lnpu_torch.profiler.cost_counter import counted
from lnpu_torch.profiler.layer_counters import LayerLedger
from lnpu_torch.profiler.op_tracer import OpTracer

MOST_MACS = 2**60
"""Counters hold so many, and more calls."""


class StepCall(NamedTuple):
    """A step of a layer, known by its counters, of which `run` says whether anyone asked for it."""

    counters: int
    step: Step
    product: Product
    shape: ConvShape
    run: bool


class _Layers(TorchDispatchMode):
    """Notes the steps of emulated layers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[StepCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        backward = func is OPS.layer_backward.default
        if backward or func is OPS.layer_forward.default:
            call = {argument.name: arg for argument, arg in zip(func._schema.arguments, args, strict=True)}
            product = product_of(call["product"])
            shape = product.geometry(call["shape"] if backward else call["input"].shape, call["weight"].shape)
            steps = zip(STEPS[1:], call["wants"], strict=False) if backward else [(STEPS[0], True)]
            for step, run in steps:
                self.calls.append(StepCall(id(call["counters"]), step, product, shape, run))
        return func(*args, **kwargs or {})


class ShapeCounter:
    """Counts a copy of a model that holds no values: `network` is that copy, `counting()` a block to run it in.

    `calls` are the steps of layers that were counted, in their order, each with its layer's name. Tensors are to be
    made inside `shapes()` or `counting()`; they have shapes, and no values.
    """

    def __init__(self, model: nn.Module) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with FakeCopyMode(self._fake):
            self.network: nn.Module = copy.deepcopy(model)
        with self._fake:
            _leave_meta(self.network)
        convert(self.network, "fp16")
        self.counts = Counts(steps=())
        self.calls: list[tuple[str, StepCall]] = []

    def batch(self, shape: Sequence[int]) -> Tensor:
        """An input without values. Raises ConfigError if there is none of this shape."""
        try:
            with self._fake:
                return torch.zeros(*shape, device="cpu")
        except (RuntimeError, TypeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"a batch of shape {tuple(shape)} cannot be made: {reason}") from None

    @contextmanager
    def shapes(self) -> Iterator[None]:
        """Within the block tensors have no values; nothing is counted."""
        with self._fake:
            yield

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within the block tensors have no values, and what the network does is counted: it is in `counts` after it."""
        ledger, layers = LayerLedger(self.network), _Layers()
        tracer = OpTracer(ledger.owns, ledger.layers, ledger.facts)
        try:
            with self._fake, tracer, layers:
                yield
            found = emulations(self.network).items()
            states = {id(site.emulation.counters): (name, site.emulation) for name, site in found}
            for call in layers.calls:
                name, state = states[call.counters]
                self.calls.append((name, call))
                _add(state, call)
        finally:
            ledger.close()
        self.counts = counted(ledger, tracer)


def _leave_meta(network: nn.Module) -> None:
    """Have what is on the meta device, where layers are not emulated, on the CPU, as far as it is anywhere."""
    moved: dict[int, Tensor] = {}
    for module in network.modules():
        for name, x in module.named_parameters(recurse=False):
            if x.is_meta:
                empty = nn.Parameter(torch.empty_like(x, device="cpu"), x.requires_grad)
                setattr(module, name, moved.setdefault(id(x), empty))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))


def _add(state: Any, call: StepCall) -> None:
    """Add a call to a layer's counters, as if all its elements were wide."""
    product, shape, step = call.product, call.shape, STEPS.index(call.step)
    if shape.macs > MOST_MACS:
        raise ConfigError(f"{shape.macs:.3g} multiplications in one call; at most {MOST_MACS:.3g} can be counted")
    if not call.run:
        state.not_run(call.step, shape.macs)
        return
    first, second = {
        "forward": (product.input_side, "weight"),
        "grad_input": (product.output_side, "weight"),
        "grad_weight": (product.input_side, product.output_side),
    }[call.step]
    numbers = [1, shape.macs, shape.macs - shape.inside, 0, *(0,) * 8, shape.inside]
    numbers += [0, 0, shape.elements(first), 0, 0, shape.elements(second)]
    row = row_of(state.call_sizes[step], shape.call_sizes(first, second))
    state.counters[step, row] += torch.tensor(numbers, device="cpu")
    for operand, tensor in enumerate((first, second)):
        state.lanes[step, operand] += shape.elements(tensor)
