"""RunReport: a run priced on several chips, as the page, its figures and its JSON show it.

Energies are in pJ, times in s, shares in 0 ... 1; None is what no model covers, or what there was nothing of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from lnpu_torch.cost.cost_row import CostRow, share
from lnpu_torch.cost.energy_plot import PARTS
from lnpu_torch.cost.pricing import price
from lnpu_torch.cost.report import Report
from lnpu_torch.counts.schema import Counts, StepCounts, Triple
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.hardware.sourced_value import value_text
from lnpu_torch.named_files import names
from lnpu_torch.reporting.run_reader import Epoch, Run, merged
from lnpu_torch.units import ON_CHIP
from lnpu_torch.versions import versions

OPERANDS = {"input": "activations", "grad_output": "errors"}
"""The operands whose zeros chips skip, and what they are called."""


@dataclass(frozen=True)
class Constant:
    """One value of a chip's file, as it is shown, with its tag and source."""

    key: str
    value: str
    tag: str
    source: str


@dataclass(frozen=True)
class EpochCost:
    """One epoch on one chip: its sum, and its sum by step; and how many epochs it stands for."""

    epoch: int
    stands_for: int
    time_s: float
    total: CostRow
    steps: Mapping[str, CostRow]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        steps = {step: row.to_dict() for step, row in self.steps.items()}
        numbers = {"epoch": self.epoch, "stands_for": self.stands_for, "time_s": self.time_s}
        return {**numbers, "total": self.total.to_dict(), "steps": steps}


@dataclass(frozen=True)
class ChipReport:
    """A run on one chip: the report of the whole run, its sums by layer and by step, and its epochs."""

    description: str
    report: Report
    total: CostRow
    layers: tuple[CostRow, ...]
    steps: tuple[CostRow, ...]
    epochs: tuple[EpochCost, ...]
    constants: tuple[Constant, ...]

    @property
    def chip(self) -> str:
        """The chip's name."""
        return self.report.chip

    @classmethod
    def of(cls, run: Run, whole: Counts, chip: Chip) -> Self:
        """Price a run, whose counts are `whole`, and each of its epochs."""
        report = price(whole, chip)
        return cls(
            description=chip.description,
            report=report,
            total=report.total,
            layers=report.by("layer").rows,
            steps=report.by("step").rows,
            epochs=tuple(_epoch(epoch, price(epoch.counts, chip)) for epoch in run.epochs),
            constants=tuple(
                Constant(key, value_text(entry), entry.tag, entry.source) for key, entry in chip.values().items()
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: those of the report, and more."""
        return {
            **self.report.to_dict(),
            "description": self.description,
            "layers": [row.to_dict() for row in self.layers],
            "steps": [row.to_dict() for row in self.steps],
            "epochs": [epoch.to_dict() for epoch in self.epochs],
            "constants": [asdict(constant) for constant in self.constants],
        }


@dataclass(frozen=True)
class Shares:
    """Zeros, and FP8 elements among the non-zeros, of one operand: [layer][epoch]."""

    zero: list[list[float | None]]
    fp8: list[list[float | None]]


@dataclass(frozen=True)
class LayerShares:
    """Shares of each layer's operands, as they were rounded."""

    layers: list[str]
    epochs: list[int]
    operands: dict[str, Shares]

    @classmethod
    def of(cls, run: Run) -> Self:
        """The shares of a run, which do not depend on a chip."""
        layers = list(dict.fromkeys(entry.layer for epoch in run.epochs for entry in epoch.counts.steps))
        operands = {}
        for operand in OPERANDS:
            by_epoch = [_groups(epoch.counts, operand) for epoch in run.epochs]
            groups = [[found.get(layer, (0, 0, 0)) for found in by_epoch] for layer in layers]
            operands[operand] = Shares(
                zero=[[share(zero, zero + fp8 + wide) for zero, fp8, wide in row] for row in groups],
                fp8=[[share(fp8, fp8 + wide) for _, fp8, wide in row] for row in groups],
            )
        return cls(layers, [epoch.number for epoch in run.epochs], operands)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        operands = {operand: asdict(shares) for operand, shares in self.operands.items()}
        return {"layers": self.layers, "epochs": self.epochs, **operands}


@dataclass(frozen=True)
class RunReport:
    """All that is known of a run on some chips; the first one is the one that is looked at closely.

    `metrics` has a row per epoch, `versions` what the "run" and this "report" were made with.
    """

    run: str
    settings: dict[str, Any]
    versions: dict[str, dict[str, str]]
    metrics: tuple[dict[str, float], ...]
    epochs: int
    left_out: str | None
    extrapolated: bool
    estimate: str | None
    shares: LayerShares
    chips: tuple[ChipReport, ...]

    @classmethod
    def of(cls, run: Run, chips: Sequence[str | Path | Chip]) -> Self:
        """Price a run.

        Raises:
            ConfigError: no such chip.
        """
        whole = merged(run.epochs)
        return cls(
            run=run.name,
            settings=names(run.settings),
            versions={"run": run.versions, "report": versions()},
            metrics=tuple({**epoch.metrics, "epoch": epoch.number} for epoch in run.epochs),
            epochs=run.length,
            left_out=run.left_out,
            extrapolated=whole.extrapolated,
            estimate=whole.estimate,
            shares=LayerShares.of(run),
            chips=tuple(ChipReport.of(run, whole, read_chip(each)) for each in chips),
        )

    def json_text(self) -> str:
        """All numbers as JSON, which has null for what is not finite; settings may hold that."""
        data = {
            "run": self.run,
            "settings": self.settings,
            "versions": self.versions,
            "metrics": self.metrics,
            "epochs": self.epochs,
            "left_out": self.left_out,
            "extrapolated": self.extrapolated,
            "estimate": self.estimate,
            "shares": self.shares.to_dict(),
            "chips": [chip.to_dict() for chip in self.chips],
        }
        return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def lacking(chips: Sequence[ChipReport]) -> list[str]:
    """Of each chip the parts that no model covers but another chip's: ", without SIMD". It looks cheaper than it is."""
    known = [{part for part in ON_CHIP if getattr(chip.total, f"{part}_energy_pj") is not None} for chip in chips]
    lacks = ([PARTS[part].label for part in ON_CHIP if part in set().union(*known) - mine] for mine in known)
    return [f", without {' and '.join(parts)}" if parts else "" for parts in lacks]


def _finite(data: object) -> object:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _epoch(epoch: Epoch, report: Report) -> EpochCost:
    steps = {row.step: row for row in report.by("step").rows}
    return EpochCost(epoch.number, epoch.stands_for, report.time_s, report.total, steps)


def _groups(counts: Counts, operand: str) -> dict[str, Triple]:
    """Elements of each layer's operand that are zero, FP8 and FP16; two steps read an error, or one of them."""
    groups: dict[str, Triple] = {}
    for entry in counts.steps:
        found = _operand(entry, operand)
        if found and sum(found):
            groups.setdefault(entry.layer, found)
    return groups


def _operand(entry: StepCounts, operand: str) -> Triple | None:
    if operand == "input":
        return entry.first.elements if entry.step == "forward" else None
    return {"grad_input": entry.first.elements, "grad_weight": entry.second.elements}.get(entry.step)
