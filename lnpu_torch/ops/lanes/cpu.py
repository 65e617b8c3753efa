"""`lanes`, compiled: the same integers, from one pass over an operand and a few over its runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS, RUN
from lnpu_torch.ops import shared_loops
from lnpu_torch.ops.threads import team

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def runs_of(values: Tensor) -> Tensor:
    """`lanes.runs_of`, of a contiguous or channels_last tensor that is not empty."""
    bits = values.detach().view(BITS[values.element_size()])
    last = bits.dim() == 2 or not bits.is_contiguous()
    bits = bits[None] if bits.dim() == 2 else bits.movedim(1, -1).flatten(1, -2) if last else bits.flatten(2)
    batch, positions, channels = bits.shape if last else (bits.shape[0], bits.shape[2], bits.shape[1])
    runs = torch.empty(batch, channels, -(-positions // RUN), dtype=torch.uint8, device="cpu")
    source, threads = bits.numpy(), team(values.numel())
    magnitude = source.dtype.type(np.iinfo(source.dtype).max)
    shared_loops.runs_of(threads, source, magnitude, runs.numpy(), last or None)
    return runs


def profile(runs: Tensor) -> Tensor:
    """`lanes.profile`, of runs that are not empty."""
    entries = torch.zeros(len(LANE_CONFIGS), dtype=torch.int64, device="cpu")
    shared_loops.profile(team(runs.numel()), runs.numpy(), entries.numpy())
    return entries
