"""Numbers at the edge: tensors of zeros, NaN, infinities and subnormals; one element; counts beyond int32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import lnpu_torch as lnpu
from lnpu_torch import Precision, Rule
from lnpu_torch.nn.sites import emulations
from lnpu_torch.ops.dispatch import Choice, backend
from lnpu_torch.ops.quantize.reference import UNSET

SUBNORMAL = 2.0**-140
"""A subnormal of float32, far below half of the smallest number of any format here but float32."""
PRECISIONS = ["fgmp", "fp8", "fp16"]


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {"linear": (nn.Linear(6, 5), (4, 6)), "convolution": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5))}


def closes(counts: lnpu.Counts) -> None:
    """Every MAC is somewhere, and every operand's elements are those of its calls."""
    for entry in counts.steps:
        assert entry.macs == sum(map(sum, entry.pairs)) + entry.padding + entry.not_run
        if entry.not_run < entry.macs:
            assert sum(entry.first.elements) == sum(each.count * each.sizes[0] for each in entry.by_size)


def step(layer: nn.Module, x: Tensor, error: Tensor | None = None) -> tuple[Tensor, Tensor, lnpu.Counts]:
    """Output, gradient of the input, and counts, of one call."""
    x = x.clone().requires_grad_()
    with lnpu.CostCounter(layer) as cost:
        output = layer(x)
        output.backward(torch.ones_like(output) if error is None else error)
    assert x.grad is not None
    closes(cost.counts)
    return output.detach(), x.grad, cost.counts


def operand(counts: lnpu.Counts, name: str) -> tuple[int, int, int]:
    """Elements of an input or an error: zero, FP8, wide."""
    step = "forward" if name == "input" else "grad_input"
    return next(entry.first.elements for entry in counts.steps if entry.step == step)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("value", [0.0, -0.0, SUBNORMAL])
def test_nothing_but_zeros_is_skipped_and_leaves_only_the_bias(value: float, kind: str, precision: str) -> None:
    layer, shape = layers()[kind]
    lnpu.convert(layer, precision)
    x = torch.full(shape, value)
    output, grad, counts = step(layer, x, torch.zeros_like(layer(x)))
    bias = lnpu.quantize(layer.bias.detach(), "fp16")
    assert torch.equal(output, bias.reshape(-1, *[1] * (len(shape) - 2)).expand_as(output))
    assert not grad.any() and not layer.weight.grad.any() and not layer.bias.grad.any()
    for name in ("input", "grad_output"):
        zeros, fp8, wide = operand(counts, name)
        assert zeros == zeros + fp8 + wide > 0
    # grad_input's weight is not zero, but its error is
    assert all(not any(map(any, entry.pairs[1:])) for entry in counts.steps)


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_passes_as_in_torch_and_is_counted(value: float, kind: str, precision: str) -> None:
    layer, shape = layers()[kind]
    x = torch.full(shape, value)
    expected = layer(x).detach()
    lnpu.convert(layer, precision)
    output, grad, counts = step(layer, x)
    assert torch.equal(output.isnan(), expected.isnan()) and torch.equal(output.isinf(), expected.isinf())
    assert grad.isfinite().all() and not layer.weight.grad.isfinite().any()
    elements = operand(counts, "input")
    assert elements == ((0, x.numel(), 0) if precision == "fp8" else (0, 0, x.numel()))


@pytest.mark.parametrize("precision", ["fgmp", "fp8"])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_tensor_that_says_nothing_of_its_scale_sets_no_threshold(value: float, precision: str) -> None:
    """So that one bad batch, which a GradScaler skips, does not change how the next one is rounded."""
    torch.manual_seed(0)
    spoilt, fresh = (lnpu.convert(nn.Linear(6, 5), precision) for _ in range(2))
    fresh.load_state_dict(spoilt.state_dict())
    good, bad = torch.randn(4, 6), torch.full((4, 6), value)
    step(spoilt, bad)
    assert spoilt.emulation.thresholds[0].tolist() == [UNSET, UNSET]
    assert all(torch.equal(a, b) for a, b in zip(step(spoilt, good)[:2], step(fresh, good)[:2], strict=True))
    before = spoilt.emulation.thresholds[0].tolist()
    step(spoilt, bad)
    assert spoilt.emulation.thresholds[0].tolist() == before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_element(precision: str) -> None:
    for layer, shape in ((nn.Linear(1, 1, bias=False), (1, 1)), (nn.Conv2d(1, 1, 1, bias=False), (1, 1, 1, 1))):
        lnpu.convert(layer, precision)
        with torch.no_grad():
            layer.weight.fill_(0.75)
        output, grad, counts = step(layer, torch.full(shape, 3.0), torch.full(shape, 0.5))
        assert (output.item(), grad.item(), layer.weight.grad.item()) == (2.25, 0.375, 1.5)
        assert [(entry.macs, sum(map(sum, entry.pairs))) for entry in counts.steps] == [(1, 1)] * 3


