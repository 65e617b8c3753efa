"""A training step emulated, counting on, over the same step in plain float32. Ratios alternate in one run.

python benchmarks/step.py --json                    # CPU: time and peak memory of three CIFAR models
python benchmarks/step.py --device cuda --json      # GPU: everything that one is needed for, in under 8 minutes

On a GPU: builds the kernels, holds every one against its reference, times them and the steps, profiles those, and says
which goals are met. The exit status is 1 if anything failed or differed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gpu
import torch
from copies import with_casts
from memory import growth, peak_in_a_process, resident
from peers import add_option, installed
from rows import add_options, alternate, cpu_name, origin, ratio, write
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch.recipes.models import ModelConfig, build

MODELS = ("resnet18_cifar", "vgg16_cifar", "alexnet_cifar")
CLASSES, SHAPE = 10, (3, 32, 32)


def main() -> int:
    options = parser().parse_args()
    if options.device == "cuda":
        return gpu.main(options)
    if options.memory_of:
        print(peak_of_one_variant(options))
        return 0
    for row in cpu_rows(options):
        write(row | {"device": cpu_name(), **origin()}, options)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=64, help="images in a batch, on a CPU")
    parser.add_argument("--repeats", type=int, default=15, help="alternations; the median counts")
    parser.add_argument("--precision", default="fgmp")
    parser.add_argument("--compiled", action="store_true", help="both under torch.compile too, which takes minutes")
    add_options(parser)
    add_option(parser)
    parser.add_argument("--memory-of", choices=("float32", "emulated"), help=argparse.SUPPRESS)
    parser.add_argument("--section", help=argparse.SUPPRESS)  # of the GPU's, the only one to run, in this process
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # on a CPU, with tiny sizes
    return parser


def cpu_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a model: time over float32 and over mere copies, the share that counting takes, peak memory."""
    batch = options.batch
    for name in options.models:
        emulated = variant(name, options.precision)
        models = {"float32": variant(name, None), "copied": with_casts(variant(name, None))}
        models["emulated"] = emulated
        casts = installed(options.peers).items()
        models |= {f"peer: {peer}": with_casts(variant(name, None), cast, torch.float32) for peer, cast in casts}
        if options.compiled:
            for which, precision in (("compiled float32", None), ("compiled emulated", options.precision)):
                compiled: Any = torch.compile(variant(name, precision), fullgraph=True)
                models[which] = compiled
        times = alternate({which: stepper(model, batch) for which, model in models.items()}, options.repeats)
        flags = ["--models", name, "--batch", str(batch), "--precision", options.precision]
        both = ("float32", "emulated")
        peaks = {which: peak_in_a_process(__file__, "--memory-of", which, *flags) for which in both}
        over_float32, spread = ratio(times, "emulated", "float32")
        yield {
            "name": f"step {name} {options.precision}",
            "batch": batch,
            "ratio_to_float32": over_float32,
            "spread": spread,
            "best_ratio_to_float32": best(times, "emulated"),
            "ratio_to_copies": ratio(times, "emulated", "copied")[0],
            "copies_to_float32": ratio(times, "copied", "float32")[0],
            "seconds": {which: round(statistics.median(values), 4) for which, values in times.items()},
            "counting_share": counting_share(emulated, batch),
            "peak_memory_ratio": round(peaks["emulated"] / peaks["float32"], 3),
            "peak_mb": {which: round(peak / 2**20) for which, peak in peaks.items()},
        }
        if options.compiled:
            over_float32, spread = ratio(times, "compiled emulated", "compiled float32")
            yield {
                "name": f"compiled step {name} {options.precision}",
                "ratio_to_float32": over_float32,
                "spread": spread,
            }
        for peer in [which for which in models if which.startswith("peer")]:
            over_float32, spread = ratio(times, peer, "float32")
            figures = {"ratio_to_float32": over_float32, "spread": spread, "best_ratio_to_float32": best(times, peer)}
            yield {"name": f"step {name} {peer}", "batch": batch, **figures}


def best(times: dict[str, list[float]], which: str) -> float:
    """The fastest step over the fastest in float32: what others' work on the machine blurs least."""
    return round(min(times[which]) / min(times["float32"]), 3)


def variant(name: str, precision: str | None) -> nn.Module:
    """A model with the same weights each time, converted unless the precision is None."""
    torch.manual_seed(0)
    model = build(ModelConfig(name=name), CLASSES, SHAPE)
    converted: nn.Module = model if precision is None else lnpu.convert(model, precision)
    return converted


def stepper(model: nn.Module, batch: int) -> Callable[[], None]:
    """A function that runs forward and backward once, and drops the gradients."""
    images, labels = torch.randn(batch, *SHAPE), torch.randint(CLASSES, (batch,))

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)

    return step


def counting_share(model: nn.Module, batch: int) -> float:
    """The part of a step that counting takes: what is left of the time without it, the median of five pairs."""
    step, times = stepper(model, batch), {}

    def uncounted() -> None:
        with lnpu.no_count(model):
            step()

    times = alternate({"counted": step, "uncounted": uncounted}, 5, unmeasured=1)
    pairs = zip(times["uncounted"], times["counted"], strict=True)
    return round(1 - statistics.median(without / counted for without, counted in pairs), 4)


def peak_of_one_variant(options: argparse.Namespace) -> int:
    """The most resident memory of three steps, less what the process had before the model was built."""
    warm = stepper(variant("resnet18_cifar", options.precision), 2)
    for _ in range(2):  # the first chooses its own thresholds; what all others need is loaded
        warm()
    before = resident("VmRSS")
    precision = options.precision if options.memory_of == "emulated" else None
    step = stepper(variant(options.models[0], precision), options.batch)
    return growth(before, step)


if __name__ == "__main__":
    sys.exit(main())
