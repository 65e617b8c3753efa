"""Lane profiles on a GPU: runs counted in one pass over an operand, and all of a profile in one launch over its runs.

Equal to `lanes.runs_of` and `lanes.profile`. Whole numbers throughout; nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.launch import Launch, alignment, check_device, check_dtype, power_of_2, processors
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
COLUMNS = 128
"""Runs in a tile, one for each thread. Chosen by reasoning, not yet by measurement."""


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
def _held(first, channels, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Lanes that have a channel, of each of ROWS rows of LANES channels from the first one on."""
    return tl.minimum(tl.maximum(channels - first - tl.arange(0, ROWS) * LANES, 0), LANES)[:, None]


@triton.jit
def _fullest(work):
    """The larger of every two rows."""
    return tl.max(tl.reshape(work, (work.shape[0] // 2, 2, work.shape[1])), axis=1)


@triton.jit
def _high(fullest, running, cycles, first, channels):
    """Lane counts of 32 and more: their fullest lane so far, and their lane-cycles [8, columns]; the next 16 channels.

    fullest [1, columns]: of the 16.
    """
    lanes = (32 << tl.arange(0, 8))[:, None]
    running = tl.maximum(running, fullest)
    ends = ((first + 16) % lanes == 0) | (first + 16 >= channels)
    cycles += tl.where(ends, running * tl.minimum(channels - first // lanes * lanes, lanes), 0)
    return tl.where(ends, 0, running), cycles


@triton.jit
def add_profile(pid, programs, runs_ptr, out_ptr, also_ptr, samples, channels, times, COLUMNS: tl.constexpr):
    """A program's share of the lane-cycles of every member of the family, added to int64 [81], twice if `also_ptr`.

    runs: uint8 [samples, channels, times]. Programs take turns at the three lengths of run. A column is a run of that
    length; a program walks its columns' channels, 16 at once. Lane counts up to 16 are done within those; the others
    keep their fullest lane until their last channel has come. A program's own sums are int32: see `profile_programs`.
    """
    length_at, length = pid % 3, 1
    if length_at == 1:
        length = 4
    if length_at == 2:
        length = 16
    stretches = tl.cdiv(times, length)
    columns = tl.cast(samples, tl.int64) * stretches
    zero, zeros = tl.zeros((COLUMNS,), tl.int32), tl.zeros((8, COLUMNS), tl.int32)
    a0, a1, a2, a3, a4, b0, b1, b2, c0 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    a_high, b_high, c_high = zeros, zeros, zeros
    for tile in range(pid // 3, tl.cdiv(columns, COLUMNS), programs // 3):
        column = tl.cast(tile, tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        t = (column % stretches).to(tl.int32) * length
        at = runs_ptr + column // stretches * channels * times + t
        a_running, b_running, c_running = zeros, zeros, zeros
        for first in range(0, channels, 16):
            c = first + tl.arange(0, 16)
            mask = (c < channels)[:, None] & (column < columns)[None, :]
            work = tl.zeros((16, COLUMNS), tl.int32)
            for i in range(length):
                here = mask & (t + i < times)[None, :]
                work += tl.load(at[None, :] + c[:, None] * times + i, mask=here, other=0).to(tl.int32)
            held16 = tl.minimum(channels - first, 16)
            # without a balancer
            a0 += tl.sum(work, axis=0)
            top = _fullest(work)
            a1 += tl.sum(top * _held(first, channels, 8, 2), axis=0)
            top = _fullest(top)
            held4 = _held(first, channels, 4, 4)
            a2 += tl.sum(top * held4, axis=0)
            top = _fullest(top)
            held8 = _held(first, channels, 2, 8)
            a3 += tl.sum(top * held8, axis=0)
            top = _fullest(top)
            a4 += tl.sum(top * held16, axis=0)
            a_running, a_high = _high(top, a_running, a_high, first, channels)
            # shared by 4
            sums = tl.sum(tl.reshape(work, (4, 4, COLUMNS)), axis=1)
            sharing = tl.maximum(held4, 1)
            top = (sums + sharing - 1) // sharing
            b0 += tl.sum(top * held4, axis=0)
            top = _fullest(top)
            b1 += tl.sum(top * held8, axis=0)
            top = _fullest(top)
            b2 += tl.sum(top * held16, axis=0)
            b_running, b_high = _high(top, b_running, b_high, first, channels)
            # shared by 16
            top = (tl.sum(work, axis=0)[None, :] + held16 - 1) // held16
            c0 += tl.sum(top * held16, axis=0)
            c_running, c_high = _high(top, c_running, c_high, first, channels)
    place = tl.arange(0, 32)
    totals = _at(a_high, 5) + _at(b_high, 14) + _at(c_high, 21)
    low = (a0, a1, a2, a3, a4, b0, b1, b2, c0)
    for i in tl.static_range(9):
        totals += tl.where(place == (i if i < 5 else i + 6 if i < 8 else 20), tl.sum(low[i].to(tl.int64)), 0)
    at = 27 * length_at + place
    tl.atomic_add(out_ptr + at, totals, mask=place < 27, sem="relaxed")
    if also_ptr is not None:
        tl.atomic_add(also_ptr + at, totals, mask=place < 27, sem="relaxed")


@triton.jit
def _at(high, MEMBER: tl.constexpr):
    """Sums of the first six rows, at places from MEMBER on: int64 [32]."""
    level = tl.arange(0, 8)
    sums = tl.sum(high.to(tl.int64), axis=1)
    here = (tl.arange(0, 32)[:, None] == level[None, :] + MEMBER) & (level < 6)[None, :]
    return tl.sum(tl.where(here, sums[None, :], 0), axis=1)


@triton.jit(do_not_specialize=["samples", "channels", "times"])
def _profile_kernel(runs_ptr, out_ptr, samples, channels, times, COLUMNS: tl.constexpr):
    """All programs of `add_profile`."""
    add_profile(tl.program_id(0), tl.num_programs(0), runs_ptr, out_ptr, None, samples, channels, times, COLUMNS)


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
    check_dtype((torch.uint8,), runs=runs)
    out = torch.zeros(MEMBERS, dtype=torch.int64, device=runs.device)
    if runs.numel():
        _profile_launch(runs.shape, runs.device, processors(runs.device))(runs.contiguous(), out)
    return out


@lru_cache(maxsize=1024)
def _profile_launch(shape: torch.Size, device: torch.device, processors: int) -> Launch:
    return Launch(device, _profile_kernel, (profile_programs(shape, processors),), *shape, COLUMNS=COLUMNS)


def profile_programs(shape: Sequence[int], processors: int) -> int:
    """Programs of `add_profile` for runs of a shape: three for each tile, but few where there are many tiles.

    A column's lane-cycles are at most 256 for each channel.
    """
    samples, channels, times = shape
    tiles = triton.cdiv(samples * times, COLUMNS)
    most = 2**31 // (2**8 * channels) or 1
    return 3 * max(min(tiles, processors), triton.cdiv(tiles, most))
