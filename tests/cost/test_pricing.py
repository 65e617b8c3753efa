from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lnpu_torch as lnpu
from helpers.handmade import bottom_up, counts, network, step, variant
from helpers.paths import ROOT
from lnpu_torch.cost.comparison import Comparison
from lnpu_torch.cost.cost_row import CostRow
from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import ConfigError, builtin_names
from lnpu_torch.hardware.chip import Chip, chip
from lnpu_torch.profiler.cost_counter import CostCounter

E8, E16, SKIP = 0.575, 1.15, 0.024  # pJ, as in lnpu.yaml
CHIPS = builtin_names("chips")


def one(entry: Any, on: str | Chip = "lnpu") -> CostRow:
    (row,) = price(counts(entry), on).rows
    return row


def test_lnpu_skips_zero_inputs_and_streams_them_in_fp8() -> None:
    row = one(step())
    assert (row.macs, row.executed, row.skipped, row.padding, row.not_run) == (55, 39, 6, 10, 0)
    assert row.pairs == {"fp8*zero": 4, "fp8*fp8": 5, "fp8*fp16": 6, "fp16*zero": 7, "fp16*fp8": 8, "fp16*fp16": 9}
    assert row.mac_energy_pj == pytest.approx(15 * E8 + 24 * E16 + 6 * SKIP)
    assert row.cycles == 15 / 1536 + 24 / 768
    assert (row.zero_share, row.fp8_share) == (5 / 10, 3 / 5)
    assert (row.layer, row.kind, row.step) == ("conv1", "Conv2d", "forward")


POLICIES = [
    # forward's policy, executed, FP8 MACs, FP16 MACs, skipped and as such padding, zero share, FP8 share
    ("input", 39, 15, 24, 16, 5 / 10, 3 / 5),
    ("both", 28, 11, 17, 27, 5 / 10, 3 / 5),
    ("none", 45, 6 + 15 + 10, 24, 0, 5 / 10, 3 / 5),  # padding runs, as a streamed zero: an FP8 code
    ("weight", 33, 15, 18 + 10, 12, 0.0, 6 / 8),  # padding runs: a zero times a streamed value taken as FP16
]


@pytest.mark.parametrize(("policy", "executed", "fp8", "fp16", "skipped", "zero_share", "fp8_share"), POLICIES)
def test_skip_policies(
    policy: str, executed: int, fp8: int, fp16: int, skipped: int, zero_share: float, fp8_share: float
) -> None:
    row = one(step(), variant(skip__forward=policy, padding="as_zero"))
    assert (row.executed, row.skipped) == (executed, 45 - executed)
    assert row.mac_energy_pj == pytest.approx(fp8 * E8 + fp16 * E16 + skipped * SKIP)
    assert row.cycles == pytest.approx(fp8 / 1536 + fp16 / 768)
    assert (row.zero_share, row.fp8_share) == (zero_share, fp8_share)


@pytest.mark.parametrize(
    ("name", "policy"), [("forward", "weight"), ("grad_input", "weight"), ("grad_weight", "grad_output")]
)
def test_a_skipped_second_operand_is_the_streamed_one(name: str, policy: str) -> None:
    row = one(step(name, wide=("fp16", "fp32")), variant(**{f"skip__{name}": policy}))
    assert row.pairs == {"fp8*zero": 2, "fp8*fp8": 5, "fp8*fp16": 8, "fp32*zero": 3, "fp32*fp8": 6, "fp32*fp16": 9}
    assert row.fp8_share == 6 / 8


@pytest.mark.parametrize(("skip", "fp8", "fp16", "skipped"), [("input", 9, 30, 16), ("none", 12, 33 + 10, 0)])
def test_fp8_only_where_both_operands_are(skip: str, fp8: int, fp16: int, skipped: int) -> None:
    row = one(step(), variant(fp8_pairs="both", skip__forward=skip, padding="as_zero"))
    assert row.mac_energy_pj == pytest.approx(fp8 * E8 + fp16 * E16 + skipped * SKIP)
    assert row.cycles == pytest.approx(fp8 / 1536 + fp16 / 768)


