"""An operand of a product on a GPU: its threshold chosen, its elements rounded and counted, in one launch.

Bit-equal to `Backend.quantize_operand`. Nothing here reads a tensor back to the host.

The first programs look at a sample of the operand; the last of them chooses the threshold to come. The others round by
the threshold in use, tile by tile. Only where none is in use yet, as in a first step, they wait for the choice. A GPU
starts programs in their order, so that those that choose are running by then.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.lanes import MEMBERS, RUN
from lnpu_torch.kernels.launch import (
    INT32,
    REGISTERS,
    Launch,
    alignment,
    check_dtype,
    check_runs,
    power_of_2,
    processors,
)
from lnpu_torch.kernels.rounding import (
    FLOATS,
    bits_of,
    check_formats,
    random_bits,
    readable,
    round_by_rule,
)
from lnpu_torch.kernels.thresholds import BLOCK, FIXED, UNSET, Choice, finish, look, sample_of

BLOCKS = {64: 32, 32: 64, 16: 128, 8: 256, 4: 512}
"""Positions of a tile, by its channels: 2,048 elements, 16 a thread of four warps. Not yet measured."""
PER_PROCESSOR = 16
"""Programs that each multiprocessor gets: four times what is resident, by registers, so that the last ones to end leave
little idle. Not yet measured."""
LONGEST = 64
"""The most tiles that a program walks."""

SIZES = [
    "state", "limit", "looked", "step", "looks", "stream", "samples", "rows", "walk", "group_size", "groups", "space",
    "row_stride", "other_stride", "space_tiles", "channel_tiles", "group_tiles", "chunks",
]  # fmt: skip
SCALARS = ["states_ptr", "used_ptr", "seed_ptr"]
"""Pointers to single numbers, which need not lie on boundaries of 16 bytes."""


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SCALARS)
def _operand_kernel(
    x_ptr,
    single_ptr,
    half_ptr,
    position_ptr,
    sample_ptr,
    runs_ptr,
    states_ptr,
    used_ptr,
    found_ptr,
    seed_ptr,
    state,
    limit,
    looked,
    step,
    looks,
    stream,
    samples,
    rows,
    walk,
    group_size,
    groups,
    space,
    row_stride,
    other_stride,
    space_tiles,
    channel_tiles,
    group_tiles,
    chunks,
    F: tl.constexpr,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SHARED: tl.constexpr,
    FLAT: tl.constexpr,
    DEEP: tl.constexpr,
    UNIT: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_S: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rounds x [samples, groups * group size, space], and counts over samples, over channels, and in runs.

    x: floats, bfloat16 as int16. single, half: where the values go, as float32 and binary16, at x's offsets, or None.
    position: int32 [2, samples / rows, channels, space], from zero: the elements of FP8 and of FP16 over every `rows`
    samples. sample: [2, samples, groups, space], over the channels of a group, or None; SHARED: from zero, as several
    programs have a part in each. runs: uint8 [samples, channels, runs of 16 positions], the non-zeros of each, or None.
    states: int32 [rows, 2], of which `state` is the operand's; without, `used` is the threshold. used: int32 [3], from
    zero: the threshold, written; a ticket; whether it is written. found: int32 [looks, BINS], scratch. limit, looked,
    step: see `thresholds`.
    FLAT: samples are matrices, and counts by position are summed over positions, int32 [2, samples, channels]; runs are
    [channels, samples, runs]; groups is 1.
    DEEP: memory runs along channels, and other_stride is the positions'; else along positions, and it is the channels'.
    UNIT: what row_stride, other_stride and the size of the axis of memory are multiples of, as the compiler is to know.
    TILE_GROUPS: channel groups in a tile; if one, a group takes `group_tiles` tiles.
    A program holds a tile of channels and positions, and walks `walk` samples (FLAT: stretches of positions).
    """
    row_stride = tl.cast(row_stride // UNIT * UNIT, tl.int64)
    other_stride = other_stride // UNIT * UNIT
    channels = groups * group_size
    if DEEP:
        channel_stride, space_stride = 1, other_stride
        if TILE_GROUPS > 1:
            channels = channels // UNIT * UNIT
        else:
            group_size = group_size // UNIT * UNIT
    else:
        channel_stride, space_stride = other_stride, 1
        space = space // UNIT * UNIT

    pid = tl.program_id(0)
    threshold = 0
    if states_ptr is not None:
        states_ptr += 2 * state
        current = tl.load(states_ptr)
        if pid < looks:
            if TRAINING or current == UNSET:
                if FLAT:
                    sizes, strides = (channels, space, samples), (channel_stride, space_stride, row_stride)
                else:
                    sizes, strides = (space, channels, samples), (space_stride, channel_stride, row_stride)
                look(x_ptr, found_ptr + pid * BINS, pid, looked, step, 1, sizes, strides, C, BINS, BLOCK)
                # All threads' findings are written before the first one's ticket says so, to whoever reads that.
                tl.debug_barrier()
                if tl.atomic_add(used_ptr + 1, 1, sem="acq_rel") == looks - 1:
                    finish(found_ptr, looks, states_ptr, used_ptr, None, limit, C, TRAINING, BINS, 16)
                    tl.debug_barrier()
                    tl.atomic_xchg(used_ptr + 2, 1, sem="release")
            elif pid == 0:
                tl.store(used_ptr, current)
            return
        pid -= looks
        threshold = current
        if current == UNSET:
            chosen = tl.atomic_add(used_ptr + 2, 0, sem="acquire")
            while chosen == 0:
                chosen = tl.atomic_add(used_ptr + 2, 0, sem="acquire")
            threshold = tl.load(used_ptr, cache_modifier=".cg")
    else:
        threshold = tl.load(used_ptr)

    first_position = pid % space_tiles * TILE_S
    tile = pid // space_tiles % channel_tiles
    chunk = pid // space_tiles // channel_tiles
    row_group = chunk // chunks
    first = chunk % chunks * walk
    group = tile // group_tiles * TILE_GROUPS
    c = group * group_size + tile % group_tiles * TILE_C + tl.arange(0, TILE_C)
    end = channels
    if TILE_GROUPS == 1:
        end = (group + 1) * group_size
    group = group + tl.arange(0, TILE_GROUPS)
    s = first_position + tl.arange(0, TILE_S)
    mask = (c < end)[:, None] & (s < space)[None, :]
    offsets = c[:, None] * channel_stride + s[None, :] * space_stride
    times = tl.cdiv(space, 16)
    over_rows = tl.zeros((TILE_C, TILE_S), tl.int32)
    for i in range(first, tl.minimum(first + walk, rows)):
        row = tl.cast(row_group, tl.int64) * rows + i
        at = row * row_stride
        if FLAT:
            row = tl.cast(row_group, tl.int64)
            s = i * TILE_S + tl.arange(0, TILE_S)
            mask = (c < end)[:, None] & (s < space)[None, :]
            at = row * row_stride + tl.cast(i, tl.int64) * TILE_S * space_stride
        bits = bits_of(x_ptr + at, offsets, mask)
        random = bits
        if STOCHASTIC:
            if FLAT:
                random = random_bits((row * space + s[None, :]) * channels + c[:, None], seed_ptr, stream)
            else:
                random = random_bits((row * channels + c[:, None]) * space + s[None, :], seed_ptr, stream)
        HALF: tl.constexpr = single_ptr is None and half_ptr is not None
        q, small = round_by_rule(bits, threshold, random, F, HALF, STOCHASTIC)
        if single_ptr is not None:
            tl.store(single_ptr + at + offsets, q, mask=mask)
        if half_ptr is not None:
            tl.store(half_ptr + at + offsets, q.to(tl.float16), mask=mask)
        # both classes' counts are held in one integer, FP8's in the lower 16 bits, FP16's in the upper
        found = tl.where(q != 0, tl.where(small, 1, 1 << 16), 0)
        over_rows += found
        if runs_ptr is not None:
            lengths = tl.sum(tl.reshape((found != 0).to(tl.int32), (TILE_C, TILE_S // 16, 16)), axis=2)
            run = first_position // 16 + tl.arange(0, TILE_S // 16)
            to = runs_ptr + row * channels * times + (c[:, None] * times + run[None, :])
            if FLAT:
                run = i * (TILE_S // 16) + tl.arange(0, TILE_S // 16)
                to = runs_ptr + (c[:, None] * tl.cast(times * samples, tl.int64) + (row * times + run[None, :]))
            tl.store(to, lengths.to(tl.uint8), mask=(c < end)[:, None] & (run < times)[None, :])
        if sample_ptr is not None:
            if TILE_GROUPS == 1:
                sums = tl.sum(found, axis=0)[None, :]
            elif TILE_GROUPS == TILE_C:
                sums = found
            else:
                sums = tl.sum(tl.reshape(found, (TILE_GROUPS, TILE_C // TILE_GROUPS, TILE_S)), axis=1)
            to = sample_ptr + row * groups * space + (group[:, None] * space + s[None, :])
            there = (group < groups)[:, None] & (s < space)[None, :]
            half = tl.cast(samples, tl.int64) * groups * space
            if SHARED:
                tl.atomic_add(to, sums & 0xFFFF, mask=there, sem="relaxed")
                tl.atomic_add(to + half, sums >> 16, mask=there, sem="relaxed")
            else:
                tl.store(to, (sums & 0xFFFF).to(sample_ptr.dtype.element_ty), mask=there)
                tl.store(to + half, (sums >> 16).to(sample_ptr.dtype.element_ty), mask=there)
    if FLAT:
        over_all = tl.sum(over_rows, axis=1)
        at = position_ptr + tl.cast(row_group, tl.int64) * channels + c
        half = tl.cast(samples, tl.int64) * channels
        tl.atomic_add(at, over_all & 0xFFFF, mask=c < end, sem="relaxed")
        tl.atomic_add(at + half, over_all >> 16, mask=c < end, sem="relaxed")
    else:
        at = position_ptr + tl.cast(row_group, tl.int64) * channels * space + (c[:, None] * space + s[None, :])
        half = tl.cast(samples // rows, tl.int64) * channels * space
        tl.atomic_add(at, over_rows & 0xFFFF, mask=mask, sem="relaxed")
        tl.atomic_add(at + half, over_rows >> 16, mask=mask, sem="relaxed")


class Operand(NamedTuple):
    """What `read` returns; what was not asked for is None."""

    single: Tensor | None
    """float32 values"""
    half: Tensor | None
    """float16 values"""
    position: Tensor
    """`pair_counts.per_position`: int32 [2, N / share, C, *grid]"""
    sample: Tensor | None
    """`pair_counts.per_sample`: `sample_dtype` [2, N, groups, *grid]"""
    runs: Tensor | None
    """`lanes.runs_of` the values: uint8"""
    profile: Tensor | None
    """int64 [MEMBERS], zeros, for the profile of the runs"""
    threshold: Tensor
    """int32 [], by which x was rounded"""


class Wanted(NamedTuple):
    """What is asked of an operand: values as float32, as binary16; counts by sample; runs, or joined ones.

    Joined runs go on from sample to sample, as those of a matrix do anyway.
    """

    single: bool = False
    half: bool = True
    sample: bool = True
    runs: bool = False
    joined: bool = False


def read(
    x: Tensor,
    choice: Choice,
    low: str | None,
    high: str | None,
    layout: tuple[int, int],
    wanted: Wanted,
    *,
    states: Tensor | None = None,
    row: int = 0,
    training: bool = False,
    threshold: Tensor | None = None,
    seed: Tensor | None = None,
) -> Operand:
    """Round a grid [N, C, *grid] (or a weight, or [rows, C]) and count it, by the threshold in use or by a given one.

    Args:
        choice: how the threshold to come is chosen.
        low, high: names of the formats, None for a rule without them.
        layout: how many samples in a row have one count by position, and the number of channel groups.
        states: int32 [rows, 2], thresholds in use and to come, of which `row` is x's. In training the latter is chosen.
        threshold: int32 [], instead of states.
        seed: int64 [], for stochastic rounding; its stream is `row`.

    Raises:
        TypeError, ValueError: a dtype, size, format or device that the kernel does not take.
        RuntimeError: not on a GPU.
    """
    constants = (choice, low, high, layout, wanted, row, training, states is not None, seed is not None)
    plan = _plan(x.shape, x.stride(), x.dtype, x.device, *constants, processors(x.device))
    return plan(x, states, threshold, seed)


def takes(x: Tensor) -> bool:
    """Whether `read` does a tensor as it lies in memory: without gaps, sample after sample."""
    return _strides(x.shape, x.stride()) is not None


def finds_runs(shape: torch.Size, layout: tuple[int, int], joined: bool) -> bool:
    """Whether `read` counts an operand's runs as they go: along a sample, or if they are joined on to the next one."""
    share, groups = layout
    if not joined and len(shape) > 2:
        return True
    return shape[2:].numel() == 1 and groups == 1 and (share == shape[0] or share % RUN == 0)


@lru_cache(maxsize=1024)
def _strides(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Strides of [N, C, *grid] seen as [N, C, prod(grid)]; None if it cannot be, or memory runs along neither axis."""
    space = [d for d in range(2, len(shape)) if shape[d] > 1]
    step = stride[space[-1]] if space else 1
    if any(stride[a] != stride[b] * shape[b] for a, b in pairwise(space)):
        return None
    # of an axis of size 1 the stride means nothing
    channels = stride[1] if shape[1] > 1 else step * prod(shape[2:])
    samples = stride[0] if shape[0] > 1 else shape.numel()
    lengths = sorted([(channels, shape[1]), (step, prod(shape[2:])), (samples, shape[0])])
    dense = all(length == prod(size for _, size in lengths[:i]) for i, (length, _) in enumerate(lengths))
    return (samples, channels, step) if dense and samples == lengths[-1][0] else None


class _Plan:
    """What `read` does for tensors of one shape and layout: memory for the results, and the launch."""

    def __init__(
        self,
        shape: torch.Size,
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        choice: Choice,
        low: str | None,
        high: str | None,
        layout: tuple[int, int],
        wanted: Wanted,
        row: int,
        training: bool,
        chooses: bool,
        stochastic: bool,
        processors: int,
    ) -> None:
        check_dtype(FLOATS, x=dtype)
        check_runs(device)
        share, groups = layout
        self.stride, self.wanted, self.device = stride, wanted, device
        (samples, channels, *grid), strides = shape, _strides(shape, stride)
        for name, size, by in (("samples", samples, share), ("channels", channels, groups)):
            if by < 1 or size % by:
                raise ValueError(f"{size} {name} do not divide by {by}")
        if strides is None or not 0 < shape.numel() < INT32:
            raise ValueError(f"{list(shape)} with strides {list(stride)} is read in no single pass")
        space, group_size = prod(grid), channels // groups
        self.position = torch.Size((2, samples // share, channels, *grid))
        self.strides = torch.empty(self.position, device="meta").stride()
        self.sample = torch.Size((2, samples, groups, *grid))
        self.sample_dtype = sample_dtype(channels, groups)
        row_stride, channel_stride, space_stride = strides
        joined = wanted.joined or not grid
        if wanted.runs and not finds_runs(shape, layout, joined):
            raise ValueError(f"the runs of {list(shape)}, {share} rows at a time, go on from sample to sample")
        # rows of a matrix are positions: their counts are summed
        flat = space == 1 and groups == 1 and (joined or not wanted.runs)
        if flat:
            space, space_stride, samples, share = share, row_stride, samples // share, 1
            row_stride *= space
        self.runs = (samples, channels, triton.cdiv(space, RUN))
        if joined:
            self.runs = (1, channels, samples * self.runs[2])
        deep = channel_stride == 1 and channels > 1
        tile_groups, tile_c, tile_s = _tile(channels, group_size, space, deep)
        if stochastic or tile_groups > 1:  # which needs more registers
            tile_s //= 2
        group_tiles = triton.cdiv(group_size, tile_c) if tile_groups == 1 else 1
        channel_tiles = groups * group_tiles if tile_groups == 1 else triton.cdiv(groups, tile_groups)
        space_tiles = 1 if flat else triton.cdiv(space, tile_s)
        rows = triton.cdiv(space, tile_s) if flat else share
        walks = channel_tiles * space_tiles * rows * (samples // share) // (PER_PROCESSOR * processors)
        walk = min(LONGEST, max(1, walks), rows)
        chunks = triton.cdiv(rows, walk)
        tiles = space_tiles * channel_tiles * chunks * (samples // share)
        axis, other = (channels, space_stride) if deep else (space, channel_stride)
        axis = group_size if deep and tile_groups == 1 else axis
        unit = alignment(axis, other, 0 if flat else row_stride)
        self.shared = wanted.sample and group_tiles > 1
        looked, step = sample_of(shape.numel())
        looks = (1 if choice.mode == FIXED.value else triton.cdiv(looked, BLOCK)) if chooses else 0
        bins = power_of_2(choice.bins + 1)
        self.found = looks * bins
        # what begins at zero, in one block: the profile, the threshold with its ticket, counts by position, by sample
        sizes = (2 * MEMBERS + 6, self.position.numel(), self.sample.numel() if self.shared else 0)
        self.position_at, positions, samples_ = (size + -size % 4 for size in sizes)  # on boundaries of 16 bytes
        self.sample_at = self.position_at + positions
        self.zeros = self.sample_at + samples_
        self.launch = Launch(
            device,
            _operand_kernel,
            (looks + tiles,),
            row,
            choice.limit,
            looked,
            step,
            looks,
            row,
            samples,
            rows,
            walk,
            group_size,
            groups,
            space,
            row_stride,
            other,
            space_tiles,
            channel_tiles,
            group_tiles,
            chunks,
            F=check_formats(low, high, wanted.half),
            C=choice.constants if chooses else None,
            TRAINING=training,
            STOCHASTIC=stochastic,
            SHARED=self.shared,
            FLAT=flat,
            DEEP=deep,
            UNIT=unit,
            TILE_GROUPS=tile_groups,
            TILE_C=tile_c,
            TILE_S=tile_s,
            BINS=bins,
            BLOCK=BLOCK,
            num_warps=4,
            maxnreg=REGISTERS if stochastic else None,
        )

    def __call__(self, x: Tensor, states: Tensor | None, threshold: Tensor | None, seed: Tensor | None) -> Operand:
        wanted, device = self.wanted, self.device
        single = half = sample = runs = found = profile = None
        if wanted.single:
            single = torch.empty_strided(x.shape, self.stride, dtype=torch.float32, device=device)
        if wanted.half:
            half = torch.empty_strided(x.shape, self.stride, dtype=torch.float16, device=device)
        zeros = torch.zeros(self.zeros, dtype=torch.int32, device=device)
        position = zeros.as_strided(self.position, self.strides, self.position_at)
        if wanted.sample and self.shared:
            sample = zeros[self.sample_at :][: self.sample.numel()].view(self.sample)
        elif wanted.sample:
            sample = torch.empty(self.sample, dtype=self.sample_dtype, device=device)
        if wanted.runs:
            runs = torch.empty(self.runs, dtype=torch.uint8, device=device)
            profile = zeros[: 2 * MEMBERS].view(torch.int64)
        if states is not None:
            found = torch.empty(self.found, dtype=torch.int32, device=device)
            threshold = zeros[2 * MEMBERS]
        self.launch(readable(x), single, half, position, sample, runs, states, threshold, found, seed)
        return Operand(single, half, position, sample, runs, profile, threshold)


_plan = lru_cache(maxsize=1024)(_Plan)


def sample_dtype(channels: int, groups: int) -> torch.dtype:
    """Of counts by sample: uint8 where there are several groups of at most 64 channels, as in a depthwise layer."""
    return torch.uint8 if groups > 1 and channels // groups <= max(BLOCKS) else torch.int32


def _tile(channels: int, group_size: int, space: int, deep: bool) -> tuple[int, int, int]:
    """Channel groups, channels and positions of a tile: one of few, so that few kernels are compiled.

    It holds one channel group, or a part of one; where groups are narrow powers of two, several whole ones.
    """
    if deep:
        tile_c = min(64, max(4, power_of_2(channels)))
    else:
        tile_c = 8 if space > 64 else 16 if space > 16 else 64
        tile_c = 4 if channels <= 4 and space > 128 else tile_c
    if power_of_2(group_size) == group_size and group_size < min(tile_c, channels):
        return tile_c // group_size, tile_c, BLOCKS[tile_c]
    if group_size < channels and group_size <= max(BLOCKS):  # counted in 8 bits, by one program
        tile_c = max(4, power_of_2(group_size))
    return 1, tile_c, BLOCKS[tile_c]
