"""What all benchmarks share: operations timed in turn, ratios and their spread, rows that say where they are from."""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Operation = Callable[[], object]
REPEATS = 9
"""Alternations on a GPU; of a CPU, where others work too, it takes more."""
COLUMNS = ("name", "device", "versions", "commit", "date", "figures")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to a table, too")


def write(row: Row, options: argparse.Namespace) -> None:
    """Print a row, and append it to the table that was asked for."""
    line = json.dumps(row) if options.json else "  ".join(f"{key} {value}" for key, value in row.items())
    print(line, flush=True)
    if options.csv:
        new = not options.csv.exists()
        figures = {key: value for key, value in row.items() if key not in COLUMNS}
        with options.csv.open("a", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            if new:
                table.writerow(COLUMNS)
            table.writerow([*(row.get(key, "") for key in COLUMNS[:-1]), json.dumps(figures)])


@cache
def origin() -> Row:
    """Versions, commit and date of what is measured."""
    names = ("torch", "numba", "triton")
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    versions = [f"Python {platform.python_version()}", *(f"{name} {found[name]}" for name in names if name in found)]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = ""
    with suppress(OSError):  # where there is no git
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {"versions": ", ".join(versions), "commit": commit, "date": f"{datetime.now(UTC):%Y-%m-%d}"}


def cpu_name() -> str:
    return f"cpu, {torch.get_num_threads()} threads"


def wall_seconds(operation: Operation) -> float:
    """Seconds that an operation takes; what it returns is let go after the clock was read."""
    started = time.perf_counter()
    result = operation()
    elapsed = time.perf_counter() - started
    del result
    return elapsed


def alternate(
    operations: dict[str, Operation],
    repeats: int,
    *,
    unmeasured: int = 3,
    seconds: Callable[[Operation], float] = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds of each operation, in turn, after some rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in operations}
    for round_ in range(-unmeasured, repeats):
        for name, operation in operations.items():
            elapsed = seconds(operation)
            if round_ >= 0:
                times[name].append(elapsed)
    return times


def ratio(times: dict[str, list[float]], mine: str, base: str) -> tuple[float, list[float]]:
    """The ratio of two medians, and the quartiles of the ratios of neighbours."""
    pairs = [ours / theirs for ours, theirs in zip(times[mine], times[base], strict=True)]
    quartiles = statistics.quantiles(pairs, n=4)
    medians = [statistics.median(times[name]) for name in (mine, base)]
    return round(medians[0] / medians[1], 3), [round(quartiles[0], 3), round(quartiles[2], 3)]
