"""Estimates: from shapes alone they count what a run of the same shapes does, with independent zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch.counts.schema import Counts, StepCounts
from lnpu_torch.counts.vector_ops import NotCounted, VectorOpCounts
from lnpu_torch.files import ConfigError, validate
from lnpu_torch.profiler.training_step import OptimizerName, TrainingStep, infer


class Twice(nn.Module):
    """A layer that runs twice, a transposed and a grouped one, padding of another kind, and a product in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False)
        self.head = nn.Linear(2 * 16 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.up(torch.relu(self.shared(self.shared(x)))).flatten(1)
        return self.head(x) + (x @ x.T).sum()


GRID = [8, 8]
TABLE: dict[str, Any] = {
    "a.conv": {"kind": "Conv2d", "in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": 1, "input": [8, 8]},
    "up": {
        "kind": "ConvTranspose2d",
        "in_channels": 4,
        "out_channels": 2,
        "kernel_size": 2,
        "stride": 2,
        "input": [8, 8],
    },
    "fc": {"kind": "Linear", "in_channels": 12, "out_channels": 5},
}


def shape(entry: StepCounts) -> dict[str, Any]:
    """What does not depend on values."""
    sizes = [(calls.count, calls.sizes, calls.macs, calls.passed) for calls in entry.by_size]
    operands = [sum(each.elements) for each in (entry.first, entry.second)]
    channels = [each.lanes and each.lanes.channels for each in (entry.first, entry.second)]
    names = ("layer", "kind", "step", "calls", "macs", "padding", "not_run")
    return {**{name: getattr(entry, name) for name in names}, "sizes": sizes, "of": operands, "channels": channels}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "none"])
def test_what_a_run_counts_beside_values_is_estimated_exactly(optimizer: OptimizerName) -> None:
    model = Twice()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimated = lnpu.estimate(model, 4, input_shape=(3, 8, 8), optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.stem) is nn.Conv2d
    step = TrainingStep(lnpu.convert(model, "fp16"), torch.randn(4, 3, 8, 8), None, optimizer)
    step.warm_up()
    with lnpu.CostCounter(model) as cost:
        step.run()
    measured = cost.counts
    assert [shape(entry) for entry in estimated.steps] == [shape(entry) for entry in measured.steps]
    assert isinstance(estimated.vector_ops, VectorOpCounts) and estimated.vector_ops == measured.vector_ops
    assert estimated.in_float == measured.in_float == {} and any(":" in entry.layer for entry in estimated.steps)
    again = lnpu.estimate(model, 4, input_shape=(3, 8, 8), optimizer=optimizer)  # of a model that is converted
    assert again == estimated


def test_a_model_without_memory_is_estimated_too() -> None:
    with torch.device("meta"):
        meta, large = Twice(), nn.Linear(2**20, 2**20, bias=False)
    assert lnpu.estimate(meta, 4, input_shape=(3, 8, 8)) == lnpu.estimate(Twice(), 4, input_shape=(3, 8, 8))
    assert meta.stem.weight.is_meta
    assert lnpu.estimate(large, 8, input_shape=(2**20,)).steps[0].macs == 2**43


