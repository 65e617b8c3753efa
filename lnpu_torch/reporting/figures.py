"""Draws a run: one figure for each question that a reader has. It needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lnpu_torch.cost.cost_row import CostRow
from lnpu_torch.cost.energy_plot import MOST_BARS, PARTS, energy_plot, most_energy, plot_height
from lnpu_torch.reporting.run_report import OPERANDS, RunReport, lacking
from lnpu_torch.text_tables import shortened, si
from lnpu_torch.units import ON_CHIP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = {
    "forward": ("forward (FF)", "#0072B2"),
    "grad_input": ("grad_input (EP)", "#D55E00"),
    "grad_weight": ("grad_weight (WG)", "#009E73"),
    "backward": ("backward, SIMD core", "#B87A00"),
    "update": ("update, SIMD core", "#B8588C"),
}
"""Steps, how they are called, and their colours: Okabe and Ito's, the last two darker, to stand out on white."""

TIMES = {"time of the run": "time_cycles", "of the multipliers alone": "cycles"}
CHIPS = ("#882255", "#44AA99", "#999933", "#AA4499", "#88CCEE", "#117733")
"""Colours of chips, none of them a step's or a part's."""

ON, OFF, INK, PALE = "#117733", "#999933", "#22272E", "#E4E7EB"
WIDTH = 11.6
"""Width of a figure in inches."""


def figures(report: RunReport) -> dict[str, Figure]:
    """The figures of a run, by name; one that would show nothing is left out."""
    drawn = {name: draw(report) for name, draw in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def energy_by_epoch(report: RunReport) -> Figure:
    """Energy of each epoch on the first chip: by step, by what it is spent on; and DRAM's, which is apart, by step."""
    epochs = report.chips[0].epochs
    numbers = [epoch.epoch for epoch in epochs]
    figure, panels = _panels(1, 3, height=3.3)
    panels[1].sharey(panels[0])
    by_step, by_part, in_dram = (
        {step: [_spent(epoch.steps.get(step), ON_CHIP) for epoch in epochs] for step in STEPS},
        {str(part): [_spent(epoch.total, [part]) for epoch in epochs] for part in ON_CHIP},
        {step: [_spent(epoch.steps.get(step), ["dram"]) for epoch in epochs] for step in STEPS},
    )
    _stack(panels[0], numbers, by_step, STEPS)
    _stack(panels[1], numbers, by_part, {part: (look.label, look.colour) for part, look in PARTS.items()})
    _stack(panels[2], numbers, in_dram, STEPS)
    for axes, title in zip(panels, ("on the chip, by step", "on the chip, by part", "DRAM, by step"), strict=True):
        axes.set_title(title, loc="left")
        _epochs(axes, numbers)
        _engineering(axes.yaxis, "J")
    panels[0].set_ylabel("energy per epoch")
    _legend_below(figure, [panels[0], panels[1]])
    return figure


def shares_by_layer(report: RunReport) -> Figure:
    """Zeros, and FP8 among the non-zeros, of each layer's activations and errors over the epochs."""
    from matplotlib.ticker import PercentFormatter

    shares = report.shares
    kept = {row.layer for row in most_energy(report.chips[0].layers, MOST_BARS)[0]}
    rows = [place for place, layer in enumerate(shares.layers) if layer in kept]
    layers = [shares.layers[place] for place in rows]
    figure, panels = _panels(1, 4, height=1.5 + 0.155 * len(layers), sharey=True)
    places = [(share, operand) for share in ("zero", "fp8") for operand in OPERANDS]
    for axes, (share, operand) in zip(panels, places, strict=True):
        values = [
            [float("nan") if value is None else value for value in getattr(shares.operands[operand], share)[place]]
            for place in rows
        ]
        image = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap={"zero": "Blues", "fp8": "Oranges"}[share])
        axes.set_title({"zero": "zeros in ", "fp8": "FP8 in "}[share] + OPERANDS[operand], loc="left")
        _epochs(axes, shares.epochs, start=0)
        axes.tick_params(length=0)
        if operand == "grad_output":
            pair = list(panels[places.index((share, "input")) : places.index((share, "grad_output")) + 1])
            bar = figure.colorbar(image, ax=pair, location="bottom", aspect=50, shrink=0.93, format=PercentFormatter(1))
            bar.ax.spines["outline"].set_visible(False)
            bar.set_label({"zero": "share of all elements", "fp8": "share of the non-zeros"}[share])
    panels[0].set_yticks(range(len(layers)), [layer or "(model)" for layer in layers], fontsize=7)
    if len(layers) < len(shares.layers):
        figure.suptitle(f"the {len(layers)} of {len(shares.layers)} layers that take most energy", fontsize=8)
    return figure


