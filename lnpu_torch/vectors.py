"""Compiled loops over vectors of 16 floats: ReLU that keeps a bit per element.

Numba vectorises plain loops by itself; a vector of bits is written as LLVM's own here.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import float32, types, uint16
from numba.extending import intrinsic

from lnpu_torch.loops import compiled

LANES = 16
"""Floats in a vector."""

VECTOR = ir.VectorType(ir.FloatType(), LANES)
BITS = ir.VectorType(ir.IntType(1), LANES)


def _vector(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """Where the vector that begins at an element of a one-dimensional float32 array lies."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [start]), VECTOR.as_pointer())


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
