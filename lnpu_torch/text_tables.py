"""How tables and numbers look: units, columns, plain ASCII, HTML for notebooks."""

from __future__ import annotations

import io
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rich.box import Box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lnpu_torch.files import ConfigError

if TYPE_CHECKING:
    from pandas import DataFrame

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


def shortened(name: str) -> str:
    """A name without its middle, if it is too long for a figure: what tells names apart is at both ends."""
    return name if len(name) <= 30 else f"{name[:11]}...{name[-16:]}"


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


QUANTITY = re.compile(r"(\d[\d.]*) ?([fpnumkMGTPE]?)(J|bit|s|Hz)( \(.*\))?")
"""What `si` and `si_over` write: digits, prefix, unit, and a ratio. Counts have no unit: those of a row add up."""


def in_one_unit(cells: Sequence[str]) -> list[str]:
    """A column's cells with the prefix and the last digit of its largest number; as they are, if they mix units."""
    found = {i: match for i, cell in enumerate(cells) if (match := QUANTITY.fullmatch(cell))}
    powers = {prefix: power for power, prefix in PREFIXES.items()}
    values = {i: float(match[1]) * 10.0 ** powers[match[2]] for i, match in found.items()}
    others = {cell for i, cell in enumerate(cells) if i not in found}
    largest = max(values, key=lambda i: values[i], default=0)
    written = {(match[2], match[3]) for i, match in found.items() if values[i]}
    if len(written) < 2 or len({unit for _, unit in written}) > 1 or not others <= {"", "-"}:
        return list(cells)
    prefix, unit = found[largest][2], found[largest][3]
    digits = 3 - math.floor(math.log10(float(found[largest][1])))
    one = list(cells)
    for i, match in found.items():
        if values[i]:
            number = f"{values[i] / 10.0 ** powers[prefix]:.{digits}f}"
            shown = number if float(number) else f"<{10.0**-digits:.{digits}f}"
            one[i] = f"{shown} {prefix}{unit}{match[4] or ''}"
    return one


def _like(table: Table, title: str | None, columns: Mapping[int, Sequence[str]]) -> Table:
    """A table of some of another's columns, by their places, with these cells."""
    made = Table(title=title and Text(title), title_justify="left", box=RULED)
    for place in columns:
        column = table.columns[place]
        made.add_column(Text(str(column.header)), justify=column.justify, overflow="fold")
    for row, cells in zip(table.rows, zip(*columns.values(), strict=True), strict=True):
        made.add_row(*map(Text, cells), end_section=row.end_section)
    return made


def _cells(table: Table) -> dict[int, list[str]]:
    return {place: [str(cell) for cell in column.cells] for place, column in enumerate(table.columns)}


def _tidied(block: RenderableType) -> RenderableType:
    """A table with one unit in each of its columns, or its title if it has no rows; what is no table, as it is."""
    if not isinstance(block, Table):
        return block
    if not block.rows:
        return Text(str(block.title))
    columns = {place: in_one_unit(cells) for place, cells in _cells(block).items()}
    return _like(block, str(block.title), columns)


FEW = 3
"""So many rows stand as columns, where a table is too wide."""

TEXT = 30
"""Columns of text that are wider than this are folded, where a table is too wide."""


def fitted(table: Table, width: int) -> list[Table]:
    """A table within a width: as it is, turned if it has few rows, or in parts that begin with what names its rows.

    Of parts, columns that say the same in every row go into the title. Only text is folded, never a number.
    """
    columns, title = _cells(table), str(table.title)
    widths = {place: _width(table, place, cells) for place, cells in columns.items()}
    if _whole(widths.values()) <= width or not table.rows:
        return [table]
    if len(table.rows) <= FEW:
        turned = _turned(table, columns)
        if _whole(_width(turned, place, cells) for place, cells in _cells(turned).items()) <= width:
            return [turned]
    for place in [place for place in columns if place and len(set(columns[place])) == 1 < len(table.rows)]:
        (same,) = set(columns.pop(place))
        title += f"; {table.columns[place].header}: {same}" * (same not in ("", "-", "all"))
    widths = {place: min(each, TEXT) if _is_text(table, place) else each for place, each in widths.items()}
    key = _names_rows(table, columns)
    key = key if _whole(widths[place] for place in key) <= 0.75 * width else key[:1]
    parts = [list(key)]
    for place in (place for place in columns if place not in key):
        if len(parts[-1]) > len(key) and _whole(widths[each] for each in [*parts[-1], place]) > width:
            parts.append(list(key))
        parts[-1].append(place)
    shown = [{place: columns[place] for place in part} for part in parts]
    return [_like(table, None if i else title, part) for i, part in enumerate(shown)]


