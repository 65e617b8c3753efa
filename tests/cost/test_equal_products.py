"""The same multiplications cost the same, whatever the layer that does them is called."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor, nn

import lnpu_torch as lnpu
from lnpu_torch.ops import dispatch

Case = tuple[nn.Module, Callable[[Tensor], Tensor]]
"""A layer, and what makes rows [rows, channels] its input, or its result's gradient."""


def grid(*shape: int, last: bool = False) -> Callable[[Tensor], Tensor]:
    """Rows -> [N, C, *grid], for a shape (N, *grid)."""

    def place(rows: Tensor) -> Tensor:
        x = rows.reshape(*shape, -1).movedim(-1, 1)
        return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    return place


def cases(inputs: int, outputs: int, n: int, h: int, w: int) -> dict[str, Case]:
    """Layers that multiply n * h * w rows of `inputs` by the same weight."""
    sizes = (inputs, outputs, 1)
    found: dict[str, Case] = {
        "rows": (nn.Linear(inputs, outputs), lambda rows: rows),
        "sequences": (nn.Linear(inputs, outputs), lambda rows: rows.reshape(n, h * w, -1)),
        "conv1d": (nn.Conv1d(*sizes), grid(n, h * w)),
        "conv2d": (nn.Conv2d(*sizes), grid(n, h, w)),
        "channels_last": (nn.Conv2d(*sizes), grid(n, h, w, last=True)),
        "1x1 images": (nn.Conv2d(*sizes), grid(n * h * w, 1, 1)),
        "strided 1x1 images": (nn.Conv2d(*sizes, stride=2), grid(n * h * w, 1, 1)),
        "one image": (nn.Conv2d(*sizes), grid(1, n * h, w)),
        "conv3d": (nn.Conv3d(*sizes), grid(n, 1, h, w)),
        "transposed": (nn.ConvTranspose2d(*sizes), grid(n, h, w)),
    }
    weight, bias = found["rows"][0].weight.detach(), found["rows"][0].bias.detach()
    for layer, _ in found.values():
        matrix = weight.T if isinstance(layer, nn.ConvTranspose2d) else weight
        layer.weight = nn.Parameter(matrix.reshape(layer.weight.shape).clone())
        layer.bias = nn.Parameter(bias.clone())
    return found


SIZES = [(40, 24, 3, 5, 7), (20, 33, 10, 1, 1), (17, 1, 2, 8, 8), (1, 9, 2, 16, 16), (6, 5, 1, 3, 3)]


@pytest.mark.parametrize("precision", ["fgmp", lnpu.Precision(weight="fp8")], ids=["fgmp", "input in float"])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equal_products_have_equal_counts_and_prices(
    sizes: tuple[int, ...], implementation: dispatch.Choice, precision: str | lnpu.Precision
) -> None:
    torch.manual_seed(0)
    inputs, outputs, *positions = sizes
    rows, error = (torch.relu(torch.randn(prod(positions), channels)) for channels in (inputs, outputs))
    found = {}
    for name, (layer, place) in cases(*sizes).items():
        lnpu.convert(layer, precision)
        with dispatch.backend(implementation), lnpu.CostCounter(layer, vector_ops=False) as cost:
            layer(place(rows).clone().requires_grad_()).backward(place(error))
        parts = lnpu.price(cost.counts, "lnpu").rows
        assert len(parts) == 3
        counts = [(each.step, each.macs, each.pairs, each.first, each.second) for each in cost.counts.steps]
        found[name] = counts, [(part.step, part.cycles, part.energy_pj) for part in parts]
    assert all(each == found["rows"] for each in found.values()), found
