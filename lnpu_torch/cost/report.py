"""Report: a priced run's rows and their sums, as text, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lnpu_torch.cost.cost_row import COLUMNS, Column, CostRow, columns, share
from lnpu_torch.cost.energy_plot import energy_plot
from lnpu_torch.counts.schema import FloatProduct
from lnpu_torch.files import write_text
from lnpu_torch.text_tables import Rows, Tables, add_row, plain_table, si, si_over
from lnpu_torch.units import pj

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL = "all"
SHORT = {"forward": "forward (FF)", "grad_input": "grad_input (EP)", "grad_weight": "grad_weight (WG)"}
"""A step's name beside the one it has in the chip's papers."""


@dataclass(frozen=True)
class Report(Rows):
    """A priced run on one chip. `str()` is a table; a rich console prints it too.

    `parts` are priced rows, one or more for each row that is shown. `grouped` says whether such a row is a layer's step
    (None), a "layer" or a "step"; the total is the same whichever. `energy_range` says what the ends of
    `energy_range_pj` stand for, None if the chip gives no range; `notes` are printed below the table. `in_float` are
    multiply-accumulates outside of emulated layers, by torch op, which no figure has in it; None where nobody looked.
    `dram_pj_per_bit` is what a bit of DRAM takes at least, as it is priced, and at most; None without a range.
    `estimate` says what the counts were made from, if they are none of a run's own.
    """

    chip: str
    clock_hz: float
    parts: tuple[CostRow, ...]
    energy_range: str | None
    notes: tuple[str, ...]
    grouped: Literal["layer", "step"] | None = None
    in_float: Mapping[str, FloatProduct] | None = None
    dram_pj_per_bit: tuple[float, float, float] | None = None
    estimate: str | None = None

    @property
    def float_macs(self) -> int | None:
        """Multiply-accumulates that ran outside of emulated layers; None where nobody looked."""
        return None if self.in_float is None else sum(product.macs for product in self.in_float.values())

    @property
    def float_share(self) -> float | None:
        """Their share of all multiply-accumulates that ran, skipped ones too; None where nobody looked, or none ran."""
        total = self.total
        return None if self.float_macs is None else share(self.float_macs, self.float_macs + total.macs - total.not_run)

    @property
    def rows(self) -> tuple[CostRow, ...]:
        """One row per layer and step (or per group), in the model's order."""
        groups: dict[tuple[str, ...], list[CostRow]] = {}
        for part in self.parts:
            key = (part.layer, part.step) if self.grouped is None else (getattr(part, self.grouped),)
            groups.setdefault(key, []).append(part)
        return tuple(map(self._sum, groups.values()))

    @cached_property
    def total(self) -> CostRow:
        """The sum over all rows, as layer "total", step "all"."""
        return CostRow.sum(self.parts, "total", ALL, ALL)

    @property
    def time_s(self) -> float:
        """In seconds: layer after layer, in each the longest of multipliers, SIMD core and DRAM."""
        return self.total.time_cycles / self.clock_hz

    @property
    def mac_time_s(self) -> float:
        """The multipliers' cycles over clock, in seconds, as if nothing ever kept them waiting."""
        return self.total.cycles / self.clock_hz

    @property
    def simd_time_s(self) -> float:
        """The SIMD core's own time, in seconds."""
        return (self.total.simd_cycles or 0.0) / self.clock_hz

    @property
    def dram_time_s(self) -> float:
        """In how many seconds all bits come from DRAM and go there, at its bandwidth."""
        return (self.total.dram_cycles or 0.0) / self.clock_hz

    @property
    def power_w(self) -> float | None:
        """The chip's mean power; None if nothing took any time."""
        return self.total.chip_zj * 1e-21 / self.time_s if self.time_s else None

    @property
    def energy_range_pj(self) -> tuple[float, float]:
        """The total energy at either end of its range, in pJ."""
        low, high = self.total.energy_range_zj
        return pj(low), pj(high)

    @property
    def dram_range_pj(self) -> tuple[float, float] | None:
        """DRAM's energy at either end of what a bit takes, in pJ; None without a range, or if no model covers it."""
        bits, priced = self.total.dram_bits, self.total.dram_energy_pj
        if self.dram_pj_per_bit is None or bits is None or priced is None:
            return None
        low, taken, high = self.dram_pj_per_bit
        return priced + bits * (low - taken), priced + bits * (high - taken)

    @property
    def tflops_per_watt(self) -> float | None:
        """2 FLOP per MAC that was asked for, skipped or not, over energy; None if there were none of either.

        MACs outside the image are no work that anyone asked for, whether a chip multiplies them or not.
        """
        total = self.total
        return 2 * total.asked / total.energy_pj if total.asked and total.energy_pj else None

    def by(self, key: Literal["layer", "step"]) -> Report:
        """The same report with one row per layer, or per step. Raises ValueError for another key."""
        if key not in ("layer", "step"):
            raise ValueError(f"a report is grouped by 'layer' or 'step', not {key!r}")
        return replace(self, grouped=key)

    def summary(self) -> Summary:
        """The sums and what takes most of them, in about eight lines: `print(report.summary())`."""
        return Summary([self])

    def of_layers(self) -> Report:
        """The same report without what is no MAC: the three steps of each layer alone."""
        return replace(self, parts=tuple(part for part in self.parts if part.operations is None))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, exact: what `to_json` writes."""
        return {
            "chip": self.chip,
            "clock_hz": self.clock_hz,
            "time_s": self.time_s,
            "mac_time_s": self.mac_time_s,
            "simd_time_s": self.simd_time_s,
            "dram_time_s": self.dram_time_s,
            "bound_by": {bound: cycles / self.clock_hz for bound, cycles in self.total.time_by.items()},
            "power_w": self.power_w,
            "tflops_per_watt": self.tflops_per_watt,
            "energy_range_pj": list(self.energy_range_pj),
            "energy_range": self.energy_range,
            "dram_range_pj": self.dram_range_pj and list(self.dram_range_pj),
            "rows": self.to_rows(),
            "total": self.total.to_dict(),
            "float_macs": self.float_macs,
            "float_share": self.float_share,
            "in_float": self.in_float and {op: product.model_dump() for op, product in self.in_float.items()},
            "estimate": self.estimate,
            "notes": list(self.notes),
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """Every column of each row, exact: energies in pJ, shares in 0 ... 1."""
        return [row.to_dict() for row in self.rows]

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw what each layer's energy is spent on: sorted bars of MAC, SRAM, SIMD core, idle and DRAM.

        Args:
            axes: where to draw; a new figure of matplotlib's pyplot if there is none.

        Raises:
            ConfigError: matplotlib is missing; it names the extra to install.
        """
        return energy_plot(self.by("layer").rows, f"energy by layer on chip {self.chip}", axes)

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON, whole or not at all. Raises ConfigError if that cannot be written."""
        write_text(path, json_text(self))

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV, without the total; a mapping is JSON, None an empty cell. Raises ConfigError."""
        write_text(path, csv_text(self))

    def _blocks(self) -> list[RenderableType]:
        if not self.parts:
            return [Text(f"nothing was counted that chip {self.chip} could be priced for")]
        return [*_tables(self), *map(Text, _footer(self))]

    def _sum(self, group: list[CostRow]) -> CostRow:
        """The parts of one row together; what differs within it is "all"."""
        first, by = group[0], self.grouped
        layer, kind = (ALL, ALL) if by == "step" else (first.layer, first.kind)
        return CostRow.sum(group, layer, kind, ALL if by == "layer" else first.step)


