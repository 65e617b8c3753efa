"""How chips are shown: one line each, or every value of one with its tag and source."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lnpu_torch.cost.chip_checks import CheckResult, figure, run_checks
from lnpu_torch.cost.normalization import Normalized, between
from lnpu_torch.hardware.checks import Check, Format, Over, Quantity
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.text_tables import add_row, plain_table

NUMBERS = ["nm", "year", "V", "MHz", "TFLOPS FP8", "FP16", "TFLOPS/W FP8", "FP16", "published"]
"""Columns of the list of chips: peak and efficiency are those of products without zeros."""


def chips_table(chips: Sequence[Chip]) -> Table:
    """One line per chip: its formats, what it skips, its peaks, and how many of its constants are published."""
    table = plain_table("Chips", ["chip", "formats", "zeros skipped in FF, EP, WG"], NUMBERS)
    for each in chips:
        peaks = [_peak(each, of, name) for of in ("throughput", "efficiency") for name in FORMATS]
        tags = each.tags()
        add_row(
            table,
            *(each.name, "; ".join(formats(each)), skipped(each)),
            *("-" if entry is None else f"{entry.value:g}" for entry in (each.node_nm, each.year)),
            *(f"{each.operating_point.voltage_v.value:g}", f"{each.clock_hz / 1e6:.4g}", *peaks),
            f"{tags['published'] / sum(tags.values()):.0%}",
        )
    return table


CHIPS_NOTE = """\
FF, EP, WG: the steps forward, grad_input and grad_weight.
TFLOPS, TFLOPS/W: all multipliers busy, no zeros to skip, without DRAM.
published: the share of the values that a publication states.
lnpu chips NAME shows each value and its source."""
"""What the heads of `chips_table` mean."""


def skipped(chip: Chip) -> str:
    """Of which operand zeros are skipped in each of the three steps; one word if it is the same in all."""
    steps = [skip.value for skip in (chip.skip.forward, chip.skip.grad_input, chip.skip.grad_weight)]
    return steps[0] if len(set(steps)) == 1 else ", ".join(steps)


FORMATS: tuple[Format, ...] = ("fp8", "fp16")


def formats(chip: Chip) -> list[str]:
    """What the chip multiplies in, by its own names."""
    return [_format(chip, name) for name in FORMATS if getattr(chip.macs_per_cycle, name)]


def _format(chip: Chip, name: Format) -> str:
    own = getattr(chip.formats, name)
    return own.value if own else name.upper()


def _peak(chip: Chip, of: Quantity, name: Format) -> str:
    return f"{figure(chip, of, name, (0, 0)):.3g}" if getattr(chip.macs_per_cycle, name) else "-"


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
    return told, shown, f"{round(100 * deviation, 1) or 0.0:+.1f} %" if deviation is not None else "-"


def condition(chip: Chip, found: CheckResult) -> str:
    """The condition of a check in words: format, zeros of both operands, voltage and clock."""
    check = found.check
    at = chip if check.voltage_v is None else read_chip(chip, check.voltage_v)
    words = [check.of, _operands(chip, check)]
    if check.over:
        words.append(f"over {check.over.chip or chip.name}, {_operands(chip, check.over)}")
    return ", ".join([*words, f"{at.operating_point.voltage_v.value:g} V, {at.clock_hz / 1e6:.4g} MHz"])


def _operands(chip: Chip, of: Check | Over) -> str:
    own = read_chip(of.chip) if isinstance(of, Over) and of.chip else chip
    zeros = " x ".join(f"{100 * share:g} %" for share in of.zeros) if of.zeros else "not stated"
    return f"{_format(own, of.format)}, zeros {zeros}"


def normalized_blocks(
    rows: Sequence[Normalized], chips: Sequence[Chip], nm: float, voltage_v: float | None
) -> list[RenderableType]:
    """Published efficiencies in one process, and how that was done, as blocks to print."""
    at = f"{nm:g} nm, " + ("each at its own voltage" if voltage_v is None else f"{voltage_v:g} V")
    heads = ["nm", "V", "TFLOPS/W", f"at {nm:g} nm"]
    table = plain_table(f"Published efficiency, brought to {at}", ["chip", "check", "condition"], heads)
    table.add_column("assumed")
    for row in rows:
        node = "-" if row.nm is None else f"{row.nm:g}"
        result = "-" if row.result is None else f"{row.result:.4g}"
        numbers = (node, f"{row.voltage_v:g}", f"{row.check.value:.6g}", result)
        add_row(table, row.chip.name, row.name, _operands(row.chip, row.check), *numbers, ", ".join(row.assumed))
    none = [chip.name for chip in chips if chip.name not in {row.chip.name for row in rows}]
    notes = [
        "energy by Stillmaker & Baas (2017): fits to simulated gates, by process and voltage; wires, memories and what "
        "else is on a chip need not follow them, and voltages near a threshold are at the edge of the fits",
        *dict.fromkeys(f"{row.chip.name}: not brought there, {row.lacks}" for row in rows if row.lacks),
    ]
    if nodes := between(rows, nm):
        notes.append(f"between two of the table, as a power of nm: {', '.join(f'{each:g} nm' for each in nodes)}")
    if none:
        notes.append(f"without a published efficiency at a condition that is told: {', '.join(none)}")
    return [table, *map(Text, notes)]
