"""Tensors in compiled loops: as addresses, of which 0 stands for one that is not wanted.

Numbers make a call cheap, and each function is compiled once.
"""

from __future__ import annotations

from numba import carray, types
from numba.extending import intrinsic

from lnpu_torch.ops.numba_jit import inlined


@intrinsic
def _pointer(_, address):
    """An address -> a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), generate


@inlined
def array_at(address, shape, dtype):
    """The array of this shape at an address."""
    return carray(_pointer(address), shape, dtype)


@inlined
def wanted(address, size):
    """Elements of an array: none if it is not wanted."""
    return size if address else 0
