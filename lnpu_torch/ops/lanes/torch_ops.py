"""The registered torch ops that measure a lane profile. Each gives the integers of `lanes`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS, runs_shape
from lnpu_torch.ops import dispatch as backends
from lnpu_torch.ops.lanes import reference as lanes
from lnpu_torch.ops.registry import fake, op


def implementation(x: Tensor) -> ModuleType:
    """The module whose `runs_of` and `profile` a tensor gets."""
    return backends.fast_module(x, "ops.lanes.cpu", "ops.lanes.gpu") or lanes


@op()
def count_runs(values: Tensor) -> Tensor:
    """`lanes.runs_of` an operand [N, C, *grid] or [rows, C]: uint8 [N, C, T] or [1, C, T]."""
    dense = values.contiguous(memory_format=backends.memory_format(values))
    return implementation(dense).runs_of(dense)  # type: ignore[no-any-return]


@fake("count_runs")
def _(values: Tensor) -> Tensor:
    return values.new_empty(runs_shape(values.shape), dtype=torch.uint8)


def count_joined_runs(values: Tensor) -> Tensor:
    """`count_runs` of an operand [N, C, *grid] as if it were [rows, C]: runs go on from sample to sample."""
    if values.dim() == 2 or backends.lies_last(values):
        return count_runs(values.movedim(1, -1).flatten(0, -2))  # type: ignore[no-any-return]
    channels = values.shape[1]
    apart = count_runs(values.flatten(2).transpose(0, 1).reshape(channels, 1, values[:, 0].numel()))
    joined: Tensor = apart.transpose(0, 1)
    return joined


@op()
def lane_profile(runs: Tensor) -> Tensor:
    """`lanes.profile`: int64 [len(LANE_CONFIGS)], on the device of the runs; the host waits for nothing."""
    return implementation(runs).profile(runs)  # type: ignore[no-any-return]


@fake("lane_profile")
def _(runs: Tensor) -> Tensor:
    return runs.new_empty(len(LANE_CONFIGS), dtype=torch.int64)
