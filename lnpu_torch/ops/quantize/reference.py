"""The numerics in plain torch, slow and exact: rounding, thresholds, random bits. The specification in code.

Faster implementations are held against this module bit by bit; it calls none of them.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from lnpu_torch.quant.formats import FORMATS, Format
from lnpu_torch.quant.precision import Rule

CLASSES = ZERO, FP8, FP16 = 0, 8, 16
"""Precision classes of elements; FP16 is also that of what is left in float."""
UNSET = -(2**31)
"""The threshold of a tensor that has not been seen yet."""
SAMPLE = 2**14
"""At most this many elements of a tensor are looked at to choose its threshold.

Each costs a miss of the caches. Over inputs and errors of ResNet-18 on CIFAR-10, the threshold is that of all elements
in 85 % of cases, and else its neighbour; with four times as many in 94 %.
"""


Threshold = Tensor | int
"""As int32 [] or, where the host knows it, as a number."""


class Request(NamedTuple):
    """How an operand [N, C, *grid] is to be rounded and counted.

    `rule`: a `Rule` as JSON. `row`: of a layer's thresholds; also the stream of its random bits. `layout`: how many
    samples in a row share one count, and the number of channel groups. `wanted`: values in `compute_dtype(x)`; in
    binary16; counts over channels; a lane profile. `joined`: whether the profile's runs go on from sample to sample.
    """

    rule: str
    row: int
    layout: tuple[int, int]
    wanted: tuple[bool, bool, bool, bool]
    joined: bool = False


class Rounded(NamedTuple):
    """An operand [N, C, *grid], rounded and counted. What was not asked for is None.

    `single` and `half`: its values in `compute_dtype` and in binary16. The counts: its elements of each group, as
    `pair_counts` needs them. `lanes`: its lane profile. `threshold`: by which it was rounded, if it was. `runs`: of
    which `lanes`, zeros until then, is made when the operand's step is counted.
    """

    single: Tensor | None
    half: Tensor | None
    counts_over_batch: Tensor
    counts_over_channels: Tensor | None
    lanes: Tensor | None
    threshold: Threshold | None = None
    runs: Tensor | None = None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is rounded: float64 as it is, everything narrower in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def round_to(x: Tensor, form: Format, random: Tensor | None = None) -> Tensor:
    """Round to a format: nearest, ties to even (or stochastically, by `random`); overflow gives infinity.

    Args:
        x: float32 or float64, any shape.
        form: IEEE-like, or wide enough never to overflow.
        random: 24 random bits per element, as from `random_bits`.
    """
    q = _round(x.abs(), form.mantissa, form.min_exponent, random)
    q = torch.where(q > form.max, torch.inf, q)
    return torch.where(x.isfinite(), q.copysign(x), x)


def quantize(x: Tensor, rule: Rule, threshold: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round every element by its rule (docs: FGMP). NaN and infinities pass unchanged, -0 stays -0.

    Args:
        x: any shape and floating dtype.
        threshold: one int32 element (no meaning where the rule has no `low`).
        random: 24 random bits per element for stochastic rounding.

    Returns:
        The rounded tensor (`compute_dtype(x)`) and each element's precision class (uint8, of CLASSES).
    """
    x = within_window(x.to(compute_dtype(x)), rule, threshold)
    magnitude, wide = x.abs(), rule.wide
    small = torch.zeros_like(x, dtype=torch.bool)
    if rule.low:
        low, window = FORMATS[rule.low], window_exponent(rule, threshold) - FORMATS[rule.low].max_exponent
        small = (magnitude < tau(threshold, x.dtype)) if rule.high else torch.ones_like(small)
        mantissa = torch.where(small, low.mantissa, wide.mantissa)
        least = torch.where(small, low.min_exponent + window, wide.min_exponent)
        q = _round(magnitude, mantissa, least, random)
    else:
        q = _round(magnitude, wide.mantissa, wide.min_exponent, random)
    if rule.high:
        q = torch.where(q > wide.max, torch.inf, q)
    else:
        q = torch.minimum(q, FORMATS[rule.low or "e4m3"].max * _power(window, x.dtype))
    q = torch.where(x.isfinite(), q.copysign(x), x)
    return q, torch.where(q == 0, ZERO, torch.where(small, FP8, FP16)).to(torch.uint8)


def within_window(x: Tensor, rule: Rule, threshold: Tensor) -> Tensor:
    """x with zeros, of its signs, for what lies in the FP8 group and below the binades of `rule.window`."""
    if rule.window is None:
        return x
    dtype = compute_dtype(x)
    least = _power(window_exponent(rule, threshold) - rule.window + 1, dtype)
    if rule.high:
        least = torch.minimum(least, tau(threshold, dtype))
    return torch.where(x.abs().to(dtype) < least, x * 0, x)


