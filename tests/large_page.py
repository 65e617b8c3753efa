"""Time and memory that the page of a large run takes: `python tests/large_page.py 200 300` (layers, epochs).

The run is made up: every step has lane profiles and calls of two sizes, as real ones have. Four epochs differ.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from helpers.handmade import counts, lanes, step, with_lanes
from helpers.run_by_hand import RELU, SGD
from lnpu_torch.counts.schema import STEPS, Counts
from lnpu_torch.counts.vector_ops import VectorOpCounts

DIFFERENT = 4
TIMES = 10**6
"""Multiplications and elements of the made-up steps are so many times those on paper."""


def large_counts(layers: int, zeros: int) -> Counts:
    """One epoch; layers differ in size and in zeros."""
    entries = []
    for number in range(layers):
        first, second = (zeros + number % 7, 3 + number % 5, 2), (1, 6, 2)
        for name in STEPS:
            pairs = tuple(
                tuple(TIMES * (1 + number % 9) * each for each in row) for row in ((1, 2, 3), (4, 5, 6), (7, 8, 9))
            )
            made = step(name, layer=f"block{number // 4}.conv{number % 4}", pairs=pairs, first=first, second=second)
            profiles = {
                which: lanes(64, sum(part[1:]), lambda config, part=part: 40 * config.lanes + sum(part))
                for which, part in (("first", first), ("second", second))
            }
            entries.append(with_lanes(made, **profiles))
    return counts(*entries).model_copy(update={"vector_ops": VectorOpCounts(entries=(RELU, SGD))})


def write_large_run(folder: Path, layers: int, epochs: int) -> Path:
    """A run's folder; of its files of counts all but a few are links to others."""
    (folder / "counts").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {name: large}\nprecision: fgmp\nchip: [lnpu, dense-fp16]\n")
    rows = [f"{number},{1 / number},{1 - 0.9 / number}" for number in range(1, epochs + 1)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,loss,test_accuracy", *rows, ""]))
    for number in range(1, epochs + 1):
        file = folder / "counts" / f"epoch{number}.json"
        if number <= DIFFERENT:
            large_counts(layers, number).save(file)
        else:
            os.link(folder / "counts" / f"epoch{1 + number % DIFFERENT}.json", file)
    return folder


def measured(folder: Path) -> tuple[float, float, float]:
    """Seconds, those of them on a CPU, and peak memory in GB, of `lnpu report` as a command of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "lnpu_torch", "report", str(folder)]
    _, status, used = os.wait4(os.posix_spawn(sys.executable, command, os.environ), 0)  # of this child, and no other
    assert status == 0
    taken, on_cpu = time.perf_counter() - start, used.ru_utime + used.ru_stime
    return taken, on_cpu, used.ru_maxrss * 1024 / 1e9


def main(layers: int, epochs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = write_large_run(Path(folder) / "large", layers, epochs)
        taken, on_cpu, memory = measured(run)
        size = (run / "report.html").stat().st_size / 1e6
        words = f"{taken:.1f} s ({on_cpu:.1f} s on a CPU), at most {memory:.2f} GB, a page of {size:.2f} MB"
        print(f"{layers} layers, {epochs} epochs: {words}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
