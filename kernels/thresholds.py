"""The choice of thresholds on a GPU: one launch, which also keeps the state.

Equal to `reference.choose_threshold`, `histogram` and `largest_bin`, and to `ops.next_threshold`. All that is summed is
whole numbers. Each program looks at a part of a tensor and leaves what it found in a row of its own; the one that
finishes last sums the rows and chooses.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.launch import INT32, Launch, check_device, check_dtype, power_of_2, processors
from lnpu_torch.kernels.rounding import FLOATS, bits_of, dense, readable
from lnpu_torch.quant.formats import FORMATS

SAMPLE = 2**14
"""At most this many elements are looked at for a histogram; the same as `reference.SAMPLE`."""
RANGE = tl.constexpr(19)
"""The same as `reference.RANGE`."""
UNSET = tl.constexpr(-(2**31))
"""The same as `reference.UNSET`."""
BLOCK = 1024
"""Elements of a tile; 16 programs look at a sample, each element of which lies in a sector of memory of its own."""
ROWS = 16
"""Rows of findings that are read at once."""

FIXED, LARGEST, SHARE, ERROR = (tl.constexpr(i) for i in range(4))


class Choice(NamedTuple):
    """A rule as the kernel sees it: how thresholds are chosen, within which bounds, and the formats' exponents."""

    mode: int
    """FIXED: `limit`. LARGEST: of all elements. SHARE, ERROR: by a sample's histogram."""
    limit: int
    """FIXED: the threshold; SHARE: the bound on the FP16 share; ERROR: on the squared relative error. The latter two as
    the bits of a float64. Given to kernels apart, so that none is compiled for it."""
    smallest: int
    largest: int
    low_mantissa: int
    low_reach: int
    """From the exponent at which the window ends down to that of its smallest normal number."""
    window_min: int
    high_mantissa: int
    high_min: int

    @classmethod
    def of(
        cls,
        low: str | None,
        high: str | None,
        *,
        max_error: float | None = None,
        fp16_share: float | None = None,
        threshold: int | None = None,
    ) -> Choice:
        """As `Rule` has them: names of the formats, and at most one of the ways to choose."""
        small, wide = FORMATS[low or "e4m3"], FORMATS[high or "fp16"]
        smallest, largest = 4 * (wide.ulp_exponent - 1), 4 * wide.max_exponent + 3
        mode, limit = FIXED, smallest if threshold is None else threshold
        if low is not None and threshold is None:
            mode = LARGEST if high is None else ERROR if fp16_share is None else SHARE
            bound = (max_error or 0.0) ** 2 if fp16_share is None else fp16_share
            limit = struct.unpack("<q", struct.pack("<d", bound))[0]
        return cls(
            mode.value,
            limit,
            smallest,
            largest,
            small.mantissa,
            small.max_exponent - small.min_exponent,
            wide.ulp_exponent - small.ulp_exponent + small.max_exponent,
            wide.mantissa,
            wide.min_exponent,
        )

    @property
    def constants(self) -> Choice:
        """What kernels are compiled for."""
        return self._replace(limit=0)

    @property
    def bins(self) -> int:
        """Of a histogram: for thresholds from one below the smallest to the largest."""
        return self.largest - self.smallest + 2


@triton.jit
def _units(power):
    """4^power, or 0 where the power is negative: `reference._units`."""
    one = tl.full(power.shape, 1, tl.int64)
    return tl.where(power < 0, 0, one << (2 * tl.minimum(tl.maximum(power, 0), RANGE + 3)).to(tl.int64))


