"""Whole layers on the Triton backend, in Triton's interpreter: counts and thresholds of the reference, same values."""

from collections import Counter

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch import Precision, Rule
from lnpu_torch.ops import dispatch

pytest.importorskip("triton")
pytestmark = pytest.mark.triton_interpreter
PRECISIONS = {
    "fgmp": "fgmp",
    "mixed": Precision(input="fp8", weight=Rule(low="e5m2"), grad_output=Rule(rounding="stochastic")),
    "float weight": Precision(input="fgmp", grad_output="fp16"),
    "accumulator": Precision(input="fgmp", weight="fgmp", grad_output="fgmp", accumulate="fp16", chunk=16),
    "1-6-9": Precision(input=Rule(high="e6m9"), weight=Rule(window=5), grad_output="fgmp", result="fp32"),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after another; tests/kernels has many."""
    from lnpu_torch.kernels import count

    monkeypatch.setattr(count, "PROGRAMS", 2)


def layers():
    return (
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), (2, 3, 7, 5)),
        (nn.Conv2d(4, 4, 4, padding="same", groups=2), (2, 4, 5, 5)),
        (nn.ConvTranspose2d(3, 2, 3, stride=2), (2, 3, 4, 4)),
        (nn.Linear(9, 5), (2, 3, 9)),
    )


def added_up(counts):
    """Vector operations by kind and phase; the ops' own names differ with the backend."""
    sums = Counter()
    for entry in counts.vector_ops.entries:
        sums[entry.kind, entry.phase, "operations"] += entry.operations
        sums[entry.kind, entry.phase, "special"] += entry.special
    assert not counts.vector_ops.uncounted
    return {key: value for key, value in sums.items() if value}


def two_steps(layer, shape, backend):
    torch.manual_seed(1)
    x, results = torch.randn(shape, requires_grad=True), []
    with dispatch.backend(backend), lnpu.CostCounter(layer) as cost:
        for scale in (1.0, 8.0):
            output = layer(x * scale)
            output.backward(torch.randn_like(output))
            results.append(output.detach())
    return [*results, x.grad, *(p.grad for p in layer.parameters())], cost.counts, layer.emulation.thresholds


@pytest.mark.parametrize(
    ("name", "index"), [("fgmp", index) for index in range(4)] + [(name, 0) for name in PRECISIONS if name != "fgmp"]
)
def test_layer(name, index):
    precision, outcomes = PRECISIONS[name], []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        layer, shape = layers()[index]
        outcomes.append(two_steps(lnpu.convert(layer, precision), shape, backend))
    (values, counts, thresholds), (ours, our_counts, our_thresholds) = outcomes
    assert our_counts.steps == counts.steps and added_up(our_counts) == added_up(counts)
    assert torch.equal(our_thresholds, thresholds)
    for mine, theirs in zip(ours, values, strict=True):
        # sums in another order, whose terms reach 16, where binary16's step is 2^-6; rounded to that, with a bias twice
        torch.testing.assert_close(mine, theirs, rtol=2**-8, atol=2**-6)


@pytest.mark.parametrize(("precision", "ours"), [("fgmp", 2), (PRECISIONS["1-6-9"], 0)], ids=["fp16", "fp32"])
def test_a_large_linear_layer_is_rounded_as_it_is_multiplied(monkeypatch, precision, ours):
    """If its result is binary16; but for the weight's gradient, whose first operand comes turned over."""
    from lnpu_torch.ops import gpu

    calls, multiply = [], gpu.gemm.matmul
    monkeypatch.setattr(gpu, "LARGE", 6 * 5)
    monkeypatch.setattr(gpu.gemm, "matmul", lambda *args, **options: calls.append(args) or multiply(*args, **options))
    outcomes = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        outcomes.append(two_steps(lnpu.convert(nn.Linear(9, 5), precision), (31, 9), backend))
    (values, counts, _), (found, found_counts, _) = outcomes
    assert found_counts.steps == counts.steps and len(calls) == 2 * ours
    for mine, theirs in zip(found, values, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-8, atol=2**-6)


def test_a_large_linear_layers_bias_is_added_before_the_sum_is_rounded(monkeypatch):
    from lnpu_torch.ops import gpu

    monkeypatch.setattr(gpu, "LARGE", 1)
    torch.manual_seed(0)
    x, weight = (torch.randint(-8, 9, shape).half() for shape in ((40, 24), (20, 24)))
    bias = torch.randn(20)
    expected = (x.float() @ weight.float().T + bias).half()
    for kernel in (weight, weight.T.contiguous().T):
        assert torch.equal(gpu.BACKEND.half_linear(x, kernel, bias, True), expected)
    assert torch.equal(gpu.BACKEND.half_linear(x, weight, None, True), (x.float() @ weight.float().T).half())
    assert gpu.BACKEND.half_linear(x, weight, bias, False).dtype == torch.float32


@pytest.mark.parametrize(
    ("index", "last", "autocast"),
    [
        *((index, True, None) for index in range(4)),
        *((index, False, None) for index in (0, 2)),
        *((index, True, torch.float16) for index in (1, 3)),
        *((index, True, torch.bfloat16) for index in (0, 2)),
    ],
    ids=str,
)
def test_layer_exactly(index, last, autocast):
    """Whole numbers, whose sums are exact in any order, and a bias that is not: it is added before the rounding."""
    exactly_alike(index, last, autocast, "fgmp")


@pytest.mark.parametrize("index", range(4))
def test_accumulator_exactly(index):
    exactly_alike(index, True, torch.float16, PRECISIONS["accumulator"])


@pytest.mark.parametrize(("index", "dtype"), list(enumerate([torch.float16, torch.bfloat16] * 2)), ids=str)
def test_layer_in_half_precision_exactly(index, dtype):
    exactly_alike(index, True, None, "fgmp", dtype)


def exactly_alike(index, last, autocast, precision, dtype=torch.float32):
    outcomes = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        layer, shape = layers()[index]
        with torch.no_grad():
            layer.weight.copy_(torch.randint(-8, 9, layer.weight.shape))
            x, error = torch.randint(-8, 9, shape).to(dtype), None
            if layer.bias is not None:
                layer.bias.copy_(torch.randn(layer.bias.shape) * 9)
        if last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        x.requires_grad_()
        lnpu.convert(layer.to(dtype), precision)
        with dispatch.backend(backend), torch.autocast("cpu", autocast, enabled=autocast is not None):
            output = layer(x)
            error = torch.randint(-8, 9, output.shape).to(output.dtype)
            output.backward(error)
        outcomes.append([output.detach(), x.grad, *(p.grad for p in layer.parameters())])
        assert output.dtype == (autocast or dtype)
    for ours, expected in zip(*outcomes[::-1], strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


class Scores(nn.Module):
    """As attention multiplies queries by keys, and what comes of it by values."""

    def forward(self, query, key, value):
        return (query @ key.mT).clamp(-8, 8) @ value


@pytest.mark.parametrize("name", ["fgmp", "accumulator", "1-6-9"])
def test_products_of_activations_exactly(name, monkeypatch):
    """Multiplied in binary16, and summed in float32 or by our kernel."""
    from lnpu_torch.nn import gemms

    outcomes, halves, multiply = [], [], gemms.half_precision.half_matmul
    monkeypatch.setattr(gemms.half_precision, "half_matmul", lambda *args: halves.append(args) or multiply(*args))
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        operands = [torch.randint(-3, 4, shape).float().requires_grad_() for shape in ((2, 5, 4), (2, 6, 4), (2, 6, 3))]
        model = lnpu.convert(Scores(), PRECISIONS[name])
        with dispatch.backend(backend), lnpu.CostCounter(model) as cost:
            output = model(*operands)
            output.backward(torch.randint(-3, 4, output.shape).float())
        outcomes.append((cost.counts.steps, output, *(x.grad for x in operands)))
    (steps, *expected), (our_steps, *ours) = outcomes
    assert our_steps == steps and len(steps) == 6
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
    assert len(halves) == {"fgmp": 6, "accumulator": 0, "1-6-9": 0}[name]


@pytest.mark.parametrize("rule", ["fgmp", "fp8", "fp16"])
def test_quantize(rule):
    x = torch.randn(7, 33)
    with dispatch.backend("triton"):
        ours = lnpu.quantize(x, rule, return_classes=True)
    with dispatch.backend("reference"):
        expected = lnpu.quantize(x, rule, return_classes=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
