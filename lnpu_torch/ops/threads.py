"""Teams of threads for compiled loops: torch's own where they can be had, else a pool's. It knows none of the loops.

Torch's OpenMP workers spin for a while after each of its ops. Threads beside them would wait for a free core just then,
so the work is given to those same workers, through the library that torch has loaded (GCC's libgomp).
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

SMALL = 2**16
"""Elements below which one thread is faster."""
PROCESS = os.getpid()
"""OpenMP's workers do not live on in a forked process, where to call them would wait for ever."""

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Launcher = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def team(elements: int) -> tuple[int, int]:
    """Who works on so many numbers, for `regions.in_parallel`: the launcher's address, and how many threads.

    A launcher is a C function as OpenMP's own: void (void (*region)(void *), void *common, unsigned threads,
    unsigned flags). It returns when each thread has run the region.
    """
    threads = torch.get_num_threads() if elements >= SMALL else 1
    return _address(os.getpid() == PROCESS), threads


@lru_cache(maxsize=2)
def _address(openmp: bool) -> int:
    launcher = (_openmp() if openmp else None) or _POOL
    return ctypes.cast(launcher, ctypes.c_void_p).value or 0


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """The launcher of the libgomp that torch has loaded, or None."""
    for path in Path(torch.__file__).parent.glob("lib*/libgomp*.so*"):
        try:
            return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD).GOMP_parallel
        except OSError:
            continue
    return None


def _launch_on_pool(region: int, common: int, threads: int, flags: int) -> None:
    run = _Region(region)
    others: list[Future[None]] = []
    for _ in range(1, threads):
        with suppress(RuntimeError):  # where the interpreter ends it starts no more threads
            others.append(_pool(os.getpid(), threads).submit(run, common))
    run(common)  # whatever share is left
    for other in others:
        other.result()


_POOL = _Launcher(_launch_on_pool)


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """A pool for this process (a forked one cannot use its parent's), of this many threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="lnpu")
