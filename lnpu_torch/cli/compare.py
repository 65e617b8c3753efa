"""The command that sets runs side by side: lnpu compare. It reads arguments, prints and writes files."""

from __future__ import annotations

from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Annotated

import typer

from lnpu_torch.cli.errors import show
from lnpu_torch.files import user_path, write_text
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.reporting.run_comparison import compare as compare_runs

_path = partial(typer.Option, parser=user_path, metavar="PATH")


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", parser=user_path, help="Folders of runs, or files of counts.")
    ],
    chip: Annotated[
        list[str],
        typer.Option(
            "--chip", parser=expanduser, metavar="NAME", help="A built-in chip or a YAML file; may be repeated."
        ),
    ] = ["lnpu"],  # noqa: B006 - typer reads it, and hands out copies
    voltage: Annotated[float | None, typer.Option(help="Run the chips at this voltage, not at their own.")] = None,
    accuracy: Annotated[float | None, typer.Option(help="Until a test accuracy of this share, such as 0.95.")] = None,
    images: Annotated[int | None, typer.Option(help="Images of an epoch, where a run does not say.")] = None,
    co2: Annotated[float | None, typer.Option(metavar="G", help="Grams of CO2 that a kWh stands for.")] = None,
    battery: Annotated[float | None, typer.Option(metavar="WH", help="A battery's capacity in Wh.")] = None,
    out: Annotated[Path | None, _path(help="Write it as a page, one HTML file.")] = None,
    csv: Annotated[Path | None, _path("--csv", help="Write it as CSV, in J and s.")] = None,
) -> None:
    """Compare runs on chips: energy with its range, and time, of an epoch, an image, the run, and to an accuracy."""
    chips = [read_chip(name, voltage) for name in chip]
    found = compare_runs(runs, chips, accuracy=accuracy, images=images, co2_g_per_kwh=co2, battery_wh=battery)
    show(found)
    written = []
    if out:
        from lnpu_torch.reporting.html_page import comparison_page

        write_text(out, comparison_page(found))
        written.append(out)
    if csv:
        found.to_csv(csv)
        written.append(csv)
    if written:
        print("saved: " + ", ".join(map(str, written)))
