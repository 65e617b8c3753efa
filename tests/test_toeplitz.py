"""Convolutions over grids smaller than their kernels, as products with Toeplitz matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lnpu_torch as lnpu
from lnpu_torch.nn import gemms as products
from lnpu_torch.nn.gemms import Accumulator, Convolution
from lnpu_torch.ops.gemm import toeplitz
from lnpu_torch.ops.pair_counts.conv_shape import Geometry

pytestmark = pytest.mark.skipif(not products.ONEDNN, reason="torch is built without oneDNN")

BATCH = toeplitz.FEW + 1
# input channels, output channels, grid, kernel, stride, padding, dilation
CASES = [
    (3, 5, (2, 2), (3, 3), (1, 1), (1, 1), (1, 1)),
    (4, 2, (1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    (4, 2, (1, 1), (3, 5), (1, 1), (2, 2), (1, 1)),
    (1, 1, (2, 2), (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 2, (3, 3), (5, 5), (1, 2), (2, 2), (1, 1)),
    (2, 3, (2, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 3, (1, 2), (3, 3), (1, 1), (2, 1), (2, 1)),
]


def integers(*shape: int, seed: int) -> Tensor:
    """Whose sums are exact in any order."""
    return torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed)).float()


def convolution(case: tuple, batch: int = BATCH) -> tuple[Convolution, Tensor, Tensor]:
    channels, filters, grid, kernel, stride, padding, dilation = case
    product = Convolution(stride, padding, dilation, 1, False, (0, 0), (0, 0))
    return product, integers(batch, channels, *grid, seed=0), integers(filters, channels, *kernel, seed=1)


def steps(product: Convolution, x: Tensor, weight: Tensor, by: Accumulator) -> list[Tensor]:
    """The results of all three, and the gradient of a bias."""
    out = product.forward(x, weight, torch.arange(len(weight)).float(), by)
    error = integers(*out.shape, seed=2)
    weight_grad, bias_grad = product.grad_weight(error, x, weight.shape, False, (True, True), by)
    assert weight_grad is not None and bias_grad is not None
    return [out, product.grad_input(error, weight, x.shape, False, by), weight_grad, bias_grad]


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_steps_are_torchs(monkeypatch: pytest.MonkeyPatch, case: tuple, last: bool) -> None:
    calls, op = [], toeplitz.toeplitz
    monkeypatch.setattr(toeplitz, "toeplitz", lambda *a: calls.append(a[0]) or op(*a))
    product, *operands = convolution(case)
    form = torch.channels_last if last else torch.contiguous_format
    x, weight = (operand.contiguous(memory_format=form) for operand in operands)
    expected = steps(product, x, weight, Accumulator())
    assert not calls
    found = steps(product, x, weight, Accumulator(reordered=True))
    assert calls == ["small_from_big", "weight_from_both", "big_from_small"]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with torch.backends.mkldnn.flags(enabled=False):
        found = steps(product, x, weight, Accumulator(reordered=True))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_reaches_as_far_as_in_torch(value: float) -> None:
    """In the input; of a weight, some of torch's convolutions multiply it with the padding."""
    for case in CASES:
        product, x, weight = convolution(case)
        x[0, 0, 0, 0] = value
        pairs = zip(*(steps(product, x, weight, Accumulator(reordered=new)) for new in (True, False)), strict=True)
        assert all(torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5)) for a, b in pairs)


