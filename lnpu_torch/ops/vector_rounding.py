"""Vectors of 16 numbers as values in compiled loops: loaded, rounded, stored, counted. It knows no tensor's layout.

Rounding to nearest even at bit m of a number with exponent e: adding and subtracting 2^(e + 23 - m) leaves just the
bits above, in float32's own rounding. With e held at the format's least exponent, the same gives subnormals.

What an element adds to a counter is its mark. A packed counter has 16 bits: FP8 in the lower 8, wide in the upper ones.
Where only the first `count` elements of a vector are meant, the others are neither read nor written: they are zeros.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import int32, types, uint16, uint32
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from lnpu_torch.ops.vectors import INTEGERS, LANES, VECTOR, address, halved, leading, load_leading, splat, store_leading

FP8, WIDE = 1, 0x100
"""The marks of both groups; a zero has none."""
MOST = 255
"""The most elements that a packed counter can hold."""
MAGNITUDE, SIGN, INFINITY = 0x7FFFFFFF, 0x80000000, 0x7F800000
"""Bits of a float32."""


class Vector(types.Type):
    """A vector as Numba sees it: a value without parts."""

    def __init__(self, name: str, lane: ir.Type) -> None:
        super().__init__(name)
        self.llvm = ir.VectorType(lane, LANES)


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


FLOATS, MARKS = Vector("floats", ir.FloatType()), Vector("marks", ir.IntType(16))


def _integers(value: int) -> Any:
    return ir.Constant(INTEGERS, [value] * LANES)


def _marks(value: int) -> Any:
    return ir.Constant(MARKS.llvm, [value] * LANES)


@intrinsic
def load(context: Any, array: Any, start: Any, count: Any) -> Any:
    """Elements of a float32 array from `start` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_leading(builder, address(context, builder, signature.args[0], *args[:2]), args[2])

    return FLOATS(array, types.intp, types.intp), generate


@intrinsic
def store(context: Any, values: Any, array: Any, start: Any, count: Any) -> Any:
    """Write values to a float32 array, or, rounded to binary16, to a uint16 array of its bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[1]
        values = halved(builder, args[0]) if kind.dtype == types.uint16 else args[0]
        place = address(context, builder, kind, *args[1:3])
        store_leading(builder, values, place, args[3])
        return context.get_dummy_value()

    return types.void(FLOATS, array, types.intp, types.intp), generate


@intrinsic
def in_half(context: Any, x: Any) -> Any:
    """A vector's values rounded to binary16."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        halves = builder.fptrunc(args[0], ir.VectorType(ir.HalfType(), LANES))
        return builder.fpext(halves, VECTOR)

    return FLOATS(FLOATS), generate


