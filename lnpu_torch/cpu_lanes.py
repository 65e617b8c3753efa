"""`lanes`, compiled: the same integers, from one pass over an operand and a few over its runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lnpu_torch import lane_loops
from lnpu_torch.lane_family import LONGEST, MEMBERS, RUN
from lnpu_torch.threads import split

Array = np.ndarray[Any, Any]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def runs_of(values: Tensor) -> Tensor:
    """`lanes.runs_of`, of a contiguous or channels_last tensor that is not empty."""
    bits = values.detach().view(BITS[values.element_size()])
    last = bits.dim() == 2 or not bits.is_contiguous()
    bits = bits[None] if bits.dim() == 2 else bits.movedim(1, -1).flatten(1, -2) if last else bits.flatten(2)
    batch, positions, channels = bits.shape if last else (bits.shape[0], bits.shape[2], bits.shape[1])
    runs = torch.empty(batch, channels, -(-positions // RUN), dtype=torch.uint8)
    loop, source, target = lane_loops.runs_of_last if last else lane_loops.runs_of, bits.numpy(), runs.numpy()
    magnitude = source.dtype.type(np.iinfo(source.dtype).max)

    def run(start: int, stop: int) -> None:
        loop(source[start:stop], magnitude, target[start:stop])

    split(run, batch, values.numel())
    return runs


def profile(runs: Tensor) -> Tensor:
    """`lanes.profile`, of runs that are not empty."""
    array, whole = runs.numpy(), runs.shape[0] > 1  # whole samples for each thread, or parts of the only one

    def run(start: int, stop: int) -> Array:
        entries = np.zeros(len(MEMBERS), np.int64)
        part = array[start:stop] if whole else array[:, :, start * LONGEST : stop * LONGEST]
        lane_loops.profile(part, entries)
        return entries

    parts = len(array) if whole else -(-array.shape[2] // LONGEST)
    return torch.from_numpy(np.asarray(sum(split(run, parts, array.size))))
