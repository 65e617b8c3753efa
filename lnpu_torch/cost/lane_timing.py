"""How long a chip's lanes take in a step, from the counts' lane profiles."""

from __future__ import annotations

from collections.abc import Sequence

from lnpu_torch.cost.cost_row import CostRow, LaneCycles
from lnpu_torch.counts.lane_configs import LaneConfig
from lnpu_torch.counts.schema import OPERANDS, StepCounts
from lnpu_torch.hardware.chip import Chip


def lane_cycles(entry: StepCounts, chip: Chip, ideal: float) -> LaneCycles | None:
    """Cycles of a step that takes `ideal` ones with every lane busy; None if its lane profile was not recorded.

    A lane's work is its non-zeros of the streamed operand, FP8 and wider ones alike. Where zeros of both operands are
    skipped, those of the other one are assumed to be spread evenly. Where none are, or the chip's
    lanes are not known, no lane waits.
    """
    policy, lanes = getattr(chip.skip, entry.step).value, chip.lanes
    profile = (entry.second if policy == OPERANDS[entry.step][1] else entry.first).lanes
    if policy == "none" or not ideal or lanes is None:
        return LaneCycles(ideal, ideal, ideal)
    if profile is None:
        return None
    if not profile.work:
        return LaneCycles(ideal, ideal, ideal)
    configs = [
        LaneConfig(lanes.sync_interval.value, group, lanes.count.value) for group in (lanes.balance_group.value, 1)
    ]
    return LaneCycles(ideal, *(ideal * profile.lane_cycles(config) / profile.work for config in configs))


def not_recorded(rows: Sequence[CostRow]) -> list[str]:
    """What a report says if the lane profiles of some rows were not recorded."""
    run = [row for row in rows if row.cycles]
    unknown = [row for row in run if not row.lanes]
    some = "" if len(unknown) == len(run) else f" for {len(unknown)} of {len(run)} rows"
    return [f"utilisation not recorded{some}: their cycles assume that every lane is busy"] if unknown else []
