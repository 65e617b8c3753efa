"""What the ranges of constants do to a run: every range, at both ends, on each chip over its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.command import lnpu_command, refused
from helpers.handmade import network
from lnpu_torch.cost.comparison import Comparison
from lnpu_torch.cost.pricing import price
from lnpu_torch.cost.sensitivity import sensitivity
from lnpu_torch.hardware.chip import chip
from lnpu_torch.hardware.sourced_value import SourcedRange

RUN = network(10**6)


def test_every_range_is_tried_at_both_ends_and_nothing_else() -> None:
    found = sensitivity(RUN, ["lnpu", "dense-fp16"])
    ranges = {key: entry.range for key, entry in chip("lnpu").values().items() if isinstance(entry, SourcedRange)}
    assert {effect.key: effect.ends for effect in found.effects} == {key: ends for key, ends in ranges.items() if ends}
    for effect in found.effects:
        for end, reports in zip(effect.ends, (effect.low, effect.high), strict=True):
            for name, report in zip(("lnpu", "dense-fp16"), reports, strict=True):
                assert report.total == price(RUN, chip(name).with_values({effect.key: end})).total


def test_the_widest_comes_first() -> None:
    effects = sensitivity(RUN, ["lnpu", "dense-fp16"]).effects
    spreads = [effect.spread for effect in effects]
    assert spreads == sorted(spreads, reverse=True) and spreads[0] > 1.5
    by_key = {effect.key: effect for effect in effects}
    ratio = by_key["energy.fp16_to_fp8"]
    ends = [report.total.energy_pj for reports in (ratio.low, ratio.high) for report in reports]
    assert ratio.spread >= (ends[3] / ends[2]) / (ends[1] / ends[0]) > 1.1  # it moves dense FP16 over lnpu, too
    assert by_key["simd.operations_per_cycle"].spread == 1.0  # nothing ran there


def test_the_table_shows_both_ends() -> None:
    text = str(sensitivity(RUN, ["lnpu", "dense-fp16"]))
    (line,) = (line for line in text.splitlines() if line.lstrip().startswith("energy.fp16_to_fp8"))
    low, high = (price(RUN, chip("lnpu").with_values({"energy.fp16_to_fp8": end})).total for end in (1.6, 4.0))
    assert "1.6 ... 4" in line and f"{low.energy_pj / 1e6:.4g} uJ ... {high.energy_pj / 1e6:.4g} uJ" in line
    assert "dense-fp16 / lnpu" in text


def test_rows_have_every_end_of_every_chip() -> None:
    rows = sensitivity(RUN, ["lnpu", "dense-fp16"]).to_rows()
    assert len(rows) == 2 * (1 + 2 * len({row["constant"] for row in rows if row["constant"]}))
    (row,) = (row for row in rows if list(row.values())[:3] == ["energy.fp16_to_fp8", "high", "dense-fp16"])
    report = price(RUN, chip("dense-fp16").with_values({"energy.fp16_to_fp8": 4.0}))
    assert (row["energy_pj"], row["time_s"]) == (report.total.energy_pj, report.time_s)


def test_the_command(tmp_path: Path) -> None:
    RUN.save(tmp_path / "counts.json")
    arguments = ("price", f"{tmp_path}/counts.json", "--ranges")
    assert lnpu_command(*arguments, "--chip", "lnpu").stdout == f"{sensitivity(RUN, ['lnpu'])}\n"
    for more in (("--by", "layer"), ("--format", "csv")):
        assert "--ranges prints a table of its own" in refused(*arguments, *more)


def test_a_report_has_drams_range_beside_it_and_both_sums() -> None:
    report = price(RUN, "lnpu")
    low, high = (price(RUN, chip("lnpu").with_values({"energy.dram_pj_per_bit": end})).total for end in (8.0, 70.0))
    assert report.dram_range_pj == pytest.approx((low.dram_energy_pj, high.dram_energy_pj))
    assert report.total.all_energy_pj == pytest.approx(report.total.energy_pj + report.total.dram_energy_pj)
    assert "at 8 ... 70 pJ a bit); chip and DRAM: " in str(report)
    fixed = price(RUN, chip("lnpu").with_values({"energy.dram_pj_per_bit": 20.0}))
    assert fixed.dram_range_pj is None and "pJ a bit" not in str(fixed)


def test_a_comparison_has_the_ratio_with_dram() -> None:
    reports = [price(RUN, name) for name in ("lnpu", "dense-fp16")]
    (line,) = (
        line for line in str(Comparison(reports)).splitlines() if line.startswith("  dense-fp16") and "..." in line
    )
    assert float(line.split()[-1]) == pytest.approx(
        reports[1].total.all_energy_pj / reports[0].total.all_energy_pj, abs=1e-3
    )


def test_a_report_names_what_takes_most() -> None:
    report = price(RUN, "lnpu")
    (line,) = (line for line in str(report).splitlines() if line.startswith("most of chip and DRAM"))
    most = max(report.rows, key=lambda row: row.all_energy_pj or 0.0)
    share = most.all_energy_pj / report.total.all_energy_pj
    assert line.startswith(f"most of chip and DRAM: {most.layer} {most.step} {share:.1%}, ")
    assert "vector operations, by the layer" not in str(report)


def test_a_chip_with_a_range_of_its_own_goes_over_that() -> None:
    """T-PIM draws 5.25 mW in all, so what LNPU may draw while it waits, up to 17.2 mW, is none of its ranges."""
    found = sensitivity(network(), ["lnpu", "t-pim"])
    (idle,) = (effect for effect in found.effects if effect.key == "energy.idle_w")
    own = chip("t-pim").energy.idle_w.range
    for ends, value in zip((idle.low, idle.high), own, strict=True):  # type: ignore[arg-type]
        assert ends[1].total == price(network(), chip("t-pim").with_values({"energy.idle_w": value})).total
    assert idle.ends == chip("lnpu").energy.idle_w.range
    assert "each over its own range" in str(found)
    (dram,) = (
        each for each in sensitivity(network(), ["lnpu", "v100"]).effects if each.key == "energy.dram_pj_per_bit"
    )
    assert dram.low[1] == dram.high[1] == price(network(), "v100")  # what has no range stays
