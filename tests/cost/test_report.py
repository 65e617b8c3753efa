from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from helpers.handmade import counts, network, step
from lnpu_torch.cost.comparison import Comparison
from lnpu_torch.cost.cost_row import COLUMNS, CostRow, LaneCycles
from lnpu_torch.cost.pricing import price
from lnpu_torch.cost.report import Report, csv_text, json_text
from lnpu_torch.cost.sweep import sweep
from lnpu_torch.counts.schema import Counts, FloatProduct
from lnpu_torch.counts.vector_ops import VectorOp, VectorOpCounts
from lnpu_torch.files import ConfigError
from lnpu_torch.text_tables import si

FIELDS_EXPECTED = [
    "layer",
    "kind",
    "step",
    "macs",
    "executed",
    "skipped",
    "padding",
    "not_run",
    "pairs",
    "zero_share",
    "fp8_share",
    "cycles",
    "utilisation",
    "unbalanced_utilisation",
    "array_use",
    "operations",
    "simd_cycles",
    "dram_cycles",
    "time_cycles",
    "bound",
    "mac_energy_pj",
    "sram_energy_pj",
    "simd_energy_pj",
    "idle_energy_pj",
    "energy_pj",
    "dram_energy_pj",
    "all_energy_pj",
    "sram_bits",
    "dram_bits",
    "dense_dram_bits",
    "energy_zj",
    "estimate",
]


def test_a_row_has_these_columns() -> None:
    (row, *_) = price(network(), "lnpu").rows
    assert FIELDS_EXPECTED == [column.field for column in COLUMNS] == list(row.to_dict())
    nothing = [name for name, value in row.to_dict().items() if value is None]
    absent = (
        "utilisation",
        "unbalanced_utilisation",
        "array_use",
        "operations",
        "simd_cycles",
    )  # no lanes were recorded
    assert nothing == [*absent, *row.not_modelled] == [*absent, "simd_energy_pj"]
    nowhere = dataclasses.replace(row, energy_zj={}, bits={})
    assert nowhere.not_modelled == (
        *("mac_energy_pj", "sram_energy_pj", "simd_energy_pj", "idle_energy_pj", "dram_energy_pj"),
        *("sram_bits", "dram_bits", "dense_dram_bits"),
    )
    assert nowhere.energy_pj is None


def test_a_row_that_does_not_add_up_is_refused() -> None:
    row = price(network(), "lnpu").rows[0]
    with pytest.raises(ValueError, match="conv1 forward: macs are not"):
        dataclasses.replace(row, macs=row.macs + 1)
    with pytest.raises(ValueError, match="conv1 forward: macs are not"):
        dataclasses.replace(row, executed_pairs={})


def test_every_column_with_a_heading_says_what_it_means_and_is_shown() -> None:
    report, page = str(price(network(), "lnpu")), [column for column in COLUMNS if column.on_page]
    assert len({column.field for column in COLUMNS}) == len(COLUMNS)
    assert all(column.says for column in COLUMNS) and all(column.head for column in page)
    absent = ("utilisation", "unbalanced_utilisation", "array_use", "operations", "simd_cycles", "simd_energy_pj")
    for column in COLUMNS:
        assert not column.head or column.field in absent or f" {column.head}" in report, column.head


def test_groups_and_total_take_shares_from_sums() -> None:
    first = step(first=(9, 1, 0), padding=0)
    second = step(layer="conv2", first=(0, 10, 80), padding=0)
    report = price(counts(first, second), "lnpu")
    assert [row.zero_share for row in report.rows] == [0.9, 0.0]
    assert report.total.zero_share == 9 / 100
    assert report.total.fp8_share == 11 / 91
    assert (report.total.layer, report.total.kind, report.total.step) == ("total", "all", "all")
    (by_step,) = report.by("step").rows
    assert (by_step.layer, by_step.kind, by_step.step) == ("all", "all", "forward")
    assert by_step.zero_share == 9 / 100


