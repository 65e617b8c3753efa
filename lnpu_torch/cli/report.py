"""The command that shows a run: lnpu report. It reads arguments and writes files."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Annotated

import typer

from lnpu_torch.cost.report import csv_text
from lnpu_torch.files import ConfigError, user_path, write_text
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.reporting import figure_style
from lnpu_torch.reporting.figures import figures
from lnpu_torch.reporting.html_page import page
from lnpu_torch.reporting.run_comparison import Questions, RunComparison, counted, read_runs
from lnpu_torch.reporting.run_reader import read_run
from lnpu_torch.reporting.run_report import RunReport

Folders = Annotated[
    list[Path], typer.Argument(metavar="RUN", parser=user_path, help="A run's folder, as `lnpu train` makes it.")
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
AllEpochs = Annotated[
    bool, typer.Option("--all-epochs", help="Read every epoch of a large run, however long it takes.")
]
Out = Annotated[Path | None, _path(help="Where to write the page; else report.html in the run's folder.")]
Plots = Annotated[Path | None, _path(help="Write each plot into this folder too, as PNG and SVG.")]
Json = Annotated[Path | None, _path("--json", help="Write all numbers of the page as JSON too.")]
Csv = Annotated[Path | None, _path("--csv", help="Write the whole run's layers and steps as CSV too.")]


def report(
    run: Folders,
    chip: Chips = None,
    voltage: Voltage = None,
    all_epochs: AllEpochs = False,
    out: Out = None,
    plots: Plots = None,
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Write the page of a run: energy, zeros, FP8, chips side by side, layers; one HTML file that opens offline.

    Of several runs, each gets its own page, with the others beside it. One in float32 stands beside them only.
    """
    files = {"--out": out, "--plots": plots, "--json": json, "--csv": csv}
    given = [name for name, each in files.items() if each]
    if len(run) > 1 and given:
        raise ConfigError(f"{', '.join(given)}: of one run, not of {len(run)}")
    with _no_collections():
        found = read_runs(run, not all_epochs) if len(run) > 1 else [read_run(run[0], soon=not all_epochs)]
        own = {folder: each for folder, each in zip(run, found, strict=True) if folder.is_dir() and counted(each)}
        if len(run) > 1 and not own:
            raise ConfigError("nothing was counted in any of these runs; `lnpu compare` sets them side by side")
        for folder, each in (own or {run[0]: found[0]}).items():
            chips = [read_chip(name, voltage) for name in chip or each.chips]
            others = [other for other in found if other is not each]
            beside = RunComparison.of([each, *others], chips, Questions()) if others else None
            written = _write(folder, RunReport.of(each, chips), beside, files)
            print("saved: " + ", ".join(map(str, written)))


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep Python from looking for garbage in what was read, all of which is needed: a third of the time otherwise."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _write(run: Path, priced: RunReport, beside: RunComparison | None, files: dict[str, Path | None]) -> list[Path]:
    """Write a run's page, and what else is asked for; returns what was written."""
    out, plots, json, csv = files.values()
    written = list[Path]()
    if plots:
        with figure_style.look():
            written += figure_style.save(figures(priced), plots)
    written.append(out or run / "report.html")
    write_text(written[-1], page(priced, beside), own=out is None)
    if json:
        written.append(json)
        write_text(json, priced.json_text())
    if csv:
        written.append(csv)
        write_text(csv, csv_text([each.report for each in priced.chips]))
    return written
