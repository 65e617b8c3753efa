"""Sweeps: every combination, which of them no other beats, and what is saved and drawn of them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lnpu_torch as lnpu
from helpers.handmade import network
from lnpu_torch.cli.app import app
from lnpu_torch.cost.pricing import price
from lnpu_torch.cost.sweep import SHOWN, Sweep, parse_setting, sweep
from lnpu_torch.files import ConfigError
from lnpu_torch.reporting import sweep_plot

LANES, VOLTAGE = "macs_per_cycle.fp16", "operating_point.voltage_v"


def small(dram: bool = True) -> Sweep:
    return sweep(network(10**6), ["lnpu", "lnpu-fp16"], {LANES: [384, 768], VOLTAGE: [0.78, 1.1]}, dram)


def test_a_sweep_prices_every_combination() -> None:
    points = small().points
    assert [(point.chip, *point.values.values()) for point in points] == [
        (chip, lanes, voltage) for chip in ("lnpu", "lnpu-fp16") for lanes in (384, 768) for voltage in (0.78, 1.1)
    ]
    for point in points:
        report = price(network(10**6), lnpu.chip(point.chip).with_values(point.values))
        assert (point.total, point.time_s, point.tflops_per_watt) == (
            report.total,
            report.time_s,
            report.tflops_per_watt,
        )
        assert point.energy_pj == pytest.approx(report.total.energy_pj + report.total.dram_energy_pj)
    assert [point.energy_pj for point in small(dram=False).points] == [point.total.energy_pj for point in points]


def test_the_front_is_what_no_other_beats() -> None:
    swept = sweep(network(10**6), ["lnpu"], {LANES: [384, 768, 768], VOLTAGE: [0.78, 0.9, 1.1]})
    for point in swept.points:
        better = [
            other
            for other in swept.points
            if other.energy_pj <= point.energy_pj
            and other.time_s <= point.time_s
            and (other.energy_pj, other.time_s) != (point.energy_pj, point.time_s)
        ]
        assert not (point.pareto and better)
    assert swept.front
    front = [tuple(point.values.values()) for point in swept.front]
    assert front == [(768, 1.1), (768, 0.9), (768, 0.78)]  # of the equal ones, one
    assert sum(point.pareto for point in swept.points) == 3


def test_csv_has_a_line_for_every_point(tmp_path: Path) -> None:
    swept = small()
    swept.to_csv(tmp_path / "sweep.csv")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text())))
    assert len(lines) == 8
    for line, point in zip(lines, swept.points, strict=True):
        assert (line["chip"], line[LANES], line[VOLTAGE]) == (point.chip, *map(str, point.values.values()))
        assert float(line["energy_pj"]) == point.total.energy_pj
        assert float(line["compared_energy_pj"]) == point.energy_pj
        assert float(line["time_s"]) == point.time_s
        assert line["pareto"] == str(int(point.pareto))
        assert line["simd_energy_pj"] == ("" if point.total.simd_energy_pj is None else line["simd_energy_pj"])


def test_the_table_marks_the_front_and_a_long_one_shows_nothing_else() -> None:
    few = str(small()).splitlines()
    assert few[0].startswith("8 chips; none beats those with a * in energy (chip and DRAM) and time")
    assert sum(line.endswith("*") for line in few) == len(small().front)
    many = sweep(network(10**6), ["lnpu"], {VOLTAGE: [0.78], LANES: range(100, 101 + SHOWN)})
    assert str(many).startswith(f"{SHOWN + 1} chips; the 1 that none beats in energy (chip and DRAM) and time")
    assert [line.split()[2] for line in str(many).splitlines() if line.startswith("  lnpu ")] == ["140"]


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("macs_per_cycle.fp16=384,768", ("macs_per_cycle.fp16", [384, 768])),
        ("operating_point.voltage_v=0.78", ("operating_point.voltage_v", [0.78])),
        ("energy_model=calibrated,bottom_up", ("energy_model", ["calibrated", "bottom_up"])),
    ],
)
def test_settings_are_written_with_commas(text: str, setting: tuple[str, list[object]]) -> None:
    assert parse_setting(text) == setting


@pytest.mark.parametrize("text", ["", "=", "macs_per_cycle.fp16", "macs_per_cycle.fp16=", "=3"])
def test_settings_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is not KEY=VALUE,VALUE"):
        parse_setting(text)


def test_a_sweep_of_nothing_is_refused() -> None:
    for chips, settings in (([], {LANES: [384]}), (["lnpu"], {LANES: []})):
        with pytest.raises(ConfigError, match="a sweep needs a chip, and a value for each setting"):
            sweep(network(10**6), chips, settings)


def test_price_and_sweep_at_another_voltage(counts: str) -> None:
    expected = price(network(10**6), lnpu.chip("dense-fp16", voltage=0.9))
    arguments = (counts, "--chip", "dense-fp16", "--voltage", "0.9")
    assert CliRunner().invoke(app, ("price", *arguments, "--full")).stdout == f"{expected}\n"
    assert "at 0.9 V, 89.04 MHz" in str(expected)
    lanes = ("--set", f"{LANES}=768", "--no-plot", "--out", counts)
    assert command(*arguments, *lanes).stdout.startswith(
        str(sweep(network(10**6), [lnpu.chip("dense-fp16", 0.9)], {LANES: [768]}))
    )
    refused = CliRunner().invoke(app, ("price", counts, "--voltage", "1.2"))
    assert refused.exit_code == 2
    assert "1.2 is outside the chip's range, 0.78 ... 1.1 V" in refused.stderr


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ("sweep", *arguments))


@pytest.fixture
def counts(tmp_path: Path) -> str:
    network(10**6).save(tmp_path / "counts.json")
    return str(tmp_path / "counts.json")


def test_the_command_prints_the_table_and_saves_csv_and_plot(counts: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    settings = ("--set", f"{LANES}=384,768", "--set", f"{VOLTAGE}=0.78,1.1")
    done = command(counts, *settings, "--chip", "lnpu", "--chip", "lnpu-fp16", "--out", f"{tmp_path}/mine")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{small()}\nsaved: {tmp_path}/mine.csv, {tmp_path}/mine.png\n"
    assert (tmp_path / "mine.csv").read_text() == small().csv_text()
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_shows_every_chip_and_labels_the_front(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep_plot.save_plot(small(), tmp_path / "sweep_plot.svg")
    drawn = (tmp_path / "sweep_plot.svg").read_text()
    for text in ("energy (chip and DRAM)", "lnpu-fp16", "768, 1.1", "768, 0.78"):
        assert f"<!-- {text} -->" in drawn
    assert "<!-- 384, 1.1 -->" not in drawn  # not on the front
    with pytest.raises(ConfigError, match="cannot be written"):
        sweep_plot.save_plot(small(), tmp_path / "nowhere" / "sweep_plot.png")
    with pytest.raises(ConfigError, match=r"cannot be written: .*xyz"):
        sweep_plot.save_plot(small(), tmp_path / "sweep_plot.xyz")


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    odd = sweep(
        network(10**6), [lnpu.chip("lnpu").model_copy(update={"name": "$x^$"})], {"macs_per_cycle.fp16": [384, 768]}
    )
    sweep_plot.save_plot(odd, tmp_path / "sweep_plot.svg")
    assert "<!-- $x^$ -->" in (tmp_path / "sweep_plot.svg").read_text()


def test_without_matplotlib_the_table_is_still_saved(
    counts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    arguments = (counts, "--set", f"{LANES}=384", "--out", f"{tmp_path}/mine")
    refused = command(*arguments)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "pip install 'lnpu-torch[plot]'" in refused.stderr
    assert not (tmp_path / "mine.csv").exists()
    assert command(*arguments, "--no-plot").stdout.endswith(f"saved: {tmp_path}/mine.csv\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "lanes=3"), "no key 'lanes'"),
        (("--set", f"{LANES}=many"), "macs_per_cycle.fp16.value"),
        (("--set", f"{LANES}=3", "--set", f"{LANES}=4"), "a key is given twice"),
        (("--set", f"{LANES}=3", "--chip", "lnpo"), "unknown chip 'lnpo'"),
        (("--set", f"{LANES}=3", "--voltage", "2"), "outside the chip's range"),
        ((), "--set"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], said: str, counts: str) -> None:
    done = command(counts, *arguments, "--no-plot")
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
