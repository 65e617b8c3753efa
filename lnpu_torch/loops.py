"""The compiled inner loops of `cpu`. Numba sees only arrays and numbers here; importing this compiles nothing yet.

Rounding to nearest even at bit m of a number with exponent e: adding and subtracting 2^(e + 23 - m) leaves just the
bits above, in float32's own rounding. With e held at the format's least exponent, the same gives subnormals.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int32, types, uint8, uint16, uint64
from numba.extending import intrinsic

from lnpu_torch.jit import compiled
from lnpu_torch.lane_family import RUN
from lnpu_torch.vectors import nonzeros, turn

MAGNITUDE = np.int32(0x7FFFFFFF)
SIGN = np.int32(-0x80000000)
INFINITY = np.int32(0x7F800000)
FP8, WIDE = np.int32(1), np.int32(0x10000)
"""What an element of each group adds to a packed counter."""
CHUNK = 256
"""Elements that are rounded before they are counted: few enough to lie in the nearest cache."""
BLOCK = 2**14
"""Elements that fit in one packed counter."""


@intrinsic
def bits_of(context: Any, x: Any) -> Any:
    """float32 -> its bits."""
    return int32(float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _real(context: Any, bits: Any) -> Any:
    """Bits -> float32."""
    return float32(int32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _half(context: Any, x: Any) -> Any:
    """float32 -> the bits of the nearest binary16."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return uint16(float32), generate


@intrinsic
def _single(context: Any, bits: Any) -> Any:
    """The bits of a binary16 -> float32."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return float32(types.uint16), generate


@compiled
def _rounded(bits, parameters):
    """One number's bits -> its rounded value, and what its group adds to a packed counter."""
    last, low_mantissa, low_least, wide_mantissa, wide_least, beyond, low_max, wide_max = parameters
    magnitude = int32(bits & MAGNITUDE)
    small = magnitude <= last
    mantissa = low_mantissa if small else wide_mantissa
    clamped = min(magnitude, beyond)  # else the anchor's binade would lie far above the number
    exponent = max(int32(clamped >> 23), low_least if small else wide_least)
    anchor = _real(int32((exponent + int32(23) - mantissa) << 23))
    q = (_real(clamped) + anchor) - anchor
    q = min(q, low_max) if small else q
    rounded = INFINITY if q > wide_max else bits_of(q)
    rounded = magnitude if magnitude >= INFINITY else rounded
    group = FP8 if small else WIDE
    return _real(int32(rounded | (bits & SIGN))), int32(0) if rounded == 0 else group


@compiled
def round_run(x, start, single, half, place, marks, count, parameters):
    """Round `count` numbers of x from `start` on into `single` and `half` (each may be None) from `place` on.

    `marks` gets what each adds to a packed counter. All arrays are one-dimensional, as in all loops over a part of
    them here: a slice costs as much as a dozen elements, and an unsigned index spares the question if it is negative.
    """
    for i in range(count):
        value, mark = _rounded(bits_of(x[uint64(start + i)]), parameters)
        if single is not None:
            single[uint64(place + i)] = value
        if half is not None:
            half[uint64(place + i)] = _half(value)
        marks[uint64(i)] = mark


@compiled
def add(sums, start, marks, count):
    """Add marks to sums from `start` on."""
    for i in range(count):
        sums[uint64(start + i)] = int32(sums[uint64(start + i)] + marks[uint64(i)])