def test_groups_keep_the_models_order() -> None:
    report = price(network(), "lnpu")
    assert [(row.layer, row.kind, row.step) for row in report.by("layer").rows] == [
        ("conv1", "Conv2d", "all"),
        ("fc", "Conv2d", "all"),
    ]
    assert [row.step for row in report.by("step").rows] == ["forward", "grad_input", "grad_weight"]
    with pytest.raises(ValueError, match="'layer' or 'step', not 'kind'"):
        report.by("kind")  # type: ignore[arg-type]


def test_time_and_efficiency() -> None:
    report = price(network(), "lnpu")
    assert report.time_s == pytest.approx(report.total.dram_bits / 8 / 6.4e9)  # so few MACs for so many bits
    busy = price(network(10**6), "lnpu")
    assert busy.time_s == pytest.approx(busy.total.cycles / 50e6) == pytest.approx(busy.mac_time_s)
    assert (report.total.bound, busy.total.bound) == ("DRAM", "multipliers")
    asked = report.total.macs - 55 - 20
    assert (report.total.not_run, report.total.padding) == (55, 20)
    assert report.tflops_per_watt == pytest.approx(2 * asked / report.total.energy_pj)


def test_json_and_csv_hold_the_rows_exactly(tmp_path: Path) -> None:
    report = price(network(), "lnpu")
    report.to_json(tmp_path / "report.json")
    report.to_csv(tmp_path / "report.csv")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["rows"] == [row.to_dict() for row in report.rows]
    assert data["total"] == report.total.to_dict()
    assert (data["chip"], data["time_s"], data["notes"]) == ("lnpu", report.time_s, list(report.notes))
    assert data["energy_range_pj"] == list(report.energy_range_pj)
    with (tmp_path / "report.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == FIELDS_EXPECTED
    for line, row in zip(lines, report.rows, strict=True):
        assert json.loads(line.pop("pairs")) == row.pairs
        assert json.loads(line.pop("energy_zj")) == row.energy_zj
        for name, cell in line.items():
            value = getattr(row, name)
            assert cell == ("" if value is None else str(value))


def test_several_reports_as_json_and_csv() -> None:
    reports = [price(network(), "lnpu"), price(network(), "dense-fp16")]
    assert json.loads(json_text(reports)) == [json.loads(json_text(report)) for report in reports]
    lines = list(csv.DictReader(io.StringIO(csv_text(reports))))
    assert [line["chip"] for line in lines] == ["lnpu"] * 6 + ["dense-fp16"] * 6
    assert float(lines[6]["energy_pj"]) == reports[1].rows[0].energy_pj


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        price(network(), "lnpu").to_json(tmp_path / "missing" / "report.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        price(network(), "lnpu").to_csv(tmp_path / "missing" / "report.csv")


# MACs as in test_cost. The operands are 71 and 96 bits, and the first was written: 238 bits for 28 elements of 16;
# SRAM has 238 bits written at 0.2469 pJ, and 71 read at 0.3195 pJ.
ENERGIES = "DRAM 36.37 pJ 81.45 pJ 32.92 pJ 150.7 pJ 4.806 nJ 4.957 nJ 0.309 kbit 0.238 kbit -46.9%"


def test_the_table() -> None:
    text = str(price(network(), "lnpu"))
    lines = [line.split() for line in text.splitlines()]
    assert lines[4][:11] == ["conv1", "Conv2d", "forward", "(FF)", "55", "39", "6", "10", "0", "50.0%", "60.0%"]
    assert lines[5] == ["conv1", "Conv2d", "grad_input", "(EP)", "55", "0", "0", "0", "55", "-", "-", "0", "-"]
    energies = next(i for i, line in enumerate(lines) if line[:4] == ["Energy", "on", "chip", "lnpu"])
    assert lines[energies + 4] == ["conv1", "Conv2d", "forward", "(FF)", *ENERGIES.split()]
    assert " ".join(lines[energies + 5][4:]) == "- 0 J 0 J 0 J 0 J 0 J 0 J 0 bit 0 bit -"
    assert any(line[:3] == ["total", "all", "all"] for line in lines)
    assert "utilisation not recorded: their cycles assume" in text
    assert "lanes busy" not in text
    assert "on the chip, by one constant alone: " in text
    assert "1.6 ... 4 times" in text
    assert "fp8*fp8 " in text
    assert "constants: 1 published, 6 derived" in text


def test_the_table_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = "a.very." + "long.name." * 20 + "[bold]conv"
    wide = str(price(counts(step(layer=layer)), "lnpu"))
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(price(counts(step(layer=layer)), "lnpu")) == wide
    assert layer in wide
    assert wide.isascii()
    assert "\x1b" not in wide


def test_a_console_prints_reports_too() -> None:
    report = price(network(), "lnpu")
    for shown in (report, Comparison([report, report])):
        console = Console(file=io.StringIO(), width=200)
        console.print(shown)
        table = console.file.getvalue()  # type: ignore[attr-defined]
        assert [line.strip() for line in str(shown).splitlines()[:8]] == [
            line.strip() for line in table.splitlines()[:8]
        ]


def test_a_model_that_is_one_layer_has_a_name() -> None:
    assert "(model)" in str(price(counts(step(layer="")), "lnpu"))


def test_nothing_counted() -> None:
    report = price(counts(), "lnpu")
    assert (report.rows, report.total.macs, report.total.energy_pj, report.tflops_per_watt) == ((), 0, 0, None)
    assert str(report).strip() == "nothing was counted that chip lnpu could be priced for"


def test_operations_on_elements_alone() -> None:
    relu = VectorOp(kind="activation", phase="forward", op="relu", calls=1, read=4, written=4, operations=4, special=0)
    report = price(Counts(steps=(), vector_ops=VectorOpCounts(entries=(relu,))), "lnpu")
    assert report.total.energy_pj and report.tflops_per_watt is None
    assert "Multiplications" not in str(report) and "no step of an emulated layer was counted" in str(report)
    assert "MACs" not in str(report)


ACCESS = price(network(), "lnpu").total.dram_bits / price(network(), "dense-fp16").total.dram_bits


def test_chips_side_by_side() -> None:
    lnpu, dense = price(network(), "lnpu"), price(network(), "dense-fp16")
    text = str(Comparison([dense, lnpu]))
    first = next(line for line in text.splitlines() if "conv1" in line)
    # 51.75 + 160 * 0.3195 + 448 * 0.2469, and 8.6 mW while 56 bytes come at 6.4 GB/s, but for 45 / 768 cycles
    assert dense.rows[0].energy_pj == pytest.approx(213.5 + 8.6e9 * (56 / 6.4e9 - 45 / 768 / 50e6), rel=1e-3)
    energies = f"{dense.rows[0].energy_pj / 1e3:.3f} nJ {si(lnpu.rows[0].energy_pj, 'pJ')}"
    assert first.split()[-4:] == energies.split()
    ratio = lnpu.total.energy_pj / dense.total.energy_pj
    assert any(line.split()[:1] == ["lnpu"] and f" {ratio:.3f} " in line for line in text.splitlines())
    assert text.count("\nenergy of a MAC: from efficiencies") == 1  # it holds for both, so no chip is named
    assert any(line.split()[:1] == ["lnpu"] and f" {ACCESS:.3f} " in line for line in text.splitlines())
    assert "dense-fp16: this chip has no FP8" in text
    assert "lnpu: utilisation not recorded: their cycles assume" in text  # a dense chip's is 1
    rows = Comparison([dense, lnpu]).to_rows()
    assert [(row["chip"], row["energy_pj"]) for row in rows] == [
        (report.chip, row.energy_pj) for report in (dense, lnpu) for row in report.rows
    ]


def test_a_summary_has_both_sums_and_what_takes_most() -> None:
    report = price(network(), "lnpu")
    text, total = str(report.summary()), report.total
    assert si(total.energy_pj, "pJ") in text and si(total.all_energy_pj, "pJ") in text
    assert len(text.splitlines()) <= 12 and max(map(len, text.splitlines())) <= 110
    largest = max(report.by("layer").rows, key=lambda row: row.all_energy_pj or 0)
    assert f"by layer: {largest.layer} {largest.all_energy_pj / total.all_energy_pj:.1%}" in text


def test_what_ran_in_float_stands_beside_every_total() -> None:
    products = {"aten.mm.default": FloatProduct(calls=2, macs=300), "aten.bmm.default": FloatProduct(calls=1, macs=0)}
    whole = network()
    seen = whole.model_copy(update={"in_float": products})
    total = price(whole, "lnpu").total
    share = 300 / (300 + total.macs - total.not_run)
    line = f"NOT IN THE TOTAL: {share:.1%} of all multiply-accumulates, 300, which ran in float: aten.mm.default (2 x)"
    reports = [price(seen, chip) for chip in ("lnpu", "dense-fp16")]
    swept = sweep(seen, ["lnpu"], {"lanes.balance_group": [1, 4]})
    for printed in (reports[0], Comparison(reports), swept):
        assert line in " ".join(str(printed).split())
    assert reports[0].float_share == share and price(seen + seen, "lnpu").float_share == pytest.approx(
        600 / (600 + 2 * (total.macs - total.not_run))
    )
    for nothing in (whole, whole.model_copy(update={"in_float": {}}), seen + whole):  # of the last, nobody knows
        assert "NOT IN THE TOTAL" not in str(price(nothing, "lnpu"))
    assert price(whole, "lnpu").float_share is None and price(whole, "lnpu").to_dict()["in_float"] is None


def test_only_reports_of_one_run_stand_side_by_side() -> None:
    lnpu = price(network(), "lnpu")
    for others in ([], [lnpu, lnpu.by("step")], [lnpu, price(counts(step()), "lnpu")]):
        with pytest.raises(ValueError, match="differ"):
            Comparison(others)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (0.0, "pJ", "0 J"),
        (None, "pJ", "-"),
        (7, "", "7"),
        (999, "", "999"),
        (1000, "", "1 k"),
        (12346, "", "12.35 k"),
        (999999, "", "1 M"),
        (1.234e9, "pJ", "1.234 mJ"),
        (36.609, "pJ", "36.61 pJ"),
        (0.025, "pJ", "25 fJ"),
        (2.5e13, "pJ", "25 J"),
        (0.4078, "s", "407.8 ms"),
        (50e6, "Hz", "50 MHz"),
        (1e21, "", "1000 E"),
    ],
)
def test_numbers_with_units(value: float | None, unit: str, text: str) -> None:
    assert si(value, unit) == text


