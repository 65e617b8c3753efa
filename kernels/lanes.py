"""Lane profiles on a GPU: the runs of an operand in one launch, its profile in another. It knows no rounding.

Equal to `lanes.runs_of` and `lanes.profile`. All sums are whole numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.launch import check_device, check_dtype, on, power_of_2

LANES = 1024
"""The most lanes, as in `lane_family`, from which all constants here are."""
RUN, JOIN = tl.constexpr(16), tl.constexpr(4)
"""Positions of the shortest run, and how many of one length make one of the next."""
LONGEST = tl.constexpr(16)
"""Shortest runs that make a longest one."""
MEMBERS = tl.constexpr(81)
PROGRAMS = 1024
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def runs_of(values: Tensor) -> Tensor:
    """`lanes.runs_of` of values [N, C, *grid] or [rows, C], contiguous or channels_last: uint8 [N, C, T] or [1, C, T].

    Raises:
        TypeError, ValueError, RuntimeError: as `check_dtype` and `check_device`.
    """
    check_device(values=values)
    check_dtype(DTYPES, values=values)
    planes = values.T[None] if values.dim() == 2 else values.flatten(2)
    samples, channels, positions = planes.shape
    runs = torch.empty(samples, channels, triton.cdiv(positions, RUN.value), dtype=torch.uint8, device=values.device)
    rows, columns = (64, 1) if planes.stride(1) == 1 else (8, 16)  # channels, and runs, of a tile
    grid = (samples * triton.cdiv(channels, rows) * triton.cdiv(runs.shape[2], columns),)
    sizes = (channels, positions, *planes.stride(), runs.shape[2])
    with on(values):
        _runs_kernel[grid](planes, runs, *sizes, rows, columns)
    return runs


def profile(runs: Tensor) -> Tensor:
    """`lanes.profile` of runs, uint8 [N, C, T] and contiguous: int64 [81].

    Raises:
        TypeError, ValueError, RuntimeError: as `check_dtype` and `check_device`.
    """
    check_device(runs=runs)
    check_dtype((torch.uint8,), runs=runs)
    samples, channels, times = runs.shape
    entries = torch.zeros(MEMBERS.value, dtype=torch.int64, device=runs.device)
    block = max(16, power_of_2(min(channels, LANES)))
    tiles = samples * triton.cdiv(channels, LANES) * triton.cdiv(times, LONGEST.value)
    with on(runs):
        _profile_kernel[(min(tiles, PROGRAMS),)](
            runs.contiguous(), entries, tiles, channels, times, LANES, block, num_warps=max(1, min(16, block // 64))
        )
    return entries


@triton.jit
def _runs_kernel(
    values,
    runs,
    channels,
    positions,
    from_sample,
    from_channel,
    from_position,
    times,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of COLUMNS runs of ROWS channels; `from_...` are the steps in memory."""
    blocks, spans = tl.cdiv(channels, ROWS), tl.cdiv(times, COLUMNS)
    program = tl.program_id(0)
    sample, block, span = program // spans // blocks, program // spans % blocks, program % spans
    channel = block * ROWS + tl.arange(0, ROWS)
    position = span * COLUMNS * RUN + tl.arange(0, COLUMNS * RUN)
    start = values + sample.to(tl.int64) * from_sample
    inside = (channel < channels)[:, None] & (position < positions)[None, :]
    tile = tl.load(start + channel[:, None] * from_channel + position[None, :] * from_position, mask=inside, other=0)
    counts = tl.sum(tl.reshape((tile != 0).to(tl.int32), [ROWS, COLUMNS, RUN]), 2)
    t = span * COLUMNS + tl.arange(0, COLUMNS)
    there = runs + (sample.to(tl.int64) * channels + channel)[:, None] * times + t[None, :]
    tl.store(there, counts.to(tl.uint8), mask=(channel < channels)[:, None] & (t < times)[None, :])


@triton.jit
def _profile_kernel(runs, entries, tiles, channels, times, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """A tile is all runs of up to LANES channels within one longest run of one sample; of each, a tree of maxima."""
    index = tl.arange(0, 128)
    found = tl.zeros([128], tl.int64)
    blocks, spans = tl.cdiv(channels, LANES), tl.cdiv(times, LONGEST)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first = tile // spans % blocks * LANES
        width = min(channels - first, LANES)
        lane, t = tl.arange(0, BLOCK), tile % spans * LONGEST + tl.arange(0, LONGEST)
        rows = (tile // spans // blocks).to(tl.int64) * channels + first + lane
        inside = (lane < width)[:, None] & (t < times)[None, :]
        work = tl.load(runs + rows[:, None] * times + t[None, :], mask=inside, other=0).to(tl.int32)
        for length in tl.static_range(3):
            if length > 0:
                work = tl.sum(tl.reshape(work, [BLOCK, work.shape[1] // JOIN, JOIN]), 2)
            for b in tl.static_range(3):
                fullest = _shared(work, width, 1 << (2 * b))
                for level in tl.static_range(11 - 2 * b):
                    cycles = _lane_cycles(fullest, width, 1 << (2 * b + level))
                    found += tl.where(index == 27 * length + b * (12 - b) + level, cycles, 0)
                    if fullest.shape[0] > 1:
                        fullest = _fuller(fullest)
    tl.atomic_add(entries + index, found, mask=index < MEMBERS)


@triton.jit
def _shared(work, width, SIZE: tl.constexpr):
    """The mean of every SIZE lanes that have a channel, rounded up."""
    groups: tl.constexpr = work.shape[0] // SIZE
    lanes = tl.minimum(tl.maximum(width - tl.arange(0, groups) * SIZE, 1), SIZE)
    sums = tl.sum(tl.reshape(work, [groups, SIZE, work.shape[1]]), 1)
    return (sums + lanes[:, None] - 1) // lanes[:, None]


@triton.jit
def _lane_cycles(fullest, width, LANES: tl.constexpr):
    """The lanes that have a channel, times the cycles of their pass; in all passes."""
    held = tl.minimum(tl.maximum(width - tl.arange(0, fullest.shape[0]) * LANES, 0), LANES)
    return tl.sum(held * tl.sum(fullest, 1), 0)


@triton.jit
def _fuller(fullest):
    """Of neighbouring rows the larger, run by run."""
    return tl.max(tl.reshape(fullest, [fullest.shape[0] // 2, 2, fullest.shape[1]]), 1)
