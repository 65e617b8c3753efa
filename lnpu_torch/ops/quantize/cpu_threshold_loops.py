"""The compiled inner loops that choose a T: a tensor's histogram, and the best T by it. Numba sees only arrays here.

Bin i of a histogram stands for quarter-binade smallest - 1 + i, where `smallest` is the rule's smallest T.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int32, int64
from numba.extending import intrinsic

from lnpu_torch.ops.numba_jit import compiled
from lnpu_torch.ops.quantize.reference import RANGE
from lnpu_torch.ops.vector_rounding import INFINITY, MAGNITUDE

FETCHED = 1024
"""Elements of a sample that are fetched at once."""


@intrinsic
def _bits(context: Any, x: Any) -> Any:
    """float32 -> its bits."""
    return int32(float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


@compiled
def best_by_share(counts, share):
    """Index of the T that `reference.choose_by_histogram` takes by `fp16_share`."""
    total, above = int64(counts.sum()), int64(0)
    for t in range(len(counts) - 2, -1, -1):
        above += counts[t + 1]
        if above > share * total:
            return min(t + 1, len(counts) - 2)
    return 0


@compiled
def best_by_error(counts, smallest, bound, formats):
    """Index of the T that `reference.choose_by_histogram` takes by `max_error`, whose square is the bound.

    `formats`: mantissa bits and least exponent of both formats, after FP8's its top exponent and how low that may go.
    """
    low_mantissa, low_least, low_top, lowest, wide_mantissa, wide_least = formats
    seen, whole, lost, before = np.flatnonzero(counts), int64(0), int64(0), int64(-(2**62))
    unit = ((seen[-1] + smallest - 1) >> 2) - RANGE
    for i in seen:
        quarter = i + smallest - 1
        whole += _units(_square(quarter), (quarter >> 2) - unit) * counts[i]
    t = len(counts) - 1
    while t > 0:
        t -= 1
        window = max((t + smallest) >> 2, lowest) - low_top
        if window != before or counts[t + 1]:  # else it is the error of the T above
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


@compiled
def _error(quarter, least, mantissa, unit):
    """`reference.error_table`'s expected squared error of an element in a format's least exponent and mantissa bits."""
    exponent = quarter >> 2
    over = max(exponent, least) - mantissa + 1 - exponent
    if int64(1) << (2 * min(max(over, 0), 4)) > _square(quarter):  # rounded to zero: the error is the element itself
        return _units(_square(quarter), exponent - unit)
    return _units(int64(1), exponent + over - unit)


@compiled
def _square(quarter):
    k = quarter & 3
    return int64(3 * k * k + 27 * k + 61)


@compiled
def _units(factor, power):
    return factor << (2 * min(power, RANGE + 3)) if power >= 0 else int64(0)


@compiled
def histogram(x, step, first, last, smallest, largest, channels, positions):
    """`reference.histogram` of elements [first, last) of x's sample, every step-th element: int64 [bins].

    x is in memory as it is in logical order, or each sample's [channels, positions] are turned over, if there are any.
    They are fetched before they are counted, so that no fetch waits for where an earlier one is counted.
    """
    counts = np.zeros((4, largest - smallest + 2), np.int32)  # in turn, so that no sum waits for the one before
    fetched = np.empty(FETCHED, np.int32)
    for start in range(first, last, FETCHED):
        number = min(FETCHED, last - start)
        for i in range(number):
            at = (start + i) * step
            if channels:
                place = at % (channels * positions)
                at += (place % positions) * channels + place // positions - place
            fetched[i] = _bits(x[at]) & MAGNITUDE
        for i in range(number):
            magnitude = fetched[i]
            quarter = min(max((magnitude >> 21) - 4 * 127, smallest - 1), largest) - (smallest - 1)
            counts[i & 3, quarter] += 0 < magnitude < INFINITY
    return counts.sum(0).astype(np.int64)
