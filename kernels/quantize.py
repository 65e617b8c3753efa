"""Rounding on a GPU: one pass that reads a tensor once and writes it rounded, with its groups if they are wanted.

Bit-equal to `reference.quantize`. Nothing here reads a tensor back to the host. Groups are 0 (zero, also by
underflow), 8 (`low`) and 16 (`high`, or a float that is not rounded).
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.launch import (
    check_dtype,
    on,
    power_of_2,
    processors,
)
from lnpu_torch.kernels.rounding import (
    Config,
    bits_of,
    checked,
    dense,
    random_bits,
    readable,
    round_by_rule,
)

FLAT = Config(block=4096, warps=4, per_processor=16, longest=8)
"""Chosen by reasoning, not yet by measurement."""


@triton.jit
def _flat_kernel(
    x_ptr,
    out_ptr,
    groups_ptr,
    partial_ptr,
    threshold_ptr,
    seed_ptr,
    stream,
    count,
    sizes,
    strides,
    F: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rounds a dense tensor in memory order.

    sizes, strides: for random bits, the dimensions in memory order, fastest first, and their steps in logical order.
    groups: where each element's group goes, or None. partial: [programs, 2], for the program's non-zeros (FP8, FP16),
    or None.
    """
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    threshold = tl.load(threshold_ptr)
    found = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        index = tl.arange(0, BLOCK)
        left = count - first - step * BLOCK
        mask = index < left
        bits = bits_of(x_ptr + first + step * BLOCK, index, mask)
        random = bits
        if STOCHASTIC:
            rest = first + step * BLOCK + index
            logical = tl.zeros_like(rest)
            for d in tl.static_range(len(sizes)):
                logical += rest % sizes[d] * strides[d]
                rest = rest // sizes[d]
            random = random_bits(logical, seed_ptr, stream)
        q, small = round_by_rule(bits, threshold, random, F, out_ptr.dtype.element_ty == tl.float16, STOCHASTIC)
        tl.store(out_ptr + first + step * BLOCK + index, q, mask=mask)
        if groups_ptr is not None:
            group = tl.where(q != 0, tl.where(small, 8, 16), 0).to(tl.uint8)
            tl.store(groups_ptr + first + step * BLOCK + index, group, mask=mask)
        if partial_ptr is not None:
            found += tl.where(q != 0, tl.where(small, 1, 1 << 16), 0)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0) * 2, tl.sum(found & 0xFFFF))
        tl.store(partial_ptr + tl.program_id(0) * 2 + 1, tl.sum(found >> 16))


@triton.jit
def _totals_kernel(partial_ptr, out_ptr, count, programs, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums partial [programs, 2] into out [3]: zeros, FP8, FP16."""
    low = tl.zeros((BLOCK,), tl.int64)
    high = tl.zeros((BLOCK,), tl.int64)
    for step in range(STEPS):
        index = step * BLOCK + tl.arange(0, BLOCK)
        low += tl.load(partial_ptr + index * 2, mask=index < programs, other=0)
        high += tl.load(partial_ptr + index * 2 + 1, mask=index < programs, other=0)
    tl.store(out_ptr, count - tl.sum(low) - tl.sum(high))
    tl.store(out_ptr + 1, tl.sum(low))
    tl.store(out_ptr + 2, tl.sum(high))


def quantize(
    x: Tensor,
    threshold: Tensor,
    low: str | None,
    high: str | None,
    *,
    seed: Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype = torch.float16,
    groups: bool = True,
    totals: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Round a tensor, as `reference.quantize` does.

    Args:
        x: float32, float16 or bfloat16, any shape. Dense layouts (channels_last, transposed) are read as they lie.
        threshold: one int32 element on x's device (no meaning where the rule has no `low`).
        low, high: names of the groups' formats, None for a rule without that group.
        seed: one int64 element, for stochastic rounding by `reference.random_bits`; None rounds to nearest.
        stream: as in `reference.random_bits`.
        dtype: of the values, float16 or float32 (which `high="e6m9"` needs).
        groups, totals: whether each element's group is wanted, and how many elements are in each.

    Returns:
        Values; groups (uint8: 0, 8, 16) or None; elements of each group (zero, FP8, FP16; int64 [3]) or None. Values
        and groups have the strides of `torch.empty_like(x)`.

    Raises:
        TypeError, ValueError: a dtype, size, format or device that the kernel does not take.
        RuntimeError: the tensors are not on a GPU.
    """
    check_dtype((torch.float16, torch.float32), values=dtype)
    formats = checked(x, threshold, low, high, seed, half=dtype == torch.float16)
    x = dense(x)
    out = torch.empty_like(x, dtype=dtype)
    marks = torch.empty_like(x, dtype=torch.uint8) if groups else None
    blocks = triton.cdiv(x.numel(), FLAT.block)
    # More tiles for each program keep the partial sums few.
    walk = power_of_2(max(1, blocks // (FLAT.per_processor * processors(x.device))))
    steps = min(FLAT.longest, walk) if totals else 1
    programs = triton.cdiv(blocks, steps)
    partial = torch.empty(programs, 2, dtype=torch.int32, device=x.device) if totals else None
    if programs:
        sizes, strides = ((1,), (1,)) if seed is None else _memory_order(x)
        with on(x):
            _flat_kernel[(programs,)](
                readable(x),
                out,
                marks,
                partial,
                threshold,
                seed,
                stream,
                x.numel(),
                sizes,
                strides,
                F=formats,
                STOCHASTIC=seed is not None,
                STEPS=steps,
                BLOCK=FLAT.block,
                num_warps=FLAT.warps,
            )
    return out, marks, None if partial is None else _totals(partial, x.numel())


def _memory_order(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of a dense tensor's dimensions, the fastest in memory first, and their steps in logical order.

    Dimensions that follow each other in both orders are joined.
    """
    logical = [prod(x.shape[d + 1 :]) for d in range(x.dim())]
    order = sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=x.stride)
    joined: list[list[int]] = []
    for size, step in ((x.shape[d], logical[d]) for d in order):
        if joined and step == joined[-1][0] * joined[-1][1]:
            joined[-1][0] *= size
        else:
            joined.append([size, step])
    joined = joined or [[1, 1]]
    return tuple(size for size, _ in joined), tuple(step for _, step in joined)


def _totals(partial: Tensor, count: int) -> Tensor:
    totals = torch.empty(3, dtype=torch.int64, device=partial.device)
    loops = power_of_2(triton.cdiv(len(partial), 1024))
    with on(partial):
        _totals_kernel[(1,)](partial, totals, count, len(partial), STEPS=loops, BLOCK=1024)
    return totals
