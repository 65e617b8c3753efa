"""What a layer's pass counts, on a GPU: pair tables of its steps, lane profiles, thresholds put into use. One launch.

Equal to `pair_counts.weight_step`, `grid_step` and `lanes.profile`, from the sums that `operand.read` leaves. All sums
are int64, added to counters in place. The programs of a launch are few: each ends with one addition of a whole counter,
and those take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.geometry import in_dims
from lnpu_torch.kernels.lanes import COLUMNS, MEMBERS, add_profile, profile_programs
from lnpu_torch.kernels.launch import INT32, REGISTERS, Launch, check_device, check_dtype, processors
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape

WIDTH = 19
"""Integers of a counter: calls, macs, padding, not_run, pairs [3, 3], elements of both operands [2, 3]."""
TILE = 1024
POSITIONS = (1, 128, 1024)
"""Output positions of a tile: the least that holds them all, so that few kernels are compiled."""
PROGRAMS = 256
"""For each step: two for each multiprocessor of an H100, not yet measured."""


@triton.jit
def _split(index, grid):
    """Coordinates of a row-major index."""
    return index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]


@triton.jit
def _overlap(p0, p1, p2, offset, conv_input, kernel, stride, padding, dilation):
    """The row-major input position that an offset joins with output position (p0, p1, p2); and if it is inside."""
    r0, r1, r2 = _split(offset, kernel)
    h0 = p0 * stride[0] - padding[0] + r0 * dilation[0]
    h1 = p1 * stride[1] - padding[1] + r1 * dilation[1]
    h2 = p2 * stride[2] - padding[2] + r2 * dilation[2]
    inside = (h0 >= 0) & (h0 < conv_input[0]) & (h1 >= 0) & (h1 < conv_input[1]) & (h2 >= 0) & (h2 < conv_input[2])
    return (h0 * conv_input[1] + h1) * conv_input[2] + h2, inside


@triton.jit
def _sums(x_ptr, half, pid, programs, TILE: tl.constexpr):
    """A program's share of the sums of x [2, half]."""
    low = tl.zeros((TILE,), tl.int64)
    high = tl.zeros((TILE,), tl.int64)
    for tile in range(pid, tl.cdiv(half, TILE), programs):
        index = tile * TILE + tl.arange(0, TILE)
        low += tl.load(x_ptr + index, mask=index < half, other=0)
        high += tl.load(x_ptr + half + index, mask=index < half, other=0)
    return tl.sum(low), tl.sum(high)


