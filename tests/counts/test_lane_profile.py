"""Lane profiles in counts and prices: sums, files, what lies between LANE_CONFIGS, and cycles worked by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import lnpu_torch as lnpu
from helpers.handmade import counts, lanes, network, step, variant, with_lanes
from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.lane_configs import LANE_CONFIGS, LANES, LaneConfig
from lnpu_torch.counts.lane_profile import LaneProfile
from lnpu_torch.counts.schema import Counts, StepCounts
from lnpu_torch.files import ConfigError
from lnpu_torch.hardware.chip import chip
from lnpu_torch.nn.layer_state import LayerState
from lnpu_torch.nn.reads import OperandPlan
from lnpu_torch.ops.quantize.reference import Rounded

APART = lnpu.Precision(input="fp8", grad_output="fp8", grad_weight={"input": None, "grad_output": None})
"""grad_weight reads in float what the other steps round, the smallest values to zero."""
WORK = 5  # non-zeros of handmade steps' first operand; 8 of the second


def recorded(entry: StepCounts | None = None) -> StepCounts:
    """A step whose lanes take 10 lane-cycles by 16 with balancer (1/2), for 20 (1/4) by 16 without."""
    return with_lanes(entry or step(), first=lanes(64, WORK, lambda config: 10 if config.balance_group == 4 else 20))


def test_cycles_are_those_of_the_fullest_lane() -> None:
    (row,) = price(counts(recorded()), "lnpu").rows
    (ideal,) = price(counts(step()), "lnpu").rows
    assert (row.utilisation, row.unbalanced_utilisation) == (0.5, 0.25)
    # 64 channels fill 16 lanes; 8 weights are less than one for each of them, so that one of 96 or 48 multipliers works
    assert ideal.cycles == 15 / 1536 + 24 / 768
    assert row.cycles == pytest.approx(2 * (15 / 16 + 24 / 16))
    assert row.array_use == pytest.approx(ideal.cycles / ((15 + 24) / 16))
    assert all(row.energy_zj[part] == ideal.energy_zj[part] for part in ("mac", "sram"))
    assert row.energy_zj["idle"] > ideal.energy_zj["idle"]
    (off,) = price(counts(recorded()), variant(lanes__balance_group=1)).rows
    assert (off.cycles, off.utilisation, off.unbalanced_utilisation) == (2 * row.cycles, 0.25, 0.25)
    (slow,) = price(counts(recorded()), "lnpu-fp16").rows
    assert (slow.cycles, slow.utilisation) == (pytest.approx(2 * 39 / 16), 0.5)


@pytest.mark.parametrize(
    ("channels", "values", "busy"),
    [
        (16, 48, 1.0),
        (3, 48, 3 / 16),  # a first layer
        (17, 48, 17 / 32),  # one channel too many
        (32, 9, 9 / 48),  # depthwise, 3 x 3
        (64, 49, 49 / 96),
        (10, 10, 100 / 768),  # Linear(10, 10)
    ],
)
def test_the_array_is_as_busy_as_the_layer_is_wide(channels: int, values: int, busy: float) -> None:
    assert chip("dense-fp16").cycles(0, 768, channels, values) == pytest.approx(1 / busy)


def test_a_depthwise_layer_meets_one_filter() -> None:
    model = lnpu.convert(torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, groups=32)), "fp16")
    with lnpu.CostCounter(model) as cost:
        model(torch.randn(1, 32, 10, 10, requires_grad=True)).sum().backward()
    for row in price(cost.counts, "dense-fp16").of_layers().rows:
        assert row.array_use == pytest.approx(9 / 48)


def test_the_chips_lanes_and_runs_choose_the_entry() -> None:
    entry = with_lanes(step(), first=lanes(1024, WORK, lambda config: 1000 * config.sync_interval + config.lanes))
    for interval, count in ((16, 64), (64, 16), (256, 1024)):
        (row,) = price(counts(entry), variant(lanes__sync_interval=interval, lanes__count=count)).rows
        assert row.utilisation == pytest.approx(WORK / (1000 * interval + count))


def test_a_chip_that_skips_nothing_is_busy() -> None:
    for entry in (step(), recorded()):
        report = price(counts(entry), "dense-fp16")
        assert (report.total.utilisation, report.total.unbalanced_utilisation) == (1.0, 1.0)
        assert not any("not recorded" in note for note in report.notes)


def test_the_streamed_operand_is_the_one_whose_zeros_are_skipped() -> None:
    both = with_lanes(step("grad_weight"), first=lanes(64, WORK, lambda _: 10), second=lanes(64, 8, lambda _: 80))
    for policy, utilisation in (("input", 0.5), ("grad_output", 0.1), ("both", 0.5), ("none", 1.0)):
        (row,) = price(counts(both), variant(skip__grad_weight=policy)).rows
        assert row.utilisation == pytest.approx(utilisation)
    (weights,) = price(counts(recorded()), variant(skip__forward="weight")).rows
    assert weights.utilisation is None


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    report = price(network(), "lnpu")
    assert report.total.utilisation is None
    assert "utilisation not recorded: their cycles assume that every lane is busy" in report.notes
    some = price(counts(recorded(), step(layer="fc")), "lnpu")
    assert [row.utilisation for row in (*some.rows, some.total)] == [0.5, None, 0.5]
    assert any("not recorded for 1 of 2 rows" in note for note in some.notes)
    assert "lanes busy" in str(some) and "balancer off" in str(some) and "lanes busy" not in str(report)
    (tmp_path / "old.json").write_text(json.dumps({**json.loads(network().model_dump_json()), "version": 1}))
    assert price(Counts.load(tmp_path / "old.json"), "lnpu") == report


def test_what_was_not_run_has_no_utilisation() -> None:
    idle = step("grad_input", pairs=((0, 0, 0),) * 3, padding=0, not_run=55, first=(0, 0, 0), second=(0, 0, 0))
    empty = with_lanes(idle, first=lanes(64, 0, lambda _: 0))
    report = price(counts(recorded(), empty), "lnpu")
    assert [row.utilisation for row in (*report.rows, report.total)] == [0.5, None, 0.5]
    assert not any("not recorded" in note for note in report.notes)


def test_sums_and_files(tmp_path: Path) -> None:
    entry = recorded()
    twice = counts(entry) + counts(entry)
    assert twice.steps[0].first.lanes.cycles_by_config == tuple(2 * n for n in entry.first.lanes.cycles_by_config)  # type: ignore[union-attr]
    assert price(twice, "lnpu").total.utilisation == 0.5
    assert (counts(entry) + counts(step())).steps[0].first.lanes is None
    apart = counts(entry) + counts(with_lanes(step(), first=lanes(32, WORK, lambda _: 10)))
    profiles = [(each.layer, each.first.lanes.channels) for each in apart.steps if each.first.lanes]
    assert profiles == [(entry.layer, 64), (f"{entry.layer} (2)", 32)]
    twice.save(tmp_path / "counts.json")
    assert Counts.load(tmp_path / "counts.json") == twice
    text = (tmp_path / "counts.json").read_text()
    assert f'"cycles_by_config": [{",".join(map(str, twice.steps[0].first.lanes.cycles_by_config))}]' in text  # type: ignore[union-attr]
    assert "null" not in text


def test_profiles_that_do_not_add_up() -> None:
    with pytest.raises(ConfigError, match="lanes have 6 non-zeros, and elements 5"):
        with_lanes(step(), first=lanes(64, 6, lambda _: 10))
    with pytest.raises(ValidationError, match="one lane"):
        LaneProfile(channels=2, cycles_by_config=tuple(range(len(LANE_CONFIGS))))
    with pytest.raises(ValidationError, match="cycles_by_config"):
        LaneProfile(channels=2, cycles_by_config=(1, 2, 3))


def by_share(channels: int, share: dict[int, float]) -> LaneProfile:
    """A profile whose lanes take `share[k]` in each pass of k channels."""

    def cycles(config: LaneConfig) -> int:
        rest = channels % config.lanes
        return round((channels - rest) * share.get(config.lanes, 0) + (rest and rest * share[rest]))

    return lanes(channels, round(channels * share[1]), cycles)


def test_between_the_configs() -> None:
    share = {1: 100.0, 2: 150.0, 4: 190.0, 8: 220.0, 16: 240.0}
    profile = by_share(16, share)
    assert [profile.lane_cycles(LaneConfig(16, 1, k)) for k in share] == [16 * value for value in share.values()]
    three = 150 + 40 * log2(3 / 2)
    assert profile.lane_cycles(LaneConfig(16, 1, 3)) == pytest.approx(
        15 * three + 100
    )  # five passes of three channels, one of one
    twelve = 220 + 20 * log2(12 / 8)
    assert profile.lane_cycles(LaneConfig(16, 1, 12)) == pytest.approx(12 * twelve + 4 * 190)
    assert (
        profile.lane_cycles(LaneConfig(16, 1, 17))
        == profile.lane_cycles(LaneConfig(16, 1, 768))
        == profile.lane_cycles(LaneConfig(16, 1, LANES))
        == 16 * 240
    )


def test_between_the_configs_with_a_rest() -> None:
    share = {1: 100.0, 2: 150.0, 4: 190.0, 8: 220.0, 12: 230.0}
    profile = by_share(12, share)
    six = 190 + 30 * log2(6 / 4)
    assert profile.lane_cycles(LaneConfig(64, 1, 6)) == pytest.approx(12 * six)
    ten = 220 + 10 * log2(10 / 8) / log2(12 / 8)
    assert profile.lane_cycles(LaneConfig(64, 1, 10)) == pytest.approx(10 * ten + 2 * 150)
    assert profile.lane_cycles(LaneConfig(64, 1, 13)) == 12 * 230


def test_nothing_between_the_configs() -> None:
    assert lanes(10, 0, lambda _: 0).lane_cycles(LaneConfig(16, 4, 12)) == 0


def test_more_lanes_that_do_more_take_no_longer() -> None:
    torch.manual_seed(0)
    model = lnpu.convert(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(48, 8, 3)), "fgmp")
    with lnpu.CostCounter(model) as cost:
        model(torch.randn(2, 48, 20, 20)).sum().backward()
    times = []
    for count in (4, 8, 12, 16, 24, 48, 64, 96, 256, 1024):
        macs = {"macs_per_cycle__fp16": 48 * count, "macs_per_cycle__fp8": 96 * count}
        times.append(price(cost.counts, variant(lanes__count=count, **macs)).mac_time_s)
    assert all(more <= less * (1 + 1e-12) for less, more in pairwise(times))
    assert chip("lnpu").lanes.count.value * 48 == chip("lnpu").macs_per_cycle.fp16.value


def test_an_operand_that_two_steps_read_alike_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    measured, quantize = [], LayerState.quantize

    def noting(self: LayerState, x: Tensor, plan: OperandPlan, *rest: Any) -> Rounded:
        measured.extend([plan] if plan.request.wanted[3] else [])
        return quantize(self, x, plan, *rest)

    monkeypatch.setattr(LayerState, "quantize", noting)
    for precision, times in ((lnpu.Precision(input="fp8", grad_output="fp8"), 2), (APART, 4)):
        measured.clear()
        layers = [torch.nn.Linear(40, 30), torch.nn.Linear(30, 20)]
        model = lnpu.convert(torch.nn.Sequential(*layers), precision)
        with lnpu.CostCounter(model) as cost:
            (model((torch.randn(50, 40).exp() ** 3).requires_grad_()) ** 3).sum().backward()
        forward, grad_input, grad_weight = (entry for entry in cost.counts.steps if entry.layer == "1")
        assert len(measured) == times * len(layers)
        for mine, other in ((forward.first, grad_weight.first), (grad_input.first, grad_weight.second)):
            assert mine.lanes and other.lanes
            assert (mine.lanes == other.lanes) == (times == 2)
            assert mine.lanes.work == sum(mine.elements[1:]) <= other.lanes.work == sum(other.elements[1:])
