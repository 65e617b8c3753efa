"""Study: a run priced on several chips, as plain data, for the page, its figures and its JSON. It draws nothing.

Energies are in pJ, times in s, shares in 0 ... 1; None is what no model covers, or what there was nothing of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lnpu_torch.cost.cost_row import share
from lnpu_torch.cost.pricing import price
from lnpu_torch.cost.report import Report
from lnpu_torch.counts.schema import Counts, StepCounts, Triple
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.named_files import names
from lnpu_torch.reporting.chip_tables import value_text
from lnpu_torch.reporting.run_reader import Run
from lnpu_torch.versions import versions

OPERANDS = {"input": "activations", "grad_output": "errors"}
"""The operands whose zeros chips skip, and what they are called."""

Study = dict[str, Any]


def study(run: Run, chips: Sequence[str | Path | Chip]) -> Study:
    """All that is known of a run on these chips; the first one is the one that is looked at closely.

    Raises:
        ConfigError: no such chip, or two of one name.
    """
    read = [read_chip(each) for each in chips]
    return {
        "run": run.name,
        "settings": names(run.settings),
        "versions": {"run": run.versions, "report": versions()},
        "metrics": [{**epoch.metrics, "epoch": epoch.number} for epoch in run.epochs],
        "extrapolated": any(epoch.counts.extrapolated for epoch in run.epochs),
        "shares": _shares(run),
        "chips": [_on_chip(run, chip) for chip in read],
    }


def _on_chip(run: Run, chip: Chip) -> dict[str, Any]:
    whole = price(Counts.merge(epoch.counts for epoch in run.epochs), chip)
    return {
        "chip": chip.name,
        "description": chip.description,
        **whole.to_dict(),
        "layers": [row.to_dict() for row in whole.by("layer").rows],
        "steps": [row.to_dict() for row in whole.by("step").rows],
        "epochs": [_epoch(epoch.number, price(epoch.counts, chip)) for epoch in run.epochs],
        "constants": [
            {"key": key, "value": value_text(entry), "tag": entry.tag, "source": entry.source}
            for key, entry in chip.values().items()
        ],
    }


def _epoch(number: int, report: Report) -> dict[str, Any]:
    return {
        "epoch": number,
        "time_s": report.time_s,
        "total": report.total.to_dict(),
        "steps": {row.step: row.to_dict() for row in report.by("step").rows},
    }


def _shares(run: Run) -> dict[str, Any]:
    """Zeros, and FP8 elements among the non-zeros, of each layer's operands, as they were rounded: [layer][epoch]."""
    layers = list(dict.fromkeys(entry.layer for epoch in run.epochs for entry in epoch.counts.steps))
    shares: dict[str, Any] = {"layers": layers, "epochs": [epoch.number for epoch in run.epochs]}
    for operand in OPERANDS:
        groups = [[_groups(epoch.counts, layer, operand) for epoch in run.epochs] for layer in layers]
        shares[operand] = {
            "zero": [[_zeros(each) for each in row] for row in groups],
            "fp8": [[_fp8(each) for each in row] for row in groups],
        }
    return shares


def _groups(counts: Counts, layer: str, operand: str) -> Triple:
    """Elements of a layer's operand that are zero, FP8 and FP16; an error is read by two steps, or by one of them."""
    for entry in counts.steps:
        found = _operand(entry, operand) if entry.layer == layer else None
        if found and sum(found):
            return found
    return (0, 0, 0)


def _operand(entry: StepCounts, operand: str) -> Triple | None:
    if operand == "input":
        return entry.first.elements if entry.step == "forward" else None
    return {"grad_input": entry.first.elements, "grad_weight": entry.second.elements}.get(entry.step)


def _zeros(groups: Triple) -> float | None:
    return share(groups[0], sum(groups))


def _fp8(groups: Triple) -> float | None:
    return share(groups[1], groups[1] + groups[2])
