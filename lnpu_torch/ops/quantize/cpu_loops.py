"""The compiled inner loops of `cpu`. Numba sees only arrays and numbers here; importing this compiles nothing yet.

A row of a tensor is rounded vector by vector, and what is counted goes into packed counters, which are unpacked before
they could overflow. Arrays of them are a vector longer than what they count, so that the last vector may reach beyond.
"""

from __future__ import annotations

import numpy as np
from numba import int32, uint64

from lnpu_torch.counts.lane_configs import RUN
from lnpu_torch.ops.numba_jit import compiled, inlined
from lnpu_torch.ops.packed_counters import count_runs, fold, fold_runs, sum_groups, unpack
from lnpu_torch.ops.regions import bounds
from lnpu_torch.ops.vector_rounding import (
    MOST,
    add_to,
    in_half,
    load,
    nothing,
    plus,
    present,
    put,
    put_groups,
    rounded,
    store,
    total,
)
from lnpu_torch.ops.vectors import AHEAD, LANES, prefetch_to_read

CHUNK = 1024
"""Elements that are rounded before what is known of them is summed up: few enough to lie in the nearest cache."""


@inlined
def _round(x, start, single, half, place, count, parameters):
    """Round a vector of x from `start` on into `single` and `half` (each may be empty) from `place` on; its marks.

    If `count` is less than 16, only so many elements are left.
    """
    prefetch_to_read(x, start + AHEAD)
    values, marks = rounded(load(x, start, count), parameters)
    if len(single):
        store(values, single, place, count)
    if len(half):
        store(values, half, place, count)
    return marks


@compiled
def add(sums, start, terms, count):
    """Add terms to sums from `start` on."""
    for i in range(count):
        sums[uint64(start + i)] = int32(sums[uint64(start + i)] + terms[uint64(i)])


@compiled
def quantize(part, parts, x, single, half, counts, samples, runs, share, sizes, parameters):
    """Round a part of the rows [channels, positions] of x, write it, and count its groups by position, sample and run.

    `counts` [parts, 2, blocks, size] is added to, row r in block r // share; `samples` [2, rows, groups, positions]
    and `runs` (see `lanes.runs_of`) are written. `single`, `half`, `samples` and `runs`
    may be empty. `sizes` are the rows' number and shape.
    """
    rows, channels, positions = sizes
    size, groups = channels * positions, samples.shape[2]
    group = size // groups
    run = positions * _power_of_two(min(CHUNK, group) // positions)  # whole channels, so that sums can be folded
    packed, sums = np.zeros(size + LANES, np.uint16), np.zeros(run + LANES, np.uint16)
    bits, added, summed = np.empty(run // LANES + 2, np.uint16), 0, 0
    begin_row, end_row = bounds(rows, part, parts)
    for row in range(begin_row, end_row):
        if samples.shape[1]:
            samples[:, row] = 0
        start = 0
        while start < size:
            stop = min(start + run, start - start % group + group)
            count, place = stop - start, row * size + start
            for i in range(0, count, LANES):
                marks = _round(x, place + i, single, half, place + i, count - i, parameters)
                add_to(marks, packed, start + i)
                if samples.shape[1]:
                    add_to(marks, sums, i)
                if len(runs):
                    bits[uint64(i // LANES)] = present(marks)
            if samples.shape[1]:
                summed += 1
                if stop % group == 0 or summed == MOST:
                    fold(sums, summed, samples[0, row, start // group], samples[1, row, start // group])
                    summed = 0
            if len(runs):
                count_runs(bits, count, positions, runs[row].reshape(-1), start // positions * runs.shape[2])
            start = stop
        added += 1
        if added == MOST or (row + 1) % share == 0 or row == end_row - 1:
            unpack(packed, counts[part, 0, row // share], counts[part, 1, row // share])
            added = 0


@compiled
def quantize_last(part, parts, x, single, half, counts, samples, runs, share, sizes, parameters):
    """`quantize` for rows [positions, channels]."""
    rows, channels, positions = sizes
    size, groups = channels * positions, samples.shape[2]
    together = min(RUN, _power_of_two(CHUNK // channels))  # positions, a divisor of RUN
    run, length = channels * together, channels // groups
    packed, sums = np.zeros(size + LANES, np.uint16), np.zeros(run + LANES, np.uint16)
    kept = np.empty(run + LANES, np.uint16)
    added = 0
    begin_row, end_row = bounds(rows, part, parts)
    for row in range(begin_row, end_row):
        for start in range(0, size, run):
            count, place, position = min(run, size - start), row * size + start, start // channels
            for i in range(0, count, LANES):
                marks = _round(x, place + i, single, half, place + i, count - i, parameters)
                add_to(marks, packed, start + i)
                if samples.shape[1]:
                    put(marks, kept, i)
                if len(runs):
                    add_to(marks, sums, i)
            if samples.shape[1]:
                sum_groups(kept, count, samples[:, row], position, length)
            if len(runs) and ((position + together) % RUN == 0 or start + count == size):
                fold_runs(sums, run, runs[row], position // RUN)
        added += 1
        if added == MOST or (row + 1) % share == 0 or row == end_row - 1:
            unpack(packed, counts[part, 0, row // share], counts[part, 1, row // share])
            added = 0


@compiled
def quantize_flat(x, values, groups, parameters):
    """Round numbers in a row; returns how many are FP8, and how many wider. `groups` (0, 8, 16) may be empty."""
    fp8, wide, none = 0, 0, np.empty(0, np.uint16)
    for start in range(0, len(x), LANES * MOST):
        counters = nothing()
        for i in range(start, min(start + LANES * MOST, len(x)), LANES):
            marks = _round(x, i, values, none, i, len(x) - i, parameters)
            counters = plus(counters, marks)
            if len(groups):
                put_groups(marks, groups, i, len(x) - i)
        fp8 += total(counters) & int32(0xFFFF)
        wide += total(counters) >> 16
    return fp8, wide


@compiled
def _power_of_two(n):
    """The largest that is not above n; 1 if there is none."""
    power = 1
    while 2 * power <= n:
        power *= 2
    return power


@compiled
def round_half(x, out):
    """Round float32 numbers to binary16, into `out` (which may be x)."""
    for i in range(0, len(x), LANES):
        prefetch_to_read(x, i + AHEAD)
        count = len(x) - i
        store(in_half(load(x, i, count)), out, i, count)