def chips_side_by_side(report: RunReport) -> Figure:
    """Energy, time and DRAM traffic of the whole run on each chip."""
    from matplotlib.ticker import MaxNLocator

    chips, places = report.chips, list(range(len(report.chips)))
    lacks = lacking(chips)
    figure, (energy, time, dram) = _panels(1, 3, height=1.0 + 0.46 * len(chips), sharey=True)
    figure.set_layout_engine("constrained", wspace=0.09)  # room for the numbers at the ends of the axes
    ends = [0.0] * len(chips)
    for part in ON_CHIP:
        values = [_spent(chip.total, [part]) for chip in chips]
        if any(values):
            energy.barh(places, values, left=ends, color=PARTS[part].colour, label=PARTS[part].label, height=0.6)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
    _label_bars(energy, places, ends, "J", lacks)
    for (label, field), colour, shift in zip(
        TIMES.items(), ("#4B5563", PARTS["simd"].colour), (-0.17, 0.17), strict=True
    ):
        cycles = [getattr(chip.total, field) for chip in chips]
        times = [
            None if each is None else each / chip.report.clock_hz for each, chip in zip(cycles, chips, strict=True)
        ]
        _bars(time, [place + shift for place in places], times, "s", color=colour, label=label, height=0.27)
    traffic = [chip.total.dram_bits for chip in chips]
    _bars(dram, places, traffic, "bit", lacks, color=PARTS["dram"].colour, height=0.6)
    for axes, title, unit in ((energy, "energy on the chip", "J"), (time, "time", "s"), (dram, "DRAM traffic", "bit")):
        axes.set_title(title, loc="left")
        axes.set_xlim(0, 1.4 * axes.get_xlim()[1])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        _engineering(axes.xaxis, unit)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    energy.set_yticks(places, [chip.chip for chip in chips])
    energy.invert_yaxis()
    _legend_below(figure, [energy, time])
    return figure


def lanes_busy(report: RunReport) -> Figure | None:
    """The share of lanes that work, layer by layer on the first chip, with the load balancer and without."""
    from matplotlib.ticker import PercentFormatter

    every = [row for row in report.chips[0].layers if row.utilisation is not None]
    if not every:
        return None
    kept = {row.layer for row in most_energy(every, MOST_BARS)[0]}
    rows = [row for row in every if row.layer in kept]
    figure, (axes,) = _panels(1, 1, height=2.9)
    places = range(len(rows))
    on, off = ([getattr(row, name) for row in rows] for name in ("utilisation", "unbalanced_utilisation"))
    axes.vlines(places, off, on, color=PALE, linewidth=5, zorder=1)
    axes.scatter(places, on, color=ON, s=34, zorder=3, label="load balancer on")
    axes.scatter(places, off, facecolors="white", edgecolors=OFF, linewidths=1.6, s=34, zorder=2, label="off")
    axes.set_xticks(places, [shortened(row.layer) or "(model)" for row in rows], rotation=40, ha="right", fontsize=7)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("lanes busy")
    if len(rows) < len(every):
        axes.set_title(f"the {len(rows)} of {len(every)} layers that take most energy", loc="left")
    axes.grid(axis="y", color=PALE)
    _legend(axes)
    return figure


def accuracy_by_energy(report: RunReport) -> Figure | None:
    """Test accuracy after each epoch, against the energy that was spent by then on each chip."""
    from matplotlib.ticker import PercentFormatter

    accuracy = [row["test_accuracy"] for row in report.metrics if "test_accuracy" in row]
    if len(accuracy) < 2 or len(accuracy) < len(report.metrics):
        return None
    figure, (axes,) = _panels(1, 1, height=3.0)
    for chip, lacks, colour in zip(report.chips, lacking(report.chips), itertools.cycle(CHIPS), strict=False):
        spent, so_far = [], 0.0
        for epoch in chip.epochs:
            so_far += _spent(epoch.total, PARTS) * epoch.stands_for
            spent.append(so_far)
        axes.plot(spent, accuracy, marker="o", markersize=4, color=colour, label=chip.chip + lacks, linewidth=1.6)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("test accuracy")
    axes.set_xlabel("energy so far, chip and DRAM")
    axes.set_xlim(left=0)
    _engineering(axes.xaxis, "J")
    axes.grid(color=PALE)
    _legend(axes)
    return figure


