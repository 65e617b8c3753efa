"""Time with a bandwidth, power while multipliers wait, and operands that serve few multiplications, by hand."""

from __future__ import annotations

import pytest
import torch

import lnpu_torch as lnpu
from helpers.handmade import counts, network, step, variant
from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.schema import Calls, StepCounts
from lnpu_torch.counts.vector_ops import VectorOp, VectorOpCounts
from lnpu_torch.files import ConfigError
from lnpu_torch.hardware.chip import Chip, chip


def test_a_layer_takes_the_longest_of_multipliers_and_dram() -> None:
    slow, fast = variant(dram_bytes_per_s=3.2e9), variant(dram_bytes_per_s=12.8e9)
    (row,) = price(counts(step()), slow).rows
    assert row.time_cycles == row.dram_cycles == pytest.approx(238 / 8 / 3.2e9 * 50e6)
    assert row.bound == "DRAM"
    (row,) = price(counts(step()), fast).rows
    assert row.dram_cycles == pytest.approx(238 / 8 / 12.8e9 * 50e6)
    busy = step(pairs=((0, 0, 0), (0, 10**6, 0), (0, 0, 0)), padding=0)
    (row,) = price(counts(busy), slow).rows
    assert (row.time_cycles, row.bound) == (row.cycles, "multipliers")
    assert row.cycles == 10**6 / 1536


def test_the_steps_of_a_backward_share_its_time() -> None:
    """DRAM fetches for one step while the other multiplies."""
    busy = step("grad_input", pairs=((0, 0, 0), (0, 10**6, 0), (0, 0, 0)), padding=0)
    report = price(counts(busy, step("grad_weight")), "lnpu")
    multiplies, fetches = report.rows
    assert report.time_s == pytest.approx((multiplies.cycles + fetches.cycles) / 50e6)
    assert fetches.dram_cycles > fetches.cycles


@pytest.mark.parametrize("bound", ["multipliers", "SIMD", "DRAM"])
def test_times_of_rows_add_up_to_the_runs(bound: str) -> None:
    chips = {
        "multipliers": {"dram_bytes_per_s": 1e15, "simd.operations_per_cycle": 1e9},
        "SIMD": {"dram_bytes_per_s": 1e15, "simd.operations_per_cycle": 1e-3},
        "DRAM": {"dram_bytes_per_s": 1e3, "simd.operations_per_cycle": 1e9},
    }
    relu = VectorOp(
        **{"kind": "activation", "phase": "forward", "op": "relu", "layer": "conv1"},
        **{"calls": 1, "read": 4, "written": 4, "operations": 4, "special": 0},
    )
    run = network().model_copy(update={"vector_ops": VectorOpCounts(entries=(relu,))})
    report = price(run, chip("lnpu").with_values(chips[bound]))
    assert report.total.bound == bound
    for grouped in (report, report.by("layer"), report.by("step")):
        assert sum(row.time_cycles for row in grouped.rows) / 50e6 == pytest.approx(report.time_s)
        assert sum(row.energy_zj["idle"] for row in grouped.rows) == report.total.energy_zj["idle"]


def dense(macs: int = 10**9) -> StepCounts:
    return step(pairs=((0, 0, 0), (0, macs, 0), (0, 0, 0)), padding=0)


def test_waiting_costs_energy() -> None:
    """At full speed a MAC's energy has all in it; memory at a tenth of the speed takes nine times as long to wait."""
    full = price(counts(dense()), "lnpu")
    assert full.total.idle_energy_pj == pytest.approx(0, abs=1)
    bandwidth = full.total.dram_bits / 8 / full.time_s / 10
    waits = price(counts(dense()), chip("lnpu").with_values({"dram_bytes_per_s": bandwidth}))
    assert waits.time_s == pytest.approx(10 * full.time_s)
    assert waits.total.idle_energy_pj == pytest.approx(8.6e-3 * 9 * full.time_s * 1e12)
    background = 10e-3 * 9 * full.time_s * 1e12
    assert waits.total.dram_energy_pj == pytest.approx(full.total.dram_energy_pj + background)


def test_the_lowest_voltage_does_not_win_where_multipliers_wait() -> None:
    """Waiting for lanes goes with the clock; its power with the square of the voltage, so that slow is dear."""
    waiting = chip("lnpu").with_values({"lanes.count": 16, "energy.idle_w": 17.2e-3})
    low, high = (price(counts(dense()), waiting.with_values({"operating_point.voltage_v": v})) for v in (0.78, 1.1))
    assert low.total.energy_pj < high.total.energy_pj  # all multipliers work
    seconds = [1 / report.clock_hz for report in (low, high)]
    powers = [waiting.with_values({"operating_point.voltage_v": v}).idle_w for v in (0.78, 1.1)]
    assert powers == pytest.approx([17.2e-3, 17.2e-3 * (1.1 / 0.78) ** 2])
    assert powers[0] * seconds[0] > powers[1] * seconds[1]


