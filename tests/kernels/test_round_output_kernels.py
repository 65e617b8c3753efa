"""The kernel for a step's result in Triton's interpreter, against the reference, bit by bit."""

import pytest
import torch

from helpers.tensors import LAYOUTS, identical, spread
from lnpu_torch.ops.quantize.reference import round_to
from lnpu_torch.quant.formats import FORMATS

pytest.importorskip("triton")
pytestmark = pytest.mark.triton_interpreter


@pytest.fixture
def kernels(monkeypatch):
    from lnpu_torch.kernels import round_output

    empty_like = torch.empty_like

    def poisoned(*args, **options):
        x = empty_like(*args, **options)
        return x if x.is_meta else x.fill_(torch.nan)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    return round_output


def same(a, b):
    """But for the sign of NaN: torch's cast to bfloat16 drops it."""
    return identical(a.float(), b.float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["fp16", "e6m9"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results(kernels, layout, form, dtype):
    for shape in ((7, 6, 11, 13), (63, 50), (2, 1, 5, 5), (1, 9)):
        x = LAYOUTS[layout](spread(*shape)) if layout != "channels_last" or len(shape) == 4 else spread(*shape)
        for source in (torch.float32, torch.float16, torch.bfloat16):
            got = kernels.round_result(x.to(source), form, dtype)
            assert got.dtype == dtype and same(got, round_to(x.to(source).float(), FORMATS[form]).to(dtype))
            assert got.stride() == torch.empty_like(x).stride()


def test_every_bfloat16(kernels):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    for x in (every, every * 1.0009765625):
        assert same(kernels.round_result(x, "fp16", torch.bfloat16), x.half().bfloat16())


def test_nothing_to_do(kernels):
    x = spread(3, 4).half()
    assert kernels.round_result(x, "fp16", torch.float16) is x
    assert kernels.round_result(x[:0], "fp16", torch.float32).shape == (0, 4)


def test_what_is_refused(kernels):
    x = torch.ones(4, 6)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        kernels.round_result(x.double(), "fp16", torch.float32)
    with pytest.raises(ValueError, match="rounded to fp16 or e6m9, not e4m3"):
        kernels.round_result(x, "e4m3", torch.float32)
