"""What the page of a run draws, as plain numbers: bars, heat maps and lines, in percent of the room there is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from lnpu_torch.cost.cost_row import CostRow
from lnpu_torch.cost.energy_plot import PARTS, most_energy
from lnpu_torch.reporting.run_report import OPERANDS, ChipReport, RunReport
from lnpu_torch.text_tables import si

COLOURS = (
    ("#882255", "#E588B4"),
    ("#117733", "#5CC98B"),
    ("#0072B2", "#5AB4F0"),
    ("#C04F00", "#F2935C"),
    ("#6B4FA0", "#B9A6EC"),
    ("#7A6A00", "#CFBE4C"),
)
"""Of lines, on white and on dark ground; at least 3:1 against it."""

MOST_LAYERS, MOST_EPOCHS = 40, 60
"""Rows and columns of a heat map; more are left out."""


class Segment(NamedTuple):
    """A piece of a bar: the part that gives it its colour, its length in percent of the bar, and what it stands for."""

    part: str
    share: float
    says: str


class Bar(NamedTuple):
    """A bar: its length in percent of the longest, and its text; and both without DRAM, where that can be left out."""

    label: str
    length: float
    text: str
    segments: list[Segment]
    chip_length: float | None = None
    chip_text: str = ""


class Cell(NamedTuple):
    """A cell of a heat map: its place, its share, 0 ... 1, and what it stands for."""

    place: int
    share: float
    says: str


class HeatMap(NamedTuple):
    """Rows of strips: each layer's name, and a strip of cells for each of the heads; what is left out, in words."""

    heads: list[tuple[str, str]]
    rows: list[tuple[str, list[list[Cell]]]]
    epochs: list[int]
    left_out: str


class Series(NamedTuple):
    """A line's name, and its points: x, y, and what they stand for."""

    name: str
    points: Sequence[tuple[float, float, str]]


class Chart(NamedTuple):
    """Lines, with their points and ticks in percent of the width and the height."""

    title: str
    lines: list[Series]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def micro(text: str) -> str:
    """Text in which units of a millionth (uJ, us, uW, uWh, ug) have the letter that pages have room for."""
    return re.sub(r"(?<=\d) u(?=(?:J|s|W|Wh|g)\b)", " \u00b5", text)


def shown(value: float | None, unit: str) -> str:
    """A number as the page shows it."""
    return micro(si(value, unit))


def shown_energy(value: float | None) -> str:
    """An energy in pJ as the page shows it."""
    return shown(value, "pJ")


def energy_bars(rows: Sequence[CostRow], labels: Sequence[str] | None = None, ratios: bool = False) -> list[Bar]:
    """A bar for each row, in the order given, with `ratios` to the first."""
    longest = max((row.all_energy_pj or 0.0 for row in rows), default=0.0) or 1.0
    chip_longest = max((row.energy_pj or 0.0 for row in rows), default=0.0) or 1.0
    bars = []
    for row, label in zip(rows, labels or [row.layer or "(model)" for row in rows], strict=True):
        whole = row.all_energy_pj or 0.0
        spent = {part: getattr(row, f"{part}_energy_pj") or 0.0 for part in PARTS}
        segments = [
            Segment(
                part, 100 * value / whole, f"{label}: {PARTS[part].label} {shown_energy(value)}, {value / whole:.1%}"
            )
            for part, value in spent.items()
            if value
        ]
        text, chip_text = shown_energy(row.all_energy_pj), shown_energy(row.energy_pj)
        if ratios and row is not rows[0] and rows[0].energy_pj:
            text += f" ({whole / (rows[0].all_energy_pj or 1):.2f}x)"
            chip_text += f" ({(row.energy_pj or 0.0) / rows[0].energy_pj:.2f}x)"
        chip_length = 100 * (row.energy_pj or 0.0) / chip_longest
        bars.append(Bar(label, 100 * whole / longest, text, segments, chip_length, chip_text))
    return bars


def heat_map(run: RunReport, chip: ChipReport) -> HeatMap | None:
    """Zeros, and FP8 among the non-zeros, of each layer's activations and errors over the epochs.

    Of many layers those that take most energy on the chip are kept, in the model's order.
    """
    shares = run.shares
    if not shares.layers:
        return None
    most = most_energy([row for row in chip.layers if row.layer in set(shares.layers)], MOST_LAYERS)[0]
    names = {row.layer for row in most}
    layers = [(place, layer) for place, layer in enumerate(shares.layers) if layer in names]
    every = -(-len(shares.epochs) // MOST_EPOCHS)
    places = range(len(shares.epochs))[::-every][::-1]
    strips = [(kind, operand) for kind in ("zero", "fp8") for operand in OPERANDS]
    told = {"zero": "zeros in", "fp8": "FP8 in"}
    rows = []
    for at, layer in layers:
        cells = []
        for kind, operand in strips:
            values = getattr(shares.operands[operand], kind)[at]
            start = f"{layer or '(model)'}, {told[kind]} {OPERANDS[operand]}, epoch"
            cells.append(
                [
                    Cell(column, values[place], f"{start} {shares.epochs[place]}: {values[place]:.1%}")
                    for column, place in enumerate(places)
                    if values[place] is not None
                ]
            )
        rows.append((layer or "(model)", cells))
    words = []
    if len(layers) < len(shares.layers):
        words.append(f"The {len(layers)} of {len(shares.layers):,} layers that take most energy.")
    if every > 1:
        words.append(f"{len(places)} of {len(shares.epochs)} epochs.")
    heads = [(kind, f"{told[kind]} {OPERANDS[operand]}") for kind, operand in strips]
    return HeatMap(heads, rows, [shares.epochs[place] for place in places], " ".join(words))


def line_chart(title: str, series: Sequence[Series], unit: str) -> Chart | None:
    """Lines of shares over what is counted in `unit`; None unless any has two points."""
    points = [point for each in series for point in each.points]
    if not any(len(each.points) > 1 for each in series):
        return None
    right = max(x for x, _, _ in points) or 1.0
    low = math.floor(10 * min(y for _, y, _ in points)) / 10
    high = min(math.ceil(10 * max(y for _, y, _ in points)) / 10, 1.0)
    high = max(high, low + 0.1)
    lines = [
        Series(each.name, [(100 * x / right, 100 * (y - low) / (high - low), says) for x, y, says in each.points])
        for each in series
        if each.points
    ]
    x_ticks = [(100 * x / right, shown(x, unit)) for x in _ticks(0.0, right)]
    y_ticks = [(100 * (y - low) / (high - low), f"{y:.0%}") for y in _ticks(low, high)]
    return Chart(title, lines, x_ticks, y_ticks)


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in a range, at most so many, and one."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * each for each in (1, 2, 5, 10) if (high - low) / (power * each) <= most)
    first = math.ceil(low / step - 1e-9)
    return [step * each for each in range(first, math.floor(high / step + 1e-9) + 1)]
