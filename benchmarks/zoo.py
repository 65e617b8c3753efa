"""What emulating a training step costs, on nine networks that nothing was tuned for.

python benchmarks/zoo.py [--json] [--only NAME] [--rounds N] [--channels-last]

A step is forward, cross-entropy, backward and SGD, on the CPU. It is timed in float32, converted, converted inside
`CostCounter`, and as "peer": one plain autograd function for convolutions and linear layers that casts input, weight
and grad_output once each by torch's float8_e4m3fn, and counts nothing. The variants take turns within a round; a ratio
is the median over the rounds.
The last rows are the fixed cost of one tiny layer's step on the host, counted, beyond float32's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import torch
from float8_peer import with_float8_casts
from memory import growth, peak_in_a_process, resident
from rows import Operation, Row, alternate, cpu_name, origin, wall_seconds
from torch import Tensor, nn
from torch.nn import functional as F

import lnpu_torch as lnpu
from lnpu_torch.recipes.models import ModelConfig, build
from lnpu_torch.recipes.torchvision_compat import import_torchvision
from lnpu_torch.text_tables import add_row, plain, plain_table

CLASSES = 10
VARIANTS = ("float32", "emulated", "counted", "peer")
RATIOS = ("emulated", "counted", "peer", "counted_over_peer", "peak_memory")
"""Each over float32, but for `counted_over_peer`."""


class Network(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of a batch."""


class Block(nn.Module):
    """Two linear layers with GELU between them, beside a shortcut."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def lenet() -> nn.Module:
    convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    linear = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES)]
    return nn.Sequential(*convolutions, *linear)


def mlp() -> nn.Module:
    hidden = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(1024, CLASSES))


def linear_blocks() -> nn.Module:
    return nn.Sequential(*(Block(256, 1024) for _ in range(6)), MeanOverTokens(), nn.Linear(256, CLASSES))


def _torchvision(name: str, batch: int, edge: int) -> Network:
    return Network(lambda: import_torchvision().models.get_model(name, num_classes=CLASSES), (batch, 3, edge, edge))


def _cifar(name: str) -> Network:
    return Network(lambda: build(ModelConfig(name=name), CLASSES, (3, 32, 32)), (64, 3, 32, 32))


NETWORKS = {
    "lenet": Network(lenet, (64, 1, 28, 28)),
    "mlp": Network(mlp, (128, 784)),
    "linear_blocks": Network(linear_blocks, (32, 64, 256)),
    "resnet50": _torchvision("resnet50", 8, 96),
    "mobilenet_v2": _torchvision("mobilenet_v2", 8, 128),
    "resnet18": _torchvision("resnet18", 8, 224),
    **{name: _cifar(name) for name in ("vgg16_cifar", "alexnet_cifar", "resnet18_cifar")},
}
TINY_LAYERS = {
    "Conv2d": Network(lambda: nn.Conv2d(2, 2, 3), (1, 2, 4, 4)),
    "Linear": Network(lambda: nn.Linear(2, 2), (1, 2)),
}


@dataclass(frozen=True)
class Step:
    """An operation, and the model that is counted while it runs."""

    model: nn.Module
    run: Operation
    counted: bool

    def __call__(self) -> object:
        return self.run()

    def watched(self) -> AbstractContextManager[object]:
        return lnpu.CostCounter(self.model) if self.counted else nullcontext()


def step_of(network: Network, variant: str, channels_last: bool) -> Step:
    """A training step, with the same weights and images in every variant."""
    torch.manual_seed(0)
    model, images = variant_of(network.build(), variant), torch.randn(network.shape)
    if channels_last and images.dim() == 4:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    labels, optimizer = torch.randint(CLASSES, (len(images),)), torch.optim.SGD(model.parameters(), 1e-3)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return Step(model, run, variant == "counted")


def variant_of(model: nn.Module, variant: str) -> nn.Module:
    if variant in ("emulated", "counted"):
        return lnpu.convert(model)
    return with_float8_casts(model) if variant == "peer" else model


def measure(name: str, options: argparse.Namespace) -> Row:
    """Milliseconds of each variant, the ratios, and the peak memory of a counted step over that of float32."""
    network, channels_last = NETWORKS[name], options.channels_last
    steps: dict[str, Operation] = {each: step_of(network, each, channels_last) for each in VARIANTS}
    times = alternate(steps, options.rounds, seconds=seconds)
    flags = ["--only", name, *(["--channels-last"] if channels_last else [])]
    peaks = {which: peak_in_a_process(__file__, "--memory-of", which, *flags) for which in ("float32", "counted")}
    ratios = {variant: median_ratio(times[variant], times["float32"]) for variant in VARIANTS[1:]}
    ratios |= {"counted_over_peer": median_ratio(times["counted"], times["peer"])}
    ratios |= {"peak_memory": peaks["counted"] / peaks["float32"]}
    milliseconds = {variant: round(1e3 * median(each), 2) for variant, each in times.items()}
    return {"name": name, "ms": milliseconds, **{key: round(value, 3) for key, value in ratios.items()}}


def seconds(step: Any) -> float:
    """Of a step inside its counter; entering and leaving that, which a run does once an epoch, is not timed."""
    with step.watched():
        return wall_seconds(step)


def median_ratio(times: list[float], base: list[float]) -> float:
    return median([a / b for a, b in zip(times, base, strict=True)])


def peak_of(name: str, variant: str, channels_last: bool) -> int:
    """Bytes at the peak of three steps, beyond what a process has that has run another network already."""
    warm = step_of(NETWORKS["lenet"], variant, channels_last=False)
    with warm.watched():
        growth(0, warm)
    before = resident("VmRSS")
    step = step_of(NETWORKS[name], variant, channels_last)
    with step.watched():
        return growth(before, step)


def fixed_cost(name: str, rounds: int, calls: int = 100) -> Row:
    """Milliseconds and Python calls of a tiny layer's forward and backward, counted, beyond those in float32."""
    make, shape = TINY_LAYERS[name]
    x, steps = torch.randn(shape, requires_grad=True), dict[str, Operation]()
    for variant in ("float32", "counted"):
        layer = variant_of(make(), variant)

        def run(layer: nn.Module = layer) -> None:
            for _ in range(calls):
                layer(x).sum().backward()

        steps[variant] = Step(layer, run, variant == "counted")
    times = alternate(steps, rounds, seconds=seconds)
    extra = median([a - b for a, b in zip(times["counted"], times["float32"], strict=True)])
    called = {variant: python_calls(step) for variant, step in steps.items()}
    return {
        "name": f"tiny {name}",
        "fixed_ms": round(1e3 * extra / calls, 3),
        "python_calls": round((called["counted"] - called["float32"]) / calls),
    }


