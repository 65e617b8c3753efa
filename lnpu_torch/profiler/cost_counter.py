"""Counts what a model does inside a block, and has it priced."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from torch import nn

from lnpu_torch.cost.pricing import price
from lnpu_torch.cost.report import Report
from lnpu_torch.counts.schema import Counts, FloatProduct
from lnpu_torch.counts.vector_ops import NotCounted
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.profiler.layer_counters import LayerLedger
from lnpu_torch.profiler.op_tracer import OpTracer


class CostCounter:
    """Counts what a converted model does inside a `with` block; such blocks nest, and may overlap.

    Multiply-accumulates are the difference of the layers' own counters before and after: no hooks on their calls, no
    synchronisation on the way. Layers that come, go, are converted again or reverted in the block are counted; one that
    differs from an earlier one of its name is "fc (2)". Vector operations (normalisation, activations, the
    optimizer ...) are seen as torch's ops run in this thread, and in its backward; under torch.compile they are not,
    and counts say so. Of counters of different models that are open together, the one opened last counts them. A
    counter can be entered again, and then starts anew.
    """

    def __init__(self, model: nn.Module, *, vector_ops: bool = True) -> None:
        """Count what `model` does; `vector_ops=False` leaves out vector operations, which takes no time at all."""
        self._model, self._vector_ops = model, vector_ops
        self._ledger: LayerLedger | None = None
        self._tracer: OpTracer | None = None

    def __enter__(self) -> Self:
        """Start. Raises ConfigError if the model has no emulated layer."""
        self._stop()
        self._ledger = LayerLedger(self._model)
        self._tracer = (
            OpTracer(self._ledger.owns, self._ledger.layers, self._ledger.facts) if self._vector_ops else None
        )
        if self._tracer:
            self._tracer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._tracer:
            self._tracer.stop()
        if self._ledger:
            self._ledger.close()

    @property
    def counts(self) -> Counts:
        """What was done so far inside the block, or, after it, in all of it. Raises RuntimeError before the block."""
        if self._ledger is None:
            raise RuntimeError("nothing was counted: run the model inside `with CostCounter(model) as cost:`")
        if not self._tracer:
            counts = self._ledger.counts()
            return counts.model_copy(update={"vector_ops": NotCounted(reason="CostCounter(vector_ops=False)")})
        return counted(self._ledger, self._tracer)

    def report(self, chip: str | Path | Chip = "lnpu") -> Report:
        """`price(counts, chip)`. Raises ConfigError for an unknown or wrong chip."""
        return price(self.counts, chip)

    def save(self, path: str | Path) -> None:
        """Write the counts as versioned JSON, whole or not at all. Raises ConfigError if that cannot be written."""
        self.counts.save(path)


def counted(ledger: LayerLedger, tracer: OpTracer) -> Counts:
    """What a ledger's layers did, and what a tracer saw beside them."""
    counts = ledger.counts(tracer.reuse)
    calls = sum(entry.calls for entry in counts.steps)
    if isinstance(tracer.result(calls), NotCounted):  # nor was the order seen in which layers ran
        counts = ledger.counts()
    products = sorted(tracer.products.items()) if tracer.sees_products(calls) else None
    in_float = products and {op: FloatProduct(calls=times, macs=macs) for op, (times, macs) in products}
    seen = {"vector_ops": tracer.result(calls), "in_float": {} if products == [] else in_float}
    return counts.model_copy(update=seen)