@triton.jit
def _add(counter_ptr, pid, both, first, second, first_found, second_found, first_count, second_count, macs, inside,
         swapped):  # fmt: skip
    """Add a program's share of a step to a counter. Everything in a counter is a sum, so that shares just add up.

    both: pairs of non-zeros (8x8, 8x16, 16x8, 16x16). first, second: pairs in which the first, or the second, is a
    non-zero (8, 16). first_found, second_found: non-zeros of the operands (8, 16). The counts and sizes, of which
    there is one each, are added by the first program. swapped: the counter's first operand is the second here.
    """
    once = tl.where(pid == 0, 1, 0).to(tl.int64)
    b88, b8x, bx8, bxx = both
    f8, fx = first
    s8, sx = second
    zeros = once * inside - (f8 + fx) - (s8 + sx) + (b88 + b8x + bx8 + bxx)
    first_zero = once * first_count - first_found[0] - first_found[1]
    second_zero = once * second_count - second_found[0] - second_found[1]
    values = (
        once, once * macs, once * (macs - inside), once * 0,
        zeros, s8 - b88 - bx8, sx - b8x - bxx,
        f8 - b88 - b8x, b88, b8x,
        fx - bx8 - bxx, bx8, bxx,
        first_zero, first_found[0], first_found[1], second_zero, second_found[0], second_found[1],
    )  # fmt: skip
    place = tl.arange(0, 32)
    row = tl.zeros((32,), tl.int64)
    for i in tl.static_range(19):
        row = tl.where(place == i, values[i], row)
    if swapped != 0:  # the table transposed, and the operands' elements in the other order
        table = place - 4
        to = tl.where((place >= 4) & (place < 13), table % 3 * 3 + table // 3 + 4, place)
        place = tl.where((place >= 13) & (place < 16), place + 3, tl.where((place >= 16) & (place < 19), place - 3, to))
    tl.atomic_add(counter_ptr + place, row, mask=place < 19, sem="relaxed")


@triton.jit
def _three(g_ptr, FIRST: tl.constexpr):
    """Three sizes of a `ConvShape`, as `_launch` lists them."""
    return tl.load(g_ptr + FIRST), tl.load(g_ptr + FIRST + 1), tl.load(g_ptr + FIRST + 2)


@triton.jit
def _macs(g_ptr, pairs):
    """Multiplications of so many pairs of an output position and a kernel offset, int64."""
    batch, in_channels, out_channels = _three(g_ptr, 0)
    groups = tl.load(g_ptr + 3)
    return tl.cast(batch, tl.int64) * out_channels * (in_channels // groups) * pairs


@triton.jit
def _weight_step(counter_ptr, position_ptr, weight_ptr, pid, programs, g_ptr, of_input, TILE_C: tl.constexpr,
                 TILE_P: tl.constexpr):  # fmt: skip
    """A program's share of position [2, channels, *grid] by weight [2, channels, *kernel].

    of_input: whether the grid is the input, else it is the output. A tile is some channels by some output positions
    under one offset.
    """
    batch, in_channels, out_channels = _three(g_ptr, 0)
    groups, pairs = tl.load(g_ptr + 3), tl.load(g_ptr + 4)
    conv_input, conv_output, kernel = _three(g_ptr, 5), _three(g_ptr, 8), _three(g_ptr, 11)
    stride, padding, dilation = _three(g_ptr, 14), _three(g_ptr, 17), _three(g_ptr, 20)
    channels, others = out_channels, in_channels // groups
    offsets = kernel[0] * kernel[1] * kernel[2]
    positions = conv_output[0] * conv_output[1] * conv_output[2]
    grid = positions
    if of_input != 0:
        channels, others = in_channels, out_channels // groups
        grid = conv_input[0] * conv_input[1] * conv_input[2]
    position_tiles = tl.cdiv(positions, TILE_P)
    zero = tl.zeros((TILE_C,), tl.int64)
    b88, b8x, bx8, bxx = zero, zero, zero, zero
    f8, fx, s8, sx = zero, zero, zero, zero
    for tile in range(pid, tl.cdiv(channels, TILE_C) * offsets * position_tiles, programs):
        p = tile % position_tiles * TILE_P + tl.arange(0, TILE_P)
        offset = tile // position_tiles % offsets
        c = tile // (position_tiles * offsets) * TILE_C + tl.arange(0, TILE_C)
        p0, p1, p2 = _split(p, conv_output)
        at, met = _overlap(p0, p1, p2, offset, conv_input, kernel, stride, padding, dilation)
        met = met & (p < positions)
        at = tl.where(of_input != 0, at, p)
        mask = (c < channels)[:, None] & met[None, :]
        from_grid = position_ptr + c[:, None] * grid + at[None, :]
        g8 = tl.sum(tl.load(from_grid, mask=mask, other=0).to(tl.int64), axis=1)
        gx = tl.sum(tl.load(from_grid + channels * grid, mask=mask, other=0).to(tl.int64), axis=1)
        from_weight = weight_ptr + c * offsets + offset
        w8 = tl.load(from_weight, mask=c < channels, other=0).to(tl.int64)
        wx = tl.load(from_weight + channels * offsets, mask=c < channels, other=0).to(tl.int64)
        b88 += g8 * w8
        b8x += g8 * wx
        bx8 += gx * w8
        bxx += gx * wx
        f8 += g8
        fx += gx
        times = tl.sum(met.to(tl.int32))
        s8 += w8 * times
        sx += wx * times
    grid_count = tl.cast(batch, tl.int64) * channels * grid
    weight_count = tl.cast(channels, tl.int64) * others * offsets
    _add(
        counter_ptr,
        pid,
        (tl.sum(b88), tl.sum(b8x), tl.sum(bx8), tl.sum(bxx)),
        (tl.sum(f8) * others, tl.sum(fx) * others),
        (tl.sum(s8) * batch, tl.sum(sx) * batch),
        _sums(position_ptr, channels * grid, pid, programs, 1024),
        _sums(weight_ptr, channels * offsets, pid, programs, 1024),
        grid_count,
        weight_count,
        _macs(g_ptr, positions * offsets),
        _macs(g_ptr, pairs),
        0,
    )


@triton.jit
def _grid_step(counter_ptr, input_position_ptr, input_sample_ptr, output_position_ptr, output_sample_ptr, pid, programs,
               g_ptr, output_first, TILE_R: tl.constexpr, TILE_P: tl.constexpr):  # fmt: skip
    """A program's share of input_sample [2, rows, *input] by output_sample [2, rows, *output].

    A row is a channel group of a sample; a tile is some rows by some output positions. What all kernel offsets find in
    the input is summed before it is multiplied, since the output's element is the same under every offset.
    """
    batch, in_channels, out_channels = _three(g_ptr, 0)
    groups, pairs = tl.load(g_ptr + 3), tl.load(g_ptr + 4)
    conv_input, conv_output, kernel = _three(g_ptr, 5), _three(g_ptr, 8), _three(g_ptr, 11)
    stride, padding, dilation = _three(g_ptr, 14), _three(g_ptr, 17), _three(g_ptr, 20)
    rows = batch * groups
    positions = conv_output[0] * conv_output[1] * conv_output[2]
    grid = conv_input[0] * conv_input[1] * conv_input[2]
    position_tiles = tl.cdiv(positions, TILE_P)
    half_input, half_output = tl.cast(rows, tl.int64) * grid, tl.cast(rows, tl.int64) * positions
    zero = tl.zeros((TILE_P,), tl.int64)
    b88, b8x, bx8, bxx = zero, zero, zero, zero
    f8, fx, s8, sx = zero, zero, zero, zero
    for tile in range(pid, tl.cdiv(rows, TILE_R) * position_tiles, programs):
        p = tile % position_tiles * TILE_P + tl.arange(0, TILE_P)
        row = tile // position_tiles * TILE_R + tl.arange(0, TILE_R)
        p0, p1, p2 = _split(p, conv_output)
        seen8 = tl.zeros((TILE_R, TILE_P), tl.int32)
        seenx = tl.zeros((TILE_R, TILE_P), tl.int32)
        times = tl.zeros((TILE_P,), tl.int32)
        for offset in range(kernel[0] * kernel[1] * kernel[2]):
            at, met = _overlap(p0, p1, p2, offset, conv_input, kernel, stride, padding, dilation)
            met = met & (p < positions)
            mask = (row < rows)[:, None] & met[None, :]
            from_input = input_sample_ptr + row[:, None].to(tl.int64) * grid + at[None, :]
            seen8 += tl.load(from_input, mask=mask, other=0).to(tl.int32)
            seenx += tl.load(from_input + half_input, mask=mask, other=0).to(tl.int32)
            times += met.to(tl.int32)
        mask = (row < rows)[:, None] & (p < positions)[None, :]
        from_output = output_sample_ptr + row[:, None].to(tl.int64) * positions + p[None, :]
        d8 = tl.load(from_output, mask=mask, other=0).to(tl.int64)
        dx = tl.load(from_output + half_output, mask=mask, other=0).to(tl.int64)
        b88 += tl.sum(seen8 * d8, axis=0)
        b8x += tl.sum(seen8 * dx, axis=0)
        bx8 += tl.sum(seenx * d8, axis=0)
        bxx += tl.sum(seenx * dx, axis=0)
        f8 += tl.sum(seen8.to(tl.int64), axis=0)
        fx += tl.sum(seenx.to(tl.int64), axis=0)
        s8 += tl.sum(d8, axis=0) * times
        sx += tl.sum(dx, axis=0) * times
    output_others = out_channels // groups
    input_others = in_channels // groups
    _add(
        counter_ptr,
        pid,
        (tl.sum(b88), tl.sum(b8x), tl.sum(bx8), tl.sum(bxx)),
        (tl.sum(f8) * output_others, tl.sum(fx) * output_others),
        (tl.sum(s8) * input_others, tl.sum(sx) * input_others),
        _sums(input_position_ptr, in_channels * grid, pid, programs, 1024),
        _sums(output_position_ptr, out_channels * positions, pid, programs, 1024),
        tl.cast(batch, tl.int64) * in_channels * grid,
        tl.cast(batch, tl.int64) * out_channels * positions,
        _macs(g_ptr, positions * kernel[0] * kernel[1] * kernel[2]),
        _macs(g_ptr, pairs),
        output_first,
    )


SIZES = [
    "weight_at", "grid_at", "lanes_at", "also_at", "known_at", "committed", "weight_programs", "grid_programs",
    "of_input", "output_first", "samples", "channels", "times",
]  # fmt: skip
TENSORS = [
    "counters_ptr", "lanes_ptr", "position_ptr", "weight_ptr", "input_position_ptr", "input_sample_ptr",
    "output_position_ptr", "output_sample_ptr", "runs_ptr", "also_ptr", "known_ptr", "states_ptr", "g_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def _count_kernel(
    counters_ptr,
    lanes_ptr,
    position_ptr,
    weight_ptr,
    input_position_ptr,
    input_sample_ptr,
    output_position_ptr,
    output_sample_ptr,
    runs_ptr,
    also_ptr,
    known_ptr,
    states_ptr,
    g_ptr,
    weight_at,
    grid_at,
    lanes_at,
    also_at,
    known_at,
    committed,
    weight_programs,
    grid_programs,
    of_input,
    output_first,
    samples,
    channels,
    times,
    TILE: tl.constexpr,
    TILE_P: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What a pass counts, by programs of their own: a weight's step, the grids' step, the profile of the runs.

    The first program also adds a profile that is known to the lanes, and puts thresholds to come into use. What is None
    is not asked for. Of the counters, the lanes and `also` (int64) the parts in question begin at elements `..._at`.
    g: int32, the sizes of a `ConvShape`, as `_launch` lists them.
    """
    pid = tl.program_id(0)
    if pid == 0:
        if known_ptr is not None:
            place = tl.arange(0, 128)
            known = tl.load(known_ptr + place, mask=place < 81, other=0)
            tl.atomic_add(lanes_ptr + known_at + place, known, mask=place < 81, sem="relaxed")
        if states_ptr is not None:
            row = tl.arange(0, 16)
            to_come = tl.load(states_ptr + 2 * row + 1, mask=row < committed, other=0)
            tl.store(states_ptr + 2 * row, to_come, mask=row < committed)
    if pid < weight_programs:
        if position_ptr is not None:
            _weight_step(counters_ptr + weight_at, position_ptr, weight_ptr, pid, weight_programs, g_ptr, of_input,
                         TILE // TILE_P, TILE_P)  # fmt: skip
    elif pid < weight_programs + grid_programs:
        if input_sample_ptr is not None:
            _grid_step(counters_ptr + grid_at, input_position_ptr, input_sample_ptr, output_position_ptr,
                       output_sample_ptr, pid - weight_programs, grid_programs, g_ptr, output_first, TILE // TILE_P,
                       TILE_P)  # fmt: skip
    else:
        if runs_ptr is not None:
            before = weight_programs + grid_programs
            if also_ptr is not None:
                also_ptr += also_at
            add_profile(pid - before, tl.num_programs(0) - before, runs_ptr, lanes_ptr + lanes_at, also_ptr, samples,
                        channels, times, COLUMNS)  # fmt: skip


class WeightStep(NamedTuple):
    """A step that multiplies a grid by the weight: forward, or grad_input."""

    at: int
    """element of the counters at which its counter begins"""
    position: Tensor
    """int32 [2, channels, *grid], the grid's elements of each class over the batch"""
    weight: Tensor
    """int32 [2, channels, *kernel], the weight's over the other side's channels"""
    side: str
    """conv_input or conv_output: which grid it is"""


class GridStep(NamedTuple):
    """A step that multiplies the two grids: grad_weight."""

    at: int
    conv_input: tuple[Tensor, Tensor]
    """int32 [2, channels, *grid], its elements of each class over the batch; int32 or uint8 [2, N, g, *grid], those
    over the channels of a group"""
    conv_output: tuple[Tensor, Tensor]
    first: str
    """conv_input or conv_output: which grid is the first operand"""


class Profile(NamedTuple):
    """Runs whose profile is added to the lanes, at an element, and to another tensor or another part of the lanes."""

    runs: Tensor
    at: int
    also: Tensor | None = None
    also_at: int = 0


class Known(NamedTuple):
    """A profile that is added to the lanes, at an element."""

    profile: Tensor
    at: int


def count(
    counters: Tensor,
    lanes: Tensor,
    geometry: Sequence[int],
    weight: WeightStep | None = None,
    grids: GridStep | None = None,
    profile: Profile | None = None,
    known: Known | None = None,
    states: Tensor | None = None,
) -> None:
    """Add all that a pass of a layer counts to its counters and lanes, in one launch.

    Args:
        counters, lanes: int64, contiguous.
        geometry: `ConvShape.pack()`.
        states: int32 [rows, 2], thresholds in use and to come; the latter are put into use.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or sides; RuntimeError: not on a GPU.
    """
    sides = None if weight is None else weight.side, None if grids is None else grids.first
    runs = None if profile is None else profile.runs.shape
    launch, g, expected = _launch(tuple(geometry), *sides, runs, counters.device, processors(counters.device))
    operands = [] if weight is None else [weight.position, weight.weight]
    operands += [] if grids is None else [*grids.conv_input, *grids.conv_output]
    if tuple([x.numel() for x in operands]) != expected:
        found = [list(x.shape) for x in operands]
        raise ValueError(f"operands {found} do not fit the geometry: they have {list(expected)} elements")
    _check(counters, lanes, operands, profile)
    operands = [x.contiguous() for x in operands]
    tensors = [None, None] if weight is None else operands[:2]
    tensors += [None] * 4 if grids is None else operands[-4:]
    tensors += [None, None] if profile is None else [profile.runs.contiguous(), profile.also]
    launch(
        counters,
        lanes,
        *tensors,
        None if known is None else known.profile,
        states,
        g,
        scalars=(
            0 if weight is None else weight.at,
            0 if grids is None else grids.at,
            0 if profile is None else profile.at,
            0 if profile is None else profile.also_at,
            0 if known is None else known.at,
            0 if states is None else len(states),
        ),
    )


def _check(counters: Tensor, lanes: Tensor, operands: Sequence[Tensor], profile: Profile | None) -> None:
    """Dtypes and devices are what the kernel takes."""
    if counters.dtype != torch.int64 or lanes.dtype != torch.int64:
        check_dtype((torch.int64,), counters=counters, lanes=lanes)
    if not counters.is_contiguous() or not lanes.is_contiguous() or lanes.numel() % MEMBERS:
        raise ValueError(f"counters and lanes are contiguous, and lanes whole profiles of {MEMBERS}")
    for operand in operands:
        if operand.device != counters.device:
            check_device(counters=counters, operand=operand)
        if operand.dtype not in (torch.int32, torch.uint8):
            check_dtype((torch.int32, torch.uint8), operand=operand)
    if profile is not None and profile.runs.dtype != torch.uint8:
        check_dtype((torch.uint8,), runs=profile.runs)


def takes(geometry: Sequence[int]) -> bool:
    """Whether the kernel's 32-bit offsets reach all elements."""
    batch, in_channels, out_channels, groups, offsets, *grids = _sizes(tuple(geometry))
    largest = max(in_channels * grids[0], out_channels * grids[1], (in_channels + out_channels) * offsets, *grids)
    return largest < INT32 and batch * groups < INT32 and len(geometry) <= 4 + 6 * 3


@lru_cache(maxsize=1024)
def _sizes(packed: tuple[int, ...]) -> tuple[int, ...]:
    """Batch, channels of both sides, groups, kernel offsets, positions of both grids."""
    g = in_dims(packed, 3) if len(packed) <= 4 + 6 * 3 else ConvShape.unpack(packed)
    return g.batch, g.in_channels, g.out_channels, g.groups, prod(g.kernel), prod(g.conv_input), prod(g.conv_output)


@lru_cache(maxsize=1024)
def _launch(
    packed: tuple[int, ...],
    side: str | None,
    first: str | None,
    runs: torch.Size | None,
    device: torch.device,
    processors: int,
) -> tuple[Launch, Tensor, tuple[int, ...]]:
    """The launch, the sizes that it walks, and how many elements its operands have.

    The sizes are batch, channels of both sides, groups, and pairs of an output position and a kernel offset inside the
    input; then, of three dimensions each, input, output, kernel, stride, padding, dilation.
    """
    for name, value in (("side", side), ("first", first)):
        if value not in (None, "conv_input", "conv_output"):
            raise ValueError(f"{name} is 'conv_input' or 'conv_output', not {value!r}")
    g = in_dims(packed, 3)
    positions, offsets = prod(g.conv_output), prod(g.kernel)
    tile_p = next((size for size in POSITIONS if size >= positions), POSITIONS[-1])
    tile_c = TILE // tile_p
    channels = g.in_channels if side == "conv_input" else g.out_channels
    position_tiles = triton.cdiv(positions, tile_p)
    weight_tiles = triton.cdiv(channels, tile_c) * offsets * position_tiles if side else 0
    grid_tiles = triton.cdiv(g.batch * g.groups, tile_c) * position_tiles if first else 0
    weight_programs, grid_programs = min(weight_tiles, PROGRAMS), min(grid_tiles, PROGRAMS)
    programs = weight_programs + grid_programs + (profile_programs(runs, processors) if runs else 0)
    pairs = g.inside // g.per_offset if g.per_offset else 0
    walked = (g.conv_input, g.conv_output, g.kernel, g.stride, g.padding, g.dilation)
    sizes = [g.batch, g.in_channels, g.out_channels, g.groups, pairs, *chain.from_iterable(walked)]
    launch = Launch(
        device,
        _count_kernel,
        (max(1, programs),),
        weight_programs,
        grid_programs,
        int(side == "conv_input"),
        int(first == "conv_output"),
        *(runs or (0, 0, 0)),
        TILE=TILE,
        TILE_P=tile_p,
        COLUMNS=COLUMNS,
        maxnreg=REGISTERS,
    )
    conv_input, conv_output = prod(g.conv_input), positions
    halves: list[int] = []
    if side:
        halves += [channels * (conv_input if side == "conv_input" else conv_output), channels * offsets]
    if first:
        rows = g.batch * g.groups
        halves += [g.in_channels * conv_input, rows * conv_input, g.out_channels * conv_output, rows * conv_output]
    return launch, torch.tensor(sizes, dtype=torch.int32, device=device), tuple(2 * half for half in halves)
