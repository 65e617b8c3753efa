"""Rounding, counts by group and thresholds in one pass over a tensor, by loops that Numba compiles.

Bit-equal to `reference`. Work is split over `torch.get_num_threads()` threads; the compiled loops hold no lock and keep
no state.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS
from lnpu_torch.ops.memory_format import dense
from lnpu_torch.ops.pair_counts.reference import sample_dtype
from lnpu_torch.ops.parallel import team
from lnpu_torch.ops.quantize import cpu_loops, cpu_threshold_loops, reference
from lnpu_torch.ops.quantize.cpu_threshold_loops import INFINITY
from lnpu_torch.ops.quantize.reference import Request, Rounded, sample_step, tau, window_exponent
from lnpu_torch.ops.reference import parsed
from lnpu_torch.quant.formats import FORMATS
from lnpu_torch.quant.precision import Rule

CHANNELS = 2**15 - 1
"""The most over which one packed sum can reach: FP8 in its lower 16 bits, FP16 in its upper 15, without the sign."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def taken(x: Tensor, seed: Tensor | None = None) -> Tensor | None:
    """A tensor as this module takes it, dense and in float32; None if it does not.

    It takes at most float32, not empty, and rounds to nearest (without a seed).
    """
    if seed is not None or x.dtype not in DTYPES or x.numel() == 0 or (x.dim() > 1 and x.shape[1] > CHANNELS):
        return None
    return dense(x).float()


class CompiledRule:
    """A rule in numbers, as the compiled loops take it."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.first, self.last = rule.threshold_range
        low, wide = FORMATS[rule.low or "e4m3"], rule.wide
        lowest = int(window_exponent(rule, _scalar(self.first)))
        share = -1.0 if rule.fp16_share is None else rule.fp16_share  # negative: by `max_error`
        formats = (low.mantissa, low.min_exponent, low.max_exponent, lowest, wide.mantissa, wide.min_exponent)
        choice = (share, (rule.max_error or 0.0) ** 2, *formats, self.first, self.last)
        self._choice = np.asarray(choice, np.float64)
        self.choice = self._choice.ctypes.data if rule.adaptive else 0

    def choose(self, x: Tensor, current: int) -> int:
        """The threshold for x, by plain torch."""
        return int(reference.choose_threshold(x, self.rule, _scalar(current)))


@lru_cache(maxsize=256)
def compiled_rule(text: str) -> CompiledRule:
    """Of a rule as JSON."""
    return CompiledRule(parsed(text))


def quantize_operand(x: Tensor, threshold: int, request: Request, choosing: bool = False) -> tuple[Rounded, int]:
    """Round and count a dense float32 operand; if `choosing`, also choose the threshold that x asks for."""
    rule, _, layout, wanted, joined = request
    joined = joined or x.dim() == 2
    kind, positions, samples, sizes, step = _shapes(x.shape, layout)
    single = torch.empty_like(x) if wanted[0] else None
    half = torch.empty_like(x, dtype=torch.float16) if wanted[1] else None
    over_batch = torch.empty(positions, dtype=torch.int32, device="cpu")
    over_channels = torch.empty(samples, dtype=kind, device="cpu") if wanted[2] else None
    lanes = torch.zeros(len(LANE_CONFIGS), dtype=torch.int64, device="cpu") if wanted[3] else None
    kept = 0 if over_channels is None else over_channels.data_ptr()
    halves = 0 if half is None else half.data_ptr()
    chosen = cpu_loops.quantize_operand(
        team(x.numel()),
        (x.data_ptr(), 0 if single is None else single.data_ptr(), halves),
        over_batch.data_ptr(),
        (kept, 0) if kind == torch.uint8 else (0, kept),
        (0 if lanes is None else lanes.data_ptr(), joined),
        (*sizes, not x.is_contiguous()),
        parameters(rule, threshold),
        (step, compiled_rule(rule).choice if choosing else 0, threshold),
    )
    return Rounded(single, half, over_batch, over_channels, lanes, threshold), chosen


def quantize(
    x: Tensor, rule: str, threshold: int, want_classes: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.quantize`, of a dense float32 tensor; `out`, if it is given, takes the values and lies as x."""
    values = torch.empty_like(x) if out is None else out
    classes = torch.empty_like(x, dtype=torch.uint8) if want_classes else None
    places = (x.data_ptr(), values.data_ptr(), 0 if classes is None else classes.data_ptr())
    fp8, wide = cpu_loops.quantize_flat(team(x.numel()), *places, x.numel(), parameters(rule, threshold))
    empty = x.new_empty(0, dtype=torch.uint8)
    return (
        values,
        empty if classes is None else classes,
        torch.tensor([x.numel() - fp8 - wide, fp8, wide], device="cpu"),
    )


