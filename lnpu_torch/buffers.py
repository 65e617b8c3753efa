"""Memory of rounded operands on a CPU that is used again: to get fresh pages takes longer than to round into them.

What a product has read waits here for the next operand: no more than was lately in use at once, and no longer than
there is an emulated layer.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

LARGE = 2**20
"""Bytes from which on memory is kept."""
LATELY = 16
"""Requests that tell how much is kept, those of a few layers: so that small ones do not keep what large ones needed."""


class Pool:
    """Blocks of memory, lent to tensors. A block is back when the last tensor that lies in it is gone."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: list[Tensor] = []
        self._returned: list[tuple[Tensor, int]] = []  # by destructors, which run at any point and must not wait
        self._lent = 0  # bytes that were asked for
        self._lately = deque([0], LATELY)  # the same, at each of the last requests
        self.users = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """`torch.empty` of a contiguous tensor, in the smallest block kept that is large enough."""
        size = prod(shape) * dtype.itemsize
        if size < LARGE:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            self._collect()
            self._lent += size
            self._lately.append(self._lent)
            most = max(self._lately)
            block = min((block for block in self._kept if size <= len(block) <= most), key=len, default=None)
            self._kept = sorted((other for other in self._kept if other is not block), key=len)
            while self._kept and self._lent + sum(map(len, self._kept)) > most:
                del self._kept[0]
        block = torch.empty(size, dtype=torch.uint8) if block is None else block
        return torch.from_numpy(np.asarray(_Lease(block, size, self._returned))).view(dtype).view(shape)

    def serve(self, user: object) -> None:
        """Keep memory as long as one of the users lives."""
        self.users += 1
        weakref.finalize(user, self._leave).atexit = False

    def kept(self) -> int:
        """Bytes that wait for a tensor."""
        with self._lock:
            self._collect()
            return sum(map(len, self._kept))

    def _leave(self) -> None:
        with self._lock:
            self.users -= 1
            if not self.users:
                self._collect()
                self._kept = []

    def _collect(self) -> None:
        while self._returned:
            block, size = self._returned.pop()
            self._lent -= size
            self._kept.append(block)


class _Lease:
    """What numpy, and torch by it, hold on to as long as a tensor lies in a block."""

    def __init__(self, block: Tensor, size: int, returned: list[tuple[Tensor, int]]) -> None:
        self._lent, self._returned = (block, size), returned
        self.__array_interface__ = {"data": (block.data_ptr(), False), "shape": (size,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        self._returned.append(self._lent)


OPERANDS = Pool()
"""For values in float32, which live as long as a product takes."""


def is_dense(x: Tensor) -> bool:
    """Whether x's elements lie in memory without gaps: contiguous or channels_last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.empty_like` of a dense operand."""
    if x.is_contiguous():
        return OPERANDS.empty(x.shape, dtype)
    return OPERANDS.empty(x.permute(0, 2, 3, 1).shape, dtype).permute(0, 3, 1, 2)
