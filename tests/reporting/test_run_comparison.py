"""Runs side by side: each number is a price of the run's counts, and what nobody can know is left empty."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import pytest

import lnpu_torch as lnpu
from helpers.command import lnpu_command, refused
from helpers.handmade import network
from helpers.run_by_hand import epoch_counts, write_run
from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import ConfigError
from lnpu_torch.reporting.html_page import comparison_page
from lnpu_torch.reporting.run_comparison import Questions, RunComparison, read_runs

NAMES = ["lnpu", "dense-fp16"]
CHIPS = [lnpu.chip(name) for name in NAMES]
ALL = Questions(accuracy=0.7, images=50, co2_g_per_kwh=400, battery_wh=2)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A run of three epochs, whose accuracies are 50, 75 and 87.5 %, one of two, and a file of counts."""
    network().save(tmp_path / "alone.json")
    return [write_run(tmp_path / "three"), write_run(tmp_path / "<i>two", 2), tmp_path / "alone.json"]


def rows(paths: list[Path], asked: Questions = ALL) -> list[dict[str, Any]]:
    return RunComparison.of(read_runs(paths), CHIPS, asked).to_rows()


def test_each_run_is_priced_on_each_chip(runs: list[Path]) -> None:
    found = rows(runs)
    assert [(row["run"], row["chip"], row["epochs"]) for row in found] == [
        (run, chip, epochs)
        for run, epochs in (("three", 3), ("<i>two", 2), ("alone", 1))
        for chip in ("lnpu", "dense-fp16")
    ]
    whole = Counts.merge(epoch_counts(times) for times in (3, 2, 1))
    for row, chip in zip(found[:2], CHIPS, strict=True):
        report = price(whole, chip)
        total = report.total
        assert row["chip_j"] == pytest.approx(total.energy_pj / 3e12)
        assert (row["chip_low_j"], row["chip_high_j"]) == pytest.approx([pj / 3e12 for pj in report.energy_range_pj])
        assert (row["dram_low_j"], row["dram_high_j"]) == pytest.approx([pj / 3e12 for pj in report.dram_range_pj])
        assert row["all_high_j"] == pytest.approx(row["chip_high_j"] + row["dram_high_j"])
        assert row["run_j"] == pytest.approx(total.all_energy_pj / 1e12)
        assert row["time_s"] == pytest.approx(report.time_s / 3)
        assert row["image_j"] == pytest.approx(row["run_j"] / 150)
        assert row["image_s"] == pytest.approx(report.time_s / 150)
        until = price(epoch_counts(3) + epoch_counts(2), chip)
        assert row["accuracy_epoch"] == 2
        assert row["accuracy_j"] == pytest.approx(until.total.all_energy_pj / 1e12)
        assert row["accuracy_s"] == until.time_s
        assert row["run_kwh"] == pytest.approx(row["run_j"] / 3.6e6)
        assert row["co2_g"] == pytest.approx(400 * row["run_kwh"])
        assert row["battery_epochs"] == pytest.approx(2 * 3600 / (row["run_j"] / 3))
        assert row["battery_s"] == pytest.approx(2 * 3600 / (row["run_j"] / row["run_s"]))
    assert (found[0]["accuracy"], found[2]["accuracy"], found[4]["accuracy"]) == (0.875, 0.75, None)


def test_what_is_not_known_or_not_asked_is_empty(runs: list[Path]) -> None:
    for row in rows(runs, Questions(accuracy=0.8)):
        assert row["image_j"] is None and row["co2_g"] is None and row["battery_s"] is None
        assert (row["accuracy_epoch"] is None) == (row["run"] != "three")
    (runs[0] / "counts" / "epoch1.json").unlink()
    assert {row["accuracy_j"] for row in rows(runs[:1])} == {None}  # what the first epoch took is not known


