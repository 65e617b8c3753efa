"""The command that shows a run: lnpu report. It reads arguments and writes files."""

from __future__ import annotations

import json
import math
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Annotated

import typer

from lnpu_torch.cost.pricing import price
from lnpu_torch.cost.report import csv_text
from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import user_path, write_text
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.reporting import figure_style as drawing
from lnpu_torch.reporting.figures import figures
from lnpu_torch.reporting.html_page import page
from lnpu_torch.reporting.run_reader import read_run
from lnpu_torch.reporting.run_report import study

Folder = Annotated[
    Path, typer.Argument(metavar="RUN", parser=user_path, help="A run's folder, as `lnpu train` makes it.")
]
Chips = Annotated[
    list[str] | None,
    typer.Option(
        "--chip",
        parser=expanduser,
        metavar="NAME",
        help="A chip or a YAML file, the main one first; else the run's own chips.",
    ),
]
Voltage = Annotated[float | None, typer.Option(help="Run the chips at this voltage, such as 0.9, not at their own.")]
_path = partial(typer.Option, parser=user_path, metavar="PATH")
Out = Annotated[Path | None, _path(help="Where to write the page; else report.html in the run's folder.")]
Plots = Annotated[Path | None, _path(help="Write each plot into this folder too, as PNG and SVG.")]
Json = Annotated[Path | None, _path("--json", help="Write all numbers of the page as JSON too.")]
Csv = Annotated[Path | None, _path("--csv", help="Write the whole run's layers and steps as CSV too.")]


def report(
    run: Folder,
    chip: Chips = None,
    voltage: Voltage = None,
    out: Out = None,
    plots: Plots = None,
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Write the page of a run: energy, zeros, FP8, chips side by side, layers; one HTML file that opens offline."""
    found = read_run(run)
    chips = [read_chip(name, voltage) for name in chip or found.chips]
    data, written = study(found, chips), list[Path]()
    with drawing.look():
        drawn = figures(data)
        if plots:
            written += drawing.save(drawn, plots)
        elements = {name: drawing.inline_svg(figure, name, name.replace("_", " ")) for name, figure in drawn.items()}
    written.append(out or run / "report.html")
    write_text(written[-1], page(data, elements), own=out is None)
    if json:
        written.append(json)
        write_text(json, _json(data))
    if csv:
        written.append(csv)
        whole = Counts.merge(epoch.counts for epoch in found.epochs)
        write_text(csv, csv_text([price(whole, each) for each in chips]))
    print("saved: " + ", ".join(map(str, written)))


def _json(data: object) -> str:
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(data: object) -> object:
    """Plain data in which null stands for what is not finite, which JSON has no number for; settings may hold it."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
