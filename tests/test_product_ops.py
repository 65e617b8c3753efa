"""The ops of products, as torch asks of registered ones; and what compiled networks take in place of torch's own."""

import pytest
import torch

from lnpu_torch import product_ops

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
        (product_ops.convolution_backward, (error, x, weight, None, *ARGUMENTS, (True, False, False))),
        (product_ops.convolution_backward, (error, x, weight, [6], *ARGUMENTS, (False, True, True))),
        (product_ops.widened, (x.half(), torch.float32)),
        *[
            (product_ops.rounded_result, (x, form, dtype, turned))
            for form in ("fp16", "fp32", "e5m2")
            for dtype in (torch.float32, torch.bfloat16)
            for turned in (False, True)
        ],
    ]
    for op, arguments in calls:
        torch.library.opcheck(registered(op), arguments)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, True, True), (True, True, True)])
def test_the_gradients_that_are_asked_for(mask):
    x, weight = operands()
    error = torch.ops.aten.convolution(x, weight, None, *ARGUMENTS)
    expected = torch.ops.aten.convolution_backward(error, x, weight, [6], *ARGUMENTS, mask)
    found = product_ops.convolution_backward(error, x, weight, [6], *ARGUMENTS, mask)
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
