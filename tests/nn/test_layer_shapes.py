"""Layers of random shapes: counts by walking every slot, results by torch's own layer in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lnpu_torch as lnpu
from helpers.conv_shapes import brute_force, make
from lnpu_torch import Precision, Rule
from lnpu_torch.ops.quantize.reference import float_classes, round_to
from lnpu_torch.quant.formats import FORMATS

RULE = Rule(threshold=0)
STATIC = Precision(input=RULE, weight=RULE, grad_output=RULE)
few = settings(max_examples=20, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
conv_output = st.integers(1, 3)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any kind, and an input that fits it, with zeros in it."""
    dims, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(1, 2))
    several = st.tuples(*[conv_output] * dims)
    kernel, stride, dilation = draw(several), draw(several), draw(several)
    padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    least = [1 if transposed else max(1, r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    grid = [low + draw(st.integers(0, 3)) for low in least]
    if transposed:  # its output must have a place in every dimension
        grid = [max(n, 1 + -(-(2 * p - r + 1) // s)) for n, p, r, s in zip(grid, padding, reach, stride, strict=True)]
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layer = kind(*channels, kernel, bias=draw(st.booleans()), **options)
    return layer, torch.randn(draw(conv_output), channels[0], *grid)


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape = draw(st.lists(conv_output, max_size=3))
    return nn.Linear(inputs, outputs, bias=draw(st.booleans())), torch.randn(*shape, inputs)


@few
@given(st.one_of(convolutions(), linears()), st.integers(0, 2**32))
def test_counts_and_results(drawn: tuple[nn.Module, Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = drawn[0].double(), drawn[1].double().relu()
    layer.weight.data *= torch.rand_like(layer.weight) < 0.7
    with torch.no_grad():
        error = torch.randn_like(layer(x)).relu() * 2.0**-3
    plain = copy.deepcopy(layer)
    plain.weight.data = lnpu.quantize(plain.weight.data, RULE)
    rounded = [lnpu.quantize(each, RULE) for each in (x, error)]
    expected = [round_to(each, FORMATS["fp16"]) for each in run(plain, *rounded)]
    lnpu.convert(layer, STATIC)
    with lnpu.CostCounter(layer) as cost:
        found = run(layer, x, error)
    for mine, theirs in zip(found, expected, strict=True):
        # a binary16 ulp, for sums in another order
        torch.testing.assert_close(mine, theirs, rtol=2**-10, atol=2**-24)
    tables, outside = walked(layer, *rounded, plain.weight.detach())
    assert [entry.step for entry in cost.counts.steps] == ["forward", "grad_input", "grad_weight"]
    for entry, table in zip(cost.counts.steps, tables, strict=True):
        nonzero = torch.tensor(entry.pairs)[1:, 1:].sum()
        assert (int(nonzero), sum(map(sum, entry.pairs)), entry.padding) == (
            int(table[1:, 1:].sum()),
            int(table.sum()),
            outside,
        )


def run(layer: nn.Module, x: Tensor, error: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    output.backward(error)
    return [output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def walked(layer: nn.Module, x: Tensor, error: Tensor, weight: Tensor) -> tuple[list[Tensor], int]:
    """The tables of the three steps, zeros against the rest, and the macs outside the image: every slot walked."""
    if isinstance(layer, nn.Linear):
        conv_input, conv_output = x.reshape(-1, x.shape[-1]), error.reshape(-1, error.shape[-1])
        geometry = make(len(conv_input), conv_input.shape[1], conv_output.shape[1], 1, *[()] * 5)
    else:
        conv_input, conv_output = (error, x) if layer.transposed else (x, error)
        options = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        geometry = make(
            len(x), conv_input.shape[1], conv_output.shape[1], layer.groups, tuple(conv_input.shape[2:]), *options
        )
    tables, outside = brute_force(geometry, *map(float_classes, (conv_input, conv_output, weight)))
    transposed = not isinstance(layer, nn.Linear) and layer.transposed
    return [tables[1], tables[0], tables[2].T] if transposed else list(tables), outside
