"""What a run did besides multiply-accumulate: vector operations, by kind and phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lnpu_torch.files import MOST, Frozen

Kind = Literal["normalisation", "activation", "pooling", "loss", "optimizer", "other"]
Phase = Literal["forward", "backward", "update"]
KINDS: tuple[Kind, ...] = ("normalisation", "activation", "pooling", "loss", "optimizer", "other")
PHASES: tuple[Phase, ...] = ("forward", "backward", "update")

Count = Annotated[int, Field(ge=0, le=MOST)]
SUMS = ("calls", "read", "written", "operations", "special", "fetched", "stored")


class VectorOp(Frozen):
    """All calls of one torch op in one phase.

    `read` and `written` are elements, of each call's operands and results. `operations` are additions, multiplications,
    comparisons (with the selection that they decide); `special` are functions that take a table or several operations:
    division, roots, exp, log, tanh ... `fetched` and `stored` are elements of tensors that were there before an
    optimizer's step and are there after it: each once a step, however many of its calls read or change it.
    """

    kind: Kind
    phase: Phase
    op: str
    calls: Count
    read: Count
    written: Count
    operations: Count
    special: Count
    fetched: Count = 0
    stored: Count = 0

    @property
    def key(self) -> tuple[Kind, Phase, str]:
        return self.kind, self.phase, self.op

    def __add__(self, other: VectorOp) -> VectorOp:
        return self.model_copy(update={name: getattr(self, name) + getattr(other, name) for name in SUMS})


class VectorOpCounts(Frozen):
    """What was counted, in the order of KINDS and PHASES.

    `uncounted` names the ops that ran and were not counted, as no formula is known for them, with their calls (in files
    of versions before 3 products outside emulated layers, too). `notes` say what else is to be known.
    """

    entries: tuple[VectorOp, ...] = ()
    uncounted: dict[str, Annotated[int, Field(ge=1, le=MOST)]] = {}
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len({entry.key for entry in self.entries}) != len(self.entries):
            raise ValueError("an op of one kind and phase stands twice")
        return self


ELSEWHERE = (
    "vector operations that ran while a counter of another model was open, too, are in the counts of the one that "
    "was opened last"
)
"""A note."""


class NotCounted(Frozen):
    """Vector operations were not counted, and why: as a clause that follows "not counted: "."""

    reason: Annotated[str, Field(min_length=1)]


def merge(parts: Sequence[VectorOpCounts | NotCounted]) -> VectorOpCounts | NotCounted:
    """The sum of several runs; not counted if one of them is not."""
    reasons = dict.fromkeys(part.reason for part in parts if isinstance(part, NotCounted))
    if reasons:
        return NotCounted(reason="; ".join(reasons))
    merged: dict[tuple[Kind, Phase, str], VectorOp] = {}
    uncounted: Counter[str] = Counter()
    for part in parts:
        assert isinstance(part, VectorOpCounts)
        uncounted.update(part.uncounted)
        for entry in part.entries:
            merged[entry.key] = merged[entry.key] + entry if entry.key in merged else entry
    notes = dict.fromkeys(note for part in parts if isinstance(part, VectorOpCounts) for note in part.notes)
    return VectorOpCounts(
        entries=tuple(sorted(merged.values(), key=place)),
        uncounted=dict(sorted(uncounted.items())),
        notes=tuple(notes),
    )


def place(entry: VectorOp) -> tuple[int, int, str]:
    """An entry's place in the order of KINDS and PHASES."""
    return KINDS.index(entry.kind), PHASES.index(entry.phase), entry.op
