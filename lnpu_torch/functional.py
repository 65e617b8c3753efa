"""Linear layers and convolutions as LNPU computes them: three steps, each with its own operand precisions.

    forward       output      = input       * weight
    grad_input    grad_input  = grad_output * weight
    grad_weight   grad_weight = grad_output * input

Each operand is rounded once and used by both steps that read it, where their rules agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.utils import _ntuple

from lnpu_torch import ops
from lnpu_torch.config import ConfigError, listed, nearest
from lnpu_torch.emulation import Emulation, Operand
from lnpu_torch.precision import PRESETS, Precision, Rule
from lnpu_torch.products import Convolution, Linear


class _Emulated(torch.autograd.Function):
    """The three steps of one layer. `wants` says which gradients are asked for: input, weight, bias."""

    @staticmethod
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
        geometry, seed = product.geometry(input.shape, weight.shape), emulation.seed(input)
        later = [step for step, wanted in (("grad_input", wants[0]), ("grad_weight", wants[1])) if wanted]
        grid, over = product.grid(input), (geometry.small_channels // geometry.groups, 1)
        xs = emulation.quantize("input", grid, ["forward"], later, (len(grid), geometry.groups), seed)
        ws = emulation.quantize("weight", weight, ["forward"], later, over, seed)

        values, weights = _alike(xs["forward"].values.reshape(input.shape), ws["forward"].values)
        output = product.forward(values, weights, _as(bias, values.dtype), emulation.accumulator)
        side, cut = product.input_side, product.cut
        counts = cut(xs["forward"].position.squeeze(1)), _over(ws["forward"], side)
        ops.count_weight_step(emulation.counters[0], *counts, geometry.pack(), side)

        saved: list[Tensor | None] = [None] * 5
        if wants[0]:
            saved[:2] = ws["grad_input"].kept, _over(ws["grad_input"], product.output_side)
        if wants[1]:
            x = xs["grad_weight"]
            saved[2:] = x.kept, cut(x.position.squeeze(1)), cut(x.sample)
        ctx.save_for_backward(*saved, seed)
        ctx.layer = product, emulation, geometry, wants
        ctx.shapes = input.shape, weight.shape, input.dtype, weight.dtype, None if bias is None else bias.dtype
        return emulation.result("forward", output, dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and grad_output.requires_grad:
            raise RuntimeError("double backward through an emulated layer is not supported: revert it to torch's own")
        w, weight_counts, x, position, sample, seed = ctx.saved_tensors
        product, emulation, geometry, wants = ctx.layer
        input_shape, weight_shape, *dtypes = ctx.shapes
        by, sizes = emulation.accumulator, geometry.pack()
        now = [step for step, wanted in (("grad_input", wants[0]), ("grad_weight", wants[1] or wants[2])) if wanted]
        grid = product.grid(grad_output)
        errors = emulation.quantize("grad_output", grid, now, [], (len(grid), geometry.groups), seed)
        grads: list[Tensor | None] = [None, None, None]

        if wants[0]:
            error = errors["grad_input"]
            operands = _alike(error.values.reshape(grad_output.shape), w)
            grads[0] = emulation.result("grad_input", product.grad_input(*operands, input_shape, by), dtypes[0])
            counts = error.position.squeeze(1), weight_counts
            ops.count_weight_step(emulation.counters[1], *counts, sizes, product.output_side)
        else:
            ops.count_not_run(emulation.counters[1], geometry.slots)

        if wants[1] or wants[2]:
            error = errors["grad_weight"]
            values = error.values.reshape(grad_output.shape)
            operands = _alike(values, x.reshape(input_shape) if wants[1] else values.new_empty(1).expand(input_shape))
            results = product.grad_weight(*operands, weight_shape, wants[1:], by)
            for i, (result, dtype) in enumerate(zip(results, dtypes[1:], strict=True)):
                grads[1 + i] = None if result is None else emulation.result("grad_weight", result, dtype)
        if wants[1]:
            grids = {product.input_side: (position, sample)}
            grids[product.output_side] = (error.position.squeeze(1), error.sample)
            ops.count_grid_step(emulation.counters[2], grids["big"], grids["small"], sizes, product.input_side)
        else:
            ops.count_not_run(emulation.counters[2], geometry.slots)

        if emulation.training:
            ops.commit_thresholds(emulation.thresholds)
        return (*grads, None, None, None, None)


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


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """Torch's ReLU, bit for bit, which keeps one bit per element for its backward where it can."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad) or not ops.packed_relu(x):
        return F.relu(x, inplace)
    output: Tensor = _PackedReLU.apply(x, inplace)  # type: ignore[no-untyped-call]
    return output


class _PackedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        out = x if inplace else torch.empty_like(x)
        ctx.fast, ctx.format = ops.packed_relu(x), ops.memory_format(x)
        ctx.save_for_backward(ctx.fast.relu(x, out))
        if inplace:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors
        return ctx.fast.relu_backward(grad_output.contiguous(memory_format=ctx.format), signs), None


def _emulate(
    input: Tensor, weight: Tensor, bias: Tensor | None, product: Linear | Convolution, emulation: Emulation
) -> Tensor:
    for name, tensor in (("input", input), ("weight", weight)):
        if not tensor.is_floating_point():
            raise TypeError(f"an emulated layer takes floating-point tensors, but its {name} is {tensor.dtype}")
    kind, dtype = input.device.type, input.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if not emulation.emulates("forward"):  # torch's own product, then, on torch's own casts
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif input.dtype != weight.dtype:
        raise TypeError(f"input is {input.dtype} and weight {weight.dtype}: convert one, or use autocast")
    asked = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (input, weight, bias)]
    with torch.autocast(kind, enabled=False):
        output: Tensor = _Emulated.apply(input, weight, bias, product, emulation, tuple(asked), dtype)  # type: ignore[no-untyped-call]
    return output


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two operands in the wider of their dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _over(weight: Operand, side: str) -> Tensor:
    """A weight's counts as they meet a grid on one side: over the other side's channels, [2, channels, *kernel]."""
    return weight.position.flatten(1, 2) if side == "big" else weight.sample.squeeze(2)


def quantize(
    x: Tensor, rule: str | Rule = "fgmp", *, threshold: int | None = None, return_groups: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Round a tensor as an operand would be, by `reference.quantize`. Gradients pass straight through.

    Args:
        x: any shape and floating dtype.
        rule: "fgmp", "fp8", "fp16", or a `Rule`.
        threshold: T; without it, the rule chooses one for x itself.
        return_groups: also return each element's group (uint8: 0 zero, 8, 16).

    Raises:
        ConfigError: no such rule.
        ValueError: the threshold is out of range, or the rule has none.
    """
    if not isinstance(rule, Rule):
        if rule not in PRESETS:
            raise ConfigError(f"unknown rule {rule!r}{nearest(rule, PRESETS)}; known: {listed(PRESETS)}, or a Rule")
        rule = PRESETS[rule]
    if threshold is not None:
        rule = Rule(low=rule.low, high=rule.high, threshold=threshold, rounding=rule.rounding)
    values, groups = _StraightThrough.apply(x, rule, return_groups)  # type: ignore[no-untyped-call]
    return (values, groups) if return_groups else values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, want_groups: bool) -> tuple[Tensor, Tensor]:
        emulation = Emulation(Precision(input=rule), x.device)
        text = rule.model_dump_json()
        threshold = ops.next_threshold(x, emulation.thresholds, 0, text, False)
        values, groups, _ = ops.quantize(x, threshold, emulation.seed(x), text, 0, want_groups)
        ctx.mark_non_differentiable(groups)
        return values.to(x.dtype), groups

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