@triton.jit
def look(x_ptr, row_ptr, part, count, step, steps, sizes, strides, C: tl.constexpr, BINS: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """What a program finds in its part of a tensor, into its row: a histogram, or the largest magnitude's bits.

    sizes, strides: of the dimensions, the last first, which is the order in which elements are numbered. step: from one
    element looked at to the next; count: how many those are. steps: tiles of a part, where all elements are looked at.
    """
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    if C.mode == LARGEST:
        for i in range(steps):
            index = (part.to(tl.int64) * steps + i) * BLOCK + lane
            magnitude = bits_of(x_ptr, index, index < count) & 0x7FFFFFFF
            largest = tl.maximum(largest, tl.where(magnitude < 0x7F800000, magnitude, 0))
        tl.store(row_ptr, tl.max(largest))
    elif C.mode != FIXED:
        lane += part * BLOCK
        mask = lane < count
        rest = tl.where(mask, lane, 0) * step
        offsets = tl.zeros((BLOCK,), tl.int64)
        for d in tl.static_range(len(sizes)):
            if d == len(sizes) - 1:
                offsets += rest.to(tl.int64) * strides[d]
            else:
                offsets += (rest % sizes[d]).to(tl.int64) * strides[d]
                rest = rest // sizes[d]
        magnitude = bits_of(x_ptr, offsets, mask) & 0x7FFFFFFF
        bins = tl.minimum(tl.maximum((magnitude >> 21) - 4 * 127, C.smallest - 1), C.largest) - (C.smallest - 1)
        seen = mask & (magnitude > 0) & (magnitude < 0x7F800000)
        tl.store(row_ptr + tl.arange(0, BINS), tl.histogram(tl.where(seen, bins, BINS - 1), BINS))


@triton.jit
def _counts(rows_ptr, programs, BINS: tl.constexpr, ROWS: tl.constexpr):
    """The sum of the rows, int64 [BINS]; the last bin, where what is not counted was put, is empty."""
    lane = tl.arange(0, BINS)
    sums = tl.zeros((BINS,), tl.int32)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)
        at = rows_ptr + row[:, None] * BINS + lane[None, :]
        sums += tl.sum(tl.load(at, mask=(row < programs)[:, None], other=0, cache_modifier=".cg"), axis=0)
    return tl.where(lane < BINS - 1, sums, 0).to(tl.int64)


@triton.jit
def _by_error(counts, total, above, limit, C: tl.constexpr, BINS: tl.constexpr):
    """For each bin whether its threshold keeps the bound: as by `reference.error_table`, but no sum is taken for each.

    Below the threshold's binade by more than the window's reach, an element's step is that of the window's smallest
    numbers; or the element is rounded to zero. So all that a threshold needs are differences of running sums.
    """
    lane = tl.arange(0, BINS)
    bins = lane + (C.smallest - 1)
    e, k = bins >> 2, bins & 3
    square = (3 * k * k + 27 * k + 61).to(tl.int64)
    unit = tl.max(tl.where(counts > 0, e, (C.smallest - 1) >> 2)) - RANGE
    signal = square * _units(e - unit) * counts
    over = tl.maximum(e, C.high_min) - C.high_mantissa + 1 - e
    high_lost = (1 << (2 * tl.minimum(tl.maximum(over, 0), 4))) > square
    high = tl.where(high_lost, signal, _units(e + over - unit) * counts)
    normal = _units(e + 1 - C.low_mantissa - unit) * counts
    seen_before, signal_before = tl.cumsum(counts, 0) - counts, tl.cumsum(signal, 0) - signal
    normal_before, high_before = tl.cumsum(normal, 0) - normal, tl.cumsum(high, 0) - high

    least = tl.maximum(e, C.window_min) - C.low_reach  # exponent of the window's smallest normal number
    zero = 4 * (least - C.low_mantissa - 2) - (C.smallest - 1)  # the last binade that may round to zero, its first bin
    normals = tl.minimum(lane, tl.maximum(4 * least - (C.smallest - 1), 0))
    lost = tl.minimum(normals, tl.maximum(zero, 0))
    some_lost = tl.minimum(normals, tl.maximum(zero + 1, 0))
    low = normal_before - tl.gather(normal_before, normals, 0)
    seen_lost, seen_some = tl.gather(seen_before, lost, 0), tl.gather(seen_before, some_lost, 0)
    low += _units(least + 1 - C.low_mantissa - unit) * (tl.gather(seen_before, normals, 0) - seen_some)
    low += 61 * _units(least - C.low_mantissa - 2 - unit) * (seen_some - seen_lost)
    low += tl.gather(signal_before, lost, 0)
    error = low + (tl.sum(high) - high_before)
    bound = tl.cast(limit, tl.int64).to(tl.float64, bitcast=True)
    return error.to(tl.float64) <= bound * tl.sum(signal).to(tl.float64)


