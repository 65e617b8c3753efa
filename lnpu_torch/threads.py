"""Runs the shares of a compiled loop on several threads: torch's own where they can be had, else a pool's.

Torch's OpenMP workers spin for a while after each of its ops. Threads beside them would wait for a free core just then,
so the work is given to those same workers, through the library that torch has loaded (GCC's libgomp).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from threading import get_ident
from typing import Any

import torch

SMALL = 2**16
"""Elements below which one thread is faster."""
PROCESS = os.getpid()
"""OpenMP's workers do not live on in a forked process, where to call them would wait for ever."""

_known: set[int] = set()
"""OpenMP's workers that the interpreter keeps a state of."""

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def split(run: Callable[[int, int], Any], count: int, elements: int) -> Sequence[Any]:
    """Results of `run(start, stop)` over shares of range(count), one for each of `torch.get_num_threads()` threads.

    Args:
        run: called on several threads at once; what it calls must let go of the interpreter's lock to gain by it.
        elements: how many numbers there are to work on in all.
    """
    threads = max(1, min(torch.get_num_threads() if elements >= SMALL else 1, count))
    bounds = [count * i // threads for i in range(threads + 1)]
    shares = list(pairwise(bounds))
    if threads == 1:
        return [run(*shares[0])]
    library = _openmp() if os.getpid() == PROCESS else None
    return _on_pool(run, shares) if library is None else _on_openmp(library, run, shares)


def _on_openmp(library: Any, run: Callable[[int, int], Any], shares: Sequence[tuple[int, int]]) -> list[Any]:
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def body(_: Any) -> None:
        me, team = library.omp_get_thread_num(), library.omp_get_num_threads()
        try:
            if me:
                _stay()
            for i in range(me, len(shares), team):  # the team may be smaller than asked for
                results[i] = run(*shares[i])
        except BaseException as error:  # must not leave a callback
            errors.append(error)

    library.GOMP_parallel(_Body(body), None, len(shares), 0)
    if errors:
        raise errors[0]
    return [results[i] for i in range(len(shares))]


def _stay() -> None:
    """Let the interpreter keep its state of this foreign thread, which it else makes and drops with each callback.

    That takes as long as a loop over 100,000 elements (20 to 60 us, measured).
    """
    if get_ident() not in _known:
        _known.add(get_ident())
        ctypes.pythonapi.PyGILState_Ensure()


def _on_pool(run: Callable[[int, int], Any], shares: Sequence[tuple[int, int]]) -> list[Any]:
    pool = _pool(os.getpid(), torch.get_num_threads())
    others = [pool.submit(run, *share) for share in shares[1:]]
    return [run(*shares[0]), *(other.result() for other in others)]


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """The libgomp that torch has loaded, or None."""
    for path in Path(torch.__file__).parent.glob("lib*/libgomp*.so*"):
        try:
            return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
        except OSError:
            continue
    return None


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """A pool for this process (a forked one cannot use its parent's), of this many threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="lnpu")
