"""Writes the page of a run, and that of several: one HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lnpu_torch.cost.cost_row import COLUMNS, Bound, Column, CostRow, share
from lnpu_torch.cost.energy_plot import MOST_BARS, PARTS, most_energy
from lnpu_torch.cost.report import SHORT
from lnpu_torch.reporting.page_charts import (
    COLOURS,
    Bar,
    Chart,
    Segment,
    Series,
    energy_bars,
    heat_map,
    line_chart,
    micro,
    shown,
    shown_energy,
)
from lnpu_torch.reporting.run_comparison import RunComparison
from lnpu_torch.reporting.run_report import ChipReport, RunReport, lacking
from lnpu_torch.text_tables import shortened
from lnpu_torch.units import Component

FOLDER = Path(__file__).parent
SHOWN = tuple(column for column in COLUMNS if column.on_page)
OF_MACS = ("macs", "executed", "cycles")
"""Columns that say nothing of vector operations."""
MOST_ROWS = 100
"""More layers than these are not in the table."""
BOUNDS: dict[Bound, Component] = {"multipliers": "mac", "SIMD": "simd", "DRAM": "dram"}
"""What time hangs on, in the colour of that part."""


class Card(NamedTuple):
    """A question, its answer in large, and in words."""

    question: str
    answer: str
    words: list[str]


def page(report: RunReport, beside: RunComparison | None = None) -> str:
    """The page of a run as HTML; with other runs beside it, if there are any."""
    return _render(
        title=f"{report.run}: what training cost",
        report=report,
        headline=_headline(report),
        cards=[_how_much(report), _where(report.chips[0]), _why(report.chips[0])],
        tiles=list(_tiles(report)),
        trust=_trust(report.chips[0]),
        charts=_charts(report),
        tables=[_Table.of(chip) for chip in report.chips],
        settings=list(_flat(report.settings)),
        comparison=beside,
        runs=_runs(beside, report.run) if beside else None,
    )


def comparison_page(comparison: RunComparison) -> str:
    """The page of several runs on several chips as HTML."""
    return _render(title="Runs on chips", report=None, comparison=comparison, runs=_runs(comparison))


def _render(**values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shortened"] = shortened
    environment.filters["versions"] = lambda found: ", ".join(f"{name} {version}" for name, version in found.items())
    return environment.get_template("page.html").render(
        **values, parts=PARTS, colours=COLOURS, columns=SHOWN, text=_text, cell=_cell
    )


def _text(column: Column, value: Any) -> str:
    return micro(column.text(value))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _headline(report: RunReport) -> str:
    settings, epochs = report.settings, report.epochs
    model = settings.get("model") or {}
    words = [model.get("name") if isinstance(model, Mapping) else model, settings.get("precision")]
    return ", ".join([*(str(word) for word in words if word), f"{epochs} epoch{'s' * (epochs > 1)}"])


def _how_much(run: RunReport) -> Card:
    """Energy on the first chip, with DRAM and without; and how many times that the others take."""
    first, *others = run.chips
    total = first.total
    words = [f"{shown_energy(total.energy_pj)} on chip {first.chip}, {shown_energy(total.dram_energy_pj)} in DRAM."]
    for chip, lacks in list(zip(others, lacking(run.chips)[1:], strict=True))[:3]:
        ratios = [
            f"{_times(getattr(chip.total, name), getattr(total, name))} {told}"
            for name, told in (("all_energy_pj", "with DRAM"), ("energy_pj", "on the chip alone"))
        ]
        words.append(
            f"{chip.chip}{lacks and lacks + ','} takes {shown_energy(chip.total.all_energy_pj)}: {', '.join(ratios)}."
        )
    if first.report.float_macs:
        words.append(f"Not in it: {_share(first.report.float_share)} of all multiplications, which ran in float.")
    return Card("How much?", shown_energy(total.all_energy_pj), words)


def _times(value: float | None, first: float | None) -> str:
    ratio = share(value or 0.0, first or 0.0)
    return "-" if ratio is None else f"{ratio:.2f}x"


def _where(chip: ChipReport) -> Card:
    """The parts that take most of chip and DRAM, and the layers."""
    total, whole = chip.total, chip.total.all_energy_pj
    if not whole:
        return Card("Where?", "-", ["Nothing of it has a price."])
    parts = {PARTS[part].label: getattr(total, f"{part}_energy_pj") or 0.0 for part in PARTS}
    layers = {row.layer or "(model)": row.all_energy_pj or 0.0 for row in chip.layers}
    steps = {SHORT.get(row.step, row.step): row.all_energy_pj or 0.0 for row in chip.steps}
    (largest, most), *rest = _largest(parts, whole, 5)
    words = [f"The rest: {_listed(rest)}."] if rest else []
    words += [f"Most by layer: {_listed(_largest(layers, whole, 3))}; by step: {_listed(_largest(steps, whole, 3))}."]
    return Card("Where?", f"{most} {largest}", words)


def _largest(values: Mapping[str, float], whole: float, count: int) -> list[tuple[str, str]]:
    found = sorted(values.items(), key=lambda each: -each[1])[:count]
    return [(shortened(name), f"{value / whole:.0%}") for name, value in found if value / whole >= 0.005]


def _listed(shares: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {percent}" for name, percent in shares)


def _why(chip: ChipReport) -> Card:
    """What made it cheap, or not: multiplications that are skipped, and FP8."""
    total = chip.total
    skipped = share(total.skipped, total.asked)
    if skipped is None:
        return Card("Why?", "-", ["No multiplication was counted."])
    fp8 = share(sum(macs for pair, macs in total.pairs.items() if "fp8*fp8" in pair), total.executed)
    words = [
        f"{_share(total.zero_share)} of the operand that is streamed are zeros"
        + ("; their multiplications are skipped." if total.skipped else "; this chip multiplies them.")
    ]
    words.append(
        f"{_share(total.fp8_share)} of its other elements are FP8; {_share(fp8)} of what is executed is FP8 x FP8."
    )
    return Card("Why?", f"{skipped:.0%} skipped", words)


def _tiles(run: RunReport) -> Iterator[dict[str, str]]:
    """The run in a few more numbers, on the first chip."""
    report, last = run.chips[0].report, run.metrics[-1]
    if "test_accuracy" in last:
        yield {"value": f"{last['test_accuracy']:.2%}", "label": f"test accuracy after epoch {last['epoch']}"}
    yield {"value": shown(report.time_s, "s"), "label": f"time at {shown(report.clock_hz, 'Hz')}"}
    yield {"value": shown(report.mac_time_s, "s"), "label": "time, if multipliers never had to wait"}
    efficiency = report.tflops_per_watt
    value = "-" if efficiency is None else f"{efficiency:.2f}"
    yield {"value": value, "label": "TFLOPS/W of the chip; skipped operations count as done"}


def _trust(chip: ChipReport) -> str:
    """How sure the figures are."""
    tags = next((note for note in chip.report.notes if note.startswith("constants: ")), "constants: none")
    report, words = chip.report, [f"On {chip.chip}, {tags}: trust ratios between chips more than joules."]
    if report.energy_range:
        words.append(f"The chip alone takes {_span(report.energy_range_pj)} for {report.energy_range}.")
    if report.dram_range_pj and report.dram_pj_per_bit:
        least, _, most = report.dram_pj_per_bit
        words.append(f"DRAM takes {_span(report.dram_range_pj)} at {least:g} ... {most:g} pJ a bit.")
    return " ".join(words)


def _span(energies: Sequence[float]) -> str:
    return f"{shown_energy(min(energies))} ... {shown_energy(max(energies))}"


def _charts(run: RunReport) -> dict[str, Any]:
    """What the page draws, by name; what would show nothing is empty."""
    first = run.chips[0]
    layers, rest = most_energy(first.layers, MOST_BARS)
    epochs = most_spread(first.epochs, 60)
    return {
        "layers": energy_bars(layers),
        "layers_left_out": f"The {len(layers)} of {len(first.layers):,} rows that take most; the others together take "
        f"{shown_energy(rest.all_energy_pj)}, {shown_energy(rest.energy_pj)} of it on the chip."
        if rest
        else "",
        "steps": energy_bars(first.steps, labels=[SHORT.get(row.step, row.step) for row in first.steps]),
        "epochs": energy_bars([each.total for each in epochs], labels=[str(each.epoch) for each in epochs]),
        "epoch_labels": -(-len(epochs) // 12),
        "chips": energy_bars(
            [chip.total for chip in run.chips],
            labels=[chip.chip + lack for chip, lack in zip(run.chips, lacking(run.chips), strict=True)],
            ratios=True,
        ),
        "epochs_span": _span([each.total.all_energy_pj or 0.0 for each in first.epochs]),
        "epochs_chip_span": _span([each.total.energy_pj or 0.0 for each in first.epochs]),
        "times": _times_bars(run.chips),
        "traffic": _traffic(run.chips),
        "heat": heat_map(run, first),
        "accuracy": _accuracy(run),
        "lanes": _lanes(first),
    }


def most_spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many items, evenly spread, the last one among them."""
    every = -(-len(items) // count)
    return list(items[::-every][::-1])


def _times_bars(chips: Sequence[ChipReport]) -> list[Bar]:
    """Each chip's time, by what takes longest in each pass."""
    longest = max((chip.report.time_s for chip in chips), default=0.0)
    bars = []
    for chip in chips:
        seconds = {name: cycles / chip.report.clock_hz for name, cycles in chip.total.time_by.items()}
        whole = chip.report.time_s
        segments = [
            Segment(part, 100 * seconds[name] / whole, f"{name} take longest: {shown(seconds[name], 's')}")
            for name, part in BOUNDS.items()
            if seconds.get(name)
        ]
        ratio = "" if chip is chips[0] else f" ({_times(whole, chips[0].report.time_s)})"
        bars.append(Bar(chip.chip, 100 * whole / longest if longest else 0, shown(whole, "s") + ratio, segments))
    return bars


def _traffic(chips: Sequence[ChipReport]) -> list[Bar]:
    """Bits that each chip moves from and to DRAM, where that is modelled."""
    bits = {chip.chip: chip.total.dram_bits for chip in chips if chip.total.dram_bits}
    first = bits.get(chips[0].chip)
    return [
        Bar(
            name,
            100 * value / max(bits.values()),
            shown(value, "bit") + (f" ({_times(value, first)})" if first and name != chips[0].chip else ""),
            [Segment("dram", 100, f"{name}: {shown(value, 'bit')}")],
        )
        for name, value in bits.items()
        if value
    ]


def _lanes(chip: ChipReport) -> list[Bar]:
    """Lanes that work, layer by layer; without load balancer first, then what the balancer adds."""
    rows = [row for row in chip.layers if row.utilisation is not None]
    kept = {id(row) for row in most_energy(rows, MOST_BARS)[0]}
    bars = []
    for row in rows:
        on, off = row.utilisation or 0.0, min(row.unbalanced_utilisation or 0.0, row.utilisation or 0.0)
        if id(row) in kept and on:
            segments = [
                Segment("mac", 100 * off / on, f"load balancer off: {off:.1%}"),
                Segment("sram", 100 * (1 - off / on), f"the load balancer adds {on - off:.1%}"),
            ]
            bars.append(Bar(row.layer or "(model)", 100 * on, f"{on:.1%} ({off:.1%})", segments))
    return bars


def _accuracy(run: RunReport) -> Chart | None:
    """Test accuracy after each epoch, against the energy that was spent by then on each chip."""
    accuracy = [row.get("test_accuracy") for row in run.metrics]
    series = []
    for chip, lacks in zip(run.chips, lacking(run.chips), strict=True):
        spent, points = 0.0, []
        for epoch, value in zip(chip.epochs, accuracy, strict=True):
            spent += (epoch.total.all_energy_pj or 0.0) * 1e-12 * epoch.stands_for
            if value is not None:
                points.append((spent, value, f"epoch {epoch.epoch}: {value:.2%} for {shown(spent, 'J')}"))
        series.append(Series(chip.chip + lacks, points))
    return line_chart("Test accuracy against energy so far, chip and DRAM", series, "J")


def _runs(comparison: RunComparison, first: str | None = None) -> dict[str, Any]:
    """The runs side by side: a table, lines of accuracy, and what the others' accuracies are beside the first's."""
    rows = comparison.to_rows()
    most = max((row["all_j"] or 0.0 for row in rows), default=0.0)
    by_epoch, by_energy = [], []
    for run, curve in {row.run: row.curve for row in reversed(comparison.rows)}.items():
        known = [(p.epoch, p.accuracy, p.energy_j) for p in curve if p.accuracy is not None]
        by_epoch.append(Series(run, [(epoch, reached, f"epoch {epoch}: {reached:.2%}") for epoch, reached, _ in known]))
        paid = [
            (joules, reached, f"epoch {epoch}: {reached:.2%} for {shown(joules, 'J')}")
            for epoch, reached, joules in known
            if joules is not None
        ]
        by_energy.append(Series(run, paid))
    by_epoch.reverse()
    by_energy.reverse()
    return {
        "rows": rows,
        "fields": comparison.shown(),
        "text": lambda field, row: micro(field.text(row)),
        "share": lambda row: f"{100 * (row['all_j'] or 0.0) / most:.2f}" if most else "0",
        "words": _held(comparison, first) if first else [],
        "charts": [
            chart
            for chart in (
                line_chart("Test accuracy after each epoch", by_epoch, ""),
                line_chart(f"Test accuracy against energy so far, on {comparison.rows[0].chip}", by_energy, "J"),
            )
            if chart
        ],
    }


def _held(comparison: RunComparison, first: str) -> list[str]:
    """The first run's accuracy, and by how many points the others' differ."""
    found = {row.run: (row.accuracy, f"after {row.epochs} epochs") for row in comparison.rows}
    mine, after = found.pop(first)
    if mine is None:
        return []
    words = [
        f"{name} {theirs:.2%} {epochs} ({100 * (theirs - mine):+.2f} points)"
        for name, (theirs, epochs) in found.items()
        if theirs is not None
    ]
    return [f"Test accuracy {mine:.2%} {after}; {', '.join(words)}."] if words else []


class _Table(NamedTuple):
    """A chip's layers as the page has them: rows in the model's order, then sums, and what is left out in words."""

    chip: ChipReport
    rows: list[CostRow]
    sums: list[CostRow]
    left_out: str
    most: float

    @classmethod
    def of(cls, chip: ChipReport) -> _Table:
        kept, rest = most_energy(chip.layers, MOST_ROWS)
        names = {row.layer for row in kept}
        left_out = (
            f"The {len(kept)} of {len(chip.layers):,} rows that take most energy; --csv writes all." if rest else ""
        )
        most = max((row.energy_pj or 0.0 for row in kept), default=0.0)
        rows = [row for row in chip.layers if row.layer in names]
        return cls(chip, rows, [*([rest] if rest else []), chip.total], left_out, most)

    def share(self, row: CostRow) -> str:
        """A row's energy over that of the row with the most, in %; sums have no bar."""
        return f"{100 * (row.energy_pj or 0.0) / self.most:.2f}" if self.most and row not in self.sums else "0"


def _cell(column: Column, row: CostRow) -> Any:
    """A row's value in a column; None where it says nothing of vector operations."""
    if column.field in OF_MACS and not row.macs and row.operations is not None:
        return None
    return column.of(row)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted key, as text."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            several = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{prefix}{name}", "-" if several in (None, "", {}) else str(several)
