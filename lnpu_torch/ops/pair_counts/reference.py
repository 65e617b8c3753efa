"""Exact counts of the multiplications in each step, from precision classes of the operands' elements, in plain torch.

No mask is ever convolved. The masks are summed over one axis first, so that the rest is small; see `pair_table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lnpu_torch.ops.pair_counts.conv_shape import ConvShape, part
from lnpu_torch.ops.quantize.reference import FP8, FP16

WIDTH = 19
"""Integers that describe one step: calls, macs, padding, not_run, pairs [3, 3], elements of both operands [2, 3]."""

CALL = 7
"""Integers that describe a size of call: elements of both operands and of the result, how many of each are used
(`ConvShape.used`), and groups."""

SIZES = 8
"""Sizes of calls (batches, as a rule) that each step counts apart; calls of further sizes are counted together."""

MIXED, NOT_RUN, ROWS = SIZES, SIZES + 1, SIZES + 2
"""Rows of a step's counters: one for each size of call, one for all further sizes, one for what nobody asked for."""


class StepCounters(NamedTuple):
    """Where a step is counted: in a layer's tensors, at the step's place.

    `counters`: int64 [steps, ROWS, WIDTH], to the row of which that `row_of` tells. `sizes`: int64
    [steps, SIZES + 1, CALL], on the host. `lanes`: int64 [steps, operands, LANE_CONFIGS].
    """

    counters: Tensor
    sizes: Tensor
    lanes: Tensor
    step: int


def row_of(sizes: Tensor, call: Sequence[int]) -> int:
    """The row of a step's counters that a call belongs to, by its size; a size that is new is noted.

    Args:
        sizes: int64 [SIZES + 1, CALL], on the host: what each row stands for, zeros where it is free; in the last row
            the sum over all calls of further sizes.
        call: what `ConvShape.call_sizes` gives.
    """
    for row, known in enumerate(sizes.tolist()[:SIZES]):
        if not any(known):
            sizes[row] = sizes.new_tensor(call)
        if known == [*call] or not any(known):
            return row
    sizes[MIXED] += sizes.new_tensor(call)
    return MIXED


def masks(classes: Tensor) -> Tensor:
    """FP8 and FP16 masks [2, ...] of a tensor of precision classes [...]."""
    return torch.stack((classes == FP8, classes == FP16))


def per_position(classes: Tensor, share: int) -> Tensor:
    """Elements of each class over every `share` samples: [N, C, *grid] -> int32 [2, N / share, C, *grid]."""
    shared = classes.unflatten(0, (-1, share) if classes.numel() else (1, len(classes)))
    return masks(shared).sum(2, dtype=torch.int32).contiguous()


