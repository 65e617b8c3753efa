"""A module emulated with all operands in float, beside torch's own: outputs, gradients, memory layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lnpu_torch as lnpu
from lnpu_torch.nn.convert import _copied
from lnpu_torch.nn.sites import emulations

FLOAT = lnpu.Precision(result="fp32")


class Call(nn.Module):
    """A module whose forward is a function, of its arguments and of these parameters."""

    def __init__(self, function: Callable[..., Any], *parameters: Tensor) -> None:
        super().__init__()
        self.function, self.weights = function, nn.ParameterList(map(nn.Parameter, parameters))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(*inputs, *self.weights, **named)


def run(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Tensor], list[Any]]:
    """All outputs of one call, and all gradients."""
    given = [
        each.clone().requires_grad_() if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in inputs
    ]
    torch.manual_seed(3)
    outputs = [each for each in tree_leaves(module(*given, **named)) if isinstance(each, Tensor)]
    loss = sum((each * torch.arange(each.numel()).reshape(each.shape).cos()).sum() for each in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = [each.grad for each in given if isinstance(each, Tensor)]
    return outputs, [*gradients, *(parameter.grad for parameter in module.parameters())]


def check_float_twin(module: nn.Module, *inputs: Any, sites: int | None = None, **named: Any) -> list[str]:
    """Compares them; returns the names of what was emulated, of which there are `sites`, if that is given."""
    twin = lnpu.convert(_copied(module), FLOAT)
    expected, ours = run(module, inputs, named), run(twin, inputs, named)
    assert all(mine.is_contiguous() or not its.is_contiguous() for its, mine in zip(expected[0], ours[0], strict=True))
    # sums in another order
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    names = list(emulations(twin))
    assert names if sites is None else len(names) == sites
    return names
