"""Products of binary16 operands with float32 sums, which torch has not, from those that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lnpu_torch.ops.memory_format import memory_format


def alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two operands in the wider of their dtypes."""
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def half_matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a [M, K] by b [K, N], or [B, M, K] by [B, K, N], both binary16, and a bias [N], summed and returned in float32.

    cuBLAS' reductions in reduced precision are a switch of the whole process, but touch only results that are narrower
    than the sums. Where the process has sums themselves in binary16, operands are widened first: their products are
    exact in float32 and in TF32 alike.
    """
    if a.is_cuda and not torch.version.hip and not torch.backends.cuda.matmul.allow_fp16_accumulation:
        sums = (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    else:
        sums = a.float() @ b.float()
    return sums if bias is None else sums.add_(bias)


def half_convolution(x: Tensor, weight: Tensor, bias: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Torch's convolution of binary16 operands, with the bias added to the float32 sums; binary16, rounded once.

    cuDNN's own binary16 convolutions round before torch adds the bias. So cuDNN's on TF32 is taken: binary16 is exact
    in it, and its sums come in float32. The TF32 switch is this call's alone.

    Args:
        arguments: of `aten.convolution`, after the bias.
    """
    cudnn = torch.backends.cudnn
    switches = (cudnn.benchmark, cudnn.deterministic or torch.are_deterministic_algorithms_enabled(), cudnn.enabled)
    sums = torch.ops.aten._convolution(x.float(), weight.float(), None, *arguments, *switches, True)
    rounded: Tensor = sums.add_(bias.reshape(-1, *(1 for _ in range(x.dim() - 2)))).half()
    return rounded.contiguous(memory_format=memory_format(x))


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
