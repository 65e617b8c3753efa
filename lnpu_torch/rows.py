"""Row and Part: one line of a priced run, as shown and as summed. It knows no chip and no rendering."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Row:
    """One step of one layer, priced; or a sum of them, then with "all" where they differ.

    `pairs` splits `executed` by the groups of the two operands, the streamed one first ("fp8*fp16"; "zero" where zeros
    were multiplied). `zero_share` is zeros over elements of the streamed operand, `fp8_share` FP8 elements over its
    non-zeros; None where there are none. None in `utilisation`, `sram_bits`, `dram_bits` and `dram_energy_pj` means
    not modelled. Raises ValueError if the slots or the pairs do not add up.
    """

    layer: str
    kind: str
    step: str
    slots: int
    executed: int
    skipped: int
    padding: int
    not_run: int
    pairs: dict[str, int]
    zero_share: float | None
    fp8_share: float | None
    cycles: float
    utilisation: float | None
    energy_pj: float
    sram_bits: int | None
    dram_bits: int | None
    dram_energy_pj: float | None

    def __post_init__(self) -> None:
        name = f"{self.layer} {self.step}"
        if self.slots != self.executed + self.skipped + self.padding + self.not_run:
            raise ValueError(f"{name}: slots are not executed + skipped + padding + not_run")
        if sum(self.pairs.values()) != self.executed:
            raise ValueError(f"{name}: pairs do not add up to executed")


FIELDS = [field.name for field in fields(Row)]
NOT_MODELLED = ("utilisation", "sram_bits", "dram_bits", "dram_energy_pj")
"""Fields of Row that no cost model fills yet."""


@dataclass(frozen=True)
class Part:
    """What one row is made of, everything in it a sum: parts add up where shares do not.

    `zero`, `fp8` and `wide` are elements of the streamed operand; `low_pj` and `high_pj` the energy at either end of
    the report's band.
    """

    layer: str
    kind: str
    step: str
    slots: int
    skipped: int
    padding: int
    not_run: int
    pairs: dict[str, int]
    zero: int
    fp8: int
    wide: int
    cycles: float
    energy_pj: float
    low_pj: float
    high_pj: float

    @property
    def row(self) -> Row:
        """The row, with its shares."""
        return Row(
            layer=self.layer,
            kind=self.kind,
            step=self.step,
            slots=self.slots,
            executed=sum(self.pairs.values()),
            skipped=self.skipped,
            padding=self.padding,
            not_run=self.not_run,
            pairs={pair: macs for pair, macs in self.pairs.items() if macs},
            zero_share=share(self.zero, self.zero + self.fp8 + self.wide),
            fp8_share=share(self.fp8, self.fp8 + self.wide),
            cycles=self.cycles,
            energy_pj=self.energy_pj,
            **dict.fromkeys(NOT_MODELLED),
        )


FLOATS = ("cycles", "energy_pj", "low_pj", "high_pj")


def add(parts: Sequence[Part], layer: str, kind: str, step: str) -> Part:
    """One part for several, under these names."""
    added = [field.name for field in fields(Part) if field.name not in ("layer", "kind", "step", "pairs")]
    pairs: Counter[str] = Counter()
    for part in parts:
        pairs.update(part.pairs)
    columns = {name: [getattr(part, name) for part in parts] for name in added}
    # floats are summed exactly and rounded once, so that their order does not matter
    sums: dict[str, Any] = {
        name: math.fsum(values) if name in FLOATS else sum(values) for name, values in columns.items()
    }
    return Part(layer, kind, step, pairs=dict(pairs), **sums)


def share(part: float, whole: float) -> float | None:
    """part / whole; None where there is nothing to share."""
    return part / whole if whole else None
