"""Rounding on a GPU: one pass that reads a tensor once, writes it rounded, and counts its groups on the way.

Bit-equal to `reference.quantize`, `reference.histogram`, `counting.per_position` and `counting.per_sample`. The low
(FP8) group is rounded by adding and subtracting a power of two, chosen so that the sum's last place is the wanted
one; no FP8 cast is used, so that any GPU and any format will do. Nothing here reads a tensor back to the host.

Groups are 0 (zero, also by underflow), 8 (`low`) and 16 (`high`, or a float that is not rounded).
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.formats import FORMATS, Format
from lnpu_torch.kernels.launch import alignment, check_device, check_dtype, on, power_of_2, processors

BLOCK = 4096
"""Elements of a tile: 32 for each of 128 threads, that is 64 to 128 bytes under way in each."""
SAMPLE = 2**16
"""At most this many elements are looked at for a histogram; the same as `reference.SAMPLE`."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Formats(NamedTuple):
    """A rule as the kernels see it: mantissa bits (-1: no such group), and exponents as in `Format`."""

    low_mantissa: int
    low_min: int
    low_max: int
    low_top: float  # the largest code, over 2^low_max
    window_min: int
    high_mantissa: int
    high_min: int
    high_max: int
    high_top: float

    @classmethod
    def of(cls, low: str | None, high: str | None) -> Formats:
        small, wide = FORMATS[low or "e4m3"], FORMATS[high or "fp16"]
        # A window so low that one of its codes would leave the wide format is not used: `reference.window_exponent`.
        window = wide.ulp_exponent - small.ulp_exponent + small.max_exponent
        return cls(
            small.mantissa if low else -1,
            small.min_exponent,
            small.max_exponent,
            _top(small),
            window,
            wide.mantissa if high else -1,
            wide.min_exponent,
            wide.max_exponent,
            _top(wide),
        )


def _top(form: Format) -> float:
    return form.max / 2.0**form.max_exponent


@triton.jit
def _bits(x_ptr, offsets, mask):
    """An element as the bits of its float32. A bfloat16 comes as int16: its bits are float32's upper half."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    if x.dtype == tl.int16:
        return x.to(tl.int32) << 16
    return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _random(count, seed_ptr, stream):
    """24 random bits for each of the logical element numbers `count` (int64): `reference.random_bits`."""
    c0 = (count & 0xFFFFFFFF).to(tl.uint32)
    c1 = (count >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + stream
    word, _, _, _ = tl.philox(tl.load(seed_ptr), c0, c1, c2, tl.zeros_like(c0))
    return word >> 8


@triton.jit
def _round(magnitude, least, most, random, MANTISSA: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round non-negative floats, given and returned as their bits' float32.

    `least` and `most` are biased exponents in place (<< 23): below `least` the step stays what it is there
    (subnormals); above `most`, where every number overflows, it may be anything not finer. Without `most` a number
    so large that its power of two overflows comes out wrong.
    """
    exponent = tl.maximum(magnitude & 0x7F800000, least)
    if most is not None:
        exponent = tl.minimum(exponent, most)
    if STOCHASTIC:
        # A float32 subnormal rounds as the smallest normal does, and no flush to zero can touch that.
        magnitude = tl.where(magnitude == 0, 0, tl.maximum(magnitude, 0x00800000))
        value = magnitude.to(tl.float32, bitcast=True)
        ulp = exponent - (MANTISSA << 23)
        scaled = value * ((254 << 23) - ulp).to(tl.float32, bitcast=True)
        below = tl.floor(scaled)
        up = random.to(tl.float32) * 5.9604644775390625e-08 < scaled - below  # 2^-24
        return (below + up.to(tl.float32)) * ulp.to(tl.float32, bitcast=True)
    # The last place of this power of two is the step wanted: adding it rounds to nearest, ties to even.
    magic = (exponent + ((23 - MANTISSA) << 23)).to(tl.float32, bitcast=True)
    return (magnitude.to(tl.float32, bitcast=True) + magic) - magic


