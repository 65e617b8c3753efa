"""Prices vector operations on a chip's SIMD core, layer by layer of those that they follow.

Operands come from SRAM and results go there, call by call: nothing is fused. What SRAM cannot hold from one use to the
next goes to DRAM and comes back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from lnpu_torch.cost.cost_row import CostRow
from lnpu_torch.cost.energy_table import EnergyTable
from lnpu_torch.cost.memory_traffic import dram_cycles, vector_bits
from lnpu_torch.counts.vector_ops import KINDS, PHASES, NotCounted, VectorOp, VectorOpCounts
from lnpu_torch.hardware.chip import Chip

SIMD = "SIMD"
"""The kind of a row of vector operations; its layer is what kind of operations, in parentheses."""

NO_ORDER = (
    "the order in which things ran was not recorded: what does not fit into SRAM between layers is not in the traffic"
)


def vector_op_rows(vector_ops: VectorOpCounts | NotCounted, chip: Chip, energies: EnergyTable) -> Iterator[CostRow]:
    """A part for each kind, phase and layer; without energy on a chip whose SIMD core is not modelled."""
    entries = vector_ops.entries if isinstance(vector_ops, VectorOpCounts) else ()
    groups: dict[tuple[int, int, str], list[VectorOp]] = {}
    for entry in entries:
        groups.setdefault((KINDS.index(entry.kind), PHASES.index(entry.phase), entry.layer), []).append(entry)
    for _, mine in sorted(groups.items()):
        yield _part(mine, chip, energies)


def vector_op_notes(vector_ops: VectorOpCounts | NotCounted, chip: Chip) -> list[str]:
    """Why there are no vector operations, or which of them are missing."""
    if isinstance(vector_ops, NotCounted):
        return [f"vector operations were not counted: {vector_ops.reason}"]
    notes = [f"no SIMD core of {chip.name} is modelled"] if vector_ops.entries and not chip.simd else []
    notes += [NO_ORDER] if any(entry.uses is None for entry in vector_ops.entries) else []
    notes += vector_ops.notes
    calls = ", ".join(f"{name} ({count} x)" for name, count in vector_ops.uncounted.items())
    return [*notes, f"ran, but not counted: {calls}"] if calls else notes


def _part(entries: list[VectorOp], chip: Chip, energies: EnergyTable) -> CostRow:
    operations, special = (sum(getattr(entry, name) for entry in entries) for name in ("operations", "special"))
    first = entries[0]
    row = CostRow(
        layer=f"({first.kind})", kind=SIMD, step=first.phase, after=first.layer, operations=operations + special
    )
    if chip.simd is None:
        return row
    work = operations + chip.simd.special_operations.value * special
    bits: Counter[str] = Counter()
    for entry in entries:
        bits.update(vector_bits(entry, chip, chip.simd.element_bits.value))
    return replace(
        row,
        simd_cycles=work / chip.simd.operations_per_cycle.value,
        dram_cycles=dram_cycles(bits, chip),
        energy_zj=energies.of_operations(work) | energies.of_bits(bits),
        bits=dict(bits),
    )
