"""`Backend.count` on a GPU: one launch for all that a pass of a layer counts. Nothing here waits for the device."""

from __future__ import annotations

from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS
from lnpu_torch.kernels import count as kernels
from lnpu_torch.kernels import lanes
from lnpu_torch.ops.pair_counts.reference import ROWS, WIDTH, StepCounters, row_of
from lnpu_torch.ops.quantize.reference import Rounded
from lnpu_torch.ops.reference import GridStep, WeightStep, call_sizes


def takes(geometry: tuple[int, ...]) -> bool:
    """Whether the kernel counts steps of such sizes."""
    taken: bool = kernels.takes(geometry)
    return taken


def count(
    geometry: tuple[int, ...], weight: WeightStep | None, grids: GridStep | None, thresholds: Tensor | None
) -> None:
    """`Backend.count` of at least one step."""
    by_weight = by_grids = profile = known = to = None
    if weight is not None:
        to, operand = weight.to, weight.operand
        at = _counter_at(to, call_sizes(geometry, weight.side, "weight"))
        by_weight = kernels.WeightStep(at, weight.position, weight.weight, weight.side)
        if operand.runs is not None:
            profile = kernels.Profile(operand.runs, _lanes_at(to.step, 0), operand.lanes)
        elif operand.lanes is not None:
            known = kernels.Known(operand.lanes, _lanes_at(to.step, 0))
        if weight.kept is not operand:
            fill(weight.kept)
    if grids is not None:
        to, error = grids.to, grids.error
        second = "conv_output" if grids.first == "conv_input" else "conv_input"
        at = _counter_at(to, call_sizes(geometry, grids.first, second))
        by_grids = kernels.GridStep(at, grids.conv_input, grids.conv_output, grids.first)
        lanes_at = _lanes_at(to.step, 1)
        if error.runs is not None and weight is None:
            profile = kernels.Profile(error.runs, lanes_at)
        elif error.runs is not None and profile is not None and profile.runs is error.runs:
            profile = kernels.Profile(error.runs, profile.at, to.lanes, lanes_at)
        elif error.lanes is not None:
            fill(error)
            to.lanes[to.step, 1].add_(error.lanes)
        if grids.lanes is not None and known is None:
            known = kernels.Known(grids.lanes, _lanes_at(to.step, 0))
        elif grids.lanes is not None:
            to.lanes[to.step, 0].add_(grids.lanes)
    assert to is not None
    kernels.count(to.counters, to.lanes, geometry, by_weight, by_grids, profile, known, thresholds)


def fill(operand: Rounded | None) -> None:
    """Make an operand's lane profile of its runs now."""
    if operand is not None and operand.runs is not None and operand.lanes is not None:
        operand.lanes.copy_(lanes.profile(operand.runs))


def _counter_at(to: StepCounters, call: tuple[int, ...]) -> int:
    """The element at which the counter of a call begins."""
    return (to.step * ROWS + row_of(to.sizes[to.step], call)) * WIDTH


def _lanes_at(step: int, operand: int) -> int:
    return (2 * step + operand) * len(LANE_CONFIGS)
