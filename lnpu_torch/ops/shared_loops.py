"""The compiled loops behind the CPU backend: each splits its tensors among threads.

Every function that others call takes a team first, as from `threads.team`. Tensors come as addresses, of which 0 stands
for one that is not wanted: numbers make a call cheap, and each function is compiled once.
"""

from __future__ import annotations

import numpy as np
from numba import carray, float32, float64, int32, int64, types, uint8, uint16, uint32, uint64
from numba.extending import intrinsic

from lnpu_torch.counts.lane_configs import LANE_CONFIGS, LONGEST, RUN
from lnpu_torch.ops.lanes import cpu_loops as lane_loops
from lnpu_torch.ops.numba_jit import compiled, inlined
from lnpu_torch.ops.pair_counts import cpu_loops as count_loops
from lnpu_torch.ops.pair_counts.reference import MIXED, ROWS, SIZES, WIDTH
from lnpu_torch.ops.quantize import cpu_loops as loops
from lnpu_torch.ops.quantize import cpu_threshold_loops as threshold_loops
from lnpu_torch.ops.regions import bounds, in_parallel

ENTRIES = len(LANE_CONFIGS)
CHOICE = 10
"""Numbers that say how a rule chooses its threshold."""


@intrinsic
def _pointer(_, address):
    """An address -> a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), generate


@inlined
def array_at(address, shape, dtype):
    """The array of this shape at an address."""
    return carray(_pointer(address), shape, dtype)


@compiled
def _shares(team, count):
    return max(1, min(team[1], count))


@compiled
def _wanted(address, size):
    """Elements of an array: none if it is not wanted."""
    return size if address else 0


@compiled
def _rounding(p):
    """A rule's parameters in the types of `vector_rounding.rounded`."""
    return int32(p[0]), int32(p[1]), int32(p[2]), int32(p[3]), int32(p[4]), int32(p[5]), float32(p[6]), float32(p[7])


@compiled
def quantize_operand(team, x, single, half, position, samples, profiling, sizes, parameters, choosing):
    """Round a tensor of rows [channels, positions] and count it; returns the threshold to come, 0 if none is chosen.

    Args:
        x: float32.
        single, half: the rounded values, float32 and the bits of binary16.
        position: int32 [2, rows / share, channels, positions], sums over `share` rows each.
        samples: two addresses, of uint8 or of int32 [2, rows, groups, positions].
        profiling: a lane profile that is added to, int64, and whether runs go on from row to row.
        sizes: rows, channels, positions, groups, share, and whether rows are [positions, channels].
        parameters: what `vector_rounding.rounded` takes.
        choosing: what `choose_threshold` takes: sampling step, the address of a choice, and the threshold in use;
            without a choice none is made.
    """
    rows, channels, positions, groups, share, last = sizes
    size, blocks = rows * channels * positions, rows // share
    values = array_at(x, (size,), float32)
    chosen = choose_threshold(team, values, choosing, (channels, positions) if last else (0, 0)) if choosing[1] else 0
    singles = array_at(single, (_wanted(single, size),), float32)
    halves = array_at(half, (_wanted(half, size),), uint16)
    rounding = _rounding(parameters)
    counts = np.zeros((_shares(team, rows), 2, blocks, channels * positions), np.int32)
    lanes, joined = profiling
    times = (positions + RUN - 1) // RUN
    runs = np.empty((rows if lanes and not joined else 0, channels, times), np.uint8)
    if samples[0]:
        few = array_at(samples[0], (2, rows, groups, positions), uint8)
        _quantize(team, values, singles, halves, counts, few, runs, share, (rows, channels, positions), rounding, last)
    else:
        many = array_at(samples[1], (2, _wanted(samples[1], rows), groups, positions), int32)
        _quantize(team, values, singles, halves, counts, many, runs, share, (rows, channels, positions), rounding, last)
    target = array_at(position, (2, blocks, channels * positions), int32)
    in_parallel(team, 2 * blocks, _sum_counts, (counts, target, positions, last))
    if lanes and joined:
        together = last or positions == 1  # a position's channels lie together
        shape = (rows, positions, channels) if together else (rows, channels, positions)
        if half:
            runs = _runs(team, array_at(half, shape, uint16), uint16(0x7FFF), together, True)
        else:
            runs = _runs(team, array_at(single, shape, uint32), uint32(0x7FFFFFFF), together, True)
    if lanes:
        _add_profile(team, runs, array_at(lanes, (ENTRIES,), int64))
    return chosen


