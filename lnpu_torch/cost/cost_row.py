"""CostRow, one line of a priced run, and the columns that tables, CSV, JSON and pages show of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from lnpu_torch.text_tables import si
from lnpu_torch.units import COMPONENTS, ON_CHIP, Component, pj

Key = TypeVar("Key", bound=str)


Bound = Literal["multipliers", "SIMD", "DRAM"]
"""What a row's time may hang on."""


class LaneCycles(NamedTuple):
    """Cycles of a step: if no lane had to wait, with the chip's load balancer, and with that off."""

    ideal: float
    balanced: float
    unbalanced: float


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One step of one layer, priced; or a sum of such rows, then with "all" where they differ.

    Fields are sums, from which the properties follow, so that rows add up. `COLUMNS` says what each column means. None
    in a number of bits or in an energy, and a component that `energy_zj` lacks, mean that no model covers it.

    Args:
        layer, kind, step: names.
        macs: what a dense chip would multiply: executed + skipped + padding + not_run.
        skipped, padding, not_run: MACs that were skipped, that lie outside the image, or whose step was not run.
        executed_pairs: executed MACs by the groups of both operands, the streamed one first ("fp8*fp16").
        zero, fp8, wide: elements of the streamed operand by group.
        cycles: of the multipliers.
        lanes: how `cycles` came about, but for multipliers that a layer is too small for; None where that was not
            recorded, or nothing was run.
        operations: vector operations; None in a row without any.
        simd_cycles: of the SIMD core, which works beside the multipliers; None in a row without vector operations.
        dram_cycles: cycles in which the row's bits come from DRAM and go there; None if no model covers them.
        time_by: cycles that the row adds to the run's time, by what takes longest in its pass.
        energy_zj: exact energy by component, in zJ.
        bits: traffic by kind ("sram_read", "sram_write", "dram_read", "dram_write", "dense_dram").
        range_zj: what either end of the report's energy range adds to the energy on the chip, in zJ.
        border_zj: what `padding` would add to the energy on the chip if it were multiplied as zeros, in zJ; 0 on a chip
            where it is.
        after: of vector operations, the layer that they follow; "" where that was not recorded, and in sums.
        estimate: whether counts that no run has made are in it.

    Raises:
        ValueError: the MACs do not add up.
    """

    layer: str
    kind: str
    step: str
    macs: int = 0
    skipped: int = 0
    padding: int = 0
    not_run: int = 0
    executed_pairs: dict[str, int] = field(default_factory=dict)
    zero: int = 0
    fp8: int = 0
    wide: int = 0
    cycles: float = 0.0
    lanes: LaneCycles | None = None
    operations: int | None = None
    simd_cycles: float | None = None
    dram_cycles: float | None = None
    time_by: dict[Bound, float] = field(default_factory=dict)
    energy_zj: dict[Component, int] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    range_zj: tuple[int, int] = (0, 0)
    border_zj: int = 0
    after: str = ""
    estimate: bool = False

    def __post_init__(self) -> None:
        if self.macs != self.executed + self.skipped + self.padding + self.not_run:
            raise ValueError(f"{self.layer} {self.step}: macs are not executed + skipped + padding + not_run")

    @classmethod
    def sum(cls, rows: Sequence[CostRow], layer: str, kind: str, step: str) -> CostRow:
        """One row for several, under these names. Cycles are summed exactly and rounded once, whatever their order."""
        operations = [row.operations for row in rows if row.operations is not None]
        simd = [row.simd_cycles for row in rows if row.simd_cycles is not None]
        dram = [row.dram_cycles for row in rows if row.dram_cycles is not None]
        bounds = dict.fromkeys(bound for row in rows for bound in row.time_by)
        lanes = [row.lanes for row in rows if row.lanes]
        return cls(
            layer=layer,
            kind=kind,
            step=step,
            **{name: sum(getattr(row, name) for row in rows) for name in SUMS},
            executed_pairs=_added(row.executed_pairs for row in rows),
            cycles=math.fsum(row.cycles for row in rows),
            lanes=LaneCycles(*map(math.fsum, zip(*lanes, strict=True))) if lanes else None,
            operations=sum(operations) if operations else None,
            simd_cycles=math.fsum(simd) if simd else None,
            dram_cycles=math.fsum(dram) if dram else None,
            time_by={bound: math.fsum(row.time_by.get(bound, 0.0) for row in rows) for bound in bounds},
            energy_zj=_in_order(_added(row.energy_zj for row in rows)),
            bits=_added(row.bits for row in rows),
            range_zj=(sum(row.range_zj[0] for row in rows), sum(row.range_zj[1] for row in rows)),
            estimate=any(row.estimate for row in rows),
        )

    @property
    def executed(self) -> int:
        """MACs that were neither skipped, nor padding, nor left out."""
        return sum(self.executed_pairs.values())

    @property
    def asked(self) -> int:
        """MACs inside the image that were asked for, skipped or not: the work of which TFLOPS/W are counted."""
        return self.macs - self.not_run - self.padding

    @property
    def pairs(self) -> dict[str, int]:
        """`executed_pairs` without those that there were none of."""
        return {pair: macs for pair, macs in self.executed_pairs.items() if macs}

    @property
    def zero_share(self) -> float | None:
        """Zeros over elements of the streamed operand; None where there are no elements."""
        return share(self.zero, self.zero + self.fp8 + self.wide)

    @property
    def fp8_share(self) -> float | None:
        """FP8 elements over non-zeros of the streamed operand; None where there are no non-zeros."""
        return share(self.fp8, self.fp8 + self.wide)

    @property
    def utilisation(self) -> float | None:
        """The mean work of a lane over that of the fullest, with the chip's load balancer; None if not recorded."""
        return share(self.lanes.ideal, self.lanes.balanced) if self.lanes else None

    @property
    def unbalanced_utilisation(self) -> float | None:
        """`utilisation` with the load balancer off."""
        return share(self.lanes.ideal, self.lanes.unbalanced) if self.lanes else None

    @property
    def array_use(self) -> float | None:
        """The share of the multipliers that the layers are wide enough for; None if not recorded."""
        return share(self.lanes.balanced, self.cycles) if self.lanes else None

    @property
    def time_cycles(self) -> float:
        """Cycles that the row adds to the run's time; none where other rows of its pass take longer."""
        return math.fsum(self.time_by.values())

    @property
    def bound(self) -> str | None:
        """What takes most of the row's time; None if it takes none."""
        return max(self.time_by, key=lambda bound: self.time_by[bound]) if self.time_cycles else None

    @property
    def chip_zj(self) -> int:
        """Energy of what is modelled of the chip, in zJ; DRAM is apart."""
        return sum(self.energy_zj.get(component, 0) for component in ON_CHIP)

    @property
    def energy_range_zj(self) -> tuple[int, int]:
        """`chip_zj` at either end of the report's energy range."""
        return self.chip_zj + self.range_zj[0], self.chip_zj + self.range_zj[1]

    @property
    def energy_pj(self) -> float | None:
        """Energy of MACs, SRAM and SIMD core, as far as these are modelled; None if there was work and none of them is.

        The nearest float to the exact energy in zJ, as all energies in pJ are.
        """
        worked = self.macs or self.operations
        if worked and not any(component in self.energy_zj for component in ON_CHIP):
            return None
        return pj(self.chip_zj)

    @property
    def mac_energy_pj(self) -> float | None:
        """Energy of executed and skipped MACs."""
        return self._energy_pj("mac")

    @property
    def sram_energy_pj(self) -> float | None:
        """Energy of SRAM."""
        return self._energy_pj("sram")

    @property
    def simd_energy_pj(self) -> float | None:
        """Energy of the SIMD core."""
        return self._energy_pj("simd")

    @property
    def idle_energy_pj(self) -> float | None:
        """Energy on the chip that flows while multipliers wait, in the row's time."""
        return self._energy_pj("idle")

    @property
    def dram_energy_pj(self) -> float | None:
        """Energy of DRAM, also what flows there whatever is done; it is no part of `energy_pj`."""
        return self._energy_pj("dram")

    @property
    def all_energy_pj(self) -> float | None:
        """Energy on the chip and, where it is modelled, of DRAM."""
        return None if self.energy_pj is None else pj(self.chip_zj + self.energy_zj.get("dram", 0))

    @property
    def sram_bits(self) -> int | None:
        """Bits read from SRAM and written to it."""
        return self._bits("sram_read", "sram_write")

    @property
    def dram_bits(self) -> int | None:
        """Bits read from DRAM and written to it."""
        return self._bits("dram_read", "dram_write")

    @property
    def dense_dram_bits(self) -> int | None:
        """What `dram_bits` would be if all were dense FP16."""
        return self._bits("dense_dram")

    @property
    def not_modelled(self) -> tuple[str, ...]:
        """The columns that no model filled."""
        return tuple(column.field for column in COLUMNS if column.modelled and column.of(self) is None)

    def to_dict(self) -> dict[str, Any]:
        """Every column's value, exact."""
        return {column.field: column.of(self) for column in COLUMNS}

    def _energy_pj(self, component: Component) -> float | None:
        return pj(self.energy_zj[component]) if component in self.energy_zj else None

    def _bits(self, *kinds: str) -> int | None:
        known = [self.bits[kind] for kind in kinds if kind in self.bits]
        return sum(known) if known else None


