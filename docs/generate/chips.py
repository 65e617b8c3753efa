"""The table and the picture of docs/chips.md, from the chips' files: published figures beside ours.

`python docs/generate/chips.py` (make drawings) writes docs/chips.md and docs/images/chips.svg. Needs the extra `plot`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lnpu_torch.cost.chip_checks import figure, run_checks
from lnpu_torch.cost.normalization import normalized
from lnpu_torch.hardware.checks import Format
from lnpu_torch.hardware.chip import Chip, chips
from lnpu_torch.reporting import figure_style
from lnpu_torch.reporting.chip_tables import condition, figures
from lnpu_torch.text_tables import markdown_table

DOCS = Path(__file__).parent.parent
INK, RULE = "#22272E", "#E4E7EB"
KINDS = {"both": "#D55E00", "one": "#0072B2", "none": "#6B7480"}
"""Whether zeros of both operands are skipped, of one, or none: Okabe and Ito's colours, and grey."""

SHARES = [share / 100 for share in range(0, 91, 5)]


def published() -> list[Chip]:
    """The chips that have published figures, by year and name."""
    return sorted((each for each in chips() if each.checks), key=lambda each: (each.year.value, each.name))


def table() -> str:
    """A row for each published figure of each chip."""
    heads = ["chip", "figure", "at", "published", "ours", "difference", "basis", "source", "why ours differs"]
    lines = []
    for chip in published():
        node = f"{chip.node_nm.value:g} nm, {chip.year.value}" if chip.node_nm and chip.year else ""
        for found in run_checks(chip):
            kind, _, fitted = found.basis.partition(": ")
            told = f"*{kind}*" + (f": {', '.join(f'`{key}`' for key in fitted.split(', '))}" if fitted else "")
            tag = "" if found.check.tag == "published" else f" (*{found.check.tag}*)"
            cells = [f"{chip.name} ({node})", found.name, condition(chip, found), *figures(found), told]
            lines.append([*cells, found.check.source + tag, found.check.why])
    return markdown_table(heads, lines)


def in_one_process(nm: float = 65) -> str:
    """Published efficiencies brought to one process."""
    heads, lines = ["chip", "figure", "process", "V", "TFLOPS/W", f"at {nm:g} nm", "assumed"], []
    for row in normalized(published(), nm):
        result = "outside the table" if row.result is None else f"{row.result:.3g}"
        numbers = [f"{row.nm:g} nm", f"{row.voltage_v:g}", f"{row.check.value:.4g}", result]
        lines.append([row.chip.name, row.name, *numbers, ", ".join(row.assumed)])
    return markdown_table(heads, lines)


def filled(page: str) -> str:
    """The page with what is made for it between its marks."""
    for name, made in (("checks", table()), ("in one process", in_one_process())):
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, rest = page.split(start)
        page = before + start + made + end + rest.split(end)[1]
    return page


def cheapest(chip: Chip) -> Format:
    return "fp8" if chip.macs_per_cycle.fp8 else "fp16"


def kind(chip: Chip) -> str:
    skip = chip.skip.forward.value
    return skip if skip in ("both", "none") else "one"


def efficiency_by_zeros() -> Any:
    """TFLOPS/W of MACs against zeros in both operands, in each chip's narrower format, with the published figures."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    drawn = Figure(figsize=(8.4, 6.2), layout="constrained")
    axes = drawn.subplots()
    ends: dict[str, float] = {}
    shown = {chip.name: chip for chip in published()}
    for chip in shown.values():
        values = [figure(chip, "efficiency", cheapest(chip), (share, share)) for share in SHARES]
        wide = 2.4 if chip.name == "lnpu" else 1.1
        axes.plot(SHARES, values, color=KINDS[kind(chip)], linewidth=wide, zorder=2)
        ends[chip.name] = values[-1]
        for found in run_checks(chip):
            check = found.check
            if check.unit == "TFLOPS/W" and check.zeros is not None:
                face = "white" if check.fitted else KINDS[kind(chip)]
                look = {"facecolors": face, "edgecolors": KINDS[kind(chip)], "s": 22, "zorder": 3, "clip_on": False}
                axes.scatter([max(check.zeros)], [check.value], **look)
                line = values[-1] if max(check.zeros) else values[0]
                if abs(check.value / line - 1) > 0.05:
                    place, side = ((-5, 0), "right") if max(check.zeros) else ((6, 0), "left")
                    text = f"{chip.name} {found.name}"
                    words = {"fontsize": 6.5, "color": KINDS[kind(chip)], "va": "center", "ha": side}
                    words["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                    axes.annotate(text, (max(check.zeros), check.value), place, textcoords="offset points", **words)
    axes.set(yscale="log", xlim=(0, 0.9), xlabel="zeros among the elements of both operands", ylabel="TFLOPS/W of MACs")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color=RULE)
    axes.spines[["top", "right"]].set_visible(False)
    for name, value, place in spread(ends):
        colour = KINDS[kind(shown[name])]
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5}
        axes.annotate(
            name, (0.9, value), (0.935, place), color=colour, va="center", arrowprops=arrow, annotation_clip=False
        )
    for name, label in (("both", "zeros of both operands skipped"), ("one", "of one"), ("none", "nothing skipped")):
        axes.plot([], [], color=KINDS[name], label=label)
    axes.scatter([], [], facecolors="white", edgecolors=INK, s=22, label="published, a constant fitted to it")
    axes.scatter([], [], facecolors=INK, edgecolors=INK, s=22, label="published, held out")
    axes.legend(frameon=False, loc="upper left")
    return drawn


def spread(ends: dict[str, float], apart: float = 1.16) -> list[tuple[str, float, float]]:
    """Names with their values and places at least a factor apart, in the order of the values."""
    placed: list[tuple[str, float, float]] = []
    for name, value in sorted(ends.items(), key=lambda each: each[1]):
        place = max(value, placed[-1][2] * apart) if placed else value
        placed.append((name, value, place))
    return placed


def main(docs: Path = DOCS) -> None:
    page = docs / "chips.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    with figure_style.look():
        drawn = figure_style.svg(efficiency_by_zeros(), "chips", "path")
    (docs / "images" / "chips.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
