"""A training step emulated, counting on, over the same step in plain float32. Ratios alternate in one run.

python benchmarks/step.py --json                    # CPU: time and peak memory of three CIFAR models
python benchmarks/step.py --device cuda --json      # GPU: kernels' own checks, then time and peak memory
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from copies import copied
from torch import Tensor, nn

import lnpu_torch as lnpu
from lnpu_torch.recipes.models import ModelConfig, build

MODELS = ("resnet18_cifar", "vgg16_cifar", "alexnet_cifar")
CLASSES, SHAPE = 10, (3, 32, 32)


def main() -> None:
    options = parser().parse_args()
    if options.memory_of:
        print(peak_of_one_variant(options))
        return
    rows = gpu_rows(options) if options.device == "cuda" else cpu_rows(options)
    for row in rows:
        print(
            json.dumps(row) if options.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True
        )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, help="images in a batch (CPU: 64, GPU: 512)")
    parser.add_argument("--repeats", type=int, default=15, help="alternations; the median counts")
    parser.add_argument("--precision", default="fgmp")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--memory-of", choices=("float32", "emulated"), help=argparse.SUPPRESS)
    return parser


def cpu_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a model: time over float32 and over mere copies, the share that counting takes, peak memory."""
    batch = options.batch or 64
    for name in options.models:
        emulated = variant(name, "cpu", options.precision)
        models = {"float32": variant(name, "cpu", None), "copied": copied(variant(name, "cpu", None))}
        models["emulated"] = emulated
        times = alternate({which: stepper(model, batch, "cpu") for which, model in models.items()}, options)
        peaks = {which: peak_in_a_process(name, which, batch, options) for which in ("float32", "emulated")}
        yield {
            "name": f"step {name} {options.precision}",
            "device": f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "batch": batch,
            **ratio_to("float32", times),
            "ratio_to_copies": ratio_to("copied", times)["ratio_to_copied"],
            "counting_share": counting_share(emulated, batch),
            "peak_memory_ratio": round(peaks["emulated"] / peaks["float32"], 3),
            "peak_mb": {which: round(peak / 2**20) for which, peak in peaks.items()},
        }


def gpu_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The step under fp16 autocast in channels_last, over autocast alone and over float32; the slowest kernels."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was measured")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    batch = options.batch or 512
    for name in options.models:
        autocast = stepper(variant(name, "cuda", None), batch, "cuda", autocast=True)
        emulated = stepper(variant(name, "cuda", options.precision), batch, "cuda", autocast=True)
        steps = {
            "autocast": autocast,
            "float32": stepper(variant(name, "cuda", None), batch, "cuda"),
            "emulated": emulated,
        }
        times = alternate(steps, options)
        peaks = {which: gpu_peak(step) for which, step in steps.items()}
        yield {
            "name": f"step {name} {options.precision}",
            "device": f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
            "batch": batch,
            **ratio_to("float32", times),
            "ratio_to_autocast": ratio_to("autocast", times)["ratio_to_autocast"],
            "peak_memory_ratio": round(peaks["emulated"] / peaks["float32"], 3),
            "peak_mb": {which: round(peak / 2**20) for which, peak in peaks.items()},
            "slowest_kernels_us": slowest_kernels(emulated),
        }


def variant(name: str, device: str, precision: str | None) -> nn.Module:
    """A model with the same weights each time, converted unless the precision is None."""
    torch.manual_seed(0)
    model = build(ModelConfig(name=name), CLASSES, SHAPE).to(device)
    return model if precision is None else lnpu.convert(model, precision)


def stepper(model: nn.Module, batch: int, device: str, autocast: bool = False) -> Callable[[], None]:
    """A function that runs forward and backward once, and drops the gradients."""
    images, labels = torch.randn(batch, *SHAPE, device=device), torch.randint(CLASSES, (batch,), device=device)
    if device == "cuda":
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device, torch.float16, enabled=autocast):
            loss: Tensor = nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def alternate(steps: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step, in turn, after three rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(-3, options.repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if round_ >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def ratio_to(base: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """The median of the emulated step over that of `base`; the quartiles of the ratios of neighbouring steps."""
    pairs = [mine / theirs for mine, theirs in zip(times["emulated"], times[base], strict=True)]
    quartiles = statistics.quantiles(pairs, n=4)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        f"ratio_to_{base}": round(medians["emulated"] / medians[base], 3),
        "spread": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "seconds": {name: round(median, 4) for name, median in medians.items()},
    }


def counting_share(model: nn.Module, batch: int) -> float:
    """The part of a step that the counting ops take, from the profiler."""
    step = stepper(model, batch, "cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        started = time.perf_counter()
        step()
        whole = time.perf_counter() - started
    counted = sum(
        event.cpu_time_total
        for event in profile.key_averages()
        if event.key.startswith(("lnpu::count_", "lnpu::lane_"))
    )
    return round(float(counted) * 1e-6 / whole, 4)


def peak_in_a_process(name: str, which: str, batch: int, options: argparse.Namespace) -> int:
    """Bytes at the peak of three steps in a process of its own, whose freed blocks go back to the system at once.

    Else the peak would be that of the allocator's gaps, which differ by a third from run to run.
    """
    command = [sys.executable, __file__, "--memory-of", which, "--models", name, "--batch", str(batch)]
    command += ["--precision", options.precision]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


def peak_of_one_variant(options: argparse.Namespace) -> int:
    """The most resident memory of three steps, less what the process had before the model was built."""
    warm = stepper(variant("resnet18_cifar", "cpu", options.precision), 2, "cpu")
    warm()
    before = resident("VmRSS")
    step = stepper(
        variant(options.models[0], "cpu", options.precision if options.memory_of == "emulated" else None),
        options.batch,
        "cpu",
    )
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Bytes of resident memory now (VmRSS) or at the most (VmHWM); getrusage's would include the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) * 1024


def gpu_peak(step: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def slowest_kernels(step: Callable[[], None]) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return {event.key[:60]: round(event.device_time_total) for event in events[:5]}


if __name__ == "__main__":
    main()
