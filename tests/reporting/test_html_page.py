"""The page of a run: its numbers, in a real browser; its figures and files."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
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
from large_page import measured, write_large_run
from lnpu_torch.cli.app import app
from lnpu_torch.cost.energy_plot import PARTS
from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.schema import Counts
from lnpu_torch.reporting import figure_style, run_reader
from lnpu_torch.reporting.figures import FIGURES, figures
from lnpu_torch.reporting.html_page import page
from lnpu_torch.reporting.page_charts import micro
from lnpu_torch.reporting.run_reader import read_run
from lnpu_torch.reporting.run_report import RunReport
from lnpu_torch.text_tables import si

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


SECTIONS = ["energy_by_layer", "shares_by_layer", "chips_side_by_side", "accuracy_by_energy", "energy_by_epoch"]


def test_every_chart_is_drawn_where_it_can_be_seen(browser: Browser) -> None:
    sections = browser.run("[...document.querySelectorAll('section')].map(each => each.id)")
    assert sections == [*SECTIONS, "lanes_busy", "layers", "provenance"]
    sizes = "[...document.querySelectorAll('span.bar, .heat rect, .dot')].map(each => each.getBoundingClientRect())"
    shown = browser.run(f"{sizes}.map(each => [each.width, each.height])")
    assert len(shown) > 40 and all(width > 0 and height > 1 for width, height in shown)
    columns = "[...document.querySelectorAll('.columns .bar')].map(each => each.getBoundingClientRect())"
    first, second, third = browser.run(f"{columns}.map(each => each.height)")
    assert len(set(browser.run(f"{columns}.map(each => each.bottom)"))) == 1
    assert first > 150 and (second, third) == pytest.approx((first * 2 / 3, first / 3), abs=1)


def with_dram(row: dict[str, Any]) -> float:
    return float(row["energy_pj"] + (row["dram_energy_pj"] or 0))


def test_bars_are_sorted_and_their_pieces_are_the_energies_of_the_json(
    browser: Browser, reported: dict[str, Any]
) -> None:
    rows = json.loads(reported["json"].read_text())["chips"][0]["layers"]
    wanted = sorted(rows, key=with_dram, reverse=True)
    bars = "[...document.querySelectorAll('#energy_by_layer .row')]"
    assert browser.run(f"{bars}.map(row => row.querySelector('.label').innerText)") == [row["layer"] for row in wanted]
    widths = browser.run(f"{bars}.map(row => row.querySelector('.bar').getBoundingClientRect().width)")
    assert widths == pytest.approx([widths[0] * with_dram(row) / with_dram(wanted[0]) for row in wanted], abs=2)
    pieces = browser.run(f"[...{bars}[0].querySelectorAll('i')].map(each => [each.className, each.title])")
    parts = [part for part in PARTS if wanted[0][f"{part}_energy_pj"]]
    assert [name for name, _ in pieces] == parts
    for part, (_, says) in zip(parts, pieces, strict=True):
        assert si(wanted[0][f"{part}_energy_pj"], "pJ") in says.replace("\u00b5", "u")


def test_dram_can_be_left_out_of_the_bars(browser: Browser) -> None:
    pieces = "document.querySelectorAll('#chips_side_by_side .bars:has(.without-dram) i.dram')"
    seen = f"[...{pieces}].filter(each => each.offsetWidth).length"
    value = "document.querySelector('#chips_side_by_side .value').innerText"
    choice = "document.querySelectorAll('#chips_side_by_side input')"
    before, with_dram = browser.run(seen), browser.run(value)
    browser.run(f"{choice}[1].click()")
    assert browser.run(seen) == 0 < before and browser.run(value) != with_dram
    browser.run(f"{choice}[0].click()")
    assert (browser.run(seen), browser.run(value)) == (before, with_dram)


def test_without_dram_bars_are_sorted_by_the_chips_energy(browser: Browser, reported: dict[str, Any]) -> None:
    rows = json.loads(reported["json"].read_text())["chips"][0]["layers"]
    choice = "document.querySelectorAll('#energy_by_layer input')"
    top = "row.getBoundingClientRect().top"
    place = f"[...document.querySelectorAll('#energy_by_layer .row')].map(row => [{top}, row.children[0].innerText])"
    browser.run(f"{choice}[1].click()")
    shown = [name for _, name in sorted(browser.run(place))]
    browser.run(f"{choice}[0].click()")
    wanted = sorted(rows, key=lambda row: row["energy_pj"], reverse=True)
    assert shown == [row["layer"] for row in wanted] != [name for _, name in sorted(browser.run(place))]


def test_it_fits_a_phone_and_text_stays_readable(browser: Browser) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=False)
    try:
        assert browser.run("document.documentElement.scrollWidth") <= 390
        texts = "[...document.querySelectorAll('section *')].filter(each => each.innerText && each.offsetWidth)"
        assert browser.run(f"Math.min(...{texts}.map(each => parseFloat(getComputedStyle(each).fontSize)))") >= 11
        assert browser.run("Math.min(...[...document.querySelectorAll('.track')].map(each => each.offsetWidth))") > 60
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")


CONTRAST = """(() => {
    const channel = part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    const numbers = text => (text.match(/[\\d.]+/g) || []).map(Number);
    const light = text => numbers(text).slice(0, 3).map(each => channel(each / 255))
        .reduce((sum, each, place) => sum + each * [0.2126, 0.7152, 0.0722][place], 0);
    const ground = each => {
        for (; each; each = each.parentElement) {
            const found = getComputedStyle(each).backgroundColor;
            if (numbers(found)[3] !== 0) return found;
        }
        return "rgb(255, 255, 255)";
    };
    const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
    const low = [];
    for (const each of document.querySelectorAll("main *")) {
        const style = getComputedStyle(each);
        const text = [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        const filled = each.matches(".bar i, .dot, .legend i:not(.scale)");
        if (text && !each.closest("svg") && ratio(style.color, ground(each)) < 4.5)
            low.push([each.innerText, style.color, ground(each)]);
        if (filled && ratio(style.backgroundColor, ground(each.parentElement)) < 3)
            low.push([each.className, style.backgroundColor]);
    }
    return low;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_bars_stand_out(browser: Browser, scheme: str) -> None:
    """Text at least 4.5:1 against its ground, bars and dots 3:1, as WCAG asks."""
    wanted = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", features=wanted)
    try:
        dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
        assert dark == (scheme == "dark")
        assert browser.run(CONTRAST) == []
    finally:
        browser.call("Emulation.setEmulatedMedia", features=[])


def test_no_column_is_cut_off_on_a4(browser: Browser) -> None:
    """The tables have as much room as an A4 page across leaves, at 96 pixels an inch."""
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.call("Emulation.setDeviceMetricsOverride", width=1047, height=718, deviceScaleFactor=1, mobile=False)
    try:
        right = "Math.max(...[...document.querySelectorAll('th, td')].map(each => each.getBoundingClientRect().right))"
        assert browser.run(right) <= 1047
        assert browser.run("getComputedStyle(document.querySelector('#layers')).page") == "across"
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")
        browser.call("Emulation.setEmulatedMedia", media="")


def test_the_head_says_how_much_where_and_why(browser: Browser, reported: dict[str, Any]) -> None:
    lnpu_chip, dense = json.loads(reported["json"].read_text())["chips"]
    total, other = lnpu_chip["total"], dense["total"]
    whole, others = with_dram(total), with_dram(other)
    much, where, why = browser.run("[...document.querySelectorAll('.card')].map(each => each.innerText)")
    for value in (whole, total["energy_pj"], total["dram_energy_pj"]):
        assert si(value, "pJ") in much.replace("\u00b5", "u")
    assert f"{others / whole:.2f}x with DRAM" in much
    assert f"{other['energy_pj'] / total['energy_pj']:.2f}x on the chip alone" in much
    assert f"{total['dram_energy_pj'] / whole:.0%} DRAM" in where and "(optimizer)" in where
    assert f"{total['zero_share']:.1%}" in why and f"{total['fp8_share']:.1%}" in why
    asked = total["macs"] - total["padding"] - total["not_run"]
    assert f"{total['skipped'] / asked:.0%} skipped" in why


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
    assert page(data) == page(data) == reported["html"].read_text()
    with figure_style.look():
        one, other = ({name: figure_style.svg(each, name) for name, each in figures(data).items()} for _ in range(2))
    assert one == other


def test_one_epoch_and_no_metrics_leave_out_what_would_show_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=1, settings="")
    (run / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    network().save(run / "counts" / "epoch1.json")
    (run / "versions.json").unlink()
    data = RunReport.of(read_run(run), read_run(run).chips)
    assert [chip.chip for chip in data.chips] == ["lnpu"]
    html = page(data)
    with figure_style.look():
        assert figures(data).keys() == {"energy_by_layer", "energy_by_epoch", "chips_side_by_side", "shares_by_layer"}
    assert 'id="lanes_busy"' not in html and 'id="accuracy_by_energy"' not in html
    assert "not recorded" in html and "test accuracy" not in html
    assert "vector operations were not counted" in html


def test_a_file_of_counts_has_a_page_too(browser: Browser, tmp_path: Path) -> None:
    """One epoch of a loop of one's own: rows of the heat map stay low, long names keep both ends."""
    long = "blocks.0.attention:multi_head_attention_forward.{}"
    first, *_ = network().steps
    steps = [first.model_copy(update={"layer": long.format(word)}) for word in ("query", "values")]
    network().model_copy(update={"steps": tuple(steps)}).save(tmp_path / "mine.json")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "mine.json")])
    assert done.stdout == f"saved: {tmp_path}/mine.report.html\n", done.output
    browser.open(tmp_path / "mine.report.html")
    labels = browser.run("[...document.querySelectorAll('.heat .label')].map(each => [each.innerText, each.title])")
    assert (
        labels[0] == ["blocks.0.at...on_forward.query", long.format("query")] and len({text for text, _ in labels}) == 2
    )
    heights = browser.run("[...document.querySelectorAll('.heat svg')].map(each => each.clientHeight)")
    assert len(heights) == 8 and all(0 < height <= 18 for height in heights)


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
    assert "bare, without SIMD" in page(both)
    html = page(data)
    (row,) = re.findall(r"<tr>(?:(?!</tr>).)*\(activation\).*?</tr>", html, re.DOTALL)
    cells = re.findall(r'data-value="(.*?)">(.*?)<', row)
    assert [text for _, text in cells][-5:] == ["-"] * 5 and cells[-2][0] == ""