def _width(table: Table, place: int, cells: Sequence[str]) -> int:
    lines = "\n".join([str(table.columns[place].header), *cells]).splitlines()
    return max(map(cell_len, lines), default=0)


def _whole(widths: Iterable[int]) -> int:
    """The width of a table whose columns have these."""
    each = list(widths)
    return sum(each) + 3 * len(each) + 1


def _is_text(table: Table, place: int) -> bool:
    return table.columns[place].justify != "right"


def _names_rows(table: Table, columns: Mapping[int, Sequence[str]]) -> tuple[int, ...]:
    """The columns that tell rows apart: the first, with another one of text if that will do, or with those after it."""
    places = tuple(columns)
    pairs = [(places[0], other) for other in places[1:] if _is_text(table, other)]
    several = [places[:count] for count in range(2, len(places))]
    for key in [places[:1], *pairs, *several]:
        if len(set(zip(*(columns[place] for place in key), strict=True))) == len(table.rows):
            return key
    return places[:1]


def _turned(table: Table, columns: Mapping[int, Sequence[str]]) -> Table:
    """A table whose columns are another's rows."""
    heads, *rows = [[str(table.columns[place].header), *cells] for place, cells in columns.items()]
    made = plain_table(str(table.title), heads[:1], heads[1:])
    for row in rows:
        add_row(made, *row)
    return made


def plain(*blocks: RenderableType, width: int = 110) -> str:
    """The blocks as text without colour, the same wherever it is printed: tables whole, all else folded at `width`."""
    text = io.StringIO()
    console = Console(file=text, width=10_000, color_system=None, force_terminal=False, force_jupyter=False)
    for block in map(_tidied, blocks):
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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for block in map(_tidied, self._blocks()):
            yield from fitted(block, options.max_width) if isinstance(block, Table) else [block]

    def _repr_html_(self) -> str:
        return html(*self._blocks())


class Rows(Tables):
    """Tables of which the exact values can be had, too: as plain rows, and as a DataFrame of pandas."""

    @abstractmethod
    def to_rows(self) -> list[dict[str, Any]]:
        """A flat mapping of plain, exact values for each row."""

    def to_pandas(self) -> DataFrame:
        """`to_rows()` as a DataFrame.

        Raises:
            ConfigError: pandas is missing; it names the extra to install.
        """
        try:
            from pandas import DataFrame
        except ModuleNotFoundError:
            raise ConfigError("to_pandas() needs pandas: pip install 'lnpu-torch[pandas]'") from None
        return DataFrame(self.to_rows())


BAR = "linear-gradient(90deg, rgba(77, 127, 209, 0.3) {0:.1f}%, transparent {0:.1f}%)"
"""Behind a number: how large it is beside the largest of its column, on light and on dark pages."""


class Blocks(Tables):
    """Tables and lines of text that belong together."""

    def __init__(self, *blocks: RenderableType) -> None:
        self.blocks = blocks

    def _blocks(self) -> Sequence[RenderableType]:
        return self.blocks


def html(*blocks: RenderableType) -> str:
    """The blocks as a piece of HTML; energies, times and shares have bars."""
    return "".join(
        _html_table(block) if isinstance(block, Table) else f"<p>{escape(str(block)).replace(chr(10), '<br>')}</p>"
        for block in map(_tidied, blocks)
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
