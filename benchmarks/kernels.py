"""The Triton kernels on a GPU: first every bit against the reference at real sizes, then their times.

    python benchmarks/kernels.py [--only quantize|count|matmul|convolution] [--repeats 9]

One JSON row a line. A ratio is a time over its baseline's, each the median of alternating runs: `ratio_to_memcpy` over
a device-to-device copy that moves as many bytes (`bandwidth_share` is its inverse), `ratio_to_torch` over torch's own
operation. `spread` is half the distance of the quartiles of the single ratios, relative to the median. If a kernel
differs from the reference, a row says so, nothing is timed, and the exit status is 1. Without a GPU it is 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch import accumulate, counting, reference
from lnpu_torch.formats import FORMATS
from lnpu_torch.geometry import Geometry
from lnpu_torch.precision import Rule

BURST_MS = 4.0
"""A measurement repeats its operation until it takes about this long, so that launching costs nothing."""
GRIDS = [(256, 64, 56, 56), (512, 64, 32, 32), (512, 512, 4, 4)]
ZEROS = [0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part of the kernels")
    parser.add_argument("--repeats", type=int, default=9, help="alternations per ratio, at least 7")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA GPU; torch sees none here", file=sys.stderr)
        return 2
    # The baseline sums in FP32, as the kernels do.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    parts = [arguments.only] if arguments.only else list(PARTS)
    wrong = [name for part in parts for name, equal in PARTS[part][0]() if not emit_check(name, equal)]
    if wrong:
        return 1
    for part in parts:
        for row in PARTS[part][1](max(7, arguments.repeats)):
            emit(row)
    return 0


def emit(row: dict[str, Any]) -> None:
    import triton

    device = torch.cuda.get_device_name()
    print(json.dumps(row | {"device": device, "torch": torch.__version__, "triton": triton.__version__,
                            "date": date.today().isoformat()}), flush=True)  # fmt: skip


def emit_check(name: str, equal: bool) -> bool:
    emit({"name": name, "equal": equal})
    torch.cuda.empty_cache()
    return equal


def milliseconds(operation: Callable[[], object], times: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        operation()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / times


def compare(operation: Callable[[], object], baseline: Callable[[], object], repeats: int) -> dict[str, float]:
    """Medians of alternating measurements of both, the median of their ratios, and the ratios' spread."""
    bursts = []
    for run in (operation, baseline):
        run()  # compiles
        torch.cuda.synchronize()
        bursts.append(max(1, min(1000, round(BURST_MS / max(milliseconds(run, 3), 1e-4)))))
    pairs = [(milliseconds(operation, bursts[0]), milliseconds(baseline, bursts[1])) for _ in range(repeats)]
    ratios = [ours / theirs for ours, theirs in pairs]
    quartiles = statistics.quantiles(ratios, n=4)
    ratio = statistics.median(ratios)
    return {
        "ratio": ratio,
        "spread": (quartiles[2] - quartiles[0]) / 2 / ratio,
        "milliseconds": statistics.median(ours for ours, _ in pairs),
        "baseline_milliseconds": statistics.median(theirs for _, theirs in pairs),
    }


def over_memcpy(name: str, operation: Callable[[], object], moved: int, repeats: int) -> dict[str, Any]:
    """A row against a copy that reads and writes `moved` bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    figures = compare(operation, lambda: target.copy_(source), repeats)
    ratio = figures.pop("ratio")
    gigabytes = moved / figures["milliseconds"] / 1e6
    shares = {"bandwidth_share": 1 / ratio, "gigabytes_per_second": gigabytes}
    return {"name": name, "ratio_to_memcpy": ratio, **shares, **figures}


def over_torch(
    name: str, operation: Callable[[], object], baseline: Callable[[], object], repeats: int
) -> dict[str, Any]:
    figures = compare(operation, baseline, repeats)
    return {"name": name, "ratio_to_torch": figures.pop("ratio"), **figures}


def activations(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    """Gaussian, half of it zero, as after a ReLU."""
    x = torch.randn(shape, device="cuda").relu().to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def whole_numbers(*shape: int, last: bool = False) -> Tensor:
    """Products and sums of these are exact in FP32 in any order."""
    x = (torch.randint(-8, 9, shape, device="cuda") * (torch.rand(shape, device="cuda") < 0.5)).half()
    return x.to(memory_format=torch.channels_last) if last else x


def threshold(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device="cuda")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit, but for the payloads of NaNs."""
    a, b = a.float(), b.float()
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


