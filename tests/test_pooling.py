"""The max pooling of converted models: torch's own, bit for bit, of which little is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lnpu_torch as lnpu
from lnpu_torch import pooling

NAN, INF = torch.nan, torch.inf
# shape, kernel, stride, padding
CASES = [
    ((2, 3, 8, 8), 2, 2, 0),
    ((3, 6, 4), 2, 2, 0),
    ((1, 1, 2, 2), 2, 2, 0),
    ((2, 3, 7, 9), 2, 2, 0),
    ((2, 3, 4, 3), 2, 2, (1, 0)),
    ((2, 3, 56, 40), 3, 2, 1),
    ((2, 3, 13, 35), 3, 2, 0),
    ((2, 3, 13, 35), (3, 2), (1, 3), (1, 1)),
    ((5, 9, 9), (1, 5), (4, 1), (0, 2)),
    ((2, 3, 5, 6), 4, 5, 2),
    ((64, 16, 32, 32), 2, 2, 0),
]


def values(shape: tuple[int, ...], *special: float) -> Tensor:
    """Few different numbers, so that many elements of a window are equal; and special ones among them."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([-1.0, -0.0, 0.0, 0.5, 2.0, *special])
    return kinds[torch.randint(len(kinds), shape, generator=generator)]


def results(pool: nn.Module, x: Tensor) -> tuple[str, Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    output = pool(leaf)
    output.backward(torch.arange(output.numel()).reshape(output.shape) + 0.1)
    assert leaf.grad is not None and output.grad_fn is not None
    return output.grad_fn.name(), output.detach(), leaf.grad


def identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("special", [(), (NAN,), (-INF,), (NAN, INF, -INF)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_max_pooling_is_torchs_bit_for_bit(case, special):
    shape, *sizes = case
    x = values(shape, *special)
    plain, ours = (results(layer.MaxPool2d(*sizes), x) for layer in (nn, lnpu.nn))
    assert ours[0] == "_CodedMaxPoolBackward" and plain[0] != ours[0]
    assert all(identical(a, b) for a, b in zip(plain[1:], ours[1:], strict=True))


def test_windows_of_nothing_but_minus_infinity():
    x = torch.full((2, 3, 6, 6), -INF)
    for sizes in ((2, 2, 0), (3, 2, 1)):
        plain, ours = (results(layer.MaxPool2d(*sizes), x) for layer in (nn, lnpu.nn))
        assert all(identical(a, b) for a, b in zip(plain[1:], ours[1:], strict=True))


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (values((2, 3, 8, 8)).to(memory_format=torch.channels_last), {}),
        (values((2, 3, 8, 8)).transpose(2, 3), {}),
        (values((2, 3, 8, 8)).double(), {}),
        (values((2, 3, 8, 8)).half(), {}),
        (values((0, 3, 8, 8)), {}),
        (values((2, 3, 9, 9)), {"ceil_mode": True}),
        (values((2, 3, 9, 9)), {"dilation": 2}),
        (values((2, 3, 20, 20)), {"kernel_size": 16}),
        (values((2, 3, 8, 8)), {"kernel_size": (2,)}),
        (values((2, 3, 8, 8)), {"stride": ()}),
        (values((2, 3, 8, 8)), {"padding": (1,)}),
    ],
    ids=["channels_last", "transposed", "float64", "float16", "empty", "ceil_mode", "dilation", "large", *"123"],
)
def test_what_is_left_to_torch(x, options):
    plain, ours = (results(layer.MaxPool2d(**{"kernel_size": 2} | options), x) for layer in (nn, lnpu.nn))
    assert ours[0] == plain[0] and all(torch.equal(a, b) for a, b in zip(plain[1:], ours[1:], strict=True))


@pytest.mark.parametrize(
    "sizes",
    [(2, 2, 2), (9, 1, 0), (2, 0, 0), (2, 2, -1), (0, 1), (0, 1, 0), ((2, 0), 1), ((2, 2, 2),), (2.0,), (True,)],
)
def test_what_torch_refuses(sizes):
    x, errors = torch.ones(2, 3, 8, 8, requires_grad=True), []
    for layer in (nn, lnpu.nn):
        with pytest.raises((RuntimeError, TypeError)) as error:
            layer.MaxPool2d(*sizes)(x)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_indices_are_torchs():
    x = values((2, 3, 8, 8)).requires_grad_()
    found, expected = (layer.MaxPool2d(2, return_indices=True)(x) for layer in (lnpu.nn, nn))
    assert torch.equal(found[1], expected[1])


def test_a_byte_per_result_is_kept():
    kept: list[tuple[int, torch.dtype]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.nbytes, t.dtype)) or t, lambda t: t):
        lnpu.nn.MaxPool2d(2)(torch.ones(4, 8, 16, 16, requires_grad=True))
    assert kept == [(4 * 8 * 8 * 8, torch.uint8)]


def test_converted_and_reverted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.MaxPool1d(2))
    kinds = [type(module) for module in lnpu.convert(model)]
    assert kinds == [lnpu.nn.Conv2d, lnpu.nn.MaxPool2d, nn.MaxPool1d]
    assert type(lnpu.revert(model)[1]) is nn.MaxPool2d


def test_second_derivatives_are_refused():
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(lnpu.nn.MaxPool2d(2)(x).sum(), x, create_graph=True)


def test_the_ops_are_sound():
    x, sizes = torch.randn(2, 3, 5, 8), ([3, 2], [2, 2], [1, 0])
    out, codes = pooling.coded_max_pool(x, *sizes)
    torch.library.opcheck(torch.ops.lnpu.coded_max_pool.default, (x, *sizes))
    torch.library.opcheck(torch.ops.lnpu.coded_max_pool_backward.default, (out, codes, x.shape, *sizes))


def test_on_several_threads():
    x = torch.randn(8, 16, 32, 32)
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert torch.equal(results(lnpu.nn.MaxPool2d(3, 2, 1), x)[1], F.max_pool2d(x, 3, 2, 1))
        finally:
            torch.set_num_threads(before)
