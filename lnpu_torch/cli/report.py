"""The command that shows a run: lnpu report. It reads arguments and writes files."""

from __future__ import annotations

from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Annotated

import typer

from lnpu_torch.cost.report import csv_text
from lnpu_torch.files import user_path, write_text
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.reporting import figure_style
from lnpu_torch.reporting.figures import figures
from lnpu_torch.reporting.html_page import page
from lnpu_torch.reporting.run_reader import read_run
from lnpu_torch.reporting.run_report import RunReport

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
    priced, written = RunReport.of(found, chips), list[Path]()
    with figure_style.look():
        drawn = figures(priced)
        if plots:
            written += figure_style.save(drawn, plots)
        elements = {
            name: figure_style.inline_svg(figure, name, name.replace("_", " ")) for name, figure in drawn.items()
        }
    written.append(out or run / "report.html")
    write_text(written[-1], page(priced, elements), own=out is None)
    if json:
        written.append(json)
        write_text(json, priced.json_text())
    if csv:
        written.append(csv)
        write_text(csv, csv_text([each.report for each in priced.chips]))
    print("saved: " + ", ".join(map(str, written)))