def float_classes(x: Tensor) -> Tensor:
    """Precision classes of an operand left in float."""
    return (x != 0).to(torch.uint8) * FP16


def tau(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The threshold itself: 2^e (1 + k/4) for T = 4e + k."""
    return _power(threshold >> 2, dtype) * (1 + (threshold & 3) / 4)


def window_exponent(rule: Rule, threshold: Tensor) -> Tensor:
    """Exponent of the FP8 window's top binade: the threshold's, but never so low that a code leaves the wide format."""
    low = FORMATS[rule.low or "e4m3"]
    return (threshold >> 2).clamp(min=rule.wide.ulp_exponent - low.ulp_exponent + low.max_exponent)


def choose_threshold(x: Tensor, rule: Rule, fallback: Tensor) -> Tensor:
    """The threshold that suits x by the rule (numerics: rules A, B, C); `fallback` if x has no finite non-zero element.

    Returns:
        One int32 element on x's device; nothing is read back by the host.
    """
    smallest, largest = rule.threshold_range
    if rule.low is None or rule.threshold is not None:
        return torch.full_like(fallback, smallest if rule.threshold is None else rule.threshold)
    if rule.high is None:
        finite = torch.where(x.isfinite(), x.abs(), 0).to(compute_dtype(x))
        amax = finite.max() if finite.numel() else finite.sum()
        return torch.where(amax > 0, (_quarter_binade(amax) + 1).clamp(smallest, largest), fallback).to(torch.int32)
    return choose_by_histogram(histogram(x, rule), rule, fallback)


def histogram(x: Tensor, rule: Rule) -> Tensor:
    """How many elements of x's sample lie in each quarter-binade [tau(T), tau(T+1)), zeros and non-finite left out.

    Returns:
        int64 [bins], for thresholds from one below the rule's smallest to its largest; the ends take what lies beyond.
    """
    smallest, largest = rule.threshold_range
    values = strided_sample(x).to(compute_dtype(x)).abs()
    bins = _quarter_binade(values).clamp(smallest - 1, largest) - (smallest - 1)
    seen = (values.isfinite() & (values > 0)).to(torch.int64)
    return seen.new_zeros(largest - smallest + 2).index_add_(0, bins.to(torch.int64), seen)


def largest_bin(x: Tensor, rule: Rule) -> Tensor:
    """What uniform FP8's threshold rests on, as a `histogram`: one count in the bin of that which x asks for.

    The highest bin with a count in it, over several tensors, is the threshold for all of them. Float64 [bins], all zero
    where x has no finite non-zero element.
    """
    smallest, largest = rule.threshold_range
    t = choose_threshold(x, rule, torch.tensor(UNSET, dtype=torch.int32, device=x.device))
    bins = torch.arange(smallest - 1, largest + 1, device=x.device)
    return (bins == t).to(torch.float64)


def strided_sample(x: Tensor) -> Tensor:
    """At most SAMPLE elements of x, evenly spread in logical order, whatever x's strides."""
    step = sample_step(x.numel())
    if x.is_contiguous():
        return x.reshape(-1)[::step]
    return x[torch.unravel_index(torch.arange(0, x.numel(), step, device=x.device), x.shape)]


def sample_step(count: int) -> int:
    """The step of a sample; it has no divisor in common with the size, so that no row or column is favoured."""
    step = max(1, -(-count // SAMPLE))
    while count > SAMPLE and gcd(step, count) != 1:
        step += 1
    return step


def random_bits(shape: torch.Size, seed: Tensor, stream: int) -> Tensor:
    """24 random bits per element: Philox4x32-10 (Salmon et al., SC 2011), keyed by seed, counting elements.

    Args:
        seed: one int64 element; the same seed and stream give the same bits on every device.
        stream: which of a layer's tensors this is, so that they do not share bits.
    """
    count = torch.arange(shape.numel(), device=seed.device, dtype=torch.int64)
    zero = torch.zeros_like(count)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    word = philox((count & 0xFFFFFFFF, count >> 32, zero + stream, zero), key)[0]
    return (word >> 8).reshape(shape)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on uint32 words held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps; the 64-bit pattern is right
        c0, c2 = ((b >> 32) & 0xFFFFFFFF) ^ c1 ^ k0, ((a >> 32) & 0xFFFFFFFF) ^ c3 ^ k1
        c1, c3 = b & 0xFFFFFFFF, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _round(magnitude: Tensor, mantissa: Tensor | int, least: Tensor | int, random: Tensor | None) -> Tensor:
    """Round magnitudes to `mantissa` bits, in a binade not below `least`."""
    ulp = torch.maximum(_exponent(magnitude), torch.as_tensor(least, device=magnitude.device)) - mantissa
    scaled = magnitude * _power(-ulp, magnitude.dtype)
    if random is None:
        return scaled.round() * _power(ulp, magnitude.dtype)
    below = scaled.floor()
    return (below + (random.to(scaled.dtype) * 2.0**-24 < scaled - below)) * _power(ulp, magnitude.dtype)


def _exponent(magnitude: Tensor) -> Tensor:
    """floor(log2), from the bits; subnormals of the dtype count as its smallest binade."""
    if magnitude.dtype == torch.float64:
        return (magnitude.view(torch.int64) >> 52) - 1023
    return (magnitude.view(torch.int32) >> 23) - 127


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, exactly, for normal numbers of the dtype."""
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(dtype)
    return ((exponent.to(torch.int32) + 127) << 23).view(dtype)


def _quarter_binade(magnitude: Tensor) -> Tensor:
    """The largest threshold not above each magnitude."""
    if magnitude.dtype == torch.float64:
        return (magnitude.view(torch.int64) >> 50) - 4 * 1023
    return (magnitude.view(torch.int32) >> 21) - 4 * 127


def choose_by_histogram(counts: Tensor, rule: Rule, fallback: Tensor) -> Tensor:
    """The threshold that suits a tensor with this `histogram`, by `max_error` or `fp16_share`; int32 []."""
    total = counts.sum()
    above = counts.flip(0).cumsum(0).flip(0)[1:]  # elements in FP16, for each threshold
    if rule.fp16_share is not None:
        best = (above <= rule.fp16_share * total.double()).to(torch.int32).argmax()
        best = torch.where(above[-1] <= rule.fp16_share * total.double(), best, len(above) - 1)
    else:
        error, signal = error_table(rule, top_binade(counts, rule) - torch.where(total > SAMPLE, 14, RANGE))
        error, signal = (error * counts).sum(1), (signal * counts).sum()
        fits = error.double() <= (rule.max_error or 0.0) ** 2 * signal.double()
        order = torch.arange(len(above), device=counts.device)
        furthest = torch.where(fits, order, 0).max()
        groups = above.gather(0, furthest[None])  # by an index, a GPU would be waited for
        best = (above == groups).to(torch.int32).argmax()  # same groups, tightest window
    return torch.where(total > 0, best + rule.threshold_range[0], fallback).to(torch.int32)


def top_binade(counts: Tensor, rule: Rule) -> Tensor:
    """The binade of the largest element in a `histogram`, int64 []; the lowest there is if that is empty."""
    binades = (torch.arange(len(counts), device=counts.device) + (rule.threshold_range[0] - 1)) >> 2
    return torch.where(counts > 0, binades, binades[0]).max()


RANGE = 19
"""Predicted squared errors are counted in units of 4^(top - RANGE) / 48, where the largest element is in binade top."""


def error_table(rule: Rule, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Expected squared error of an element of each bin under each T [T, bin], and its mean square [bin]; int64.

    Both in units of 4^unit / 48, in which squared errors of evenly spread elements (ulp^2 / 12) and mean squares over
    a quarter-binade (4^e S / 48) are whole numbers; an error below one unit counts as 0. With the unit RANGE binades
    below the top, sums over a sample of SAMPLE elements stay below 2^62, and so are the same in any order; 14 binades
    below, sums over the samples of 1,024 ranks.

    Args:
        unit: int64 [].
    """
    smallest, largest = rule.threshold_range
    low, wide = FORMATS[rule.low or "e4m3"], rule.wide
    bins = torch.arange(smallest - 1, largest + 1, device=unit.device)
    t = torch.arange(smallest, largest + 1, device=unit.device)[:, None]
    e, k = bins >> 2, bins & 3
    square = 3 * k * k + 27 * k + 61  # 48 (a^2 + a/4 + 1/48), where a = 1 + k/4
    window = window_exponent(rule, t) - low.max_exponent
    low_ulp = torch.maximum(e, window + low.min_exponent) - low.mantissa
    high_ulp = e.clamp(min=wide.min_exponent) - wide.mantissa
    over = torch.where(bins < t, low_ulp, high_ulp) + 1 - e  # 48 ulp^2 / 12 = 4^e 4^over
    lost = (1 << (2 * over.clamp(0, 4))) > square  # rounded to zero: the error is the element itself
    whole = _units(square, e - unit)
    return torch.where(lost, whole, _units(1, e + over - unit)), whole


def _units(factor: Tensor | int, power: Tensor) -> Tensor:
    """factor * 4^power, or 0 where the power is negative; above the top binade, where nothing is, it may be wrong."""
    return torch.where(power < 0, 0, factor << (2 * power.clamp(0, RANGE + 3)))
