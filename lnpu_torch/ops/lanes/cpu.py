"""Lane profiles on a CPU, by compiled loops: the integers of `reference`."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS, RUN
from lnpu_torch.ops.lanes import cpu_loops
from lnpu_torch.ops.parallel import team


def lane_profile(values: Tensor, joined: bool) -> Tensor:
    """`Backend.lane_profile` of a dense operand that is not empty."""
    x = values.detach() != 0
    rows, channels, positions = x.shape[0], x.shape[1], prod(x.shape[2:])
    sizes, joined = (rows, channels, positions, x.dim() == 2 or not x.is_contiguous()), joined or x.dim() == 2
    entries = torch.zeros(len(LANE_CONFIGS), dtype=torch.int64, device="cpu")
    cpu_loops.add_profile_of(team(x.numel()), x.data_ptr(), sizes, joined, entries.data_ptr())
    return entries


def profile_of_runs(runs: Tensor) -> Tensor:
    """The profile of runs, uint8 [rows, channels, times]."""
    entries = torch.zeros(len(LANE_CONFIGS), dtype=torch.int64, device="cpu")
    rows, channels, times = runs.shape
    cpu_loops.add_profile(team(RUN * runs.numel()), runs.data_ptr(), (rows, channels, times), entries.data_ptr())
    return entries