class Summary(Tables):
    """The sums of one run on one chip or several, and what takes most of them, in a few lines of text."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self.reports = tuple(reports)

    def _blocks(self) -> list[RenderableType]:
        first = self.reports[0].total
        table = plain_table("Energy and time", ["chip"], ["on the chip", "with DRAM", "time", "clock", "TFLOPS/W"])
        table.add_column("bound by")
        for report in self.reports:
            total, efficiency = report.total, report.tflops_per_watt
            add_row(
                table,
                report.chip,
                si_over(total.energy_pj, "pJ", first.energy_pj),
                si_over(total.all_energy_pj, "pJ", first.all_energy_pj),
                si_over(report.time_s, "s", self.reports[0].time_s),
                si(report.clock_hz, "Hz"),
                "-" if efficiency is None else f"{efficiency:.2f}",
                bounds(report).partition(",")[0] or "-",
            )
        return [table, *map(Text, self._lines())]

    def _lines(self) -> Iterator[str]:
        """Shares of what was counted, what takes most, and what is in no total."""
        report = self.reports[0]
        total = report.total
        if total.zero_share is not None and total.fp8_share is not None:
            yield f"streamed operands: zeros {total.zero_share:.1%}, FP8 {total.fp8_share:.1%} of the others"
        if total.all_energy_pj:
            yield f"chip and DRAM of {report.chip} by step: {most(report.by('step'))}"
            yield f"by layer: {most(report.by('layer'))}"
        yield from dict.fromkeys(line for each in self.reports for line in (*caveats(each), *lacking(each)))


def json_text(report: Report | Sequence[Report]) -> str:
    """One report as a JSON object, or several as an array of such."""
    data = report.to_dict() if isinstance(report, Report) else [each.to_dict() for each in report]
    return json.dumps(data, indent=1) + "\n"


def csv_text(report: Report | Sequence[Report]) -> str:
    """One report's rows as CSV; several reports' with a first column `chip`."""
    several = not isinstance(report, Report)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(["chip"] if several else []), *(column.field for column in COLUMNS)])
    for each in [report] if isinstance(report, Report) else report:
        for row in each.rows:
            writer.writerow([*([each.chip] if several else []), *(column.cell(row) for column in COLUMNS)])
    return text.getvalue()


ENERGIES = columns("mac_energy_pj", "sram_energy_pj", "simd_energy_pj", "idle_energy_pj", "energy_pj", "dram_energy_pj")
TRAFFIC = columns("sram_bits", "dram_bits")

IN_WORDS = {
    "mac_energy_pj": "MACs",
    "sram_energy_pj": "SRAM",
    "simd_energy_pj": "what is no MAC (normalisation, activation, pooling, loss, the optimizer's update)",
    "idle_energy_pj": "what flows while multipliers wait",
    "dram_energy_pj": "DRAM",
}
"""What a reader calls the columns that may be not modelled; the numbers of bits go with their energy."""


def lacking(report: Report) -> list[str]:
    """A line that names what no model covers, and one that says if there were no layers."""
    layers = any(part.operations is None for part in report.parts)
    missing = [name for name in report.total.not_modelled if layers or name != "mac_energy_pj"]
    words = [IN_WORDS[name] for name in missing if name in IN_WORDS]
    lines = [f"not modelled, and not in these figures: {', '.join(words)}"] if words and report.parts else []
    return lines + ([] if layers else ["no step of an emulated layer was counted"])


def caveats(report: Report) -> list[str]:
    """Lines that say if it is an estimate, and how much of the multiply-accumulates no total has in it, if any."""
    lines = [f"ESTIMATE: {report.estimate}"] if report.estimate else []
    if not report.float_macs:
        return lines
    ops = ", ".join(f"{op} ({each.calls} x)" for op, each in (report.in_float or {}).items())
    share_ = f"{report.float_share or 0:.1%} of all multiply-accumulates"
    return [*lines, f"NOT IN THE TOTAL: {share_}, {si(report.float_macs)}, which ran in float: {ops}"]


def names(row: CostRow) -> tuple[str, str, str]:
    """Layer, kind and step as tables show them."""
    return row.layer or "(model)", row.kind, SHORT.get(row.step, row.step)


def energy_range(report: Report) -> str:
    """Both ends of the energy, or "-"."""
    return " ... ".join(si(energy, "pJ") for energy in report.energy_range_pj) if report.energy_range else "-"


def access(row: CostRow) -> str:
    """The traffic with DRAM against dense FP16's, "-38.9 %", or "-"."""
    ratio = share(row.dram_bits or 0, row.dense_dram_bits or 0)
    return "-" if ratio is None else f"{ratio - 1:+.1%}"