def test_what_is_estimated_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    estimate = epoch_counts(1).with_sparsity({"default": {"input": 0.5}})
    estimate.save(run / "counts" / "epoch1.json")
    report = RunReport.of(read_run(run), CHIPS)
    assert f">estimate</span> {estimate.estimate}" in page(report)
    assert json.loads(report.json_text())["estimate"] == estimate.estimate
    assert ">estimate</span>" not in page(RunReport.of(read_run(write_run(tmp_path / "other")), CHIPS))


def test_what_is_extrapolated_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=1)
    epoch_counts(1).model_copy(update={"extrapolated": True}).save(run / "counts" / "epoch1.json")
    assert ">extrapolated</span>" in page(RunReport.of(read_run(run), CHIPS))
    assert ">extrapolated</span>" not in page(RunReport.of(read_run(write_run(tmp_path / "other")), CHIPS))


def test_chips_and_voltage_can_be_chosen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=1)
    done = CliRunner().invoke(
        app, ["report", str(run), "--chip", "lnpu-fp16", "--voltage", "1.1", "--json", str(tmp_path / "x")]
    )
    assert done.exit_code == 0, done.output
    (chip,) = json.loads((tmp_path / "x").read_text())["chips"]
    assert (chip["chip"], chip["clock_hz"]) == ("lnpu-fp16", 200e6)
    assert (run / "report.html").exists()


