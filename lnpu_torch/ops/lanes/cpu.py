"""Lane profiles on a CPU, by compiled loops: the integers of `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS, RUN
from lnpu_torch.ops.lanes import cpu_loops, reference
from lnpu_torch.ops.parallel import team


def lane_profile(values: Tensor, joined: bool) -> Tensor:
    """`Backend.lane_profile` of an operand that is not empty."""
    runs = reference.joined_runs(values) if joined else reference.runs_of(values)
    return profile_of_runs(runs.contiguous())


def profile_of_runs(runs: Tensor) -> Tensor:
    """The profile of runs, uint8 [rows, channels, times]."""
    entries = torch.zeros(len(LANE_CONFIGS), dtype=torch.int64, device="cpu")
    rows, channels, times = runs.shape
    cpu_loops.add_profile(team(RUN * runs.numel()), runs.data_ptr(), (rows, channels, times), entries.data_ptr())
    return entries
