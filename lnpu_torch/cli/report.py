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
from lnpu_torch.reporting.run_comparison import Questions, RunComparison, counted, read_runs
from lnpu_torch.reporting.run_report import RunReport

Folders = Annotated[
    list[Path], typer.Argument(metavar="RUN", parser=user_path, help="A run's folder, or a file of counts.")
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
Out = Annotated[
    Path | None, _path(help="Where to write the page; else report.html in the run's folder, or beside the file.")
]
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

    Of several runs, each gets its own page, with the others beside it. One in float32 stands beside them only. Of a
    run with more than 24 MB of counts, some epochs stand for the others, and the page says so.
    """
    files = {"--out": out, "--plots": plots, "--json": json, "--csv": csv}
    given = [name for name, each in files.items() if each]
    if len(run) > 1 and given:
        raise ConfigError(f"{', '.join(given)}: of one run, not of {len(run)}")
    with _no_collections():
        found = read_runs(run, not all_epochs)
        alone = len(run) == 1
        runs = zip(run, found, strict=True)
        own = {path: each for path, each in runs if (alone or path.is_dir()) and counted(each)}
        if alone and not own:
            raise ConfigError(f"{run[0]}: nothing was counted; name another run, and this one stands beside it")
        if not own:
            raise ConfigError("nothing was counted in any of these runs; `lnpu compare` sets them side by side")
        for path, each in own.items():
            chips = [read_chip(name, voltage) for name in chip or each.chips]
            others = [other for other in found if other is not each]
            beside = RunComparison.of([each, *others], chips, Questions()) if others else None
            written = _write(path, RunReport.of(each, chips), beside, files)
            print("saved: " + ", ".join(map(str, written)))
            if each.left_out:
                print(f"{each.left_out}; --all-epochs reads all")


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
    from lnpu_torch.reporting import figure_style, html_page  # here: --help needs neither
    from lnpu_torch.reporting.figures import figures

    out, plots, json, csv = files.values()
    written = list[Path]()
    if plots:
        with figure_style.look():
            written += figure_style.save(figures(priced), plots)
    written.append(out or (run / "report.html" if run.is_dir() else run.with_suffix(".report.html")))
    write_text(written[-1], html_page.page(priced, beside), own=out is None)
    if json:
        written.append(json)
        write_text(json, priced.json_text())
    if csv:
        written.append(csv)
        write_text(csv, csv_text([each.report for each in priced.chips]))
    return written
