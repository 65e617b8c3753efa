"""The lane profile of a streamed operand, in plain torch: how long lanes side by side are held by their fullest one.

Lane i of L takes channels i, i + L, i + 2 L ...; the last pass may leave lanes without a channel. In each pass, after
each run, all lanes wait for the fullest. An entry of a profile is in lane-cycles, one per non-zero: over all passes and
runs, the lanes that have a channel times the non-zeros of the fullest. So utilisation is non-zeros over lane-cycles.
Lanes without a channel count neither as working nor as waiting: a chip that skips nothing has them idle just as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch.counts.lane_configs import BALANCE_GROUPS, LANE_CONFIGS, LANES, RUN, SYNC_INTERVALS
from lnpu_torch.ops.memory_format import lies_last


def runs_of(values: Tensor) -> Tensor:
    """Non-zeros of each run of 16 positions of a channel: [N, C, *grid] -> uint8 [N, C, ceil(positions / 16)].

    Positions are in row-major order of the grid; the last run of a sample may be shorter. Of a tensor without a grid,
    [rows, C], the rows are the positions: uint8 [1, C, ceil(rows / 16)].
    """
    positions = values.T[None] if values.dim() == 2 else values.flatten(2)
    return _joined(positions != 0, RUN, torch.uint8)


def joined_runs(values: Tensor, runs_of: Callable[[Tensor], Tensor] = runs_of) -> Tensor:
    """The runs of an operand [N, C, *grid] as if it were [rows, C]: they go on from sample to sample.

    Args:
        runs_of: counts them, as the function above.
    """
    if values.dim() == 2 or lies_last(values):
        return runs_of(values.movedim(1, -1).flatten(0, -2))
    channels = values.shape[1]
    return runs_of(values.flatten(2).transpose(0, 1).reshape(channels, 1, values[:, 0].numel())).transpose(0, 1)


def profile(runs: Tensor) -> Tensor:
    """Lane-cycles of every member of the family, int64 [len(LANE_CONFIGS)], from `runs_of` an operand."""
    if not runs.numel():
        return runs.new_zeros(len(LANE_CONFIGS), dtype=torch.int64)
    entries = []
    for run in SYNC_INTERVALS:
        work = _joined(runs, run // RUN, torch.int16)
        for balancer in BALANCE_GROUPS:
            entries += _over_lanes(_shared(work, balancer), work.shape[1], balancer)
    return torch.stack(entries)


def _joined(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Sums of every `length` neighbours in the last dimension."""
    padded = F.pad(x, (0, -x.shape[2] % length))
    parts: Tensor = padded.unflatten(2, (padded.shape[2] // length, length))
    return parts.sum(3, dtype=dtype)


def _shared(work: Tensor, balancer: int) -> Tensor:
    """Each group's work, shared by its lanes: the mean, rounded up; [N, C, T] -> [N, groups, T]."""
    channels = work.shape[1]
    full = channels - channels % balancer
    parts = [work[:, :full].unflatten(1, (-1, balancer))] if full else []
    parts += [work[:, None, full:]] if full < channels else []
    return torch.cat([(part.sum(2, dtype=torch.int16) + part.shape[2] - 1) // part.shape[2] for part in parts], 1)


def _over_lanes(work: Tensor, channels: int, lanes: int) -> list[Tensor]:
    """Lane-cycles for `lanes` and its doubles, from each group's work [N, groups, T]; a tree of pairwise maxima."""
    entries = []
    while True:
        passes = work.sum((0, 2), dtype=torch.int64)  # cycles of each pass
        entries.append(lanes * passes.sum() - (-channels % lanes) * passes[-1])
        if lanes == LANES:
            return entries
        work = F.pad(work, (0, 0, 0, work.shape[1] % 2)).unflatten(1, (-1, 2)).amax(2)
        lanes *= 2
