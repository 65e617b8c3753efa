"""The compiled inner loops of `cpu_lanes`: runs counted, joined, shared and compared. Numba sees only arrays here.

A tile [channels, columns] holds the runs of one channel in each row; every loop runs along a row, over small integers
that lie side by side. A column is one run of one sample. Sums fit in 16 bits: 16 lanes of 256 positions.
"""

from __future__ import annotations

import numpy as np
from numba import int32, uint8, uint16

from lnpu_torch.jit import compiled
from lnpu_torch.lane_family import BALANCERS, JOIN, LANES, LEVELS, LONGEST, RUN, RUNS

TILE = 2**15
"""Runs in a tile, so that it and its maxima stay in a core's own cache."""


@compiled
def runs_of(bits, magnitude, runs):
    """Non-zeros of each run of bits [samples, channels, positions], into uint8 `runs` [samples, channels, T].

    `magnitude` is a mask of all bits but the sign: both zeros are zero.
    """
    for n in range(runs.shape[0]):
        for c in range(runs.shape[1]):
            row, counts = bits[n, c], runs[n, c]
            for t in range(len(counts)):
                part = row[t * RUN : (t + 1) * RUN]
                count = int32(0)
                for i in range(len(part)):
                    count = int32(count + int32((part[i] & magnitude) != 0))
                counts[t] = count


@compiled
def runs_of_last(bits, magnitude, runs):
    """The same of bits [samples, positions, channels]."""
    counts = np.empty(runs.shape[1], np.uint8)
    for n in range(runs.shape[0]):
        for t in range(runs.shape[2]):
            counts[:] = 0
            for position in range(t * RUN, min((t + 1) * RUN, bits.shape[1])):
                row = bits[n, position]
                for c in range(len(counts)):
                    counts[c] = uint8(counts[c] + uint8((row[c] & magnitude) != 0))
            for c in range(len(counts)):
                runs[n, c, t] = counts[c]


@compiled
def profile(runs, entries):
    """Add the lane-cycles of every member of the family to `entries`, int64, from runs [samples, channels, T].

    Whole blocks of as many channels as there are lanes are as good as samples, and may lie side by side with them.
    """
    if runs.shape[1] % LANES == 0:
        runs = np.ascontiguousarray(runs).reshape(-1, LANES, runs.shape[2])
    samples, channels, times = runs.shape
    share = len(entries) // len(RUNS)
    for first in range(0, channels, LANES):
        block = runs[:, first : first + LANES]
        columns = TILE // block.shape[1]
        length = min(times, max(1, columns // LONGEST) * LONGEST)
        together = max(1, columns // length)
        for sample in range(0, samples, together):
            for start in range(0, times, length):
                _add_tile(block[sample : sample + together, :, start : start + length], entries, share)


@compiled
def _add_tile(runs, entries, share):
    """`profile` of few enough runs. A run length that makes no longer runs than the one before is not measured anew."""
    samples, channels, times = runs.shape
    work = np.empty((channels, samples * times), np.uint16)
    for c in range(channels):
        for n in range(samples):
            for t in range(times):
                work[c, n * times + t] = runs[n, c, t]
    own = np.empty(share, np.int64)
    for i in range(len(RUNS)):
        if i == 0 or times > JOIN ** (i - 1):
            joined = _joined(work, samples)
            own[:] = 0
            _add_run(work, own)
            work = joined
        entries[i * share : (i + 1) * share] += own


@compiled
def _joined(work, samples):
    """Sums of every JOIN runs of a sample, the last of which may be fewer."""
    times = work.shape[1] // samples
    fewer = (times + JOIN - 1) // JOIN
    rest = times - (fewer - 1) * JOIN
    joined = np.empty((work.shape[0], samples * fewer), np.uint16)
    for c in range(work.shape[0]):
        for n in range(samples):
            for t in range(fewer - 1):
                total = int32(0)
                for i in range(JOIN):
                    total = int32(total + work[c, n * times + t * JOIN + i])
                joined[c, n * fewer + t] = total
            total = int32(0)
            for i in range(rest):
                total = int32(total + work[c, (n + 1) * times - rest + i])
            joined[c, (n + 1) * fewer - 1] = total
    return joined


@compiled
def _add_run(work, entries):
    """The entries of one run length, from the non-zeros of each run; writes over them."""
    first = len(entries)
    for i in range(len(BALANCERS) - 1, -1, -1):  # without balancer last, for it needs no copy of `work`
        first -= LEVELS[i]
        groups = _shared(work, BALANCERS[i]) if BALANCERS[i] > 1 else work
        _add_lanes(groups, work.shape[0], BALANCERS[i], entries[first : first + LEVELS[i]])


@compiled
def _shared(work, size):
    """The mean over every `size` rows, of which the last may be fewer, rounded up."""
    shared = np.empty(((work.shape[0] + size - 1) // size, work.shape[1]), work.dtype)
    sums = np.empty(work.shape[1], np.uint16)
    for group in range(len(shared)):
        lanes = work[group * size : (group + 1) * size]
        sums[:] = len(lanes) - 1
        for lane in range(len(lanes)):
            _accumulate(lanes[lane], sums)
        _divide(sums, len(lanes), shared[group])
    return shared


@compiled
def _accumulate(row, sums):
    for t in range(len(sums)):
        sums[t] = uint16(sums[t] + row[t])


@compiled
def _divide(sums, by, out):
    shift = 0
    while (2 << shift) <= by:
        shift += 1
    if by == 1 << shift:
        for t in range(len(out)):
            out[t] = sums[t] >> uint16(shift)
    else:
        for t in range(len(out)):
            out[t] = sums[t] // by


@compiled
def _add_lanes(groups, channels, lanes, entries):
    """The entries for `lanes` and its doubles, by a tree of maxima over rows that begin as `lanes` channels each.

    Writes over `groups`. The last row may stand for fewer channels than the others.
    """
    spare = np.empty(((len(groups) + 1) // 2, groups.shape[1]), groups.dtype)
    for level in range(len(entries)):
        cycles, last = 0, 0
        for group in range(len(groups)):
            last = _sum(groups[group])
            cycles += last
        entries[level] += lanes * cycles - (-channels % lanes) * last
        if len(groups) > 1:
            for group in range(0, len(groups), 2):  # an odd last one is compared with itself
                _larger(groups[group], groups[min(group + 1, len(groups) - 1)], spare[group // 2])
            groups, spare = spare[: (len(groups) + 1) // 2], groups
        lanes *= 2


@compiled
def _sum(row):
    total = int32(0)
    for t in range(len(row)):
        total = int32(total + row[t])
    return total


@compiled
def _larger(a, b, out):
    for t in range(len(out)):
        out[t] = max(a[t], b[t])
