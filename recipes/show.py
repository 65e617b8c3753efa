"""What a training run shows on the terminal. It knows numbers and tables, and nothing of training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from rich import progress
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch.tables import add_row, plain_table, si

ENERGY_EVERY_S = 1.0
"""Reading the counters waits for the device, so the energy so far is refreshed this often, in seconds."""


def start(model: nn.Module, device: torch.device, images: str, folder: Path, emulated: bool) -> RenderableType:
    """What is trained, on what and where to."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = lnpu.coverage(model)
    held = f"{len(layers.emulated)} of {len(layers.rows)} layers that have any" if emulated else "none of the layers"
    text = f"{si(parameters)} parameters, {held} emulated; on {device}; {images}; files in {folder}"
    return Text(text)


class Progress:
    """A bar for one epoch: loss, accuracy, images/s, and the energy so far on one chip if `cost` is given."""

    def __init__(self, console: Console, name: str, steps: int, cost: lnpu.CostCounter | None, chip: str) -> None:
        columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[numbers]}")
        self._bar = progress.Progress(*columns, progress.TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task(name, total=steps, numbers="")
        self._cost, self._chip, self._energy, self._read = cost, chip, "", time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, loss: float, accuracy: float, images_per_s: float) -> None:
        """One step further; the numbers are those of the epoch so far."""
        if self._cost is not None and time.monotonic() - self._read >= ENERGY_EVERY_S:
            self._energy = f", {si(self._cost.report(chip=self._chip).total.energy_pj, 'pJ')} on {self._chip}"
            self._read = time.monotonic()
        numbers = f"loss {loss:.4f}, accuracy {accuracy:.2%}, {images_per_s:,.0f} images/s{self._energy}"
        self._bar.update(self._task, advance=1, numbers=numbers)


def epoch(row: Mapping[str, Any], epochs: int, reports: Sequence[lnpu.Report]) -> RenderableType:
    """One epoch: its row of metrics.csv in words, and a table of its work and energy by step."""
    words = (
        f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}, train {row['train_accuracy']:.2%}, "
        f"test {row['test_accuracy']:.2%}, {row['images_per_s']:,.0f} images/s"
    )
    if not reports:
        return Text(words)
    table = plain_table(words, ["step"], ["MACs", "executed", "zeros", "FP8", *(report.chip for report in reports)])
    for rows in zip(*((*report.by("step").rows, report.total) for report in reports), strict=True):
        first = rows[0]
        shares = (first.executed / max(first.slots, 1), first.zero_share, first.fp8_share)
        work = (si(first.slots), *map(_share, shares))
        add_row(table, first.step, *work, *(si(each.energy_pj, "pJ") for each in rows))
    return table


def summary(epochs: Sequence[tuple[str, lnpu.Counts]], chips: Sequence[str]) -> RenderableType:
    """The run's energy on each chip: of all epochs by layer and by step, then by epoch; and what it leaves out."""
    if not epochs:
        return Text("Torch's own layers did the work (precision: float32), so nothing was counted.")
    whole = [lnpu.price(lnpu.Counts.merge(counts for _, counts in epochs), chip) for chip in chips]
    by_layer = _energies("layer", whole)
    by_step = _energies("step", whole)
    by_epoch = plain_table("Energy by epoch", ["epoch"], chips)
    for name, counts in epochs:
        add_row(by_epoch, name, *(si(lnpu.price(counts, chip).total.energy_pj, "pJ") for chip in chips))
    add_row(by_epoch, "total", *(si(report.total.energy_pj, "pJ") for report in whole))
    notes = [Text(f"{report.chip}: {note}") for report in whole for note in report.notes]
    return Group(by_layer, by_step, by_epoch, *notes)


def _energies(key: Literal["layer", "step"], reports: Sequence[lnpu.Report]) -> Table:
    table = plain_table(f"Energy by {key}", [key], [report.chip for report in reports])
    for rows in zip(*(report.by(key).rows for report in reports), strict=True):
        add_row(table, getattr(rows[0], key), *(si(row.energy_pj, "pJ") for row in rows))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
