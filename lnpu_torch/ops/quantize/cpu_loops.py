"""The compiled loops of `cpu`. Numba sees only arrays and numbers here; importing this compiles nothing yet.

A row of a tensor is taken in chunks that stay in the nearest cache: one loop rounds a chunk, the others count what is
known of it. Each is so plain that LLVM makes vector code of it.

What an element adds to a counter is its mark. A packed counter has 16 bits: FP8 in the lower 8, wide in the upper ones;
it is unpacked before it could overflow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int32, uint8, uint16, uint64
from numba.extending import intrinsic

from lnpu_torch.counts.lane_configs import RUN
from lnpu_torch.ops.arrays import array_at, wanted
from lnpu_torch.ops.numba_jit import compiled, inlined
from lnpu_torch.ops.parallel import bounds, in_parallel, shares_of, sum_shares
from lnpu_torch.ops.quantize.cpu_threshold_loops import INFINITY, MAGNITUDE, bits_of

FP8, WIDE = 1, 0x100
"""The marks of both classes; a zero has none."""
MOST = 255
"""The most elements that a packed counter can hold."""
SIGN = -0x80000000
"""The bit of a float32."""
CHUNK = 1024
"""Elements that are rounded before what is known of them is summed up: few enough to lie in the nearest cache."""


@intrinsic
def _float_of(context: Any, bits: Any) -> Any:
    """The bits of a float32 -> the float32."""
    return float32(int32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _half_bits(context: Any, x: Any) -> Any:
    """float32 -> the bits of the nearest binary16."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return uint16(float32), generate


@intrinsic
def _in_half(context: Any, x: Any) -> Any:
    """float32 -> the nearest binary16, as float32."""
    return float32(float32), lambda _, builder, __, args: builder.fpext(
        builder.fptrunc(args[0], ir.HalfType()), ir.FloatType()
    )


@inlined
def _rounded(x, parameters):
    """A number rounded by `cpu`'s parameters of a rule, and its mark.

    Rounding to nearest even at bit m of a number with exponent e: adding and subtracting 2^(e + 23 - m), the anchor,
    leaves just the bits above, in float32's own rounding. With e held at the format's least exponent, the same gives
    subnormals.
    """
    last, everything, low_least, low_step, wide_least, wide_step, beyond, low_max, wide_max = parameters
    bits = bits_of(x)
    magnitude = int32(bits & int32(MAGNITUDE))
    small = magnitude <= last  # in the FP8 group
    clamped = min(magnitude, beyond)  # else the anchor's binade would lie far above the number
    least = low_least if small else wide_least
    step = low_step if small else wide_step
    anchor = _float_of(int32(max(int32(clamped & int32(INFINITY)), least) + step))
    q = (_float_of(clamped) + anchor) - anchor
    if small:
        q = q if q < low_max else low_max
    result = bits_of(q) if q <= wide_max else max(magnitude, int32(INFINITY))
    value = _float_of(int32(result | (bits & int32(SIGN))))
    mark = uint16(FP8) if small | everything else uint16(WIDE)
    return value, mark if result != 0 else uint16(0)


@inlined
def _round(x, values, marks, parameters):
    """Round a chunk."""
    for i in range(len(x)):
        values[i], marks[i] = _rounded(x[i], parameters)


@inlined
def _to_half(x, halves):
    """Write float32 numbers as the bits of binary16."""
    for i in range(len(x)):
        halves[i] = _half_bits(x[i])


@inlined
def _add(sums, terms):
    """Add terms to the first of the sums."""
    for i in range(len(terms)):
        sums[i] += terms[i]


@inlined
def _unpack(packed, fp8, wide):
    """Add packed counts to FP8 and wide ones; the packed ones are zero afterwards."""
    for i in range(len(packed)):
        fp8[i] += int32(packed[i] & uint16(0xFF))
        wide[i] += int32(packed[i] >> uint16(8))
    packed[:] = 0


