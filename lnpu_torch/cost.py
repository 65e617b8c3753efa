"""Counts what a model does inside a block, and has it priced. It knows no energies, rounding or rendering."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from torch import nn

from lnpu_torch.chip import Chip
from lnpu_torch.counters import Snapshot, difference, snapshot
from lnpu_torch.counts import Counts
from lnpu_torch.elements import NotCounted
from lnpu_torch.pricing import price
from lnpu_torch.report import Report
from lnpu_torch.watch import Watch


class CostCounter:
    """Counts what a converted model does inside a `with` block; such blocks nest.

    Multiply-accumulates are the difference of two snapshots of the layers' own counters: no hooks, no synchronisation
    on the way. Operations on elements (normalisation, activations, the optimizer ...) are seen as torch's ops run in
    this thread, and in its backward; under torch.compile they are not, and counts say so. It can be entered again, and
    then starts anew.
    """

    def __init__(self, model: nn.Module, *, elements: bool = True) -> None:
        """Count what `model` does; `elements=False` leaves out operations on elements, which takes no time at all."""
        self._model, self._elements = model, elements
        self._watch: Watch | None = None
        self._before: Snapshot | None = None
        self._after: Snapshot | None = None

    def __enter__(self) -> Self:
        """Start. Raises ConfigError if the model has no emulated layer."""
        self._before, self._after = snapshot(self._model), None
        self._watch = Watch() if self._elements else None
        if self._watch:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch:
            self._watch.stop()
        self._after = snapshot(self._model)

    @property
    def counts(self) -> Counts:
        """What was done so far inside the block, or, after it, in all of it. Raises RuntimeError before the block."""
        if self._before is None:
            raise RuntimeError("nothing was counted: run the model inside `with CostCounter(model) as cost:`")
        counts = difference(self._before, self._after or snapshot(self._model))
        calls = sum(entry.calls for entry in counts.steps)
        seen = self._watch.verdict(calls) if self._watch else NotCounted(reason="CostCounter(elements=False)")
        return counts.model_copy(update={"elements": seen})

    def report(self, chip: str | Path | Chip = "lnpu") -> Report:
        """`price(counts, chip)`. Raises ConfigError for an unknown or wrong chip."""
        return price(self.counts, chip)

    def save(self, path: str | Path) -> None:
        """Write the counts as versioned JSON, whole or not at all. Raises ConfigError if that cannot be written."""
        self.counts.save(path)
