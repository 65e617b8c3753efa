"""Reports of one run on several chips, side by side: every row, or the sums alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lnpu_torch.cost.cost_row import CostRow, share
from lnpu_torch.cost.report import (
    ALL,
    ENERGIES,
    TRAFFIC,
    Report,
    access,
    caveats,
    energy_range,
    lacking,
    modelled,
    names,
)
from lnpu_torch.text_tables import Rows, add_row, plain_table, si
from lnpu_torch.units import pj


class Comparison(Rows):
    """Reports of one run on several chips, side by side; `str()` is a table, and a rich console prints it too.

    Raises ValueError if the reports do not have the same rows.
    """

    def __init__(self, reports: Sequence[Report]) -> None:
        keys = [[(row.layer, row.step) for row in report.rows] for report in reports]
        if not reports or any(other != keys[0] for other in keys):
            raise ValueError("reports of one run, grouped alike, can stand side by side; these differ")
        self.reports = tuple(reports)

    def to_rows(self) -> list[dict[str, Any]]:
        """Every column of each row of each chip, exact; the first column is the chip."""
        return [{"chip": report.chip, **row} for report in self.reports for row in report.to_rows()]

    @property
    def _sums(self) -> list[CostRow]:
        return [report.total for report in self.reports]

    def _blocks(self) -> list[RenderableType]:
        tables = [self._energies(), self._totals(), *([self._access()] if modelled(TRAFFIC, self._sums) else [])]
        return [*tables, *map(Text, self._notes())]

    def _notes(self) -> Iterator[str]:
        """Each note once, with the chips it holds for unless it holds for all."""
        notes = [[*caveats(report), *lacking(report), *report.notes] for report in self.reports]
        for note in dict.fromkeys(note for each in notes for note in each):
            chips = [report.chip for report, each in zip(self.reports, notes, strict=True) if note in each]
            yield note if len(chips) == len(self.reports) else f"{', '.join(chips)}: {note}"

    def _energies(self) -> Table:
        table = plain_table("Energy by chip", ["layer", "kind", "step"], [report.chip for report in self.reports])
        for rows in zip(*(report.rows for report in self.reports), strict=True):
            add_row(table, *names(rows[0]), *(si(row.energy_pj, "pJ") for row in rows))
        table.add_section()
        add_row(table, "total", ALL, ALL, *(si(report.total.energy_pj, "pJ") for report in self.reports))
        return table

    def _totals(self) -> Table:
        columns, first = modelled(ENERGIES, self._sums), self.reports[0]
        heads = [
            *(column.head for column in columns),
            "chip, by FP16 / FP8",
            "time",
            "of MACs",
            "TFLOPS/W",
            f"chip / {first.chip}",
            "border as zeros",
            f"chip + DRAM / {first.chip}",
        ]
        table = plain_table("Totals", ["chip"], heads)
        for report in self.reports:
            total, efficiency = report.total, report.tflops_per_watt
            add_row(
                table,
                report.chip,
                *(column.shown(total) for column in columns),
                energy_range(report),
                si(report.time_s, "s"),
                si(report.mac_time_s, "s"),
                "-" if efficiency is None else f"{efficiency:.2f}",
                _ratio(total.energy_pj, first.total.energy_pj),
                _ratio(_with_border(total), _with_border(first.total)),
                _ratio(total.all_energy_pj, first.total.all_energy_pj),
            )
        return table

    def _access(self) -> Table:
        columns, first = modelled(TRAFFIC, self._sums), self.reports[0]
        heads = [*(column.head for column in columns), "to dense FP16", f"DRAM / {first.chip}", "layers' steps alone"]
        table = plain_table("Memory access", ["chip"], heads)
        for report in self.reports:
            total = report.total
            numbers = [column.shown(total) for column in columns]
            ratio = _ratio(total.dram_bits, first.total.dram_bits)
            add_row(table, report.chip, *numbers, access(total), ratio, access(report.of_layers().total))
        return table


def _with_border(total: CostRow) -> float | None:
    """Energy on the chip if MACs outside the image were multiplied as zeros."""
    return None if total.energy_pj is None else pj(total.chip_zj + total.border_zj)


def _ratio(part: float | None, whole: float | None) -> str:
    ratio = None if part is None or whole is None else share(part, whole)
    return "-" if ratio is None else f"{ratio:.3f}"
