"""A chip's lanes, walked one by one over the masks themselves: what a lane profile must agree with."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from lnpu_torch.counts.lane_configs import LaneConfig

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

    def lane_cycles(self, config: LaneConfig) -> int:
        """Lane-cycles: the lanes that have a channel, times the work of the fullest, interval by interval."""
        interval, balance_group, lanes = config
        work, total = self.work(interval), 0
        for first in range(0, work.shape[1], lanes):
            taken = work[:, first : first + lanes]
            fullest: Array = np.zeros_like(taken[:, 0])
            for lane in range(0, taken.shape[1], balance_group):
                group = taken[:, lane : lane + balance_group]
                fullest = np.maximum(fullest, -(-group.sum(1) // group.shape[1]))
            total += taken.shape[1] * int(fullest.sum())
        return total
