"""Accuracy and energy of the recipes in every precision, over seeds: makes the runs that are missing, then the tables.

python benchmarks/accuracy.py RUNS data.kind=npz data.path=cifar.npz threads=1     # narrow networks, few steps: a CPU
python benchmarks/accuracy.py RUNS --full data.download=true                       # the recipes as they are: a GPU

Each run is a folder RUNS/NETWORK-PRECISION-SEED; what follows is `lnpu train`'s `key=value`, for all of them. A folder
whose metrics reach the last epoch is not made again.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from lnpu_torch.text_tables import si

NETWORKS = {
    "resnet18": ("ResNet-18", "resnet18_cifar10", ()),
    "vgg16": ("VGG16", "vgg16_cifar10", ()),
    "vgg16plain": ("VGG16 without batch norm", "vgg16_cifar10", ("model.batch_norm=false", "lr=0.02")),
    "alexnet": ("AlexNet", "alexnet_cifar10", ()),
}
SMALL = {
    "resnet18": ("model.width=8", "batch_size=64", "limit=120", "epochs=2", "lr=0.1"),
    "vgg16": ("model.width=8", "batch_size=64", "limit=120", "epochs=2", "lr=0.05"),
    "vgg16plain": ("model.width=16", "batch_size=64", "limit=120", "epochs=2", "lr=0.03"),
    "alexnet": ("model.width=16", "batch_size=32", "limit=240", "epochs=4", "lr=0.02"),
}
"""A minute or two a run on one core; the rate rises and falls once (one-cycle)."""
EMULATED = ("fgmp", "fp8", "fp16")
CHIPS = ("lnpu", "lnpu-fp16", "sparse-inference", "dense-fp16")
EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("settings", nargs="*", help="key=value, for every run")
    parser.add_argument("--full", action="store_true", help="the recipes' own widths and epochs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=tuple(NETWORKS))
    parser.add_argument("--precisions", nargs="+", choices=EMULATED, default=EMULATED, help="beside float32")
    options = parser.parse_intermixed_args()
    for seed in range(options.seeds):
        for network in options.networks:
            for precision in ("float32", *options.precisions):
                _make(options, network, precision, seed)
    asked = (options.precisions, options.seeds)
    lines = [line for network in options.networks for line in table(options.runs, network, *asked)]
    print("\n".join(lines + together(options.runs, options.networks, *asked)))


def folder_of(runs: Path, network: str, precision: str, seed: int) -> Path:
    return runs / f"{network}-{precision}-{seed}"


def _make(options: argparse.Namespace, network: str, precision: str, seed: int) -> None:
    folder = folder_of(options.runs, network, precision, seed)
    if (folder / "metrics.csv").exists() and _finished(folder):
        return
    _, recipe, own = NETWORKS[network]
    own = own if options.full else (*own, *SMALL[network], "schedule=onecycle")
    fixed = (f"precision={precision}", f"seed={seed}", f"count.every={EVERY}", f"chip=[{','.join(CHIPS)}]")
    command = [
        sys.executable,
        "-c",
        "import sys; from lnpu_torch.cli import app; sys.exit(app.main())",
        "train",
        recipe,
    ]
    subprocess.run([*command, *own, *fixed, *options.settings, "--resume", str(folder)], check=True, stdout=sys.stderr)


def _finished(folder: Path) -> bool:
    epochs: int = yaml.safe_load((folder / "config.yaml").read_text())["epochs"]
    return len(rows(folder)) == epochs


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def last_epochs(runs: Path, network: str, precision: str, seeds: int) -> list[dict[str, str]]:
    """The metrics of each seed's last epoch."""
    return [rows(folder_of(runs, network, precision, seed))[-1] for seed in range(seeds)]


def tested(each: Sequence[dict[str, str]]) -> list[float]:
    """Test accuracies in percent."""
    return [100 * float(row["test_accuracy"]) for row in each]


def over(each: Sequence[dict[str, str]], exact: Sequence[dict[str, str]]) -> list[float]:
    """By how many points each tested better than its twin in float32."""
    return [a - b for a, b in zip(tested(each), tested(exact), strict=True)]


def table(runs: Path, network: str, precisions: Sequence[str], seeds: int) -> list[str]:
    """A network's two tables in Markdown: what it learned, and what the last epoch would cost."""
    last = {precision: last_epochs(runs, network, precision, seeds) for precision in ("float32", *precisions)}
    lines = [f"## {NETWORKS[network][0]}", ""]
    lines += ["| | test accuracy, % | over float32, points | loss | FP8 share | zeros |", "| --- " * 6 + "|"]
    for precision, each in last.items():
        points = "-" if precision == "float32" else _spread(over(each, last["float32"]), of_mean=True)
        loss = _spread([float(row["loss"]) for row in each], digits=3)
        shares = [_share(each, f"lnpu_{name}_share") for name in ("fp8", "zero")]
        lines.append(f"| {precision} | {_spread(tested(each))} | {points} | {loss} | {' | '.join(shares)} |")
    lines += ["", f"| energy of the last epoch | {' | '.join(CHIPS)} |", "| --- " * (len(CHIPS) + 1) + "|"]
    for precision in precisions:
        costs = [statistics.mean(float(row[f"{chip}_energy_pj"]) for row in last[precision]) for chip in CHIPS]
        lines.append(f"| {precision} | {' | '.join(si(cost, 'pJ') for cost in costs)} |")
    return [*lines, ""]


def together(runs: Path, networks: Sequence[str], precisions: Sequence[str], seeds: int) -> list[str]:
    """Every run beside the one in float32 of its network and seed."""
    lines = ["## All of them", "", "| | over float32, points | runs |", "| --- | --- | --- |"]
    for precision in precisions:
        points = [
            point
            for network in networks
            for point in over(*(last_epochs(runs, network, name, seeds) for name in (precision, "float32")))
        ]
        lines.append(f"| {precision} | {_spread(points, of_mean=True)} | {len(points)} |")
    return lines


def _spread(values: Sequence[float], digits: int = 2, of_mean: bool = False) -> str:
    """Mean +- standard deviation, or +- that of the mean."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    deviation /= len(values) ** 0.5 if of_mean else 1
    sign = "+" if of_mean else ""
    return f"{statistics.mean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"


def _share(each: Sequence[dict[str, str]], name: str) -> str:
    found = [float(row[name]) for row in each if row.get(name)]
    return f"{statistics.mean(found):.1%}" if found else "-"


if __name__ == "__main__":
    main()
