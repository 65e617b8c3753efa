"""Draws a sweep: energy against time, and the chips that no other beats. It needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lnpu_torch.cost.sweep import Point, Sweep, value_text
from lnpu_torch.files import ConfigError, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which people who do not see all colours can tell apart; they repeat after the last."""

LABELLED = 8
"""A front of more points than these is drawn without labels."""


def require_matplotlib() -> None:
    """Raises ConfigError, which names the extra to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("a plot needs matplotlib: pip install 'lnpu-torch[plot]', or leave it out") from None


def save_plot(swept: Sweep, path: str | Path) -> None:
    """Draw a sweep into a file, PNG, PDF or SVG by its name.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):  # a chip may be called $x$
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        _draw_points(axes, swept)
        _draw_front(axes, swept)
        _style(axes, swept)
        write(path, lambda file: figure.savefig(file, dpi=200, format=Path(path).suffix[1:] or "png"))


def _draw_points(axes: Axes, swept: Sweep) -> None:
    """Every point, coloured by the chip it started from; those on the front are filled."""
    for index, chip in enumerate(dict.fromkeys(point.chip for point in swept.points)):
        colour = COLOURS[index % len(COLOURS)]
        for pareto in (False, True):
            points = [point for point in swept.points if point.chip == chip and point.pareto == pareto]
            fill = {"facecolors": colour} if pareto else {"facecolors": "none", "alpha": 0.5}
            axes.scatter(*_places(points), s=26, edgecolors=colour, linewidths=1, zorder=3, **fill)
        axes.scatter([], [], s=26, color=colour, label=chip)


def _draw_front(axes: Axes, swept: Sweep) -> None:
    """The front, as the steps below which no chip lies, and what was set where there is room for it."""
    front = swept.front
    axes.plot(*_places(front), drawstyle="steps-post", color="0.35", linewidth=1, zorder=2, label="no other is better")
    if swept.keys and len(front) <= LABELLED:
        for point in front:
            text = ", ".join(map(value_text, point.values.values()))
            place = (point.time_s, point.energy_pj * 1e-12)
            axes.annotate(text, place, xytext=(5, 5), textcoords="offset points", fontsize=7)


def _style(axes: Axes, swept: Sweep) -> None:
    from matplotlib.ticker import EngFormatter, NullFormatter

    axes.set_xlabel("time")
    axes.set_ylabel(f"energy ({swept.energy})")
    for axis, unit in ((axes.xaxis, "s"), (axes.yaxis, "J")):
        axis.set_major_formatter(EngFormatter(unit))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", zorder=0)
    axes.legend(frameon=False, fontsize=8, title=", ".join(swept.keys), title_fontsize=8, alignment="left")


def _places(points: tuple[Point, ...] | list[Point]) -> tuple[list[float], list[float]]:
    return [point.time_s for point in points], [point.energy_pj * 1e-12 for point in points]