SUMS = ("macs", "skipped", "padding", "not_run", "zero", "fp8", "wide", "border_zj")


def _added(tables: Iterable[dict[Key, int]]) -> dict[Key, int]:
    """One table for several: a key is there if it is in any."""
    total: Counter[Key] = Counter()
    for table in tables:
        total.update(table)
    return dict(total)


def _in_order(energy: dict[Component, int]) -> dict[Component, int]:
    return {component: energy[component] for component in COMPONENTS if component in energy}


Unit = Literal["", "%", "pJ", "bit"]


@dataclass(frozen=True)
class Column:
    """One column of a priced run, wherever it is shown.

    Args:
        field: the attribute of CostRow, which is the column's name in JSON and CSV.
        head: its heading in tables; empty if tables do not show it.
        says: what it means.
        unit: of its numbers; "%" is a share, shown in percent. None for names and mappings.
        table: the text table that it is in: "macs", "vector", or "energy".
        on_page: whether the page's table of layers shows it.
        modelled: whether None means that no model covers it.
    """

    field: str
    head: str
    says: str
    unit: Unit | None = ""
    table: Literal["macs", "vector", "energy"] | None = None
    on_page: bool = True
    modelled: bool = False

    def of(self, row: CostRow) -> Any:
        """A row's value."""
        return getattr(row, self.field)

    def text(self, value: Any) -> str:
        """A value as tables show it; "-" for None."""
        if value is None:
            return "-"
        if self.unit is None:
            return str(value)
        return f"{value:.1%}" if self.unit == "%" else si(value, self.unit)

    def shown(self, row: CostRow) -> str:
        """A row's value as tables show it."""
        return self.text(self.of(row))

    def cell(self, row: CostRow) -> Any:
        """A row's value as CSV has it: a mapping is JSON."""
        value = self.of(row)
        return json.dumps(value) if isinstance(value, dict) else value