class Choosy(nn.Linear):
    """What it does depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_inference_is_a_forward_pass() -> None:
    model = Twice()
    estimated = lnpu.estimate(model, 2, input_shape=(3, 8, 8), training=False)
    lnpu.convert(model, "fp16")
    with lnpu.CostCounter(model) as cost:
        infer(model, torch.randn(2, 3, 8, 8))
    assert [shape(entry) for entry in estimated.steps] == [shape(entry) for entry in cost.counts.steps]
    assert estimated.vector_ops == cost.counts.vector_ops
    assert {entry.step for entry in estimated.steps} == {"forward"}


def test_densities_are_those_that_were_asked_for() -> None:
    asked = {
        "default": {"input": {"nonzero": 0.25, "fp8": 0.5}, "weight": 1, "grad_output": 0.5},
        "layers": {"head": {"grad_weight": {"grad_output": 0.75}}},
    }
    found = lnpu.estimate(Twice(), 8, asked, input_shape=(3, 8, 8))
    assert validate(Counts, found.model_dump(), "test") == found  # every sum closes
    assert found.estimate == (
        "from shapes alone, nothing was run, and no lane waits for another; "
        "zeros and FP8 elements from given densities, independent of each other"
    )
    steps = {(entry.layer, entry.step): entry for entry in found.steps}
    forward = steps["shared", "forward"]
    inside = forward.macs - forward.padding
    assert sum(map(sum, forward.pairs[1:])) == pytest.approx(inside / 4, abs=2)
    assert forward.pairs[1] == pytest.approx((0, 0, inside / 8), abs=2)
    weight = steps["shared", "grad_weight"].pairs
    assert sum(weight[1][1:]) + sum(weight[2][1:]) == pytest.approx(inside / 8, abs=4)
    assert found.densities().of("head", "grad_weight", "grad_output").nonzero == 0.75
    assert found.densities().of("head", "grad_input", "grad_output").nonzero == 0.5


def test_what_has_no_density_is_dense_and_said_to_be() -> None:
    found = lnpu.estimate(TABLE, 2, {"default": {"input": 0.5}, "layers": {"fc": {"weight": 0.5}}})
    assert "8 of 16 operands dense for want of a density" in (found.estimate or "")
    assert found.steps[1].not_run == found.steps[1].macs  # nobody needs the first layer's input's gradient
    assert found.steps[2].second.elements == (0, 0, 2 * 4 * 64)


def test_a_table_of_layers() -> None:
    found = lnpu.estimate(TABLE, 2, {"default": {"input": 1, "weight": 1, "grad_output": 1}})
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 2, 2, 2), nn.Linear(12, 5)]
    for name, layer, size in zip(TABLE, layers, [(3, 8, 8), (4, 8, 8), (12,)], strict=True):
        lnpu.convert(layer, "fp16")
        with lnpu.CostCounter(layer) as cost:
            layer(torch.rand(2, *size, requires_grad=name != "a.conv")).sum().backward()
        for mine, other in zip((e for e in found.steps if e.layer == name), cost.counts.steps, strict=True):
            assert (mine.kind, mine.step) == (other.kind, other.step)
            assert (mine.macs, mine.padding, mine.not_run) == (other.macs, other.padding, other.not_run)
            assert [calls.sizes for calls in mine.by_size] == [calls.sizes for calls in other.by_size]
            assert all(calls.passed is None for calls in mine.by_size)
    assert isinstance(found.vector_ops, NotCounted) and found.in_float is None
    assert {entry.step for entry in lnpu.estimate(TABLE, 2, training=False).steps} == {"forward"}
    assert "nothing stays in SRAM" in str(lnpu.price(found, "lnpu"))


CONV = TABLE["a.conv"]


@pytest.mark.parametrize(
    ("model", "arguments", "told"),
    [
        (TABLE, {"batch": 0}, "batch: 0 samples; a batch has 1 or more"),
        (TABLE, {"densities": {"default": {"input": 2}}}, "densities: default.input.nonzero: Input should be"),
        (TABLE, {"densities": {"layers": {"fd": {"input": 1}}}}, "densities.layers.fd: no such layer"),
        ({}, {}, "layers: none is given"),
        ({"a": {**CONV, "kernel": 3}}, {}, "layers.a: unknown key 'kernel' (nearest: kernel_size, kind)"),
        ({"a": {**CONV, "in_channels": 0}}, {}, "layers.a: in_channels: Input should be"),
        ({"a": {**CONV, "groups": 2}}, {}, "layers.a: in_channels must be divisible by groups"),
        ({"a": {**CONV, "input": [8]}}, {}, "layers.a: input: Conv2d has a grid of 2 sizes, got [8]"),
        ({"a": {**CONV, "input": [1, 1], "padding": 0}}, {}, "layers.a: "),
        ({"a": {**CONV, "output_padding": 1}}, {}, "layers.a: output_padding: for a transposed convolution alone"),
        ({"a": {**TABLE["fc"], "stride": 2}}, {}, "layers.a: stride: a linear layer has none"),
        ({"a": {key: CONV[key] for key in CONV if key != "kernel_size"}}, {}, "layers.a: kernel_size: a conv"),
        (nn.Linear(3, 2), {}, "input_shape: a model needs that of one sample"),
        (nn.Linear(3, 2), {"input_shape": (4,)}, "the model cannot take an input of shape (2, 4)"),
        (Choosy(3, 2), {"input_shape": (3,)}, "what the model does depends on values, which"),
        ({"a": {**TABLE["fc"], "input": [2**30, 2**30]}}, {"batch": 2**30}, "layers.a: "),
        ({"a": {**CONV, "in_channels": 2**30, "out_channels": 2**30}}, {}, "layers.a: "),
        ({"a": {**TABLE["fc"], "in_channels": 2**30, "out_channels": 2**30}}, {}, "2.31e+18 multiplications in"),
        ({"a": [3, 2]}, {}, "layers.a: "),
        (nn.Linear(3, 2), {"input_shape": (2**40, 2**40, 3)}, "a batch of shape (2, 1099511627776, "),
        (nn.ReLU(), {"input_shape": (4,)}, "the model has no parameter to train"),
        (nn.BatchNorm1d(4), {"input_shape": (4,)}, "no layer of this model is emulated"),
    ],
)  # fmt: skip
def test_mistakes_are_named(model: Any, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        lnpu.estimate(model, **{"batch": 2, **arguments})
    assert str(error.value).startswith(told)
