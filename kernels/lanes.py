"""Lane profiles on a GPU: runs counted in one pass over an operand, and all of a profile in one launch over its runs.

Equal to `lanes.runs_of` and `lanes.profile`. Whole numbers throughout; nothing is read back to the host.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.launch import Launch, alignment, check_device, check_dtype, power_of_2, processors, scratch
from lnpu_torch.kernels.rounding import FLOATS

RUN = 16
"""Positions of the shortest run; the same as `lane_family.RUN`."""
JOIN = 4
"""Runs that make one of the next length, of which there are three; the same as `lane_family.JOIN`."""
LONGEST = 16
"""Shortest runs that make a longest one; the same as `lane_family.LONGEST`."""
LANES = 1024
"""The most lanes; the same as `lane_family.LANES`."""
MEMBERS = 81
"""Entries of a profile: 3 lengths of run, each with 11 lane counts without a balancer, 9 with 4 lanes sharing their
work, and 7 with 16."""
RUNS = 4096
"""Runs in a tile, 32 for each of 128 threads. Chosen by reasoning, not yet by measurement."""
ROWS = tl.constexpr(16)


@triton.jit
def _runs_kernel(
    x_ptr,
    runs_ptr,
    channels,
    positions,
    times,
    sample_stride,
    channel_stride,
    position_stride,
    UNITS: tl.constexpr,
    RUN: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_S: tl.constexpr,
):
    """Non-zeros of each run of x [samples, channels, positions], uint8 [samples, channels, times].

    x: bits as int16 or int32. UNITS: what positions and the strides are multiples of; they come divided by it.
    """
    channel_tiles = tl.cdiv(channels, TILE_C)
    tiles = channel_tiles * tl.cdiv(positions, TILE_S)
    tile = tl.program_id(0) % tiles
    c = tile % channel_tiles * TILE_C + tl.arange(0, TILE_C)
    first = tile // channel_tiles * TILE_S
    s = first + tl.arange(0, TILE_S)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    at = c[:, None] * (channel_stride * UNITS[1]) + s[None, :] * (position_stride * UNITS[2])
    mask = (c < channels)[:, None] & (s < positions)[None, :]
    bits = tl.load(x_ptr + sample * sample_stride * UNITS[0] + at, mask=mask, other=0)
    found = ((bits << 1) != 0).to(tl.int32)  # both zeros are zero
    counts = tl.sum(tl.reshape(found, (TILE_C, TILE_S // RUN, RUN)), axis=2)
    t = first // RUN + tl.arange(0, TILE_S // RUN)
    at = (sample * channels + c[:, None]) * times + t[None, :]
    tl.store(runs_ptr + at, counts.to(tl.uint8), mask=(c < channels)[:, None] & (t < times)[None, :])


@triton.jit
def _members(totals, work, first_channel, channels, MEMBER: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
             ROWS: tl.constexpr):  # fmt: skip
    """Adds to totals, from element MEMBER on, the lane-cycles of LANES lanes and of their doubles, up to 1024.

    work [ROWS, columns]: of each row of LANES channels the non-zeros of its fullest lane, in each run. REPEATS: how
    many lengths of run have the same work, as where there is but one run.
    """
    place = tl.arange(0, 128)
    member: tl.constexpr = MEMBER
    for level in tl.static_range(11):
        if LANES << level <= 1024:
            if ROWS >> level > 0 and level > 0:
                work = tl.max(tl.reshape(work, (ROWS >> level, 2, work.shape[1])), axis=1)
            if ROWS >> level > 0:
                row = tl.arange(0, ROWS >> level)
                left = channels - first_channel - row * (LANES << level)
                held = tl.minimum(tl.maximum(left, 0), LANES << level)  # lanes that have a channel
                cycles = tl.sum(tl.sum(work, axis=1) * held, axis=0)
            for repeat in tl.static_range(REPEATS):
                totals += tl.where(place == member + level + repeat * 27, cycles, 0)
    return totals


@triton.jit
def _all_members(totals, work, first_channel, channels, MEMBER: tl.constexpr, REPEATS: tl.constexpr,
                 TILE_C: tl.constexpr):  # fmt: skip
    """`_members` without a balancer, with 4 and with 16 lanes that share their work."""
    totals = _members(totals, work, first_channel, channels, MEMBER, REPEATS, 1, TILE_C)
    by_4 = _shared(work, first_channel, channels, 4, TILE_C)
    totals = _members(totals, by_4, first_channel, channels, MEMBER + 11, REPEATS, 4, TILE_C // 4)
    by_16 = _shared(work, first_channel, channels, 16, TILE_C)
    return _members(totals, by_16, first_channel, channels, MEMBER + 20, REPEATS, 16, TILE_C // 16)


@triton.jit
def _shared(work, first_channel, channels, BALANCER: tl.constexpr, ROWS: tl.constexpr):
    """The work of every BALANCER channels, shared: the mean, rounded up."""
    sums = tl.sum(tl.reshape(work, (ROWS // BALANCER, BALANCER, work.shape[1])), axis=1)
    row = tl.arange(0, ROWS // BALANCER)[:, None]
    sharing = tl.minimum(tl.maximum(channels - first_channel - row * BALANCER, 1), BALANCER)
    return (sums + sharing - 1) // sharing


@triton.jit
def _profile_kernel(
    runs_ptr,
    out_ptr,
    rows_ptr,
    ticket_ptr,
    samples,
    channels,
    times,
    STEPS: tl.constexpr,
    TILE_C: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """Lane-cycles of every member of the family, int64 [81], from runs uint8 [samples, channels, times].

    A tile is TILE_C channels by COLUMNS runs, every STRETCH (1 to 16) of which are neighbours in one sample. rows:
    int64 [programs, 128], scratch. ticket: int32, zero before and after.
    """
    stretches = tl.cdiv(times, STRETCH)
    channel_tiles = tl.cdiv(channels, TILE_C)
    totals = tl.zeros((128,), tl.int64)
    column = tl.arange(0, COLUMNS)
    for step in range(STEPS):
        tile = tl.program_id(0) * STEPS + step
        first_channel = tile % channel_tiles * TILE_C
        c = first_channel + tl.arange(0, TILE_C)
        stretch = tile // channel_tiles * (COLUMNS // STRETCH) + column // STRETCH
        sample, t = stretch // stretches, stretch % stretches * STRETCH + column % STRETCH
        mask = (c < channels)[:, None] & ((sample < samples) & (t < times))[None, :]
        at = (sample.to(tl.int64)[None, :] * channels + c[:, None]) * times + t[None, :]
        work = tl.load(runs_ptr + at, mask=mask, other=0).to(tl.int32)
        totals = _all_members(totals, work, first_channel, channels, 0, 3 if STRETCH == 1 else 1, TILE_C)
        if STRETCH > 1:
            JOIN: tl.constexpr = min(STRETCH, 4)
            work = tl.sum(tl.reshape(work, (TILE_C, COLUMNS // JOIN, JOIN)), axis=2)
            totals = _all_members(totals, work, first_channel, channels, 27, 2 if STRETCH <= 4 else 1, TILE_C)
        if STRETCH > 4:
            work = tl.sum(tl.reshape(work, (TILE_C, COLUMNS // STRETCH, STRETCH // 4)), axis=2)
            totals = _all_members(totals, work, first_channel, channels, 54, 1, TILE_C)
    place = tl.arange(0, 128)
    tl.store(rows_ptr + tl.program_id(0) * 128 + place, totals)
    # All threads' findings are written before the first one's ticket says so, to whoever reads that.
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(ticket_ptr, 0)
        sums = tl.zeros((128,), tl.int64)
        for first in range(0, tl.num_programs(0), ROWS):
            row = first + tl.arange(0, ROWS)
            at = rows_ptr + row[:, None] * 128 + place[None, :]
            sums += tl.sum(tl.load(at, mask=(row < tl.num_programs(0))[:, None], other=0, cache_modifier=".cg"), axis=0)
        tl.store(out_ptr + place, sums, mask=place < 81)


def runs_of(values: Tensor) -> Tensor:
    """Non-zeros of each run of 16 positions of a channel, as `lanes.runs_of` counts them.

    Args:
        values: float32, float16 or bfloat16 [N, C, *grid], contiguous or channels_last; or [rows, C].

    Returns:
        uint8 [N, C, ceil(positions / 16)]; [1, C, ceil(rows / 16)] without a grid.

    Raises:
        TypeError: another dtype; RuntimeError: not on a GPU.
    """
    check_dtype(FLOATS, values=values)
    check_device(values=values)
    x = values.T[None] if values.dim() == 2 else values.flatten(2)
    samples, channels, positions = x.shape
    runs = torch.empty(samples, channels, triton.cdiv(positions, RUN), dtype=torch.uint8, device=x.device)
    if runs.numel():
        bits = x.view(torch.int32 if x.element_size() == 4 else torch.int16)
        _runs_launch(x.shape, x.stride(), x.device)(bits, runs)
    return runs


@lru_cache(maxsize=1024)
def _runs_launch(shape: torch.Size, stride: tuple[int, ...], device: torch.device) -> Launch:
    samples, channels, positions = shape
    tile_s = max(RUN, min(64, power_of_2(positions)))
    tile_c = min(64, power_of_2(channels))
    units = tuple(map(alignment, stride))
    tiles = triton.cdiv(channels, tile_c) * triton.cdiv(positions, tile_s)
    return Launch(
        device,
        _runs_kernel,
        (tiles * samples,),
        channels,
        positions,
        triton.cdiv(positions, RUN),
        *(step // unit for step, unit in zip(stride, units, strict=True)),
        UNITS=units,
        RUN=RUN,
        TILE_C=tile_c,
        TILE_S=tile_s,
    )


def profile(runs: Tensor) -> Tensor:
    """Lane-cycles of every member of the family: `lanes.profile`, in one launch.

    Args:
        runs: uint8 [N, C, T], contiguous, as from `runs_of`.

    Returns:
        int64 [MEMBERS].

    Raises:
        TypeError: another dtype; RuntimeError: not on a GPU.
    """
    if not runs.numel():
        return torch.zeros(MEMBERS, dtype=torch.int64, device=runs.device)
    launch, programs = _profile_launch(runs.shape, runs.dtype, runs.device, processors(runs.device))
    out = torch.empty(MEMBERS, dtype=torch.int64, device=runs.device)
    rows, ticket = scratch(runs.device, programs * 128, torch.int64)
    launch(runs.contiguous(), out, rows, ticket)
    return out


@lru_cache(maxsize=1024)
def _profile_launch(shape: torch.Size, dtype: torch.dtype, device: torch.device, processors: int) -> tuple[Launch, int]:
    check_dtype((torch.uint8,), runs=dtype)
    samples, channels, times = shape
    tile_c = min(LANES, max(16, power_of_2(channels)))
    stretch = min(LONGEST, power_of_2(times))
    stretches = samples * triton.cdiv(times, stretch)
    columns = stretch * max(1, min(RUNS // (stretch * tile_c), power_of_2(stretches)))
    tiles = triton.cdiv(stretches, columns // stretch) * triton.cdiv(channels, tile_c)
    steps = power_of_2(triton.cdiv(tiles, 2 * processors))
    programs = triton.cdiv(tiles, steps)
    launch = Launch(
        device,
        _profile_kernel,
        (programs,),
        samples,
        channels,
        times,
        STEPS=steps,
        TILE_C=tile_c,
        COLUMNS=columns,
        STRETCH=stretch,
        num_warps=8 if tile_c * columns > RUNS else 4,
    )
    return launch, programs
