"""The page of a run: its numbers, in a real browser; its figures and files."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lnpu_torch as lnpu
from helpers.browser import PROGRAM, Browser
from helpers.handmade import network
from helpers.run_by_hand import NAME, epoch_counts, write_run
from lnpu_torch.cli.app import app
from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.schema import Counts
from lnpu_torch.reporting import figure_style
from lnpu_torch.reporting.figures import FIGURES, figures
from lnpu_torch.reporting.html_page import page
from lnpu_torch.reporting.run_reader import read_run
from lnpu_torch.reporting.run_report import RunReport

pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib")

CHIPS = ["lnpu", "dense-fp16"]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of three epochs, reported with everything there is."""
    run = write_run(tmp_path_factory.mktemp("page") / "run")
    files = {name: run / f"files.{name}" for name in ("html", "json", "csv")}
    options = ["--out", files["html"], "--json", files["json"], "--csv", files["csv"], "--plots", run / "plots"]
    done = CliRunner().invoke(app, ["report", str(run), *map(str, options)])
    assert done.exit_code == 0, done.output
    return {"run": run, "plots": run / "plots", "said": done.output, **files}


@pytest.fixture(scope="module")
def browser(reported: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(reported["html"])
        yield browser


def table(place: int) -> str:
    return f"document.querySelectorAll('table.layers')[{place}]"


def cells(browser: Browser, place: int, part: str = "tbody") -> list[dict[str, str]]:
    """A table's rows in their order, each cell's value by its field."""
    fields = f"[...{table(place)}.tHead.rows[0].cells].map(cell => cell.dataset.field)"
    rows = f"[...{table(place)}.querySelectorAll('{part} tr')]"
    script = f"{rows}.map(row => Object.fromEntries({fields}.map((name, i) => [name, row.cells[i].dataset.value])))"
    found: list[dict[str, str]] = browser.run(script)
    return found


def test_it_loads_offline_and_without_errors(browser: Browser, reported: dict[str, Any]) -> None:
    assert browser.errors == []
    outside = [url for url in browser.requests if not url.startswith("data:")]
    assert outside == [reported["html"].resolve().as_uri()]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", reported["html"].read_text())


def test_it_shows_the_numbers_of_the_json(browser: Browser, reported: dict[str, Any]) -> None:
    data = json.loads(reported["json"].read_text())
    assert [chip["chip"] for chip in data["chips"]] == CHIPS
    for place, chip in enumerate(data["chips"]):
        for rows, part in ((chip["layers"], "tbody"), ([chip["total"]], "tfoot")):
            shown = cells(browser, place, part)
            assert len(shown) == len(rows) > 0
            for cell, row in zip(shown, rows, strict=True):
                for name, value in cell.items():
                    if value == "":
                        assert row[name] is None or (row["kind"] == "SIMD" and name in ("macs", "executed", "cycles"))
                    else:
                        assert value == row[name] or float(value) == row[name], name
    tiles = browser.run("document.querySelector('.tiles').innerText")
    assert f"{data['chips'][0]['tflops_per_watt']:.2f}" in tiles and "87.50%" in tiles


def test_the_json_is_what_pricing_says(reported: dict[str, Any]) -> None:
    data = json.loads(reported["json"].read_text())
    whole = Counts.merge(epoch_counts(times) for times in (3, 2, 1))
    for chip in data["chips"]:
        report = price(whole, chip["chip"])
        assert {key: chip[key] for key in report.to_dict()} == json.loads(json.dumps(report.to_dict()))
        spent = [epoch["total"]["energy_pj"] for epoch in chip["epochs"]]
        assert sum(spent) == pytest.approx(chip["total"]["energy_pj"])
        assert spent[0] == pytest.approx(3 * spent[2])
        constants = {entry["key"]: entry for entry in chip["constants"]}
        assert constants.keys() == lnpu.chip(chip["chip"]).values().keys()
    with reported["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["chip"] for row in rows] == [chip["chip"] for chip in data["chips"] for _ in chip["rows"]]
    assert [float(row["energy_pj"]) for row in rows] == [
        row["energy_pj"] for chip in data["chips"] for row in chip["rows"]
    ]


def test_shares_are_those_of_the_operands(reported: dict[str, Any]) -> None:
    shares = json.loads(reported["json"].read_text())["shares"]
    assert (shares["layers"], shares["epochs"]) == ([NAME, "fc"], [1, 2, 3])
    assert shares["input"] == {"zero": [[5 / 10] * 3] * 2, "fp8": [[3 / 5] * 3] * 2}
    # nobody asked for the first layer's grad_input: its error is the second operand of grad_weight
    assert shares["grad_output"] == {"zero": [[0.0] * 3, [5 / 10] * 3], "fp8": [[6 / 8] * 3, [3 / 5] * 3]}


def test_a_head_sorts_its_column_and_turns_the_order(browser: Browser, reported: dict[str, Any]) -> None:
    rows = json.loads(reported["json"].read_text())["chips"][0]["layers"]
    for field in ("energy_pj", "dram_energy_pj", "operations", "zero_share"):
        for descending in (True, False):
            browser.run(f"""{table(0)}.querySelector('th[data-field="{field}"]').click()""")
            values = [float(cell[field]) if cell[field] else None for cell in cells(browser, 0)]
            there = sorted((row[field] for row in rows if row[field] is not None), reverse=descending)
            assert values == [*there, *[None] * (len(rows) - len(there))], field
    browser.run(f"""{table(0)}.querySelector('th[data-field="layer"]').click()""")
    names = [cell["layer"] for cell in cells(browser, 0)]
    assert names[:2] == ["(activation)", "(optimizer)"] and sorted(names) == sorted(row["layer"] for row in rows)
    assert browser.run(f"""{table(0)}.querySelectorAll('th[aria-sort]').length""") == 1


def test_one_chips_table_is_shown_at_a_time(browser: Browser) -> None:
    shown = "[...document.querySelectorAll('.of-chip')].map(each => each.offsetParent !== null)"
    assert browser.run(shown) == [True, False]
    browser.run("document.querySelectorAll('.tabs button')[1].click()")
    assert browser.run(shown) == [False, True]
    browser.run("document.querySelectorAll('.tabs button')[0].click()")
    assert browser.run(shown) == [True, False]


def test_it_fits_a_screen_of_1280_pixels(browser: Browser) -> None:
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.run("[...document.querySelectorAll('.wide')].every(each => each.scrollWidth <= each.clientWidth)")


def test_every_figure_is_drawn_and_ids_are_its_own(browser: Browser) -> None:
    assert browser.run("[...document.querySelectorAll('svg')].map(each => each.closest('section').id)") == [
        *("energy_by_epoch", "chips_side_by_side", "accuracy_by_energy", "shares_by_layer", "lanes_busy")
    ]
    assert browser.run("[...document.querySelectorAll('svg')].every(each => each.getBBox().width > 500)")
    ids = browser.run("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(ids) == len(set(ids))
    for kind in ("xlink:href", "clip-path"):
        named = f"[...document.querySelectorAll('svg *')].map(each => each.getAttribute('{kind}')).filter(each => each)"
        used = {re.sub(r"^(url\()?#|\)$", "", each) for each in browser.run(named) if not each.startswith("data:")}
        assert used and used <= set(ids)


def test_numbers_at_the_axes_do_not_touch(tmp_path: Path) -> None:
    data = RunReport.of(read_run(write_run(tmp_path / "run", epochs=30)), [*CHIPS, "lnpu-fp16", "sparse-inference"])
    with figure_style.look():
        for name, figure in figures(data).items():
            if name == "lanes_busy":
                continue  # names of layers, aslant
            figure.draw_without_rendering()
            ticks = [
                tick
                for axes in figure.axes
                for tick in axes.xaxis.get_major_ticks()
                if axes.get_xlim()[0] <= tick.get_loc() <= axes.get_xlim()[1]
            ]
            for one, other in itertools.combinations([tick.label1.get_window_extent() for tick in ticks], 2):
                assert not one.overlaps(other.padded(2)), (name, one, other)


def test_names_and_settings_are_text_and_not_markup(browser: Browser, reported: dict[str, Any]) -> None:
    assert browser.run(f"{table(0)}.querySelectorAll('tbody td b').length") == 0
    words = browser.run("document.querySelector('main').innerText")
    assert NAME in words
    for said in ("model.name\ntiny", "torch 9.9", "published", "constants:"):
        assert said in words, said


def test_plots_are_saved_as_png_and_svg(reported: dict[str, Any]) -> None:
    assert {file.name for file in reported["plots"].iterdir()} == {
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")
    }
    for file in reported["plots"].glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG") and str(file) in reported["said"].replace("\n", "")
    assert all("<svg" in file.read_text() for file in reported["plots"].glob("*.svg"))


def test_the_same_run_gives_the_same_bytes(reported: dict[str, Any]) -> None:
    data = RunReport.of(read_run(reported["run"]), CHIPS)
    pages = []
    for _ in range(2):
        with figure_style.look():
            drawn = {name: figure_style.inline_svg(figure, name, name) for name, figure in figures(data).items()}
        pages.append(page(data, drawn))
    assert pages[0] == pages[1]
    assert len(pages[0]) < 1_000_000


def test_one_epoch_and_no_metrics_leave_out_what_would_show_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=1, settings="")
    (run / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    network().save(run / "counts" / "epoch1.json")
    (run / "versions.json").unlink()
    data = RunReport.of(read_run(run), read_run(run).chips)
    assert [chip.chip for chip in data.chips] == ["lnpu"]
    with figure_style.look():
        drawn = figures(data)
        html = page(data, {name: figure_style.inline_svg(figure, name, name) for name, figure in drawn.items()})
    assert drawn.keys() == {"energy_by_epoch", "chips_side_by_side", "shares_by_layer"}
    assert "multipliers" in html and "time of the SIMD core" not in html
    assert "not recorded" in html and "test accuracy" not in html
    assert "vector operations were not counted" in html


def test_what_no_model_covers_is_no_zero(tmp_path: Path) -> None:
    bare = lnpu.chip("lnpu").model_copy(update={"simd": None, "name": "bare"})
    data = RunReport.of(read_run(write_run(tmp_path / "run")), [bare])
    both = RunReport.of(read_run(tmp_path / "run"), [bare, "lnpu"])
    with figure_style.look():
        drawn = figures(both)
        side_by_side = figure_style.svg(drawn["chips_side_by_side"], "chips")
        assert side_by_side.count(", without SIMD") == 2  # energy and traffic
        assert "bare, without SIMD" in figure_style.svg(drawn["accuracy_by_energy"], "accuracy")
    relu = next(row for row in data.chips[0].layers if row.layer == "(activation)")
    assert relu.energy_pj is None and relu.operations
    with figure_style.look():
        html = page(data, {name: figure_style.inline_svg(figure, name, name) for name, figure in figures(data).items()})
    (row,) = re.findall(r"<tr>(?:(?!</tr>).)*\(activation\).*?</tr>", html, re.DOTALL)
    cells = re.findall(r'data-value="(.*?)">(.*?)<', row)
    assert [text for _, text in cells][-5:] == ["-"] * 5 and cells[-2][0] == ""


def test_what_is_estimated_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    estimate = epoch_counts(1).with_sparsity({"default": {"input": 0.5}})
    estimate.save(run / "counts" / "epoch1.json")
    report = RunReport.of(read_run(run), CHIPS)
    assert f">estimate</span> {estimate.estimate}" in page(report, {})
    assert json.loads(report.json_text())["estimate"] == estimate.estimate
    assert ">estimate</span>" not in page(RunReport.of(read_run(write_run(tmp_path / "other")), CHIPS), {})


def test_what_is_extrapolated_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=1)
    epoch_counts(1).model_copy(update={"extrapolated": True}).save(run / "counts" / "epoch1.json")
    assert ">extrapolated</span>" in page(RunReport.of(read_run(run), CHIPS), {})
    assert ">extrapolated</span>" not in page(RunReport.of(read_run(write_run(tmp_path / "other")), CHIPS), {})


def test_chips_and_voltage_can_be_chosen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=1)
    done = CliRunner().invoke(
        app, ["report", str(run), "--chip", "lnpu-fp16", "--voltage", "1.1", "--json", str(tmp_path / "x")]
    )
    assert done.exit_code == 0, done.output
    (chip,) = json.loads((tmp_path / "x").read_text())["chips"]
    assert (chip["chip"], chip["clock_hz"]) == ("lnpu-fp16", 200e6)
    assert (run / "report.html").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(app, ["report", str(write_run(tmp_path / "run", epochs=1))])
    assert done.exit_code == 2 and "lnpu-torch[plot]" in done.output
