"""Compiled loops over vectors of 16 elements, among them matrices turned over.

Numba vectorises plain loops by itself; blocks of 16 by 16 are written as LLVM's own here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lnpu_torch.ops.numba_jit import compiled

LANES = 16
"""Elements in a vector."""
AHEAD = 2**10
"""Elements that are asked for before they are read: a page, at whose end the CPU itself stops looking ahead."""

VECTOR = ir.VectorType(ir.FloatType(), LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)
BITS = ir.VectorType(ir.IntType(1), LANES)
LOW, HIGH = (ir.Constant(INTEGERS, [lane for i in range(half, half + 8) for lane in (i, i + LANES)]) for half in (0, 8))
"""Which lanes of two vectors their lower and upper halves, merged by turns, take."""


def address(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """Where the vector that begins at an element of a one-dimensional array lies."""
    data = context.make_array(kind)(context, builder, array).data
    vector = ir.VectorType(context.get_data_type(kind.dtype), LANES)
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())


def halved(builder: Any, values: Any) -> Any:
    """A vector of float32 -> the bits of the nearest binary16."""
    halves = builder.fptrunc(values, ir.VectorType(ir.HalfType(), LANES))
    return builder.bitcast(halves, ir.VectorType(ir.IntType(16), LANES))


def splat(builder: Any, value: Any) -> Any:
    """A vector of one number."""
    nothing = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(INTEGERS, [0] * LANES))


def leading(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes."""
    lanes = ir.Constant(INTEGERS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, splat(builder, builder.trunc(count, INTEGERS.element)))


def _prefetch(writes: int, context: Any, builder: Any, signature: Any, args: Any) -> Any:
    number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    place = builder.bitcast(address(context, builder, signature.args[0], *args), byte)
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [place, number(writes), number(2), number(1)])  # into the second cache; data
    return context.get_dummy_value()


@intrinsic
def prefetch_to_read(context: Any, array: Any, start: Any) -> Any:
    """Ask for the memory of a vector that will be read; it may lie beyond the array."""
    return types.void(array, types.intp), partial(_prefetch, 0)


@intrinsic
def prefetch_to_write(context: Any, array: Any, start: Any) -> Any:
    """Ask for the memory of a vector that will be written."""
    return types.void(array, types.intp), partial(_prefetch, 1)


def load_leading(builder: Any, place: Any, count: Any) -> Any:
    """The first `count` lanes of a vector, and zeros; all of them if there are more."""
    vector, number = place.type.pointee, ir.IntType(32)
    kind = ir.FunctionType(vector, [place.type, number, BITS, vector])
    masked = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.{_name(vector)}.p0")
    with builder.if_else(builder.icmp_signed(">=", count, count.type(LANES))) as (whole, part):
        with whole:
            all_lanes, after_all = builder.load(place, align=_bytes(vector)), builder.block
        with part:
            zeros = ir.Constant(vector, None)
            some = builder.call(masked, [place, number(_bytes(vector)), leading(builder, count), zeros])
            after_some = builder.block
    loaded = builder.phi(vector)
    loaded.add_incoming(all_lanes, after_all)
    loaded.add_incoming(some, after_some)
    return loaded


def store_leading(builder: Any, values: Any, place: Any, count: Any) -> None:
    """Write the first `count` lanes of a vector; all of them if there are more."""
    number, align = ir.IntType(32), _bytes(values.type)
    kind = ir.FunctionType(ir.VoidType(), [values.type, place.type, number, BITS])
    masked = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.{_name(values.type)}.p0")
    with builder.if_else(builder.icmp_signed(">=", count, count.type(LANES))) as (whole, part):
        with whole:
            builder.store(values, place, align=align)
        with part:
            builder.call(masked, [values, place, number(align), leading(builder, count)])


def _bytes(vector: Any) -> int:
    return 4 if vector == VECTOR else int(vector.element.width) // 8


def _name(vector: Any) -> str:
    return f"v{LANES}f32" if vector == VECTOR else f"v{LANES}i{vector.element.width}"


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors -> their columns: four times merged by turns with the row half a block away, once for each bit."""
    for _ in range(4):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [builder.shuffle_vector(*pair, lanes) for pair in pairs for lanes in (LOW, HIGH)]
    return rows


@intrinsic
def _turn_block(
    context: Any,
    source: Any,
    start: Any,
    stride: Any,
    single: Any,
    half: Any,
    place: Any,
    step: Any,
    rows: Any,
    columns: Any,
) -> Any:
    """Up to 16 rows of up to 16 numbers, a stride apart, from `start` on -> columns, a step apart from `place` on.

    They are written to `single` and, rounded to binary16, to `half`; each may be None.
    """
    kinds = (source, types.intp, types.intp, single, half, *[types.intp] * 4)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, start, stride, single, half, place, step, height, width = args

        def at(kind: Any, array: Any, start: Any, stride: Any, i: int) -> Any:
            return address(context, builder, kind, array, builder.add(start, builder.mul(stride, stride.type(i))))

        def reaches(count: Any, i: int) -> Any:
            return builder.icmp_signed(">", count, count.type(i))

        lengths = (builder.select(reaches(height, i), width, width.type(0)) for i in range(LANES))
        rows = [load_leading(builder, at(kinds[0], source, start, stride, i), n) for i, n in enumerate(lengths)]
        for i, column in enumerate(_turned(builder, rows)):
            with builder.if_then(reaches(width, i)):
                if kinds[3] != types.none:
                    store_leading(builder, column, at(kinds[3], single, place, step, i), height)
                if kinds[4] != types.none:
                    store_leading(builder, halved(builder, column), at(kinds[4], half, place, step, i), height)
        return context.get_dummy_value()

    return types.void(*kinds), generate


@compiled
def turn(source, target, place, rows, columns):
    """A matrix [rows, columns] at the start of `source` -> [columns, rows], into `target` from `place` on."""
    turn_rows(source, rows, columns, target, None, place, rows)


@compiled
def turn_rows(source, rows, columns, single, half, place, step):
    """Some rows of a matrix at the start of `source` -> columns, a step apart from `place` on.

    They are written to `single` and, rounded to binary16, to `half`; each may be None. The last block of 16 rows or
    columns may do what the one before has done already.
    """
    height, width = min(rows, LANES), min(columns, LANES)
    for c in range(0, columns, LANES):
        c = min(c, columns - width)
        for r in range(0, rows, LANES):
            r = min(r, rows - height)
            first, target = r * columns + c, place + c * step + r
            if height == LANES and width == LANES:  # constants, for which there are no masks
                _turn_block(source, first, columns, single, half, target, step, LANES, LANES)
            else:
                _turn_block(source, first, columns, single, half, target, step, height, width)