def check_quantize() -> Iterator[tuple[str, bool]]:
    from lnpu_torch.kernels import quantize as kernels

    every = torch.arange(-(2**31), 2**31, 61, device="cuda").to(torch.int32).view(torch.float32)
    seed = torch.tensor(2**40 + 7, device="cuda")
    for low, high in (("e4m3", "fp16"), ("e5m2", "fp16"), ("e4m3", None), (None, "fp16"), ("e4m3", "e6m9")):
        rule = Rule.model_validate({"low": low, "high": high})
        for key in (None, seed):
            random = None if key is None else reference.random_bits(every.shape, key, 3)
            dtype, equal = torch.float32 if high == "e6m9" else torch.float16, True
            for t in map(threshold, (-28, -3, 5, 40)):
                q, groups = reference.quantize(every, rule, t, random)
                got = kernels.quantize(every, t, low, high, seed=key, stream=3, dtype=dtype, totals=True)
                totals = torch.stack([(groups == group).sum() for group in (0, 8, 16)])
                assert got[1] is not None and got[2] is not None
                equal &= same(got[0], q) and torch.equal(got[1], groups) and torch.equal(got[2], totals)
            yield f"quantize {low} {high} {'nearest' if key is None else 'stochastic'}", equal
    for shape in (*GRIDS, (8192, 1000), (63, 500, 7, 9)):
        for last in (False, True) if len(shape) == 4 else (False,):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                x = activations(*shape, dtype=dtype, last=last)
                q, groups = reference.quantize(x, Rule(), threshold(1))
                got = kernels.quantize_grid(x, threshold(1), "e4m3", "fp16", len(x), 2)
                assert got[1] is not None and got[3] is not None
                equal = same(got[1], q) and torch.equal(got[2], counting.per_position(groups, len(x)))
                equal &= torch.equal(got[3], counting.per_sample(groups, 2))
                equal &= torch.equal(kernels.histogram(x, "fp16"), reference.histogram(x, Rule()))
                yield f"quantize_grid {list(shape)} {'channels_last' if last else 'contiguous'} {dtype}", equal


