"""The lane profile of an operand, on whatever device it is. Each implementation gives the integers of `reference`."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from lnpu_torch.ops import dispatch as backends
from lnpu_torch.ops.lanes import reference


def lane_profile(values: Tensor, joined: bool = False) -> Tensor:
    """Lane-cycles of every member of the family for an operand [N, C, *grid] or [rows, C]: int64 [len(LANE_CONFIGS)].

    Args:
        joined: whether runs go on from sample to sample, as in [rows, C].
    """
    dense = values.contiguous(memory_format=backends.memory_format(values))
    loops = backends.cpu_module(dense, "ops.lanes.cpu")
    if loops:
        return loops.profile_of(dense, joined)  # type: ignore[no-any-return]
    module = (backends.gpu_module(dense, "ops.lanes.gpu") if dense.numel() else None) or reference
    return module.profile(joined_runs(module, dense) if joined else module.runs_of(dense))  # type: ignore[no-any-return]


def joined_runs(module: ModuleType, values: Tensor) -> Tensor:
    """The runs of an operand [N, C, *grid] as if it were [rows, C]: they go on from sample to sample."""
    if values.dim() == 2 or backends.lies_last(values):
        return module.runs_of(values.movedim(1, -1).flatten(0, -2))  # type: ignore[no-any-return]
    channels = values.shape[1]
    apart = module.runs_of(values.flatten(2).transpose(0, 1).reshape(channels, 1, values[:, 0].numel()))
    joined: Tensor = apart.transpose(0, 1)
    return joined