def test_plots_alone_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run(tmp_path / "run", epochs=1)
    done = CliRunner().invoke(app, ["report", str(run), "--plots", str(tmp_path / "plots")])
    assert done.exit_code == 2 and "lnpu-torch[plot]" in done.output
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0 and (run / "report.html").exists()


def test_other_runs_stand_beside_it(tmp_path: Path) -> None:
    """One in float32 has no price, but an accuracy, and no page of its own."""
    runs = [write_run(tmp_path / name, epochs) for name, epochs in (("fgmp", 3), ("float32", 4))]
    shutil.rmtree(runs[1] / "counts")
    done = CliRunner().invoke(app, ["report", *map(str, runs)])
    assert done.exit_code == 0, done.output
    html = (runs[0] / "report.html").read_text()
    assert "Test accuracy 87.50% after 3 epochs; float32 93.75% after 4 epochs (+6.25 points)." in html
    assert 'title="float32, epoch 4: 93.75%"' in html and "float32: nothing was counted" in html
    (spent,) = re.findall(r'title="fgmp, epoch 3: 87.50% for ([\d.]+ [num]J)"', html)
    assert spent == si(price(Counts.merge(map(epoch_counts, (3, 2, 1))), "lnpu").total.all_energy_pj, "pJ")
    assert not (runs[1] / "report.html").exists()
    shutil.rmtree(runs[0] / "counts")
    assert "nothing was counted; name another run" in CliRunner().invoke(app, ["report", str(runs[0])]).output
    assert "nothing was counted in any" in CliRunner().invoke(app, ["report", *map(str, runs)]).output


