"""What a run did besides multiply-accumulate: vector operations, by kind and phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from lnpu_torch.files import MOST, Frozen

Kind = Literal["normalisation", "activation", "pooling", "loss", "optimizer", "other"]
Phase = Literal["forward", "backward", "update"]
KINDS: tuple[Kind, ...] = ("normalisation", "activation", "pooling", "loss", "optimizer", "other")
PHASES: tuple[Phase, ...] = ("forward", "backward", "update")

Count = Annotated[int, Field(ge=0, le=MOST)]
Signed = Annotated[int, Field(ge=-MOST, le=MOST)]
SUMS = ("calls", "read", "written", "operations", "special", "fetched", "stored")

NEVER = 1 << 50
"""A distance from which no memory holds anything."""


def rounded(distance: int) -> int:
    """A distance to at most four binary digits, upwards, so that there are few different ones."""
    step = 1 << max(distance.bit_length() - 4, 0)
    return -(-distance // step) * step


class Use(NamedTuple):
    """Words of 16 bits that are read from, and written to, DRAM by a chip that holds fewer than `distance` words.

    `distance` is what passes between two uses of a tensor, itself included. Of a tensor that is read from further and
    further, it is written once: what was written for a shorter distance is taken off.
    """

    distance: int
    read: int
    written: int


def sum_uses(uses: Iterable[Use]) -> tuple[Use, ...]:
    """The sum by distance."""
    sums: dict[int, Use] = {}
    for use in uses:
        known = sums.get(use.distance, Use(use.distance, 0, 0))
        sums[use.distance] = Use(use.distance, known.read + use.read, known.written + use.written)
    return tuple(sums[distance] for distance in sorted(sums))


class VectorOp(Frozen):
    """All calls of one torch op in one phase, after one layer.

    `read` and `written` are elements, of each call's operands and results. `operations` are additions, multiplications,
    comparisons (with the selection that they decide); `special` are functions that take a table or several operations:
    division, roots, exp, log, tanh ... `fetched` and `stored` are elements of tensors that were there before an
    optimizer's step and are there after it: each once a step, however many of its calls read or change it.
    `layer` is the emulated layer that ran last, "" in an update and where that was not recorded. `uses` say what comes
    from DRAM and goes there, by the size of memory that would hold it; None where that was not recorded.
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
    layer: str = ""
    uses: tuple[tuple[Count, Count, Signed], ...] | None = None

    @property
    def key(self) -> tuple[Kind, Phase, str, str]:
        return self.kind, self.phase, self.op, self.layer

    def __add__(self, other: VectorOp) -> VectorOp:
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        known = None if self.uses is None or other.uses is None else sum_uses(map(Use._make, self.uses + other.uses))
        return self.model_copy(update={**sums, "uses": known})


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
            raise ValueError("an op of one kind, phase and layer stands twice")
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
    merged: dict[tuple[Kind, Phase, str, str], VectorOp] = {}
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


def place(entry: VectorOp) -> tuple[int, int, str, str]:
    """An entry's place in the order of KINDS and PHASES."""
    return KINDS.index(entry.kind), PHASES.index(entry.phase), entry.op, entry.layer
