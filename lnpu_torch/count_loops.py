"""The compiled sums of `cpu_counting`: what kernel offsets meet, and pairs of non-zeros. Integers only.

`meets` [3, offsets, 2] holds, for each dimension and kernel offset, the first position that is met and how many.
Counts come as [2, ...], FP8 and wide; grids have three dimensions.
"""

from __future__ import annotations

import numpy as np
from numba import int32, uint64

from lnpu_torch.jit import compiled


@compiled
def add_channels(position, weight, channels, meets, strides, met, sizes, sums):
    """Sums of `counting.weight_step` over a range of channels, of position [2, C, D, H, W] and weight [2, C, R, S, T].

    `met` [R, S, T] tells how many positions each offset meets; `sizes`: slots, inside, other channels, batch, elements.
    `sums` [6, 2] is added to: pairs of non-zeros [2, 2], pairs in which the first is one, and the second, and elements
    of the grid and of the weight.
    """
    others, batch = sizes[2], sizes[3]
    both, first, second = sums[:2], sums[2], sums[3]
    reached = np.empty((2, *met.shape), np.int64)
    rows = np.empty((*met.shape[:2], position.shape[4]), np.int64)
    for a in range(2):
        sums[4, a] += _total(position[a], channels)
        sums[5, a] += _total(weight[a], channels)
    for channel in range(channels[0], channels[1]):
        for a in range(2):
            _reached(position[a, channel], meets, strides, rows, reached[a])
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
def record(counter, both, first, second, firsts, seconds, sizes):
    """Add a step: calls, slots, padding, not_run, the table of pairs, and elements of both operands.

    `sizes`: slots, inside, two more, elements of the first operand and of the second.
    """
    slots, inside = sizes[0], sizes[1]
    counter[0] += 1
    counter[1] += slots
    counter[2] += slots - inside
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


@compiled
def _total(counts, channels):
    """The sum of a range of channels."""
    part, total = counts[channels[0] : channels[1]].ravel(), np.int64(0)
    for i in range(len(part)):
        total += part[i]
    return total


@compiled
def met_in_all(position, meets, strides, totals):
    """Elements of each group of position [2, C, D, H, W], and how many of them the offsets meet, into totals [2, 2]."""
    kernel = (_offsets(meets[0]), _offsets(meets[1]), _offsets(meets[2]))
    sums = np.empty(kernel, np.int64)
    rows = np.empty((kernel[0], kernel[1], position.shape[4]), np.int64)
    plane = np.empty(position.shape[2:], np.int64)
    for a in range(2):
        _sum_channels(position[a].ravel(), plane.ravel())
        _reached(plane, meets, strides, rows, sums)
        totals[0, a], totals[1, a] = plane.sum(), sums.sum()


@compiled
def _sum_channels(counts, plane):
    """Sum counts [channels, positions] in a row over channels, into as many as there are positions."""
    plane[:] = 0
    for start in range(0, len(counts), len(plane)):
        for i in range(len(plane)):
            plane[uint64(i)] += counts[uint64(start + i)]


@compiled
def _offsets(meets):
    """Kernel offsets along one dimension; those beyond are marked with a negative first position."""
    count = 0
    for i in range(len(meets)):
        count += meets[i, 0] >= 0
    return count


@compiled
def _reached(plane, meets, strides, rows, sums):
    """Sum a channel [D, H, W] over the window of each kernel offset, into `sums` [R, S, T]; `rows` is for use here."""
    rows[:] = 0
    for r in range(sums.shape[0]):
        for s in range(sums.shape[1]):
            row = rows[r, s]
            for i in range(meets[0, r, 1]):
                for j in range(meets[1, s, 1]):
                    source = plane[meets[0, r, 0] + i * strides[0], meets[1, s, 0] + j * strides[1]]
                    for k in range(len(row)):
                        row[k] += source[k]
            for t in range(sums.shape[2]):
                total, start = 0, meets[2, t, 0]
                for k in range(meets[2, t, 1]):
                    total += row[start + k * strides[2]]
                sums[r, s, t] = total


@compiled
def meetings(big, small, big_meets, small_meets, strides, both):
    """Pairs of non-zeros of two grids [2, samples, D, H, W] under all kernel offsets, added to `both` [2, 2].

    What each small position's window holds of the big grid is summed up first: over depth and height into rows as long
    as the big grid's, then along them.
    """
    shape = small.shape[2:]
    rows = np.empty((2, shape[0], shape[1], big.shape[4]), np.int32)
    seen = np.empty((2, *shape), np.int32)
    for n in range(big.shape[1]):
        rows[:] = 0
        seen[:] = 0
        for a in range(2):
            for r in range(_offsets(big_meets[0])):
                for i in range(small_meets[0, r, 1]):
                    p, d = small_meets[0, r, 0] + i, big_meets[0, r, 0] + i * strides[0]
                    for s in range(_offsets(big_meets[1])):
                        _add_rows(rows[a, p], big[a, n, d], small_meets[1, s], big_meets[1, s, 0], strides[1])
            for t in range(_offsets(big_meets[2])):
                _add_columns(seen[a], rows[a], small_meets[2, t], big_meets[2, t, 0], strides[2])
        for b in range(2):
            _multiply(seen[0], seen[1], small[b, n], both[:, b])


@compiled
def _add_rows(rows, source, met, start, stride):
    """Add rows from `start` on, a stride apart, to those that are met."""
    if stride == 1:
        _add(rows[met[0] : met[0] + met[1]].ravel(), source[start : start + met[1]].ravel())
    else:
        for i in range(met[1]):
            _add(rows[met[0] + i], source[start + i * stride])


@compiled
def _add(sums, terms):
    for i in range(len(sums)):
        sums[i] = int32(sums[i] + terms[i])


@compiled
def _add_columns(seen, rows, met, start, stride):
    """Add columns from `start` on, a stride apart, to those that are met."""
    for p in range(seen.shape[0]):
        for q in range(seen.shape[1]):
            target, source = seen[p, q, met[0] : met[0] + met[1]], rows[p, q, start:]
            if stride == 1:
                _add(target, source)
            else:
                for k in range(len(target)):
                    target[k] = int32(target[k] + source[k * stride])


@compiled
def _multiply(first, second, small, both):
    """Add the products of two grids with a third to `both` [2]."""
    a, b, other = first.ravel(), second.ravel(), small.ravel()
    x, y = np.int64(0), np.int64(0)
    for k in range(len(other)):
        x += np.int64(a[k]) * np.int64(other[k])
        y += np.int64(b[k]) * np.int64(other[k])
    both[0] += x
    both[1] += y
