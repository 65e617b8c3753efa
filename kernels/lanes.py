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
"""Positions of the shortest run; the same as `lane_configs.RUN`."""
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
def _held(first, channels, LANES: tl.constexpr):
    """Lanes that have a channel, of so many from the first channel on."""
    return tl.minimum(tl.maximum(channels - first, 0), LANES)


@triton.jit
def _shared(sum, held):
    """The work of lanes, shared by those that have a channel: the mean, rounded up."""
    return (sum + held - 1) // tl.maximum(held, 1)


@triton.jit
def _level(fullest, running, cycles, first, channels, LANES: tl.constexpr):
    """32 lanes and more: their fullest so far, and their lane-cycles, after the next 16 channels."""
    running = tl.maximum(running, fullest)
    ends = ((first + 16) % LANES == 0) | (first + 16 >= channels)
    cycles += running * tl.where(ends, _held(first // LANES * LANES, channels, LANES), 0)
    return tl.where(ends, 0, running), cycles


@triton.jit
def _levels(fullest, state, first, channels):
    """`_level` for 32 lanes, 64, and so on up to 1024: all that runs, then all cycles."""
    r0, c0 = _level(fullest, state[0], state[6], first, channels, 32)
    r1, c1 = _level(fullest, state[1], state[7], first, channels, 64)
    r2, c2 = _level(fullest, state[2], state[8], first, channels, 128)
    r3, c3 = _level(fullest, state[3], state[9], first, channels, 256)
    r4, c4 = _level(fullest, state[4], state[10], first, channels, 512)
    r5, c5 = _level(fullest, state[5], state[11], first, channels, 1024)
    return r0, r1, r2, r3, r4, r5, c0, c1, c2, c3, c4, c5


@triton.jit
def add_profile(pid, programs, runs_ptr, out_ptr, also_ptr, samples, channels, times, COLUMNS: tl.constexpr):
    """A program's share of the lane-cycles of every member of the family, added to int64 [81], twice if `also_ptr`.

    runs: uint8 [samples, channels, times]. Programs take turns at the three lengths of run. A column is a run of that
    length, of which each thread has one; its channels are walked 16 at once. Lane counts up to 16 are done within
    those; the others keep their fullest lane until their last channel has come. A program's own sums are int32: see
    `profile_programs`. All is in one dimension: where reductions of tiles lie, versions of Triton differ, and spill.
    """
    length_at, length = pid % 3, 1
    if length_at == 1:
        length = 4
    if length_at == 2:
        length = 16
    stretches = tl.cdiv(times, length)
    columns = samples * stretches  # less than 2^31, as all runs are
    zero = tl.zeros((COLUMNS,), tl.int32)
    a0, a1, a2, a3, a4, b0, b1, b2, c0 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    a = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    b = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    c = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for tile in range(pid // 3, tl.cdiv(columns, COLUMNS), programs // 3):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        there = column < columns
        t = column % stretches * length
        at = runs_ptr + column // stretches * channels * times + t
        for first in range(0, channels, 16):
            by2, by4, by8, by16, sum4, shared8, shared16, sum16 = zero, zero, zero, zero, zero, zero, zero, zero
            for j in tl.static_range(16):
                work = zero
                if first + j < channels:
                    for i in range(tl.minimum(length, times)):
                        here = there & (t + i < times)
                        work += tl.load(at + (first + j) * times + i, mask=here, other=0).to(tl.int32)
                a0 += work
                by2 = tl.maximum(by2, work) if j % 2 else work
                sum4 = sum4 + work if j % 4 else work
                sum16 += work
                if j % 2 == 1:
                    a1 += by2 * _held(first + j - 1, channels, 2)
                    by4 = tl.maximum(by4, by2) if j % 4 == 3 else by2
                if j % 4 == 3:
                    held4 = _held(first + j - 3, channels, 4)
                    a2 += by4 * held4
                    shared4 = _shared(sum4, held4)
                    b0 += shared4 * held4
                    by8 = tl.maximum(by8, by4) if j % 8 == 7 else by4
                    shared8 = tl.maximum(shared8, shared4) if j % 8 == 7 else shared4
                if j % 8 == 7:
                    held8 = _held(first + j - 7, channels, 8)
                    a3 += by8 * held8
                    b1 += shared8 * held8
                    by16 = tl.maximum(by16, by8)
                    shared16 = tl.maximum(shared16, shared8)
            held16 = _held(first, channels, 16)
            a4 += by16 * held16
            b2 += shared16 * held16
            all16 = _shared(sum16, held16)
            c0 += all16 * held16
            a, b, c = (
                _levels(by16, a, first, channels),
                _levels(shared16, b, first, channels),
                _levels(all16, c, first, channels),
            )
    found = (
        a0, a1, a2, a3, a4, a[6], a[7], a[8], a[9], a[10], a[11],
        b0, b1, b2, b[6], b[7], b[8], b[9], b[10], b[11],
        c0, c[6], c[7], c[8], c[9], c[10], c[11],
    )  # fmt: skip
    place = tl.arange(0, 32)
    totals = tl.zeros((32,), tl.int64)
    for i in tl.static_range(27):
        totals += tl.where(place == i, tl.sum(found[i].to(tl.int64)), 0)
    at = 27 * length_at + place
    tl.atomic_add(out_ptr + at, totals, mask=place < 27, sem="relaxed")
    if also_ptr is not None:
        tl.atomic_add(also_ptr + at, totals, mask=place < 27, sem="relaxed")


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