def test_macs_beyond_int32_in_one_call() -> None:
    layer = lnpu.convert(nn.Linear(1024, 1024, bias=False), "fp16")
    x = torch.ones(2048 + 1, 1024)
    x[:, 0] = 0
    _, _, counts = step(layer, x, torch.ones(2049, 1024))
    macs = 2049 * 1024 * 1024
    assert macs > 2**31
    forward, _, grad_weight = counts.steps
    assert [entry.macs for entry in counts.steps] == [macs] * 3
    assert sum(forward.pairs[0]) == sum(map(sum, grad_weight.pairs[:1])) == 2049 * 1024
    assert sum(forward.pairs[2]) == sum(grad_weight.pairs[2]) == macs - 2049 * 1024
    assert lnpu.price(counts, "dense-fp16").total.executed == 3 * macs


def test_counters_that_have_grown_beyond_int32() -> None:
    """As after a long run: what comes on top is counted to the last one."""
    layer, shape = layers()["convolution"]
    lnpu.convert(layer, "fp16")
    x = torch.randn(shape)
    _, _, expected = step(layer, x)
    layer.emulation.counters.add_(2**31 - 5)
    layer.zero_grad()  # sums of gradients pass the chip, too
    _, _, counts = step(layer, x)
    assert counts.steps == expected.steps
    assert counts * 2**40 == lnpu.Counts.merge([counts * 2**39, counts * 2**39])
    assert (counts * 2**40).steps[0].macs == 2**40 * counts.steps[0].macs


@pytest.mark.parametrize("precision", ["fp8", "fp16"])
@pytest.mark.parametrize("channels", [1, 255, 256])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_groups_of_as_many_channels_as_a_byte_counts_and_of_one_more(
    channels: int, precision: str, implementation: Choice
) -> None:
    layer = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2, bias=False)
    nn.init.ones_(layer.weight)
    lnpu.convert(layer, precision)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.ones(2, 2 * channels, 3, 2).contiguous(memory_format=memory_format)
        with backend(implementation):
            output, _, counts = step(layer, x, torch.ones_like(x))
        assert output.max() == 6 * channels
        group = 1 if precision == "fp8" else 2
        for entry in counts.steps:
            assert entry.pairs[group][group] == entry.macs - entry.padding > 0


@pytest.mark.parametrize("kind", layers())
def test_a_batch_of_1_and_of_4096(kind: str) -> None:
    layer, shape = layers()[kind]
    lnpu.convert(layer, Precision(input=Rule(threshold=0), weight=Rule(threshold=0), grad_output=Rule(threshold=0)))
    x = torch.randn(1, *shape[1:]).relu()
    output, grad, one = step(layer, x)
    weight = layer.weight.grad.clone()
    layer.zero_grad()
    outputs, grads, many = step(layer, x.expand(4096, *shape[1:]), torch.ones(4096, *output.shape[1:]))
    assert torch.equal(outputs, output.expand_as(outputs)) and torch.equal(grads, grad.expand_as(grads))
    torch.testing.assert_close(layer.weight.grad, 4096 * weight, rtol=2**-10, atol=1e-3)  # the sum is rounded to FP16
    for entry, times in zip(one.steps, many.steps, strict=True):
        assert times.macs == 4096 * entry.macs and times.padding == 4096 * entry.padding
        assert times.pairs == tuple(tuple(4096 * count for count in row) for row in entry.pairs)


def test_a_layer_that_is_never_called_has_no_counts_and_no_threshold(tmp_path) -> None:
    model = lnpu.convert(nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)}), "fgmp")
    with lnpu.CostCounter(model) as cost:
        model["used"](torch.randn(2, 4)).sum().backward()
    assert {entry.layer for entry in cost.counts.steps} == {"used"}
    assert model["idle"].emulation.thresholds.unique().tolist() == [UNSET]
    lnpu.load_thresholds(model, lnpu.thresholds(model))
    cost.save(tmp_path / "counts.json")
    assert {row.layer for row in lnpu.price(lnpu.Counts.load(tmp_path / "counts.json"), "lnpu").rows} >= {"used"}
    assert all(layer.emulation.counting for layer in emulations(model).values())


