"""The Triton kernels on a GPU: first every bit against the reference at real sizes, then their times.

    python benchmarks/kernels.py --json [--only quantize count ...]

A ratio is a time over its baseline's, each the median of alternating runs: `ratio_to_memcpy` over a device-to-device
copy that moves as many bytes (`bandwidth_share` is its inverse), `ratio_to_torch` over torch's own operation. `spread`
is the quartiles of the single ratios. `step.py --device cuda` runs the same, the shorter way, among all else that needs
a GPU. If a kernel differs from its reference, a row says so and the exit status is 1. Without a GPU it is 2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import checks
import torch
from place import Place
from rows import REPEATS, Operation, Row, add_options, alternate, origin, ratio, write
from sizes import sizes
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch.counts.lane_configs import runs_shape
from lnpu_torch.ops.gemm import half_precision
from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape
from lnpu_torch.ops.quantize import reference
from lnpu_torch.quant.precision import Rule

Rows = Iterator[Row]
BURST_S = 4e-3
"""A measurement repeats its operation until it takes about this long, so that launching costs nothing."""
CACHED = 2**27
"""Bytes up to which a tensor and its results may stay in a GPU's L2 cache, whose speed is not that of its memory."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TIMES, default=list(TIMES), help="some of the kernels")
    add_options(parser)
    options, place, wrong = parser.parse_args(), Place(), 0
    if place.missing():
        print(place.missing(), file=sys.stderr)
        return 2
    place.prepare()
    for name, verdicts in CHECKS.items():
        if name.split()[0] in options.only or name not in TIMES:
            for label, equal in verdicts(place):
                wrong += not equal
                write({"name": label, "device": place.name, "equal": equal, **origin()}, options)
    for name in options.only:
        for row in TIMES[name](place):
            write(row | {"device": place.name, **origin()}, options)
    return int(wrong > 0)


def compare(operation: Operation, baseline: Operation, place: Place, name: str) -> Row:
    """Medians of alternating bursts of both, their ratio by this name, and its spread."""
    bursts = {}
    for run in (operation, baseline):
        run()  # compiles
        place.synchronize()
        bursts[run] = max(1, min(1000, round(BURST_S / max(place.seconds(run, 3), 1e-7))))
    operations = {"ours": operation, "baseline": baseline}
    times = alternate(operations, REPEATS, unmeasured=0, seconds=lambda run: place.seconds(run, bursts[run]))
    value, spread = ratio(times, "ours", "baseline")
    medians = {which: round(1e3 * statistics.median(values), 5) for which, values in times.items()}
    return {
        name: value,
        "spread": spread,
        "milliseconds": medians["ours"],
        "torch_milliseconds": medians["baseline"],
    }


