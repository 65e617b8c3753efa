"""How the kernels round one element, and what a tensor must be for that. Formats are numbers here; no launches.

The low (FP8) group is rounded by adding and subtracting a power of two, chosen so that the sum's last place is the
wanted one; no FP8 cast is used, so that any GPU and any format will do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.launch import check_device, check_dtype
from lnpu_torch.quant.formats import FORMATS, Format

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Config(NamedTuple):
    """How a tensor is cut for a launch."""

    block: int
    """Elements of a tile."""
    warps: int
    per_processor: int
    """Programs of full tiles that each multiprocessor gets: enough to keep loads under way, few enough that counts are
    rarely added to."""
    longest: int
    """The most tiles that a program walks."""


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
def bits_of(x_ptr, offsets, mask):
    """An element as the bits of its float32. A bfloat16 comes as int16: its bits are float32's upper half."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    if x.dtype == tl.int16:
        return x.to(tl.int32) << 16
    return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def random_bits(count, seed_ptr, stream):
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
def round_by_rule(bits, threshold, random, F: tl.constexpr, HALF: tl.constexpr, STOCHASTIC: tl.constexpr):
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


def checked(
    x: Tensor, threshold: Tensor, low: str | None, high: str | None, seed: Tensor | None, half: bool
) -> Formats:
    check_dtype(FLOATS, x=x)
    check_keys(x, threshold, seed)
    if threshold.numel() != 1:
        raise ValueError(f"threshold must have one element, not {threshold.numel()}")
    return check_formats(low, high, half)


def check_keys(x: Tensor, threshold: Tensor, seed: Tensor | None) -> None:
    """What a tensor is rounded by fits it."""
    check_dtype((torch.int32,), threshold=threshold)
    if seed is not None:
        check_dtype((torch.int64,), seed=seed)
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element, not {seed.numel()}")
    check_device(x=x, threshold=threshold, seed=seed)


def check_formats(low: str | None, high: str | None, half: bool) -> Formats:
    if low is None and high is None:
        raise ValueError("quantize needs a low format, a high one, or both")
    if half and (high or "fp16") != "fp16":
        raise ValueError(f"values of {high} do not fit float16: ask for float32")
    return Formats.of(low, high)


def readable(x: Tensor) -> Tensor:
    """bfloat16 as its bits: the kernels widen them themselves, which needs no hardware support."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def dense(x: Tensor) -> Tensor:
    """x itself if its elements fill a stretch of memory in any order; else a copy, laid out as `empty_like` would."""
    like = torch.empty_like(x, device="meta")
    return x if like.stride() == x.stride() else torch.empty_like(x).copy_(x)
