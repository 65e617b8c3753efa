"""Writes the page of a run, and that of several: one HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lnpu_torch.cost.cost_row import COLUMNS, Column, CostRow
from lnpu_torch.reporting.run_comparison import RunComparison
from lnpu_torch.reporting.run_report import ChipReport, RunReport
from lnpu_torch.text_tables import si

FOLDER = Path(__file__).parent

FIGURES = {
    "energy_by_epoch": (
        "Energy of each epoch",
        "On {chip}. FF, EP and WG are the chip's three steps: forward (with what the SIMD core does in it), error "
        "propagation, weight gradient. DRAM is outside the chip, and outside its TFLOPS/W.",
    ),
    "chips_side_by_side": (
        "The same run on other chips",
        "What was counted once, priced on each chip. Ratios are to {chip}. Layer after layer, the longest of "
        "multipliers, SIMD core and DRAM tells the time.",
    ),
    "accuracy_by_energy": (
        "Accuracy for energy",
        "Test accuracy after each epoch, and what had been spent by then on the chip and in DRAM. All chips are given "
        "the same numbers, so that only the price differs.",
    ),
    "shares_by_layer": (
        "Zeros and FP8",
        "Of each layer's operands after rounding, epoch by epoch. Zeros are skipped; of the rest, FP8 is cheaper than "
        "FP16. This does not depend on the chip.",
    ),
    "lanes_busy": (
        "Lanes busy",
        "On {chip}, the whole run. Lanes wait for the one with the most non-zeros; the load balancer lets neighbours "
        "share their work.",
    ),
}
"""Title and caption of each figure, in the page's order."""


SHOWN = tuple(column for column in COLUMNS if column.on_page)
OF_MACS = ("macs", "executed", "cycles")
"""Columns that say nothing of vector operations."""


def _text(column: Column, value: Any) -> str:
    return column.text(value).replace(" uJ", " \u00b5J")


def page(report: RunReport, drawn: Mapping[str, str]) -> str:
    """The whole page as HTML.

    Args:
        report: the run, priced.
        drawn: figures by name, each as an SVG element; those that are missing are left out.
    """
    environment = _environment()
    environment.filters["versions"] = lambda found: ", ".join(f"{name} {version}" for name, version in found.items())
    first = report.chips[0].chip
    return environment.get_template("page.html").render(
        report=report,
        headline=_headline(report),
        tiles=list(_tiles(report)),
        figures=[
            {"name": name, "title": title, "caption": caption.format(chip=first), "svg": Markup(drawn[name])}
            for name, (title, caption) in FIGURES.items()
            if name in drawn
        ],
        columns=SHOWN,
        text=_text,
        cell=_cell,
        share=_share_of_energy,
        settings=list(_flat(report.settings)),
    )


def comparison_page(comparison: RunComparison) -> str:
    """The page of several runs on several chips as HTML."""
    rows = comparison.to_rows()
    most = max((row["all_j"] or 0.0 for row in rows), default=0.0)
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            fields=comparison.shown(),
            rows=rows,
            notes=comparison.notes,
            text=lambda field, row: field.text(row).replace(" uJ", " \u00b5J"),
            share=lambda row: f"{100 * (row['all_j'] or 0.0) / most:.2f}" if most else "0",
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _energy(value: float | None) -> str:
    return si(value, "pJ").replace(" uJ", " \u00b5J")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _headline(report: RunReport) -> str:
    settings, epochs = report.settings, len(report.metrics)
    model = settings.get("model") or {}
    words = [model.get("name") if isinstance(model, Mapping) else model, settings.get("precision")]
    return ", ".join([*(str(word) for word in words if word), f"{epochs} epoch{'s' * (epochs > 1)}"])


def _tiles(run: RunReport) -> Iterator[dict[str, str]]:
    """The run in a few numbers, on the first chip."""
    report, total, last = run.chips[0].report, run.chips[0].total, run.metrics[-1]
    yield {"value": _energy(total.energy_pj), "label": f"on chip {report.chip}"}
    if report.float_macs:
        yield {"value": _share(report.float_share), "label": "of all MACs ran in float: in no figure here"}
    yield {"value": _energy(total.dram_energy_pj), "label": "in DRAM"}
    yield {"value": si(report.time_s, "s"), "label": f"time at {si(report.clock_hz, 'Hz')}"}
    yield {"value": si(report.mac_time_s, "s"), "label": "time of the multipliers alone"}
    efficiency = report.tflops_per_watt
    yield {"value": "-" if efficiency is None else f"{efficiency:.2f}", "label": "TFLOPS/W, skipped ones too"}
    yield {"value": _share(total.zero_share), "label": "zeros, streamed operand"}
    yield {"value": _share(total.fp8_share), "label": "FP8, of its non-zeros"}
    if "test_accuracy" in last:
        yield {"value": f"{last['test_accuracy']:.2%}", "label": f"test accuracy, epoch {last['epoch']}"}


def _cell(column: Column, row: CostRow) -> Any:
    """A row's value in a column; None where it says nothing of vector operations."""
    if column.field in OF_MACS and not row.macs and row.operations is not None:
        return None
    return column.of(row)


def _share_of_energy(row: CostRow, chip: ChipReport) -> str:
    """A row's energy over that of the row with the most, in %; the total has no bar."""
    most = max((each.energy_pj or 0.0 for each in chip.layers), default=0.0)
    return f"{100 * (row.energy_pj or 0.0) / most:.2f}" if most and row.layer != "total" else "0"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted key, as text."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            several = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{prefix}{name}", "-" if several in (None, "", {}) else str(several)
