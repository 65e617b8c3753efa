"""A step's result rounded as the chip stores it, on a GPU, in one pass. Equal to `reference.round_to`."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.launch import Launch, check_dtype, check_runs
from lnpu_torch.kernels.rounding import FLOATS, Config, Formats, bits_of, dense, readable, round_by_rule

RESULT = Config(block=2048, warps=4, per_processor=0, longest=1)
"""16 elements a thread, one tile a program. Chosen by reasoning, not yet by measurement."""


@triton.jit
def _bfloat16_bits(x):
    """The bits of the nearest bfloat16, ties to even, as int16, as torch has them; without hardware support."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@triton.jit(do_not_specialize=["count"])
def _result_kernel(
    x_ptr,
    out_ptr,
    count,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = round(x), as x lies in memory."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    if first + BLOCK <= count:  # so that accesses are wide whatever the count
        _round_tile(x_ptr + first, out_ptr + first, lane, lane >= 0, F)
    else:
        _round_tile(x_ptr + first, out_ptr + first, lane, lane < count - first, F)


@triton.jit
def _round_tile(x_ptr, out_ptr, lane, mask, F: tl.constexpr):
    x = bits_of(x_ptr, lane, mask).to(tl.float32, bitcast=True)
    if F.high_mantissa == 10:
        x = x.to(tl.float16).to(tl.float32)
    else:
        x, _ = round_by_rule(x.to(tl.int32, bitcast=True), 0, x, F, False, False)
    if out_ptr.dtype.element_ty == tl.int16:
        tl.store(out_ptr + lane, _bfloat16_bits(x), mask=mask)
    else:
        tl.store(out_ptr + lane, x, mask=mask)


def round_result(x: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    """x rounded to a format (nearest, overflow to infinity), in another dtype.

    Args:
        x: float32, float16 or bfloat16, any shape.
        form: "fp16" or "e6m9".
        dtype: float32, float16 or bfloat16.

    Returns:
        As x, in memory too (but for gaps); x itself if there is nothing to do.

    Raises:
        TypeError, ValueError: a dtype or format that the kernel does not take.
        RuntimeError: the tensor is not on a GPU.
    """
    if x.dtype == dtype == torch.float16 and form == "fp16":
        return x
    launch = _launch(x.shape.numel(), x.dtype, x.device, form, dtype)
    x = dense(x)
    out = torch.empty_like(x, dtype=dtype)
    if launch is not None:
        launch(readable(x), readable(out))
    return out


@lru_cache(maxsize=1024)
def _launch(count: int, source: torch.dtype, device: torch.device, form: str, target: torch.dtype) -> Launch | None:
    check_dtype(FLOATS, x=source, result=target)
    check_runs(device)
    if form not in ("fp16", "e6m9"):
        raise ValueError(f"a result is rounded to fp16 or e6m9, not {form}")
    if not count:
        return None
    return Launch(
        device,
        _result_kernel,
        (triton.cdiv(count, RESULT.block),),
        count,
        F=Formats.of(None, form),
        BLOCK=RESULT.block,
        num_warps=RESULT.warps,
    )
