"""What notebooks show: the tables of reports, coverage, counts and chips as HTML, with bars."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lnpu_torch as lnpu
from helpers.handmade import network
from lnpu_torch.cost.comparison import Comparison
from lnpu_torch.cost.energy_plot import PARTS
from lnpu_torch.text_tables import (
    Blocks,
    Rows,
    Tables,
    add_row,
    fitted,
    html,
    in_one_unit,
    markdown_table,
    plain_table,
)


class Cells(HTMLParser):
    """Tables of a page, as rows of cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.inside = tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def bars(page: str) -> list[float]:
    return [float(width) for width in re.findall(r"0\.3\) ([\d.]+)%", page)]


def test_bars_are_as_long_as_numbers_are_large_and_totals_have_none() -> None:
    table = plain_table("Energy & time", ["layer"], ["energy", "MACs"])
    for name, energy in (("a<b>", "500 uJ"), ("b", "2 mJ"), ("c", "-")):
        add_row(table, name, energy, "7")
    table.add_section()
    add_row(table, "total", "2.5 mJ", "21")
    page = html(table)
    assert bars(page) == [25.0, 100.0]
    assert "Energy &amp; time" in page and "<b>" not in page
    assert Cells(page).tables == [
        [
            *(["layer", "energy", "MACs"], ["a<b>", "0.500 mJ", "7"], ["b", "2.000 mJ", "7"], ["c", "-", "7"]),
            ["total", "2.500 mJ", "21"],
        ]
    ]


def report() -> lnpu.Report:
    return lnpu.price(network(), "lnpu")


def coverage() -> Tables:
    model = lnpu.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)), overrides={"2": None})
    return lnpu.coverage(model, torch.randn(2, 4))