@pytest.mark.parametrize("skip", ["input", "weight", "both", "none"])
def test_free_padding_costs_nothing(skip: str) -> None:
    free = one(step(padding=10), variant(padding="free", skip__forward=skip))
    none = one(step(padding=0), variant(skip__forward=skip))
    zeros = one(step(padding=10), variant(padding="as_zero", skip__forward=skip))
    assert (free.energy_zj, free.cycles) == (none.energy_zj, none.cycles)
    assert (free.padding, none.padding) == (10, 0)
    assert zeros.energy_zj["mac"] == free.energy_zj["mac"] + free.border_zj > free.energy_zj["mac"]
    assert (none.border_zj, zeros.border_zj) == (0, 0)


@pytest.mark.parametrize("name", CHIPS)
def test_no_chip_multiplies_the_border_or_exceeds_its_peak_by_it(name: str) -> None:
    """A dense chip's border is no work: its efficiency is its multipliers' with as much of it as one likes."""
    entry = step(pairs=((0, 0, 0), (0, 0, 0), (0, 0, 10**6)), padding=10**6)
    plain = step(pairs=((0, 0, 0), (0, 0, 0), (0, 0, 10**6)), padding=0)
    bordered, without = price(counts(entry), name), price(counts(plain), name)
    assert bordered.tflops_per_watt == without.tflops_per_watt
    zeros = price(counts(entry), chip(name).with_values({"padding": "as_zero"}))
    if chip(name).energy.skipped_mac_pj.value or chip(name).skip.forward.value == "none":
        assert zeros.tflops_per_watt < without.tflops_per_watt
        assert "outside the image: 50.0% of all MACs, not scheduled; as zeros they would add " in str(bordered)
    assert "outside the image: 50.0% of all MACs, priced as zeros" in str(zeros)
    assert "outside the image" not in str(without)


def test_a_comparison_shows_both_policies() -> None:
    """Without the border chips differ by their MACs; with it, by what each makes of zeros."""
    entry = step(pairs=((0, 0, 0), (0, 0, 0), (0, 0, 10**6)), padding=10**6)
    table = str(Comparison([price(counts(entry), name) for name in ("lnpu-fp16", "dense-fp16")]))
    (line,) = [line.split() for line in table.splitlines() if line.startswith("  dense-fp16") and "..." in line]
    as_zero = (2 * 10**6 * E16) / (10**6 * (E16 + SKIP))
    assert line[-2] == f"{as_zero:.3f}" and float(line[-3]) == pytest.approx(1, abs=0.001)


def test_a_dense_fp16_chip_multiplies_everything() -> None:
    row = one(step(), "dense-fp16")
    assert (row.executed, row.skipped, row.padding) == (45, 0, 10)
    assert row.pairs["zero*zero"] == 1
    assert row.mac_energy_pj == pytest.approx(45 * E16)
    assert row.cycles == pytest.approx(45 / 768)


def test_sparse_inference_skips_in_the_forward_step_only() -> None:
    forward, backward = one(step(), "sparse-inference"), one(step("grad_weight"), "sparse-inference")
    assert forward.mac_energy_pj == pytest.approx(39 * E16 + 6 * SKIP)
    assert backward.mac_energy_pj == pytest.approx(45 * E16)


def test_fp16_chips_skip_alike_but_have_no_fp8_rate() -> None:
    ours, theirs = one(step()), one(step(), "lnpu-fp16")
    assert ours.pairs == theirs.pairs
    assert theirs.mac_energy_pj == pytest.approx(39 * E16 + 6 * SKIP)
    assert theirs.cycles == pytest.approx(39 / 768)


def test_what_was_not_run_costs_nothing() -> None:
    row = one(step(pairs=((0, 0, 0),) * 3, padding=0, not_run=7, first=(0, 0, 0)))
    assert (row.macs, row.not_run, row.executed, row.energy_pj, row.cycles) == (7, 7, 0, 0.0, 0.0)
    assert (row.zero_share, row.fp8_share, row.pairs) == (None, None, {})


def test_float_operands_are_named_and_priced_as_fp16() -> None:
    fp32, fp16 = step(wide=("fp32", "fp16")), step()
    assert one(fp32).energy_pj == one(fp16).energy_pj
    assert one(fp32).pairs["fp32*fp8"] == 8
    assert any("priced as FP16" in note for note in price(counts(fp32), "lnpu").notes)
    assert not any("float" in note for note in price(counts(fp16), "lnpu").notes)


