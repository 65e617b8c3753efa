"""Row and Part: one line of a priced run, as shown and as summed. It knows no chip and no rendering."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple, TypeVar

from lnpu_torch.units import COMPONENTS, ON_CHIP, Component, pj

Key = TypeVar("Key", bound=str)


@dataclass(frozen=True)
class Row:
    """One step of one layer, priced; or a sum of them, then with "all" where they differ.

    `pairs` splits `executed` by the groups of the two operands, the streamed one first ("fp8*fp16"; "zero" where zeros
    were multiplied). `zero_share` is zeros over elements of the streamed operand, `fp8_share` FP8 elements over its
    non-zeros; None where there are none. `energy_pj` is the chip's: MACs, SRAM and SIMD core, as far as these are
    modelled, and None if none of them is; `dram_energy_pj` is apart. `dense_dram_bits` is what DRAM would move if all
    were dense FP16. `operations` are those on elements, and `simd_cycles` the SIMD core's, which works beside the
    multipliers, whose cycles `cycles` are; both None in a row without such operations.

    `utilisation` is the mean work of a lane over that of the fullest, with the chip's load balancer, and
    `unbalanced_utilisation` without; None where it was not recorded, or nothing was run.

    `energy_zj` has the exact energies by component, of which those in pJ are the nearest floats. None in a number of
    bits or in an energy, and a component that `energy_zj` lacks, means that no model covers it. Raises ValueError if
    the MACs or the pairs do not add up.
    """

    layer: str
    kind: str
    step: str
    macs: int
    executed: int
    skipped: int
    padding: int
    not_run: int
    pairs: dict[str, int]
    zero_share: float | None
    fp8_share: float | None
    cycles: float
    utilisation: float | None
    unbalanced_utilisation: float | None
    operations: int | None
    simd_cycles: float | None
    energy_pj: float | None
    mac_energy_pj: float | None
    sram_energy_pj: float | None
    simd_energy_pj: float | None
    sram_bits: int | None
    dram_bits: int | None
    dense_dram_bits: int | None
    dram_energy_pj: float | None
    energy_zj: dict[str, int]

    def __post_init__(self) -> None:
        name = f"{self.layer} {self.step}"
        if self.macs != self.executed + self.skipped + self.padding + self.not_run:
            raise ValueError(f"{name}: macs are not executed + skipped + padding + not_run")
        if sum(self.pairs.values()) != self.executed:
            raise ValueError(f"{name}: pairs do not add up to executed")

    @property
    def not_modelled(self) -> tuple[str, ...]:
        """Names of the fields that no model filled."""
        return tuple(name for name in MODELLED if getattr(self, name) is None)


FIELDS = [field.name for field in fields(Row)]
MODELLED = (
    *("mac_energy_pj", "sram_energy_pj", "simd_energy_pj"),
    *("sram_bits", "dram_bits", "dense_dram_bits", "dram_energy_pj"),
)
"""Fields of Row that are None where no model fills them."""


class LaneCycles(NamedTuple):
    """Cycles of a step: if no lane had to wait, with the chip's load balancer, and with that off."""

    ideal: float
    balanced: float
    unbalanced: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a row is made of, everything in it a sum: parts add up where shares do not.

    `zero`, `fp8` and `wide` are elements of the streamed operand. `lanes` tells how `cycles` came about, None where
    that was not recorded. `operations` and `simd_cycles` are None where there are none. `energy` is in zJ by component,
    and `bits` the traffic ("sram_read", "sram_write", "dram_read", "dram_write", "dense_dram"): a key that is missing
    is not modelled, or not in this part. `band` is what either end of the report's band adds to the energy, in zJ.
    """

    layer: str
    kind: str
    step: str
    macs: int = 0
    skipped: int = 0
    padding: int = 0
    not_run: int = 0
    pairs: dict[str, int] = field(default_factory=dict)
    zero: int = 0
    fp8: int = 0
    wide: int = 0
    cycles: float = 0.0
    lanes: LaneCycles | None = None
    operations: int | None = None
    simd_cycles: float | None = None
    energy: dict[Component, int] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    band: tuple[int, int] = (0, 0)

    @property
    def chip_zj(self) -> int:
        """Energy of what is modelled of the chip, in zJ; DRAM is apart."""
        return sum(self.energy.get(component, 0) for component in ON_CHIP)

    @property
    def range_zj(self) -> tuple[int, int]:
        """`chip_zj` at either end of the report's band."""
        return self.chip_zj + self.band[0], self.chip_zj + self.band[1]

    @property
    def row(self) -> Row:
        """The row, with its shares."""
        energy = {component: pj(zj) for component, zj in self.energy.items()}
        return Row(
            layer=self.layer,
            kind=self.kind,
            step=self.step,
            macs=self.macs,
            executed=sum(self.pairs.values()),
            skipped=self.skipped,
            padding=self.padding,
            not_run=self.not_run,
            pairs={pair: macs for pair, macs in self.pairs.items() if macs},
            zero_share=share(self.zero, self.zero + self.fp8 + self.wide),
            fp8_share=share(self.fp8, self.fp8 + self.wide),
            cycles=self.cycles,
            utilisation=share(self.lanes.ideal, self.lanes.balanced) if self.lanes else None,
            unbalanced_utilisation=share(self.lanes.ideal, self.lanes.unbalanced) if self.lanes else None,
            operations=self.operations,
            simd_cycles=self.simd_cycles,
            energy_pj=None if self._unpriced else pj(self.chip_zj),
            mac_energy_pj=energy.get("mac"),
            sram_energy_pj=energy.get("sram"),
            simd_energy_pj=energy.get("simd"),
            sram_bits=self._bits("sram_read", "sram_write"),
            dram_bits=self._bits("dram_read", "dram_write"),
            dense_dram_bits=self._bits("dense_dram"),
            dram_energy_pj=energy.get("dram"),
            energy_zj={component: self.energy[component] for component in COMPONENTS if component in self.energy},
        )

    @property
    def _unpriced(self) -> bool:
        """Whether there was work, and no model covers any of it."""
        worked = self.macs or self.operations
        return bool(worked) and not any(component in self.energy for component in ON_CHIP)

    def _bits(self, *kinds: str) -> int | None:
        known = [self.bits[kind] for kind in kinds if kind in self.bits]
        return sum(known) if known else None


