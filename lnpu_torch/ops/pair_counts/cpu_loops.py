"""The compiled sums of `cpu`: what kernel offsets meet, and pairs of non-zeros. Integers only.

`meets` [3, offsets, 2] holds, for each dimension and kernel offset, the first position that is met and how many.
Counts come as [2, ...], FP8 and wide; grids have three dimensions.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, uint8, uint64

from lnpu_torch.counts.lane_configs import LANE_CONFIGS
from lnpu_torch.ops.arrays import array_at
from lnpu_torch.ops.numba_jit import compiled, inlined
from lnpu_torch.ops.pair_counts.reference import CALL, MIXED, ROWS, SIZES, WIDTH
from lnpu_torch.ops.parallel import bounds, in_parallel, shares_of, sum_shares

ENTRIES = len(LANE_CONFIGS)


@compiled
def _add_channels(share, shares, position, weight, meets, strides, met, sizes, partial):
    """Sums of `reference.weight_step` over some channels of position [2, C, D, H, W] and weight [2, C, R, S, T].

    `met` [R, S, T] tells how many positions each offset meets; `sizes`: macs, inside, other channels, batch, elements.
    `partial[share]` [6, 2] is added to: pairs of non-zeros [2, 2], pairs in which the first is one, and the second, and
    elements of the grid and of the weight.
    """
    others, batch, sums, channels = sizes[2], sizes[3], partial[share], bounds(position.shape[1], share, shares)
    both, first, second = sums[:2], sums[2], sums[3]
    reached, row = np.empty((2, *met.shape), np.int64), np.empty(position.shape[4], np.int64)
    counts, size = position.ravel(), position.shape[2] * position.shape[3] * position.shape[4]
    for a in range(2):
        sums[4, a] += _total(position[a], channels)
        sums[5, a] += _total(weight[a], channels)
    for channel in range(channels[0], channels[1]):
        for a in range(2):
            start = (a * position.shape[1] + channel) * size
            _reached(counts, start, position.shape[3], meets, strides, row, reached[a])
        for b in range(2):
            for r in range(met.shape[0]):
                for s in range(met.shape[1]):
                    for t in range(met.shape[2]):
                        count = np.int64(weight[b, channel, r, s, t])
                        second[b] += count * met[r, s, t] * batch
                        first[b] += reached[b, r, s, t] * others
                        both[0, b] += reached[0, r, s, t] * count
                        both[1, b] += reached[1, r, s, t] * count


@compiled
def _record(counter, both, first, second, firsts, seconds, sizes):
    """Add a step: calls, macs, padding, not_run, the table of pairs, and elements of both operands.

    `sizes`: macs, inside, two more, elements of the first operand and of the second.
    """
    macs, inside = sizes[0], sizes[1]
    counter[0] += 1
    counter[1] += macs
    counter[2] += macs - inside
    zeros = inside
    for i in range(2):
        lone = first[i] - both[i, 0] - both[i, 1]
        counter[4 + 3 * (i + 1)] += lone
        other = second[i] - both[0, i] - both[1, i]
        counter[4 + i + 1] += other
        zeros -= first[i] + other
        for j in range(2):
            counter[4 + 3 * (i + 1) + j + 1] += both[i, j]
        counter[14 + i] += firsts[i]
        counter[17 + i] += seconds[i]
    counter[4] += zeros
    counter[13] += sizes[4] - firsts[0] - firsts[1]
    counter[16] += sizes[5] - seconds[0] - seconds[1]


@inlined
def _total(counts, channels):
    """The sum of a range of channels."""
    part, total = counts[channels[0] : channels[1]].ravel(), np.int64(0)
    for i in range(len(part)):
        total += part[i]
    return total


@compiled
def _grid_totals(position, meets, strides, totals):
    """Elements of each group of position [2, C, D, H, W], and how many of them the offsets meet, into totals [2, 2]."""
    kernel = (_offsets(meets[0]), _offsets(meets[1]), _offsets(meets[2]))
    sums, row = np.empty(kernel, np.int64), np.empty(position.shape[4], np.int64)
    plane = np.empty(position.shape[2:], np.int64)
    for a in range(2):
        _sum_channels(position[a].ravel(), plane.ravel())
        _reached(plane.ravel(), 0, plane.shape[1], meets, strides, row, sums)
        for count in plane.flat:
            totals[0, a] += count
        for count in sums.flat:
            totals[1, a] += count


@inlined
def _sum_channels(counts, plane):
    """Sum counts [channels, positions] in a row over channels, into as many as there are positions."""
    plane[:] = 0
    for start in range(0, len(counts), len(plane)):
        for i in range(len(plane)):
            plane[uint64(i)] += counts[uint64(start + i)]


@inlined
def _offsets(meets):
    """Kernel offsets along one dimension; those beyond are marked with a negative first position."""
    count = 0
    for i in range(len(meets)):
        count += meets[i, 0] >= 0
    return count


@compiled
def _reached(counts, start, height, meets, strides, row, sums):
    """Sum the channel [D, H, W] from `start` on over each kernel offset's window, into `sums` [R, S, T].

    `row`, as long as one of the channel's, is for use here.
    """
    for r in range(sums.shape[0]):
        for s in range(sums.shape[1]):
            row[:] = 0
            for i in range(meets[0, r, 1]):
                plane = (meets[0, r, 0] + i * strides[0]) * height + meets[1, s, 0]
                for j in range(meets[1, s, 1]):
                    _add(row, 0, counts, start + (plane + j * strides[1]) * len(row), len(row), 1)
            for t in range(sums.shape[2]):
                total, first = 0, meets[2, t, 0]
                for k in range(meets[2, t, 1]):
                    total += row[uint64(first + k * strides[2])]
                sums[r, s, t] = total


@compiled
def _add_samples(share, shares, conv_input, conv_output, meets, partial):
    """Pairs of non-zeros of two grids [2, N, D, H, W] in some samples under all offsets, added to `partial[share]`.

    What each output position's window holds of the input is summed up first: over depth and height into rows as long
    as the input's, then along them.
    """
    (input_windows, output_windows, strides, _), both = meets, partial[share]
    samples = bounds(conv_input.shape[1], share, shares)
    offsets = (_offsets(input_windows[0]), _offsets(input_windows[1]), _offsets(input_windows[2]))
    depth, height, width = conv_output.shape[2:]
    length, plane = conv_input.shape[4], conv_input.shape[3] * conv_input.shape[4]
    inputs, outputs, size = conv_input.ravel(), conv_output.ravel(), depth * height * width
    rows, seen = np.empty(depth * height * length, np.int32), np.empty((2, size), np.int32)
    for n in range(samples[0], samples[1]):
        for a in range(2):
            rows[:] = 0
            seen[a] = 0
            for r in range(offsets[0]):
                for i in range(output_windows[0, r, 1]):
                    source = (
                        (a * conv_input.shape[1] + n) * conv_input.shape[2] + input_windows[0, r, 0] + i * strides[0]
                    )
                    target = (output_windows[0, r, 0] + i) * height * length
                    for s in range(offsets[1]):
                        first = target + output_windows[1, s, 0] * length
                        start = source * plane + input_windows[1, s, 0] * length
                        if strides[1] == 1:
                            _add(rows, first, inputs, start, output_windows[1, s, 1] * length, 1)
                        else:
                            for j in range(output_windows[1, s, 1]):
                                _add(rows, first + j * length, inputs, start + j * strides[1] * length, length, 1)
            for t in range(offsets[2]):
                first, start, count = output_windows[2, t, 0], input_windows[2, t, 0], output_windows[2, t, 1]
                for j in range(depth * height):
                    _add(seen[a], j * width + first, rows, j * length + start, count, strides[2])
        for b in range(2):
            start = (b * conv_output.shape[1] + n) * size
            for a in range(2):
                both[a, b] += _products(seen[a], outputs, start)


@inlined
def _add(sums, place, terms, start, count, stride):
    """Add so many terms from `start` on, a stride apart, to sums from `place` on."""
    if stride == 1:
        for i in range(count):
            sums[uint64(place + i)] += terms[uint64(start + i)]
    else:
        for i in range(count):
            sums[uint64(place + i)] += terms[uint64(start + i * stride)]


@inlined
def _products(seen, counts, start):
    """The sum of the products of counts with as many others from `start` on."""
    total = np.int64(0)
    for i in range(len(seen)):
        total += np.int64(seen[i]) * np.int64(counts[uint64(start + i)])
    return total


@compiled
def add_weight_step(team, counting, position, weight, shape, profile, meets, strides, met, sizes):
    """Count one of a layer's steps: `pair_counts.reference.weight_step`, and a lane profile.

    Args:
        counting: addresses of the step's counters, of the sizes of call that their rows stand for, of its lane
            profiles; elements of both operands and of the result.
        position, weight: int32 [2, *shape] and [2, channels, *kernel], of which `shape` has the channels first.
        meets, strides, met, sizes: see `_add_channels`, with both operands' elements at the end of sizes.
    """
    counters, known, lanes, call = counting
    grid = array_at(position, (2, shape[0], shape[1], shape[2], shape[3]), int32)
    kernel = array_at(weight, (2, shape[0], met.shape[0], met.shape[1], met.shape[2]), int32)
    sums = np.zeros((shares_of(team, shape[0]), 6, 2), np.int64)
    in_parallel(team, len(sums), _add_channels, (grid, kernel, meets, strides, met, sizes, sums))
    total = sum_shares(sums)
    _record(_row(counters, known, call), total[:2], total[2], total[3], total[4], total[5], sizes)
    _add_profile(lanes, profile)


@compiled
def add_grid_step(team, counting, conv_input, conv_output, meets, sizes, output_first):
    """Count the step that multiplies two grids: `pair_counts.reference.grid_step`, and both lane profiles.

    Args:
        counting: as for `add_weight_step`.
        conv_input, conv_output: address of counts by position int32 [2, *shape], shape, address of counts by sample
            [2, samples, *grid], their number, whether they are uint8 instead of int32, address of a lane profile.
        meets: the windows of both grids as above, and the strides.
        sizes: macs, inside, other channels of input and of output, elements of the first operand and of the second.
    """
    counters, known, lanes, call = counting
    shape = conv_input[1]
    grids = array_at(conv_input[0], (2, shape[0], shape[1], shape[2], shape[3]), int32)
    both = np.zeros((shares_of(team, conv_input[3]), 2, 2), np.int64)
    alone = np.zeros((2, 2, 2), np.int64)  # of each grid, its elements and how many are met
    other = conv_output[1]
    others = array_at(conv_output[0], (2, other[0], other[1], other[2], other[3]), int32)
    _grid_totals(grids, meets[0], meets[2], alone[0])
    _grid_totals(others, meets[1], meets[3], alone[1])
    first, second = (2, conv_input[3], shape[1], shape[2], shape[3]), (2, conv_input[3], other[1], other[2], other[3])
    if conv_input[4]:
        samples = (array_at(conv_input[2], first, uint8), array_at(conv_output[2], second, uint8))
        in_parallel(team, len(both), _add_samples, (*samples, meets, both))
    else:
        samples = (array_at(conv_input[2], first, int32), array_at(conv_output[2], second, int32))
        in_parallel(team, len(both), _add_samples, (*samples, meets, both))
    first, second = (1, 0) if output_first else (0, 1)
    met, pairs, found = np.empty((2, 2), np.int64), np.empty((2, 2), np.int64), sum_shares(both)
    for b in range(2):
        met[0, b], met[1, b] = alone[0, 1, b] * sizes[2], alone[1, 1, b] * sizes[3]
        for a in range(2):
            pairs[a, b] = found[b, a] if output_first else found[a, b]
    _record(_row(counters, known, call), pairs, met[first], met[second], alone[first, 0], alone[second, 0], sizes)
    _add_profile(lanes, conv_output[5] if output_first else conv_input[5])
    _add_profile(lanes + ENTRIES * 8, conv_input[5] if output_first else conv_output[5])


@compiled
def _row(counters, known, call):
    """A step's counters for a call of these sizes: `pair_counts.reference.row_of`, int64 [WIDTH]."""
    rows, sizes = array_at(counters, (ROWS, WIDTH), int64), array_at(known, (SIZES + 1, CALL), int64)
    for row in range(SIZES):
        free, same = True, True
        for i in range(CALL):
            free &= sizes[row, i] == 0
            same &= sizes[row, i] == call[i]
        if free or same:
            for i in range(CALL):
                sizes[row, i] = call[i]
            return rows[row]
    for i in range(CALL):
        sizes[SIZES, i] += call[i]
    return rows[MIXED]


@inlined
def _add_profile(target, profile):
    """Add a lane profile to another; both are addresses, the second 0 if there is none."""
    if profile:
        entries = array_at(target, (ENTRIES,), int64)
        added = array_at(profile, (ENTRIES,), int64)
        for i in range(ENTRIES):
            entries[i] += added[i]