def test_a_run_in_float32_stands_beside_them_without_a_price(runs: list[Path], tmp_path: Path) -> None:
    """So its accuracy can be compared."""
    exact = write_run(tmp_path / "float32", 4)
    shutil.rmtree(exact / "counts")
    *_, last = rows([*runs, exact])
    assert (last["run"], last["chip"], last["epochs"], last["accuracy"]) == ("float32", "-", 4, 1 - 0.5**4)
    assert not any(value for name, value in last.items() if name not in ("run", "chip", "epochs", "accuracy"))
    said = lnpu_command("compare", *map(str, runs[:1]), str(exact)).stdout
    assert "93.75%" in said and "float32: nothing was counted" in said
    (exact / "metrics.csv").write_text("epoch,loss\n")
    with pytest.raises(ConfigError, match="has no epoch yet"):
        read_runs([exact])


def test_images_are_those_that_a_run_says(runs: list[Path]) -> None:
    metrics = runs[0] / "metrics.csv"
    lines = [f"{line},{text}" for line, text in zip(metrics.read_text().split(), ("images", 20, 20, 10), strict=True)]
    metrics.write_text("\n".join(lines))
    row = rows(runs[:1])[0]
    assert row["image_j"] == pytest.approx(row["run_j"] / 50)


def test_rows_are_plain_and_csv_has_them(runs: list[Path], tmp_path: Path) -> None:
    found = RunComparison.of(read_runs(runs), CHIPS, ALL)
    assert all(
        value is None or type(value) in (str, int, float, bool) for row in found.to_rows() for value in row.values()
    )
    lines = list(csv.DictReader(io.StringIO(found.csv_text())))
    assert [
        {key: "" if value is None else str(value) for key, value in row.items()} for row in found.to_rows()
    ] == lines


def test_what_a_reader_must_know_is_said(runs: list[Path]) -> None:
    network().with_sparsity({"default": {"input": 0.5}}).save(runs[2])
    found = RunComparison.of(read_runs(runs), CHIPS, ALL)
    assert [row["estimate"] for row in found.to_rows()] == [False] * 4 + [True] * 2
    assert any(note.startswith("alone: ESTIMATE: ") for note in found.notes) and found.notes[0] in str(found)
    assert "estimate" not in str(RunComparison.of(read_runs(runs[:2]), CHIPS, ALL))


def test_the_page_holds_the_table(runs: list[Path]) -> None:
    page = comparison_page(RunComparison.of(read_runs(runs), CHIPS, ALL))
    assert "&lt;i&gt;two" in page and "<i>two" not in page
    assert page.count("<tr>") == 1 + 6
    assert page.count('class="bar"') == 6 and "--share: 100.00%" in page
    assert "src=" not in page and "https:" not in page


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name / "run", 1) for name in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]
    with pytest.raises(ConfigError, match="is given twice"):
        read_runs([paths[0], paths[0]])


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    files = {"--out": tmp_path / "page.html", "--csv": tmp_path / "rows.csv"}
    options = [str(each) for pair in files.items() for each in pair]
    asked = ["--accuracy", "0.7", "--images", "50", "--co2", "400", "--battery", "2"]
    result = lnpu_command("compare", *map(str, runs), "--chip", "lnpu", "--chip", "dense-fp16", *asked, *options)
    assert result.exit_code == 0, result.output
    found = RunComparison.of(read_runs(runs), CHIPS, ALL)
    assert result.output.startswith(str(found))
    assert files["--csv"].read_text() == found.csv_text()
    assert files["--out"].read_text() == comparison_page(found)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--accuracy", "95"], "accuracy: expected a share above 0, at most 1; got 95"),
        (["--accuracy", "0"], "accuracy: expected"),
        (["--images", "0"], "images: expected 1 or more; got 0"),
        (["--co2", "-1"], "co2: expected grams per kWh, 0 or more; got -1"),
        (["--battery", "nan"], "battery: expected Wh, above 0; got nan"),
        (["--chip", "none"], "unknown chip 'none'"),
    ],
)
def test_mistakes_are_named(runs: list[Path], options: list[str], told: str) -> None:
    assert told in refused("compare", str(runs[0]), *options)
    assert "no such run" in refused("compare", str(runs[0] / "nowhere"))