def round_half(x: Tensor) -> None:
    """Round a dense float32 tensor to binary16, in place."""
    cpu_loops.round_half(team(x.numel()), x.data_ptr(), x.numel())


def choose_threshold(x: Tensor, rule: CompiledRule, current: int, step: int) -> int:
    """`reference.choose_threshold` by a histogram of every step-th element of a dense float32 tensor."""
    size, choosing = x.numel(), (step, rule.choice, current)
    return int(cpu_threshold_loops.choose_threshold(team(size), x.data_ptr(), size, choosing, _turned(x)))


def histogram(x: Tensor, rule: CompiledRule) -> Tensor:
    """`reference.histogram` of a dense float32 tensor."""
    arguments = (x.data_ptr(), x.numel(), sample_step(x.numel()), rule.first, rule.last, _turned(x))
    return torch.from_numpy(cpu_threshold_loops.histogram(team(x.numel()), *arguments))


@lru_cache(maxsize=4096)
def _shapes(shape: torch.Size, layout: tuple[int, int]) -> tuple[Any, ...]:
    """The dtype of counts over channels; the shapes of counts over the batch and over channels; sizes as the loops take
    them; the step of a sample.
    """
    (share, groups), (batch, channels, *grid) = layout, shape
    positions, samples = (2, batch // share, channels, *grid), (2, batch, groups, *grid)
    sizes = (batch, channels, prod(grid), groups, share)
    return sample_dtype(channels, groups), positions, samples, sizes, sample_step(shape.numel())


def _turned(x: Tensor) -> tuple[int, int]:
    """Channels and positions of a tensor in channels_last; zeros for a contiguous one."""
    return (0, 0) if x.is_contiguous() else (x.shape[1], prod(x.shape[2:]))


def _scalar(threshold: int) -> Tensor:
    return torch.scalar_tensor(threshold, dtype=torch.int32, device="cpu")


@lru_cache(maxsize=4096)
def parameters(text: str, threshold: int) -> tuple[float, ...]:
    """What `cpu_loops._rounding` takes of a rule (its JSON) and a threshold: bit patterns, exponents, limits."""
    rule = parsed(text)
    t, wide = _scalar(threshold), rule.wide
    last = -1  # the bits of the largest magnitude that is FP8's: none
    low_mantissa, low_least, low_max = wide.mantissa, wide.min_exponent, float("inf")
    if rule.low:
        low = FORMATS[rule.low]
        window = int(window_exponent(rule, t)) - low.max_exponent
        low_mantissa, low_least = low.mantissa, low.min_exponent + window
        last = int(np.float32(float(tau(t, torch.float64))).view(np.int32)) - 1 if rule.high else 2**31 - 1
        low_max = float("inf") if rule.high else low.max * 2.0**window
    with np.errstate(over="ignore"):  # float32's infinity, where the format reaches as far as float32
        beyond = int(np.float32(2.0 ** (wide.max_exponent + 1)).view(np.int32))
    powers = (127 + low_least, 23 - low_mantissa, 127 + wide.min_exponent, 23 - wide.mantissa)
    # what is not finite is in the FP8 group, too, if all is; but it is never rounded as that
    everything = last >= INFINITY
    return (min(last, INFINITY - 1), everything, *(power << 23 for power in powers), beyond, low_max, wide.max)
