"""Vectors of 16 elements in LLVM: where they lie, and how they are loaded and stored."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Elements in a vector."""
AHEAD = 2**10
"""Elements that are asked for before they are read: a page, at whose end the CPU itself stops looking ahead."""

VECTOR = ir.VectorType(ir.FloatType(), LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)
BITS = ir.VectorType(ir.IntType(1), LANES)


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


@intrinsic
def prefetch_to_read(context: Any, array: Any, start: Any) -> Any:
    """Ask for the memory of a vector that will be read; it may lie beyond the array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        place = builder.bitcast(address(context, builder, signature.args[0], *args), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [place, number(0), number(2), number(1)])  # to read, into the second cache; data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


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
