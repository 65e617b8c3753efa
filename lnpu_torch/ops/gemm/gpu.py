"""Products and rounded results on a GPU, by the Triton kernels. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lnpu_torch.kernels import gemm, launch, round_output

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRODUCTS = {
    "conv_forward": gemm.conv_forward,
    "conv_grad_input": gemm.conv_grad_input,
    "conv_grad_weight": gemm.conv_grad_weight,
}


def supports(x: Tensor) -> bool:
    """Whether the kernels take an operand: at most float32, neither empty nor too large."""
    return x.dtype in DTYPES and 0 < x.numel() < launch.INT32


def accumulates(a: Tensor, b: Tensor, form: str, dims: int) -> bool:
    """Whether `accumulate` takes these operands: binary16, with a binary16 accumulator, of at most two dimensions."""
    return supports(a) and a.dtype == b.dtype == torch.float16 and form == "fp16" and dims <= 2


def accumulate(product: str, a: Tensor, b: Tensor, geometry: Sequence[int], chunk: int) -> Tensor:
    """A product of `reference`, by name, with a binary16 accumulator; float32."""
    result: Tensor = PRODUCTS[product](a, b, geometry, chunk=chunk)
    return result


def biased_convolution(x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int], transposed: bool) -> Tensor:
    """`half_precision.half_convolution`, of a channels_last x."""
    product = gemm.conv_grad_input if transposed else gemm.conv_forward
    result: Tensor = product(x, weight, geometry, bias=bias, dtype=torch.float16)
    return result


def rounds_results(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `round_result` takes a result and the dtype that it is to have."""
    return x.dtype in DTYPES and dtype in DTYPES


def round_result(x: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    """A step's result, rounded to a format, in a dtype."""
    rounded: Tensor = round_output.round_result(x, form, dtype)
    return rounded