def test_where_it_suits() -> None:
    for case in CASES:
        product, x, weight = convolution(case)
        geometry = product.geometry(x.shape, weight.shape)
        assert toeplitz.suits(geometry) and product.last(x, geometry, Accumulator())
        fewer = product.geometry(x[1:-1].shape, weight.shape)
        assert not toeplitz.suits(fewer) and not product.last(x[1:-1], fewer, Accumulator())

    def suits(groups: int = 1, grid: int = 2, kernel: int = 3, stride: int = 1, padding: int = 1) -> bool:
        product = Convolution((stride,) * 2, (padding,) * 2, (1, 1), groups, False, (0, 0), (0, 0))
        shapes = (BATCH, 2, grid, grid), (4, 2 // groups, kernel, kernel)
        geometry: Geometry = product.geometry(*map(torch.Size, shapes))
        return toeplitz.suits(geometry)

    assert suits()
    assert not suits(groups=2)
    assert not suits(grid=3)
    assert not suits(kernel=2, padding=0)
    assert not suits(padding=2)  # outer positions do not meet all others
    assert not suits(grid=1, padding=3, stride=2)  # nor any


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_opcheck_and_flops() -> None:
    for case in CASES[:4]:
        product, x, weight = convolution(case)
        geometry = product.geometry(x.shape, weight.shape)
        error = integers(*geometry.shape("small"), seed=2)
        calls = ("small_from_big", x, weight), ("big_from_small", error, weight), ("weight_from_both", x, error)
        for call in calls:
            torch.library.opcheck(torch.ops.lnpu.toeplitz.default, (*call, geometry.pack()))
            with FlopCounterMode(display=False) as flops:
                torch.ops.lnpu.toeplitz(*call, geometry.pack())
            assert flops.get_total_flops() == 2 * geometry.slots


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_emulated_layers_take_it_and_count_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    found, calls, op = [], [], toeplitz.toeplitz
    for few in (toeplitz.FEW, 2**62):
        for compiled in (False, True):
            torch.compiler.reset()
            monkeypatch.setattr(toeplitz, "FEW", few)
            noted = op if compiled else lambda *a: calls.append(a[0]) or op(*a)
            monkeypatch.setattr(toeplitz, "toeplitz", noted)
            layer = nn.Conv2d(3, 5, 3, padding=1)
            with torch.no_grad():
                layer.weight.copy_(integers(5, 3, 3, 3, seed=0))
                layer.bias.zero_()
            model = lnpu.convert(nn.Sequential(layer), "fgmp")
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            x = integers(BATCH, 3, 2, 2, seed=1).requires_grad_()
            with lnpu.CostCounter(model) as cost:
                out = run(x)
                out.backward(integers(*out.shape, seed=2))
            assert out.is_contiguous()
            assert compiled or len(calls) == 3 * (few < BATCH)
            calls.clear()
            found.append((cost.counts.steps, out, x.grad, layer.weight.grad, layer.bias.grad))
    torch.compiler.reset()
    for steps_, *tensors in found[1:]:
        assert steps_ == found[0][0]
        assert all(torch.equal(*pair) for pair in zip(tensors, found[0][1:], strict=True))


def test_a_step_in_float_stays_torchs_own() -> None:
    layer = lnpu.nn.Conv2d(8, 8, 3, padding=1, precision=lnpu.Precision())
    x = torch.randn(BATCH, 8, 2, 2)
    assert torch.equal(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias, padding=1))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_same_padding(kernel: int) -> None:
    """Of an even kernel some is put there beforehand."""
    layer = lnpu.nn.Conv2d(3, 5, kernel, padding="same", bias=False, precision="fp16")
    weight = integers(5, 3, kernel, kernel, seed=0)
    with torch.no_grad():
        layer.weight.copy_(weight)
    x = integers(BATCH, 3, 2, 2, seed=1)
    expected = nn.functional.conv2d(x, weight, padding="same")
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("result", ["fp16", "fp32"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_an_output_may_be_changed_in_place(result: str, stride: int, last: bool) -> None:
    """Of one position, too, where a turned grid lies in memory as the grid itself."""
    precision = lnpu.Precision(input=lnpu.Rule(), weight=lnpu.Rule(), grad_output=lnpu.Rule(), result=result)
    x = integers(BATCH, 3, 2, 2, seed=0)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 5, 3, stride=stride, padding=1, bias=False), nn.ReLU(inplace)]
        model = lnpu.convert(nn.Sequential(*layers), precision)
        model(x).sum().backward()
        gradients.append(model[0].weight.grad)
    assert torch.equal(*gradients)
