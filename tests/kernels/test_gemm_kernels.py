"""The product kernels in Triton's interpreter, against `accumulate`.

Operands are conv_output integers, so that every sum within a chunk is exact in float32 whatever its order: neither the
interpreter nor a tensor core adds in the order of the reference. The rounding between chunks is not exact, and is what
is tested.
"""

import pytest
import torch

from helpers.conv_shapes import GEOMETRIES, make
from lnpu_torch.ops.gemm import reference as accumulate
from lnpu_torch.quant.formats import FORMATS

pytest.importorskip("triton")
pytestmark = pytest.mark.triton_interpreter
PLANE = {name: geometry for name, geometry in GEOMETRIES.items() if len(geometry.kernel) < 3}


@pytest.fixture
def kernels(monkeypatch):
    from lnpu_torch.kernels import gemm

    empty = torch.empty

    def poisoned(*args, **options):
        x = empty(*args, **options)
        return x.fill_(torch.nan if x.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    return gemm


def integers(*shape, scale=1):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randint(-8, 9, shape, generator=generator)
    return (x * scale * (torch.rand(shape, generator=generator) < 0.7)).half()


def reduce(a, b, chunk):
    a, b = a.float(), b.float()
    return a @ b if chunk is None else accumulate.reduce(a, b, FORMATS["fp16"], chunk)


@pytest.mark.parametrize("chunk", [None, 1, 10, 16, 48, 64, 100, 128, 1000])
def test_matmul(kernels, chunk):
    for m, n, k in ((63, 50, 100), (130, 140, 200), (17, 1, 3), (1, 2, 1)):
        if chunk in (1, 10) and k > 100:
            continue  # as many steps as chunks: slow, and nothing new
        a, b = integers(m, k, scale=13), integers(k, n, scale=11)
        expected = reduce(a, b, chunk)
        assert torch.equal(kernels.matmul(a, b, chunk=chunk), expected)
        turned = a.T.contiguous().T, b.T.contiguous().T
        assert torch.equal(kernels.matmul(*turned, chunk=chunk, dtype=torch.float16), expected.half())


def test_rounding_matters(kernels):
    a, b = integers(64, 256, scale=5), integers(256, 64, scale=5)
    results = [kernels.matmul(a, b, chunk=chunk) for chunk in (None, 16, 64)]
    assert not any(torch.equal(results[i], results[i - 1]) for i in range(3))


def test_splits(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "processors", lambda device: 8)
    a, b = integers(30, 2000), integers(2000, 20)
    assert torch.equal(kernels.matmul(a, b), reduce(a, b, None))
    bias = integers(20).float() / 8
    got = kernels.matmul(a, b, bias=bias, dtype=torch.float16)
    assert torch.equal(got, (reduce(a, b, None) + bias).half())
    problem = kernels.Problem(kernels.MATMUL.value, (30, 20), 30, 20, 2000, a.stride(), b.stride())
    assert problem.splits(1, problem.tiles(None, kernels.CONFIGS), 8) == 3


STEPS = {
    "conv_forward": lambda g: (integers(*grid(g, "conv_input")), integers(*grid(g, "weight"))),
    "conv_grad_input": lambda g: (integers(*grid(g, "conv_output")), integers(*grid(g, "weight"))),
    "conv_grad_weight": lambda g: (integers(*grid(g, "conv_input")), integers(*grid(g, "conv_output"))),
}


def grid(geometry, name):
    return {
        "conv_input": (geometry.batch, geometry.in_channels, *geometry.conv_input),
        "conv_output": (geometry.batch, geometry.out_channels, *geometry.conv_output),
        "weight": (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel),
    }[name]


@pytest.mark.parametrize("geometry", PLANE.values(), ids=PLANE.keys())
@pytest.mark.parametrize("step", STEPS)
def test_convolution(kernels, step, geometry):
    operands = STEPS[step](geometry)
    last = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in operands]
    for chunk, layout in ((None, operands), (None, last), (16, last), (16, operands)):
        form = FORMATS["fp32" if chunk is None else "fp16"]
        floats = [x.float() for x in operands]
        expected = getattr(accumulate, step)(*floats, geometry, form, chunk or 10**9)
        got = getattr(kernels, step)(*layout, geometry.pack(), chunk=chunk)
        assert got.dtype == torch.float32 and torch.equal(got, expected)


@pytest.mark.parametrize("geometry", PLANE.values(), ids=PLANE.keys())
@pytest.mark.parametrize("step", ["conv_forward", "conv_grad_input"])
def test_bias(kernels, step, geometry):
    operands = STEPS[step](geometry)
    channels = geometry.out_channels if step == "conv_forward" else geometry.in_channels
    bias = torch.randn(channels, generator=torch.Generator().manual_seed(1)) * 9
    for chunk in (None, 16):
        form = FORMATS["fp32" if chunk is None else "fp16"]
        expected = getattr(accumulate, step)(*(x.float() for x in operands), geometry, form, chunk or 10**9)
        expected = (expected + bias.reshape(-1, *(1 for _ in geometry.kernel))).half()
        last = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in operands]
        got = getattr(kernels, step)(*last, geometry.pack(), bias=bias, chunk=chunk, dtype=torch.float16)
        assert torch.equal(got, expected)


def test_one_kernel_offset_per_tile(kernels):
    """64 channels: a tile of the reduction lies within one kernel offset, which is computed once."""
    geometry = make(1, 64, 64, 1, (4, 5), (2, 3), (1, 2), (1, 1), (1, 1))
    for step in STEPS:
        operands = STEPS[step](geometry)
        expected = getattr(accumulate, step)(*(x.float() for x in operands), geometry, FORMATS["fp32"], 10**9)
        last = [x.to(memory_format=torch.channels_last) for x in operands]
        assert torch.equal(getattr(kernels, step)(*last, geometry.pack()), expected)


def test_empty(kernels):
    for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        a, b = torch.ones(m, k).half(), torch.ones(k, n).half()
        assert torch.equal(kernels.matmul(a, b), torch.zeros(m, n))


def test_what_is_refused(kernels):
    a = integers(4, 6)
    with pytest.raises(TypeError, match="bias is torch"):
        kernels.matmul(a, a.T, bias=torch.ones(4).double())
    with pytest.raises(ValueError, match="expected \\[M, K\\] and \\[K, N\\]"):
        kernels.matmul(a, a)
    with pytest.raises(TypeError, match="second is torch"):
        kernels.matmul(a, a.T.float())
    with pytest.raises(ValueError, match="at least one product"):
        kernels.matmul(a, a.T, chunk=0)
    with pytest.raises(ValueError, match="0 to 2 dimensions"):
        kernels.conv_forward(a, a, GEOMETRIES["3d"].pack())
    with pytest.raises(ValueError, match="conv_input is \\[4, 6\\]; the geometry says"):
        kernels.conv_forward(a, a, GEOMETRIES["3x3"].pack())
