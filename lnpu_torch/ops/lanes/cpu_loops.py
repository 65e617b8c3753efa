"""The compiled loops of `cpu`: runs counted, joined, shared and compared. Numba sees only arrays here.

A tile [channels, columns] holds the runs of one channel in each row; every loop runs along a row, over small integers
that lie side by side. A column is one run of one sample. Sums fit in 16 bits: 16 lanes of 256 positions. Tiles are flat
arrays: to slice them would take as long as to add up a row.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, uint8, uint16, uint64

from lnpu_torch.counts.lane_configs import (
    BALANCE_GROUPS,
    JOIN,
    LANE_CONFIGS,
    LANES,
    LEVELS,
    LONGEST,
    SYNC_INTERVALS,
)
from lnpu_torch.ops.arrays import array_at
from lnpu_torch.ops.numba_jit import compiled, inlined
from lnpu_torch.ops.parallel import bounds, in_parallel, shares_of, sum_shares

ENTRIES = len(LANE_CONFIGS)
TILE = 2**15
"""Runs in a tile, so that it and its maxima stay in a core's own cache."""


@compiled
def add_profile(team, runs, shape, lanes):
    """Add the profile of runs [samples, channels, times] to `lanes`. Both are addresses.

    Each thread takes whole samples, or parts of the only one. Whole blocks of as many channels as there are lanes are
    as good as samples, and may lie side by side with them.
    """
    samples, channels, times = shape
    if channels % LANES == 0:
        samples, channels = samples * (channels // LANES), LANES
    parts = samples if samples > 1 else (times + LONGEST - 1) // LONGEST
    sums = np.zeros((shares_of(team, parts), ENTRIES), np.int64)
    in_parallel(team, len(sums), _profile, (array_at(runs, (samples, channels, times), uint8), parts, sums))
    entries, added = array_at(lanes, (ENTRIES,), int64), sum_shares(sums)
    for i in range(ENTRIES):
        entries[i] += added[i]


@compiled
def _profile(share, shares, runs, parts, sums):
    """Add the lane-cycles of every member of the family, for some of the parts."""
    first, stop = bounds(parts, share, shares)
    samples, channels, times = runs.shape
    begin, end, begin_sample, end_sample = 0, times, first, stop
    if samples == 1:
        begin, end, begin_sample, end_sample = first * LONGEST, min(stop * LONGEST, times), 0, 1
    levels = ENTRIES // len(SYNC_INTERVALS)
    for first_channel in range(0, channels, LANES):
        after = min(first_channel + LANES, channels)
        columns = TILE // (after - first_channel)
        length = min(end - begin, max(1, columns // LONGEST) * LONGEST)
        together = max(1, columns // max(1, length))
        for sample in range(begin_sample, end_sample, together):
            for start in range(begin, end, max(1, length)):
                stop_sample, stop_run = min(sample + together, end_sample), min(start + length, end)
                _add_tile(runs[sample:stop_sample, first_channel:after, start:stop_run], sums[share], levels)


@inlined
def _add_tile(runs, entries, share):
    """`_profile` of few enough runs. A run length that makes no longer runs than one before is not measured anew."""
    samples, channels, times = runs.shape
    columns = samples * times
    work, own = np.empty(channels * columns, np.uint16), np.empty(share, np.int64)
    for c in range(channels):
        for n in range(samples):
            place = c * columns + n * times
            for t in range(times):
                work[uint64(place + t)] = runs[n, c, t]
    for i in range(len(SYNC_INTERVALS)):
        if i == 0 or times > 1:
            if i > 0:
                work, times = _joined(work, times), (times + JOIN - 1) // JOIN
            own[:] = 0
            _add_run(work, channels, own)
        for j in range(share):  # an expression of arrays would compile for seconds
            entries[i * share + j] += own[j]


@inlined
def _joined(work, times):
    """Sums of every JOIN of the runs of a sample, so many in a row; the last of them may be fewer."""
    fewer = (times + JOIN - 1) // JOIN
    joined = np.empty(len(work) // times * fewer, np.uint16)
    if times % JOIN == 0:
        for i in range(len(joined)):
            total = int32(0)
            for j in range(JOIN):
                total = int32(total + work[uint64(i * JOIN + j)])
            joined[uint64(i)] = total
    else:
        place = 0
        for start in range(0, len(work), times):
            for t in range(start, start + times, JOIN):
                total = int32(0)
                for j in range(t, min(t + JOIN, start + times)):
                    total = int32(total + work[uint64(j)])
                joined[uint64(place)] = total
                place += 1
    return joined


@inlined
def _add_run(work, channels, entries):
    """The entries of one run length, from the non-zeros of each run."""
    columns, first = len(work) // channels, LEVELS[0]
    _add_lanes(work, channels, channels, BALANCE_GROUPS[0], entries[:first])  # of one lane, which shares with none
    sums, rows = work, channels
    for i in range(1, len(BALANCE_GROUPS)):
        sums, rows = _sums(sums, rows, columns, BALANCE_GROUPS[i] // BALANCE_GROUPS[i - 1])
        groups = _shared(sums, channels, columns, BALANCE_GROUPS[i])
        _add_lanes(groups, rows, channels, BALANCE_GROUPS[i], entries[first : first + LEVELS[i]])
        first += LEVELS[i]


@inlined
def _sums(work, rows, columns, size):
    """Sums over every `size` rows, of which the last may be fewer; and how many they are."""
    fewer = (rows + size - 1) // size
    sums = np.zeros(fewer * columns, np.uint16)
    for row in range(rows):
        source, target = row * columns, row // size * columns
        for t in range(columns):
            sums[uint64(target + t)] += work[uint64(source + t)]
    return sums, fewer


@inlined
def _shared(sums, channels, columns, size):
    """Sums over so many channels -> their means, rounded up. `size` is a power of two; the last may be over fewer."""
    shared, rest, shift = np.empty(len(sums), np.uint16), (channels - 1) % size + 1, 0
    while 1 << shift < size:
        shift += 1
    for i in range(len(sums) - columns):
        shared[uint64(i)] = (sums[uint64(i)] + uint16(size - 1)) >> uint16(shift)
    for i in range(len(sums) - columns, len(sums)):
        shared[i] = (sums[i] + rest - 1) // rest
    return shared


@compiled
def _add_lanes(groups, rows, channels, lanes, entries):
    """The entries for `lanes` and its doubles, by a tree of maxima over rows that begin as `lanes` channels each.

    The last row may stand for fewer channels than the others.
    """
    columns = len(groups) // rows
    for level in range(len(entries)):
        last = _sum(groups, len(groups) - columns, len(groups))
        entries[level] += lanes * _sum(groups, 0, len(groups)) - (-channels % lanes) * last
        if rows > 1:
            groups, rows = _maxima(groups, rows, columns), (rows + 1) // 2
        lanes *= 2


@inlined
def _maxima(groups, rows, columns):
    """The larger of every two rows; an odd last one stays."""
    maxima = np.empty((rows + 1) // 2 * columns, np.uint16)
    for pair in range(rows // 2):
        first, target = 2 * pair * columns, pair * columns
        for t in range(columns):
            a, b = groups[uint64(first + t)], groups[uint64(first + columns + t)]
            maxima[uint64(target + t)] = max(a, b)
    if rows % 2:
        for t in range(len(maxima) - columns, len(maxima)):
            maxima[t] = groups[len(groups) - len(maxima) + t]
    return maxima


@inlined
def _sum(row, start, stop):
    total = int32(0)
    for t in range(start, stop):
        total = int32(total + row[uint64(t)])
    return total
