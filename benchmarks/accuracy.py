"""Accuracy and energy of the recipes in every precision, over seeds: makes the runs that are missing, then the tables.

python benchmarks/accuracy.py RUNS data.kind=npz data.path=cifar.npz threads=1     # narrow networks, few epochs: a CPU
python benchmarks/accuracy.py RUNS --full data.download=true                       # the recipes as they are: a GPU
python benchmarks/accuracy.py docs/results --tables --plots docs/images

Each run is a folder RUNS/NETWORK-PRECISION-SEED; what follows is `lnpu train`'s `key=value`, for all of them. A run
that was interrupted goes on; one that has reached its last epoch is not made again, and leaves a table of its epochs,
RUNS/NETWORK-PRECISION-SEED.csv: accuracy, shares, energies. What is printed is made of these files alone.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import lnpu_torch as lnpu
from lnpu_torch.reporting import figure_style
from lnpu_torch.text_tables import si

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETWORKS = {
    "resnet18": ("ResNet-18", "resnet18_cifar10", ()),
    "vgg16": ("VGG16", "vgg16_cifar10", ()),
    "vgg16plain": ("VGG16 without batch norm", "vgg16_cifar10", ("model.batch_norm=false", "lr=0.02")),
    "alexnet": ("AlexNet", "alexnet_cifar10", ()),
}
SMALL = ("batch_size=64", "schedule=onecycle", "channels_last=true")
SMALLER = {
    "resnet18": ("model.width=16", "epochs=10", "lr=0.1"),
    "vgg16": ("model.width=16", "epochs=10", "lr=0.05"),
    "vgg16plain": ("model.width=16", "epochs=25", "lr=0.03"),
    "alexnet": ("model.width=24", "epochs=25", "lr=0.03"),
}
"""Without --full: 3 to 12 minutes a run on one core with AVX-512. The rate rises and falls once. Networks without batch
norm learn slowly at first, and take more epochs."""
EMULATED = ("fgmp", "fp8", "fp16")
CHIPS = ("lnpu", "lnpu-fp16", "sparse-inference", "dense-fp16")
EVERY = 10
GOALS = (0.7, 0.75, 0.8)
"""Test accuracies up to which energy is added up."""

Rows = list[dict[str, float]]
"""A run's epochs."""
Found = dict[str, dict[str, dict[int, Rows]]]
"""Runs by network, precision and seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("settings", nargs="*", help="key=value, for every run")
    parser.add_argument("--full", action="store_true", help="the recipes' own widths and epochs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=tuple(NETWORKS))
    parser.add_argument("--precisions", nargs="+", choices=EMULATED, default=EMULATED, help="beside float32")
    parser.add_argument("--tables", action="store_true", help="of the runs that are there; none is made")
    parser.add_argument("--plots", type=Path, help="a folder for pictures: accuracy over epochs, and over energy")
    options = parser.parse_intermixed_args()
    precisions = ("float32", *options.precisions)
    if not options.tables:
        for seed in range(options.seeds):
            for network in options.networks:
                for precision in precisions:
                    _make(options, network, precision, seed)
    found = {network: _found(options.runs, network, precisions) for network in options.networks}
    found = {network: each for network, each in found.items() if each}
    print("\n".join([*learned(found), "", *together(found)]))
    for network, runs in found.items():
        print("\n".join(["", *energies(NETWORKS[network][0], runs)]))
    if options.plots:
        plot(found, options.plots)


def _make(options: argparse.Namespace, network: str, precision: str, seed: int) -> None:
    folder = options.runs / f"{network}-{precision}-{seed}"
    table = folder.with_suffix(".csv")
    if table.exists():
        return
    _, recipe, own = NETWORKS[network]
    own = own if options.full else (*own, *SMALL, *SMALLER[network])
    fixed = (f"precision={precision}", f"seed={seed}", f"count.every={EVERY}", f"chip=[{','.join(CHIPS)}]")
    settings = [*own, *fixed, *options.settings]
    if not _finished(folder):
        command = [sys.executable, "-m", "lnpu_torch", "train", recipe, *settings, "--resume", str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    rows = epochs_of(folder)
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)


def _finished(folder: Path) -> bool:
    if not (folder / "metrics.csv").exists():
        return False
    epochs: int = yaml.safe_load((folder / "config.yaml").read_text())["epochs"]
    return len((folder / "metrics.csv").read_text().splitlines()) == 1 + epochs


def epochs_of(folder: Path) -> Rows:
    """Of each epoch of a run: loss, accuracies; zeros and FP8; energy on each chip, and with DRAM, in J."""
    rows = []
    with open(folder / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    for each in metrics:
        row = {name: float(each[name]) for name in ("epoch", "loss", "train_accuracy", "test_accuracy")}
        counts = folder / "counts" / f"epoch{each['epoch']}.json"
        if counts.exists():
            counted = lnpu.Counts.load(counts)
            totals = {chip: lnpu.price(counted, chip).total for chip in CHIPS}
            row |= {"zero_share": totals["lnpu"].zero_share or 0, "fp8_share": totals["lnpu"].fp8_share or 0}
            for chip, total in totals.items():
                row |= {f"{chip}_j": 1e-12 * (total.energy_pj or 0)}
                row |= {f"{chip}_dram_j": 1e-12 * (total.all_energy_pj or 0)}
        rows.append(row)
    return rows


def _found(runs: Path, network: str, precisions: Sequence[str]) -> dict[str, dict[int, Rows]]:
    """The runs of a network by precision and seed."""
    found: dict[str, dict[int, Rows]] = {}
    for precision in precisions:
        for path in sorted(runs.glob(f"{network}-{precision}-*.csv")):
            with open(path, newline="") as file:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            found.setdefault(precision, {})[int(path.stem.rpartition("-")[2])] = rows
    return found


def over_float32(runs: dict[str, dict[int, Rows]], precision: str) -> list[float]:
    """By how many points each run tested better than that of the same seed in float32."""
    exact = runs.get("float32", {})
    return [
        100 * (rows[-1]["test_accuracy"] - exact[seed][-1]["test_accuracy"])
        for seed, rows in runs.get(precision, {}).items()
        if seed in exact
    ]


def scatter(found: Found) -> float:
    """Standard deviation of a pair's difference around the mean of its network and precision, of all pairs together.

    Three pairs alone tell little of it.
    """
    groups = [over_float32(runs, precision) for runs in found.values() for precision in runs if precision != "float32"]
    squares = sum(statistics.pvariance(points) * len(points) for points in groups if points)
    freedom = sum(len(points) - 1 for points in groups if points)
    return math.sqrt(squares / freedom) if freedom else math.nan


def learned(found: Found) -> list[str]:
    """What each network learned, in Markdown: accuracies are of the last epoch."""
    deviation = scatter(found)
    lines = ["| | | seeds | test accuracy, % | over float32, points | loss | FP8 share | zeros |", "| --- " * 8 + "|"]
    for network, runs in found.items():
        for precision, seeds in runs.items():
            last = [rows[-1] for rows in seeds.values()]
            points = "-" if precision == "float32" else _mean(over_float32(runs, precision), deviation)
            shares = [
                f"{statistics.mean(row[name] for row in last):.1%}" if name in last[0] else "-"
                for name in ("fp8_share", "zero_share")
            ]
            accuracy, loss = (
                _spread([scale * row[name] for row in last]) for scale, name in ((100, "test_accuracy"), (1, "loss"))
            )
            cells = [NETWORKS[network][0], precision, str(len(last)), accuracy, points, loss, *shares]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def energies(network: str, runs: dict[str, dict[int, Rows]]) -> list[str]:
    """What training would cost on a chip, alone and with DRAM: all epochs, and those until an accuracy is reached.

    Of each precision on the first chip, of the first one on each. Means of the seeds; "-" where one does not reach it.
    """
    lines = [f"| {network}: energy on the chip; with DRAM | all epochs | {' | '.join(f'to {g:.0%}' for g in GOALS)} |"]
    lines.append("| --- " * (2 + len(GOALS)) + "|")
    emulated = [precision for precision in EMULATED if precision in runs]
    priced = [(each, chip) for each in emulated[:1] for chip in CHIPS] + [(each, CHIPS[0]) for each in emulated[1:]]
    for precision, chip in priced:
        cells = [_energy(list(runs[precision].values()), goal, chip) for goal in (None, *GOALS)]
        lines.append(f"| {precision} on {chip} | {' | '.join(cells)} |")
    return lines if priced else []


def _energy(runs: Sequence[Rows], goal: float | None, chip: str) -> str:
    ends = [len(rows) if goal is None else _reached(rows, goal) for rows in runs]
    if not all(ends):
        return "-"
    means = (
        statistics.mean(_spent(rows, f"{chip}{of}_j")[end - 1] for rows, end in zip(runs, ends, strict=True))
        for of in ("", "_dram")
    )
    return "; ".join(si(mean, "J") for mean in means)


def _reached(rows: Rows, goal: float) -> int:
    """The first epoch that tests so well, counted from 1; 0 if none does."""
    return next((i for i, row in enumerate(rows, start=1) if row["test_accuracy"] >= goal), 0)


def _spent(rows: Rows, name: str) -> list[float]:
    """Energy by the end of each epoch, in J."""
    return list(accumulate(row[name] for row in rows))


def together(found: Found) -> list[str]:
    """Every run beside the one in float32 of its network and seed."""
    lines = ["## All of them", "", "| | over float32, points | runs |", "| --- | --- | --- |"]
    deviation = scatter(found)
    for precision in EMULATED:
        points = [point for runs in found.values() for point in over_float32(runs, precision)]
        if points:
            lines.append(f"| {precision} | {_mean(points, deviation)} | {len(points)} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    """Mean +- standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _mean(points: Sequence[float], deviation: float) -> str:
    """Mean of some pairs' differences +- its standard error, by the standard deviation of one if that is known."""
    if not points:
        return "-"
    error = "" if math.isnan(deviation) else f" ± {deviation / math.sqrt(len(points)):.2f}"
    return f"{statistics.mean(points):+.2f}{error}"