def test_notes_say_what_the_figures_rest_on() -> None:
    fgmp, fp16 = counts(step()), counts(step(first=(1, 0, 2), second=(0, 0, 1)))
    assert any("at 0.78 V, 50 MHz" in note for note in price(fgmp, "lnpu").notes)
    assert any(note.startswith("constants: 1 published, 6 derived") for note in price(fgmp, "lnpu").notes)
    assert any("bottom-up" in note for note in price(fgmp, bottom_up()).notes)
    unknown = step().model_copy(update={"by_size": ()})
    assert any("sizes of some calls were not recorded" in note for note in price(counts(unknown), "lnpu").notes)
    assert one(unknown).dram_bits is one(unknown).sram_energy_pj is None
    assert any("no FP8" in note for note in price(fgmp, "lnpu-fp16").notes)
    assert not any("no FP8" in note for note in price(fgmp, "lnpu").notes)
    assert not any("no FP8" in note for note in price(fp16, "lnpu-fp16").notes)


def test_calibration_dense_fp8() -> None:
    report = price(counts(step(pairs=((0, 0, 0), (0, 10**6, 0), (0, 0, 0)), padding=0)), "lnpu")
    assert report.tflops_per_watt == pytest.approx(3.48, rel=1e-3)
    power_w = report.total.energy_pj * 1e-12 / report.time_s
    assert power_w == pytest.approx(43.1e-3, rel=0.03)  # recalled for 0.78 V, 50 MHz; 0.154 TFLOPS / 3.48 is 44.1


def test_calibration_nine_zeros_in_ten() -> None:
    report = price(counts(step(pairs=((0, 9 * 10**6, 0), (0, 10**6, 0), (0, 0, 0)), padding=0)), "lnpu")
    assert report.tflops_per_watt == pytest.approx(25.3, rel=2e-3)


def test_energy_band_over_the_ratio_of_fp16_to_fp8() -> None:
    report = price(counts(step()), "lnpu")
    ends = [report.total.energy_pj + 24 * (ratio - 2) * E8 for ratio in (1.6, 4)]
    assert report.energy_range_pj == pytest.approx(ends)
    assert report.energy_range == "energy of an FP16 MAC 1.6 ... 4 times an FP8 MAC's"
    ratio = variant().energy.fp16_to_fp8.model_copy(update={"range": None})
    fixed = variant().model_copy(update={"energy": variant().energy.model_copy(update={"fp16_to_fp8": ratio})})
    without = price(counts(step()), fixed)
    assert without.energy_range is None
    assert without.energy_range_pj == (report.total.energy_pj,) * 2


@pytest.mark.parametrize("name", CHIPS)
def test_sums_close(name: str) -> None:
    report = price(network(), name)
    assert report.total.macs == sum(entry.macs for entry in network().steps)
    for grouped in (report.by("layer"), report.by("step")):
        for field in ("macs", "executed", "skipped", "padding", "not_run", "sram_bits", "dram_bits"):
            assert sum(getattr(row, field) for row in grouped.rows) == getattr(report.total, field)
        for part in ("mac", "sram", "idle", "dram"):  # to the last digit
            assert sum(row.energy_zj[part] for row in grouped.rows) == report.total.energy_zj[part] > 0
        on_chip = sum(row.energy_zj[part] for row in grouped.rows for part in ("mac", "sram", "idle"))
        assert on_chip / 10**9 == report.total.energy_pj
        for field in ("cycles", "dram_cycles", "time_cycles"):
            assert sum(getattr(row, field) for row in grouped.rows) == pytest.approx(getattr(report.total, field))
        assert grouped.total.pairs == report.total.pairs
        assert grouped.total.zero_share == report.total.zero_share


def test_saved_counts_are_priced_alike(tmp_path: Path) -> None:
    network().save(tmp_path / "counts.json")
    for name in CHIPS:
        assert price(Counts.load(tmp_path / "counts.json"), name) == price(network(), name)


OF_VERSION_3 = ROOT / "tests" / "old_files" / "counts_of_version_3.json"
OLD_PRICES = {
    "lnpu": {
        "mac": 130315000000,
        "sram": 988359900000,
        "simd": 47104000000,
        "idle": 13669744791666,
        "dram": 47381328125000,
    },
    "lnpu-fp16": {
        "mac": 165390000000,
        "sram": 1116136200000,
        "simd": 47104000000,
        "idle": 13715656250000,
        "dram": 55282656250000,
    },
    "dense-fp16": {
        "mac": 317400000000,
        "sram": 1307088000000,
        "simd": 47104000000,
        "idle": 817000000000,
        "dram": 50559375000000,
    },
    "sparse-inference": {
        "mac": 303888000000,
        "sram": 1116136200000,
        "simd": 47104000000,
        "idle": 13688109375000,
        "dram": 55282656250000,
    },
}
"""A file that knows neither order nor multiplications by size, in zJ."""


