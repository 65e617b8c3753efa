"""Sensitivity: what the range of each constant of a chip does to a priced run, the most uncertain first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lnpu_torch.cost.pricing import price
from lnpu_torch.cost.report import Report, caveats
from lnpu_torch.counts.schema import Counts
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.hardware.sourced_value import SourcedRange
from lnpu_torch.text_tables import Rows, add_row, plain_table, si

NAMES = {"energy_pj": "pJ", "all_energy_pj": "pJ", "time_s": "s"}
"""What is looked at, and its unit."""

NOTE = "each constant alone, on all chips, each over its own range; the one that moves most first"


@dataclass(frozen=True)
class Effect:
    """The reports of all chips with one constant at either end of its range; `ends` are the first chip's."""

    key: str
    ends: tuple[float, float]
    low: tuple[Report, ...]
    high: tuple[Report, ...]

    @property
    def spread(self) -> float:
        """By how much energy, time, or another chip's ratio differ most between both ends: 2 is twice as much."""
        pairs = [zip(_values(self.low, name), _values(self.high, name), strict=True) for name in NAMES]
        return max(_spread(low, high) for ends in pairs for low, high in ends)


@dataclass(frozen=True)
class Sensitivity(Rows):
    """A run on some chips, and what each constant does to it. `str()` is a table; a rich console prints it too."""

    reports: tuple[Report, ...]
    effects: tuple[Effect, ...]

    def to_rows(self) -> list[dict[str, Any]]:
        """Energies and time of each chip as it is, and with each constant at either end of its range: pJ and s."""
        ends: list[tuple[str | None, str | None, tuple[Report, ...]]] = [(None, None, self.reports)]
        for effect in self.effects:
            ends += [(effect.key, "low", effect.low), (effect.key, "high", effect.high)]
        return [
            {"constant": key, "end": end, "chip": report.chip} | {name: _value(report, name) for name in NAMES}
            for key, end, reports in ends
            for report in reports
        ]

    def _blocks(self) -> list[RenderableType]:
        return [self._table(), *self._notes()]

    def _notes(self) -> list[Text]:
        return [Text(NOTE), *map(Text, caveats(self.reports[0]))]

    def _table(self) -> Table:
        first, others = self.reports[0], self.reports[1:]
        heads = ["range", f"{first.chip}: on chip", "chip + DRAM", "time"]
        for other in others:
            heads += [f"{other.chip} / {first.chip}: chip", "chip + DRAM", "time"]
        table = plain_table("What the ranges of constants do", ["constant"], heads)
        add_row(table, "(as it is)", "", *_numbers(self.reports, self.reports))
        for effect in self.effects:
            low, high = effect.ends
            add_row(table, effect.key, f"{low:g} ... {high:g}", *_numbers(effect.low, effect.high))
        return table


def sensitivity(counts: Counts, chips: Sequence[str | Path | Chip]) -> Sensitivity:
    """Price a run with every constant that has a range at either end of it, one at a time.

    Args:
        counts: what a run did.
        chips: names, files or Chips; ratios are to the first.

    Raises:
        ConfigError: no such chip.
    """
    starts = [read_chip(each) for each in chips]
    ranges = {
        key: entry.range
        for start in reversed(starts)
        for key, entry in start.values().items()
        if isinstance(entry, SourcedRange) and entry.range
    }
    effects = [
        Effect(key, ends, *(_reports(counts, [_at(start, key, end) for start in starts]) for end in (0, 1)))
        for key, ends in ranges.items()
    ]
    effects.sort(key=lambda effect: -effect.spread)
    return Sensitivity(tuple(price(counts, start) for start in starts), tuple(effects))


def _at(start: Chip, key: str, end: int) -> Chip:
    """A chip with a constant at one end of its own range; as it is, if it has none."""
    entry = start.values().get(key)
    return start.with_values({key: entry.range[end]}) if isinstance(entry, SourcedRange) and entry.range else start


def _reports(counts: Counts, chips: Sequence[Chip]) -> tuple[Report, ...]:
    return tuple(price(counts, chip) for chip in chips)


def _numbers(low: Sequence[Report], high: Sequence[Report]) -> list[str]:
    """Energy on the chip, with DRAM, and time of the first chip; of the others their ratios to it; at both ends."""
    by_name = {name: zip(_values(low, name), _values(high, name), strict=True) for name in NAMES}
    cells = []
    for place, each in enumerate(zip(*by_name.values(), strict=True)):
        for name, ends in zip(NAMES, each, strict=True):
            unit = NAMES[name]
            texts = [f"{value:.2f}" if place else si(value, unit) for value in ends]
            cells.append(" ... ".join(dict.fromkeys(texts)))
    return cells


def _values(reports: Sequence[Report], name: str) -> list[float]:
    """A number of the first chip, and of each other one its ratio to that."""
    values = [_value(report, name) or 0.0 for report in reports]
    return [values[0], *(value / values[0] if values[0] else 0.0 for value in values[1:])]


def _value(report: Report, name: str) -> float | None:
    value: float | None = report.time_s if name == "time_s" else getattr(report.total, name)
    return value


def _spread(low: float, high: float) -> float:
    return max(low, high) / min(low, high) if low and high else 1.0
