"""Emulated layers against torch's own, against their definition in float64, and their counts against brute force."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lnpu_torch as lnpu
from helpers.conv_shapes import brute_force
from lnpu_torch import Precision, Rule
from lnpu_torch.ops.quantize.reference import float_classes, round_to
from lnpu_torch.quant.formats import FORMATS

FLOAT = Precision()
CASES = {
    "linear": (nn.Linear, (7, 5), {}, (6, 7)),
    "linear 4d": (nn.Linear, (7, 5), {}, (2, 3, 2, 7)),
    "linear 3d no bias": (nn.Linear, (7, 5), {"bias": False}, (2, 3, 7)),
    "linear permuted": (nn.Linear, (7, 5), {}, (2, 7, 3, 4)),
    "linear unbatched": (nn.Linear, (7, 5), {}, (7,)),
    "conv1d": (nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}, (3, 4, 17)),
    "conv2d": (nn.Conv2d, (3, 5, 3), {"padding": 1}, (2, 3, 7, 6)),
    "conv2d strides": (nn.Conv2d, (3, 5, (3, 2)), {"stride": (2, 3), "padding": (1, 0), "bias": False}, (2, 3, 9, 8)),
    "conv2d depthwise": (nn.Conv2d, (4, 8, 3), {"groups": 4, "padding": 2, "dilation": 2}, (2, 4, 7, 7)),
    "conv2d batch of one": (nn.Conv2d, (8, 6, 3), {}, (1, 8, 9, 9)),
    "transposed 2d batch of one": (nn.ConvTranspose2d, (8, 6, 3), {"groups": 2}, (1, 8, 9, 9)),
    "conv2d 1x1": (nn.Conv2d, (4, 8, 1), {}, (2, 4, 5, 5)),
    "conv2d unbatched": (nn.Conv2d, (3, 5, 3), {}, (3, 6, 6)),
    "conv2d same": (nn.Conv2d, (3, 4, (4, 3)), {"padding": "same", "dilation": (1, 2)}, (2, 3, 6, 7)),
    "conv2d valid": (nn.Conv2d, (3, 4, 3), {"padding": "valid"}, (2, 3, 6, 6)),
    "conv2d reflect": (nn.Conv2d, (3, 4, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 3, 6, 6)),
    "conv2d replicate same": (nn.Conv2d, (3, 4, 4), {"padding": "same", "padding_mode": "replicate"}, (2, 3, 6, 6)),
    "conv2d circular": (nn.Conv2d, (3, 4, 3), {"padding": (1, 2), "padding_mode": "circular"}, (2, 3, 6, 6)),
    "conv3d": (nn.Conv3d, (2, 4, (3, 2, 1)), {"padding": 1, "stride": (1, 2, 1), "groups": 2}, (1, 2, 5, 5, 4)),
    "transposed 1d": (nn.ConvTranspose1d, (4, 6, 3), {"stride": 2, "padding": 1, "output_padding": 1}, (2, 4, 7)),
    "transposed 2d": (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "groups": 2, "dilation": 2}, (2, 4, 5, 4)),
    "transposed 2d padding": (nn.ConvTranspose2d, (3, 2, (4, 3)), {"stride": (2, 1), "padding": (1, 2)}, (2, 3, 4, 6)),
    "transposed 3d": (nn.ConvTranspose3d, (2, 3, 2), {"stride": 2}, (1, 2, 3, 2, 3)),
}


# torch says this of its own layer, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    layer_class, args, kwargs, shape = request.param
    torch.manual_seed(1)
    x = torch.randn(shape)
    return layer_class(*args, **kwargs), x.movedim(1, -1) if layer_class is nn.Linear and shape[-1] != 7 else x


def run(layer, x, error=None):
    """Output and all gradients of one call."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    torch.manual_seed(2)
    output.backward(torch.randn_like(output) if error is None else error)
    return output.detach(), x.grad, *(p.grad for p in layer.parameters())


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_all_operands_in_float_is_torch_bit_for_bit(case, dtype):
    layer, x = case
    layer, x = layer.to(dtype), x.to(dtype)
    expected = run(layer, x)
    assert all_equal(run(lnpu.convert(layer, FLOAT), x), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 6, 3), nn.ConvTranspose2d(8, 6, 3, groups=2)])