def per_sample(classes: Tensor, groups: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Elements of each class over the channels of a channel group: [N, C, *grid] -> [2, N, groups, *grid]."""
    apart = classes.unflatten(1, (groups, classes.shape[1] // groups))
    return masks(apart).sum(3, dtype=dtype).contiguous()


def sample_dtype(channels: int, channel_groups: int) -> torch.dtype:
    """Of counts by sample on a CPU: uint8 where there are several groups of at most 255 channels, else int32.

    Depthwise, there are twice as many of them as elements.
    """
    return torch.uint8 if channel_groups > 1 and channels // channel_groups <= 255 else torch.int32


def weight_step(position: Tensor, weight: Tensor, geometry: ConvShape, side: str) -> Tensor:
    """The counts of a step that multiplies one grid by the weight (forward, grad_input): int64 [WIDTH].

    Args:
        position: int32 [2, channels, *grid], the grid's elements of each class over the batch.
        weight: int32 [2, channels, *kernel], the weight's over the other side's channels.
        side: which grid it is, "conv_input" or "conv_output".
    """
    reached = _reached(position, geometry, side)
    others = (geometry.out_channels if side == "conv_input" else geometry.in_channels) // geometry.groups
    weights = _flat(weight).to(torch.int64)
    both = (reached[:, None] * weights[None]).sum((2, 3))
    weight_only = (weights * (_overlaps(geometry, weight.device) * geometry.batch)).sum((1, 2))
    table = pair_table(both, reached.sum((1, 2)) * others, weight_only, geometry.inside)
    counts = elements(position, geometry.elements(side)), elements(weight, geometry.elements("weight"))
    return torch.cat((head(geometry, table), table.flatten(), *counts))


def grid_step(conv_input: Sequence[Tensor], conv_output: Sequence[Tensor], geometry: ConvShape, first: str) -> Tensor:
    """The counts of a step that multiplies the two grids (grad_weight): int64 [WIDTH].

    Args:
        conv_input, conv_output: each grid's elements of each class over the batch, int32 [2, channels, *grid], and over
            the channels of a channel group, int32 (or `sample_dtype`) [2, N, g, *grid].
        first: which grid is the step's first operand.
    """
    seen = _seen(conv_input[1].to(torch.int32), geometry).flatten(1).to(torch.float64)
    both = (seen @ conv_output[1].flatten(1).to(torch.float64).T).to(torch.int64)  # exact: every sum is below 2^53
    input_only = _reached(conv_input[0], geometry, "conv_input").sum((1, 2)) * (
        geometry.out_channels // geometry.groups
    )
    output_only = _reached(conv_output[0], geometry, "conv_output").sum((1, 2)) * (
        geometry.in_channels // geometry.groups
    )
    table = pair_table(both, input_only, output_only, geometry.inside)
    counts = [
        elements(conv_input[0], geometry.elements("conv_input")),
        elements(conv_output[0], geometry.elements("conv_output")),
    ]
    if first == "conv_output":
        table, counts = table.T, counts[::-1]
    return torch.cat((head(geometry, table), table.flatten(), *counts))


def head(geometry: ConvShape, like: Tensor) -> Tensor:
    """What every run step adds whatever its values: calls, macs, padding, not_run."""
    return like.new_tensor((1, geometry.macs, geometry.macs - geometry.inside, 0))


def pair_table(both: Tensor, first: Tensor, second: Tensor, inside: int) -> Tensor:
    """Complete the table [3, 3] over (zero, FP8, FP16) from what is known of the non-zeros.

    Args:
        both: [2, 2], pairs of two non-zeros.
        first, second: [2], pairs in which the first, or the second, is a non-zero.
        inside: all pairs inside the grids.
    """
    table = torch.empty(3, 3, dtype=torch.int64, device=both.device)
    table[1:, 1:] = both
    table[1:, 0] = first - both.sum(1)
    table[0, 1:] = second - both.sum(0)
    table[0, 0] = inside - first.sum() - table[0, 1:].sum()
    return table


def elements(position: Tensor, count: int) -> Tensor:
    """Elements of a tensor in each class (zero, FP8, FP16): int64 [3], from any of its partial sums."""
    groups = position.flatten(1).sum(1, dtype=torch.int64)
    return torch.cat((count - groups.sum(0, keepdim=True), groups))


def _seen(input_sample: Tensor, geometry: ConvShape) -> Tensor:
    """What each output position's window holds of the input: int32 [2, N, g, *output]. One dimension at a time."""
    for dim in range(len(geometry.kernel)):
        axis = 3 + dim
        shape = (*input_sample.shape[:axis], geometry.conv_output[dim], *input_sample.shape[axis + 1 :])
        sums = input_sample.new_zeros(shape)
        for conv_output, conv_input in geometry.overlap(dim):
            _along(sums, axis, conv_output).add_(_along(input_sample, axis, conv_input))
        input_sample = sums
    return input_sample


def _reached(position: Tensor, geometry: ConvShape, side: str) -> Tensor:
    """How many elements of each class every kernel offset meets, by channel: int64 [2, channels, offsets]."""
    sums = position.to(torch.int64)
    for dim in range(len(geometry.kernel)):
        windows = (
            conv_input if side == "conv_input" else conv_output for conv_output, conv_input in geometry.overlap(dim)
        )
        sums = torch.stack([_along(sums, 2 + dim, window).sum(2 + dim) for window in windows], 2 + dim)
    return _flat(sums)


def _flat(x: Tensor) -> Tensor:
    """[2, channels, *offsets] -> [2, channels, offsets], of which there is one without dimensions."""
    return x.reshape(*x.shape[:2], prod(x.shape[2:]))


def _along(x: Tensor, axis: int, window: slice) -> Tensor:
    return part(x, [window, *(slice(None) for _ in range(x.dim() - axis - 1))])


@lru_cache(maxsize=512)
def _overlaps(geometry: ConvShape, device: torch.device) -> Tensor:
    return torch.tensor(geometry.overlaps(), dtype=torch.int64, device=device)