@triton.jit
def _quantize(bits, threshold, random, F: tl.constexpr, HALF: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round by a rule: the values (binary16 if HALF, else float32), and which elements are FP8's, zeros included."""
    x = bits.to(tl.float32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    sign = bits & (-2147483647 - 1)
    small = magnitude < 0
    q = x
    if F.high_mantissa >= 0 and (STOCHASTIC or not (HALF and F.high_mantissa == 10)):  # the cast below rounds it
        LEAST: tl.constexpr = (F.high_min + 127) << 23
        MOST: tl.constexpr = (F.high_max + 128) << 23
        TOP: tl.constexpr = F.high_top * 2.0**F.high_max
        high = _round(magnitude, LEAST, MOST, random, F.high_mantissa, STOCHASTIC)
        high = tl.where(high > TOP, float("inf"), high)
        q = (high.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        q = tl.where(magnitude < 0x7F800000, q, x)
    if F.low_mantissa >= 0:
        window = tl.maximum(threshold >> 2, F.window_min)
        least = (window - F.low_max + F.low_min + 127) << 23
        if F.high_mantissa >= 0:
            low = _round(magnitude, least, None, random, F.low_mantissa, STOCHASTIC)
            small = magnitude < (threshold + 4 * 127) << 21  # the bits of 2^e (1 + k/4), with T = 4e + k
        else:
            low = _round(magnitude, least, (window + 128) << 23, random, F.low_mantissa, STOCHASTIC)
            small = magnitude < 0x7F800000
            low = tl.minimum(low, F.low_top * ((window + 127) << 23).to(tl.float32, bitcast=True))
        low = (low.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        q = tl.where(small, low, q)
        if F.high_mantissa < 0:
            small = magnitude >= 0  # NaN and infinity too: there is no other group
    return q.to(tl.float16) if HALF else q, small


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
        bits = _bits(x_ptr + first + step * BLOCK, index, mask)
        random = bits
        if STOCHASTIC:
            rest = first + step * BLOCK + index
            logical = tl.zeros_like(rest)
            for d in tl.static_range(len(sizes)):
                logical += rest % sizes[d] * strides[d]
                rest = rest // sizes[d]
            random = _random(logical, seed_ptr, stream)
        q, small = _quantize(bits, threshold, random, F, out_ptr.dtype.element_ty == tl.float16, STOCHASTIC)
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


@triton.jit
def _grid_kernel(
    x_ptr,
    single_ptr,
    half_ptr,
    position_ptr,
    sample_ptr,
    threshold_ptr,
    seed_ptr,
    stream,
    rows,
    group_size,
    groups,
    space,
    row_stride,
    channel_stride,
    space_stride,
    space_tiles,
    channel_tiles,
    group_tiles,
    chunks,
    row_groups,
    UNITS: tl.constexpr,
    F: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    POSITION_SHARED: tl.constexpr,
    SAMPLE_SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_S: tl.constexpr,
):
    """Rounds a grid [row groups * rows, groups * group size, space], and counts over rows, over channels, or both.

    A program holds a tile [TILE_C, TILE_S] of a sample's channels and positions, and walks ROWS samples. Counts over
    samples stay in registers until the end, counts over channels are one sum per sample. Where several programs
    share a count they add to it, each to its own stretch of addresses. Both groups' counts are held in one integer,
    FP8's in the lower 16 bits, FP16's in the upper.

    x: floats, bfloat16 as int16, or groups as uint8. single, half: where the values go, as float32 and binary16, at x's
    offsets; either or both may be None.
    POSITION_SHARED, SAMPLE_SHARED: several programs have a part in each count; they add to it.
    TILE_GROUPS: channel groups in a tile; if one, a group takes `group_tiles` tiles.
    UNITS: what group_size, space and the strides are multiples of; they come divided by it, so that the compiler
    knows how wide it may access memory.
    """
    group_size = group_size * UNITS[0]
    space = space * UNITS[1]
    row_stride = row_stride * UNITS[2]
    channel_stride = channel_stride * UNITS[3]
    space_stride = space_stride * UNITS[4]
    channels = groups * group_size

    pid = tl.program_id(0)
    s = pid % space_tiles * TILE_S + tl.arange(0, TILE_S)
    tile = pid // space_tiles % channel_tiles
    chunk = pid // space_tiles // channel_tiles
    row_group = chunk // chunks
    first_row = chunk % chunks * ROWS
    group = tile // group_tiles * TILE_GROUPS
    c = group * group_size + tile % group_tiles * TILE_C + tl.arange(0, TILE_C)
    if TILE_GROUPS == 1:
        mask = (c < (group + 1) * group_size)[:, None] & (s < space)[None, :]
    else:
        mask = (c < channels)[:, None] & (s < space)[None, :]
    offsets = c[:, None] * channel_stride + s[None, :] * space_stride
    group = group + tl.arange(0, TILE_GROUPS)
    sample_offsets = group[:, None] * space + s[None, :]
    sample_mask = (group < groups)[:, None] & (s < space)[None, :]
    sample_half = tl.cast(row_groups, tl.int64) * rows * groups * space

    threshold = 0
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr)
    over_rows = tl.zeros((TILE_C, TILE_S), tl.int32)
    for i in range(ROWS):
        row = tl.cast(row_group, tl.int64) * rows + first_row + i
        inside = mask & (first_row + i < rows)
        if x_ptr.dtype.element_ty == tl.uint8:
            known = tl.load(x_ptr + row * row_stride + offsets, mask=inside, other=0)
            found = tl.where(known != 0, tl.where(known == 8, 1, 1 << 16), 0)
        else:
            bits = _bits(x_ptr + row * row_stride, offsets, inside)
            random = bits
            if STOCHASTIC:
                random = _random((row * channels + c[:, None]) * space + s[None, :], seed_ptr, stream)
            HALF: tl.constexpr = single_ptr is None and half_ptr is not None
            q, small = _quantize(bits, threshold, random, F, HALF, STOCHASTIC)
            if single_ptr is not None:
                tl.store(single_ptr + row * row_stride + offsets, q, mask=inside)
            if half_ptr is not None:
                tl.store(half_ptr + row * row_stride + offsets, q.to(tl.float16), mask=inside)
            found = tl.where(q != 0, tl.where(small, 1, 1 << 16), 0)
        over_rows += found
        if sample_ptr is not None:
            if TILE_GROUPS == 1:
                sums = tl.sum(found, axis=0)[None, :]
            else:
                sums = tl.sum(tl.reshape(found, (TILE_GROUPS, TILE_C // TILE_GROUPS, TILE_S)), axis=1)
            at = sample_ptr + row * groups * space + sample_offsets
            _put(at, sums & 0xFFFF, sample_mask & (first_row + i < rows), SAMPLE_SHARED)
            _put(at + sample_half, sums >> 16, sample_mask & (first_row + i < rows), SAMPLE_SHARED)
    at = position_ptr + (tl.cast(row_group, tl.int64) * channels + c[:, None]) * space + s[None, :]
    position_half = tl.cast(row_groups, tl.int64) * channels * space
    _put(at, over_rows & 0xFFFF, mask, POSITION_SHARED)
    _put(at + position_half, over_rows >> 16, mask, POSITION_SHARED)


@triton.jit
def _put(at, value, mask, SHARED: tl.constexpr):
    if SHARED:
        tl.atomic_add(at, value, mask=mask, sem="relaxed")
    else:
        tl.store(at, value, mask=mask)


@triton.jit
def _histogram_kernel(
    x_ptr, out_ptr, count, step, sizes, strides, smallest, largest, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds the quarter-binades of every step-th element to out, int64 [largest - smallest + 1].

    sizes, strides: of x's dimensions, the last first, which is the order in which elements are numbered.
    """
    index = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64) * step
    mask = index < count
    rest = index
    offsets = tl.zeros_like(index)
    for d in tl.static_range(len(sizes)):
        offsets += rest % sizes[d] * strides[d]
        rest = rest // sizes[d]
    magnitude = _bits(x_ptr, offsets, mask) & 0x7FFFFFFF
    bins = tl.minimum(tl.maximum((magnitude >> 21) - 4 * 127, smallest), largest) - smallest
    seen = mask & (magnitude > 0) & (magnitude < 0x7F800000)
    counts = tl.histogram(tl.where(seen, bins, BINS - 1), BINS)
    places = tl.arange(0, BINS)
    tl.atomic_add(out_ptr + places, counts.to(tl.int64), mask=places <= largest - smallest, sem="relaxed")


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
        threshold: T, one int32 element on x's device (no meaning where the rule has no `low`).
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
    formats = _checked(x, threshold, low, high, seed, half=dtype == torch.float16)
    x = _dense(x)
    out = torch.empty_like(x, dtype=dtype)
    marks = torch.empty_like(x, dtype=torch.uint8) if groups else None
    blocks = triton.cdiv(x.numel(), BLOCK)
    # Totals: 16 programs per multiprocessor even out; up to 8 blocks each keep the partial sums few.
    steps = min(8, power_of_2(max(1, blocks // (16 * processors(x.device))))) if totals else 1
    programs = triton.cdiv(blocks, steps)
    partial = torch.empty(programs, 2, dtype=torch.int32, device=x.device) if totals else None
    if programs:
        sizes, strides = ((1,), (1,)) if seed is None else _memory_order(x)
        with on(x):
            _flat_kernel[(programs,)](
                _readable(x),
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
                BLOCK=BLOCK,
            )
    return out, marks, None if partial is None else _totals(partial, x.numel())


def quantize_grid(
    x: Tensor,
    threshold: Tensor,
    low: str | None,
    high: str | None,
    share: int,
    channel_groups: int,
    *,
    single: bool = False,
    half: bool = True,
    sample: bool = True,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """`quantize` of a grid [N, C, *grid] (or a weight), with the sums that the counters need instead of groups.

    Args:
        share: how many samples in a row have one count by position; divides N.
        channel_groups: of the convolution; divides C.
        single, half: whether the values are wanted as float32, as binary16, or both.
        sample: whether counts by sample are wanted.

    Returns:
        float32 values or None; float16 values or None; `counting.per_position(groups, share)`, int32
        [2, N / share, C, *grid]; `counting.per_sample(groups, channel_groups)`, int32 [2, N, g, *grid], or None.

    Raises:
        As `quantize`; ValueError also for a share or number of groups that does not divide.
    """
    formats = _checked(x, threshold, low, high, seed, half)
    _check_layout(x, share, channel_groups)
    x = _dense(x)
    if _grid_strides(x) is not None:
        floats = torch.empty_like(x, dtype=torch.float32) if single else None
        halves = torch.empty_like(x, dtype=torch.float16) if half else None
        sums = _grid(x, (floats, halves), formats, threshold, seed, stream, share, channel_groups, sample)
        return floats, halves, *sums
    # Memory runs in an order in which no tile serves both sums: count from the groups.
    dtype = torch.float32 if single else torch.float16
    rounded, groups, _ = quantize(x, threshold, low, high, seed=seed, stream=stream, dtype=dtype)
    assert groups is not None
    floats, halves = rounded if single else None, rounded.to(torch.float16) if half else None
    return floats, halves, *grid_sums(groups, share, channel_groups, sample=sample)


def grid_sums(x: Tensor, share: int, channel_groups: int, *, sample: bool = True) -> tuple[Tensor, Tensor | None]:
    """The counts of `quantize_grid` for a tensor that is not rounded, in one pass.

    Args:
        x: [N, C, *grid]. Groups (uint8: 0, 8, 16); or floats, of which all that are not zero count as FP16.
        share, channel_groups, sample: as in `quantize_grid`.
    """
    check_dtype((torch.uint8, *FLOATS), x=x)
    check_device(x=x)
    _check_layout(x, share, channel_groups)
    x = x if _grid_strides(x) is not None else x.contiguous()
    return _grid(x, (None, None), Formats.of(None, None), None, None, 0, share, channel_groups, sample)


def histogram(x: Tensor, high: str | None) -> Tensor:
    """`reference.histogram`: quarter-binades of a strided sample of x.

    Args:
        x: float32, float16 or bfloat16, any shape and strides.
        high: name of the rule's high format; with `reference` it sets the range of the bins.

    Returns:
        int64 [bins].
    """
    check_dtype(FLOATS, x=x)
    check_device(x=x)
    wide = FORMATS[high or "fp16"]
    smallest, largest = 4 * (wide.ulp_exponent - 1) - 1, 4 * wide.max_exponent + 3
    out = torch.zeros(largest - smallest + 1, dtype=torch.int64, device=x.device)
    count = x.numel()
    if count == 0:
        return out
    step = max(1, -(-count // SAMPLE))
    while count > SAMPLE and gcd(step, count) != 1:  # no divisor in common with the size: no row is favoured
        step += 1
    block = 1024
    programs = triton.cdiv(triton.cdiv(count, step), block)
    bins = power_of_2(len(out) + 1)  # at least one to spare, for what is not counted
    sizes, strides = (tuple(x.shape[::-1]), x.stride()[::-1]) if x.dim() else ((1,), (1,))
    with on(x):
        _histogram_kernel[(programs,)](
            _readable(x), out, count, step, sizes, strides, smallest, largest, BINS=bins, BLOCK=block
        )
    return out


def _checked(
    x: Tensor, threshold: Tensor, low: str | None, high: str | None, seed: Tensor | None, half: bool
) -> Formats:
    check_dtype(FLOATS, x=x)
    check_dtype((torch.int32,), threshold=threshold)
    if seed is not None:
        check_dtype((torch.int64,), seed=seed)
    check_device(x=x, threshold=threshold, seed=seed)
    if low is None and high is None:
        raise ValueError("quantize needs a low format, a high one, or both")
    if half and (high or "fp16") != "fp16":
        raise ValueError(f"values of {high} do not fit float16: ask for float32")
    for name, tensor in (("threshold", threshold), ("seed", seed)):
        if tensor is not None and tensor.numel() != 1:
            raise ValueError(f"{name} must have one element, not {tensor.numel()}")
    return Formats.of(low, high)


def _check_layout(x: Tensor, share: int, channel_groups: int) -> None:
    if x.dim() < 2:
        raise ValueError(f"expected [N, C, *grid], got {list(x.shape)}")
    for name, size, by in (("samples", x.shape[0], share), ("channels", x.shape[1], channel_groups)):
        if size and (by < 1 or size % by):
            raise ValueError(f"{size} {name} do not divide by {by}")


def _readable(x: Tensor) -> Tensor:
    """bfloat16 as its bits: the kernels widen them themselves, which needs no hardware support."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _dense(x: Tensor) -> Tensor:
    """x itself if its elements fill a stretch of memory in any order; else a copy, laid out as `empty_like` would."""
    like = torch.empty_like(x, device="meta")
    return x if like.stride() == x.stride() else torch.empty_like(x).copy_(x)


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


def _grid_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of x [N, C, *grid] seen as [N, C, prod(grid)]; None if it cannot be, or if N is the fastest axis."""
    space = [d for d in range(2, x.dim()) if x.shape[d] > 1]
    step = x.stride(space[-1]) if space else 1
    if any(x.stride(a) != x.stride(b) * x.shape[b] for a, b in pairwise(space)):
        return None
    fastest = [s for s, size in ((x.stride(1), x.shape[1]), (step, prod(x.shape[2:]))) if size > 1]
    if x.shape[0] > 1 and fastest and x.stride(0) < min(fastest):
        return None
    return x.stride(0), x.stride(1), step


def _totals(partial: Tensor, count: int) -> Tensor:
    totals = torch.empty(3, dtype=torch.int64, device=partial.device)
    loops = power_of_2(triton.cdiv(len(partial), 1024))
    with on(partial):
        _totals_kernel[(1,)](partial, totals, count, len(partial), STEPS=loops, BLOCK=1024)
    return totals


def _grid(
    x: Tensor,
    values: tuple[Tensor | None, Tensor | None],
    formats: Formats,
    threshold: Tensor | None,
    seed: Tensor | None,
    stream: int,
    share: int,
    channel_groups: int,
    sample: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, channels, *grid = x.shape
    if x.numel() == 0:
        blocks = batch // share if share else 1
        shapes = (2, blocks, channels, *grid), (2, batch, channel_groups, *grid)
        zeros = [torch.zeros(shape, dtype=torch.int32, device=x.device) for shape in shapes]
        return zeros[0], zeros[1] if sample else None
    space, strides = prod(grid), _grid_strides(x)
    assert strides is not None
    group_size = channels // channel_groups
    tile_groups, tile_c, tile_s = _tile(channels, group_size, space, strides[1] == 1 and channels > 1)
    group_tiles = triton.cdiv(group_size, tile_c) if tile_groups == 1 else 1
    channel_tiles = channel_groups * group_tiles if tile_groups == 1 else triton.cdiv(channels, tile_c)
    space_tiles = triton.cdiv(space, tile_s)
    # Three full tiles per multiprocessor keep enough loads under way; more would only add to the counts more often.
    programs = 3 * processors(x.device) * BLOCK // (tile_c * tile_s)
    walk = channel_tiles * space_tiles * batch // programs
    walk = min(64, power_of_2(share), power_of_2(walk + 1) // 2 or 1)
    chunks = triton.cdiv(share, walk)
    # Counts to be added to start from zero; counts that are written once need no start.
    position = (torch.zeros if chunks > 1 else torch.empty)(
        (2, batch // share, channels, *grid), dtype=torch.int32, device=x.device
    )
    by_sample = None
    if sample:
        by_sample = (torch.zeros if group_tiles > 1 else torch.empty)(
            (2, batch, channel_groups, *grid), dtype=torch.int32, device=x.device
        )
    sizes = (group_size, space, *strides)
    units = tuple(alignment(size) for size in sizes)
    group_units, *other_units = (size // unit for size, unit in zip(sizes, units, strict=True))
    with on(x):
        _grid_kernel[(space_tiles * channel_tiles * chunks * (batch // share),)](
            _readable(x),
            *values,
            position,
            by_sample,
            threshold,
            seed,
            stream,
            share,
            group_units,
            channel_groups,
            *other_units,
            space_tiles,
            channel_tiles,
            group_tiles,
            chunks,
            batch // share,
            UNITS=units,
            F=formats,
            STOCHASTIC=seed is not None,
            POSITION_SHARED=chunks > 1,
            SAMPLE_SHARED=group_tiles > 1,
            ROWS=walk,
            TILE_GROUPS=tile_groups,
            TILE_C=tile_c,
            TILE_S=tile_s,
        )
    return position, by_sample


def _tile(channels: int, group_size: int, space: int, channels_last: bool) -> tuple[int, int, int]:
    """Channel groups, channels and positions in a tile of at most BLOCK elements.

    Along the axis on which memory is contiguous it covers 64 channels or 128 positions, if there are so many (and more
    where the other axis is short). It holds one channel group or a part of one; where groups are narrow powers of
    two, several whole ones.
    """
    wide_c = max(64, BLOCK // power_of_2(space)) if channels_last else BLOCK // min(128, power_of_2(space))
    whole = power_of_2(group_size) == group_size and group_size < min(wide_c, channels)
    tile_c = min(wide_c, power_of_2(channels if whole else group_size))
    tile_groups = tile_c // group_size if whole else 1
    return tile_groups, tile_c, min(power_of_2(space), BLOCK // tile_c)
