"""`reference`'s sums on a GPU, by the Triton kernels; the same integers. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lnpu_torch.kernels import pair_counts as kernels

add_weight_step = kernels.add_weight_step


def add_grid_step(
    counter: Tensor, big: Sequence[Tensor], small: Sequence[Tensor], geometry: Sequence[int], first: str
) -> None:
    """`reference.add_grid_step`; what was counted on a CPU may be in bytes."""
    grids = ([position, sample.to(torch.int32)] for position, sample in (big, small))
    kernels.add_grid_step(counter, *grids, geometry, first)