@intrinsic
def rounded(context: Any, x: Any, parameters: Any) -> Any:
    """A vector's rounded values, and their marks, by `cpu`'s parameters of a rule.

    These are: bits of the largest magnitude in the FP8 group; mantissa bits and least exponent of FP8 and of the wide
    format; bits of the first power of two beyond the wide format; the largest numbers of both.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        last, low_mantissa, low_least, wide_mantissa, wide_least, beyond, low_max, wide_max = cgutils.unpack_tuple(
            builder, args[1]
        )

        def smaller(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_signed("<", a, b), a, b)

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        def by_size(low: Any, other: Any) -> Any:
            return builder.select(small, splat(builder, low), splat(builder, other))

        def binade(exponent: Any) -> Any:
            return builder.shl(exponent, exponent.type(23))

        bits = builder.bitcast(args[0], INTEGERS)
        magnitude = builder.and_(bits, _integers(MAGNITUDE))
        # What is not finite is in the FP8 group, too, if all is; but it is never rounded as that.
        small = builder.icmp_signed("<=", magnitude, splat(builder, smaller(last, last.type(INFINITY - 1))))
        clamped = smaller(magnitude, splat(builder, beyond))  # else the anchor's binade would lie far above the number
        least = by_size(binade(low_least), binade(wide_least))
        steps = (binade(builder.sub(m.type(23), m)) for m in (low_mantissa, wide_mantissa))
        anchor = builder.add(larger(builder.and_(clamped, _integers(INFINITY)), least), by_size(*steps))
        anchor, clamped = builder.bitcast(anchor, VECTOR), builder.bitcast(clamped, VECTOR)
        q = builder.fsub(builder.fadd(clamped, anchor), anchor)
        limit = by_size(low_max, low_max.type(float("inf")))
        q = builder.select(builder.fcmp_ordered("<", q, limit), q, limit)
        fits = builder.fcmp_ordered("<=", q, splat(builder, wide_max))
        result = builder.select(fits, builder.bitcast(q, INTEGERS), larger(magnitude, _integers(INFINITY)))
        values = builder.bitcast(builder.or_(result, builder.and_(bits, _integers(SIGN))), VECTOR)

        fp8, wide = (ir.Constant(MARKS.llvm.element, mark) for mark in (FP8, WIDE))
        everything = builder.icmp_signed(">=", last, last.type(INFINITY))
        marks = by_size(fp8, builder.select(everything, fp8, wide))
        marks = builder.select(builder.icmp_signed("==", result, _integers(0)), _marks(0), marks)
        return context.make_tuple(builder, signature.return_type, [values, marks])

    return types.Tuple((FLOATS, MARKS))(FLOATS, parameters), generate


@intrinsic
def add_to(context: Any, marks: Any, array: Any, start: Any) -> Any:
    """Add marks, or packed counters, to 16 of an array from `start` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = address(context, builder, signature.args[1], *args[1:])
        builder.store(builder.add(builder.load(place, align=2), args[0]), place, align=2)
        return context.get_dummy_value()

    return types.void(MARKS, array, types.intp), generate


@intrinsic
def put_groups(context: Any, marks: Any, array: Any, start: Any, count: Any) -> Any:
    """Write the group of each element (0, 8, 16) to a uint8 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        groups = builder.or_(builder.shl(args[0], _marks(3)), builder.lshr(args[0], _marks(4)))
        groups = builder.trunc(groups, ir.VectorType(ir.IntType(8), LANES))
        place = address(context, builder, signature.args[1], *args[1:3])
        store_leading(builder, groups, place, args[3])
        return context.get_dummy_value()

    return types.void(MARKS, array, types.intp, types.intp), generate


@intrinsic
def present(context: Any, marks: Any) -> Any:
    """A bit for each element that is not zero."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        bits = builder.icmp_unsigned("!=", args[0], _marks(0))
        return builder.bitcast(bits, ir.IntType(LANES))

    return uint16(MARKS), generate


@intrinsic
def put(context: Any, marks: Any, array: Any, start: Any) -> Any:
    """Write 16 marks to a uint16 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[0], address(context, builder, signature.args[1], *args[1:]), align=2)
        return context.get_dummy_value()

    return types.void(MARKS, array, types.intp), generate


@intrinsic
def get(context: Any, array: Any, start: Any, count: Any) -> Any:
    """The first `count` marks of an array from `start` on; 16 are read."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        marks = builder.load(address(context, builder, signature.args[0], *args[:2]), align=2)
        return builder.select(leading(builder, args[2]), marks, _marks(0))

    return MARKS(array, types.intp, types.intp), generate


@intrinsic
def nothing(context: Any) -> Any:
    """No mark for any element."""
    return MARKS(), lambda *_: _marks(0)


@intrinsic
def plus(context: Any, first: Any, second: Any) -> Any:
    """Sums of marks, by element: packed counters, too."""
    return MARKS(MARKS, MARKS), lambda _, builder, __, args: builder.add(*args)


@intrinsic
def total(context: Any, counters: Any) -> Any:
    """Sum of 16 packed counters, in 32 bits: FP8 in the lower 16, wide in the upper ones."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        counters = builder.zext(args[0], INTEGERS)
        low, high = builder.and_(counters, _integers(0xFF)), builder.lshr(counters, _integers(8))
        both = builder.or_(low, builder.shl(high, _integers(16)))
        kind = ir.FunctionType(ir.IntType(32), [INTEGERS])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.add.v16i32")
        return builder.call(reduce, [both])

    return int32(MARKS), generate


@intrinsic
def ones(context: Any, bits: Any) -> Any:
    """How many bits are set."""
    return uint32(uint32), lambda _, builder, __, args: builder.ctpop(args[0])
