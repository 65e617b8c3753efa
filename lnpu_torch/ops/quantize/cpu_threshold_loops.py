"""The compiled loops that choose a threshold: a tensor's histogram, and the best one by it. Numba sees only arrays.

Bin i of a histogram stands for quarter-binade smallest - 1 + i, where `smallest` is the rule's smallest threshold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, float64, int32, int64, uint64
from numba.extending import intrinsic

from lnpu_torch.ops.arrays import array_at
from lnpu_torch.ops.numba_jit import compiled, inlined
from lnpu_torch.ops.parallel import bounds, in_parallel, shares_of, sum_shares
from lnpu_torch.ops.quantize.reference import RANGE

MAGNITUDE, INFINITY = 0x7FFFFFFF, 0x7F800000
"""Bits of a float32."""
CHOICE = 10
"""Numbers that say how a rule chooses its threshold."""
FETCHED = 1024
"""Elements of a sample that are fetched at once."""


@intrinsic
def bits_of(context: Any, x: Any) -> Any:
    """float32 -> its bits."""
    return int32(float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


@inlined
def _best_by_share(counts, share):
    """Index of the threshold that `reference.choose_by_histogram` takes by `fp16_share`."""
    total, above = int64(0), int64(0)
    for count in counts:
        total += count
    for t in range(len(counts) - 2, -1, -1):
        above += counts[t + 1]
        if above > share * total:
            return min(t + 1, len(counts) - 2)
    return 0


@inlined
def _best_by_error(counts, seen, smallest, bound, formats):
    """Index of the threshold that `reference.choose_by_histogram` takes by `max_error`, whose square is the bound.

    `seen`: the bins that are not empty, ascending. `formats`: mantissa bits and least exponent of both formats, after
    FP8's its top exponent and how low that may go.
    """
    low_mantissa, low_least, low_top, lowest, wide_mantissa, wide_least = formats
    whole, lost, before = int64(0), int64(0), int64(-(2**62))
    unit = ((seen[-1] + smallest - 1) >> 2) - RANGE
    for i in seen:
        quarter = i + smallest - 1
        whole += _units(_square(quarter), (quarter >> 2) - unit) * counts[i]
    t = len(counts) - 1
    while t > 0:
        t -= 1
        window = max((t + smallest) >> 2, lowest) - low_top
        if window != before or counts[t + 1]:  # else it is the error of the threshold above
            lost, before = int64(0), window
            for i in seen:
                quarter = i + smallest - 1
                least, mantissa = (window + low_least, low_mantissa) if i <= t else (wide_least, wide_mantissa)
                lost += _error(quarter, least, mantissa, unit) * counts[i]
        if lost <= bound * whole:
            break
    while t > 0 and counts[t] == 0:  # same groups, tightest window
        t -= 1
    return t


@inlined
def _error(quarter, least, mantissa, unit):
    """`reference.error_table`'s expected squared error of an element in a format's least exponent and mantissa bits."""
    exponent = quarter >> 2
    over = max(exponent, least) - mantissa + 1 - exponent
    if int64(1) << (2 * min(max(over, 0), 4)) > _square(quarter):  # rounded to zero: the error is the element itself
        return _units(_square(quarter), exponent - unit)
    return _units(int64(1), exponent + over - unit)


@inlined
def _square(quarter):
    k = quarter & 3
    return int64(3 * k * k + 27 * k + 61)


@inlined
def _units(factor, power):
    return factor << (2 * min(power, RANGE + 3)) if power >= 0 else int64(0)


@compiled
def choose_threshold(team, x, size, choosing, turned):
    """`reference.choose_threshold` of so many elements: by `fp16_share`, or by `max_error` where that is negative.

    Args:
        x: address, of float32.
        choosing: every how manieth element is looked at, the address of a choice (share, squared error, six integers
            of both formats, smallest and largest threshold: float64), and what an array of zeros gets.
        turned: see `_add_histogram`.
    """
    step, place, fallback = choosing
    choice = array_at(place, (CHOICE,), float64)
    smallest, largest = int64(choice[8]), int64(choice[9])
    counts = histogram(team, x, size, step, smallest, largest, turned)
    seen = np.empty(len(counts), np.int64)
    found = 0
    for i in range(len(counts)):
        if counts[i]:
            seen[found] = i
            found += 1
    if found == 0:
        return fallback
    if choice[0] >= 0:
        return _best_by_share(counts, choice[0]) + smallest
    low_mantissa, low_least, low_top = int64(choice[2]), int64(choice[3]), int64(choice[4])
    lowest, wide_mantissa, wide_least = int64(choice[5]), int64(choice[6]), int64(choice[7])
    formats = (low_mantissa, low_least, low_top, lowest, wide_mantissa, wide_least)
    return _best_by_error(counts, seen[:found], smallest, choice[1], formats) + smallest


@compiled
def histogram(team, x, size, step, smallest, largest, turned):
    """`reference.histogram` between a rule's smallest and largest threshold, of so many elements at an address."""
    count = (size + step - 1) // step
    parts = np.zeros((shares_of(team, count), largest - smallest + 2), np.int64)
    arguments = (array_at(x, (size,), float32), step, count, smallest, largest, turned, parts)
    in_parallel(team, len(parts), _add_histogram, arguments)
    return sum_shares(parts)


@compiled
def _add_histogram(share, shares, x, step, count, smallest, largest, turned, parts):
    """Count a share of x's sample, every step-th element, in `parts[share]`.

    x is in memory as it is in logical order, or each sample's [channels, positions], as `turned` tells, are turned
    over. Elements are fetched before they are counted, so that no fetch waits for where an earlier one is counted.
    """
    counts = np.zeros((4, largest - smallest + 2), np.int32)  # in turn, so that no sum waits for the one before
    fetched, (channels, positions) = np.empty(FETCHED, np.int32), turned
    first, last = bounds(count, share, shares)
    at = first * step
    in_row = max(1, channels * positions)
    row, channel, position = at // in_row * in_row, at % in_row // max(1, positions), at % max(1, positions)
    channel_step, position_step = step // max(1, positions), step % max(1, positions)
    for start in range(first, last, FETCHED):
        number = min(FETCHED, last - start)
        for i in range(number):
            if channels:
                at = row + position * channels + channel
                channel, position = channel + channel_step, position + position_step
                if position >= positions:
                    channel, position = channel + 1, position - positions
                while channel >= channels:
                    row, channel = row + in_row, channel - channels
            else:
                at = (start + i) * step
            fetched[i] = bits_of(x[uint64(at)]) & MAGNITUDE
        for i in range(number):
            magnitude = fetched[i]
            quarter = min(max((magnitude >> 21) - 4 * 127, smallest - 1), largest) - (smallest - 1)
            counts[i & 3, quarter] += 0 < magnitude < INFINITY
    for turn in range(4):
        for i in range(counts.shape[1]):
            parts[share, i] += counts[turn, i]
