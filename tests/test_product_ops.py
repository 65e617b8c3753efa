"""The ops of products, as torch asks of registered ones; and what compiled networks take in place of torch's own."""

import itertools
import math

import pytest
import torch
from test_formats import all_patterns, identical, random_patterns

import lnpu_torch as lnpu
from lnpu_torch.nn import gemms as products
from lnpu_torch.ops.gemm import half_precision as product_ops
from lnpu_torch.ops.pair_counts.conv_shape import Geometry
from lnpu_torch.ops.quantize import reference
from lnpu_torch.ops.quantize import torch_ops as ops

ARGUMENTS = ((2, 1), (1, 1), (1, 1), False, (0, 0), 2)


def operands(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8, 9, 8), torch.randn(6, 4, 3, 3)
    return x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)


def registered(op):
    return getattr(torch.ops.lnpu, op.__name__).default


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format):
    x, weight = operands(memory_format)
    error = torch.ops.aten.convolution(x, weight, None, *ARGUMENTS)
    calls = [
        (product_ops.convolution, (x, weight, torch.randn(6), *ARGUMENTS)),
        (
            product_ops.convolution_backward,
            (error, None, weight, x.shape, False, None, *ARGUMENTS, (True, False, False)),
        ),
        (product_ops.convolution_backward, (error, x, None, weight.shape, False, [6], *ARGUMENTS, (False, True, True))),
        (product_ops.widened, (x.half(), torch.float32)),
        *[
            (product_ops.rounded_result, (x, form, dtype, turned))
            for form in ("fp16", "fp32", "e5m2")
            for dtype in (torch.float32, torch.bfloat16)
            for turned in (False, True)
        ],
        (product_ops.onednn_linear, (torch.randn(3, 4), torch.randn(5, 4), torch.randn(5))),
        (product_ops.onednn_linear, (torch.randn(4, 3).T, torch.randn(4, 5).T, None)),
        (product_ops.round_result, (x, torch.empty_like(x), "fp16")),
    ]
    for op, arguments in calls:
        torch.library.opcheck(registered(op), arguments)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, True, True)])
def test_the_gradients_that_are_asked_for(mask):
    x, weight = operands()
    error = torch.ops.aten.convolution(x, weight, None, *ARGUMENTS)
    expected = torch.ops.aten.convolution_backward(error, x, weight, [6], *ARGUMENTS, mask)
    read = (None, weight, x.shape) if mask[0] else (x, None, weight.shape)
    found = product_ops.convolution_backward(error, *read, False, [6], *ARGUMENTS, mask)
    wanted = [gradient for gradient, asked in zip(expected, mask, strict=True) if asked]
    assert len(found) == len(wanted) and all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shape", [(3, 20, 5, 7), (1, 1, 4, 4), (2, 16, 1, 1), (4, 6), (0, 3, 2, 2)])
@pytest.mark.parametrize("form", ["fp16", "fp32"])
def test_a_turned_result_is_contiguous_and_rounded(shape, form):
    x = torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
    before = x.clone()
    found = product_ops.rounded_result(x, form, torch.float32, True)
    assert found.is_contiguous() and torch.equal(found, x.half().float() if form == "fp16" else x)
    found.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_half_precision_are_rounded_by_their_values(dtype):
    x = torch.randn(1000).to(dtype)
    rounded = x.clone()
    product_ops.round_result(rounded, rounded, "fp16")
    assert torch.equal(rounded, x.half().to(dtype))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("formats", [*itertools.product((torch.contiguous_format, torch.channels_last), repeat=2)])
def test_a_biased_convolution_lies_as_its_input_whatever_its_weight_does(formats):
    x, weight = (t.half().contiguous(memory_format=form) for t, form in zip(operands(), formats, strict=True))
    bias, geometry = torch.randn(6), Geometry(3, 8, 6, 2, (9, 8), (5, 8), (3, 3), (2, 1), (1, 1), (1, 1))
    lists = ((2, 1), (1, 1), (1, 1), (0, 0))
    arguments = (x, weight, bias, geometry.pack(), *lists, 2, False)
    out = product_ops.half_convolution(*arguments)
    assert out.is_contiguous(memory_format=formats[0])
    expected = torch.nn.functional.conv2d(x.float(), weight.float(), bias, *lists[:3], 2)
    assert torch.allclose(out.float(), expected, atol=0.01) and out.dtype == torch.float16
    torch.library.opcheck(registered(product_ops.half_convolution), arguments)