@pytest.mark.parametrize("version", [1, 2, 3])
def test_counts_of_older_versions_are_priced_as_far_as_they_know(version: int, tmp_path: Path) -> None:
    data = json.loads(OF_VERSION_3.read_text())
    assert data["version"] == 3 and "slots" in data["steps"][0] and "in_float" in data
    if version < 3:
        del data["in_float"]
    (tmp_path / "counts.json").write_text(json.dumps({**data, "version": version}))
    counts = Counts.load(tmp_path / "counts.json")
    assert {name: price(counts, name).total.energy_zj for name in OLD_PRICES} == OLD_PRICES
    assert price(counts, "lnpu").float_macs == (1000 if version == 3 else None)
    counts.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["version"] == 6
    assert Counts.load(tmp_path / "again.json") == counts


def test_merged_counts_are_priced_as_their_sum() -> None:
    once, twice = price(network(), "lnpu"), price(network() + network(), "lnpu")
    assert len(once.rows) == len(twice.rows)
    assert twice.total.energy_pj == pytest.approx(2 * once.total.energy_pj)
    assert twice.total.zero_share == once.total.zero_share


def test_layers_of_one_name_that_cannot_be_the_same_are_kept_apart() -> None:
    ours, theirs = counts(step()), counts(step(wide=("fp16", "fp32")))
    both = ours + theirs + theirs
    assert [(entry.layer, entry.calls) for entry in both.steps] == [
        (ours.steps[0].layer, ours.steps[0].calls),
        (f"{ours.steps[0].layer} (2)", 2 * theirs.steps[0].calls),
    ]
    total = price(ours, "lnpu").total.energy_pj + 2 * price(theirs, "lnpu").total.energy_pj
    assert price(both, "lnpu").total.energy_pj == pytest.approx(total)


BY_SIZE = {"count": 1, "sizes": [10, 8, 6], "first": [5, 3, 2], "second": [0, 6, 2]}


def _step_key(key: str, value: object) -> Callable[[dict[str, Any]], str]:
    def edit(data: dict[str, Any]) -> str:
        data["steps"][0][key] = value
        return json.dumps(data)

    return edit


