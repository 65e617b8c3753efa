"""Report: a priced run's rows, their sums, how they are shown and written. It knows nothing of how they were priced."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lnpu_torch.config import write_text
from lnpu_torch.rows import FIELDS, Part, Row, add, share
from lnpu_torch.tables import add_row, plain, plain_table, si
from lnpu_torch.units import pj

ALL = "all"
SHORT = {"forward": "forward (FF)", "grad_input": "grad_input (EP)", "grad_weight": "grad_weight (WG)"}
"""A step's name beside the one it has in the chip's papers."""


@dataclass(frozen=True)
class Report:
    """A priced run on one chip. `str()` is a table; a rich console prints it too.

    `grouped` says whether a row is a layer's step (None), a "layer" or a "step"; the total is the same whichever.
    `band` says what the ends of `energy_range_pj` stand for, None if the chip gives no range; `notes` are
    printed below the table.
    """

    chip: str
    clock_hz: float
    parts: tuple[Part, ...]
    band: str | None
    notes: tuple[str, ...]
    grouped: Literal["layer", "step"] | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """One row per layer and step (or per group), in the model's order."""
        groups: dict[tuple[str, ...], list[Part]] = {}
        for part in self.parts:
            key = (part.layer, part.step) if self.grouped is None else (getattr(part, self.grouped),)
            groups.setdefault(key, []).append(part)
        return tuple(self._sum(group).row for group in groups.values())

    @property
    def total(self) -> Row:
        """The sum over all rows, as layer "total", step "all"."""
        return self._total.row

    @property
    def time_s(self) -> float:
        """Cycles over clock, in seconds."""
        return self.total.cycles / self.clock_hz

    @property
    def energy_range_pj(self) -> tuple[float, float]:
        """The total energy at either end of the band, in pJ."""
        low, high = self._total.range_zj
        return pj(low), pj(high)

    @property
    def tflops_per_watt(self) -> float | None:
        """2 FLOP per slot that was asked for, skipped or not, over energy; None if no energy was spent."""
        total = self.total
        return 2 * (total.slots - total.not_run) / total.energy_pj if total.energy_pj else None

    def by(self, key: Literal["layer", "step"]) -> Report:
        """The same report with one row per layer, or per step. Raises ValueError for another key."""
        if key not in ("layer", "step"):
            raise ValueError(f"a report is grouped by 'layer' or 'step', not {key!r}")
        return replace(self, grouped=key)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, exact: what `to_json` writes."""
        return {
            "chip": self.chip,
            "clock_hz": self.clock_hz,
            "time_s": self.time_s,
            "tflops_per_watt": self.tflops_per_watt,
            "energy_range_pj": list(self.energy_range_pj),
            "energy_range": self.band,
            "rows": [asdict(row) for row in self.rows],
            "total": asdict(self.total),
            "notes": list(self.notes),
        }

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON, whole or not at all. Raises ConfigError if that cannot be written."""
        write_text(path, json_text(self))

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV, without the total; a mapping is JSON, None an empty cell. Raises ConfigError."""
        write_text(path, csv_text(self))

    def __rich__(self) -> RenderableType:
        return Group(*self._blocks())

    def __str__(self) -> str:
        return plain(*self._blocks())

    def _blocks(self) -> list[RenderableType]:
        return [_table(self), *map(Text, _footer(self))]

    def _sum(self, group: list[Part]) -> Part:
        """The parts of one row; what differs within it is "all"."""
        first, by = group[0], self.grouped
        layer, kind = (ALL, ALL) if by == "step" else (first.layer, first.kind)
        return add(group, layer, kind, ALL if by == "layer" else first.step)

    @property
    def _total(self) -> Part:
        return add(self.parts, "total", ALL, ALL)


class Comparison:
    """Reports of one run on several chips, side by side; `str()` is a table, and a rich console prints it too.

    Raises ValueError if the reports do not have the same rows.
    """

    def __init__(self, reports: Sequence[Report]) -> None:
        keys = [[(row.layer, row.step) for row in report.rows] for report in reports]
        if not reports or any(other != keys[0] for other in keys):
            raise ValueError("reports of one run, grouped alike, can stand side by side; these differ")
        self.reports = tuple(reports)

    def __rich__(self) -> RenderableType:
        return Group(*self._blocks())

    def __str__(self) -> str:
        return plain(*self._blocks())

    def _blocks(self) -> list[RenderableType]:
        return [self._energies(), self._totals(), *map(Text, self._notes())]

    def _notes(self) -> Iterator[str]:
        """Each note once, with the chips it holds for unless it holds for all."""
        notes = [[*_lacking(report), *report.notes] for report in self.reports]
        for note in dict.fromkeys(note for each in notes for note in each):
            chips = [report.chip for report, each in zip(self.reports, notes, strict=True) if note in each]
            yield note if len(chips) == len(self.reports) else f"{', '.join(chips)}: {note}"

    def _energies(self) -> Table:
        table = plain_table("Energy by chip", ["layer", "kind", "step"], [report.chip for report in self.reports])
        for rows in zip(*(report.rows for report in self.reports), strict=True):
            add_row(table, *_names(rows[0]), *(si(row.energy_pj, "pJ") for row in rows))
        table.add_section()
        add_row(table, "total", ALL, ALL, *(si(report.total.energy_pj, "pJ") for report in self.reports))
        return table

    def _totals(self) -> Table:
        first = self.reports[0].total
        right = ["energy", "energy band", "time", "TFLOPS/W", f"energy / {self.reports[0].chip}"]
        table = plain_table("Totals", ["chip"], right)
        for report in self.reports:
            ratio = share(report.total.energy_pj, first.energy_pj)
            add_row(
                table,
                report.chip,
                si(report.total.energy_pj, "pJ"),
                _band(report) if report.band else "-",
                si(report.time_s, "s"),
                _optional(report.tflops_per_watt, "{:.2f}"),
                _optional(ratio, "{:.3f}"),
            )
        return table


def json_text(report: Report | Sequence[Report]) -> str:
    """One report as a JSON object, or several as an array of such."""
    data = report.to_dict() if isinstance(report, Report) else [each.to_dict() for each in report]
    return json.dumps(data, indent=1) + "\n"


def csv_text(report: Report | Sequence[Report]) -> str:
    """One report's rows as CSV; several reports' with a first column `chip`."""
    several = [] if isinstance(report, Report) else ["chip"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*several, *FIELDS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for each in [report] if isinstance(report, Report) else report:
        for row in each.rows:
            cells = {name: json.dumps(cell) if isinstance(cell, dict) else cell for name, cell in asdict(row).items()}
            writer.writerow({"chip": each.chip, **cells})
    return text.getvalue()


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "slots": ("slots", si),
    "executed": ("executed", si),
    "skipped": ("skipped", si),
    "padding": ("padding", si),
    "not run": ("not_run", si),
    "zero": ("zero_share", lambda value: _optional(value, "{:.1%}")),
    "FP8": ("fp8_share", lambda value: _optional(value, "{:.1%}")),
    "cycles": ("cycles", si),
    "energy": ("energy_pj", lambda value: si(value, "pJ")),
}
"""The table's columns of numbers: heading, field of Row, how it is written."""