def told(run: lnpu.Counts, on: str | Chip) -> str:
    (note,) = (note for note in price(run, on).notes if note.startswith("power:"))
    return note


def test_a_report_says_where_power_leaves_what_is_known() -> None:
    assert told(counts(dense()), "lnpu") == "power: 44.16 mW on average"
    hot = variant().with_values({"energy.fp8_mac_pj": 5.75})
    assert told(counts(dense()), hot) == (
        "power: 441.6 mW on average, outside the chip's 43.1 mW ... 367 mW; 1 of 1 passes draw more than its 43.1 mW "
        "at this voltage, at most 441.6 mW (conv1, forward)"
    )
    cold = variant().with_values({"energy.fp8_mac_pj": 0.0575})
    assert told(counts(dense()), cold) == "power: 4.416 mW on average, outside the chip's 43.1 mW ... 367 mW"
    assert not [note for note in price(counts(), "lnpu").notes if "power" in note]


def test_a_chip_that_waits_with_all_its_power_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"energy.idle_w is no less than the chip's whole power, 0\.0431 W"):
        chip("lnpu").with_values({"energy.idle_w": 0.05})


READ, FP16, FP8 = 0.3195, 18, 10  # pJ a bit, and bits


def test_a_weight_that_serves_one_multiplication_is_read_for_it() -> None:
    """Linear(100, 60) at batch 1: each weight meets one input, each input 60 weights, where a MAC's energy has 48."""
    pairs = ((7, 0, 0), (0, 1000, 2000), (0, 500, 2493))
    macs = 6000
    call = Calls(count=1, sizes=(100, 6000, 60), first=(10, 50, 40), second=(7, 1500, 4493), macs=macs, pairs=pairs)
    entry = step(pairs=pairs, padding=0, first=call.first, second=call.second, result=60)
    known, unknown = entry.model_copy(update={"by_size": (call,)}), entry
    with_reads, without = (price(counts(each), "lnpu").rows[0] for each in (known, unknown))
    extra = with_reads.sram_energy_pj - without.sram_energy_pj
    bits = 1500 * FP8 + 4493 * FP16  # of the weights that inputs met which were not zero
    assert extra == pytest.approx(bits * READ * (1 - 1 / 48), rel=1e-6)
    assert with_reads.sram_bits == without.sram_bits  # those that come from DRAM and go there


@pytest.mark.parametrize(("batch", "extra"), [(1, 1 - 1 / 48), (12, 1 / 12 - 1 / 48), (48, 0), (96, 0)])
def test_a_batch_that_is_large_enough_reads_no_weight_again(batch: int, extra: float) -> None:
    torch.manual_seed(0)
    model = lnpu.convert(torch.nn.Sequential(torch.nn.Linear(128, 96)), "fp16")
    with lnpu.CostCounter(model) as cost, torch.no_grad():
        model(torch.randn(batch, 128))
    fp16 = chip("dense-fp16")
    (row,) = price(cost.counts, fp16).of_layers().rows
    old = cost.counts.model_copy(update={"steps": tuple(_without_pairs(entry) for entry in cost.counts.steps)})
    (without,) = price(old, fp16).of_layers().rows
    more = row.sram_energy_pj - without.sram_energy_pj
    assert more == pytest.approx(128 * 96 * batch * 16 * READ * extra, rel=1e-6, abs=1e-6)


def _without_pairs(entry: StepCounts) -> StepCounts:
    by_size = tuple(each.model_copy(update={"pairs": None, "macs": None}) for each in entry.by_size)
    return entry.model_copy(update={"by_size": by_size})


def test_a_depthwise_layer_reads_each_input_for_nine_multiplications() -> None:
    model = lnpu.convert(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8, bias=False)), "fp16")
    with lnpu.CostCounter(model) as cost, torch.no_grad():
        model(torch.randn(4, 8, 34, 34))
    (row,) = price(cost.counts, "dense-fp16").of_layers().rows
    filled = price(
        cost.counts.model_copy(update={"steps": tuple(map(_without_pairs, cost.counts.steps))}), "dense-fp16"
    )
    more = row.sram_energy_pj - filled.of_layers().rows[0].sram_energy_pj
    reuse = 9 * 32 * 32 / 34**2  # less at the border
    assert more == pytest.approx(row.macs * 16 * READ * (1 / reuse - 1 / 48), rel=1e-6)


def test_a_chip_of_one_power_has_no_range_to_leave() -> None:
    """A V100 whose tensor cores all work draws its 300 W; one that waits for DRAM draws less, which is no news."""
    entry = step(pairs=((0, 0, 0), (0, 0, 0), (0, 0, 10**12)), padding=0)
    assert "power: 300 W on average" in price(counts(entry), "v100").notes
    (told,) = (note for note in price(counts(step()), "v100").notes if note.startswith("power"))
    assert told.startswith("power: ") and told.endswith("W on average")