def modelled(shown: Sequence[Column], totals: Sequence[CostRow]) -> list[Column]:
    """The columns that say something in any of the totals."""
    return [column for column in shown if any(column.of(total) is not None for total in totals)]


def _tables(report: Report) -> list[Table]:
    """MACs, vector operations if there are any, and the energy of both. `lacking` names what is not modelled."""
    total = report.total
    macs = [row for row in report.rows if row.macs or row.operations is None]
    vector = [row for row in report.rows if row.operations is not None]
    tables = []
    for title, kind, rows in (
        ("Multiplications", "macs", macs),
        ("Vector operations", "vector", vector),
        ("Energy", "energy", report.rows),
    ):
        if not rows:
            continue
        shown = modelled([column for column in COLUMNS if column.table == kind], [total])
        compared = kind == "energy" and total.dram_bits is not None
        heads = [column.head for column in shown] + (["to dense"] if compared else [])
        table = plain_table(f"{title} on chip {report.chip}", ["layer", "kind", "step"], heads)
        for row in (*rows, total):
            if row is total:
                table.add_section()
            last = [access(row)] if compared else []
            add_row(table, *names(row), *(column.shown(row) for column in shown), *last)
        tables.append(table)
    return tables


def _footer(report: Report) -> list[str]:
    total, ranged = report.total, report.energy_range is not None
    efficiency = "-" if report.tflops_per_watt is None else f"{report.tflops_per_watt:.2f}"
    pairs = ", ".join(f"{pair} {macs / total.executed:.1%}" for pair, macs in total.pairs.items()) or "none"
    return [
        f"total: {si(total.energy_pj, 'pJ')} on the chip, {si(report.time_s, 's')} at {si(report.clock_hz, 'Hz')}, "
        f"{efficiency} TFLOPS/W (2 FLOP per MAC, skipped ones too; DRAM apart)",
        *_with_dram(report),
        _time(report),
        *caveats(report),
        *_layers_access(report),
        *([f"on the chip, by one constant alone: {energy_range(report)}, {report.energy_range}"] if ranged else []),
        *_shares(report),
        f"executed, streamed operand first: {pairs}",
        *_border(report),
        *lacking(report),
        *report.notes,
    ]