def time_quantize(repeats: int) -> Iterator[dict[str, Any]]:
    from lnpu_torch.kernels import quantize as kernels

    t, seed = threshold(1), torch.tensor(7, device="cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = activations(2**26, dtype=dtype)
        moved, name = x.numel() * (x.element_size() + 2), str(dtype).removeprefix("torch.")

        def totals(x: Tensor = x) -> object:
            return kernels.quantize(x, t, "e4m3", "fp16", groups=False, totals=True)

        def groups(x: Tensor = x) -> object:
            return kernels.quantize(x, t, "e4m3", "fp16")

        def stochastic(x: Tensor = x) -> object:
            return kernels.quantize(x, t, "e4m3", "fp16", groups=False, totals=True, seed=seed)

        yield over_memcpy(f"quantize values, totals {name}", totals, moved, repeats)
        yield over_memcpy(f"quantize values, groups {name}", groups, moved + x.numel(), repeats)
        yield over_memcpy(f"quantize values, totals, stochastic {name}", stochastic, moved, repeats)
    for shape in GRIDS:
        for last in (False, True):
            for dtype in (torch.float32, torch.float16):
                x = activations(*shape, dtype=dtype, last=last)

                def grid(x: Tensor = x) -> object:
                    return kernels.quantize_grid(x, t, "e4m3", "fp16", len(x), 1)

                position, sample = x[0].numel() * 8, x[:, 0].numel() * 8
                moved = x.numel() * (x.element_size() + 2) + position + sample
                layout = f"{'channels_last' if last else 'contiguous'} {str(dtype).removeprefix('torch.')}"
                yield over_memcpy(f"quantize_grid {list(shape)} {layout}", grid, moved, repeats)
    x = activations(256, 64, 56, 56)
    rule = Rule()
    yield over_torch("histogram", lambda: kernels.histogram(x, "fp16"), lambda: reference.histogram(x, rule), repeats)


def geometries() -> dict[str, Geometry]:
    return {
        "3x3 56x56": Geometry(256, 64, 64, 1, (56, 56), (56, 56), (3, 3), (1, 1), (1, 1), (1, 1)),
        "3x3 stride 2": Geometry(256, 64, 128, 1, (56, 56), (28, 28), (3, 3), (2, 2), (1, 1), (1, 1)),
        "7x7 stride 2": Geometry(128, 3, 64, 1, (224, 224), (112, 112), (7, 7), (2, 2), (3, 3), (1, 1)),
        "groups 4": Geometry(128, 64, 64, 4, (28, 28), (28, 28), (3, 3), (1, 1), (1, 1), (1, 1)),
        "3x3 4x4": Geometry(512, 512, 512, 1, (4, 4), (4, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
        "linear": Geometry(4096, 1024, 1000, 1, (), (), (), (), (), ()),
    }


def count_operands(g: Geometry) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Counts of the big grid, of the small one, and of the weight as it meets each of them."""
    choices = torch.tensor([0, 8, 16], dtype=torch.uint8, device="cuda")

    def groups(*shape: int) -> Tensor:
        return choices[torch.randint(0, 3, shape, device="cuda")]

    grids = [groups(g.batch, g.big_channels, *g.big), groups(g.batch, g.small_channels, *g.small)]
    weight = groups(g.small_channels, g.big_channels // g.groups, *g.kernel)
    big, small = ([counting.per_position(x, g.batch).squeeze(1), counting.per_sample(x, g.groups)] for x in grids)
    of_big = counting.per_position(weight, g.small_channels // g.groups).flatten(1, 2)
    return big, small, [of_big, counting.per_sample(weight, 1).squeeze(2)]


def check_count() -> Iterator[tuple[str, bool]]:
    from lnpu_torch.kernels import count as kernels

    for name, g in geometries().items():
        big, small, weights = count_operands(g)
        counter = torch.zeros(kernels.WIDTH, dtype=torch.int64, device="cuda")
        kernels.add_weight_step(counter, big[0], weights[0], g.pack(), "big")
        kernels.add_weight_step(counter, small[0], weights[1], g.pack(), "small")
        kernels.add_grid_step(counter, big, small, g.pack(), "small")
        expected = counting.weight_step(big[0], weights[0], g, "big")
        expected = expected + counting.weight_step(small[0], weights[1], g, "small")
        yield f"count {name}", torch.equal(counter, expected + counting.grid_step(big, small, g, "small"))


def time_count(repeats: int) -> Iterator[dict[str, Any]]:
    from lnpu_torch.kernels import count as kernels

    for name, g in geometries().items():
        big, small, weights = count_operands(g)
        counter, sizes = torch.zeros(kernels.WIDTH, dtype=torch.int64, device="cuda"), g.pack()

        def ours_weight(args: Any = (counter, big[0], weights[0], sizes, "big")) -> object:
            return kernels.add_weight_step(*args)

        def ours_grid(args: Any = (counter, big, small, sizes, "big")) -> object:
            return kernels.add_grid_step(*args)

        def plain_weight(args: Any = (big[0], weights[0], g, "big")) -> object:
            return counting.weight_step(*args)

        def plain_grid(args: Any = (big, small, g, "big")) -> object:
            return counting.grid_step(*args)

        yield over_torch(f"weight_step {name}", ours_weight, plain_weight, repeats)
        yield over_torch(f"grid_step {name}", ours_grid, plain_grid, repeats)


def blocks_of_zeros(size: int, share: float) -> Tensor:
    """A matrix in which a share of the blocks of 128 by 64, the kernel's own, is zero."""
    x = torch.randn(size // 128, 128, size // 64, 64, device="cuda", dtype=torch.float16)
    x *= torch.rand(size // 128, 1, size // 64, 1, device="cuda") >= share
    return x.reshape(size, size)


def check_matmul() -> Iterator[tuple[str, bool]]:
    from lnpu_torch.kernels import matmul as kernels

    for m, n, k in ((4096, 4096, 1024), (1000, 500, 630)):
        a, b = whole_numbers(m, k) * 13, whole_numbers(k, n) * 7
        a[: m // 2, : k // 2] = 0
        for chunk in (None, 16, 64, 100):
            expected = a.float() @ b.float()
            if chunk is not None:
                expected = accumulate.reduce(a.float(), b.float(), FORMATS["fp16"], chunk)
            for skip in (False, True):
                equal = torch.equal(kernels.matmul(a, b, chunk=chunk, skip=skip), expected)
                yield f"matmul {m}x{n}x{k} chunk {chunk}{' skipping' if skip else ''}", equal


def time_matmul(repeats: int) -> Iterator[dict[str, Any]]:
    from lnpu_torch.kernels import matmul as kernels

    size = 4096
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    for chunk in (None, 16, 32, 64, 128):

        def ours(chunk: int | None = chunk) -> object:
            return kernels.matmul(a, b, chunk=chunk, dtype=torch.float16)

        yield over_torch(f"matmul {size}^3 chunk {chunk}", ours, lambda: a @ b, repeats)
    for share in ZEROS:
        sparse = blocks_of_zeros(size, share)

        def skipping(sparse: Tensor = sparse) -> object:
            return kernels.matmul(sparse, b, skip=True, dtype=torch.float16)

        def dense(sparse: Tensor = sparse) -> object:
            return sparse @ b

        yield over_torch(f"matmul {size}^3 skipping", skipping, dense, repeats) | {"zero_blocks": share}


def convolution_steps(g: Geometry, make: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    big, small = make(g.batch, g.big_channels, *g.big), make(g.batch, g.small_channels, *g.small)
    weight = make(g.small_channels, g.big_channels // g.groups, *g.kernel)
    return {"small_from_big": (big, weight), "big_from_small": (small, weight), "weight_from_both": (big, small)}


def check_convolution() -> Iterator[tuple[str, bool]]:
    from lnpu_torch.kernels import matmul as kernels

    small = {
        name: Geometry(2, g.big_channels, g.small_channels, g.groups, g.big, g.small, g.kernel, g.stride, g.padding,
                       g.dilation)
        for name, g in geometries().items()
    }  # fmt: skip
    for name, g in small.items():
        for last in (False, True) if g.kernel else (False,):
            steps = convolution_steps(g, lambda *shape, last=last: whole_numbers(*shape, last=last))
            for step, operands in steps.items():
                for chunk in (None, 64):
                    form = FORMATS["fp32" if chunk is None else "fp16"]
                    expected = getattr(accumulate, step)(*(x.float() for x in operands), g, form, chunk or 10**9)
                    equal = all(
                        torch.equal(getattr(kernels, step)(*operands, g.pack(), chunk=chunk, skip=skip), expected)
                        for skip in (False, True)
                    )
                    yield f"{step} {name} {'channels_last' if last else 'contiguous'} chunk {chunk}", equal


def time_convolution(repeats: int) -> Iterator[dict[str, Any]]:
    from lnpu_torch.kernels import matmul as kernels

    for name, g in geometries().items():
        if not g.kernel:
            continue
        steps = convolution_steps(g, lambda *shape: activations(*shape, dtype=torch.float16, last=True))
        (big, weight), (small, _) = steps["small_from_big"], steps["big_from_small"]
        options = (list(g.stride), list(g.padding), list(g.dilation))

        def backward(mask: list[bool], args: Any = (small, big, weight, options, g.groups)) -> object:
            error, x, w, (stride, padding, dilation), groups = args
            return torch.ops.aten.convolution_backward(
                error, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask
            )

        def forward(args: Any = (big, weight, None, *options, g.groups)) -> object:
            return F.conv2d(*args)

        baselines: dict[str, Callable[[], object]] = {
            "small_from_big": forward,
            "big_from_small": partial(backward, [True, False, False]),
            "weight_from_both": partial(backward, [False, True, False]),
        }
        for step, operands in steps.items():
            for chunk, skip in ((None, False), (None, True), (64, False)):

                def ours(
                    step: str = step, args: Any = operands, g: Geometry = g, options: Any = (chunk, skip)
                ) -> object:
                    chunk, skip = options
                    run = getattr(kernels, step)
                    return run(*args, g.pack(), chunk=chunk, skip=skip, dtype=torch.float16)

                label = f"{step} {name} chunk {chunk}{' skipping' if skip else ''}"
                yield over_torch(label, ours, baselines[step], repeats)


PARTS: dict[str, tuple[Callable[[], Iterator[tuple[str, bool]]], Callable[[int], Iterator[dict[str, Any]]]]] = {
    "quantize": (check_quantize, time_quantize),
    "count": (check_count, time_count),
    "matmul": (check_matmul, time_matmul),
    "convolution": (check_convolution, time_convolution),
}

if __name__ == "__main__":
    sys.exit(main())
