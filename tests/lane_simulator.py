"""A chip's lanes, walked one by one over the masks themselves: what a lane profile must agree with."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]


class Simulator:
    """Lanes that stream an operand with this mask, [N, C, *grid] or [rows, C]."""

    def __init__(self, mask: Tensor) -> None:
        planes = mask.numpy()
        self.planes: Array = planes.T[None] if planes.ndim == 2 else planes.reshape(*planes.shape[:2], -1)
        self.work = lru_cache(self._work)

    def _work(self, run: int) -> Array:
        """Non-zeros of each run of so many positions: [N, C, runs]."""
        return np.add.reduceat(self.planes, range(0, self.planes.shape[2], run), axis=2, dtype=np.int64)

    def held(self, run: int, balancer: int, lanes: int) -> int:
        """Lane-cycles of so many lanes: those that have a channel, times the work of the fullest, run by run."""
        work, total = self.work(run), 0
        for first in range(0, work.shape[1], lanes):
            taken = work[:, first : first + lanes]
            fullest: Array = np.zeros_like(taken[:, 0])
            for lane in range(0, taken.shape[1], balancer):
                group = taken[:, lane : lane + balancer]
                fullest = np.maximum(fullest, -(-group.sum(1) // group.shape[1]))
            total += taken.shape[1] * int(fullest.sum())
        return total
