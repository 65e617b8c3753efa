"""What notebooks show: the tables of reports, coverage, counts and chips as HTML, with bars."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from helpers.handmade import network
from lnpu_torch.cost.comparison import Comparison
from lnpu_torch.text_tables import Tables, add_row, html, markdown_table, plain_table


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
            *(["layer", "energy", "MACs"], ["a<b>", "500 uJ", "7"], ["b", "2 mJ", "7"], ["c", "-", "7"]),
            ["total", "2.5 mJ", "21"],
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


def test_coverage_tells_of_functions_only_where_a_module_may_call_some() -> None:
    assert coverage().notes == ()  # type: ignore[attr-defined]
    alone = lnpu.coverage(lnpu.convert(nn.TransformerEncoderLayer(4, 1, 4), only=(nn.Linear,)))
    assert any("not emulated" in note for note in alone.notes)


def test_markdown_keeps_a_row_on_its_line_and_a_cell_in_its_column() -> None:
    assert markdown_table(["a", "b"], [["x|y", "two\n lines"], ["", "3"]]) == (
        "| a | b |\n| --- | --- |\n| x\\|y | two lines |\n|  | 3 |"
    )