@compiled
def _quantize(team, x, single, half, counts, samples, runs, share, sizes, parameters, last):
    """Loops over rows, in either order of a row's elements."""
    arguments = (x, single, half, counts, samples, runs, share, sizes, parameters)
    if last:
        in_parallel(team, len(counts), loops.quantize_last, arguments)
    else:
        in_parallel(team, len(counts), loops.quantize, arguments)


@compiled
def _sum_counts(number, shares, counts, position, positions, last):
    """Sum one block's counts of one group over shares, and turn them to [channels, positions]."""
    group, block = number % 2, number // 2
    total, target, channels = counts[0, group, block], position[group, block], position.shape[2] // positions
    for i in range(1, len(counts)):
        loops.add(total, 0, counts[i, group, block], len(total))
    if last:
        for c in range(channels):
            for p in range(positions):
                target[uint64(c * positions + p)] = total[uint64(p * channels + c)]
    else:
        target[:] = total


@compiled
def quantize_flat(team, x, values, groups, size, parameters):
    """Round so many numbers in a row; returns how many are FP8, and how many wider. `groups`: uint8 (0, 8, 16)."""
    totals = np.zeros((_shares(team, size), 2), np.int64)
    marks = array_at(groups, (_wanted(groups, size),), uint8)
    arrays = (array_at(x, (size,), float32), array_at(values, (size,), float32), marks)
    in_parallel(team, len(totals), _quantize_flat, (*arrays, _rounding(parameters), totals))
    return totals[:, 0].sum(), totals[:, 1].sum()


@compiled
def _quantize_flat(share, shares, x, values, groups, parameters, totals):
    a, b = bounds(len(x), share, shares)
    totals[share] = loops.quantize_flat(x[a:b], values[a:b], groups[a:b], parameters)


@compiled
def round_half(team, x, size):
    """Round so many float32 numbers to binary16, in place."""
    in_parallel(team, _shares(team, size), _round_half, (array_at(x, (size,), float32),))


@compiled
def _round_half(share, shares, x):
    a, b = bounds(len(x), share, shares)
    loops.round_half(x[a:b], x[a:b])


@compiled
def add_profile_of(team, values, size, sizes, joined, lanes):
    """Add the lane profile of float32 or binary16 numbers (`size`: bytes of one) to `lanes`.

    Args:
        sizes: rows, channels, positions, and whether rows are [positions, channels].
        joined: whether runs go on from row to row.
    """
    rows, channels, positions, last = sizes
    shape = (rows, positions, channels) if last else (rows, channels, positions)
    entries = array_at(lanes, (ENTRIES,), int64)
    if size == 2:
        _add_profile(team, _runs(team, array_at(values, shape, uint16), uint16(0x7FFF), last, joined), entries)
    else:
        _add_profile(team, _runs(team, array_at(values, shape, uint32), uint32(0x7FFFFFFF), last, joined), entries)


