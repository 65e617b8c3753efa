"""Memory on a CPU that is used again, as to get fresh pages takes longer than to round into them.

Rounded operands live as long as a product takes, a few at a time, or until backward; what a layer returns lives until
its reader's backward. All lie in one block, which is as large as was lately needed at once, and no longer there than an
emulated layer is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

LARGE = 2**22
"""Bytes from which on a tensor lies in the block."""
KINDS = {torch.float32: "=f4", torch.float16: "=f2", torch.uint8: "=u1"}
"""Dtypes that it holds, and numpy's names of them."""
PAGE = 2**12
"""Bytes of which each place in the block is a multiple."""
LATELY = 2**10
"""Requests in a period, a few training steps: the block holds what was needed in this one and the one before."""


class Pool:
    """A block of memory, lent in parts to tensors. A part is back when the last tensor that lies in it is gone."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._renew(0)
        self._lent: list[tuple[int, int]] = []  # first and last byte of each part, in order, some beyond the block
        self._returned: list[tuple[int, int]] = []  # by destructors, which run at any point and must not wait
        self._requests = self._most = self._before = 0
        self.users = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, last: bool = False) -> Tensor:
        """`torch.empty`, contiguous or in channels_last: in the block, or in memory of its own while that is too small.

        A tensor in the block cannot be resized.
        """
        size = prod(shape) * dtype.itemsize
        if size < LARGE or not self.users or dtype not in KINDS:
            form = torch.channels_last if last else torch.contiguous_format
            return torch.empty(shape, dtype=dtype, memory_format=form, device="cpu")
        with self._lock:
            self._collect()
            place = self._take(-(-size // PAGE) * PAGE)
            if place[1] <= self._size:
                memory, address = self._block, self._address + place[0]
            else:
                memory = torch.empty(size, dtype=torch.uint8, device="cpu")
                address = memory.data_ptr()
        lies = (shape[0], *shape[2:], shape[1]) if last else tuple(shape)
        array = np.asarray(_Lease(memory, address, lies, KINDS[dtype], place, self._returned))
        return torch.from_numpy(array.transpose(0, 3, 1, 2) if last else array)  # no view, which autograd would mind

    def serve(self, user: object) -> None:
        """Keep memory as long as one of the users lives."""
        self.users += 1
        weakref.finalize(user, self._leave).atexit = False

    def kept(self) -> int:
        """Bytes that wait for a tensor."""
        with self._lock:
            self._collect()
            return self._size - sum(stop - start for start, stop in self._lent if stop <= self._size)

    def _take(self, size: int) -> tuple[int, int]:
        """The first place that is free for so many bytes, as if the block had no end."""
        start = 0
        for other, stop in self._lent:
            if other - start >= size:
                break
            start = stop
        self._lent = sorted([*self._lent, (start, start + size)])
        self._most = max(self._most, start + size)
        self._requests += 1
        if self._requests % LATELY == 0:
            self._before, self._most = self._most, 0
        return start, start + size

    def _leave(self) -> None:
        with self._lock:
            self.users -= 1
            if not self.users:
                self._most = self._before = 0
                self._renew(0)

    def _collect(self) -> None:
        """Take back what was returned, and fit the block to what is needed while nothing is lent."""
        while self._returned:
            self._lent.remove(self._returned.pop())
        needed = max(self._most, self._before)
        if not self._lent and needed != self._size:
            self._renew(needed)

    def _renew(self, size: int) -> None:
        """Another block; what is lent keeps the one before alive. Its size and place are kept: torch is slow to say."""
        self._block, self._size = torch.empty(size, dtype=torch.uint8, device="cpu"), size
        self._address = self._block.data_ptr()


class _Lease:
    """What numpy, and torch by it, hold on to as long as a tensor lies at this address in some memory."""

    def __init__(
        self,
        memory: Tensor,
        address: int,
        shape: tuple[int, ...],
        kind: str,
        place: tuple[int, int],
        returned: list[tuple[int, int]],
    ) -> None:
        self._memory, self._place, self._returned = memory, place, returned
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": kind, "version": 3}

    def __del__(self) -> None:
        self._returned.append(self._place)


POOL = Pool()
"""For rounded operands, in float32 for a product at hand, in binary16 for one in backward; and for results."""


def is_dense(x: Tensor) -> bool:
    """Whether x's elements lie in memory without gaps: contiguous or channels_last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.empty_like` of a dense tensor."""
    return POOL.empty(x.shape, dtype, last=not x.is_contiguous())
