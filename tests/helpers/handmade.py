"""Counts and chips made by hand, small enough to price on paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lnpu_torch.counts.lane_configs import LANE_CONFIGS, LaneConfig
from lnpu_torch.counts.lane_profile import LaneProfile
from lnpu_torch.counts.schema import Counts, StepCounts
from lnpu_torch.files import validate
from lnpu_torch.hardware.chip import Chip, chip

PAIRS = ((1, 2, 3), (4, 5, 6), (7, 8, 9))
"""Multiplications by group (zero, fp8, wide) of the first operand, and of the second."""


def step(
    step: str = "forward",
    layer: str = "conv1",
    pairs: Any = PAIRS,
    padding: int = 10,
    not_run: int = 0,
    first: tuple[int, int, int] = (5, 3, 2),
    second: tuple[int, int, int] = (0, 6, 2),
    wide: tuple[str, str] = ("fp16", "fp16"),
    result: int = 6,
    calls: int = 1,
    passed: tuple[int, int, int] | None = None,
) -> StepCounts:
    sizes = (sum(first) // calls, sum(second) // calls, result)
    call = {"count": calls, "sizes": sizes, "first": first, "second": second, "passed": passed}
    by_size = [call] if any(first) else []
    data = {
        "layer": layer,
        "kind": "Conv2d",
        "step": step,
        "calls": calls,
        "macs": sum(map(sum, pairs)) + padding + not_run,
        "padding": padding,
        "not_run": not_run,
        "pairs": pairs,
        "first": {"wide": wide[0], "elements": first},
        "second": {"wide": wide[1], "elements": second},
        "by_size": by_size,
    }
    return validate(StepCounts, data, "handmade")


def counts(*steps: StepCounts) -> Counts:
    return Counts(steps=steps)


def network(times: int = 1) -> Counts:
    """Two layers: the first one's grad_input was not run, the second one's weight is in float.

    With `times` as many multiplications of the same elements it takes longer than its bits do.
    """
    found = counts(
        step(),
        step("grad_input", pairs=((0, 0, 0),) * 3, padding=0, not_run=55, first=(0, 0, 0), second=(0, 0, 0)),
        step("grad_weight", pairs=((9, 8, 7), (6, 5, 4), (3, 2, 1))),
        step(layer="fc", padding=0, wide=("fp16", "fp32")),
        step("grad_input", layer="fc", padding=0, pairs=((90, 0, 3), (0, 1, 0), (1, 1, 0)), wide=("fp16", "fp32")),
        step("grad_weight", layer="fc", padding=0),
    )
    return found.model_copy(update={"steps": tuple(_busier(entry, times) for entry in found.steps)})


def _busier(entry: StepCounts, times: int) -> StepCounts:
    pairs = tuple(tuple(times * macs for macs in row) for row in entry.pairs)
    sums = {name: times * getattr(entry, name) for name in ("macs", "padding", "not_run")}
    return entry.model_copy(update={"pairs": pairs, **sums})


def bottom_up() -> Chip:
    """LNPU, by the bottom-up model."""
    return chip("lnpu").with_values({"energy_model": "bottom_up"})


def variant(**values: object) -> Chip:
    """LNPU with other values, by dotted key with `__` for the dot."""
    data = chip("lnpu").model_dump()
    for key, value in values.items():
        *path, last = key.split("__")
        place = data
        for part in path:
            place = place[part]
        place[last] = value if value is None else {**place[last], "value": value}
    return validate(Chip, data, "variant")


def lanes(channels: int, work: int, cycles: Callable[[LaneConfig], int]) -> LaneProfile:
    """A lane profile with so much work, and `cycles` lane-cycles for each configuration of more than one lane."""
    entries = tuple(work if config.lanes == 1 else cycles(config) for config in LANE_CONFIGS)
    return LaneProfile(channels=channels, cycles_by_config=entries)


def with_lanes(entry: StepCounts, **profiles: LaneProfile) -> StepCounts:
    """A step whose operands, "first" or "second", have lane profiles."""
    data = entry.model_dump()
    for name, profile in profiles.items():
        data[name]["lanes"] = profile.model_dump()
    return validate(StepCounts, data, "handmade")