@compiled
def _runs(team, bits, magnitude, last, joined):
    """Non-zeros of each run: uint8 [rows, channels, times], or [1, channels, times] if runs go on from row to row."""
    if last:
        rows = bits.reshape((1, bits.shape[0] * bits.shape[1], bits.shape[2])) if joined else bits
        runs = np.empty((rows.shape[0], rows.shape[2], (rows.shape[1] + RUN - 1) // RUN), np.uint8)
        in_parallel(team, _shares(team, runs.shape[0] * runs.shape[2]), _runs_of_last, (rows, magnitude, runs))
        return runs
    if joined:
        runs = np.empty((1, bits.shape[1], (bits.shape[0] * bits.shape[2] + RUN - 1) // RUN), np.uint8)
        in_parallel(team, _shares(team, bits.shape[1]), _joined_runs, (bits, magnitude, runs))
        return runs
    runs = np.empty((bits.shape[0], bits.shape[1], (bits.shape[2] + RUN - 1) // RUN), np.uint8)
    in_parallel(team, _shares(team, len(bits)), _runs_of, (bits, magnitude, runs))
    return runs


@compiled
def _runs_of(share, shares, bits, magnitude, runs):
    a, b = bounds(len(runs), share, shares)
    lane_loops.runs_of(bits[a:b], magnitude, runs[a:b])


@compiled
def _runs_of_last(share, shares, bits, magnitude, runs):
    a, b = bounds(runs.shape[0] * runs.shape[2], share, shares)
    lane_loops.runs_of_last(bits, magnitude, runs, a, b)


@compiled
def _joined_runs(share, shares, bits, magnitude, runs):
    a, b = bounds(runs.shape[1], share, shares)
    lane_loops.joined_runs(bits[:, a:b], magnitude, runs[0, a:b])


@compiled
def _add_profile(team, runs, entries):
    """Add `lane_loops.profile` to `entries`: whole samples for each thread, or parts of the only one."""
    parts = len(runs) if len(runs) > 1 else (runs.shape[2] + LONGEST - 1) // LONGEST
    sums = np.zeros((_shares(team, parts), len(entries)), np.int64)
    in_parallel(team, len(sums), _profile, (runs, parts, sums))
    for part in sums:
        entries += part


@compiled
def _profile(share, shares, runs, parts, sums):
    a, b = bounds(parts, share, shares)
    part = runs[a:b] if len(runs) > 1 else runs[:, :, a * LONGEST : b * LONGEST]
    lane_loops.profile(part, sums[share])


@compiled
def _row(counters, known, call):
    """A step's counters for a call of these sizes: `pair_counts.reference.row_of`, int64 [WIDTH]."""
    rows, sizes = array_at(counters, (ROWS, WIDTH), int64), array_at(known, (SIZES + 1, 3), int64)
    for row in range(SIZES):
        free, same = True, True
        for i in range(3):
            free &= sizes[row, i] == 0
            same &= sizes[row, i] == call[i]
        if free or same:
            for i in range(3):
                sizes[row, i] = call[i]
            return rows[row]
    for i in range(3):
        sizes[SIZES, i] += call[i]
    return rows[MIXED]


@compiled
def _add(target, profile):
    """Add a lane profile to another; both are addresses, the second 0 if there is none."""
    if profile:
        entries = array_at(target, (ENTRIES,), int64)
        entries += array_at(profile, (ENTRIES,), int64)


@compiled
def add_weight_step(team, counting, position, weight, shape, profile, meets, strides, met, sizes):
    """Count one of a layer's steps: `pair_counts.reference.weight_step`, and a lane profile.

    Args:
        counting: addresses of the step's counters, of the sizes of call that their rows stand for, of its lane
            profiles; elements of both operands and of the result.
        position, weight: int32 [2, *shape] and [2, channels, *kernel], of which `shape` has the channels first.
        meets, strides, met, sizes: see `count_loops.add_channels`, with both operands' elements at the end of sizes.
    """
    counters, known, lanes, call = counting
    grid = array_at(position, (2, shape[0], shape[1], shape[2], shape[3]), int32)
    kernel = array_at(weight, (2, shape[0], met.shape[0], met.shape[1], met.shape[2]), int32)
    sums = np.zeros((_shares(team, shape[0]), 6, 2), np.int64)
    in_parallel(team, len(sums), _add_channels, (grid, kernel, meets, strides, met, sizes, sums))
    total = sums.sum(0)
    count_loops.record(_row(counters, known, call), total[:2], total[2], total[3], total[4], total[5], sizes)
    _add(lanes, profile)


@compiled
def _add_channels(share, shares, position, weight, meets, strides, met, sizes, sums):
    channels = bounds(position.shape[1], share, shares)
    count_loops.add_channels(position, weight, channels, meets, strides, met, sizes, sums[share])


@compiled
def add_grid_step(team, counting, big, small, meets, sizes, small_first):
    """Count the step that multiplies two grids: `pair_counts.reference.grid_step`, and both lane profiles.

    Args:
        counting: as for `add_weight_step`.
        big, small: address of counts by position int32 [2, *shape], shape, address of counts by sample
            [2, samples, *grid], their number, whether they are uint8 instead of int32, address of a lane profile.
        meets: see `count_loops.overlaps`.
        sizes: macs, inside, other channels of big and of small, elements of the first operand and of the second.
    """
    counters, known, lanes, call = counting
    shape = big[1]
    grids = array_at(big[0], (2, shape[0], shape[1], shape[2], shape[3]), int32)
    both = np.zeros((_shares(team, big[3]), 2, 2), np.int64)
    alone = np.zeros((2, 2, 2), np.int64)  # of each grid, its elements and how many are met
    other = small[1]
    others = array_at(small[0], (2, other[0], other[1], other[2], other[3]), int32)
    in_parallel(team, 2, _add_grid, (grids, others, meets, alone))
    first, second = (2, big[3], shape[1], shape[2], shape[3]), (2, big[3], other[1], other[2], other[3])
    if big[4]:
        samples = (array_at(big[2], first, uint8), array_at(small[2], second, uint8))
        in_parallel(team, len(both), _add_samples, (*samples, meets, both))
    else:
        samples = (array_at(big[2], first, int32), array_at(small[2], second, int32))
        in_parallel(team, len(both), _add_samples, (*samples, meets, both))
    bigs, smalls, pairs = alone[0, 1] * sizes[2], alone[1, 1] * sizes[3], both.sum(0)
    row = _row(counters, known, call)
    if small_first:
        count_loops.record(row, pairs.T.copy(), smalls, bigs, alone[1, 0], alone[0, 0], sizes)
        _add(lanes, small[5])
        _add(lanes + ENTRIES * 8, big[5])
    else:
        count_loops.record(row, pairs, bigs, smalls, alone[0, 0], alone[1, 0], sizes)
        _add(lanes, big[5])
        _add(lanes + ENTRIES * 8, small[5])


@compiled
def _add_grid(share, shares, big, small, meets, alone):
    """One grid alone."""
    if share == 0:
        count_loops.overlaps_of_all(big, meets[0], meets[2], alone[0])
    else:
        count_loops.overlaps_of_all(small, meets[1], np.ones(3, np.int64), alone[1])


@compiled
def _add_samples(share, shares, big, small, meets, both):
    """The pairs of both grids in some of the samples."""
    samples = bounds(big.shape[1], share, shares)
    count_loops.overlaps(big, small, samples, meets[0], meets[1], meets[2], both[share])


@compiled
def choose_threshold(team, x, choosing, turned):
    """`reference.choose_threshold` of a float32 array: by `fp16_share`, or by `max_error` where that is negative.

    `choosing`: every how manieth element is looked at, the address of a choice (share, squared error, six integers of
    both formats, smallest and largest threshold: float64), and what an array of zeros gets.
    """
    step, place, fallback = choosing
    choice = array_at(place, (CHOICE,), float64)
    smallest, largest = int64(choice[8]), int64(choice[9])
    counts = _histogram(team, x, step, smallest, largest, turned)
    if not counts.any():
        return fallback
    if choice[0] >= 0:
        return threshold_loops.best_by_share(counts, choice[0]) + smallest
    formats = (
        int64(choice[2]),
        int64(choice[3]),
        int64(choice[4]),
        int64(choice[5]),
        int64(choice[6]),
        int64(choice[7]),
    )
    return threshold_loops.best_by_error(counts, smallest, choice[1], formats) + smallest


@compiled
def threshold_of(team, x, size, choosing, turned):
    """`choose_threshold` of so many elements at an address."""
    return choose_threshold(team, array_at(x, (size,), float32), choosing, turned)


@compiled
def histogram(team, x, size, step, smallest, largest, turned):
    """`reference.histogram` between a rule's smallest and largest threshold, of so many elements at an address."""
    return _histogram(team, array_at(x, (size,), float32), step, smallest, largest, turned)


@compiled
def _histogram(team, x, step, smallest, largest, turned):
    count = (len(x) + step - 1) // step
    parts = np.zeros((_shares(team, count), largest - smallest + 2), np.int64)
    in_parallel(team, len(parts), _add_histogram, (x, step, count, smallest, largest, turned, parts))
    return parts.sum(0)


@compiled
def _add_histogram(share, shares, x, step, count, smallest, largest, turned, parts):
    a, b = bounds(count, share, shares)
    parts[share] = threshold_loops.histogram(x, step, a, b, smallest, largest, turned[0], turned[1])
