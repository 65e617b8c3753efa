"""Writes the page of a study: one HTML file that opens offline. It knows words and tables; figures are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lnpu_torch.reporting.run_report import Study
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
        "What was counted once, priced on each chip. Ratios are to {chip}. The SIMD core works beside the multipliers; "
        "whichever takes longer tells the time.",
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


@dataclass(frozen=True)
class Column:
    """A column of the table of layers: its head, what it says, which field of a row it shows, and how."""

    head: str
    field: str
    says: str
    write: Callable[[Any], str]
    text: bool = False
    of_macs: bool = False


def _plain(value: Any) -> str:
    return str(value)


def _energy(value: Any) -> str:
    return si(value, "pJ").replace(" uJ", " \u00b5J")


def _share(value: Any) -> str:
    return "-" if value is None else f"{value:.1%}"


COLUMNS = (
    Column("layer", "layer", "its name in the model", _plain, text=True),
    Column("kind", "kind", "its class", _plain, text=True),
    Column("MACs", "macs", "multiplications of a dense chip", si, of_macs=True),
    Column("executed", "executed", "multiplications that are not skipped", si, of_macs=True),
    Column("zeros", "zero_share", "zeros in the streamed operand", _share),
    Column("FP8", "fp8_share", "FP8 among the streamed operand's non-zeros", _share),
    Column("lanes busy", "utilisation", "mean work of a lane over the fullest one's", _share),
    Column("cycles", "cycles", "of the multipliers", si, of_macs=True),
    Column("operations", "operations", "on elements, on the SIMD core", si),
    Column("MAC", "mac_energy_pj", "energy of multiplications and skipped MACs", _energy),
    Column("SRAM", "sram_energy_pj", "energy of SRAM", _energy),
    Column("SIMD", "simd_energy_pj", "energy of the SIMD core", _energy),
    Column("chip", "energy_pj", "energy on the chip: MAC, SRAM and SIMD", _energy),
    Column("DRAM", "dram_energy_pj", "energy of DRAM, outside the chip", _energy),
)


def page(study: Study, drawn: Mapping[str, str]) -> str:
    """The whole page as HTML.

    Args:
        study: as from `study.study`.
        drawn: figures by name, each as an SVG element; those that are missing are left out.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["versions"] = lambda found: ", ".join(f"{name} {version}" for name, version in found.items())
    first = study["chips"][0]["chip"]
    return environment.get_template("page.html").render(
        study=study,
        headline=_headline(study),
        tiles=list(_tiles(study)),
        figures=[
            {"name": name, "title": title, "caption": caption.format(chip=first), "svg": Markup(drawn[name])}
            for name, (title, caption) in FIGURES.items()
            if name in drawn
        ],
        columns=COLUMNS,
        cell=_cell,
        share=_share_of_energy,
        settings=list(_flat(study["settings"])),
    )


def _headline(study: Study) -> str:
    settings, epochs = study["settings"], len(study["metrics"])
    model = settings.get("model") or {}
    words = [model.get("name") if isinstance(model, Mapping) else model, settings.get("precision")]
    return ", ".join([*(str(word) for word in words if word), f"{epochs} epoch{'s' * (epochs > 1)}"])


def _tiles(study: Study) -> Iterator[dict[str, str]]:
    """The run in a few numbers, on the first chip."""
    chip, last = study["chips"][0], study["metrics"][-1]
    total = chip["total"]
    yield {"value": _energy(total["energy_pj"]), "label": f"on chip {chip['chip']}"}
    if chip["float_macs"]:
        yield {"value": _share(chip["float_share"]), "label": "of all MACs ran in float: in no figure here"}
    yield {"value": _energy(total["dram_energy_pj"]), "label": "in DRAM"}
    waits = " (the SIMD core's)" if chip["time_s"] > chip["mac_time_s"] else ""
    yield {"value": si(chip["time_s"], "s"), "label": f"time at {si(chip['clock_hz'], 'Hz')}{waits}"}
    efficiency = chip["tflops_per_watt"]
    yield {"value": "-" if efficiency is None else f"{efficiency:.2f}", "label": "TFLOPS/W, skipped ones too"}
    yield {"value": _share(total["zero_share"]), "label": "zeros, streamed operand"}
    yield {"value": _share(total["fp8_share"]), "label": "FP8, of its non-zeros"}
    if "test_accuracy" in last:
        yield {"value": f"{last['test_accuracy']:.2%}", "label": f"test accuracy, epoch {last['epoch']}"}


def _cell(column: Column, row: Mapping[str, Any], chip: Mapping[str, Any]) -> Any:
    """A row's value in a column; None where it says nothing of operations on elements."""
    if column.of_macs and not row["macs"] and row["operations"] is not None:
        return None
    return row[column.field]


def _share_of_energy(row: Mapping[str, Any], chip: Mapping[str, Any]) -> str:
    """A row's energy over that of the row with the most, in %; the total has no bar."""
    most = max((each["energy_pj"] or 0.0 for each in chip["layers"]), default=0.0)
    return f"{100 * (row['energy_pj'] or 0.0) / most:.2f}" if most and row["layer"] != "total" else "0"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted key, as text."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            several = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{prefix}{name}", "-" if several in (None, "", {}) else str(several)
