"""Products that torch has not: of binary16 operands with float32 sums, and with reduced accumulators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lnpu_torch.ops import dispatch as backends
from lnpu_torch.ops.gemm import reference as accumulating
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape
from lnpu_torch.ops.quantize import reference
from lnpu_torch.quant.formats import FORMATS


def alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two operands in the wider of their dtypes."""
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def half_matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a [M, K] by b [K, N], both binary16, and a bias [N], summed and returned in float32.

    cuBLAS' reductions in reduced precision are a switch of the whole process, but touch only results that are narrower
    than the sums. Where the process has sums themselves in binary16, operands are widened first: their products are
    exact in float32 and in TF32 alike.
    """
    if a.is_cuda and not torch.backends.cuda.matmul.allow_fp16_accumulation:
        sums = torch.mm(a, b, out_dtype=torch.float32)
    else:
        sums = a.float() @ b.float()
    return sums if bias is None else sums.add_(bias)


def half_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    geometry: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    transposed: bool,
) -> Tensor:
    """Torch's convolution of binary16 operands, with the bias added to the float32 sums; binary16, rounded once.

    cuDNN's own binary16 convolutions round before torch adds the bias. So either Triton's product is taken, or cuDNN's
    on TF32: binary16 is exact in it, and its sums come in float32. The TF32 switch is this call's alone.
    """
    module, last = backends.gpu_module(x, "ops.gemm.gpu"), backends.memory_format(x) == torch.channels_last
    if module is not None and last and module.supports(x):
        return module.biased_convolution(x, weight, bias, geometry, transposed)  # type: ignore[no-any-return]
    cudnn = torch.backends.cudnn
    lists = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
    switches = (cudnn.benchmark, cudnn.deterministic or torch.are_deterministic_algorithms_enabled(), cudnn.enabled)
    sums = torch.ops.aten._convolution(x.float(), weight.float(), None, *lists, *switches, True)
    rounded = sums.add_(bias.reshape(-1, *(1 for _ in stride))).half()
    return rounded.contiguous(memory_format=backends.memory_format(x))  # type: ignore[no-any-return]


def gradients(
    error: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    shape: Sequence[int],
    form: torch.memory_format,
    bias: Sequence[int] | None,
    arguments: tuple[Any, ...],
    mask: Sequence[bool],
) -> list[Tensor]:
    """Torch's own `convolution_backward`: the gradients of x, weight and bias that the mask asks for.

    One of x and weight is None: it is not read, of this shape and memory format, in which torch computes.
    """
    if x is None or weight is None:
        unread = torch.empty(shape, dtype=error.dtype, device=error.device, memory_format=form)
        x, weight = unread if x is None else x, unread if weight is None else weight
    grads = torch.ops.aten.convolution_backward(error, x, weight, bias, *arguments, mask)
    return [grad for grad, wanted in zip(grads, mask, strict=True) if wanted]  # oneDNN gives others, too


def accumulate(product: str, a: Tensor, b: Tensor, geometry: Sequence[int], form: str, chunk: int) -> Tensor:
    """A product of `ops.gemm.reference`, by name; its accumulator is rounded to a format every `chunk` products."""
    shape, module = ConvShape.unpack(geometry), backends.gpu_module(a, "ops.gemm.gpu")
    if module is not None and module.accumulates(a, b, form, len(shape.kernel)):
        return module.accumulate(product, a, b, geometry, chunk).contiguous()  # type: ignore[no-any-return]
    compute = torch.promote_types(reference.compute_dtype(a), reference.compute_dtype(b))
    result = getattr(accumulating, product)(a.to(compute), b.to(compute), shape, FORMATS[form], chunk)
    return result.contiguous()  # type: ignore[no-any-return]


def round_result(x: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    """A step's fresh result rounded to a format, nearest, overflow to infinity, in another dtype; x may be used up."""
    loops = backends.cpu_loops(x) if form == "fp16" else None
    module = None if loops else backends.gpu_module(x, "ops.gemm.gpu")
    if module is not None and module.rounds_results(x, dtype):
        return module.round_result(x, form, dtype)  # type: ignore[no-any-return]
    if loops:
        x = loops.round_half(x)
    else:
        x.copy_(reference.round_to(x.to(reference.compute_dtype(x)), FORMATS[form]))
    return x if x.dtype == dtype else x.to(dtype)
