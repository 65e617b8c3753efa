"""The compiled loops of `cpu` and its kin, shared among threads: each cuts its arrays into shares of rows or elements.

Every function here that others call takes a team first, as from `threads.team`.
"""

from __future__ import annotations

import numpy as np

from lnpu_torch.counts.lane_configs import LONGEST
from lnpu_torch.ops import vectors
from lnpu_torch.ops.lanes import cpu_loops as lane_loops
from lnpu_torch.ops.numba_jit import compiled
from lnpu_torch.ops.pair_counts import cpu_loops as count_loops
from lnpu_torch.ops.quantize import cpu_loops as loops
from lnpu_torch.ops.quantize import cpu_threshold_loops as threshold_loops
from lnpu_torch.ops.regions import bounds, in_parallel


@compiled
def _shares(team, count):
    return max(1, min(team[1], count))


@compiled
def _cut(array, first, stop):
    return array if array is None else array[first:stop]  # to return None as such would make an optional array


@compiled
def _blocks(array, size, first, stop):
    return array[first * size : stop * size]


@compiled
def quantize(team, x, single, half, position, samples, runs, profiling, share, sizes, last, turned, parameters):
    """`ops.round_and_count` of rows [channels, positions], or [positions, channels] if `last`.

    `single`, `half`, `samples`, `runs` may be None. `position` [2, blocks, size] gets the sums over `share` rows each.
    `profiling`: a team, and the lane profile that runs are added to; or None.
    `turned`: write rows as [positions, channels]. It and `last` are True or None, so that but one loop is compiled.
    """
    rows, _, positions = sizes
    counts = np.zeros((_shares(team, rows), *position.shape), np.int32)
    arguments = (x, single, half, counts, samples, runs, share, sizes, parameters)
    if last is None:
        in_parallel(team, len(counts), loops.quantize, (*arguments, turned))
    else:
        in_parallel(team, len(counts), loops.quantize_last, arguments)
    in_parallel(team, 2 * position.shape[1], _sum_counts, (counts, position, positions, last))
    if profiling is not None:
        profile(profiling[0], runs, profiling[1])


@compiled
def read(team, x, single, half, position, samples, runs, profiling, share, sizes, last, turned, parameters, choosing):
    """`quantize`, and what `choose_threshold` returns for the same tensor (by its arguments `choosing`)."""
    chosen = choose_threshold(team, x, *choosing)
    quantize(team, x, single, half, position, samples, runs, profiling, share, sizes, last, turned, parameters)
    return chosen


