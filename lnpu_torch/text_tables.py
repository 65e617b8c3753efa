"""How tables and numbers look as text: units, columns, plain ASCII."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.box import Box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

RULED = Box("    \n    \n -- \n    \n -- \n -- \n    \n    \n", ascii=True)
"""A rule below the head and between sections, nothing else."""

PREFIXES = {-15: "f", -12: "p", -9: "n", -6: "u", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}


def si(value: float | None, unit: str = "") -> str:
    """Four digits with an SI prefix, "1.234 mJ" for 1.234e9 "pJ"; "-" for None."""
    if value is None:
        return "-"
    start = -12 if unit == "pJ" else 0
    unit = unit.removeprefix("p") if unit == "pJ" else unit
    if not value:
        return f"0 {unit}".rstrip()
    digits, _, exponent = f"{value:.3e}".partition("e")
    power = min(max((int(exponent) + start) // 3 * 3, -15), 18)
    number = float(f"{digits}e{int(exponent) + start - power}")
    return f"{number:.4g} {PREFIXES[power]}{unit}".rstrip()


def plain_table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    """An empty table with these columns: text to the left, then numbers to the right."""
    table = Table(title=Text(title), title_justify="left", box=RULED)
    for name in left:
        table.add_column(Text(name), overflow="fold")
    for name in right:
        table.add_column(Text(name), justify="right", overflow="fold")
    return table


def add_row(table: Table, *cells: str) -> None:
    """Add a row of literal text; a layer's name may hold what rich would take for markup."""
    table.add_row(*map(Text, cells))


def plain(*blocks: RenderableType, width: int = 110) -> str:
    """The blocks as text without colour, the same wherever it is printed: tables whole, all else folded at `width`."""
    text = io.StringIO()
    console = Console(file=text, width=10_000, color_system=None, force_terminal=False, force_jupyter=False)
    for block in blocks:
        console.print(block, width=console.measure(block).maximum if isinstance(block, Table) else width)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())
