"""Convolutions and matrix products whose accumulator is rounded every few products. Slow, in plain torch.

All steps become one matrix product over a reduction axis; `reduce` walks it in chunks: a chunk's partial sum in
float32 is added to the accumulator, and the accumulator rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch.ops.pair_counts.conv_shape import ConvShape, part
from lnpu_torch.ops.quantize.reference import round_to
from lnpu_torch.quant.formats import Format


def reduce(a: Tensor, b: Tensor, form: Format, chunk: int) -> Tensor:
    """a @ b with an accumulator of the given format: [..., M, K] by [..., K, N] -> [..., M, N]."""
    total = a.new_zeros(*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    for start in range(0, a.shape[-1], chunk):
        total = round_to(total + a[..., start : start + chunk] @ b[..., start : start + chunk, :], form)
    return total


def conv_forward(conv_input: Tensor, weight: Tensor, geometry: ConvShape, form: Format, chunk: int) -> Tensor:
    """A convolution's forward (a transposed one's grad_input): reduces over input channel, then kernel offset."""
    columns = _columns(conv_input, geometry)  # [g, N * positions, C/g * offsets]
    kernels = weight.reshape(geometry.groups, geometry.out_channels // geometry.groups, columns.shape[-1])
    return _to_grid(reduce(columns, kernels.mT, form, chunk), geometry.batch, geometry.conv_output)


def conv_grad_input(conv_output: Tensor, weight: Tensor, geometry: ConvShape, form: Format, chunk: int) -> Tensor:
    """A convolution's grad_input (a transposed one's forward): reduces over output channel, then kernel offset.

    The output grid is spread out by the stride, which turns the step into a convolution by the mirrored kernel.
    """
    mirrored = _mirrored(geometry)
    spread = conv_output.new_zeros(*conv_output.shape[:2], *mirrored.conv_input)
    part(spread, [slice(None, None, stride) for stride in geometry.stride]).copy_(conv_output)
    kernels = (
        weight.flip(tuple(range(2, weight.dim())))
        .unflatten(0, (geometry.groups, len(weight) // geometry.groups))
        .transpose(1, 2)
    )
    return conv_forward(spread, kernels.flatten(0, 1), mirrored, form, chunk)


def conv_grad_weight(conv_input: Tensor, conv_output: Tensor, geometry: ConvShape, form: Format, chunk: int) -> Tensor:
    """The grad_weight of either: reduces over batch, then position."""
    columns = _columns(conv_input, geometry)
    errors = (
        conv_output.unflatten(1, (geometry.groups, conv_output.shape[1] // geometry.groups)).movedim(0, 2).flatten(2)
    )  # [g, K/g, N * positions]
    product = reduce(errors, columns, form, chunk)
    return product.reshape(geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)


PRODUCTS = {"conv_forward": conv_forward, "conv_grad_input": conv_grad_input, "conv_grad_weight": conv_grad_weight}
"""By name."""


def _columns(conv_input: Tensor, geometry: ConvShape) -> Tensor:
    """im2col for any number of dimensions: [N, C, *input] -> [g, N * positions, C/g * offsets]."""
    dims = len(geometry.kernel)
    for dim in range(dims):
        size, stride, dilation = geometry.conv_output[dim], geometry.stride[dim], geometry.dilation[dim]
        kernel, before = geometry.kernel[dim], geometry.padding[dim]
        after = (size - 1) * stride + (kernel - 1) * dilation + 1 - before - geometry.conv_input[dim]
        axis = 2 + 2 * dim
        pads = [0, 0] * (conv_input.dim() - axis - 1) + [before, after]
        starts = torch.arange(size, device=conv_input.device)[:, None] * stride
        index = starts + torch.arange(kernel, device=conv_input.device) * dilation
        conv_input = F.pad(conv_input, pads).index_select(axis, index.flatten()).unflatten(axis, (size, kernel))
    conv_input = conv_input.unflatten(
        1, (geometry.groups, conv_input.shape[1] // geometry.groups)
    )  # [N, g, C/g, P, R, Q, S, ...]
    positions, offsets = [3 + 2 * dim for dim in range(dims)], [4 + 2 * dim for dim in range(dims)]
    return conv_input.permute(1, 0, *positions, 2, *offsets).flatten(1 + dims + 1).flatten(1, 1 + dims)


def _to_grid(rows: Tensor, batch: int, grid: tuple[int, ...]) -> Tensor:
    """[g, N * positions, K/g] -> [N, K, *grid]."""
    image: Tensor = rows.unflatten(1, (batch, *grid)).movedim(0, 1).movedim(-1, 2)
    return image.flatten(1, 2)


def _mirrored(geometry: ConvShape) -> ConvShape:
    """The convolution that computes the input grid from the output grid spread out by the stride."""
    dims = range(len(geometry.kernel))
    return ConvShape(
        batch=geometry.batch,
        in_channels=geometry.out_channels,
        out_channels=geometry.in_channels,
        groups=geometry.groups,
        conv_input=tuple(
            (size - 1) * stride + 1 for size, stride in zip(geometry.conv_output, geometry.stride, strict=True)
        ),
        conv_output=geometry.conv_input,
        kernel=geometry.kernel,
        stride=(1,) * len(geometry.kernel),
        padding=tuple((geometry.kernel[d] - 1) * geometry.dilation[d] - geometry.padding[d] for d in dims),
        dilation=geometry.dilation,
    )