def _with_dram(report: Report) -> list[str]:
    """DRAM's energy with its range, and the sum of both."""
    total = report.total
    if total.dram_energy_pj is None:
        return []
    words = f"DRAM: {si(total.dram_energy_pj, 'pJ')}"
    if report.dram_range_pj and report.dram_pj_per_bit:
        least, _, most = report.dram_pj_per_bit
        ends = " ... ".join(si(energy, "pJ") for energy in report.dram_range_pj)
        words += f" ({ends} at {least:g} ... {most:g} pJ a bit)"
    return [f"{words}; chip and DRAM: {si(total.all_energy_pj, 'pJ')}"]


LARGEST = 5
"""How many shares a report names."""


def most(report: Report) -> str:
    """What takes most of the energy of chip and DRAM, row by row; nothing if there is none."""
    labels = (" ".join(word for word in (names(row)[0], row.step) if word != ALL) for row in report.rows)
    rows = {label: row.all_energy_pj or 0.0 for label, row in zip(labels, report.rows, strict=True)}
    return _largest(rows, report.total.all_energy_pj)


def _shares(report: Report) -> list[str]:
    """What takes most of the energy of chip and DRAM; and after which layers vector operations do."""
    after: dict[str, float] = {}
    for part in report.parts:
        if part.after:
            after[part.after] = after.get(part.after, 0.0) + (part.all_energy_pj or 0.0)
    lines = {
        "most of chip and DRAM": most(report),
        "vector operations, by the layer before them": _largest(after, report.total.all_energy_pj),
    }
    return [f"{words}: {shares}" for words, shares in lines.items() if shares]


def _largest(energies: Mapping[str, float], whole: float | None) -> str:
    if not whole:
        return ""
    found = sorted(energies.items(), key=lambda each: -each[1])[:LARGEST]
    return ", ".join(f"{name} {energy / whole:.1%}" for name, energy in found)


def border(total: CostRow) -> str:
    """What the MACs outside the image would add as zeros, or "-" where they are priced, or there are none."""
    return si(pj(total.border_zj), "pJ") if total.border_zj else "-"


def _border(report: Report) -> list[str]:
    """What lies outside the image, and what it would cost."""
    total = report.total
    if not total.padding:
        return []
    share_ = f"outside the image: {total.padding / (total.macs - total.not_run):.1%} of all MACs"
    cost = f"not scheduled; as zeros they would add {border(total)}" if total.border_zj else "priced as zeros"
    return [f"{share_}, {cost}"]


def _time(report: Report) -> str:
    """What the run's time is made of: what each worker takes alone, and what each adds where it takes longest."""
    alone = {"multipliers": report.mac_time_s, "DRAM": report.dram_time_s, "SIMD": report.simd_time_s}
    words = ", ".join(f"{name} {si(time, 's')}" for name, time in alone.items())
    return f"time: each alone {words}; layer after layer the longest: {bounds(report) or 'none'}"


def bounds(report: Report) -> str:
    """The shares of the run's time by what took longest, most first."""
    found = sorted(report.total.time_by.items(), key=lambda each: -each[1])
    return ", ".join(f"{name} {cycles / report.clock_hz / (report.time_s or 1):.0%}" for name, cycles in found)


def _layers_access(report: Report) -> list[str]:
    """The traffic of the layers' steps, where there is other traffic too."""
    layers, total = report.of_layers().total, report.total
    if layers.dram_bits is None or layers.dram_bits == total.dram_bits:
        return []
    return [f"DRAM access of the layers' steps alone: {si(layers.dram_bits, 'bit')}, {access(layers)} to dense FP16"]