SHOWN = {
    "report": report,
    "comparison": lambda: Comparison([report(), lnpu.price(network(), "dense-fp16")]),
    "counts": network,
    "chip": lambda: lnpu.chip("lnpu-fp16"),
    "coverage": coverage,
    "sensitivity": lambda: lnpu.sensitivity(network(), ["lnpu"]),
    "sweep": lambda: lnpu.sweep(network(), ["lnpu"], {"macs_per_cycle.fp16": [384, 768]}),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_shows_what_the_text_says(name: str) -> None:
    shown = SHOWN[name]()
    page, text = shown._repr_html_(), re.sub(r"\s+", "", str(shown))
    cells = [cell for table in Cells(page).tables for row in table[1:] for cell in row]
    assert cells and all(re.sub(r"\s+", "", cell) in text for cell in cells if name != "coverage")
    if name in ("report", "comparison", "sensitivity"):
        assert bars(page) and max(bars(page)) == 100


def test_a_notebook_says_so_where_nothing_is_in_float() -> None:
    page = lnpu.coverage(lnpu.convert(nn.Sequential(nn.Linear(2, 2)), "fgmp"), torch.zeros(1, 2))._repr_html_()
    assert "In float: none" in page and "in float (0.0%): none" in page and "<table" not in page


def test_rows_are_exact_and_pandas_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Frame(list[dict[str, object]]):
        """Stands in for pandas.DataFrame, which need not be installed."""

    pandas = SimpleNamespace(DataFrame=Frame, __spec__=ModuleSpec("pandas", None))
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    found = report()
    assert found.to_pandas() == [row.to_dict() for row in found.rows] and type(found.to_pandas()) is Frame
    assert len(found.by("layer").to_pandas()) == 2
    first, second = network().steps[0], coverage()
    assert isinstance(second, Rows)
    row = network().to_pandas()[0]
    assert (row["layer"], row["macs"], row["first_fp8"], row["second_fp8"]) == ("conv1", 55, 3, 6)
    assert tuple(row[f"first_{group}"] for group in ("zero", "fp8", "wide")) == first.first.elements
    assert [(each["layer"], each["emulated"]) for each in second.to_rows()] == [("0", True), ("1", False), ("2", False)]
    swept = lnpu.sweep(network(), ["lnpu"], {"macs_per_cycle.fp16": [384, 768]})
    assert [each["macs_per_cycle.fp16"] for each in swept.to_pandas()] == [384, 768]
    assert [each["pareto"] for each in swept.to_rows()] == [point.pareto for point in swept.points]


def test_pandas_takes_the_rows_where_it_is_installed() -> None:
    pytest.importorskip("pandas")
    frame = report().to_pandas()
    assert frame.energy_pj.sum() == pytest.approx(report().total.energy_pj)


@pytest.mark.parametrize(
    ("library", "call", "extra"),
    [("pandas", lambda: report().to_pandas(), "pandas"), ("matplotlib", lambda: report().plot(), "plot")],
)
def test_what_is_missing_is_named_with_its_extra(
    library: str, call: Callable[[], object], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(lnpu.ConfigError, match=re.escape(f"lnpu-torch[{extra}]")):
        call()


def test_a_plot_has_a_bar_for_each_layer_sorted_in_the_colours_of_its_parts() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = report()
    axes = found.plot()
    try:
        rows = sorted(found.by("layer").rows, key=lambda row: -(row.all_energy_pj or 0))
        assert [label.get_text() for label in axes.get_yticklabels()] == [row.layer for row in rows]
        bars = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
        for name, part in PARTS.items():
            values = [(getattr(row, f"{name}_energy_pj") or 0) * 1e-12 for row in rows]
            assert bars.get(part.label, [0.0] * len(rows)) == pytest.approx(values), name
        assert found.by("step").plot(axes) is axes
    finally:
        pyplot.close(axes.figure)


def test_coverage_tells_of_functions_only_where_a_module_may_call_some() -> None:
    assert coverage().notes == ()  # type: ignore[attr-defined]
    alone = lnpu.coverage(lnpu.convert(nn.TransformerEncoderLayer(4, 1, 4), only=(nn.Linear,)))
    assert any("not emulated" in note for note in alone.notes)


def test_markdown_keeps_a_row_on_its_line_and_a_cell_in_its_column() -> None:
    assert markdown_table(["a", "b"], [["x|y", "two\n lines"], ["", "3"]]) == (
        "| a | b |\n| --- | --- |\n| x\\|y | two lines |\n|  | 3 |"
    )


def test_a_column_has_one_unit_and_its_points_stand_below_each_other() -> None:
    assert in_one_unit(["13.2 uJ", "2 mJ", "-", "0 J", "499 nJ", "1.21 mJ (2.00x)"]) == (
        ["0.013 mJ", "2.000 mJ", "-", "0 J", "<0.001 mJ", "1.210 mJ (2.00x)"]
    )
    assert in_one_unit(["800 ms", "12 s"]) == ["0.80 s", "12.00 s"]
    for left in (
        "1 mJ, 2 ms",
        "1 mJ, 2 uJ, see below",
        "1.5 mJ, 12 mJ",
        "0.78, 1.1",
        "41.47 M, 1.327 G",
        "1 uJ ... 2 mJ, 1 mJ, 1 uJ",
    ):
        assert in_one_unit(left.split(", ")) == left.split(", ")


def wide_table(rows: int = 3) -> Table:
    table = plain_table("Layers", ["layer", "kind", "step", "what it is"], [f"number {i}" for i in range(8)])
    for row in range(rows):
        for step in ("forward", "update"):
            add_row(table, f"features.{row}", "Conv2d", step, "a layer " * 9, *(f"{1e6 + row:.0f}" for _ in range(8)))
    table.add_section()
    return table


def test_a_table_that_is_too_wide_comes_in_parts_that_fit() -> None:
    table = wide_table()
    (whole,) = fitted(table, 400)
    assert whole is table
    parts = fitted(table, 80)
    assert len(parts) > 1 and str(parts[0].title) == f"Layers; kind: Conv2d; what it is: {'a layer ' * 9}"
    heads = [[str(column.header) for column in part.columns] for part in parts]
    assert all(head[:2] == ["layer", "step"] for head in heads)
    assert [head for each in heads for head in each[2:]] == [f"number {i}" for i in range(8)]
    text = printed(Blocks(table), 80)
    assert max(map(len, text.splitlines())) <= 80 and text.count("1000002") == 16


def test_only_text_is_folded() -> None:
    table = plain_table("Sources", ["check", "source"], ["ours"])
    for row in range(3):
        add_row(table, f"peak {row}", f"{row} " + "many words " * 20, f"{row}.2345678901234")
    assert len(fitted(table, 70)) == 1
    text = printed(Blocks(table), 70)
    assert max(map(len, text.splitlines())) <= 70
    assert all(f"{row}.2345678901234" in text for row in range(3)) and text.split().count("many") == 60


def printed(shown: Tables, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    return "\n".join(map(str.rstrip, console.file.getvalue().splitlines()))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SHOWN)
def test_no_number_is_broken_on_a_narrow_screen(name: str) -> None:
    shown = SHOWN[name]()
    text = printed(shown, 80)
    assert max(map(len, text.splitlines())) <= 80
    numbers = set(re.findall(r"(?<=  )[\d.]+(?: [a-zA-Z]+| \.\.\. [\d.]+)?(?=  |$)", str(shown), re.MULTILINE))
    assert numbers and all(number in text for number in numbers)


def test_a_table_without_rows_is_its_title() -> None:
    table = plain_table("Nothing is in float", ["module"], ["MACs"])
    assert html(table) == "<p>Nothing is in float</p>" and str(Blocks(table)) == "Nothing is in float"


def test_few_rows_stand_as_columns_where_that_fits() -> None:
    table = plain_table("Totals", ["chip"], [f"number {i}" for i in range(9)])
    for chip, digit in (("lnpu", 2), ("dense-fp16", 3)):
        add_row(table, chip, *(f"{i}.{digit}5 mJ" for i in range(9)))
    (turned,) = fitted(table, 60)
    lines = printed(Blocks(table), 60).splitlines()
    assert str(turned.title) == lines[0] == "Totals" and lines[2].split() == ["chip", "lnpu", "dense-fp16"]
    assert [line.split() for line in lines[4:13]] == [f"number {i} {i}.25 mJ {i}.35 mJ".split() for i in range(9)]
    assert len(fitted(table, 30)) > 1


def test_rows_of_one_name_are_told_apart_by_what_follows_it() -> None:
    table = plain_table("Points", ["chip"], ["volts", *(f"number {i}" for i in range(6))])
    for volts in ("0.7", "0.8", "0.9", "1.0"):
        add_row(table, "lnpu", volts, *(volts + f"{i}" for i in range(6)))
    heads = [[str(column.header) for column in part.columns] for part in fitted(table, 60)]
    assert len(heads) == 2 and all(head[:2] == ["chip", "volts"] for head in heads)


def test_columns_stay_in_order() -> None:
    table = plain_table("Mixed", ["layer"], [f"number {i}" for i in range(10)])
    for row in range(4):
        add_row(table, f"layer {row}", *(f"{row}{i}" if i in (2, 7) else "7" for i in range(10)))
    heads = [str(column.header) for part in fitted(table, 50) for column in part.columns if "n" in str(column.header)]
    assert heads == [f"number {i}" for i in (2, 7)]
