"""Rounding on a GPU: one pass that reads a tensor once and writes it rounded, with its groups if they are wanted.

Bit-equal to `reference.quantize`. Nothing here reads a tensor back to the host. Groups are 0 (zero, also by
underflow), 8 (`low`) and 16 (`high`, or a float that is not rounded).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.lanes import RUN, runs_of
from lnpu_torch.kernels.launch import (
    Launch,
    alignment,
    check_device,
    check_dtype,
    check_runs,
    on,
    power_of_2,
    processors,
)
from lnpu_torch.kernels.rounding import (
    FLOATS,
    Config,
    Formats,
    bits_of,
    check_formats,
    check_keys,
    checked,
    dense,
    random_bits,
    readable,
    round_by_rule,
)

FLAT = Config(block=4096, warps=4, per_processor=16, longest=8)
"""Chosen by reasoning, not yet by measurement."""


@triton.jit
def _flat_kernel(
    x_ptr,
    out_ptr,
    groups_ptr,
    partial_ptr,
    threshold_ptr,
    seed_ptr,
    stream,
    count,
    sizes,
    strides,
    F: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rounds a dense tensor in memory order.

    sizes, strides: for random bits, the dimensions in memory order, fastest first, and their steps in logical order.
    groups: where each element's group goes, or None. partial: [programs, 2], for the program's non-zeros (FP8, FP16),
    or None.
    """
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    threshold = tl.load(threshold_ptr)
    found = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        index = tl.arange(0, BLOCK)
        left = count - first - step * BLOCK
        mask = index < left
        bits = bits_of(x_ptr + first + step * BLOCK, index, mask)
        random = bits
        if STOCHASTIC:
            rest = first + step * BLOCK + index
            logical = tl.zeros_like(rest)
            for d in tl.static_range(len(sizes)):
                logical += rest % sizes[d] * strides[d]
                rest = rest // sizes[d]
            random = random_bits(logical, seed_ptr, stream)
        q, small = round_by_rule(bits, threshold, random, F, out_ptr.dtype.element_ty == tl.float16, STOCHASTIC)
        tl.store(out_ptr + first + step * BLOCK + index, q, mask=mask)
        if groups_ptr is not None:
            group = tl.where(q != 0, tl.where(small, 8, 16), 0).to(tl.uint8)
            tl.store(groups_ptr + first + step * BLOCK + index, group, mask=mask)
        if partial_ptr is not None:
            found += tl.where(q != 0, tl.where(small, 1, 1 << 16), 0)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0) * 2, tl.sum(found & 0xFFFF))
        tl.store(partial_ptr + tl.program_id(0) * 2 + 1, tl.sum(found >> 16))


