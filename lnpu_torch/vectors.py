"""Compiled loops over vectors of 16 elements: ReLU that keeps a bit per element, matrices turned over.

Numba vectorises plain loops by itself; vectors of bits and blocks of 16 by 16 are written as LLVM's own here.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import float32, int32, types, uint16, uint64
from numba.extending import intrinsic

from lnpu_torch.jit import compiled

LANES = 16
"""Elements in a vector."""

VECTOR = ir.VectorType(ir.FloatType(), LANES)
BITS = ir.VectorType(ir.IntType(1), LANES)
LOW, HIGH = (
    ir.Constant(ir.VectorType(ir.IntType(32), LANES), [lane for i in range(half, half + 8) for lane in (i, i + LANES)])
    for half in (0, 8)
)
"""Which lanes of two vectors their lower and upper halves, merged by turns, take."""


def _vector(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """Where the vector that begins at an element of a one-dimensional array lies."""
    data = context.make_array(kind)(context, builder, array).data
    vector = ir.VectorType(context.get_data_type(kind.dtype), LANES)
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())


@intrinsic
def _pass(context: Any, source: Any, start: Any, target: Any) -> Any:
    """One vector's ReLU from source to target; returns a bit for each element that passes, NaN among them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = builder.load(_vector(context, builder, signature.args[0], *args[:2]), align=4)
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        passes = builder.fcmp_unordered(">", x, zero)
        place = _vector(context, builder, signature.args[2], args[2], args[1])
        builder.store(builder.select(passes, x, zero), place, align=4)
        return builder.bitcast(passes, ir.IntType(LANES))

    return uint16(source, types.intp, target), generate


@intrinsic
def _keep(context: Any, source: Any, start: Any, target: Any, bits: Any) -> Any:
    """One vector's elements whose bits are set from source to target, zeros for the others."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = builder.load(_vector(context, builder, signature.args[0], *args[:2]), align=4)
        kept = builder.select(builder.bitcast(args[3], BITS), x, ir.Constant(VECTOR, [0.0] * LANES))
        builder.store(kept, _vector(context, builder, signature.args[2], args[2], args[1]), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, uint16), generate


@intrinsic
def nonzeros(context: Any, source: Any, start: Any) -> Any:
    """How many elements of one vector of integers are not zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = builder.load(
            _vector(context, builder, signature.args[0], *args), align=signature.args[0].dtype.bitwidth // 8
        )
        bits = builder.bitcast(builder.icmp_unsigned("!=", x, ir.Constant(x.type, None)), ir.IntType(LANES))
        return builder.zext(builder.ctpop(bits), ir.IntType(32))

    return int32(source, types.intp), generate


@intrinsic
def _turn_block(context: Any, source: Any, start: Any, stride: Any, target: Any, place: Any, step: Any) -> Any:
    """16 rows of 16 elements, a stride apart, from `start` on -> as columns, a step apart, from `place` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        align = signature.args[0].dtype.bitwidth // 8

        def at(array: int, i: int) -> Any:
            start = builder.add(args[array + 1], builder.mul(args[array + 2], ir.Constant(args[array + 2].type, i)))
            return _vector(context, builder, signature.args[array], args[array], start)

        rows = [builder.load(at(0, i), align=align) for i in range(LANES)]
        for _ in range(4):  # merged by turns with the row half a block away, once for each bit of a row's number
            rows = [
                builder.shuffle_vector(rows[i], rows[i + LANES // 2], half)
                for i in range(LANES // 2)
                for half in (LOW, HIGH)
            ]
        for i, column in enumerate(rows):
            builder.store(column, at(3, i), align=align)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate


@compiled
def turn(source, target, place, rows, columns):
    """A matrix [rows, columns] at the start of `source` -> [columns, rows], into `target` from `place` on."""
    whole_rows, whole_columns = rows - rows % LANES, columns - columns % LANES
    if rows < columns:
        for r in range(0, whole_rows, LANES):
            for c in range(0, whole_columns, LANES):
                _turn_block(source, r * columns + c, columns, target, place + c * rows + r, rows)
    else:  # along the longer side, as memory far apart by the same power of two shares few places in a cache
        for c in range(0, whole_columns, LANES):
            for r in range(0, whole_rows, LANES):
                _turn_block(source, r * columns + c, columns, target, place + c * rows + r, rows)
    for r in range(rows):
        for c in range(whole_columns if r < whole_rows else 0, columns):
            target[uint64(place + c * rows + r)] = source[uint64(r * columns + c)]


@compiled
def relu(x, out, signs):
    """ReLU, and a bit for each element: whether its gradient passes. `out` may be x; NaN passes, as in torch."""
    whole = len(x) // LANES
    for i in range(whole):
        signs[i] = _pass(x, i * LANES, out)
    bits = 0
    for i in range(whole * LANES, len(x)):
        passes = not x[i] <= float32(0)
        bits |= passes << (i % LANES)
        out[i] = x[i] if passes else float32(0)
    if whole < len(signs):
        signs[whole] = bits


@compiled
def relu_backward(error, out, signs):
    """The gradient where `relu` set the bit, else 0."""
    whole = len(error) // LANES
    for i in range(whole):
        _keep(error, i * LANES, out, signs[i])
    for i in range(whole * LANES, len(error)):
        out[i] = error[i] if (signs[whole] >> (i % LANES)) & 1 else float32(0)