SUMS = ("macs", "skipped", "padding", "not_run", "zero", "fp8", "wide")


def add(parts: Sequence[Part], layer: str, kind: str, step: str) -> Part:
    """One part for several, under these names. Cycles are summed exactly and rounded once, whatever their order."""
    operations = [part.operations for part in parts if part.operations is not None]
    simd = [part.simd_cycles for part in parts if part.simd_cycles is not None]
    return Part(
        layer=layer,
        kind=kind,
        step=step,
        **{name: sum(getattr(part, name) for part in parts) for name in SUMS},
        pairs=_added(part.pairs for part in parts),
        cycles=math.fsum(part.cycles for part in parts),
        lanes=_lanes([part.lanes for part in parts if part.lanes]),
        operations=sum(operations) if operations else None,
        simd_cycles=math.fsum(simd) if simd else None,
        energy=_added(part.energy for part in parts),
        bits=_added(part.bits for part in parts),
        band=(sum(part.band[0] for part in parts), sum(part.band[1] for part in parts)),
    )


def _added(tables: Iterable[dict[Key, int]]) -> dict[Key, int]:
    """One table for several: a key is there if it is in any."""
    total: Counter[Key] = Counter()
    for table in tables:
        total.update(table)
    return dict(total)


def _lanes(parts: Sequence[LaneCycles]) -> LaneCycles | None:
    return LaneCycles(*map(math.fsum, zip(*parts, strict=True))) if parts else None


def share(part: float, whole: float) -> float | None:
    """part / whole; None where there is nothing to share."""
    return part / whole if whole else None