def energy_by_layer(report: RunReport) -> Figure:
    """What each layer's energy is spent on, on the first chip; most first."""
    rows = report.chips[0].layers
    figure, (axes,) = _panels(1, 1, height=plot_height(rows))
    energy_plot(rows, f"energy by layer on chip {report.chips[0].chip}", axes)
    return figure


FIGURES: dict[str, Callable[[RunReport], Figure | None]] = {
    "energy_by_layer": energy_by_layer,
    "energy_by_epoch": energy_by_epoch,
    "shares_by_layer": shares_by_layer,
    "chips_side_by_side": chips_side_by_side,
    "lanes_busy": lanes_busy,
    "accuracy_by_energy": accuracy_by_energy,
}


def _panels(
    rows: int, columns: int, height: float, sharey: bool = False, ratios: Sequence[float] | None = None
) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False, width_ratios=ratios).ravel()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
    return figure, list(axes)


def _stack(axes: Axes, places: Sequence[int], series: dict[str, list[float]], look: dict[str, tuple[str, str]]) -> None:
    """Stacked bars; what is zero throughout has no place in the legend."""
    bottom = [0.0] * len(places)
    for name, values in series.items():
        if any(values):
            label, colour = look[name]
            axes.bar(
                places,
                values,
                bottom=bottom,
                color=colour,
                label=label,
                width=0.72 if len(places) < 50 else 1,
                linewidth=0,
            )
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.grid(axis="y", color=PALE)


def _epochs(axes: Axes, numbers: Sequence[int], start: int | None = None) -> None:
    """Ticks for at most about a dozen epochs; at their numbers, or at places from `start` on."""
    every = -(-len(numbers) // 12)
    places = range(start, start + len(numbers)) if start is not None else numbers
    axes.set_xticks(list(places)[::every], [str(number) for number in numbers][::every])
    axes.set_xlabel("epoch")


def _bars(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[float | None],
    unit: str,
    lacks: Sequence[str] | None = None,
    **look: Any,
) -> None:
    """Labelled bars; where nothing is known there is none, but words that say so, unless nothing is known of all."""
    if any(value is not None for value in values):
        axes.barh(places, [float(value or 0) for value in values], **look)
        _label_bars(axes, places, values, unit, lacks or [""] * len(values))


def _label_bars(
    axes: Axes, places: Sequence[float], values: Sequence[float | None], unit: str, lacks: Sequence[str]
) -> None:
    """Each bar's value, and how many times the first one's it is, or what it lacks, which makes it no ratio."""
    for place, value, lack in zip(places, values, lacks, strict=True):
        if value is None:
            text = "not modelled"
        else:
            ratio = f"{value / values[0]:.2f}x" if values[0] else "1.00x"
            text = si(value * 1e12, "pJ") if unit == "J" else si(value, unit)
            text += lack or (f" ({ratio})" if ratio != "1.00x" else "")
        there = (value or 0.0, place)
        axes.annotate(text, there, xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, handlelength=1, handleheight=1, columnspacing=1.2, loc="best", ncols=2)


def _legend_below(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for several panels, in a row below them."""
    found = [axes.get_legend_handles_labels() for axes in panels]
    handles = [handle for handles, _ in found for handle in handles]
    labels = [str(label) for _, labels in found for label in labels]
    figure.legend(handles, labels, loc="outside lower left", ncols=9, frameon=False, handlelength=1, handleheight=1)


def _engineering(axis: Any, unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(unit))


def _spent(row: CostRow | None, parts: Iterable[str]) -> float:
    """Energy of a row that is spent on these parts, in J; nothing, if there is no such row."""
    return sum(float(getattr(row, f"{part}_energy_pj") or 0.0) for part in parts) * 1e-12 if row else 0.0
