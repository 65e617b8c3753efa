"""Products that torch has not, and how results are rounded."""

import itertools
import math

import pytest
import torch

from helpers.tensors import all_patterns, identical, random_patterns
from lnpu_torch.ops import dispatch
from lnpu_torch.ops.dispatch import backend_of
from lnpu_torch.ops.gemm import half_precision as product_ops
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape
from lnpu_torch.ops.quantize import reference

ARGUMENTS = ((2, 1), (1, 1), (1, 1), False, (0, 0), 2)


def operands(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8, 9, 8), torch.randn(6, 4, 3, 3)
    return x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, True, True)])
def test_the_gradients_that_are_asked_for(mask):
    x, weight = operands()
    error = torch.ops.aten.convolution(x, weight, None, *ARGUMENTS)
    expected = torch.ops.aten.convolution_backward(error, x, weight, [6], *ARGUMENTS, mask)
    read = (None, weight, x.shape) if mask[0] else (x, None, weight.shape)
    found = product_ops.gradients(error, *read, torch.contiguous_format, [6], ARGUMENTS, mask)
    wanted = [gradient for gradient, asked in zip(expected, mask, strict=True) if asked]
    assert len(found) == len(wanted) and all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_half_precision_are_rounded_by_their_values(dtype):
    x = torch.randn(1000).to(dtype)
    rounded = backend_of(x).round_result(x.clone(), "fp16", dtype)
    assert torch.equal(rounded, x.half().to(dtype))


@pytest.mark.parametrize("formats", [*itertools.product((torch.contiguous_format, torch.channels_last), repeat=2)])
def test_a_biased_convolution_lies_as_its_input_whatever_its_weight_does(formats):
    x, weight = (t.half().contiguous(memory_format=form) for t, form in zip(operands(), formats, strict=True))
    bias, geometry = torch.randn(6), ConvShape(3, 8, 6, 2, (9, 8), (5, 8), (3, 3), (2, 1), (1, 1), (1, 1))
    lists = ([2, 1], [1, 1], [1, 1])
    arguments = (x, weight, bias, geometry.pack(), (*lists, False, [0, 0], 2))
    out = backend_of(x).half_convolution(*arguments)
    assert out.is_contiguous(memory_format=formats[0])
    expected = torch.nn.functional.conv2d(x.float(), weight.float(), bias, *lists, 2)
    assert torch.allclose(out.float(), expected, atol=0.01) and out.dtype == torch.float16


def patterns(shape):
    bits = torch.cat([all_patterns(torch.bfloat16), random_patterns(2**16, 2)])
    return bits[: math.prod(shape)].reshape(shape)


@pytest.mark.parametrize("shape", [(8, 4, 64, 64), (4, 64, 16, 32), (3, 17, 5, 7), (2, 1, 3, 3), (2, 16, 1, 1)])
@pytest.mark.parametrize("form", ["fp16", "e6m9"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("last", [False, True])
def test_results_are_rounded_where_they_lie(shape, form, backend, last):
    """In either order, bit by bit."""
    x = patterns(shape)
    expected = reference.round_to(x, reference.FORMATS[form])
    x = x.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
    with dispatch.backend(backend):
        out = backend_of(x).round_result(x, form, torch.float32)
    assert out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    assert identical(out.contiguous(), expected)


def test_a_strided_result():
    strided = torch.randn(6, 8)[:, ::2]
    expected = strided.half().float()
    assert torch.equal(backend_of(strided).round_result(strided, "fp16", torch.float32), expected)


def test_results_keep_other_orders():
    x = torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
    expected, strides = x.half().float(), x.stride()
    found = backend_of(x).round_result(x, "fp16", torch.float32)
    assert torch.equal(found, expected) and found.stride() == strides
