"""How chips are shown: one line each, or every value of one with its tag and source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lnpu_torch.cost.energy_table import EnergyTable
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.sourced_value import SourcedRange, SourcedValue
from lnpu_torch.text_tables import add_row, plain_table
from lnpu_torch.units import pj

RATES = ["V", "MHz", "MAC/cycle FP8", "FP16", "pJ/MAC FP8", "FP16", "skipped", "SRAM KiB"]


def chips_table(chips: Sequence[Chip]) -> Table:
    """One line per chip: its rates, energies and what it skips."""
    table = plain_table("Chips", ["chip", "what it is", "skips FF", "EP", "WG"], RATES)
    for each in chips:
        energies, skip = EnergyTable.of(each), each.skip
        fp8, fp16 = each.macs_per_cycle.fp8, each.macs_per_cycle.fp16
        add_row(
            table,
            *(each.name, each.description),
            *(skip.forward.value, skip.grad_input.value, skip.grad_weight.value),
            *(f"{each.operating_point.voltage_v.value:g}", f"{each.clock_hz / 1e6:.4g}"),
            *(f"{fp8.value}" if fp8 else "-", f"{fp16.value}" if fp16 else "-"),
            *(f"{pj(energies.fp8_mac):.4g}" if fp8 else "-", f"{pj(energies.fp16_mac):.4g}" if fp16 else "-"),
            *(f"{pj(energies.skipped_mac):.4g}", f"{each.sram_bytes.value / 1024:.4g}"),
        )
    return table


def chip_table(chip: Chip) -> Table:
    """Every value of one chip, with its tag and source, and the file that it is from if that is not the chip's own."""
    heads = ["key", "value", "tag", *(["from"] if chip.inherited else []), "source"]
    table = plain_table(f"{chip.name}: {chip.description}", heads, [])
    for key, entry in chip.values().items():
        origin = [chip.inherited.get(key, "")] if chip.inherited else []
        add_row(table, key, value_text(entry), entry.tag, *origin, entry.source)
    return table


def value_text(entry: SourcedValue[Any]) -> str:
    """A value as it is shown, with its range if it has one."""
    if isinstance(entry, SourcedRange) and entry.range:
        return f"{entry.value:.10g} ({entry.range[0]:g} ... {entry.range[1]:g})"
    if isinstance(entry.value, tuple):
        return "\n".join(map(str, entry.value))
    return f"{entry.value:.10g}" if isinstance(entry.value, float) else f"{entry.value}"