def plot(found: Found, folder: Path) -> None:
    """accuracy.svg: test accuracy over epochs; energy_to_accuracy.svg: over the energy of FGMP's runs on each chip."""
    with figure_style.look():
        for name, draw in (("accuracy", _over_epochs), ("energy_to_accuracy", _over_energy)):
            (folder / f"{name}.svg").write_text(figure_style.svg(draw(found), name, "path"))


def _over_epochs(found: Found) -> Figure:
    """A panel for each network, of float32 and one precision: means, and bands from the least to the best seed."""
    figure, grid = _panels(found, 1)
    for axes, (network, runs) in zip(grid[0], found.items(), strict=True):
        for precision, seeds in [*runs.items()][:2]:
            curves = [[100 * row["test_accuracy"] for row in rows] for rows in seeds.values()]
            epochs = range(1, min(map(len, curves)) + 1)
            at = list(zip(*curves, strict=False))
            (line,) = axes.plot(epochs, _means(curves), label=precision)
            axes.fill_between(epochs, [*map(min, at)], [*map(max, at)], color=line.get_color(), alpha=0.2)
        axes.set(title=NETWORKS[network][0], xlabel="epoch", ylabel="test accuracy, %")
        axes.legend(frameon=False)
    return figure


def _over_energy(found: Found) -> Figure:
    """Columns for networks, rows without and with DRAM; means of the seeds."""
    found = {network: runs for network, runs in found.items() if "fgmp" in runs}
    figure, grid = _panels(found, 2)
    for row, of, words in zip(grid, ("", "_dram"), ("on the chip", "with DRAM"), strict=True):
        for axes, (network, runs) in zip(row, found.items(), strict=True):
            seeds = runs["fgmp"].values()
            accuracy = _means([100 * each["test_accuracy"] for each in rows] for rows in seeds)
            for chip in CHIPS:
                axes.plot(_means(_spent(rows, f"{chip}{of}_j") for rows in seeds), accuracy, label=chip)
            for goal in GOALS:
                axes.axhline(100 * goal, color="0.85", linewidth=0.8, zorder=0)
            axes.set(title=NETWORKS[network][0], xlabel=f"energy {words}, J", ylabel="test accuracy, %", xlim=(0, None))
            axes.legend(frameon=False)
    return figure


def _panels(found: Found, rows: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    columns = max(len(found), 1)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _means(curves: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.mean(each) for each in zip(*curves, strict=False)]


if __name__ == "__main__":
    main()
