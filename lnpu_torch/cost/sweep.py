"""Sweep: one run priced on every chip that a few settings span, and which of them no other beats."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lnpu_torch.cost.cost_row import CostRow, columns
from lnpu_torch.cost.pricing import price
from lnpu_torch.cost.report import caveats
from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import ConfigError, parse_yaml, write_text
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.text_tables import Rows, add_row, plain_table, si
from lnpu_torch.units import pj

SHOWN = 40
"""A table of more points than these shows the Pareto front alone."""

NUMBERS = columns(
    *("cycles", "utilisation", "simd_cycles", "energy_pj", "mac_energy_pj", "sram_energy_pj", "simd_energy_pj"),
    *("dram_energy_pj", "sram_bits", "dram_bits", "dense_dram_bits", "estimate"),
)
"""The columns of a total that a sweep's CSV has."""


@dataclass(frozen=True)
class Point:
    """The run on one chip: `values` are what was set, `pareto` says that no other point of the sweep beats it.

    `energy_pj` is what it is compared by: the chip's energy, and DRAM's unless the sweep leaves that out.
    """

    chip: str
    values: dict[str, Any]
    total: CostRow
    time_s: float
    tflops_per_watt: float | None
    energy_pj: float
    pareto: bool = False


@dataclass(frozen=True)
class Sweep(Rows):
    """All points, in the order of the settings. `str()` is a table; a rich console prints it too.

    `energy` says what points are compared by; `caveats` say what no point has in it, or that all
    are estimates.
    """

    keys: tuple[str, ...]
    points: tuple[Point, ...]
    energy: Literal["chip and DRAM", "chip"]
    caveats: tuple[str, ...] = ()

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that no other beats in energy and time, fastest first; of equal ones the first."""
        return tuple(sorted((point for point in self.points if point.pareto), key=lambda point: point.time_s))

    def to_csv(self, path: str | Path) -> None:
        """Write one line per point. Raises ConfigError if that cannot be written."""
        write_text(path, self.csv_text())

    def csv_text(self) -> str:
        """One line per point: chip, settings, energies in pJ, time, bits; None is an empty cell."""
        text, rows = io.StringIO(), self.to_rows()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "pareto": int(row["pareto"])} for row in rows)
        return text.getvalue()

    def to_rows(self) -> list[dict[str, Any]]:
        """What the CSV has of each point: its chip, its settings, energies in pJ, time in s, bits."""
        return [
            {
                "chip": point.chip,
                **point.values,
                "compared_energy_pj": point.energy_pj,
                "time_s": point.time_s,
                "tflops_per_watt": point.tflops_per_watt,
                **{column.field: column.cell(point.total) for column in NUMBERS},
                "pareto": point.pareto,
            }
            for point in self.points
        ]

    def _blocks(self) -> list[RenderableType]:
        return [self._table(), *map(Text, self.caveats)]

    def _table(self) -> Table:
        few = len(self.points) <= SHOWN
        shown = self.points if few else self.front
        told = "none beats those with a *" if few else f"the {len(shown)} that none beats"
        title = f"{len(self.points)} chips; {told} in energy ({self.energy}) and time"
        heads = [*self.keys, "on chip", "DRAM", "sum", "time", "TFLOPS/W", "DRAM access", "Pareto"]
        table = plain_table(title, ["chip"], heads)
        for point in shown:
            total, efficiency = point.total, point.tflops_per_watt
            add_row(
                table,
                point.chip,
                *map(value_text, point.values.values()),
                *(si(energy, "pJ") for energy in (total.energy_pj, total.dram_energy_pj, pj(_sum(total)))),
                si(point.time_s, "s"),
                "-" if efficiency is None else f"{efficiency:.2f}",
                si(total.dram_bits, "bit"),
                "*" if point.pareto else "",
            )
        return table


def sweep(
    counts: Counts, chips: Iterable[str | Path | Chip], settings: Mapping[str, Sequence[Any]], dram: bool = True
) -> Sweep:
    """Price a run on each chip with every combination of values.

    Args:
        counts: what a run did.
        chips: where to start from: names, files or Chips.
        settings: values by the dotted key of a chip's file, such as {"macs_per_cycle.fp16": [384, 768]}.
        dram: whether the energy that points are compared by has DRAM's in it.

    Raises:
        ConfigError: no such chip or key, a value that the key cannot have, nothing to combine, or nothing to compare.
    """
    starts = [read_chip(each) for each in chips]
    if not starts or not all(settings.values()):
        raise ConfigError("a sweep needs a chip, and a value for each setting")
    points, left_out = [], dict[str, None]()
    for start, values in itertools.product(starts, itertools.product(*settings.values())):
        chosen = dict(zip(settings, values, strict=True))
        report = price(counts, start.with_values(chosen))
        total = report.total
        left_out |= dict.fromkeys(caveats(report))
        if total.energy_pj is None:
            raise ConfigError(f"{start.name}: no model covers any of what was counted")
        energy = pj(_sum(total)) if dram else total.energy_pj
        points.append(Point(start.name, chosen, total, report.time_s, report.tflops_per_watt, energy))
    front = _front(points)
    marked = tuple(replace(point, pareto=place in front) for place, point in enumerate(points))
    return Sweep(tuple(settings), marked, "chip and DRAM" if dram else "chip", tuple(left_out))


def value_text(value: Any) -> str:
    """A setting's value as it is shown: a float in at most six digits."""
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _sum(total: CostRow) -> int:
    """Energy of the chip and, where it is modelled, of DRAM, in zJ."""
    return sum(total.energy_zj.values())


def parse_setting(text: str) -> tuple[str, list[Any]]:
    """The key and values that "macs_per_cycle.fp16=384,768,1536" gives. Raises ConfigError if it is not so written."""
    key, equals, values = text.partition("=")
    if not (key and equals and values):
        raise ConfigError(f"--set: {text!r} is not KEY=VALUE,VALUE..., such as macs_per_cycle.fp16=384,768")
    return key, [parse_yaml(value, f"--set {key}") for value in values.split(",")]


def _front(points: Sequence[Point]) -> set[int]:
    """Places of the points that no other beats in energy and time; of equal ones the first."""
    front, least = set(), float("inf")
    for place, point in sorted(enumerate(points), key=lambda each: (each[1].time_s, each[1].energy_pj)):
        if point.energy_pj < least:
            front.add(place)
            least = point.energy_pj
    return front
