"""The compiled inner loops of `cpu`. Numba sees only arrays and numbers here; importing this compiles nothing yet.

Rounding to nearest even at bit m of a number with exponent e: adding and subtracting 2^(e + 23 - m) leaves just the
bits above, in float32's own rounding. With e held at the format's least exponent, the same gives subnormals.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int32, njit, types, uint8, uint16
from numba.extending import intrinsic

MAGNITUDE = np.int32(0x7FFFFFFF)
SIGN = np.int32(-0x80000000)
INFINITY = np.int32(0x7F800000)
FP8, WIDE = np.int32(1), np.int32(0x10000)
"""What an element of each group adds to a packed counter."""
LANES = 64
"""Elements whose sign bits are made together."""
BLOCK = 2**14
"""Elements that fit in one packed counter."""


def compiled(function: Any) -> Any:
    """Compile at the first call, without the interpreter's lock; keep the result on disk where that can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@intrinsic
def _bits(context: Any, x: Any) -> Any:
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
    boundary, low_mantissa, low_least, wide_mantissa, wide_least, beyond, low_max, wide_max = parameters
    magnitude = int32(bits & MAGNITUDE)
    small = magnitude < boundary
    mantissa = low_mantissa if small else wide_mantissa
    clamped = min(magnitude, beyond)  # else the anchor's binade would lie far above the number
    exponent = max(int32(clamped >> 23), low_least if small else wide_least)
    anchor = _real(int32((exponent + int32(23) - mantissa) << 23))
    q = (_real(clamped) + anchor) - anchor
    q = min(q, low_max) if small else q
    rounded = INFINITY if q > wide_max else _bits(q)
    rounded = magnitude if magnitude >= INFINITY else rounded
    group = FP8 if small else WIDE
    return _real(int32(rounded | (bits & SIGN))), int32(0) if rounded == 0 else group