def test_of_many_epochs_some_are_shown(tmp_path: Path) -> None:
    report = RunReport.of(read_run(write_large_run(tmp_path / "long", 3, 130)), ["lnpu"])
    html = page(report)
    assert "44 of 130 epochs" in html and len(html) < 2_000_000
    assert all(figure.get_size_inches()[1] < 12 for figure in figures(report).values())


def test_of_many_layers_those_that_take_most_are_shown(tmp_path: Path) -> None:
    report = RunReport.of(read_run(write_large_run(tmp_path / "deep", 150, 5)), ["lnpu"])
    html = page(report)
    for told in ("The 30 of 152 rows", "The 100 of 152 rows", "The 40 of 150 layers"):
        assert told in html, told
    assert "the other 52 of 152" in html
    assert len(html) < 2_000_000
    rest = sorted(report.chips[0].layers, key=lambda row: -(row.all_energy_pj or 0))[30:]
    left = si(sum(row.all_energy_pj or 0 for row in rest), "pJ")
    assert f"the others together take {left}" in html
    with figure_style.look():
        assert f"the other 122 of 152 take {left}" in figure_style.svg(figures(report)["energy_by_layer"], "layers")
        assert all(figure.get_size_inches()[1] < 12 for figure in figures(report).values())


def test_a_large_run_is_read_in_part_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", epochs=30)
    exact = RunReport.of(read_run(run, soon=True), ["lnpu"])
    monkeypatch.setattr(run_reader, "SOON_READ", 1)
    part = read_run(run, soon=True)
    assert [(epoch.number, epoch.stands_for) for epoch in part.epochs] == [(3 * each, 3) for each in range(1, 11)]
    report = RunReport.of(part, ["lnpu"])
    assert (report.epochs, report.extrapolated, exact.extrapolated) == (30, True, False)
    told = "10 of 30 epochs were read; each stands for those since the one before it"
    html = page(report)
    assert told in html and "30 epochs" in html and told not in page(exact)
    whole = Counts.merge(epoch_counts(31 - 3 * each) for each in range(1, 11)) * 3
    assert report.chips[0].total.energy_pj == price(whole, "lnpu").total.energy_pj
    done = CliRunner().invoke(app, ["report", str(run), "--all-epochs", "--json", str(tmp_path / "all.json")])
    assert done.exit_code == 0 and json.loads((tmp_path / "all.json").read_text())["left_out"] is None
    assert told not in (run / "report.html").read_text()
    said = CliRunner().invoke(app, ["report", str(run)]).stdout
    assert f"{told}; --all-epochs reads all" in said


@pytest.mark.slow
def test_the_page_of_a_large_run_is_made_in_good_time(tmp_path: Path) -> None:
    """It took 15 s of CPU and 0.3 GB."""
    run = write_large_run(tmp_path / "large", 200, 300)
    _, seconds, memory_gb = measured(run)
    assert seconds < 40 and memory_gb < 1
    assert (run / "report.html").stat().st_size < 2_000_000


def test_every_unit_of_a_millionth_is_written_alike() -> None:
    assert micro("1 uJ, 2 us, 3 uW, 4 uWh, 5 ug, 6 units") == "1 µJ, 2 µs, 3 µW, 4 µWh, 5 µg, 6 units"