def test_a_layer_called_many_times_a_step_counts_every_call_and_keeps_its_threshold() -> None:
    layer = lnpu.convert(nn.Linear(8, 8), "fgmp")
    x = torch.randn(3, 8)
    step(layer, x)
    before = layer.emulation.thresholds[:, 0].clone()
    with lnpu.CostCounter(layer) as cost:
        output = x
        for _ in range(20):
            output = layer(output)
        assert torch.equal(layer.emulation.thresholds[:, 0], before)  # until the backward has run
        output.sum().backward()
    closes(cost.counts)
    found = {entry.step: (entry.calls, entry.macs, entry.not_run) for entry in cost.counts.steps}
    each = 3 * 8 * 8
    assert found == {
        "forward": (20, 20 * each, 0),
        "grad_input": (20, 20 * each, each),
        "grad_weight": (20, 20 * each, 0),
    }


@pytest.mark.parametrize("kind", layers())
def test_frozen_weights_and_inputs_without_grad(kind: str) -> None:
    layer, shape = layers()[kind]
    lnpu.convert(layer, "fgmp").requires_grad_(False)
    for wants in (True, False):
        x = torch.randn(shape, requires_grad=wants)
        with lnpu.CostCounter(layer) as cost:
            output = layer(x)
            if wants:
                output.sum().backward()
        closes(cost.counts)
        ran = {entry.step for entry in cost.counts.steps if entry.not_run < entry.macs}
        assert ran == ({"forward", "grad_input"} if wants else {"forward"})
        assert output.requires_grad is wants and layer.weight.grad is None


EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "no inputs": (lambda: nn.Linear(0, 3), (2, 0)),
    "no inputs, one sample": (lambda: nn.Linear(0, 3), (0,)),
    "no outputs": (lambda: nn.Linear(3, 0), (2, 3)),
    "nothing at all": (lambda: nn.Linear(0, 0), (2, 0)),
    "no rows": (lambda: nn.Linear(3, 4), (2, 0, 3)),
    "no images": (lambda: nn.Conv2d(4, 4, 3, groups=2), (0, 4, 5, 5)),
    "no volumes": (lambda: nn.Conv3d(3, 4, 3, padding="same"), (0, 3, 5, 5, 5)),
    "no images, transposed": (lambda: nn.ConvTranspose2d(4, 4, 3, stride=2), (0, 4, 5, 5)),
    "no channels": (lambda: nn.Conv2d(0, 4, 3, groups=2), (2, 0, 5, 5)),
    "no channels, one dimension": (lambda: nn.Conv1d(0, 4, 3, bias=False), (2, 0, 5)),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("precision", [*PRECISIONS, Precision(input="fp8", accumulate="fp16")], ids=str)
@pytest.mark.parametrize("name", EMPTY)
def test_what_is_empty_gives_what_torch_gives(name: str, precision: str | Precision) -> None:
    make, shape = EMPTY[name]
    layer = make()
    results = []
    for converted in (False, True):
        own = copy.deepcopy(layer)
        own = lnpu.convert(own, precision) if converted else own
        x = torch.ones(shape, requires_grad=True)
        with lnpu.CostCounter(own) if converted else nullcontext() as cost:
            output = own(x)
            output.sum().backward()
        results.append([output.detach(), x.grad, *(parameter.grad for parameter in own.parameters())])
    assert cost is not None
    closes(cost.counts)
    assert all(entry.macs == 0 for entry in cost.counts.steps)
    assert str(lnpu.price(cost.counts, "lnpu"))
    expected, found = results
    assert [each.shape for each in found] == [each.shape for each in expected]
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", ["input", "weight", "bias", "error"])
@pytest.mark.parametrize("kind", layers())
def test_a_view_with_the_negative_bit_is_what_it_stands_for(kind: str, name: str) -> None:
    results = []
    for negative in (False, True):
        layer, shape = layers()[kind]
        lnpu.convert(layer)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        tensors = {"input": x, "weight": layer.weight, "bias": layer.bias, "error": torch.ones_like(layer(x))}
        tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        plain = -tensors[name]
        tensors[name] = torch._neg_view(tensors[name]) if negative else plain
        tensors["input"].requires_grad_()
        parameters = {key: tensors[key].requires_grad_() for key in ("weight", "bias")}
        output = torch.func.functional_call(layer, parameters, (tensors["input"],))
        output.backward(tensors["error"])
        results.append([output, *(tensors[key].grad for key in ("input", "weight", "bias"))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_imaginary_part_of_a_conjugate_has_its_sign() -> None:
    layer, z = lnpu.convert(nn.Linear(1, 1, bias=False)), torch.tensor([[1 + 2j]])
    assert float(layer(z.conj().imag).detach() / layer.weight.detach()) == pytest.approx(-2, rel=0.1)