@compiled
def _sum_counts(number, shares, counts, position, positions, last):
    """Sum one block's counts of one group over shares, and turn them to [channels, positions]."""
    group, block = number % 2, number // 2
    total, target = counts[0, group, block], position[group, block]
    for i in range(1, len(counts)):
        loops.add(total, 0, counts[i, group, block], len(total))
    if last is None:
        target[:] = total
    else:
        vectors.turn(total, target, 0, positions, len(total) // positions)


@compiled
def quantize_flat(team, x, values, groups, parameters):
    """`loops.quantize_flat`."""
    totals = np.zeros((_shares(team, len(x)), 2), np.int64)
    in_parallel(team, len(totals), _quantize_flat, (x, values, groups, parameters, totals))
    return totals[:, 0].sum(), totals[:, 1].sum()


@compiled
def _quantize_flat(share, shares, x, values, groups, parameters, totals):
    a, b = bounds(len(x), share, shares)
    totals[share] = loops.quantize_flat(x[a:b], values[a:b], _cut(groups, a, b), parameters)


@compiled
def round_half(team, x, out):
    """`loops.round_half`."""
    in_parallel(team, _shares(team, len(x)), _round_half, (x, out))


@compiled
def _round_half(share, shares, x, out):
    a, b = bounds(len(x), share, shares)
    loops.round_half(x[a:b], out[a:b])


@compiled
def turn_half(team, x, out, rounds, rows, columns):
    """`loops.turn_half`."""
    in_parallel(team, _shares(team, len(x) // (rows * columns)), _turn_half, (x, out, rounds, rows, columns))


@compiled
def _turn_half(share, shares, x, out, rounds, rows, columns):
    size = rows * columns
    a, b = bounds(len(x) // size, share, shares)
    loops.turn_half(_blocks(x, size, a, b), _blocks(out, size, a, b), rounds, rows, columns)


@compiled
def runs_of(team, bits, magnitude, runs, last):
    """`lane_loops.runs_of`, or `runs_of_last`: `last` is True or None."""
    parts = len(runs) * (1 if last is None else runs.shape[2])
    in_parallel(team, _shares(team, parts), _runs_of, (bits, magnitude, runs, parts, last))


@compiled
def _runs_of(share, shares, bits, magnitude, runs, parts, last):
    a, b = bounds(parts, share, shares)
    if last is None:
        lane_loops.runs_of(bits[a:b], magnitude, runs[a:b])
    else:
        lane_loops.runs_of_last(bits, magnitude, runs, a, b)


@compiled
def profile(team, runs, entries):
    """`lane_loops.profile`: whole samples for each thread, or parts of the only one."""
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
def add_weight_step(team, counter, position, weight, meets, strides, met, sizes):
    """`counting.add_weight_step`, of counts as `count_loops.add_channels` takes them."""
    sums = np.zeros((_shares(team, position.shape[1]), 6, 2), np.int64)
    in_parallel(team, len(sums), _add_channels, (position, weight, meets, strides, met, sizes, sums))
    total = sums.sum(0)
    count_loops.record(counter, total[:2], total[2], total[3], total[4], total[5], sizes)


@compiled
def _add_channels(share, shares, position, weight, meets, strides, met, sizes, sums):
    channels = bounds(position.shape[1], share, shares)
    count_loops.add_channels(position, weight, channels, meets, strides, met, sizes, sums[share])


@compiled
def add_grid_step(team, counter, big, small, big_samples, small_samples, meets, sizes, small_first):
    """`counting.add_grid_step`, of counts by position [2, C, D, H, W] and by sample [2, samples, D, H, W].

    `sizes`: slots, inside, other channels of big and of small, elements of the first operand and of the second.
    """
    both = np.zeros((_shares(team, big_samples.shape[1]), 2, 2), np.int64)
    alone = np.zeros((2, 2, 2), np.int64)  # of each grid, its elements and how many are met
    in_parallel(team, len(both) + 2, _add_grids, (big, small, big_samples, small_samples, meets, both, alone))
    first, second, pairs = alone[0, 1] * sizes[2], alone[1, 1] * sizes[3], both.sum(0)
    if small_first:
        count_loops.record(counter, pairs.T.copy(), second, first, alone[1, 0], alone[0, 0], sizes)
    else:
        count_loops.record(counter, pairs, first, second, alone[0, 0], alone[1, 0], sizes)


@compiled
def _add_grids(share, shares, big, small, big_samples, small_samples, meets, both, alone):
    """One grid alone, or the pairs of both in some of the samples."""
    if share == 0:
        count_loops.met_in_all(big, meets[0], meets[2], alone[0])
    elif share == 1:
        count_loops.met_in_all(small, meets[1], np.ones(3, np.int64), alone[1])
    else:
        samples = bounds(big_samples.shape[1], share - 2, shares - 2)
        count_loops.meetings(big_samples, small_samples, samples, *meets, both[share - 2])


@compiled
def choose_threshold(team, x, step, ends, turned, choice, fallback):
    """`reference.choose_threshold`: by `fp16_share`, or by `max_error` where that is negative."""
    counts, (share, bound, formats) = histogram(team, x, step, ends, turned), choice
    if not counts.any():
        return fallback
    if share >= 0:
        return threshold_loops.best_by_share(counts, share) + ends[0]
    return threshold_loops.best_by_error(counts, ends[0], bound, formats) + ends[0]


@compiled
def histogram(team, x, step, ends, turned):
    """`reference.histogram`, between a rule's smallest and largest T; `turned`: see `threshold_loops.histogram`."""
    count = (len(x) + step - 1) // step
    parts = np.zeros((_shares(team, count), ends[1] - ends[0] + 2), np.int64)
    in_parallel(team, len(parts), _histogram, (x, step, count, ends, turned, parts))
    return parts.sum(0)


@compiled
def _histogram(share, shares, x, step, count, ends, turned, parts):
    a, b = bounds(count, share, shares)
    parts[share] = threshold_loops.histogram(x, step, a, b, *ends, *turned)
