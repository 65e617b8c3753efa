"""The plot of a report: what each layer's energy is spent on. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lnpu_torch.cost.cost_row import CostRow
from lnpu_torch.files import ConfigError
from lnpu_torch.text_tables import shortened, si
from lnpu_torch.units import Component

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Part(NamedTuple):
    """What energy is spent on: its name, and its colour on white and on dark ground."""

    label: str
    colour: str
    on_dark: str


PARTS: dict[Component, Part] = {
    "mac": Part("MAC", "#332288", "#A49AF2"),
    "sram": Part("SRAM", "#4A86C5", "#6FB1EA"),
    "simd": Part("SIMD core", "#A86F00", "#E3B341"),
    "idle": Part("idle", "#AA4466", "#E889A6"),
    "dram": Part("DRAM", "#7C8592", "#8E98A6"),
}
"""Every colour is at least 3:1 against its ground."""

MOST_BARS = 30
"""More rows than these are not drawn one by one."""


def most_energy(rows: Sequence[CostRow], count: int) -> tuple[list[CostRow], CostRow | None]:
    """The rows that take most energy of chip and DRAM, most first; and all others as one row, if there are any."""
    ordered = sorted(rows, key=lambda row: -(row.all_energy_pj or 0.0))
    if len(ordered) <= count:
        return ordered, None
    rest = ordered[count:]
    return ordered[:count], CostRow.sum(rest, f"the other {len(rest):,} of {len(rows):,}", "all", "all")


def energy_plot(rows: Sequence[CostRow], title: str, axes: Axes | None = None) -> Axes:
    """A bar for each row, sorted, in the colours of what its energy is spent on; DRAM's last.

    Args:
        axes: where to draw; a new figure of matplotlib's pyplot if there is none.

    Raises:
        ConfigError: matplotlib is missing; it names the extra to install.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.ticker import EngFormatter
    except ModuleNotFoundError:
        raise ConfigError("a plot needs matplotlib: pip install 'lnpu-torch[plot]'") from None
    shown, rest = most_energy(rows, MOST_BARS)
    if axes is None:
        _, axes = pyplot.subplots(figsize=(8, plot_height(rows)), layout="constrained")
    places, ends = range(len(shown)), [0.0] * len(shown)
    for component, part in PARTS.items():
        values = [(getattr(row, f"{component}_energy_pj") or 0.0) * 1e-12 for row in shown]
        if any(values):
            axes.barh(places, values, left=ends, height=0.7, color=part.colour, label=part.label)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
    axes.set_yticks(places, [shortened(row.layer) or "(model)" for row in shown], fontsize=8, parse_math=False)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(EngFormatter("J"))
    axes.spines[["top", "right"]].set_visible(False)
    if rest:
        title += f"; {rest.layer} take {si(rest.all_energy_pj, 'pJ')}"
    axes.set_title(title, loc="left", parse_math=False)
    axes.legend(frameon=False, loc="lower right")
    return axes


def plot_height(rows: Sequence[CostRow]) -> float:
    """Inches that the plot of so many rows takes."""
    return 1.2 + 0.22 * min(len(rows), MOST_BARS)