def patterns(shape):
    bits = torch.cat([all_patterns(torch.bfloat16), random_patterns(2**16, 2)])
    return bits[: math.prod(shape)].reshape(shape)


@pytest.mark.parametrize("shape", [(8, 4, 64, 64), (4, 64, 16, 32), (3, 17, 5, 7), (2, 1, 3, 3), (2, 16, 1, 1)])
@pytest.mark.parametrize("form", ["fp16", "fp32", "e6m9"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("large", [1, 2**62])
def test_where_results_are_written(monkeypatch, shape, form, backend, last, turned, large):
    """In memory of their own and where they lie, in every order, bit by bit."""
    monkeypatch.setattr(product_ops.buffers, "LARGE", large)
    x = patterns(shape)
    expected = reference.round_to(x, reference.FORMATS[form]) if form != "fp32" else x
    x = x.clone(memory_format=torch.channels_last if last or turned else torch.contiguous_format)
    out = product_ops.place(x, turned, True)
    assert (out.data_ptr() == x.data_ptr()) == (large > 1)
    with ops.backend(backend):
        product_ops.round_result(x, out, form)
    assert identical(out.contiguous(), expected) and (out.is_contiguous() or (last and not turned))


def test_a_strided_result():
    strided = torch.randn(6, 8)[:, ::2]
    expected = strided.half().float()
    product_ops.round_result(strided, strided, "fp16")
    assert torch.equal(strided, expected)


@pytest.mark.parametrize("large", [1, 2**62])
def test_results_keep_other_orders(monkeypatch, large):
    monkeypatch.setattr(product_ops.buffers, "LARGE", large)
    x = torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
    expected = x.half().float()
    out = product_ops.place(x, False, True)
    product_ops.round_result(x, out, "fp16")
    whole = product_ops.rounded_result(x, "fp16", torch.float32, False, True)
    for found in (out, whole):
        assert torch.equal(found, expected) and found.stride() == x.stride()


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.skipif(not products.ONEDNN, reason="torch is built without oneDNN")
@pytest.mark.parametrize(("enabled", "mkl"), [(True, False), (False, False), (True, True)])
def test_large_linear_layers_by_onednn(monkeypatch, enabled, mkl):
    """The steps of an emulated layer, on integers, whose sums are exact in any order; steps in float stay torch's."""
    monkeypatch.setattr(product_ops, "MKL_IS_FAST", mkl)
    calls, linear = [], product_ops.onednn_linear
    monkeypatch.setattr(product_ops, "onednn_linear", lambda *a: calls.append(a[0].shape) or linear(*a))
    torch.manual_seed(0)
    reads = lnpu.Rule(low=None)
    layer = lnpu.nn.Linear(512, 384, precision=lnpu.Precision(input=reads, weight=reads, result="fp32"))
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-3, 4, layer.weight.shape))
        layer.bias.copy_(torch.randint(-3, 4, layer.bias.shape))
    x, error = torch.randint(-3, 4, (2, 64, 512)).float().requires_grad_(), torch.randint(-3, 4, (2, 64, 384)).float()
    with torch.backends.mkldnn.flags(enabled=enabled):
        out = layer(x)
        out.backward(error)
    assert calls == ([] if mkl else [(128, 512), (128, 384), (384, 128)])
    assert torch.equal(out, torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(x.grad, error @ layer.weight)
    assert torch.equal(layer.weight.grad, error.reshape(-1, 384).T @ x.detach().reshape(-1, 512))
    before = len(calls)
    lnpu.nn.Linear(512, 384, precision=lnpu.Precision())(x).sum().backward()
    assert len(calls) == before
