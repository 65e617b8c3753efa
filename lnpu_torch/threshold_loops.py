"""The compiled inner loops that choose a T: a tensor's histogram, and the best T by it. Numba sees only arrays here."""

from __future__ import annotations

import numpy as np
from numba import int32, int64

from lnpu_torch.jit import compiled
from lnpu_torch.loops import INFINITY, MAGNITUDE, bits_of


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
def best_by_error(error, signal, counts, bound):
    """Index of the T that `reference.choose_by_histogram` takes by `max_error`, whose square is the bound."""
    seen, whole = np.flatnonzero(counts), int64(0)
    for i in seen:
        whole += signal[i] * counts[i]
    t, lost = len(error), int64(0)
    while t > 0:
        t -= 1
        lost = int64(0)
        for i in seen:
            lost += error[t, i] * counts[i]
        if lost <= bound * whole:
            break
    while t > 0 and counts[t] == 0:  # same groups, tightest window
        t -= 1
    return t


@compiled
def histogram(x, step, smallest, largest, channels, positions):
    """`reference.histogram` of every step-th element, and its highest bin that is not empty, or -1.

    x is in memory as it is in logical order, or each sample's [channels, positions] are turned over, if there are any.
    """
    counts = np.zeros((4, largest - smallest + 1), np.int32)  # in turn, so that no sum waits for the one before
    for i in range((len(x) + step - 1) // step):
        at = i * step
        if channels:
            place = at % (channels * positions)
            at += (place % positions) * channels + place // positions - place
        magnitude = int32(bits_of(x[at]) & MAGNITUDE)
        quarter = min(max((magnitude >> 21) - 4 * 127, smallest), largest) - smallest
        counts[i & 3, quarter] += 0 < magnitude < INFINITY
    total = counts.sum(0).astype(np.int64)
    top = len(total) - 1
    while top >= 0 and total[top] == 0:
        top -= 1
    return total, top
