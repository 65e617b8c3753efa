"""The Triton kernels against their references, bit by bit, at a training step's real sizes. Nothing is timed here.

All memory that the kernels allocate is full of NaN (or 77) before they write it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from place import Place
from sizes import Sizes, sizes
from torch import Tensor, nn

import lnpu_torch as lnpu
from lnpu_torch.ops import dispatch
from lnpu_torch.ops.gemm import reference as accumulate
from lnpu_torch.ops.lanes import reference as lanes
from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape
from lnpu_torch.ops.quantize import reference
from lnpu_torch.quant.formats import FORMATS
from lnpu_torch.quant.precision import Rule

Verdicts = Iterator[tuple[str, bool]]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within this, new memory is full of what no kernel would write."""

    def full(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **options: Any) -> Tensor:
            x = make(*args, **options)
            return x if x.is_meta else x.fill_(torch.nan if x.is_floating_point() else 77)

        return run

    with mock.patch.multiple(torch, empty=full(torch.empty), empty_like=full(torch.empty_like)):
        yield


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit, but for the payloads and signs of NaNs."""
    a, b = a.float(), b.float()
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


def threshold(value: int, place: Place) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=place.device)


def activations(*shape: int, place: Place, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    """Gaussian, half of it zero, as after a ReLU."""
    return laid(torch.randn(shape, device=place.device).relu().to(dtype), last)


def whole_numbers(*shape: int, place: Place, last: bool = False) -> Tensor:
    """Products and sums of these are exact in float32 in any order."""
    keep = torch.rand(shape, device=place.device) < 0.5
    return laid((torch.randint(-8, 9, shape, device=place.device) * keep).half(), last)


def laid(x: Tensor, last: bool) -> Tensor:
    return x.to(memory_format=torch.channels_last) if last and x.dim() == 4 else x


def quantize(place: Place) -> Verdicts:
    from lnpu_torch.kernels import quantize as kernels

    device = place.device
    every = torch.arange(-(2**31), 2**31, sizes(place).pattern_step, device=device).to(torch.int32).view(torch.float32)
    for low, high in (("e4m3", "fp16"), ("e5m2", "fp16"), ("e4m3", None), (None, "fp16"), ("e4m3", "e6m9")):
        rule = Rule.model_validate({"low": low, "high": high})
        for key in (None, torch.tensor(2**40 + 7, device=device)):
            random = None if key is None else reference.random_bits(every.shape, key, 3)
            dtype, equal = torch.float32 if high == "e6m9" else torch.float16, True
            for t in (threshold(value, place) for value in (-28, -3, 5, 40)):
                q, groups = reference.quantize(every, rule, t, random)
                with poisoned():
                    got = kernels.quantize(every, t, low, high, seed=key, stream=3, dtype=dtype, totals=True)
                totals = torch.stack([(groups == group).sum() for group in (0, 8, 16)])
                equal &= same(got[0], q) and torch.equal(got[1], groups) and torch.equal(got[2], totals)
            yield f"quantize {low} {high} {'nearest' if key is None else 'stochastic'}", equal


def grid(place: Place) -> Verdicts:
    for shape in (*sizes(place).grids, *sizes(place).odd_grids):
        for last in (False, True) if len(shape) == 4 else (False,):
            for dtype in DTYPES:
                x, equal = activations(*shape, place=place, dtype=dtype, last=last), True
                for current in (
                    reference.UNSET,
                    1,
                ):  # a first step, whose programs wait for the choice, and a later one
                    states = torch.full((1, 2), current, dtype=torch.int32, device=place.device)
                    chosen = reference.choose_threshold(x, Rule(), states[0, 0])
                    used = chosen if current == reference.UNSET else states[0, 0].clone()
                    q, groups = reference.quantize(x, Rule(), used)
                    with poisoned():
                        got = read_operand(x, states)
                    position, sample = counting.per_position(groups, len(x)), counting.per_sample(groups, 1)
                    equal &= same(got.half, q) and torch.equal(got.runs, lanes.runs_of(q))
                    equal &= torch.equal(got.position, position) and torch.equal(got.sample, sample)
                    equal &= torch.equal(states[0], torch.stack((used, chosen)))
                yield f"grid {list(shape)} {layout(last)} {dtype}", equal


def read_operand(x: Tensor, states: Tensor) -> Any:
    """An operand read as layers do in training, in FGMP: its threshold in use and to come are `states` [1, 2]."""
    from lnpu_torch.kernels import operand
    from lnpu_torch.ops.quantize import gpu

    wanted = operand.Wanted(runs=True, joined=x.dim() == 2)
    return operand.read(x, gpu.choice(Rule()), "e4m3", "fp16", (len(x), 1), wanted, states=states, training=True)


def layout(last: bool) -> str:
    return "channels_last" if last else "contiguous"


def thresholds(place: Place) -> Verdicts:
    rules = {"error": Rule(), "share": Rule(fp16_share=0.2), "largest": Rule(high=None), "1-6-9": Rule(high="e6m9")}
    for shape in (*sizes(place).grids, *sizes(place).odd_grids):
        for last in (False, True) if len(shape) == 4 else (False,):
            x = activations(*shape, place=place, last=last) * 2.0**-5
            for name, rule in rules.items():
                chosen = []
                for backend in ("triton", "reference"):
                    states = torch.full((2, 2), reference.UNSET, dtype=torch.int32, device=place.device)
                    with dispatch.backend(backend), poisoned():
                        used = dispatch.backend_of(x).next_threshold(x, states, 1, rule.model_dump_json(), True)
                    chosen.append(torch.cat((torch.as_tensor(used).reshape(1), states.flatten())))
                yield f"threshold by {name} {list(shape)} {layout(last)}", torch.equal(*chosen)


def lane_profiles(place: Place) -> Verdicts:
    from lnpu_torch.kernels import lanes as kernels

    for shape in (*sizes(place).grids, *sizes(place).odd_grids):
        for last in (False, True) if len(shape) == 4 else (False,):
            x = activations(*shape, place=place, dtype=torch.float16, last=last)
            runs = lanes.runs_of(x)
            with poisoned():
                equal = torch.equal(kernels.runs_of(x), runs)
                equal &= torch.equal(kernels.profile(runs), lanes.profile(runs))
            yield f"lanes {list(shape)} {layout(last)}", equal


def results(place: Place) -> Verdicts:
    from lnpu_torch.kernels import round_output as kernels

    for shape in (*sizes(place).grids, *sizes(place).odd_grids):
        for last in (False, True) if len(shape) == 4 else (False,):
            x = laid(torch.randn(shape, device=place.device) * 3e4, last)  # some overflow
            for dtype in DTYPES:
                equal = True
                for form in ("fp16", "e6m9"):
                    for source in DTYPES:
                        total = x.to(source).float()
                        with poisoned():
                            got = kernels.round_result(x.to(source), form, dtype)
                        equal &= got.dtype == dtype and same(got, reference.round_to(total, FORMATS[form]).to(dtype))
                yield f"result {list(shape)} {layout(last)} {dtype}", equal


def count(place: Place) -> Verdicts:
    from lnpu_torch.kernels import count as kernels

    for name, g in sizes(place).geometries.items():
        conv_input, conv_output, weights = count_operands(g, place)
        counter = torch.zeros(kernels.WIDTH, dtype=torch.int64, device=place.device)
        profile = torch.zeros(kernels.MEMBERS, dtype=torch.int64, device=place.device)
        first = kernels.WeightStep(0, conv_input[0], weights[0], "conv_input")
        second = kernels.WeightStep(0, conv_output[0], weights[1], "conv_output")
        kernels.count(counter, profile, g.pack(), first)
        kernels.count(counter, profile, g.pack(), second, kernels.GridStep(0, conv_input, conv_output, "conv_output"))
        expected = counting.weight_step(conv_input[0], weights[0], g, "conv_input")
        expected = expected + counting.weight_step(conv_output[0], weights[1], g, "conv_output")
        yield (
            f"count {name}",
            torch.equal(counter, expected + counting.grid_step(conv_input, conv_output, g, "conv_output")),
        )


def count_operands(g: ConvShape, place: Place) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Counts of the input grid, of the output grid, and of the weight as it meets each of them."""
    choices = torch.tensor([0, 8, 16], dtype=torch.uint8, device=place.device)

    def groups(*shape: int) -> Tensor:
        return choices[torch.randint(0, 3, shape, device=place.device)]

    grids = [groups(g.batch, g.in_channels, *g.conv_input), groups(g.batch, g.out_channels, *g.conv_output)]
    weight = groups(g.out_channels, g.in_channels // g.groups, *g.kernel)
    conv_input, conv_output = (
        [counting.per_position(x, g.batch).squeeze(1), counting.per_sample(x, g.groups)] for x in grids
    )
    of_big = counting.per_position(weight, g.out_channels // g.groups).flatten(1, 2)
    return conv_input, conv_output, [of_big, counting.per_sample(weight, 1).squeeze(2)]


def matmul(place: Place) -> Verdicts:
    from lnpu_torch.kernels import gemm as kernels

    for m, n, k in sizes(place).products:
        a, b = whole_numbers(m, k, place=place) * 13, whole_numbers(k, n, place=place) * 7
        for chunk in (None, 16, 64, 100):
            expected = a.float() @ b.float()
            if chunk is not None:
                expected = accumulate.reduce(a.float(), b.float(), FORMATS["fp16"], chunk)
            with poisoned():
                equal = torch.equal(kernels.matmul(a, b, chunk=chunk), expected)
            yield f"matmul {m}x{n}x{k} chunk {chunk}", equal


def convolution(place: Place, step: str) -> Verdicts:
    """One of a convolution's steps, by its name in `accumulate`: a few of the ways to walk it for each geometry."""
    from lnpu_torch.kernels import gemm as kernels

    for name, full in sizes(place).geometries.items():
        g = few_samples(full)
        for last, chunk in ((False, None), (True, None), (True, 64), (False, 64)):
            if g.kernel or not last:
                operands = step_operands(g, partial(whole_numbers, place=place, last=last))[step]
                form, length = ("fp32", 10**9) if chunk is None else ("fp16", chunk)
                floats = [x.float() for x in operands]
                expected = getattr(accumulate, step)(*floats, g, FORMATS[form], length)
                with poisoned():
                    got = getattr(kernels, step)(*operands, g.pack(), chunk=chunk)
                yield f"{step} {name} {layout(last)} chunk {chunk}", torch.equal(got, expected)


def few_samples(g: ConvShape) -> ConvShape:
    return dataclasses.replace(g, batch=min(2, g.batch))


def step_operands(g: ConvShape, make: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    conv_input, conv_output = make(g.batch, g.in_channels, *g.conv_input), make(g.batch, g.out_channels, *g.conv_output)
    weight = make(g.out_channels, g.in_channels // g.groups, *g.kernel)
    return {
        "conv_forward": (conv_input, weight),
        "conv_grad_input": (conv_output, weight),
        "conv_grad_weight": (conv_input, conv_output),
    }


def layers(place: Place) -> Verdicts:
    """Whole layers, two steps each: values, counts and thresholds as with plain torch. Sums of whole numbers, exact."""
    for name, (make, shape) in layer_kinds(sizes(place)).items():
        for dtype in DTYPES[-1:] if place.rehearses else DTYPES:
            outcomes = [one_layer(make, shape, place, dtype, plain) for plain in (True, False)]
            yield f"layer {name} {dtype}", all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def layer_kinds(s: Sizes) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    c, batch, edge = s.layer_channels, s.layer_batch, s.layer_edge
    return {
        "convolution": (lambda: nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), (batch, c, edge, edge)),
        "without bias": (lambda: nn.Conv2d(c, c, 3, padding=1, bias=False), (batch, c, edge, edge)),
        "depthwise": (lambda: nn.Conv2d(c, c, 3, padding=1, groups=c), (batch, c, edge, edge)),
        "transposed": (lambda: nn.ConvTranspose2d(c, c, 4, stride=2, padding=1), (batch, c, edge, edge)),
        "linear": (lambda: nn.Linear(16 * c, 10 * c), (batch, 16 * c)),
    }


@contextmanager
def exact_sums(plain: bool) -> Iterator[None]:
    """Within this, cuDNN searches for no faster algorithm, such as Winograd's, and does not run at all if `plain`."""
    cudnn = torch.backends.cudnn
    before = cudnn.enabled, cudnn.benchmark
    cudnn.enabled, cudnn.benchmark = cudnn.enabled and not plain, False  # not by `flags`, which would change more
    try:
        yield
    finally:
        cudnn.enabled, cudnn.benchmark = before


def one_layer(
    make: Callable[[], nn.Module], shape: tuple[int, ...], place: Place, dtype: torch.dtype, plain: bool
) -> list[Tensor]:
    torch.manual_seed(1)
    layer = make().to(place.device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape) * 0.5)
    x = laid(torch.randint(-4, 5, shape).float().to(place.device), True).requires_grad_()
    lnpu.convert(layer, "fgmp")
    found: list[Tensor] = []
    with dispatch.backend("reference") if plain else place.kernels(), exact_sums(plain):
        for scale in (1.0, 2.0):
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                output = layer(x * scale)
            output.backward(torch.randint(-2, 3, output.shape).to(output))
            found.append(output.detach())
    gradients = [p.grad for p in (x, *layer.parameters()) if p.grad is not None]
    emulation: Any = layer.emulation
    return [*found, *gradients, emulation.thresholds, emulation.counters, emulation.lanes]