def python_calls(step: Any) -> int:
    """Python functions that a step calls."""
    events: Counter[str] = Counter()
    with step.watched():
        sys.setprofile(lambda frame, event, argument: events.update([event]))
        step()
        sys.setprofile(None)
    return events["call"]


def geometric_means(rows: list[Row]) -> Row:
    return {"name": "geometric mean", **{key: round(geometric_mean(row[key] for row in rows), 3) for key in RATIOS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--channels-last", action="store_true", help="model and images in that memory format")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_of(options.only[0], options.memory_of, options.channels_last))
        return
    rows = []
    for name in options.only:
        rows.append(measure(name, options))
        print(f"# {name} done", file=sys.stderr)
    fixed = [fixed_cost(name, options.rounds) for name in TINY_LAYERS]
    rows.append(geometric_means(rows))
    if options.json:
        for row in [*rows, *fixed]:
            print(json.dumps(row | {"device": cpu_name(), **origin()}))
        return
    columns = [f"{variant} ms" for variant in VARIANTS] + [key.replace("_", " ") for key in RATIOS]
    table = plain_table(f"Over float32, medians of {options.rounds} rounds; {cpu_name()}", ["network"], columns)
    for row in rows:
        milliseconds = [f"{row['ms'][variant]:.1f}" if "ms" in row else "" for variant in VARIANTS]
        add_row(table, row["name"], *milliseconds, *(f"{row[key]:.2f}" for key in RATIOS))
    layers = plain_table("One layer's forward and backward, counted, beyond float32", ["layer"], ["ms", "Python calls"])
    for row in fixed:
        add_row(layers, row["name"], f"{row['fixed_ms']:.3f}", str(row["python_calls"]))
    print(plain(table, "", layers))


if __name__ == "__main__":
    main()
