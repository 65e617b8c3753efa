"""The commands that price what was counted: price, sweep. They read arguments and print."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lnpu_torch.cli.errors import show
from lnpu_torch.cost.comparison import Comparison
from lnpu_torch.cost.pricing import price as price_on
from lnpu_torch.cost.report import Report, Summary, csv_text, json_text
from lnpu_torch.cost.sensitivity import sensitivity
from lnpu_torch.cost.sweep import Point, parse_setting
from lnpu_torch.cost.sweep import sweep as sweep_over
from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import ConfigError, builtin_names, user_path
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.reporting.sweep_plot import require_matplotlib, save_plot


def chip_names() -> list[str]:
    """What a shell completes a chip's name to."""
    return builtin_names("chips")


_COUNTS = typer.Argument(metavar="COUNTS", parser=user_path, help="A counts file, as in a run's folder counts/.")
File = Annotated[Path, _COUNTS]
Files = Annotated[list[Path], _COUNTS]
Chips = Annotated[
    list[str],
    typer.Option(
        "--chip",
        parser=expanduser,
        autocompletion=chip_names,
        metavar="NAME",
        help="A built-in chip or a YAML file; may be repeated.",
    ),
]
Voltage = Annotated[float | None, typer.Option(help="Run the chips at this voltage, such as 0.9, not at their own.")]
By = Annotated[Literal["layer", "step"] | None, typer.Option(help="Sum up by layer or by step.")]
Full = Annotated[bool, typer.Option("--full", help="Print every row and all notes, not the sums alone.")]
Format = Annotated[Literal["table", "json", "csv"], typer.Option(help="How to print it.")]
Json = Annotated[bool, typer.Option("--json", help="The same as --format json.")]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE,...", help="A key of a chip's file, and its values; may be repeated."),
]


def price(
    counts: Files,
    chip: Chips = ["lnpu"],  # noqa: B006 - typer reads it, and hands out copies
    voltage: Voltage = None,
    by: By = None,
    format: Format = "table",
    as_json: Json = False,
    full: Full = False,
    ranges: Annotated[
        bool, typer.Option("--ranges", help="Show what the range of each constant does, in place of layers.")
    ] = False,
) -> None:
    """Price what a run counted on one chip or several: its sums, or every layer (--full), or --by layer or step."""
    format = "json" if as_json else format
    if ranges and (by or full or format != "table"):
        raise ConfigError("--ranges prints a table of its own: without --by, --full and --format")
    if len(counts) > 1 and format != "table":
        raise ConfigError(f"--format {format}: of one file of counts, and these are {len(counts)}")
    chips = [read_chip(name, voltage) for name in chip]
    loaded = [load(path) for path in counts]  # all are looked at before the first is printed
    for i, (path, counted) in enumerate(zip(counts, loaded, strict=True)):
        if len(counts) > 1:
            print(f"\n{path}\n" if i else f"{path}\n")
        if ranges:
            show(sensitivity(counted, chips))
        else:
            print_reports([price_on(counted, each) for each in chips], by, format, full)


def sweep(
    counts: File,
    settings: Settings,
    chip: Chips = ["lnpu"],  # noqa: B006
    voltage: Voltage = None,
    out: Annotated[
        Path, typer.Option(parser=user_path, metavar="PATH", help="Where to write: this name with .csv, and with .png.")
    ] = Path("sweep"),
    dram: Annotated[bool, typer.Option(help="Compare by the energy of chip and DRAM, or by the chip's alone.")] = True,
    plot: Annotated[bool, typer.Option(help="Draw energy against time (needs matplotlib).")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print all points as JSON.")] = False,
) -> None:
    """Price what a run counted on every chip that the settings span; save a table, and a plot of energy and time.

    For instance: lnpu sweep COUNTS --set macs_per_cycle.fp16=384,768,1536 --set operating_point.voltage_v=0.78,0.9
    """
    axes = dict(parse_setting(text) for text in settings)
    if len(axes) < len(settings):
        raise ConfigError("--set: a key is given twice")
    if plot:
        require_matplotlib()
    swept = sweep_over(load(counts), [read_chip(name, voltage) for name in chip], axes, dram)
    if as_json:
        print(json.dumps([point_data(point) for point in swept.points], indent=1))
    else:
        show(swept)
    swept.to_csv(f"{out}.csv")
    if plot:
        save_plot(swept, f"{out}.png")
    print(f"saved: {out}.csv" + (f", {out}.png" if plot else ""), file=sys.stderr if as_json else sys.stdout)


def point_data(point: Point) -> dict[str, Any]:
    """A point of a sweep as plain data."""
    return {**{field.name: getattr(point, field.name) for field in fields(point)}, "total": point.total.to_dict()}


def load(path: Path) -> Counts:
    """The counts in a file. Raises ConfigError if it is none, or if nothing was counted in it."""
    if mistaken := _no_counts(path):
        raise ConfigError(f"{path}: {mistaken}")
    counted = Counts.load(path)
    if not counted.steps and not getattr(counted.vector_ops, "entries", ()):
        raise ConfigError(f"{path}: nothing was counted: no step of an emulated layer, no vector operation")
    return counted


def _no_counts(path: Path) -> str:
    """What a path is that was given in place of a file of counts, and what to write; nothing if it may be one."""
    if (path / "counts").is_dir():
        return f"a run's folder; name a file of its counts, such as {path / 'counts' / 'epoch1.json'}"
    if path.suffix in {".yaml", ".yml"} or (not path.exists() and str(path) in builtin_names("chips")):
        return f"no file of counts; a chip is named by --chip {path}"
    return ""


def print_reports(reports: list[Report], by: Literal["layer", "step"] | None, format: str, full: bool) -> None:
    """One report, or several side by side; as a table its sums alone, unless rows are asked for."""
    reports = [report.by(by) for report in reports] if by else reports
    if format == "table" and not (by or full):
        show(Summary(reports))
        print("--full: every layer, what the figures rest on, and all notes")
    elif format == "table":
        show(reports[0] if len(reports) == 1 else Comparison(reports))
    else:
        text = {"json": json_text, "csv": csv_text}[format]
        sys.stdout.write(text(reports[0] if len(reports) == 1 else reports))