@compiled
def quantize(x, single, half, counts, samples, first, share, steps, parameters):
    """Round rows of x, write them, and count their groups by position and by sample.

    `counts` [2, blocks, size] is added to, row r in block (first + r) // share; `samples` [rows, groups, positions]
    gets packed counts. `single`, `half` and `samples` may be None.
    """
    size = x.shape[1]
    packed, groups = np.zeros(size, np.int32), np.empty(size, np.int32)
    for row in range(x.shape[0]):
        for i in range(size):
            value, group = _rounded(_bits(x[row, i]), parameters)
            if single is not None:
                single[row, i] = value
            if half is not None:
                half[row, i] = _half(value)
            if samples is not None:
                groups[i] = group
            packed[i] = int32(packed[i] + group)
        if samples is not None:
            _sum_channels(groups, samples[row], steps)
        if (first + row + 1) % share == 0 or row == x.shape[0] - 1:
            _unpack(packed, counts[:, (first + row) // share])


@compiled
def quantize_flat(x, values, groups, parameters):
    """Round numbers in a row; returns how many are FP8, and how many wider. `groups` (0, 8, 16) may be None."""
    fp8, wide = 0, 0
    for start in range(0, len(x), BLOCK):
        source, target = x[start : start + BLOCK], values[start : start + BLOCK]
        marks = None if groups is None else groups[start : start + BLOCK]
        packed = int32(0)
        for i in range(len(source)):
            value, group = _rounded(_bits(source[i]), parameters)
            target[i] = value
            if marks is not None:
                marks[i] = ((group & int32(1)) << int32(3)) | (group >> int32(12))
            packed = int32(packed + group)
        fp8 += packed & 0xFFFF
        wide += packed >> 16
    return fp8, wide


@compiled
def _sum_channels(groups, sums, steps):
    """Add one sample's packed counts [channel, position], with these steps in memory, over each channel group."""
    channels = len(groups) // sums.shape[1] // sums.shape[0]
    for group in range(sums.shape[0]):
        if steps[0] == 1:
            for position in range(sums.shape[1]):
                start = position * steps[1] + group * channels
                total = int32(0)
                for i in range(start, start + channels):
                    total = int32(total + groups[i])
                sums[group, position] = total
        else:
            total_row = sums[group]
            for channel in range(group * channels, (group + 1) * channels):
                row = groups[channel * steps[0] : channel * steps[0] + sums.shape[1]]
                for position in range(len(row)):
                    total_row[position] = int32(total_row[position] + row[position])


@compiled
def _unpack(packed, counts):
    for i in range(len(packed)):
        counts[0, i] = int32(counts[0, i] + (packed[i] & int32(0xFFFF)))
        counts[1, i] = int32(counts[1, i] + (packed[i] >> 16))
        packed[i] = 0


@compiled
def round_half(x):
    """Round float32 numbers to binary16, in place."""
    for i in range(len(x)):
        x[i] = _single(_half(x[i]))


@compiled
def histogram(x, step, smallest, largest):
    """`reference.histogram` of every step-th element. Four bins in turn, so that no sum waits for the one before."""
    counts = np.zeros((4, largest - smallest + 1), np.int32)
    for i in range((len(x) + step - 1) // step):
        magnitude = int32(_bits(x[i * step]) & MAGNITUDE)
        quarter = min(max((magnitude >> 21) - 4 * 127, smallest), largest) - smallest
        counts[i & 3, quarter] += 0 < magnitude < INFINITY
    return counts.sum(0).astype(np.int64)


@compiled
def reached(position, meets, strides, sums):
    """Sum `position` [channels, D, H, W] over the window of each kernel offset: into `sums` [channels, R, S, T].

    `meets` [3, offsets, 2] holds each offset's first position and how many; `strides` the steps between them.
    One dimension at a time, the last one first, so that no element is read for every offset.
    """
    depth, height = position.shape[1:3]
    rows = np.empty((depth, height, sums.shape[3]), np.int64)
    planes = np.empty((depth, sums.shape[2], sums.shape[3]), np.int64)
    for channel in range(position.shape[0]):
        for d in range(depth):
            for h in range(height):
                row = position[channel, d, h]
                for t in range(sums.shape[3]):
                    rows[d, h, t] = _sum(row, meets[2, t, 0], strides[2], meets[2, t, 1])
            for s in range(sums.shape[2]):
                for t in range(sums.shape[3]):
                    planes[d, s, t] = _sum(rows[d, :, t], meets[1, s, 0], strides[1], meets[1, s, 1])
        for r in range(sums.shape[1]):
            for s in range(sums.shape[2]):
                for t in range(sums.shape[3]):
                    sums[channel, r, s, t] = _sum(planes[:, s, t], meets[0, r, 0], strides[0], meets[0, r, 1])


@compiled
def _sum(row, first, stride, count):
    total = 0
    for i in range(count):
        total += row[first + i * stride]
    return total


@compiled
def meetings(big, small, big_meets, small_meets, strides, both):
    """Pairs of non-zeros of two grids [samples, D, H, W] under all kernel offsets, added to `both` [2, 2].

    Both grids come as [2, ...], FP8 and wide. What a window holds of the big grid is summed up first, dimension by
    dimension: over depth and height into a row of the big grid, then along it.
    """
    columns = np.empty((2, big.shape[4]), np.int32)
    seen = np.empty((2, small.shape[4]), np.int32)
    for n in range(big.shape[1]):
        for p in range(small.shape[2]):
            for q in range(small.shape[3]):
                columns[:] = 0
                for r in range(big_meets.shape[1]):
                    i = p - small_meets[0, r, 0]
                    for s in range(big_meets.shape[1]):
                        j = q - small_meets[1, s, 0]
                        if 0 <= i < small_meets[0, r, 1] and 0 <= j < small_meets[1, s, 1]:
                            d, h = big_meets[0, r, 0] + i * strides[0], big_meets[1, s, 0] + j * strides[1]
                            for k in range(columns.shape[1]):
                                columns[0, k] += big[0, n, d, h, k]
                                columns[1, k] += big[1, n, d, h, k]
                seen[:] = 0
                for t in range(big_meets.shape[1]):
                    first, start, stride = small_meets[2, t, 0], big_meets[2, t, 0], strides[2]
                    for k in range(small_meets[2, t, 1]):
                        seen[0, first + k] += columns[0, start + k * stride]
                        seen[1, first + k] += columns[1, start + k * stride]
                for a in range(2):
                    for b in range(2):
                        total = 0
                        for k in range(seen.shape[1]):
                            total += np.int64(seen[a, k]) * small[b, n, p, q, k]
                        both[a, b] += total


@compiled
def dots(a, b):
    """Products of two rows each: [2, n] by [2, n] -> [2, 2]."""
    both = np.zeros((2, 2), np.int64)
    for i in range(2):
        for j in range(2):
            left, right = a[i], b[j]
            for k in range(len(left)):
                both[i, j] += left[k] * right[k]
    return both


@compiled
def relu(x, out, signs):
    """ReLU, and one bit for each element: whether its gradient passes. `out` may be x; NaN passes, as in torch.

    Bit b of byte j of a block belongs to its element LANES * b + j, so that whole vectors of bits are made at once.
    """
    for block in range(len(signs) // LANES):
        signs_ = signs[block * LANES : (block + 1) * LANES]
        signs_[:] = 0
        for bit in range(8):
            start = (8 * block + bit) * LANES
            source, target = x[start : start + LANES], out[start : start + LANES]
            for j in range(len(source)):
                value = source[j]
                passes = not value <= float32(0)
                target[j] = value if passes else float32(0)
                signs_[j] |= uint8(passes) << uint8(bit)


@compiled
def relu_backward(error, signs, out):
    """The gradient where `relu` set the bit, else 0."""
    for block in range(len(signs) // LANES):
        signs_ = signs[block * LANES : (block + 1) * LANES]
        for bit in range(8):
            start = (8 * block + bit) * LANES
            source, target = error[start : start + LANES], out[start : start + LANES]
            for j in range(len(source)):
                target[j] = source[j] if (signs_[j] >> bit) & 1 else float32(0)
