"""A call that fails leaves its layer as it was."""

import copy

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu

CALLS = {
    "linear": (nn.Linear(8, 4), (2, 8), [(2, 7), (8, 2), ()]),
    "convolution": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), [(2, 3, 5, 5), (2, 4, 2, 2), (4, 2, 5), (2, 4, 5, 0)]),
    "1d": (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 5), [(2, 5, 5), (2, 4)]),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, padding=2), (2, 4, 5, 5), [(2, 6, 5, 5), (2, 4, 1, 5)]),
}


@pytest.mark.parametrize("seen", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("kind", CALLS)
def test_thresholds_and_counts_are_kept(kind: str, seen: bool) -> None:
    layer, shape, wrong = CALLS[kind]
    layer = lnpu.convert(copy.deepcopy(layer))
    if seen:
        layer(torch.randn(shape)).sum().backward()
    emulation = layer.emulation
    tensors = (emulation.thresholds, emulation.counters, emulation.lanes, emulation.call_sizes)
    before = [tensor.clone() for tensor in tensors]
    bias = layer.bias
    with lnpu.CostCounter(layer) as cost:
        for size in wrong:
            with pytest.raises((RuntimeError, ValueError)):
                layer(1000 * torch.randn(size))
        layer.bias = nn.Parameter(torch.zeros(5))
        with pytest.raises(RuntimeError):
            layer(1000 * torch.randn(shape))
    layer.bias = bias
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert not cost.counts.steps


@pytest.mark.parametrize("kind", CALLS)
def test_what_is_wrong_is_said_as_torch_says_it(kind: str) -> None:
    layer, _, wrong = CALLS[kind]
    own = lnpu.convert(copy.deepcopy(layer))
    x = torch.randn(wrong[0])
    with pytest.raises(RuntimeError) as torchs:
        layer(x)
    with pytest.raises(RuntimeError) as ours:
        own(x)
    assert str(ours.value) == str(torchs.value)