def _lacking(report: Report) -> list[str]:
    """Names what no model covers, if anything is counted at all."""
    missing = report.total.not_modelled if report.parts else ()
    return [f"not modelled, and not in these figures: {', '.join(missing)}"] if missing else []


def _table(report: Report) -> Table:
    table = plain_table(f"Energy on chip {report.chip}", ["layer", "kind", "step"], COLUMNS)
    for row in report.rows:
        add_row(table, *_cells(row))
    table.add_section()
    add_row(table, *_cells(report.total))
    return table


def _footer(report: Report) -> list[str]:
    total = report.total
    pairs = ", ".join(f"{pair} {macs / total.executed:.1%}" for pair, macs in total.pairs.items()) or "none"
    return [
        f"total: {si(total.energy_pj, 'pJ')}, {si(report.time_s, 's')} at {si(report.clock_hz, 'Hz')}, "
        f"{_optional(report.tflops_per_watt, '{:.2f}')} TFLOPS/W (2 FLOP per slot, skipped ones too)",
        *([f"energy band: {_band(report)}, {report.band}"] if report.band else []),
        f"executed, streamed operand first: {pairs}",
        *_lacking(report),
        *report.notes,
    ]


def _names(row: Row) -> tuple[str, str, str]:
    return row.layer or "(model)", row.kind, SHORT.get(row.step, row.step)


def _cells(row: Row) -> list[str]:
    return [*_names(row), *(write(getattr(row, field)) for field, write in COLUMNS.values())]


def _band(report: Report) -> str:
    return " ... ".join(si(energy, "pJ") for energy in report.energy_range_pj)


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