DAMAGED: list[tuple[Callable[[dict[str, Any]], str], str]] = [
    (lambda data: json.dumps(data)[:200], "not valid JSON"),
    (lambda data: "", "not valid JSON"),
    (lambda data: "[]", "not a counts file"),
    (lambda data: json.dumps({"steps": data["steps"]}), "not a counts file"),
    (lambda data: json.dumps({**data, "version": 7}), "version 7; this lnpu_torch reads up to 6"),
    (lambda data: json.dumps({**data, "more": 1}), "unknown key 'more'"),
    (lambda data: json.dumps({**data, "steps": data["steps"] * 2}), "stands twice"),
    (_step_key("padding", 11), "macs 55 are not pairs"),
    (_step_key("padding", -1), "padding"),
    (_step_key("calls", 1.5), "calls"),
    (_step_key("by_size", [{**BY_SIZE, "first": [5, 3, 1]}]), "first elements are not the sum"),
    (_step_key("by_size", [{**BY_SIZE, "count": 0}]), "count"),
    (_step_key("by_size", [{**BY_SIZE, "groups": 0}]), "groups"),
    (_step_key("by_size", [{**BY_SIZE, "used": [10, 9, 6]}]), r"\(10, 9, 6\) elements are used of \(10, 8, 6\)"),
    (_step_key("step", "sideways"), "'sideways'"),
    (_step_key("pairs", [[1, 2, 3]]), "pairs"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGED)
def test_damaged_counts_files(damage: Callable[[dict[str, Any]], str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(damage(json.loads(counts(step()).model_dump_json())))
    with pytest.raises(ConfigError, match=said) as error:
        Counts.load(path)
    assert "counts.json" in str(error.value)


def test_missing_and_binary_counts_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such counts file"):
        Counts.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        Counts.load(tmp_path / "binary.json")


def _linear() -> tuple[torch.nn.Module, Callable[[], None]]:
    torch.manual_seed(0)
    model = lnpu.convert(torch.nn.Sequential(torch.nn.Linear(4, 3)), "fgmp")
    x = torch.tensor([[1.0, 0.0, 2.0, -1.0], [0.0, 0.0, 3.0, 1.0]])

    def train() -> None:
        model.zero_grad()
        model(x).sum().backward()

    return model, train


def test_counter_counts_the_block_and_no_more(tmp_path: Path) -> None:
    model, train = _linear()
    train()
    with CostCounter(model) as cost:
        assert cost.report().total.macs == 0
        train()
        live = cost.counts
    train()
    assert cost.counts == live
    forward, grad_input, grad_weight = cost.report().rows[:3]
    assert (forward.layer, forward.kind, forward.step) == ("0", "Linear", "forward")
    assert (forward.macs, forward.executed, forward.skipped) == (24, 15, 9)  # 5 of 8 inputs are not zero, times 3
    assert (grad_input.macs, grad_input.not_run) == (24, 24)  # nobody asks for it
    assert (grad_weight.macs, grad_weight.executed) == (24, 15)
    assert forward.zero_share == 3 / 8
    cost.save(tmp_path / "counts.json")
    assert Counts.load(tmp_path / "counts.json") == live
    assert cost.report("dense-fp16") == price(live, "dense-fp16")


def test_counters_nest_and_start_anew() -> None:
    model, train = _linear()
    with CostCounter(model) as outer:
        train()
        with CostCounter(model) as inner:
            train()
        train()
    assert outer.report().total.macs == 3 * inner.report().total.macs
    with outer:
        train()
        assert outer.counts == inner.counts


def test_what_is_extrapolated_says_so_wherever_it_goes(tmp_path: Path) -> None:
    model, train = _linear()
    with CostCounter(model) as cost:
        train()
    once = cost.counts
    with cost:
        for _ in range(5):
            train()
    assert (once * 5).steps == cost.counts.steps
    assert once * 1 == once
    guessed = (once * 5).model_copy(update={"extrapolated": True})
    (guessed + once).save(tmp_path / "counts.json")
    loaded = Counts.load(tmp_path / "counts.json")
    assert loaded.extrapolated and not (once + once).extrapolated
    assert any("extrapolated" in note for note in price(loaded, "lnpu").notes)
    assert not any("extrapolated" in note for note in price(once, "lnpu").notes)


def test_counter_before_its_block() -> None:
    model, _ = _linear()
    with pytest.raises(RuntimeError, match="inside `with CostCounter"):
        CostCounter(model).report()


def test_counter_of_a_model_that_is_not_converted() -> None:
    with pytest.raises(ConfigError, match="convert"), CostCounter(torch.nn.Linear(2, 2)):
        pass


def test_a_report_says_what_a_chip_takes_from_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("like: dense-fp16\ndescription: mine\nsram_bytes: {value: 1000, tag: assumed, source: test}\n")
    mine = chip(path)
    (note,) = (note for note in price(counts(step()), mine).notes if "takes from others" in note)
    used = [key for key in mine.values() if not key.startswith(("bottom_up.", "node_nm"))]
    assert (
        note.startswith("values that mine takes from others: ") and "of dense-fp16" in note and "of lnpu-fp16" in note
    )
    assert sum(mine.origins().values()) - 1 == len(used) - 1  # all but the SRAM; no FP8 rate is a value that it takes
    assert (mine.inherited["skip.forward"], mine.inherited["macs_per_cycle.fp8"]) == ("dense-fp16", "lnpu-fp16")
    assert "sram_bytes" not in mine.inherited
    assert "lanes.count" not in mine.with_values({"lanes.count": 32}).inherited
    assert not [note for note in price(counts(step()), "lnpu").notes if "takes from others" in note]


def test_mixed_tensors_on_a_chip_that_cannot_mix_are_noted() -> None:
    apart = chip("lnpu").with_values({"mixed_tensors": False})
    mixed, fp8 = counts(step()), counts(step(first=(5, 5, 0), second=(0, 8, 0)))
    notes = price(mixed, apart).notes
    assert any(note.startswith("2 of 2 operands mix FP8 and FP16, which this chip cannot") for note in notes)
    for run, on in ((fp8, apart), (mixed, "lnpu"), (mixed, "dense-fp16")):
        assert not any("which this chip cannot" in note for note in price(run, on).notes)
