"""Other default devices, fake tensors, and the package imported again: what surrounds a layer does not change it."""

from __future__ import annotations

import ast
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import lnpu_torch as lnpu
from lnpu_torch.ops import dispatch

PACKAGE = Path(lnpu.__file__).parent
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
FACTORIES |= {"scalar_tensor", "tensor", "zeros"}


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default device": default_device,
    "device": lambda: torch.device("meta"),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(324, 5)
    )


def trained(model: nn.Module, precision: str | lnpu.Precision, x: Tensor) -> tuple[list[Tensor], lnpu.Counts]:
    """Outputs, gradients and thresholds of two steps, and their counts."""
    lnpu.convert(model, precision)
    found = []
    with lnpu.CostCounter(model) as cost:
        for _ in range(2):
            output = model(x)
            output.square().sum().backward()
            found.append(output.detach())
    found += [parameter.grad for parameter in model.parameters()]
    return [*found, *lnpu.thresholds(model).values()], cost.counts


@pytest.mark.parametrize(
    "precision",
    ["fgmp", "fp8", lnpu.Precision(input=lnpu.Rule(rounding="stochastic")), lnpu.Precision(accumulate="fp16")],
    ids=["fgmp", "fp8", "stochastic", "fp16 accumulator"],
)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_another_default_device_changes_nothing(
    name: str, implementation: dispatch.Choice, precision: str | lnpu.Precision
) -> None:
    model, x = network(), torch.randn(4, 3, 16, 16)
    other = copy.deepcopy(model)
    with dispatch.backend(implementation):
        torch.manual_seed(1)
        expected, counts = trained(model, precision, x)
        torch.manual_seed(1)
        with SURROUNDINGS[name]():
            found, others = trained(other, precision, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert counts == others


@pytest.mark.parametrize("folder", ["lnpu_torch", "kernels"])
def test_every_factory_of_torch_names_its_device(folder: str) -> None:
    calls = [
        (file.name, node)
        for file in (PACKAGE.parent / folder).rglob("*.py")
        if file.name != "profile.py"  # whose input goes where the user's model does
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}
    ]
    silent = [(name, ast.unparse(call)) for name, call in calls if "device" not in {each.arg for each in call.keywords}]
    assert calls
    assert not silent


def test_fake_tensors_give_shapes() -> None:
    model = lnpu.convert(network())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(torch.randn(4, 3, 16, 16))).shape == (4, 5)
    with FakeTensorMode():
        made = lnpu.convert(network())
        output = made(torch.randn(4, 3, 16, 16))
        output.sum().backward()
        assert output.shape == (4, 5)
        assert made[0].weight.grad.shape == (8, 3, 3, 3)


def test_the_package_can_be_imported_again() -> None:
    def step(package: ModuleType, model: nn.Module) -> tuple[Tensor, object]:
        model.zero_grad()
        with package.CostCounter(model) as cost:
            output = model(torch.ones(2, 8))
            output.sum().backward()
        return output.detach(), cost.counts.model_dump()

    layer = nn.Linear(8, 8)
    old = lnpu.convert(copy.deepcopy(layer))
    before = step(lnpu, old)
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lnpu_torch"}
    for name in modules:
        del sys.modules[name]
    try:
        again = importlib.import_module("lnpu_torch")
        assert again is not lnpu
        new = again.convert(copy.deepcopy(layer))
        output, counts = step(again, new)
        assert torch.equal(output, before[0]) and counts == before[1]
        after = step(lnpu, old)
        assert torch.equal(after[0], before[0]) and after[1] == before[1]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "lnpu_torch"]:
            del sys.modules[name]
        sys.modules.update(modules)
