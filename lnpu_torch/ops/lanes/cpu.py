"""Lane profiles on a CPU, by compiled loops: the integers of `reference`."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS
from lnpu_torch.ops.lanes import cpu_loops
from lnpu_torch.ops.parallel import team


def lane_profile(values: Tensor, joined: bool) -> Tensor:
    """`dispatch.Backend.lane_profile` of a dense operand that is not empty."""
    x = values.detach()
    if x.element_size() == 8:  # only zeros count
        x = (x != 0).float()
    rows, channels, positions = x.shape[0], x.shape[1], prod(x.shape[2:])
    last = x.dim() == 2 or not x.is_contiguous()
    entries = torch.zeros(len(LANE_CONFIGS), dtype=torch.int64, device="cpu")
    sizes, joined = (rows, channels, positions, last), joined or x.dim() == 2
    cpu_loops.add_profile_of(team(x.numel()), x.data_ptr(), x.element_size(), sizes, joined, entries.data_ptr())
    return entries