@inlined
def _fold(packed, both, fp8, wide):
    """Sum packed counts [channels, positions] over a power of two of channels; the packed ones are zero afterwards."""
    for i in range(len(packed)):
        both[i] = int32(packed[i] & uint16(0xFF)) + (int32(packed[i] >> uint16(8)) << int32(16))
    packed[:] = 0
    count = len(packed)
    while count > len(fp8):
        count //= 2
        _add(both, both[count : 2 * count])
    for i in range(len(fp8)):
        fp8[i] += both[i] & int32(0xFFFF)
        wide[i] += both[i] >> int32(16)


@inlined
def _count_runs(marks, positions, runs):
    """Non-zeros of each run of whole channels [channels, positions], in a row, into `runs`."""
    if positions % RUN == 0:
        for t in range(len(marks) // RUN):
            count = 0
            for i in range(RUN):
                count += marks[uint64(t * RUN + i)] != 0
            runs[uint64(t)] = count
        return
    start = 0
    for place in range(len(marks) // positions * ((positions + RUN - 1) // RUN)):
        count, stop = 0, start + min(RUN, positions - start % positions)
        while start < stop:
            count += marks[uint64(start)] != 0
            start += 1
        runs[uint64(place)] = count


@compiled
def _quantize_rows(part, parts, x, single, half, counts, few, many, runs, share, sizes, parameters):
    """Round a part of the rows [channels, positions] of x, write it, and count its classes by position, sample and run.

    `counts` [parts, 2, blocks, size] is added to, row r in block r // share. Counts over channels go to `few` or to
    `many` [2, rows, groups * positions], non-zeros of each run to `runs` [rows, channels, times]. Each array but x and
    counts may be empty. `sizes`: rows, channels, positions, groups.
    """
    rows, channels, positions, groups = sizes
    size, sampled = channels * positions, few.shape[1] + many.shape[1] > 0
    group = size // groups
    run = positions * _power_of_two(min(CHUNK, group) // positions)  # whole channels, so that sums can be folded
    packed, sums = np.zeros(size, np.uint16), np.zeros(run, np.uint16)
    values, marks, both = np.empty(run, np.float32), np.empty(run, np.uint16), np.empty(run, np.int32)
    over_channels = np.zeros((2, groups, positions), np.int32)
    added, summed = 0, 0
    begin_row, end_row = bounds(rows, part, parts)
    for row in range(begin_row, end_row):
        start = 0
        while start < size:
            stop = min(start + run, start - start % group + group)
            a, b = row * size + start, row * size + stop
            chunk, known = single[a:b] if len(single) else values[: b - a], marks[: b - a]
            _round(x[a:b], chunk, known, parameters)
            if len(half):
                _to_half(chunk, half[a:b])
            _add(packed[start:stop], known)
            if sampled:
                _add(sums, known)
                summed += 1
                if stop % group == 0 or summed == MOST:
                    _fold(sums, both, over_channels[0, start // group], over_channels[1, start // group])
                    summed = 0
            if len(runs):
                _count_runs(known, positions, runs[row].reshape(-1)[start // positions * runs.shape[2] :])
            start = stop
        if sampled:
            _keep(over_channels.reshape((2, groups * positions)), few, many, row)
        added += 1
        if added == MOST or (row + 1) % share == 0 or row == end_row - 1:
            _unpack(packed, counts[part, 0, row // share], counts[part, 1, row // share])
            added = 0


@compiled
def _quantize_rows_last(part, parts, x, single, half, counts, few, many, runs, share, sizes, parameters):
    """`_quantize_rows` for rows [positions, channels]; short rows are rounded several at once.

    Where there is one position, and `runs` are of one row, they go on from row to row.
    """
    rows, channels, positions, groups = sizes
    size, sampled = channels * positions, few.shape[1] + many.shape[1] > 0
    together = min(RUN, _power_of_two(CHUNK // channels))  # positions, a divisor of RUN
    run, length = channels * together, channels // groups
    at_once = max(1, CHUNK // size) if run >= size else 1
    rounded = max(run, at_once * size)
    packed, sums = np.zeros(size, np.uint16), np.zeros(run, np.uint16)
    values, marks = np.empty(rounded, np.float32), np.empty(rounded, np.uint16)
    over_channels = np.zeros((2, groups, positions), np.int32)
    added, joined = 0, len(runs) == 1 and positions == 1
    begin_row, end_row = bounds((rows + RUN - 1) // RUN if joined else rows, part, parts)
    if joined:
        begin_row, end_row = begin_row * RUN, min(end_row * RUN, rows)
    for row in range(begin_row, end_row):
        for start in range(0, size, run):
            stop, position, place = min(start + run, size), start // channels, 0
            if at_once > 1:
                place = (row - begin_row) % at_once * size
            if place == 0:
                a, b = row * size + start, row * size + stop if at_once == 1 else min(row + at_once, end_row) * size
                chunk = single[a:b] if len(single) else values[: b - a]
                _round(x[a:b], chunk, marks, parameters)
                if len(half):
                    _to_half(chunk, half[a:b])
            known = marks[place : place + stop - start]
            _add(packed[start:stop], known)
            if sampled:
                for p in range(len(known) // channels):
                    for g in range(groups):
                        first = p * channels + g * length
                        fp8, wide = _totals(known[first : first + length])
                        over_channels[0, g, position + p], over_channels[1, g, position + p] = fp8, wide
            if len(runs):
                _add(sums, known)
                if joined:
                    if (row + 1) % RUN == 0 or row == end_row - 1:
                        _fold_runs(sums, runs[0], row // RUN)
                elif (position + together) % RUN == 0 or stop == size:
                    _fold_runs(sums, runs[row], position // RUN)
        if sampled:
            _keep(over_channels.reshape((2, groups * positions)), few, many, row)
        added += 1
        if added == MOST or (row + 1) % share == 0 or row == end_row - 1:
            _unpack(packed, counts[part, 0, row // share], counts[part, 1, row // share])
            added = 0


@inlined
def _keep(counts, few, many, row):
    """Write a row's counts over channels [2, groups * positions] to what keeps them; they are zero afterwards."""
    for a in range(2):
        if few.shape[1]:
            for i in range(counts.shape[1]):
                few[a, row, i] = counts[a, i]
        else:
            for i in range(counts.shape[1]):
                many[a, row, i] = counts[a, i]
    counts[:] = 0


@inlined
def _totals(marks):
    """How many elements are FP8, and how many wider."""
    fp8, wide = int32(0), int32(0)
    for i in range(len(marks)):
        fp8 = int32(fp8 + int32(marks[i] & uint16(0xFF)))
        wide = int32(wide + int32(marks[i] >> uint16(8)))
    return fp8, wide


@inlined
def _fold_runs(packed, runs, t):
    """Packed counts [positions, channels] -> non-zeros of a run of each channel; packed ones are zero afterwards."""
    channels = len(runs)
    for start in range(channels, len(packed), channels):
        _add(packed, packed[start : start + channels])
    for c in range(channels):
        runs[uint64(c), uint64(t)] = uint8((packed[c] & uint16(0xFF)) + (packed[c] >> uint16(8)))
    packed[:] = 0


@inlined
def _put_classes(marks, groups):
    """The class of each element (0, 8, 16) by its mark."""
    for i in range(len(marks)):
        groups[i] = uint8(uint8(marks[i] << uint16(3)) | uint8(marks[i] >> uint16(4)))


@inlined
def _power_of_two(n):
    """The largest that is not above n; 1 if there is none."""
    power = 1
    while 2 * power <= n:
        power *= 2
    return power


@inlined
def _rounding(p):
    """A rule's parameters in the types of `_rounded`."""
    bits = (int32(p[2]), int32(p[3]), int32(p[4]), int32(p[5]), int32(p[6]))
    return (int32(p[0]), p[1] != 0, *bits, float32(p[7]), float32(p[8]))


@compiled
def quantize_operand(team, x, single, half, over_batch, over_channels, runs, sizes, parameters):
    """Round a tensor of rows [channels, positions] and count it.

    Args:
        team: as from `parallel.team`.
        x: address (see `ops.arrays`), of float32.
        single, half: the rounded values, float32 and the bits of binary16.
        over_batch: int32 [2, rows / share, channels, positions], sums over `share` rows each.
        over_channels: two addresses, of uint8 or of int32 [2, rows, groups, positions].
        runs: address and shape of the non-zeros of each run, uint8 [rows, channels, times]; [1, channels, times] where
            rows have one position, and runs go on from row to row.
        sizes: rows, channels, positions, groups, share, and whether rows are [positions, channels].
        parameters: what `_rounding` takes.
    """
    rows, channels, positions, groups, share, last = sizes
    last |= positions == 1
    size, blocks = rows * channels * positions, rows // share
    counts = np.zeros((shares_of(team, rows), 2, blocks, channels * positions), np.int32)
    arguments = (
        array_at(x, (size,), float32),
        array_at(single, (wanted(single, size),), float32),
        array_at(half, (wanted(half, size),), uint16),
        counts,
        array_at(over_channels[0], (2, wanted(over_channels[0], rows), groups * positions), uint8),
        array_at(over_channels[1], (2, wanted(over_channels[1], rows), groups * positions), int32),
        array_at(runs[0], (wanted(runs[0], runs[1][0]), channels, runs[1][2]), uint8),
        share,
        (rows, channels, positions, groups),
        _rounding(parameters),
    )
    if last:
        in_parallel(team, len(counts), _quantize_rows_last, arguments)
    else:
        in_parallel(team, len(counts), _quantize_rows, arguments)
    target = array_at(over_batch, (2, blocks, channels * positions), int32)
    in_parallel(team, 2 * blocks, _sum_counts, (counts, target, positions, last))


@compiled
def _sum_counts(number, shares, counts, position, positions, last):
    """Sum one block's counts of one group over shares, and turn them to [channels, positions]."""
    group, block = number % 2, number // 2
    total, target, channels = counts[0, group, block], position[group, block], position.shape[2] // positions
    for i in range(1, len(counts)):
        _add(total, counts[i, group, block])
    if last:
        for c in range(channels):
            for p in range(positions):
                target[uint64(c * positions + p)] = total[uint64(p * channels + c)]
    else:
        for i in range(len(target)):
            target[i] = total[i]


@compiled
def quantize_flat(team, x, values, groups, size, parameters):
    """Round so many numbers in a row; returns how many are FP8, and how many wider. `groups`: uint8 (0, 8, 16)."""
    counts = np.zeros((shares_of(team, size), 2), np.int64)
    marked = array_at(groups, (wanted(groups, size),), uint8)
    arrays = (array_at(x, (size,), float32), array_at(values, (size,), float32), marked)
    in_parallel(team, len(counts), _quantize_flat, (*arrays, _rounding(parameters), counts))
    whole = sum_shares(counts)
    return whole[0], whole[1]


@compiled
def _quantize_flat(share, shares, x, values, groups, parameters, counts):
    marks = np.empty(CHUNK, np.uint16)
    first, end = bounds(len(x), share, shares)
    for start in range(first, end, CHUNK):
        stop = min(start + CHUNK, end)
        known = marks[: stop - start]
        _round(x[start:stop], values[start:stop], known, parameters)
        fp8, wide = _totals(known)
        counts[share, 0] += fp8
        counts[share, 1] += wide
        if len(groups):
            _put_classes(known, groups[start:stop])


@compiled
def round_half(team, x, size):
    """Round so many float32 numbers to binary16, in place."""
    in_parallel(team, shares_of(team, size), _round_half, (array_at(x, (size,), float32),))


@compiled
def _round_half(share, shares, x):
    first, stop = bounds(len(x), share, shares)
    for i in range(first, stop):
        x[uint64(i)] = _in_half(x[uint64(i)])