def test_channels_last_stays_torchs(layer, batch):
    x = torch.randn(batch, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    expected = run(layer, x)
    for precision in (FLOAT, "fgmp"):
        ours = run(lnpu.convert(layer, precision), x)
        assert [t.stride() for t in ours] == [t.stride() for t in expected]
        assert precision == "fgmp" or all_equal(ours, expected)
    lnpu.revert(layer)


LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("lasts", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize(
    "layer",
    [
        *(nn.Conv2d(16, 20, 3, padding=1), nn.Conv2d(8, 6, 1, stride=2, groups=2), nn.ConvTranspose2d(8, 6, 3)),
        *(nn.Conv3d(8, 6, 3), nn.Conv2d(8, 8, 3, groups=8)),
    ],
    ids=str,
)
def test_in_float_it_is_torchs_in_whichever_memory_formats(layer, lasts):
    """Of input, error and weight: torch chooses by the first and the last."""
    x = torch.randn(3, layer.in_channels, *(12, 11, 5)[: layer.weight.dim() - 2])
    error = torch.randn(lnpu.revert(layer)(x).shape)
    tensors = [
        each.contiguous(memory_format=LAST[x.dim()] if last else torch.contiguous_format)
        for each, last in zip((x, error, layer.weight.detach()), lasts, strict=True)
    ]
    layer.weight.data = tensors[2]
    expected = run(layer, *tensors[:2])
    assert all_equal(run(lnpu.convert(layer, FLOAT), *tensors[:2]), expected)


def test_all_operands_in_float_under_autocast(case):
    layer, x = case
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(layer, x)
        ours = run(lnpu.convert(layer, FLOAT), x)
    assert ours[0].dtype == torch.bfloat16
    assert all_equal(ours, expected)


def test_steps_are_products_of_rounded_operands(case):
    """With every T static, each step is torch's in float64 on the rounded operands, rounded to binary16 at the end."""
    layer, x = case
    rule = Rule(threshold=0)
    layer, x = layer.double(), x.double()
    with torch.no_grad():
        error = torch.randn_like(layer(x))
    expected = run(_rounded(layer, rule), lnpu.quantize(x, rule), lnpu.quantize(error, rule))
    expected = [round_to(result, FORMATS["fp16"]) for result in expected]
    lnpu.convert(layer, Precision(input=rule, weight=rule, grad_output=rule))
    # one binary16 ulp, for sums in another order; a padding mode's backward adds up several rounded gradients
    atol = 2**-9 if getattr(layer, "padding_mode", "zeros") != "zeros" else 2**-24
    for mine, theirs in zip(run(layer, x, error), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-10, atol=atol)


def _rounded(layer, rule):
    layer = copy.deepcopy(layer)
    layer.weight.data = lnpu.quantize(layer.weight.data, rule)
    return layer


def test_counts_by_brute_force(case):
    """Every operand through a ReLU, so that there are zeros; the tables are walked slot by slot."""
    layer, x = case
    lnpu.convert(layer, FLOAT)
    layer.weight.data.relu_()
    caught = {}
    product = _catch_product(caught)
    with product, lnpu.CostCounter(layer) as cost:
        x = x.relu().requires_grad_()
        output = layer(x)
        error = torch.randn_like(output).relu()
        output.backward(error)
    product = caught["product"]
    input, weight = caught["input"], layer.weight
    geometry = product.geometry(input.shape, weight.shape)
    shaped = (
        error.reshape(-1, error.shape[-1])
        if isinstance(layer, nn.Linear)
        else error.reshape(-1, *error.shape[-len(weight.shape) + 1 :])
    )
    grids = {product.input_side: product.cut(product.grid(input)), product.output_side: product.grid(shaped)}
    tables, outside = brute_force(
        geometry, float_classes(grids["conv_input"]), float_classes(grids["conv_output"]), float_classes(weight)
    )
    by_side = {"conv_input": tables[0], "conv_output": tables[1]}
    expected = {
        "forward": by_side[product.input_side],
        "grad_input": by_side[product.output_side],
        "grad_weight": tables[2] if product.input_side == "conv_input" else tables[2].T,
    }
    assert [entry.step for entry in cost.counts.steps] == list(expected)
    for entry in cost.counts.steps:
        assert torch.equal(torch.tensor(entry.pairs), expected[entry.step])
        assert (entry.padding, entry.not_run, entry.calls) == (outside, 0, 1)


class _catch_product:
    """Records what the layer hands to the autograd function, padding modes already applied."""

    def __init__(self, into):
        self.into = into

    def __enter__(self):
        self.original = lnpu.functional._LayerCall.apply
        lnpu.functional._LayerCall.apply = self.record

    def record(self, input, weight, bias, product, *rest):
        self.into.update(product=product, input=input.detach())
        return self.original(input, weight, bias, product, *rest)

    def __exit__(self, *_):
        lnpu.functional._LayerCall.apply = self.original


PARTIAL = {
    "input": lambda m, x: torch.autograd.grad(m(x).sum(), x),
    "a weight": lambda m, x: torch.autograd.grad(m(x).sum(), m[2].weight),
    "a bias": lambda m, x: torch.autograd.grad(m(x).sum(), m[4].bias),
    "into a weight": lambda m, x: m(x).sum().backward(inputs=[m[4].weight]),
    "into the first": lambda m, x: m(x).sum().backward(inputs=[m[0].bias, x]),
    "all": lambda m, x: m(x).sum().backward(),
    "by a hook": lambda m, x: (lambda y: (y.register_hook(lambda g: 2 * g), y.sum().backward(inputs=[x])))(m(x)),
}


@pytest.mark.parametrize("what", PARTIAL)
def test_only_gradients_that_are_asked_for_are_computed_and_counted(what):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()]
    plain = nn.Sequential(*layers, nn.Linear(512, 10))
    model, x = lnpu.convert(copy.deepcopy(plain), FLOAT), torch.randn(4, 3, 8, 8)

    def ran(net, inner):
        results = PARTIAL[what](net, inner)
        grads = [parameter.grad for parameter in net.parameters()]
        return [*(results if isinstance(results, tuple) and what in ("input", "a weight", "a bias") else ()), *grads]

    leaf = x.clone().requires_grad_()
    with lnpu.CostCounter(model) as cost:
        ours = ran(model, leaf)
    inner = x.clone().requires_grad_() * 1  # torch's counter does not take a leaf
    inner.retain_grad()
    with FlopCounterMode(display=False) as flops:
        theirs = ran(plain, inner)
    assert sum(entry.macs - entry.not_run for entry in cost.counts.steps) == flops.get_total_flops() // 2
    assert [grad is None for grad in ours] == [grad is None for grad in theirs]
    assert all_equal([g for g in ours if g is not None], [g for g in theirs if g is not None])
    if leaf.grad is not None:
        assert torch.equal(leaf.grad, inner.grad)
