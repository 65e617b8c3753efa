"""`lanes` on a GPU, put to the Triton kernels; the same integers. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from lnpu_torch.kernels import lanes as kernels
from lnpu_torch.kernels import launch
from lnpu_torch.ops.lanes import reference as lanes


def runs_of(values: Tensor) -> Tensor:
    """`lanes.runs_of`, of a contiguous or channels_last tensor."""
    takes = values.dtype in kernels.FLOATS and values.numel() < launch.INT32
    return kernels.runs_of(values) if takes else lanes.runs_of(values)


def profile(runs: Tensor) -> Tensor:
    """`lanes.profile`."""
    return kernels.profile(runs)  # type: ignore[no-any-return]


def no_profile(device: torch.device) -> Tensor:
    """A profile of zeros, to which one is added."""
    return torch.zeros(kernels.MEMBERS, dtype=torch.int64, device=device)
