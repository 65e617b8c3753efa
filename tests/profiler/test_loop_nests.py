"""Loop nests of a counted model: its multiplications, its tensors' roles, its densities."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import ConfigError
from lnpu_torch.profiler.loop_nests import loop_nests


class Net(nn.Module):
    """A strided, a grouped, a transposed and a linear layer; the grouped one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.shared(torch.relu(self.shared(torch.relu(self.stem(x))))))
        return self.fc(torch.relu(self.up(x)).flatten(1))


def counted(training: bool = True) -> Counts:
    torch.manual_seed(0)
    model = lnpu.convert(Net(), "fgmp")
    with lnpu.CostCounter(model) as cost:
        output = model(torch.randn(4, 3, 8, 8))
        if training:
            (output.logsumexp(1).mean() * 1024).backward()
    return cost.counts


def test_nests_multiply_what_was_counted() -> None:
    counts, model = counted(), Net()
    nests = loop_nests(model, counts, (4, 3, 8, 8))
    assert type(model.stem) is nn.Conv2d
    run = {(entry.layer, entry.step): entry for entry in counts.steps if not entry.not_run}
    assert {(nest.layer, nest.step) for nest in nests} == set(run) and len(nests) == len(run)
    densities = counts.densities()
    for nest in nests:
        assert nest.macs * nest.calls == run[nest.layer, nest.step].macs
        assert nest.calls == (2 if nest.layer == "shared" else 1)
        for tensor in nest.tensors.values():
            if tensor.density is not None:
                assert tensor.density == densities.of(nest.layer, nest.step, tensor.name).nonzero
    by_key = {(nest.layer, nest.step): nest for nest in nests}
    assert by_key["stem", "forward"].tensors["conv_input"].name == "input"
    up = by_key["up", "grad_weight"]  # a transposed convolution runs the other way
    assert (up.tensors["conv_output"].name, up.tensors["conv_input"].name) == ("input", "grad_output")
    assert up.result == "weight" and by_key["up", "forward"].result == "conv_input"


def test_another_batch_and_a_forward_pass() -> None:
    counts = counted(training=False)
    nests = loop_nests(Net(), counts, (1, 3, 8, 8))
    assert {nest.step for nest in nests} == {"forward"}
    assert [4 * nest.macs * nest.calls for nest in nests] == [entry.macs for entry in counts.steps]


def test_another_model_is_refused() -> None:
    counts = counted()
    with pytest.raises(ConfigError, match="that the model does not run: fc, shared, stem, up"):
        loop_nests(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), counts, (4, 3, 8, 8))
    other = Net()
    other.fc = nn.Linear(256, 11)
    with pytest.raises(ConfigError, match="fc: the model's layer has other channels than the one that was counted"):
        loop_nests(other, counts, (4, 3, 8, 8))
    with pytest.raises(ConfigError, match=r"the model cannot take an input of shape \(4, 3, 9, 9\)"):
        loop_nests(Net(), counts, (4, 3, 9, 9))
