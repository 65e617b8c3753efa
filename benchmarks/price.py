"""How long it takes to price a ResNet-18's counts on one chip, and to sweep a thousand chips.

python benchmarks/price.py --json                          # counts of one small training step: as large as an epoch's
python benchmarks/price.py --counts runs/.../epoch1.json   # any saved counts
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import add_options, cpu_name, origin, write

import lnpu_torch as lnpu
from lnpu_torch.recipes.models import ModelConfig, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, help="a counts file, in place of a step of ResNet-18")
    add_options(parser)
    options = parser.parse_args()
    counts = lnpu.Counts.load(options.counts) if options.counts else step_of_resnet18()
    write({"name": "price", "device": cpu_name(), **measure(counts), **origin()}, options)


def step_of_resnet18() -> lnpu.Counts:
    """Counts of one training step; an epoch's have larger numbers in the same places."""
    torch.manual_seed(0)
    model = lnpu.convert(build(ModelConfig(name="resnet18_cifar"), 10, (3, 32, 32)), "fgmp")
    with lnpu.CostCounter(model) as cost:
        model(torch.randn(4, 3, 32, 32)).logsumexp(1).mean().backward()
    return cost.counts


def measure(counts: lnpu.Counts) -> dict[str, Any]:
    chip = lnpu.chip("lnpu")
    settings = {
        "macs_per_cycle.fp16": range(384, 1024, 64),
        "sram_bytes": [2**power for power in range(14, 24)],
        "operating_point.voltage_v": [0.78 + 0.032 * i for i in range(10)],
    }
    start = time.perf_counter()
    points = len(lnpu.sweep(counts, [chip], settings).points)
    sweep_s = time.perf_counter() - start
    return {
        "entries": len(counts.steps),
        "price_ms": round(1e3 * median(lambda: lnpu.price(counts, chip).total), 2),
        "read_chip_ms": round(1e3 * median(lambda: lnpu.chip("dense-fp16")), 2),
        "print_ms": round(1e3 * median(lambda: str(lnpu.price(counts, chip).by("layer"))), 1),
        "sweep_points": points,
        "sweep_s": round(sweep_s, 2),
    }


def median(run: Callable[[], object], repeats: int = 15) -> float:
    """Seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