@triton.jit
def _choose(rows_ptr, programs, current, counts_ptr, limit, C: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr):
    """The threshold that suits what was found; `current` if that is nothing. Adds to counts [bins], if given."""
    lane = tl.arange(0, BINS)
    chosen = current
    if C.mode == FIXED:
        chosen = tl.cast(limit, tl.int32)
    elif C.mode == LARGEST:
        largest = tl.zeros((BINS,), tl.int32)
        for first in range(0, programs, BINS):
            row = first + lane
            found = tl.load(rows_ptr + row * BINS, mask=row < programs, other=0, cache_modifier=".cg")
            largest = tl.maximum(largest, found)
        bits = tl.max(largest)
        t = tl.minimum(tl.maximum((bits >> 21) - 4 * 127 + 1, C.smallest), C.largest)
        chosen = tl.where(bits > 0, t, current)
        if counts_ptr is not None:
            here = (lane == t - (C.smallest - 1)) & (bits > 0)
            tl.store(counts_ptr + lane, tl.load(counts_ptr + lane, mask=here, other=0) + 1, mask=here)
    else:
        counts = _counts(rows_ptr, programs, BINS, ROWS)
        if counts_ptr is not None:
            bins = lane < C.largest - C.smallest + 2
            before = tl.load(counts_ptr + lane, mask=bins, other=0)
            tl.store(counts_ptr + lane, before + counts.to(tl.int32), mask=bins)
        total = tl.sum(counts)
        above = total - (tl.cumsum(counts, 0) - counts)  # elements in FP16 if this bin's lower end were the threshold
        last = C.largest - C.smallest + 1
        valid = (lane > 0) & (lane <= last)
        if C.mode == SHARE:
            share = tl.cast(limit, tl.int64).to(tl.float64, bitcast=True)
            fits = above.to(tl.float64) <= share * total.to(tl.float64)
            best = tl.min(tl.where(fits & valid, lane, last))
        else:
            fits = _by_error(counts, total, above, limit, C, BINS)
            furthest = tl.max(tl.where(fits & valid, lane, 1))
            groups = tl.sum(tl.where(lane == furthest, above, 0))
            best = tl.min(tl.where(valid & (above == groups), lane, last))  # same groups, tightest window
        chosen = tl.where(total > 0, best + (C.smallest - 1), current)
    return chosen


