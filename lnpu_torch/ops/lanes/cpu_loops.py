"""The compiled inner loops of `cpu_lanes`: runs counted, joined, shared and compared. Numba sees only arrays here.

A tile [channels, columns] holds the runs of one channel in each row; every loop runs along a row, over small integers
that lie side by side. A column is one run of one sample. Sums fit in 16 bits: 16 lanes of 256 positions. Tiles are flat
arrays: to slice them would take as long as to add up a row.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, uint8, uint16, uint32, uint64

from lnpu_torch.counts.lane_configs import (
    BALANCE_GROUPS,
    JOIN,
    LANE_CONFIGS,
    LANES,
    LEVELS,
    LONGEST,
    RUN,
    SYNC_INTERVALS,
)
from lnpu_torch.ops.arrays import array_at
from lnpu_torch.ops.numba_jit import compiled
from lnpu_torch.ops.parallel import bounds, in_parallel, shares_of

ENTRIES = len(LANE_CONFIGS)
TILE = 2**15
"""Runs in a tile, so that it and its maxima stay in a core's own cache."""


@compiled
def add_profile_of(team, values, size, sizes, joined, lanes):
    """Add the lane profile of float32 or binary16 numbers (`size`: bytes of one) to `lanes`. Both are addresses.

    Args:
        sizes: rows, channels, positions, and whether rows are [positions, channels].
        joined: whether runs go on from row to row.
    """
    rows, channels, positions, last = sizes
    shape = (rows, positions, channels) if last else (rows, channels, positions)
    if size == 2:
        add_profile(team, runs_of(team, array_at(values, shape, uint16), uint16(0x7FFF), last, joined), lanes)
    else:
        add_profile(team, runs_of(team, array_at(values, shape, uint32), uint32(0x7FFFFFFF), last, joined), lanes)


@compiled
def runs_of(team, bits, magnitude, last, joined):
    """Non-zeros of each run: uint8 [rows, channels, times], or [1, channels, times] if runs go on from row to row.

    Args:
        bits: [rows, channels, positions], or [rows, positions, channels] if `last`.
        magnitude: a mask of all bits but the sign: both zeros are zero.
    """
    rows, channels, positions = len(bits), bits.shape[1 + last], bits.shape[2 - last]
    length = rows * positions if joined else positions
    runs = np.empty((1 if joined else rows, channels, (length + RUN - 1) // RUN), np.uint8)
    if last:
        reshaped = bits.reshape((len(runs), length, channels))
        in_parallel(team, shares_of(team, len(runs) * runs.shape[2]), _runs_of_last, (reshaped, magnitude, runs))
    elif joined:
        in_parallel(team, shares_of(team, channels), _joined_runs, (bits, magnitude, runs[0]))
    else:
        in_parallel(team, shares_of(team, rows), _runs_of, (bits, magnitude, runs))
    return runs


@compiled
def _runs_of(share, shares, bits, magnitude, runs):
    """Of some rows [channels, positions]."""
    first, stop = bounds(len(runs), share, shares)
    for n in range(first, stop):
        for c in range(runs.shape[1]):
            row, counts = bits[n, c], runs[n, c]
            for t in range(len(counts)):
                part = row[t * RUN : (t + 1) * RUN]
                count = int32(0)
                for i in range(len(part)):
                    count = int32(count + int32((part[i] & magnitude) != 0))
                counts[t] = count


@compiled
def _runs_of_last(share, shares, bits, magnitude, runs):
    """Of rows [positions, channels], some of all runs."""
    first, stop = bounds(len(runs) * runs.shape[2], share, shares)
    counts = np.empty(runs.shape[1], np.uint8)
    for number in range(first, stop):
        n, t = divmod(number, runs.shape[2])
        counts[:] = 0
        for position in range(t * RUN, min((t + 1) * RUN, bits.shape[1])):
            row = bits[n, position]
            for c in range(len(counts)):
                counts[c] = uint8(counts[c] + uint8((row[c] & magnitude) != 0))
        for c in range(len(counts)):
            runs[n, c, t] = counts[c]


@compiled
def _joined_runs(share, shares, bits, magnitude, runs):
    """Of some channels of rows [channels, positions], whose runs go on from row to row."""
    first, stop = bounds(len(runs), share, shares)
    for c in range(first, stop):
        counts, place = runs[c], 0
        counts[:] = 0
        for n in range(len(bits)):
            row = bits[n, c]
            for i in range(len(row)):
                counts[uint64(place // RUN)] += uint8((row[i] & magnitude) != 0)
                place += 1


@compiled
def add_profile(team, runs, lanes):
    """Add the profile of runs [samples, channels, T] to that at an address.

    Each thread takes whole samples, or parts of the only one.
    """
    parts = len(runs) if len(runs) > 1 else (runs.shape[2] + LONGEST - 1) // LONGEST
    sums = np.zeros((shares_of(team, parts), ENTRIES), np.int64)
    in_parallel(team, len(sums), _profile, (runs, parts, sums))
    entries = array_at(lanes, (ENTRIES,), int64)
    for part in sums:
        entries += part


@compiled
def _profile(share, shares, runs, parts, sums):
    first, stop = bounds(parts, share, shares)
    part = runs[first:stop] if len(runs) > 1 else runs[:, :, first * LONGEST : stop * LONGEST]
    _add_profile(part, sums[share])


@compiled
def _add_profile(runs, entries):
    """Add the lane-cycles of every member of the family to `entries`, int64, from runs [samples, channels, T].

    Whole blocks of as many channels as there are lanes are as good as samples, and may lie side by side with them.
    """
    if runs.shape[1] % LANES == 0:
        runs = np.ascontiguousarray(runs).reshape(-1, LANES, runs.shape[2])
    samples, channels, times = runs.shape
    share = len(entries) // len(SYNC_INTERVALS)
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
        entries[i * share : (i + 1) * share] += own


@compiled
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
        for i in range(len(joined)):
            total, sample, t = int32(0), i // fewer * times, i % fewer * JOIN
            for j in range(t, min(t + JOIN, times)):
                total = int32(total + work[uint64(sample + j)])
            joined[uint64(i)] = total
    return joined


@compiled
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


@compiled
def _sums(work, rows, columns, size):
    """Sums over every `size` rows, of which the last may be fewer; and how many they are."""
    fewer = (rows + size - 1) // size
    sums = np.zeros(fewer * columns, np.uint16)
    for row in range(rows):
        source, target = row * columns, row // size * columns
        for t in range(columns):
            sums[uint64(target + t)] += work[uint64(source + t)]
    return sums, fewer


@compiled
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


@compiled
def _maxima(groups, rows, columns):
    """The larger of every two rows; an odd last one stays."""
    maxima = np.empty((rows + 1) // 2 * columns, np.uint16)
    for pair in range(rows // 2):
        first, target = 2 * pair * columns, pair * columns
        for t in range(columns):
            a, b = groups[uint64(first + t)], groups[uint64(first + columns + t)]
            maxima[uint64(target + t)] = max(a, b)
    if rows % 2:
        maxima[-columns:] = groups[-columns:]
    return maxima


@compiled
def _sum(row, start, stop):
    total = int32(0)
    for t in range(start, stop):
        total = int32(total + row[uint64(t)])
    return total
