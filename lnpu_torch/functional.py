"""Linear layers and convolutions as LNPU computes them: three steps, each with its own operand precisions.

    forward       output      = input       * weight
    grad_input    grad_input  = grad_output * weight
    grad_weight   grad_weight = grad_output * input

Each operand is rounded once and used by both steps that read it, where their rules agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.utils import _ntuple

from lnpu_torch import backends, ops, product_ops
from lnpu_torch.emulation import Emulation, Operand
from lnpu_torch.geometry import Geometry
from lnpu_torch.hiding import hidden
from lnpu_torch.pooling import max_pool2d as max_pool2d
from lnpu_torch.products import Accumulator, Convolution, Linear
from lnpu_torch.relu import refuse_double_backward
from lnpu_torch.relu import relu as relu


class _Emulated(torch.autograd.Function):
    """The three steps of one layer. `wants` says which gradients are asked for: input, weight, bias."""

    @staticmethod
    @hidden
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product: Linear | Convolution,
        emulation: Emulation,
        wants: tuple[bool, bool, bool],
        dtype: torch.dtype,
    ) -> Tensor:
        call = _Call(product, emulation, product.geometry(input.shape, weight.shape), wants, input, weight, bias)
        seed, grid, side = emulation.seed(input), product.grid(input), product.input_side
        later = [step for step, wanted in (("grad_input", wants[0]), ("grad_weight", wants[1])) if wanted]
        xs = call.read("input", grid, seed, now=["forward"], later=later)
        ws = call.weights(weight, seed, "forward")

        values, weights = _alike(call.values(xs["forward"].values, input, "forward", "input"), ws.values)
        output = product.forward(values, weights, bias, call.accumulator("forward"))
        if emulation.counting:
            counts = product.cut(xs["forward"].position.squeeze(1)), _over(ws, side)
            counter = emulation.counter("forward")
            ops.count_weight_step(*counter, *counts, xs["forward"].lanes, call.sizes, side)

        kept: list[Tensor | None] = [None] * 4
        x = xs.get("grad_weight")
        if x is not None:
            values = call.values(x.kept, input, "grad_weight", "input")
            kept = [values, None, None, None]
            if emulation.counting:
                kept[1:] = product.cut(x.position.squeeze(1)), product.cut(x.sample), x.lanes
        threshold = call.threshold(weight, ws) if wants[0] else None
        ctx.save_for_backward(weight if wants[0] else None, threshold, *kept, seed)
        ctx.call = call
        del xs, ws, x, values, weights  # the result may lie where they did
        return emulation.result("forward", output, dtype, call.turned[0])

    @staticmethod
    @hidden
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        with _without_autocast(grad_output.device.type):
            return _backward(ctx, grad_output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    weight, threshold, *kept, seed = ctx.saved_tensors
    call: _Call = ctx.call
    emulation, wants = call.emulation, call.wants
    now = [step for step, wanted in (("grad_input", wants[0]), ("grad_weight", wants[1] or wants[2])) if wanted]
    grid = call.product.grid(grad_output)
    errors = call.read("grad_output", grid, seed, now=now)
    for step, error in errors.items():
        values = call.values(error.values, grad_output, step, "grad_output")
        errors[step] = error._replace(values=values)

    grads: list[Tensor | None] = [None, None, None]
    if wants[0]:
        grads[0] = call.grad_input(errors["grad_input"], weight, threshold, seed)
    elif emulation.counting:
        emulation.not_run("grad_input", call.geometry.slots)
    if wants[1] or wants[2]:
        grads[1:] = call.grad_weight(errors["grad_weight"], kept)
    if emulation.counting and not wants[1]:
        emulation.not_run("grad_weight", call.geometry.slots)
    if emulation.training:
        ops.commit_thresholds(emulation.thresholds)
    return (*grads, None, None, None, None)


class _Call:
    """One call of one layer: what its steps share, and the two that run in backward."""

    def __init__(
        self,
        product: Linear | Convolution,
        emulation: Emulation,
        geometry: Geometry,
        wants: tuple[bool, bool, bool],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        self.product, self.emulation, self.geometry, self.wants = product, emulation, geometry, wants
        self.sizes, self.layout = geometry.pack(), (geometry.batch, geometry.groups)
        self.shapes = (input.shape, weight.shape)
        self.last = product.last(input, geometry, emulation.accumulator)
        self.turned = [self.last and backends.memory_format(x) != torch.channels_last for x in (input, weight)]
        self.dtypes = (input.dtype, weight.dtype, None if bias is None else bias.dtype)
        # binary16 products are summed in float32; a convolution's sums then leave cuDNN as binary16, rounded once
        exact = emulation.result_format == "fp16" or isinstance(product, Linear)
        self.halves = backends.on_gpu(input) and exact and emulation.accumulator.form in ("fp32", "fp16")

    def accumulator(self, step: str) -> Accumulator:
        """How a step's products are summed."""
        emulates = self.emulation.emulates(step)
        return replace(self.emulation.accumulator, exact=self.halves and emulates, reordered=emulates)

    def values(self, rounded: Tensor, original: Tensor, step: str, operand: str) -> Tensor:
        """An operand's values as the product takes them: what came in itself, if the step reads it in float."""
        if self.emulation.reads[step, operand].rule is None:
            return original
        return rounded if rounded.shape == original.shape else rounded.reshape(original.shape)

    def read(
        self,
        operand: str,
        x: Tensor,
        seed: Tensor | None,
        now: Sequence[str],
        later: Sequence[str] = (),
    ) -> dict[str, Operand]:
        """Input or grad_output as the steps read it."""
        return self.emulation.read(
            operand,
            x,
            self.layout,
            seed,
            now=now,
            later=later,
            sampled=["grad_weight"],
            halves=self.halves,
            last=self.last,
        )

    def weights(self, weight: Tensor, seed: Tensor | None, step: str, threshold: Tensor | None = None) -> Operand:
        """The weight as a step reads it; its counts by sample if the step multiplies it with the small grid."""
        layout = (self.geometry.small_channels // self.geometry.groups, 1)
        side = self.product.input_side if step == "forward" else self.product.output_side
        return self.emulation.read(
            "weight",
            weight,
            layout,
            seed,
            now=[step],
            sampled=[step] if side == "small" else [],
            halves=self.halves,
            last=self.last,
            threshold=threshold,
        )[step]

    def threshold(self, weight: Tensor, read: Operand) -> Tensor | None:
        """The T by which grad_input is to read the weight, which forward has read so: with the same T, by one rule."""
        rows = [self.emulation.reads[step, "weight"].row for step in ("forward", "grad_input")]
        return read.threshold if rows[0] == rows[1] else self.emulation.choose("weight", weight, "grad_input")

    def grad_input(self, error: Operand, weight: Tensor, threshold: Tensor | None, seed: Tensor | None) -> Tensor:
        """The second step. The weight is rounded anew, with the T of the forward, which costs less than to keep it."""
        weights = self.weights(weight, seed, "grad_input", threshold)
        operands = _alike(error.values, weights.values)
        values = self.product.grad_input(*operands, self.shapes[0], self.accumulator("grad_input"))
        if self.emulation.counting:
            side = self.product.output_side
            counts = error.position.squeeze(1), _over(weights, side)
            ops.count_weight_step(*self.emulation.counter("grad_input"), *counts, error.lanes, self.sizes, side)
        return self.emulation.result("grad_input", values, self.dtypes[0], self.turned[0])

    def grad_weight(self, error: Operand, kept: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The third step: gradients of weight and bias, from the error and what was kept of the input."""
        values, position, sample, lanes = kept
        x = error.values.new_empty(1).expand(self.shapes[0]) if values is None else values
        operands, wanted = _alike(error.values, x), self.wants[1:]
        results = self.product.grad_weight(*operands, self.shapes[1], wanted, self.accumulator("grad_weight"))
        if position is not None and sample is not None:
            sides = {self.product.input_side: (position, sample)}
            sides[self.product.output_side] = (error.position.squeeze(1), error.sample)
            first = self.product.input_side
            counter = self.emulation.counter("grad_weight")
            ops.count_grid_step(*counter, sides["big"], sides["small"], lanes, error.lanes, self.sizes, first)
        return [
            None if result is None else self.emulation.result("grad_weight", result, dtype or result.dtype, turned)
            for result, dtype, turned in zip(results, self.dtypes[1:], (self.turned[1], False), strict=True)
        ]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, emulation: Emulation) -> Tensor:
    """`torch.nn.functional.linear`, emulated: input [*, in], weight [out, in], bias [out] -> [*, out]."""
    return _emulate(input, weight, bias, Linear(), emulation)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    emulation: Emulation,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> Tensor:
    """Torch's conv1d/2d/3d and conv_transpose1d/2d/3d, emulated; the weight tells the number of dimensions.

    Args:
        input: [N, C, *grid] or [C, *grid].
        weight: [K, C / groups, *kernel], or [C, K / groups, *kernel] if transposed.
        padding: numbers, "same" or "valid".

    Raises:
        ValueError: input and weight do not fit together.
    """
    dims = weight.dim() - 2
    if input.dim() not in (dims + 1, dims + 2):
        raise ValueError(f"expected {dims + 1}D (unbatched) or {dims + 2}D input, got {list(input.shape)}")
    tuples = _ntuple(dims)
    strides, dilations = tuples(stride), tuples(dilation)
    batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
    margin = (0,) * dims
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, weight.shape[2:], strict=True)]
        padding, margin = tuple(total // 2 for total in totals), tuple(total % 2 for total in totals)
        batched = F.pad(batched, [side for cut in reversed(margin) for side in (0, cut)]) if any(margin) else batched
    product = Convolution(strides, tuples(padding), dilations, groups, transposed, tuples(output_padding), margin)
    output = _emulate(batched, weight, bias, product, emulation)
    return output if input.dim() == dims + 2 else output.squeeze(0)


def _emulate(
    input: Tensor, weight: Tensor, bias: Tensor | None, product: Linear | Convolution, emulation: Emulation
) -> Tensor:
    for name, tensor in (("input", input), ("weight", weight)):
        if not tensor.is_floating_point():
            raise TypeError(f"an emulated layer takes floating-point tensors, but its {name} is {tensor.dtype}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.device != input.device:
            raise RuntimeError(
                f"a layer is where its input is, but its input is on {input.device} and its {name} on {other.device}"
            )
    kind, dtype = input.device.type, input.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if not emulation.emulates("forward"):  # torch's own product, then, on torch's own casts
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif input.dtype != weight.dtype:
        raise TypeError(f"input is {input.dtype} and weight {weight.dtype}: convert one, or use autocast")
    asked = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (input, weight, bias)]
    with _without_autocast(kind):
        output: Tensor = _Emulated.apply(input, weight, bias, product, emulation, tuple(asked), dtype)  # type: ignore[no-untyped-call]
    return output


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Autocast off; compiled, even where it seems off: dynamo traces a backward in the forward's state, not its own."""
    on = torch.is_autocast_enabled(kind) or torch.compiler.is_compiling()
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two operands in the wider of their dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return _widened(a, dtype), _widened(b, dtype)


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else product_ops.widened(x, dtype)


def _over(weight: Operand, side: str) -> Tensor:
    """A weight's counts as they meet a grid on one side: over the other side's channels, [2, channels, *kernel]."""
    return weight.position.flatten(1, 2) if side == "big" else weight.sample.squeeze(2)