def test_totals_do_not_depend_on_the_grouping() -> None:
    """To the last digit, though sums of floats in another order would differ there."""
    numbers = (0.1, 0.2, 0.3, 1e16, -1e16, 0.7, 1e-3)
    parts = tuple(
        CostRow(
            layer=f"l{i % 3}",
            kind="Linear",
            step=("forward", "grad_input")[i % 2],
            cycles=number,
            energy_zj={"mac": zj},
        )
        for i, (number, zj) in enumerate(zip(numbers, (1, 10**30, 3, -(10**30), 5, 6, 7), strict=True))
    )
    totals = [
        Report("c", 1.0, order, None, ()).by(key).total for order in (parts, parts[::-1]) for key in ("layer", "step")
    ]
    assert [total.cycles for total in totals] == [math.fsum(numbers)] * 4
    assert [total.energy_zj for total in totals] == [{"mac": 22}] * 4


def test_components_add_up_and_a_part_may_lack_some() -> None:
    conv = CostRow(
        layer="conv",
        kind="Conv2d",
        step="forward",
        cycles=8,
        lanes=LaneCycles(6, 8, 12),
        energy_zj={"mac": 3 * 10**9, "dram": 7 * 10**9},
    )
    norm = CostRow(layer="norm", kind="BatchNorm2d", step="forward", energy_zj={"simd": 2 * 10**9}, cycles=8)
    report = Report("c", 1.0, (conv, norm), None, ())
    assert [row.energy_pj for row in report.rows] == [3.0, 2.0]
    assert (report.rows[0].simd_energy_pj, report.rows[1].mac_energy_pj) == (None, None)
    total = report.total
    assert (total.energy_pj, total.mac_energy_pj, total.simd_energy_pj, total.dram_energy_pj) == (5.0, 3.0, 2.0, 7.0)
    assert (total.sram_energy_pj, total.cycles) == (None, 16)
    assert [row.utilisation for row in (*report.rows, total)] == [0.75, None, 0.75]
    assert total.unbalanced_utilisation == 0.5
    assert "simd" not in str(report).split("not modelled")[1]
