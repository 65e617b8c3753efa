"""Draws what `lnpu reproduce` ran: zeros by layer and step, efficiency against zeros. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lnpu_torch as lnpu
from lnpu_torch.recipes.claims import Claims
from lnpu_torch.recipes.measurements import STEPS, Evidence, layers, tflops_per_watt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Of Okabe and Ito's, which people who do not see all colours can tell apart."""

MARKS = ("o", "s", "^")


def figures(evidence: Evidence, claims: Claims) -> dict[str, Figure]:
    """Both plots by name; the published figures are marked in them."""
    return {"zeros": zeros(evidence, claims), "efficiency": efficiency(evidence, claims)}


def zeros(evidence: Evidence, claims: Claims) -> Figure:
    """Share of zeros by layer, axes for each network and a line for each step; the published range is shaded."""
    from matplotlib.figure import Figure

    count = len(evidence.probes)
    figure = Figure(figsize=(7.2, 2.4 * count), layout="constrained")
    grid = figure.subplots(count, squeeze=False)[:, 0]
    for axes, (name, probe) in zip(grid, evidence.probes.items(), strict=True):
        claim = claims.claims[f"zeros_{name}"]
        axes.axhspan(claim.low or 0.0, claim.high or 0.0, color="0.9", label=f"published, {claim.text}")
        _layers(axes, layers(probe.fgmp).rows)
        axes.set_title(name, loc="left")
    figure.axes[0].legend(frameon=False, ncols=4, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def _layers(axes: Axes, rows: Sequence[lnpu.CostRow]) -> None:
    names = list(dict.fromkeys(row.layer for row in rows))
    for (step, short), colour, mark in zip(STEPS.items(), COLOURS, MARKS, strict=False):
        mine = [row for row in rows if row.step == step and row.zero_share is not None]
        places = [names.index(row.layer) for row in mine]
        shares = [100 * (row.zero_share or 0.0) for row in mine]
        size = {"forward": 7, "grad_input": 4, "grad_weight": 3}[step]  # FF and WG stream the same; both are to be seen
        axes.plot(places, shares, mark, color=colour, markersize=size, linestyle="-", linewidth=0.8, label=short)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=6)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("zeros, %")
    axes.spines[["top", "right"]].set_visible(False)


def efficiency(evidence: Evidence, claims: Claims) -> Figure:
    """TFLOPS/W of MACs against zeros, a line for each chip; published points, and the networks' own training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour in zip(evidence.curves.items(), COLOURS, strict=False):
        style = ":" if "bottom-up" in name else "-"
        axes.plot(
            [100 * point.zeros for point in curve], [point.macs for point in curve], style, color=colour, label=name
        )
    _published(axes, evidence, claims)
    for (name, probe), mark in zip(evidence.probes.items(), MARKS, strict=False):
        place = 100 * (layers(probe.fgmp).total.zero_share or 0.0), tflops_per_watt(probe.fgmp)
        axes.plot(*place, mark, color="0.35", markersize=5, linestyle="none", label=f"training {name}")
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xlabel("zeros among the streamed elements, %")
    axes.set_ylabel("TFLOPS/W at 0.78 V")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", zorder=0)
    axes.legend(frameon=False, fontsize=7)
    return figure


def _published(axes: Axes, evidence: Evidence, claims: Claims) -> None:
    """The two efficiencies that the papers give, at the ends of the curve."""
    curve = evidence.curves["lnpu"]
    for key, point in (("dense_efficiency", curve[0]), ("peak_efficiency", curve[-1])):
        claim = claims.claims[key]
        place = 100 * point.zeros, claim.low or 0.0
        axes.plot(*place, "*", color="black", markersize=10, linestyle="none", zorder=4)
        words = {"published": "published", "derived": "derived", "assumed": "recalled"}[claim.tag]
        first = point is curve[0]
        offset, side = ((8, -12), "left") if first else ((-10, 2), "right")
        text = f"{claim.text}, {words}"
        axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=7, ha=side)
