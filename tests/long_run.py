"""Memory over a long run: training steps of a small converted model, each counted, with a report now and then.

python tests/long_run.py 10000
"""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

import lnpu_torch as lnpu


def resident_mib() -> float:
    """Memory of this process that is in RAM, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def on_device_mib() -> float:
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def train(steps: int, points: int = 10) -> list[tuple[float, float]]:
    """Train so many steps; RSS and device memory in MiB at so many points of the run, evenly spread."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)]
    model = lnpu.convert(nn.Sequential(*layers).to(device), "fgmp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    with lnpu.CostCounter(model) as whole:
        for number in range(1, steps + 1):
            batch = torch.randn(1 + number % 11, 3, 8, 8, device=device)  # more sizes than are counted apart
            with lnpu.CostCounter(model) as cost:
                model(batch).logsumexp(1).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if number % 100 == 0:
                cost.report(chip="lnpu")
            if number % (steps // points) == 0:
                found.append((resident_mib(), on_device_mib()))
    assert next(iter(whole.counts.steps)).calls == steps
    return found


def main(steps: int) -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = train(steps)
    seconds = time.perf_counter() - began
    print(", ".join(f"{name} {version}" for name, version in lnpu.versions().items()))
    shown = ", ".join(f"{resident:.1f}" for resident, _ in found)
    print(f"{datetime.now(UTC).date()}: RSS in MiB after each tenth of {steps} steps: {shown}; {seconds:.0f} s")
    print(f"allocated on the device, in MiB: {', '.join(f'{device:.1f}' for _, device in found)}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
