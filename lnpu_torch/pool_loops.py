"""Compiled loops of max pooling, which keep a byte per result: which element of its window it is, counted row-major.

Planes [height, width] lie in a row, and so do their results [rows, columns].
"""

from __future__ import annotations

import numpy as np
from numba import float32, uint8, uint64

from lnpu_torch.jit import compiled, inlined

UNSEEN = 255
"""The code of a result before its window's first element."""


@inlined
def _larger(value, largest):
    """Whether an element is taken after another: NaN always is, as in torch."""
    return (value > largest) | (value != value)


@compiled
def max_pool_of_four(x, out, codes, columns):
    """`max_pool` where windows of 2 x 2, side by side, fill the planes."""
    for start in range(0, len(out), columns):
        for i in range(columns):
            place = 4 * start + 2 * i
            largest, code = x[uint64(place)], uint8(0)
            for number in range(1, 4):
                value = x[uint64(place + number // 2 * 2 * columns + number % 2)]
                larger = _larger(value, largest)
                largest, code = (value, uint8(number)) if larger else (largest, code)
            out[uint64(start + i)], codes[uint64(start + i)] = largest, code


@compiled
def max_pool(x, out, codes, planes, results, window, stride, padding):
    """The largest element of each window, and its code. `planes` and `results` are the sizes of one of them."""
    (height, width), (rows, columns) = planes, results
    out[:], codes[:] = -np.inf, UNSEEN
    for number in range(len(out) // columns):
        plane, row = divmod(number, rows)
        top = row * stride[0] - padding[0]
        for i in range(max(0, -top), min(window[0], height - top)):
            for j in range(window[1]):
                before = padding[1] - j
                first, stop = max(0, (before + stride[1] - 1) // stride[1]), (width - 1 + before) // stride[1] + 1
                place = (plane * height + top + i) * width + first * stride[1] - before
                start, count = number * columns + first, min(columns, stop) - first
                if stride[1] == 2:  # a constant, for which there are vectors
                    _take(x, place, 2, out, codes, start, count, uint8(i * window[1] + j))
                else:
                    _take(x, place, stride[1], out, codes, start, count, uint8(i * window[1] + j))


@inlined
def _take(x, place, step, out, codes, start, count, code):
    """One element of each of some windows in a row, if it is the largest so far."""
    for i in range(count):
        value = x[uint64(place + i * step)]
        largest, known = out[uint64(start + i)], codes[uint64(start + i)]
        larger = _larger(value, largest) | (known == uint8(UNSEEN))
        out[uint64(start + i)] = value if larger else largest
        codes[uint64(start + i)] = code if larger else known


@compiled
def max_pool_backward(error, codes, grad, planes, results, window, stride, padding):
    """Each error where its code says; errors for the same element are added in order."""
    (height, width), (rows, columns) = planes, results
    offsets = np.empty(window[0] * window[1], np.int64)
    for code in range(len(offsets)):
        offsets[code] = (code // window[1] - padding[0]) * width + code % window[1] - padding[1]
    for plane in range(len(error) // (rows * columns)):
        grad[plane * height * width : (plane + 1) * height * width] = float32(0)
        for row in range(rows):
            place, start = (plane * height + row * stride[0]) * width, (plane * rows + row) * columns
            for i in range(columns):
                at = place + i * stride[1] + offsets[codes[uint64(start + i)]]
                grad[uint64(at)] += error[uint64(start + i)]
