"""Prices vector operations on a chip's SIMD core.

Operands come from SRAM and results go there, call by call: nothing is fused. Only an
optimizer's step reads and writes DRAM; what forward and backward exchange with layers is in the layers' own traffic.
"""

from __future__ import annotations

from collections.abc import Iterator

from lnpu_torch.cost.cost_row import CostRow
from lnpu_torch.cost.energy_table import EnergyTable
from lnpu_torch.counts.vector_ops import KINDS, PHASES, NotCounted, Phase, VectorOp, VectorOpCounts
from lnpu_torch.hardware.chip import Chip

SIMD = "SIMD"
"""The kind of a row of vector operations; its layer is what kind of operations, in parentheses."""


def vector_op_rows(vector_ops: VectorOpCounts | NotCounted, chip: Chip, energies: EnergyTable) -> Iterator[CostRow]:
    """One part for each kind and phase that ran; without energy on a chip whose SIMD core is not modelled."""
    entries = vector_ops.entries if isinstance(vector_ops, VectorOpCounts) else ()
    for kind in KINDS:
        for phase in PHASES:
            mine = [entry for entry in entries if (entry.kind, entry.phase) == (kind, phase)]
            if mine:
                yield _part(f"({kind})", phase, mine, chip, energies)


def vector_op_notes(vector_ops: VectorOpCounts | NotCounted, chip: Chip) -> list[str]:
    """Why there are no vector operations, or which of them are missing."""
    if isinstance(vector_ops, NotCounted):
        return [f"vector operations were not counted: {vector_ops.reason}"]
    notes = [f"no SIMD core of {chip.name} is modelled"] if vector_ops.entries and not chip.simd else []
    notes += vector_ops.notes
    calls = ", ".join(f"{name} ({count} x)" for name, count in vector_ops.uncounted.items())
    return [*notes, f"ran, but not counted: {calls}"] if calls else notes


def _part(layer: str, phase: Phase, entries: list[VectorOp], chip: Chip, energies: EnergyTable) -> CostRow:
    operations, special = (sum(getattr(entry, name) for entry in entries) for name in ("operations", "special"))
    if chip.simd is None:
        return CostRow(layer=layer, kind=SIMD, step=phase, operations=operations + special)
    work = operations + chip.simd.special_operations.value * special
    bits = _bits(entries, chip.simd.element_bits.value, in_dram=phase == "update")
    return CostRow(
        layer=layer,
        kind=SIMD,
        step=phase,
        operations=operations + special,
        simd_cycles=work / chip.simd.operations_per_cycle.value,
        energy_zj=energies.of_operations(work) | energies.of_bits(bits),
        bits=bits,
    )


def _bits(entries: list[VectorOp], width: int, in_dram: bool) -> dict[str, int]:
    """What comes from DRAM is written to SRAM, and what goes there is read from it, besides operands and results."""
    read, written, fetched, stored = (
        width * sum(getattr(entry, name) for entry in entries) for name in ("read", "written", "fetched", "stored")
    )
    memory = {"dram_read": fetched, "dram_write": stored, "dense_dram": fetched + stored} if in_dram else {}
    return {"sram_read": read + stored, "sram_write": written + fetched, **memory}