@triton.jit
def finish(rows_ptr, programs, states_ptr, used_ptr, counts_ptr, limit, C: tl.constexpr, TRAINING: tl.constexpr,
           BINS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Chooses; writes the threshold to use now; in training also what is in use and what is to come, to states [2]."""
    current = tl.load(states_ptr)
    chosen = _choose(rows_ptr, programs, current, counts_ptr, limit, C, BINS, ROWS)
    used = tl.where(current == UNSET, chosen, current)
    tl.store(used_ptr, tl.where(used == UNSET, C.smallest, used))
    if TRAINING:
        tl.store(states_ptr, used)
        tl.store(states_ptr + 1, chosen)


@triton.jit(do_not_specialize=["programs", "count", "step", "steps", "state", "limit"])
def _threshold_kernel(
    x_ptr,
    states_ptr,
    counts_ptr,
    used_ptr,
    rows_ptr,
    ticket_ptr,
    programs,
    count,
    step,
    steps,
    sizes,
    strides,
    state,
    limit,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The threshold of x.

    count, step, steps, sizes, strides: see `look`. limit: see `Choice`. states: int32 [rows, 2], of which `state` is
    x's row. counts: int32, added to, or None. used: int32. rows: int32 [programs, BINS], scratch. ticket: int32, zero.
    """
    pid = tl.program_id(0)
    look(x_ptr, rows_ptr + pid * BINS, pid, count, step, steps, sizes, strides, C, BINS, BLOCK)
    # All threads' findings are written before the first one's ticket says so, to whoever reads that.
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == programs - 1:
        finish(rows_ptr, programs, states_ptr + 2 * state, used_ptr, counts_ptr, limit, C, TRAINING, BINS, ROWS)


class _Plan(NamedTuple):
    """The launch for a tensor of a certain shape, and the integers of scratch memory that it needs."""

    launch: Launch
    scratch: int
    whole: bool
    """whether the tensor is read as it lies in memory, all of it"""


def choose(x: Tensor, choice: Choice, states: Tensor, row: int, training: bool, counts: Tensor | None = None) -> Tensor:
    """The threshold to use now; in training also chooses the one to come.

    Args:
        x: float32, float16 or bfloat16, any strides, not empty.
        states: int32 [rows, 2], in use and to come, as in `Backend.next_threshold`; `row` is x's.
        counts: int32 [at least `Choice.bins`], to which the histogram is added, or, if the choice is by the LARGEST,
            one count in the bin of the threshold that x asks for.

    Returns:
        int32 [].

    Raises:
        TypeError, ValueError: a dtype, size or device that the kernel does not take; RuntimeError: not on a GPU.
    """
    plan = _plan(x.shape, x.stride(), x.dtype, choice, row, x.device, training)
    if states.dtype != torch.int32 or x.device != states.device:
        check_dtype((torch.int32,), states=states)
        check_device(states=states, x=x)
    used, ticket = torch.zeros(2, dtype=torch.int32, device=x.device)
    rows = torch.empty(plan.scratch, dtype=torch.int32, device=x.device)
    plan.launch(readable(dense(x) if plan.whole else x), states, counts, used, rows, ticket)
    return used


@lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    choice: Choice,
    row: int,
    device: torch.device,
    training: bool,
) -> _Plan:
    part = _part(shape, stride, dtype, choice, device)
    bins = power_of_2(choice.bins + 1)  # at least one to spare, for what is not counted
    launch = Launch(
        device,
        _threshold_kernel,
        (part.programs,),
        part.programs,
        part.count,
        part.step,
        part.steps,
        part.sizes,
        part.strides,
        row,
        choice.limit,
        C=choice.constants,
        TRAINING=training,
        BINS=bins,
        BLOCK=BLOCK,
        ROWS=ROWS,
    )
    return _Plan(launch, part.programs * bins, choice.mode == LARGEST.value)


class _Part(NamedTuple):
    """How a tensor is looked at."""

    programs: int
    count: int
    """elements"""
    step: int
    """from one element to the next"""
    steps: int
    """tiles of each program"""
    sizes: tuple[int, ...] = (1,)
    strides: tuple[int, ...] = (1,)


def _part(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, choice: Choice, device: torch.device
) -> _Part:
    check_dtype(FLOATS, x=dtype)
    total = shape.numel()
    if not 0 < total < INT32:
        raise ValueError(f"a threshold is chosen from 1 to 2^31 - 1 elements, not {total}")
    if choice.mode == FIXED.value:
        return _Part(1, 1, 1, 1)
    if choice.mode == LARGEST.value:
        tiles = triton.cdiv(total, BLOCK)
        steps = power_of_2(triton.cdiv(tiles, 4 * processors(device)))
        return _Part(triton.cdiv(tiles, steps), total, 1, steps)
    count, step = sample_of(total)
    return _Part(triton.cdiv(count, BLOCK), count, step, 1, *_joined(shape, stride))


def sample_of(total: int) -> tuple[int, int]:
    """How many elements of so many are looked at for a histogram, and the step from one to the next."""
    step = max(1, -(-total // SAMPLE))
    while total > SAMPLE and gcd(step, total) != 1:  # no divisor in common with the size: no row is favoured
        step += 1
    return triton.cdiv(total, step), step


def _joined(shape: Sequence[int], stride: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of the dimensions, the last first; those that memory walks as one are joined."""
    joined: list[list[int]] = []
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and joined and step == joined[-1][0] * joined[-1][1]:
            joined[-1][0] *= size
        elif size > 1:
            joined.append([size, step])
    joined = joined or [[1, 1]]
    return tuple(size for size, _ in joined), tuple(step for _, step in joined)
