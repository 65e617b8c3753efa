"""A step's result on its way out, on a GPU: bias added, rounded as the chip stores it, in one pass. Equal to
`reference.round_to` of the sum in float32."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.launch import Launch, check_device, check_dtype, check_runs
from lnpu_torch.kernels.rounding import FLOATS, Config, Formats, bits_of, dense, readable, round_by_rule

RESULT = Config(block=2048, warps=4, per_processor=0, longest=1)
"""16 elements a thread, one tile a program. Chosen by reasoning, not yet by measurement."""


@triton.jit
def _bfloat16_bits(x):
    """The bits of the nearest bfloat16, ties to even, as int16, as torch has them; without hardware support."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def _result_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    count,
    channels,
    inner,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = round(x + bias), as x lies in memory: the channel changes every `inner` elements. bias may be None."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < count - first
    x = bits_of(x_ptr, first + lane, mask).to(tl.float32, bitcast=True)
    if bias_ptr is not None:
        channel = ((first + lane) // inner % channels).to(tl.int32)
        x += bits_of(bias_ptr, channel, mask).to(tl.float32, bitcast=True)
    if F.high_mantissa == 10:
        x = x.to(tl.float16).to(tl.float32)
    else:
        x, _ = round_by_rule(x.to(tl.int32, bitcast=True), 0, x, F, False, False)
    if out_ptr.dtype.element_ty == tl.int16:
        tl.store(out_ptr + first + lane, _bfloat16_bits(x), mask=mask)
    else:
        tl.store(out_ptr + first + lane, x, mask=mask)


def round_result(x: Tensor, bias: Tensor | None, form: str, dtype: torch.dtype) -> Tensor:
    """x + bias in float32, rounded to a format (nearest, overflow to infinity), in another dtype.

    Args:
        x: float32, float16 or bfloat16 [N, C, *grid].
        bias: float32, float16 or bfloat16 [C], or None.
        form: "fp16" or "e6m9".
        dtype: float32, float16 or bfloat16.

    Returns:
        As x, in memory too (but for gaps); x itself if there is nothing to do.

    Raises:
        TypeError, ValueError: a dtype, shape, format or device that the kernel does not take.
        RuntimeError: the tensors are not on a GPU.
    """
    if bias is None and x.dtype == dtype == torch.float16 and form == "fp16":
        return x
    launch = _launch(x.shape, x.stride(), x.dtype, x.device, None if bias is None else bias.dtype, form, dtype)
    if bias is not None and (bias.shape != x.shape[1:2] or bias.device != x.device or bias.stride() != (1,)):
        check_device(x=x, bias=bias)
        if bias.shape != x.shape[1:2]:
            raise ValueError(f"a bias for {list(x.shape)} is [{x.shape[1]}], not {list(bias.shape)}")
        bias = bias.contiguous()
    x = dense(x)
    out = torch.empty_like(x, dtype=dtype)
    if launch is not None:
        launch(readable(x), None if bias is None else readable(bias), readable(out))
    return out


@lru_cache(maxsize=1024)
def _launch(
    shape: torch.Size,
    stride: tuple[int, ...],
    source: torch.dtype,
    device: torch.device,
    bias: torch.dtype | None,
    form: str,
    target: torch.dtype,
) -> Launch | None:
    check_dtype(FLOATS, x=source, result=target, **({} if bias is None else {"bias": bias}))
    check_runs(device)
    if form not in ("fp16", "e6m9"):
        raise ValueError(f"a result is rounded to fp16 or e6m9, not {form}")
    if bias is not None and len(shape) < 2:
        raise ValueError(f"a bias needs a dimension of channels: [N, C, *grid], not {list(shape)}")
    count = shape.numel()
    if not count:
        return None
    laid = torch.empty_like(torch.empty_strided(shape, stride, device="meta")).stride()
    channels, inner = (shape[1], max(1, laid[1])) if bias is not None else (1, 1)
    return Launch(
        device,
        _result_kernel,
        (triton.cdiv(count, RESULT.block),),
        count,
        channels,
        inner,
        F=Formats.of(None, form),
        BLOCK=RESULT.block,
        num_warps=RESULT.warps,
    )