@compiled
def quantize(x, single, half, row_single, row_half, counts, samples, runs, first, share, sizes, parameters):
    """Round rows [channels, positions] of x, write them, and count their groups by position, by sample and by run.

    `counts` [2, blocks, size] is added to, row r in block (first + r) // share; `samples` [2, rows, groups, positions]
    and `runs` (see `lanes.runs_of`) are written. `single`, `half`, `samples` and `runs` may be None. `sizes` are the
    rows' number and shape. Where there are `row_single` and `row_half`, of the size of a row, each row is rounded into
    those and then written as [positions, channels].
    """
    rows, channels, positions = sizes
    size, groups = channels * positions, 1 if samples is None else samples.shape[2]
    run = positions * max(1, CHUNK // positions)  # whole channels, so that runs can be summed up over channels
    packed, sums, marks = np.zeros(size, np.int32), np.zeros(run, np.int32), np.empty(run, np.int32)
    for row in range(rows):
        for group in range(groups):
            stop = (group + 1) * size // groups
            for start in range(group * size // groups, stop, run):
                count, place = min(run, stop - start), row * size + start
                if row_single is None and row_half is None:
                    round_run(x, place, single, half, place, marks, count, parameters)
                else:
                    round_run(x, place, row_single, row_half, start, marks, count, parameters)
                add(packed, start, marks, count)
                if samples is not None:
                    add(sums, 0, marks, count)
                if runs is not None:
                    _count_runs(marks, count, positions, runs[row], start // positions)
            if samples is not None:
                _fold(sums, samples[:, row, group])
        if row_single is not None:
            turn(row_single, single, row * size, channels, positions)
        if row_half is not None:
            turn(row_half, half, row * size, channels, positions)
        if (first + row + 1) % share == 0 or row == rows - 1:
            unpack(packed, counts[:, (first + row) // share])


@compiled
def quantize_last(x, single, half, counts, samples, runs, first, share, sizes, parameters):
    """`quantize` for rows [positions, channels]."""
    rows, channels, positions = sizes
    size, groups = channels * positions, 1 if samples is None else samples.shape[2]
    length, run = channels // groups, channels * max(1, CHUNK // channels)
    packed, marks, present = np.zeros(size, np.int32), np.empty(run, np.int32), np.zeros(channels, np.uint8)
    for row in range(rows):
        for start in range(0, size, run):
            count, place = min(run, size - start), row * size + start
            round_run(x, place, single, half, place, marks, count, parameters)
            add(packed, start, marks, count)
            if samples is not None:
                for i in range(count // length):
                    position, group = start // channels + i // groups, i % groups
                    total = _sum(marks, i * length, length)
                    samples[0, row, group, position] = total & int32(0xFFFF)
                    samples[1, row, group, position] = total >> 16
            if runs is not None:
                for position in range(start // channels, (start + count) // channels):
                    _add_present(present, marks, position * channels - start)
                    if position % RUN == RUN - 1 or position == positions - 1:
                        runs[row, :, position // RUN] = present
                        present[:] = 0
        if (first + row + 1) % share == 0 or row == rows - 1:
            unpack(packed, counts[:, (first + row) // share])


@compiled
def _count_runs(marks, count, positions, runs, channel):
    """Non-zeros of each run, which is a vector long, of marks [channels, positions], into `runs` from a channel on."""
    for start in range(0, count, positions):
        lengths = runs[channel + start // positions]
        for t in range(positions // RUN):
            lengths[t] = nonzeros(marks, start + t * RUN)
        if positions % RUN:
            lengths[positions // RUN] = _present(_sum(marks, start + positions - positions % RUN, positions % RUN))


@compiled
def _present(total):
    """Elements of both groups in a packed counter."""
    return (total & int32(0xFFFF)) + (total >> 16)


@compiled
def _add_present(present, marks, start):
    """Add to uint8 counts, from `start` on, what is not zero."""
    for i in range(len(present)):
        present[i] = uint8(present[i] + uint8(marks[uint64(start + i)] != 0))


@compiled
def _sum(marks, start, count):
    total = int32(0)
    for i in range(count):
        total = int32(total + marks[uint64(start + i)])
    return total


@compiled
def _fold(sums, sample):
    """Sum packed counts [channels, positions] over channels, into [2, positions]; they are zero afterwards."""
    positions = sample.shape[1]
    for start in range(positions, len(sums), positions):
        for i in range(positions):
            sums[i] = int32(sums[i] + sums[start + i])
            sums[start + i] = 0
    sample[:] = 0
    unpack(sums[:positions], sample)


@compiled
def unpack(packed, counts):
    """Add packed counts to FP8 and wide ones [2, ...]; the packed ones are zero afterwards."""
    fp8, wide = counts[0], counts[1]
    for i in range(len(packed)):
        fp8[i] = int32(fp8[i] + (packed[i] & int32(0xFFFF)))
        wide[i] = int32(wide[i] + (packed[i] >> 16))
        packed[i] = 0


@compiled
def quantize_flat(x, values, groups, parameters):
    """Round numbers in a row; returns how many are FP8, and how many wider. `groups` (0, 8, 16) may be None."""
    fp8, wide = 0, 0
    for start in range(0, len(x), BLOCK):
        source, target = x[start : start + BLOCK], values[start : start + BLOCK]
        marks = None if groups is None else groups[start : start + BLOCK]
        packed = int32(0)
        for i in range(len(source)):
            value, group = _rounded(bits_of(source[i]), parameters)
            target[i] = value
            if marks is not None:
                marks[i] = ((group & int32(1)) << int32(3)) | (group >> int32(12))
            packed = int32(packed + group)
        fp8 += packed & 0xFFFF
        wide += packed >> 16
    return fp8, wide


@compiled
def round_half(x, out):
    """Round float32 numbers to binary16, into `out` (which may be x)."""
    for i in range(len(x)):
        out[i] = _single(_half(x[i]))


@compiled
def turn_half(x, rounds, rows, columns):
    """Matrices [rows, columns] in a row -> [columns, rows], each where it lies, rounded to binary16 if asked."""
    matrix = np.empty(rows * columns, np.float32)
    for start in range(0, len(x), len(matrix)):
        if rounds:
            for i in range(len(matrix)):
                matrix[i] = _single(_half(x[uint64(start + i)]))
        else:
            for i in range(len(matrix)):
                matrix[i] = x[uint64(start + i)]
        turn(matrix, x, start, rows, columns)