@triton.jit
def _totals_kernel(partial_ptr, out_ptr, count, programs, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums partial [programs, 2] into out [3]: zeros, FP8, FP16."""
    low = tl.zeros((BLOCK,), tl.int64)
    high = tl.zeros((BLOCK,), tl.int64)
    for step in range(STEPS):
        index = step * BLOCK + tl.arange(0, BLOCK)
        low += tl.load(partial_ptr + index * 2, mask=index < programs, other=0)
        high += tl.load(partial_ptr + index * 2 + 1, mask=index < programs, other=0)
    tl.store(out_ptr, count - tl.sum(low) - tl.sum(high))
    tl.store(out_ptr + 1, tl.sum(low))
    tl.store(out_ptr + 2, tl.sum(high))


def quantize(
    x: Tensor,
    threshold: Tensor,
    low: str | None,
    high: str | None,
    *,
    seed: Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype = torch.float16,
    groups: bool = True,
    totals: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Round a tensor, as `reference.quantize` does.

    Args:
        x: float32, float16 or bfloat16, any shape. Dense layouts (channels_last, transposed) are read as they lie.
        threshold: one int32 element on x's device (no meaning where the rule has no `low`).
        low, high: names of the groups' formats, None for a rule without that group.
        seed: one int64 element, for stochastic rounding by `reference.random_bits`; None rounds to nearest.
        stream: as in `reference.random_bits`.
        dtype: of the values, float16 or float32 (which `high="e6m9"` needs).
        groups, totals: whether each element's group is wanted, and how many elements are in each.

    Returns:
        Values; groups (uint8: 0, 8, 16) or None; elements of each group (zero, FP8, FP16; int64 [3]) or None. Values
        and groups have the strides of `torch.empty_like(x)`.

    Raises:
        TypeError, ValueError: a dtype, size, format or device that the kernel does not take.
        RuntimeError: the tensors are not on a GPU.
    """
    check_dtype((torch.float16, torch.float32), values=dtype)
    formats = checked(x, threshold, low, high, seed, half=dtype == torch.float16)
    x = dense(x)
    out = torch.empty_like(x, dtype=dtype)
    marks = torch.empty_like(x, dtype=torch.uint8) if groups else None
    blocks = triton.cdiv(x.numel(), FLAT.block)
    # More tiles for each program keep the partial sums few.
    walk = power_of_2(max(1, blocks // (FLAT.per_processor * processors(x.device))))
    steps = min(FLAT.longest, walk) if totals else 1
    programs = triton.cdiv(blocks, steps)
    partial = torch.empty(programs, 2, dtype=torch.int32, device=x.device) if totals else None
    if programs:
        sizes, strides = ((1,), (1,)) if seed is None else _memory_order(x)
        with on(x):
            _flat_kernel[(programs,)](
                readable(x),
                out,
                marks,
                partial,
                threshold,
                seed,
                stream,
                x.numel(),
                sizes,
                strides,
                F=formats,
                STOCHASTIC=seed is not None,
                STEPS=steps,
                BLOCK=FLAT.block,
                num_warps=FLAT.warps,
            )
    return out, marks, None if partial is None else _totals(partial, x.numel())


def _memory_order(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of a dense tensor's dimensions, the fastest in memory first, and their steps in logical order.

    Dimensions that follow each other in both orders are joined.
    """
    logical = [prod(x.shape[d + 1 :]) for d in range(x.dim())]
    order = sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=x.stride)
    joined: list[list[int]] = []
    for size, step in ((x.shape[d], logical[d]) for d in order):
        if joined and step == joined[-1][0] * joined[-1][1]:
            joined[-1][0] *= size
        else:
            joined.append([size, step])
    joined = joined or [[1, 1]]
    return tuple(size for size, _ in joined), tuple(step for _, step in joined)


def _totals(partial: Tensor, count: int) -> Tensor:
    totals = torch.empty(3, dtype=torch.int64, device=partial.device)
    loops = power_of_2(triton.cdiv(len(partial), 1024))
    with on(partial):
        _totals_kernel[(1,)](partial, totals, count, len(partial), STEPS=loops, BLOCK=1024)
    return totals


GRID = Config(block=4096, warps=4, per_processor=3, longest=64)
"""32 elements a thread: 64 to 128 bytes under way. Chosen by reasoning, not yet by measurement."""
CHANNELS = 64
"""Channels of a tile where memory runs along them."""

Wanted = tuple[bool, bool, bool, bool]
"""float32 values, float16 values, counts by sample, runs"""


@triton.jit
def _grid_kernel(
    x_ptr,
    single_ptr,
    half_ptr,
    sums_ptr,
    runs_ptr,
    threshold_ptr,
    seed_ptr,
    stream,
    rows,
    group_size,
    groups,
    space,
    row_stride,
    channel_stride,
    space_stride,
    space_tiles,
    channel_tiles,
    group_tiles,
    chunks,
    row_groups,
    UNITS: tl.constexpr,
    F: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SAMPLE: tl.constexpr,
    POSITION_SHARED: tl.constexpr,
    SAMPLE_SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_S: tl.constexpr,
    RUN: tl.constexpr,
):
    """Rounds a grid [row groups * rows, groups * group size, space], and counts over rows, over channels, or both.

    A program holds a tile [TILE_C, TILE_S] of a sample's channels and positions, and walks ROWS samples. Counts over
    samples stay in registers until the end, counts over channels are one sum per sample. Where several programs
    share a count they add to it, each to its own stretch of addresses. Both groups' counts are held in one integer,
    FP8's in the lower 16 bits, FP16's in the upper.

    x: floats, bfloat16 as int16, or groups as uint8. single, half: where the values go, as float32 and binary16, at x's
    offsets; either or both may be None. sums: the counts over rows [2, row groups, channels, space], then, if SAMPLE,
    those over channels [2, rows, groups, space]. runs: uint8 [rows, channels, runs of 16 positions], the non-zeros of
    each, or None; RUN: 16, or all of a shorter tile.
    POSITION_SHARED, SAMPLE_SHARED: several programs have a part in each count; they add to it.
    TILE_GROUPS: channel groups in a tile; if one, a group takes `group_tiles` tiles.
    UNITS: what group_size, space and the strides are multiples of; they come divided by it, so that the compiler
    knows how wide it may access memory.
    """
    group_size = group_size * UNITS[0]
    space = space * UNITS[1]
    row_stride = row_stride * UNITS[2]
    channel_stride = channel_stride * UNITS[3]
    space_stride = space_stride * UNITS[4]
    channels = groups * group_size

    pid = tl.program_id(0)
    s = pid % space_tiles * TILE_S + tl.arange(0, TILE_S)
    tile = pid // space_tiles % channel_tiles
    chunk = pid // space_tiles // channel_tiles
    row_group = chunk // chunks
    first_row = chunk % chunks * ROWS
    group = tile // group_tiles * TILE_GROUPS
    first_channel = group * group_size + tile % group_tiles * TILE_C
    c = first_channel + tl.arange(0, TILE_C)
    end = channels
    if TILE_GROUPS == 1:
        end = (group + 1) * group_size
    mask = (c < end)[:, None] & (s < space)[None, :]
    offsets = c[:, None] * channel_stride + s[None, :] * space_stride
    group = group + tl.arange(0, TILE_GROUPS)
    sample_offsets = group[:, None] * space + s[None, :]
    sample_mask = (group < groups)[:, None] & (s < space)[None, :]
    sample_half = tl.cast(row_groups, tl.int64) * rows * groups * space

    sample_ptr = sums_ptr + tl.cast(row_groups, tl.int64) * 2 * channels * space
    threshold = 0
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr)
    over_rows = tl.zeros((TILE_C, TILE_S), tl.int32)
    for i in range(ROWS):
        row = tl.cast(row_group, tl.int64) * rows + first_row + i
        inside = mask & (first_row + i < rows)
        if x_ptr.dtype.element_ty == tl.uint8:
            known = tl.load(x_ptr + row * row_stride + offsets, mask=inside, other=0)
            found = tl.where(known != 0, tl.where(known == 8, 1, 1 << 16), 0)
        else:
            bits = bits_of(x_ptr + row * row_stride, offsets, inside)
            random = bits
            if STOCHASTIC:
                random = random_bits((row * channels + c[:, None]) * space + s[None, :], seed_ptr, stream)
            HALF: tl.constexpr = single_ptr is None and half_ptr is not None
            q, small = round_by_rule(bits, threshold, random, F, HALF, STOCHASTIC)
            if single_ptr is not None:
                tl.store(single_ptr + row * row_stride + offsets, q, mask=inside)
            if half_ptr is not None:
                tl.store(half_ptr + row * row_stride + offsets, q.to(tl.float16), mask=inside)
            found = tl.where(q != 0, tl.where(small, 1, 1 << 16), 0)
            if runs_ptr is not None:
                lengths = tl.sum(tl.reshape((found != 0).to(tl.int32), (TILE_C, TILE_S // RUN, RUN)), axis=2)
                run = pid % space_tiles * (TILE_S // RUN) + tl.arange(0, TILE_S // RUN)
                times = tl.cdiv(space, RUN)
                at = runs_ptr + (row * channels + c[:, None]) * times + run[None, :]
                there = (c < end)[:, None] & (run < times)[None, :] & (first_row + i < rows)
                tl.store(at, lengths.to(tl.uint8), mask=there)
        over_rows += found
        if SAMPLE:
            if TILE_GROUPS == 1:
                sums = tl.sum(found, axis=0)[None, :]
            else:
                sums = tl.sum(tl.reshape(found, (TILE_GROUPS, TILE_C // TILE_GROUPS, TILE_S)), axis=1)
            at = sample_ptr + row * groups * space + sample_offsets
            _put(at, sums & 0xFFFF, sample_mask & (first_row + i < rows), SAMPLE_SHARED)
            _put(at + sample_half, sums >> 16, sample_mask & (first_row + i < rows), SAMPLE_SHARED)
    at = sums_ptr + (tl.cast(row_group, tl.int64) * channels + c[:, None]) * space + s[None, :]
    position_half = tl.cast(row_groups, tl.int64) * channels * space
    _put(at, over_rows & 0xFFFF, mask, POSITION_SHARED)
    _put(at + position_half, over_rows >> 16, mask, POSITION_SHARED)


@triton.jit
def _put(at, value, mask, SHARED: tl.constexpr):
    if SHARED:
        tl.atomic_add(at, value, mask=mask, sem="relaxed")
    else:
        tl.store(at, value, mask=mask)


class Rounded(NamedTuple):
    """What `quantize_grid` returns; what was not asked for is None."""

    single: Tensor | None
    """float32 values"""
    half: Tensor | None
    """float16 values"""
    position: Tensor
    """`counting.per_position(groups, share)`: int32 [2, N / share, C, *grid]"""
    sample: Tensor | None
    """`counting.per_sample(groups, channel_groups)`: int32 [2, N, g, *grid]"""
    runs: Tensor | None
    """`lanes.runs_of` the values: uint8 [N, C, ceil(positions / 16)]"""


def quantize_grid(
    x: Tensor,
    threshold: Tensor,
    low: str | None,
    high: str | None,
    share: int,
    channel_groups: int,
    *,
    single: bool = False,
    half: bool = True,
    sample: bool = True,
    runs: bool = False,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Rounded:
    """`quantize` of a grid [N, C, *grid] (or a weight), with the sums that the counters need instead of groups.

    Args:
        share: how many samples in a row have one count by position; divides N.
        channel_groups: of the convolution; divides C.
        single, half: whether the values are wanted as float32, as binary16, or both.
        sample: whether counts by sample are wanted.
        runs: whether the non-zeros of runs of positions are wanted.

    Raises:
        As `quantize`; ValueError also for a share or number of groups that does not divide, and for runs of a tensor
        without a grid.
    """
    wanted = (single, half, sample, runs)
    constants = (low, high, share, channel_groups, wanted, seed is not None, stream, GRID, processors(x.device))
    plan = _grid_plan(x.shape, x.stride(), x.dtype, x.device, *constants)
    if threshold.dtype != torch.int32 or threshold.device != x.device or seed is not None:
        check_keys(x, threshold, seed)
    if plan.fallback:
        return _grid_in_steps(x, threshold, low, high, share, channel_groups, wanted, seed, stream)
    x = torch.empty_like(x).copy_(x) if plan.copied else x
    floats = torch.empty_like(x, dtype=torch.float32) if single else None
    halves = torch.empty_like(x, dtype=torch.float16) if half else None
    lengths = torch.empty(plan.runs, dtype=torch.uint8, device=x.device) if plan.runs is not None else None
    sums = plan.empty_sums(x.device)
    if plan.launch is not None:
        plan.launch(readable(x), floats, halves, sums, lengths, threshold, seed)
    return Rounded(floats, halves, *plan.split(sums), lengths)


def grid_sums(x: Tensor, share: int, channel_groups: int, *, sample: bool = True) -> tuple[Tensor, Tensor | None]:
    """The counts of `quantize_grid` for a tensor that is not rounded, in one pass.

    Args:
        x: [N, C, *grid]. Groups (uint8: 0, 8, 16); or floats, of which all that are not zero count as FP16.
        share, channel_groups, sample: as in `quantize_grid`.
    """
    check_dtype((torch.uint8, *FLOATS), x=x)
    check_device(x=x)
    x = x if _grid_strides(x.shape, x.stride()) is not None else x.contiguous()
    wanted = (False, False, sample, False)
    constants = (None, None, share, channel_groups, wanted, False, 0, GRID, processors(x.device))
    plan = _grid_plan(x.shape, x.stride(), x.dtype, x.device, *constants)
    sums = plan.empty_sums(x.device)
    if plan.launch is not None:
        plan.launch(readable(x), None, None, sums, None, None, None)
    return plan.split(sums)


def _check_layout(shape: torch.Size, share: int, channel_groups: int) -> None:
    if len(shape) < 2:
        raise ValueError(f"expected [N, C, *grid], got {list(shape)}")
    for name, size, by in (("samples", shape[0], share), ("channels", shape[1], channel_groups)):
        if size and (by < 1 or size % by):
            raise ValueError(f"{size} {name} do not divide by {by}")


def _grid_strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int, int] | None:
    """Strides of [N, C, *grid] seen as [N, C, prod(grid)]; None if it cannot be, or if N is the fastest axis."""
    space = [d for d in range(2, len(shape)) if shape[d] > 1]
    step = stride[space[-1]] if space else 1
    if any(stride[a] != stride[b] * shape[b] for a, b in pairwise(space)):
        return None
    fastest = [s for s, size in ((stride[1], shape[1]), (step, prod(shape[2:]))) if size > 1]
    if shape[0] > 1 and fastest and stride[0] < min(fastest):
        return None
    return stride[0], stride[1], step


class GridPlan(NamedTuple):
    """What `quantize_grid` does for tensors of one shape and dtype: memory for the results, and the launch."""

    position: tuple[int, ...]
    sample: tuple[int, ...] | None
    sample_at: int
    """Where counts by sample begin, after those by position."""
    size: int
    runs: tuple[int, ...] | None
    shared: bool
    """Whether counts are added to, and so start from zero."""
    copied: bool
    """Whether x has gaps in memory, and is copied first."""
    fallback: bool
    """Whether memory runs in an order in which no tile serves both sums."""
    launch: Launch | None
    """None if there is nothing to do."""

    def empty_sums(self, device: torch.device) -> Tensor:
        """Memory for the counts. Those to be added to start from zero; those that are written once need no start."""
        return (torch.zeros if self.shared else torch.empty)(self.size, dtype=torch.int32, device=device)

    def split(self, sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """The counts by position, and those by sample if there are any."""
        by_sample = None if self.sample is None else sums[self.sample_at :].view(self.sample)
        return sums[: self.sample_at].view(self.position), by_sample


@lru_cache(maxsize=1024)
def _grid_plan(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    low: str | None,
    high: str | None,
    share: int,
    channel_groups: int,
    wanted: Wanted,
    stochastic: bool,
    stream: int,
    config: Config,
    processors: int,
) -> GridPlan:
    """Without values wanted, x is only counted."""
    single, half, sample, runs = wanted
    rounds, copied = single or half or low is not None or high is not None, False
    check_dtype(FLOATS if rounds else (torch.uint8, *FLOATS), x=dtype)
    check_runs(device)
    formats = check_formats(low, high, half) if rounds else Formats.of(None, None)
    _check_layout(shape, share, channel_groups)
    if runs and len(shape) < 3:
        raise ValueError(f"{list(shape)} has no grid along which to run: see `lanes.runs_of`")
    if rounds:
        dense = torch.empty_like(torch.empty_strided(shape, stride, device="meta")).stride()
        stride, copied = dense, dense != stride
    batch, channels, *grid = shape
    position = (2, batch // share if share else 1, channels, *grid)
    by_sample = (2, batch, channel_groups, *grid) if sample else None
    sizes = prod(position), prod(by_sample) if by_sample else 0
    lengths = (batch, channels, triton.cdiv(prod(grid), RUN)) if runs else None
    plan = GridPlan(position, by_sample, sizes[0], sum(sizes), lengths, True, copied, False, None)
    if not shape.numel():
        return plan
    strides = _grid_strides(shape, stride)
    if strides is None:
        return plan._replace(fallback=True)
    space, group_size = prod(grid), channels // channel_groups
    last = strides[1] == 1 and channels > 1
    tile_groups, tile_c, tile_s = _tile(channels, group_size, space, config.block, last)
    group_tiles = triton.cdiv(group_size, tile_c) if tile_groups == 1 else 1
    channel_tiles = channel_groups * group_tiles if tile_groups == 1 else triton.cdiv(channels, tile_c)
    space_tiles = triton.cdiv(space, tile_s)
    programs = max(1, config.per_processor * processors * config.block // (tile_c * tile_s))
    walk = channel_tiles * space_tiles * batch // programs
    walk = min(config.longest, power_of_2(share), power_of_2(walk + 1) // 2 or 1)
    chunks = triton.cdiv(share, walk)
    lengths = (group_size, space, *strides)
    units = tuple(alignment(length) for length in lengths)
    group_units, *other_units = (length // unit for length, unit in zip(lengths, units, strict=True))
    launch = Launch(
        device,
        _grid_kernel,
        (space_tiles * channel_tiles * chunks * (batch // share),),
        stream,
        share,
        group_units,
        channel_groups,
        *other_units,
        space_tiles,
        channel_tiles,
        group_tiles,
        chunks,
        batch // share,
        UNITS=units,
        F=formats,
        STOCHASTIC=stochastic,
        SAMPLE=sample,
        POSITION_SHARED=chunks > 1,
        SAMPLE_SHARED=group_tiles > 1,
        ROWS=walk,
        TILE_GROUPS=tile_groups,
        TILE_C=tile_c,
        TILE_S=tile_s,
        RUN=min(tile_s, RUN),
        num_warps=config.warps,
    )
    return plan._replace(shared=chunks > 1 or (sample and group_tiles > 1), launch=launch)


def _grid_in_steps(
    x: Tensor,
    threshold: Tensor,
    low: str | None,
    high: str | None,
    share: int,
    channel_groups: int,
    wanted: Wanted,
    seed: Tensor | None,
    stream: int,
) -> Rounded:
    """`quantize_grid` in an order of memory in which no tile serves both sums: those are taken of the groups."""
    single, half, sample, runs = wanted
    dtype = torch.float32 if single else torch.float16
    rounded, groups, _ = quantize(x, threshold, low, high, seed=seed, stream=stream, dtype=dtype)
    assert groups is not None
    counts = grid_sums(groups, share, channel_groups, sample=sample)
    floats, halves = rounded if single else None, rounded.to(torch.float16) if half else None
    return Rounded(floats, halves, *counts, runs_of(rounded.contiguous()) if runs else None)


def _tile(channels: int, group_size: int, space: int, block: int, deep: bool) -> tuple[int, int, int]:
    """Channel groups, channels and positions in a tile of `block` elements, or fewer (more if that were part of a run).

    It covers 64 channels if it is to be deep (as where memory runs along them), else 128 positions, if there are so
    many; and more where the other axis is short. It holds one channel group or a part of one; where groups are narrow
    powers of two, several whole ones.
    """
    wide_c = max(CHANNELS, block // power_of_2(space)) if deep else block // min(128, power_of_2(space))
    whole = power_of_2(group_size) == group_size and group_size < min(wide_c, channels)
    tile_c = min(wide_c, power_of_2(channels if whole else group_size))
    tile_groups = tile_c // group_size if whole else 1
    return tile_groups, tile_c, min(power_of_2(space), max(RUN, block // tile_c))
