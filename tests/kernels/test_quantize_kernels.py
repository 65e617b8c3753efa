"""The rounding kernels in Triton's interpreter, against the reference, bit by bit."""

import pytest
import torch

from helpers.tensors import LAYOUTS, same_signs_too, scalar, spread
from lnpu_torch.ops.quantize import reference
from lnpu_torch.quant.precision import Rule

pytest.importorskip("triton")
pytestmark = pytest.mark.triton_interpreter
RULES = [("e4m3", "fp16"), ("e5m2", "fp16"), ("e4m3", None), ("e5m2", None), (None, "fp16"), ("e4m3", "e6m9")]


@pytest.fixture
def kernels(monkeypatch):
    """The modules, with few programs, and all memory that they allocate full of garbage."""
    from lnpu_torch.kernels import quantize

    empty, empty_like = torch.empty, torch.empty_like

    def poison(x):
        return x if x.is_meta else x.fill_(torch.nan if x.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(empty(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(empty_like(*args, **options)))
    monkeypatch.setattr(quantize, "processors", lambda device: 1)
    return quantize


@pytest.mark.parametrize("seed", [None, 1234567890123456789], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("low", "high"), RULES)
def test_values_and_groups(kernels, low, high, seed):
    x, key = spread(63, 500), None if seed is None else torch.tensor(seed)
    random = None if seed is None else reference.random_bits(x.shape, key, 3)
    rule = Rule(low=low, high=high)
    for value in (rule.threshold_range[0], -30, -1, 6, 63):
        q, groups = reference.quantize(x, rule, scalar(value), random)
        for dtype in (torch.float32, torch.float16) if value in (-30, 6) and high != "e6m9" else (torch.float32,):
            got = kernels.quantize(x, scalar(value), low, high, seed=key, stream=3, dtype=dtype, totals=True)
            assert got[0].dtype == dtype and same_signs_too(got[0], q)
            assert torch.equal(got[1], groups)
            assert got[2].tolist() == [int((groups == group).sum()) for group in (0, 8, 16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_input(kernels, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for value in (-9, 4):
        q, groups = reference.quantize(x, Rule(), scalar(value))
        got = kernels.quantize(x, scalar(value), "e4m3", "fp16")
        assert same_signs_too(got[0], q) and torch.equal(got[1], groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_bits_follow_the_logical_order(kernels, layout):
    x, key = LAYOUTS[layout](spread(3, 5, 7, 4)), torch.tensor(2**61 + 3)
    q, _ = reference.quantize(x, Rule(), scalar(0), reference.random_bits(x.shape, key, 1))
    got = kernels.quantize(x, scalar(0), "e4m3", "fp16", seed=key, stream=1, dtype=torch.float32)[0]
    assert same_signs_too(got, q) and got.stride() == torch.empty_like(x).stride()


NO_BITS = 12121362
"""A key of which the first element's random bits are all zero."""


@pytest.mark.parametrize("value", [1.0, 1.125, 5.0, 2.0**-9, 100.0625])
def test_exact_values_never_move(kernels, value):
    x, key = torch.full((1, 1), value), torch.tensor(NO_BITS)
    assert reference.random_bits(x.shape, key, 0).tolist() == [[0]]
    assert kernels.quantize(x, scalar(12), "e4m3", "fp16", seed=key)[0].item() == value


def test_empty(kernels):
    for shape in ((0,), (0, 3, 2, 2), (2, 0), (2, 3, 0, 4)):
        x = torch.ones(shape)
        values, groups, totals = kernels.quantize(x, scalar(0), "e4m3", "fp16", totals=True)
        assert values.shape == groups.shape == x.shape and totals.tolist() == [0, 0, 0]


def test_what_is_refused(kernels):
    x, t = torch.ones(4, 6), scalar(0)
    with pytest.raises(TypeError, match="x is torch"):
        kernels.quantize(x.double(), t, "e4m3", "fp16")
    with pytest.raises(TypeError, match="threshold is torch"):
        kernels.quantize(x, t.long(), "e4m3", "fp16")
    with pytest.raises(TypeError, match="values is torch"):
        kernels.quantize(x, t, "e4m3", "fp16", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="different devices: x on cpu, threshold on meta"):
        kernels.quantize(x, t.to("meta"), "e4m3", "fp16")
    with pytest.raises(ValueError, match="e6m9 do not fit float16"):
        kernels.quantize(x, t, "e4m3", "e6m9")
    with pytest.raises(ValueError, match="a low format, a high one, or both"):
        kernels.quantize(x, t, None, None)
    with pytest.raises(ValueError, match="must have one element, not 2"):
        kernels.quantize(x, t.repeat(2), "e4m3", "fp16")