COLUMNS = (
    Column("layer", "layer", "its name in the model", None),
    Column("kind", "kind", "its class", None),
    Column("step", "step", "forward, grad_input, grad_weight, backward or update", None, on_page=False),
    Column("macs", "MACs", "multiplications of a dense chip", table="macs"),
    Column("executed", "executed", "MACs that are executed", table="macs"),
    Column("skipped", "skipped", "MACs that are skipped", table="macs", on_page=False),
    Column("padding", "padding", "MACs outside the image", table="macs", on_page=False),
    Column("not_run", "not run", "MACs of steps that nobody asked for", table="macs", on_page=False),
    Column("pairs", "", "executed MACs by the groups of both operands", None, on_page=False),
    Column("zero_share", "zero", "zeros in the streamed operand", "%", "macs"),
    Column("fp8_share", "FP8", "FP8 among the streamed operand's non-zeros", "%", "macs"),
    Column("cycles", "cycles", "of the multipliers", table="macs"),
    Column("utilisation", "lanes busy", "mean work of a lane over the fullest one's", "%", "macs"),
    Column(
        "unbalanced_utilisation", "balancer off", "lanes busy without load balancer", "%", table="macs", on_page=False
    ),
    Column("array_use", "array busy", "multipliers that the layer is wide enough for", "%", "macs", on_page=False),
    Column("operations", "operations", "vector operations, on the SIMD core", table="vector"),
    Column("simd_cycles", "SIMD cycles", "of the SIMD core", table="vector", on_page=False),
    Column("dram_cycles", "", "in which bits come from DRAM and go there", on_page=False),
    Column("time_cycles", "", "that the row adds to the run's time", on_page=False),
    Column("bound", "bound by", "what takes most of the row's time", None, "energy"),
    Column("mac_energy_pj", "MAC", "energy of executed and skipped MACs", "pJ", "energy", modelled=True),
    Column("sram_energy_pj", "SRAM", "energy of SRAM", "pJ", "energy", modelled=True),
    Column("simd_energy_pj", "SIMD", "energy of the SIMD core", "pJ", "energy", modelled=True),
    Column("idle_energy_pj", "idle", "energy that flows while multipliers wait", "pJ", "energy", modelled=True),
    Column("energy_pj", "chip", "energy on the chip: MAC, SRAM, SIMD and idle", "pJ", "energy"),
    Column("dram_energy_pj", "DRAM", "energy of DRAM, outside the chip", "pJ", "energy", modelled=True),
    Column("all_energy_pj", "chip + DRAM", "energy on the chip and of DRAM", "pJ", "energy", on_page=False),
    Column("sram_bits", "SRAM access", "bits from and to SRAM", "bit", "energy", on_page=False, modelled=True),
    Column("dram_bits", "DRAM access", "bits from and to DRAM", "bit", "energy", on_page=False, modelled=True),
    Column("dense_dram_bits", "", "bits from and to DRAM in dense FP16", "bit", on_page=False, modelled=True),
    Column("energy_zj", "", "exact energy by component", None, on_page=False),
    Column("estimate", "", "whether counts that no run has made are in it", None, on_page=False),
)
"""All columns, in the order in which they are shown and written."""


def columns(*fields: str) -> tuple[Column, ...]:
    """The columns of these fields, in this order."""
    return tuple(next(column for column in COLUMNS if column.field == name) for name in fields)


def share(part: float, whole: float) -> float | None:
    """part / whole; None where there is nothing to share."""
    return part / whole if whole else None
