"""How the loops that Numba compiles are compiled. It knows none of them."""

from __future__ import annotations

from typing import Any

from numba import njit


def compiled(function: Any, **options: Any) -> Any:
    """Compile at the first call, without the interpreter's lock; keep the result on disk where that can be written."""
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:
        return njit(nogil=True, **options)(function)


def inlined(function: Any) -> Any:
    """The same, put wherever it is called: for what LLVM makes shorter there, as where an argument is constant."""
    return compiled(function, forceinline=True)
