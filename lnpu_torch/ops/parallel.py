"""How compiled loops share work among threads: torch's own where they can be had, else a pool's.

Torch's OpenMP workers spin for a while after each of its ops. Threads beside them would wait for a free core just then,
so the work is given to those same workers, through the library that torch has loaded (GCC's libgomp).

A region is what OpenMP calls so: a function that each thread of a team runs once. Here it takes shares until none are
left, so that a thread which starts late, or never, leaves nothing undone.
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
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

from lnpu_torch.ops.numba_jit import inlined

SMALL = 2**16
"""Elements below which one thread is faster."""
PROCESS = os.getpid()
"""OpenMP's workers do not live on in a forked process, where to call them would wait for ever."""

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Launcher = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
NUMBER, ADDRESS = ir.IntType(64), ir.IntType(8).as_pointer()
NEXT, SHARES, FAILED, ARGUMENTS = range(4)
"""What a team has in common, in this order: the next share, their number, whether one has failed, the arguments."""


def team(elements: int) -> tuple[int, int]:
    """Who works on so many numbers, for `in_parallel`: the launcher's address, and how many threads.

    A launcher is a C function as OpenMP's own: void (void (*region)(void *), void *common, unsigned threads,
    unsigned flags). It returns when each thread has run the region. The thread at hand alone needs none: 0.
    """
    if elements < SMALL:
        return 0, 1
    return _address(os.getpid() == PROCESS), torch.get_num_threads()


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


@inlined
def bounds(count, share, shares):
    """Where a share of so many begins and ends."""
    return count * share // shares, count * (share + 1) // shares


@inlined
def sum_shares(partial):
    """What each share has summed up [shares, ...], in all; the first share's part is added to, and returned."""
    whole = partial.reshape((len(partial), partial.size // len(partial)))
    for share in range(1, len(whole)):
        for i in range(whole.shape[1]):
            whole[0, i] += whole[share, i]
    return partial[0]


@inlined
def shares_of(team, count):
    """Into how many shares a count is split: no more than there are threads, or things to do."""
    return max(1, min(team[1], count))


@intrinsic
def in_parallel(typing: Any, team: Any, shares: Any, worker: Any, arguments: Any) -> Any:
    """Calls a compiled function `worker(share, shares, *arguments)` once for each share, on a team of threads.

    Args:
        team: as from `team`: what starts its threads, and how many they are.

    Raises:
        MemoryError: a worker has raised an exception, which can be no other.
    """
    inner = signature(types.none, types.intp, types.intp, *arguments.types)
    worker.get_call_type(typing, inner.args, {})

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
        (launcher, threads), shares, arguments_given = cgutils.unpack_tuple(builder, values[0]), values[1], values[3]
        common = ir.LiteralStructType([NUMBER] * 3 + [context.get_value_type(arguments)])
        place = cgutils.alloca_once(builder, common)
        for field, value in enumerate((NUMBER(0), shares, NUMBER(0), arguments_given)):
            builder.store(value, cgutils.gep_inbounds(builder, place, 0, field))
        region = _region(context, builder.module, worker.dispatcher.overloads[inner.args], arguments, common)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [region.type, ADDRESS, number, number])
        given = builder.bitcast(place, ADDRESS)
        with builder.if_else(cgutils.is_null(builder, launcher)) as (alone, together):
            with alone:
                builder.call(region, [given])
            with together:
                launch = builder.inttoptr(launcher, kind.as_pointer())
                builder.call(launch, [region, given, builder.trunc(threads, number), number(0)])
        failed = builder.load(cgutils.gep_inbounds(builder, place, 0, FAILED))
        with builder.if_then(cgutils.is_true(builder, failed), likely=False):
            context.call_conv.return_user_exc(builder, MemoryError, ("a loop on several threads failed",))
        return context.get_dummy_value()

    return types.none(team, types.intp, worker, arguments), generate


def _region(context: Any, module: Any, worker: Any, arguments: Any, common: Any) -> Any:
    """The function that each thread runs: void (void *common)."""
    kind = ir.FunctionType(ir.VoidType(), [ADDRESS])
    region = ir.Function(module, kind, module.get_unique_name("region"))
    region.linkage = "internal"
    builder = ir.IRBuilder(region.append_basic_block())
    again, work, done = (region.append_basic_block(name) for name in ("again", "work", "done"))
    place = builder.bitcast(region.args[0], common.as_pointer())
    fields = [cgutils.gep_inbounds(builder, place, 0, field) for field in range(len(common.elements))]
    shares, given = builder.load(fields[SHARES]), builder.load(fields[ARGUMENTS])
    builder.branch(again)

    builder.position_at_end(again)
    share = builder.atomic_rmw("add", fields[NEXT], NUMBER(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", share, shares), work, done)

    builder.position_at_end(work)
    values = [share, shares, *cgutils.unpack_tuple(builder, given, len(arguments.types))]
    context.active_code_library.add_linking_library(worker.library)
    status, _ = context.call_internal_no_propagate(builder, worker.fndesc, worker.signature, values)
    with builder.if_then(status.is_error, likely=False):
        builder.store(NUMBER(1), fields[FAILED])
    builder.branch(again)

    builder.position_at_end(done)
    builder.ret_void()
    return region
