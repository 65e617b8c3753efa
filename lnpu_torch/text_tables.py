"""How tables and numbers look: units, columns, plain ASCII, HTML for notebooks."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from html import escape

from rich.box import Box
from rich.console import Console, Group, RenderableType
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


def si_over(value: float | None, unit: str, first: float | None) -> str:
    """As `si`, with how many times the first one's it is, "1.234 mJ (1.31x)", unless it is that one's."""
    ratio = f" ({value / first:.2f}x)" if value and first and value != first else ""
    return f"{si(value, unit)}{ratio}"


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


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown. Cells may have Markdown in them, but for what would end a cell."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = ([" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


class Tables(ABC):
    """What is shown as tables and lines of text: by `str()`, on a rich console, and in a notebook."""

    @abstractmethod
    def _blocks(self) -> Sequence[RenderableType]:
        """The tables and lines, in order."""

    def __str__(self) -> str:
        return plain(*self._blocks())

    def __rich__(self) -> RenderableType:
        return Group(*self._blocks())

    def _repr_html_(self) -> str:
        return html(*self._blocks())


BAR = "linear-gradient(90deg, rgba(77, 127, 209, 0.3) {0:.1f}%, transparent {0:.1f}%)"
"""Behind a number: how large it is beside the largest of its column, on light and on dark pages."""


def html(*blocks: RenderableType) -> str:
    """The blocks as a piece of HTML; energies, times and shares have bars."""
    return "".join(
        _html_table(block) if isinstance(block, Table) else f"<p>{escape(str(block)).replace(chr(10), '<br>')}</p>"
        for block in blocks
    )


def _html_table(table: Table) -> str:
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    sides = ["right" if column.justify == "right" else "left" for column in table.columns]
    ends = next((i + 1 for i, row in enumerate(table.rows) if row.end_section), len(table.rows))  # a total follows
    bars = [_shares(cells[:ends]) if side == "right" else {} for cells, side in zip(columns, sides, strict=True)]
    lines = [
        "<table>",
        f"<caption style='text-align: left'>{escape(str(table.title))}</caption>",
        "<tr>" + "".join(_cell("th", str(each.header), side) for each, side in zip(table.columns, sides, strict=True)),
    ]
    for i, row in enumerate(zip(*columns, strict=True)):
        shares = [bar.get(i) for bar in bars]
        lines.append("<tr>" + "".join(map(_cell, ["td"] * len(row), row, sides, shares)))
    return "\n".join([*lines, "</table>"])


def _cell(tag: str, text: str, side: str, share: float | None = None) -> str:
    bar = f"; background: {BAR.format(100 * share)}" if share else ""
    return f"<{tag} style='text-align: {side}{bar}'>{escape(text).replace(chr(10), '<br>')}</{tag}>"


def _shares(cells: Sequence[str]) -> dict[int, float]:
    """By row: a number over the largest, where they are energies, times or shares, and there are several."""
    powers = {prefix: power for power, prefix in PREFIXES.items()}
    found = {i: re.fullmatch(r"([\d.]+) ?(?:([a-zA-Z]?)([Js])|%)", cell) for i, cell in enumerate(cells)}
    values = {i: float(each[1]) * 10 ** powers[each[2] or ""] for i, each in found.items() if each}
    most = max(values.values(), default=0)
    return {i: value / most for i, value in values.items()} if most and len(values) > 1 else {}
