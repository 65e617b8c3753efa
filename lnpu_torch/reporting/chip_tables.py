"""How chips are shown: one line each, or every value of one with its tag and source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lnpu_torch.cost.chip_checks import CheckResult, run_checks
from lnpu_torch.cost.energy_table import EnergyTable
from lnpu_torch.hardware.checks import Check, Over
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.chip import chip as read_chip
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


def checks_tables(chip: Chip) -> list[Table]:
    """Each published figure of a chip beside ours, at its condition; and where it is from, and why they differ."""
    results = run_checks(chip)
    if not results:
        return []
    numbers = plain_table(
        f"Published figures beside ours, {chip.name}", ["check", "condition"], ["published", "ours", "difference"]
    )
    numbers.add_column("basis", overflow="fold")
    sources = plain_table("Where they are from", ["check", "tag", "source", "why ours differs, or is our reading"], [])
    for found in results:
        add_row(numbers, found.name, condition(chip, found), *figures(found), found.basis)
        add_row(sources, found.name, found.check.tag, found.check.source, found.check.why)
    return [numbers, sources]


def figures(found: CheckResult) -> tuple[str, str, str]:
    """The published figure, ours and the deviation, as text."""
    unit, ours, deviation = found.check.unit, found.ours, found.deviation
    shown = f"{ours:.4g}{'' if unit == 'x' else ' '}{unit}" if ours is not None else "-"
    told = f"{found.check.value:.6g}{'' if unit == 'x' else ' '}{unit}"
    return told, shown, f"{100 * deviation:+.1f} %" if deviation is not None else "-"


def condition(chip: Chip, found: CheckResult) -> str:
    """The condition of a check in words: format, zeros of both operands, voltage and clock."""
    check = found.check
    at = chip if check.voltage_v is None else read_chip(chip, check.voltage_v)
    words = [check.of, _operands(chip, check)]
    if check.over:
        words.append(f"over {check.over.chip or chip.name}, {_operands(chip, check.over)}")
    return ", ".join([*words, f"{at.operating_point.voltage_v.value:g} V, {at.clock_hz / 1e6:.4g} MHz"])


def _operands(chip: Chip, of: Check | Over) -> str:
    own = getattr(chip.formats, of.format) if not (isinstance(of, Over) and of.chip) else None
    zeros = " x ".join(f"{100 * share:g} %" for share in of.zeros) if of.zeros else "not stated"
    return f"{own.value if own else of.format.upper()}, zeros {zeros}"


def value_text(entry: SourcedValue[Any]) -> str:
    """A value as it is shown, with its range if it has one."""
    if isinstance(entry, SourcedRange) and entry.range:
        return f"{entry.value:.10g} ({entry.range[0]:g} ... {entry.range[1]:g})"
    if isinstance(entry.value, tuple):
        return "\n".join(map(str, entry.value))
    return f"{entry.value:.10g}" if isinstance(entry.value, float) else f"{entry.value}"