def over_memcpy(name: str, operation: Operation, moved: int, place: Place) -> Row:
    """A row against a copy that reads and writes `moved` bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    figures = compare(operation, lambda: target.copy_(source), place, "ratio_to_memcpy")
    gigabytes = moved / figures["milliseconds"] / 1e6
    share = round(figures["torch_milliseconds"] / figures["milliseconds"], 3)
    return {"name": name, "bandwidth_share": share, "gigabytes_per_second": round(gigabytes, 1), **figures}


def quantize(place: Place) -> Rows:
    from lnpu_torch.kernels import quantize as kernels

    t, seed = checks.threshold(1, place), torch.tensor(7, device=place.device)
    for dtype in checks.DTYPES:
        x = checks.activations(sizes(place).flat, place=place, dtype=dtype)
        moved, name = x.numel() * (x.element_size() + 2), str(dtype).removeprefix("torch.")
        run = partial(kernels.quantize, x, t, "e4m3", "fp16")
        sums = {"groups": False, "totals": True}
        yield over_memcpy(f"quantize values, totals {name}", partial(run, **sums), moved, place)
        yield over_memcpy(f"quantize values, groups {name}", run, moved + x.numel(), place)
        yield over_memcpy(f"quantize values, totals, stochastic {name}", partial(run, seed=seed, **sums), moved, place)


def grid(place: Place) -> Rows:
    from lnpu_torch.kernels import operand as kernels

    rule = Rule()
    for shape in sizes(place).grids:
        for last in (False, True):
            for dtype in (torch.float32, torch.float16):
                x = checks.activations(*shape, place=place, dtype=dtype, last=last)
                run = partial(checks.read_operand, x, torch.zeros(1, 2, dtype=torch.int32, device=x.device))
                position, sample = x[0].numel() * 8, x[:, 0].numel() * 8
                moved = x.numel() * (x.element_size() + 2) + position + sample + x.numel() // kernels.RUN
                label = f"{list(shape)} {checks.layout(last)} {str(dtype).removeprefix('torch.')}"
                name = "operand" if moved > CACHED else "cached operand"
                yield over_memcpy(f"{name} {label}", run, moved, place)
    from lnpu_torch.ops.quantize import gpu

    x = checks.activations(*sizes(place).grids[0], place=place)
    ours, plain = partial(gpu.histogram, x, rule), partial(reference.histogram, x, rule)
    yield {"name": "histogram", **compare(ours, plain, place, "ratio_to_torch")}


def count(place: Place) -> Rows:
    from lnpu_torch.kernels import count as kernels

    for name, g in sizes(place).geometries.items():
        conv_input, conv_output, weights = checks.count_operands(g, place)
        counters = torch.zeros(3, kernels.WIDTH, dtype=torch.int64, device=place.device)
        lanes_ = torch.zeros(kernels.MEMBERS, dtype=torch.int64, device=place.device)
        runs = torch.randint(0, 17, runs_shape((g.batch, g.in_channels, *g.conv_input)), device=place.device)
        profile = kernels.Profile(runs.to(torch.uint8), 0)
        weight_step = kernels.WeightStep(0, conv_input[0], weights[0], "conv_input")
        grid_step = kernels.GridStep(kernels.WIDTH, conv_input, conv_output, "conv_input")
        ours: Operation = partial(kernels.count, counters, lanes_, g.pack(), weight_step, None, profile)
        plain: Operation = partial(counting.weight_step, conv_input[0], weights[0], g, "conv_input")
        yield {"name": f"count forward {name}", **compare(ours, plain, place, "ratio_to_torch")}
        ours = partial(kernels.count, counters, lanes_, g.pack(), weight_step, grid_step, profile)
        plain = partial(counting.grid_step, conv_input, conv_output, g, "conv_input")
        yield {"name": f"count backward {name}", **compare(ours, plain, place, "ratio_to_torch")}


def matmul(place: Place) -> Rows:
    from lnpu_torch.kernels import gemm as kernels

    size = sizes(place).square
    a, b = (torch.randn(size, size, device=place.device, dtype=torch.float16) for _ in range(2))
    plain = partial(torch.matmul, a, b)
    for chunk in (None, 16, 64, 128):
        ours = partial(kernels.matmul, a, b, chunk=chunk, dtype=torch.float16)
        yield {"name": f"matmul {size}^3 chunk {chunk}", **compare(ours, plain, place, "ratio_to_torch")}
    for rows, inputs, outputs in sizes(place).linears:
        a, b = (torch.randn(n, inputs, device=place.device, dtype=torch.float16) for n in (rows, outputs))
        bias = torch.randn(outputs, device=place.device)
        ours = partial(kernels.matmul, a, b.T, bias=bias, dtype=torch.float16)
        in_passes = partial(_linear_in_passes, a, b, bias)
        name = f"linear {rows} x {inputs} -> {outputs}, bias added and rounded"
        yield {"name": name, **compare(ours, in_passes, place, "ratio_to_torch")}


def _linear_in_passes(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cuBLAS' product in float32, the bias added to that, and the sum rounded."""
    from lnpu_torch.kernels.round_output import round_result

    sums = half_precision.half_matmul(x, weight.T, bias)
    rounded: Tensor = round_result(sums, "fp16", torch.float16)
    return rounded


def convolution(place: Place) -> Rows:
    from lnpu_torch.kernels import gemm as kernels

    for name, g in sizes(place).geometries.items():
        if not g.kernel:
            continue
        make = partial(checks.activations, place=place, dtype=torch.float16, last=True)
        steps = checks.step_operands(g, make)
        for step, operands in steps.items():
            plain = torch_convolution(step, g, *steps["conv_forward"], steps["conv_grad_input"][0])
            for chunk in (None, 64):
                options = {"chunk": chunk, "dtype": torch.float16}
                ours = partial(getattr(kernels, step), *operands, g.pack(), **options)
                label = f"{step} {name} chunk {chunk}"
                yield {"name": label, **compare(ours, plain, place, "ratio_to_torch")}


def torch_convolution(
    step: str, g: ConvShape, conv_input: Tensor, weight: Tensor, conv_output: Tensor | None
) -> Operation:
    """Torch's own way to do a convolution's step."""
    lists = (list(g.stride), list(g.padding), list(g.dilation))
    if step == "conv_forward":
        return partial(F.conv2d, conv_input, weight, None, *lists, g.groups)
    mask = [step == "conv_grad_input", step == "conv_grad_weight", False]
    arguments: tuple[Any, ...] = (conv_output, conv_input, weight, None, *lists, False, [0, 0], g.groups, mask)
    return partial(torch.ops.aten.convolution_backward, *arguments)


CHECKS: dict[str, Callable[[Place], checks.Verdicts]] = {
    "quantize": checks.quantize,
    "grid": checks.grid,
    "threshold": checks.thresholds,
    "lanes": checks.lane_profiles,
    "result": checks.results,
    "count": checks.count,
    "matmul": checks.matmul,
    "convolution forward": partial(checks.convolution, step="conv_forward"),
    "convolution grad_input": partial(checks.convolution, step="conv_grad_input"),
    "convolution grad_weight": partial(checks.convolution, step="conv_grad_weight"),
    "layers": checks.layers,
}
TIMES: dict[str, Callable[[Place], Rows]] = {
    "quantize": quantize,
    "grid": grid,
    "count": count,
    "matmul": matmul,
    "convolution": convolution,
}

if __name__ == "__main__":
    sys.exit(main())
