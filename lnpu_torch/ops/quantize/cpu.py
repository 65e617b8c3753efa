"""Fast CPU implementations, compiled by Numba: rounding, group counts and thresholds in one pass over a tensor.

Bit-equal to `reference` and `counting`. Work is split over `torch.get_num_threads()` threads; the compiled loops hold
no lock and keep no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS, runs_shape
from lnpu_torch.ops import buffers, shared_loops
from lnpu_torch.ops.lanes import cpu as cpu_lanes
from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.quantize import reference
from lnpu_torch.ops.quantize.reference import sample_step, tau, window_exponent
from lnpu_torch.ops.threads import team
from lnpu_torch.quant.formats import FORMATS
from lnpu_torch.quant.precision import Rule

Array = np.ndarray[Any, Any]

KINDS = {**buffers.KINDS, torch.float16: "=u2", torch.int32: "=i4"}
"""Numpy's names of dtypes, as the loops see them: binary16 as its bits."""
Rounded = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""What `ops.round_and_count` returns."""
_tensor = torch.from_numpy
CHANNELS = 2**15 - 1
"""The most over which one packed sum can reach: FP8 in its lower 16 bits, FP16 in its upper 15, without the sign."""


def supports(x: Tensor, rule: Rule | None) -> bool:
    """Whether this module takes a tensor (and rule): at most float32, not empty, rounded to nearest."""
    nearest = rule is None or rule.rounding == "nearest"
    fits_counter = x.dim() < 2 or x.shape[1] <= CHANNELS
    return nearest and fits_counter and x.numel() > 0 and x.dtype in (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    x: Tensor,
    rule: Rule,
    threshold: Tensor,
    seed: Tensor | None,
    stream: int,
    layout: Sequence[int],
    wanted: Sequence[bool],
    last: bool,
) -> Rounded:
    """`ops.round_and_count`, for a contiguous or channels_last x."""
    work = _Work(x.float(), layout, wanted, last)
    shared_loops.quantize(*work.arguments, *work.orders, _parameters(rule, int(threshold)))
    return work.results()


def read(
    x: Tensor,
    states: Tensor,
    row: int,
    rule: Rule,
    layout: Sequence[int],
    wanted: Sequence[bool],
    last: bool,
    training: bool,
) -> tuple[Tensor, *Rounded]:
    """`ops.read`, for a contiguous or channels_last float32 x."""
    state = states.numpy()[row]
    current = int(state[0])
    if current == reference.UNSET or not (training and rule.adaptive):
        threshold = next_threshold(x, states, row, rule, training)
        return threshold, *quantize(x, rule, threshold, None, row, layout, wanted, last)
    work, choosing = _Work(x, layout, wanted, last), (*_sampling(x, rule), _choice(rule), current)
    arguments = (*work.arguments, *work.orders, _parameters(rule, current), choosing)
    state[1] = shared_loops.read(*arguments)
    return _tensor(np.array(current, np.int32)), *work.results()


class _Work:
    """A contiguous or channels_last float32 operand to be rounded, and memory for what is known of it then.

    Counts are numpy's arrays: from cold caches each kind of call takes 20 us, but many of one kind little more.
    """

    def __init__(self, x: Tensor, layout: Sequence[int], wanted: Sequence[bool], last: bool) -> None:
        (share, groups), lies_last = layout, not x.is_contiguous()
        batch, channels, *grid = x.shape
        blocks, positions = batch // share, prod(grid)
        last, turns = last or lies_last, last and not lies_last and min(channels, positions) > 1
        # binary16 first: what is kept for backward leaves no gaps between what is not
        self.half = buffers.POOL.empty(x.shape, torch.float16, last) if wanted[1] else None
        self.single = buffers.POOL.empty(x.shape, torch.float32, last) if wanted[0] else None
        self.position = np.empty((2, blocks, channels, *grid), np.int32)
        self.kind = KINDS[counting.sample_dtype(channels, groups)]
        self.sample = np.empty((2, batch, groups, *grid), self.kind) if wanted[2] else None
        self.profile = np.zeros(len(LANE_CONFIGS), np.int64) if wanted[3] else None
        self.runs = np.empty(runs_shape(x.shape), np.uint8) if wanted[3] and grid else None  # else along the rows
        self.arguments = (
            team(x.numel()),
            _memory(x),
            None if self.single is None else _memory(self.single),
            None if self.half is None else _memory(self.half),
            self.position.reshape(2, blocks, -1),
            None if self.sample is None else self.sample.reshape(2, batch, groups, positions),
            self.runs,
            None if self.runs is None else (team(self.runs.size), self.profile),
            share,
            (batch, channels, positions),
        )
        self.orders = (lies_last or None, turns or None)

    def results(self) -> Rounded:
        """As from `ops.round_and_count`."""
        single = _tensor(np.empty(0, np.float32)) if self.single is None else self.single
        half = _tensor(np.empty(0, np.float16)) if self.half is None else self.half
        sample = np.empty(0, self.kind) if self.sample is None else self.sample
        if self.profile is None:
            profile = _tensor(np.empty(0, np.int64))
        elif self.runs is None:
            profile = cpu_lanes.profile(cpu_lanes.runs_of(single if self.half is None else half))
        else:
            profile = _tensor(self.profile)
        return single, half, _tensor(self.position), _tensor(sample), profile


def quantize_flat(
    x: Tensor,
    rule: Rule,
    threshold: Tensor,
    seed: Tensor | None,
    stream: int,
    want_groups: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.quantize`, into `out` if that is given: float32, and lying in memory as x does."""
    dense = x.detach().float()
    dense = dense if buffers.is_dense(dense) else dense.contiguous()
    values = torch.empty_like(dense) if out is None else out
    groups = torch.empty_like(dense, dtype=torch.uint8) if want_groups else None
    source, marks = _memory(dense), None if groups is None else _memory(groups)
    arrays = (source, _memory(values), marks)
    fp8, wide = shared_loops.quantize_flat(team(len(source)), *arrays, _parameters(rule, int(threshold)))
    totals = torch.tensor((len(source) - fp8 - wide, fp8, wide), device="cpu")
    return values, values.new_empty(0, dtype=torch.uint8) if groups is None else groups, totals


def round_half(x: Tensor, out: Tensor) -> Tensor:
    """Round a contiguous or channels_last float32 tensor to binary16, into one that lies as x does (which may be x)."""
    shared_loops.round_half(team(x.numel()), _memory(x), _memory(out))
    return out


def turn_half(x: Tensor, out: Tensor, rounds: bool) -> Tensor:
    """A dense float32 tensor in channels_last made contiguous, in memory (which may be x's), rounded if asked."""
    shared_loops.turn_half(team(x.numel()), _memory(x), _memory(out), rounds, x[0, 0].numel(), x.shape[1])
    return out


def next_threshold(x: Tensor, states: Tensor, row: int, rule: Rule, training: bool) -> Tensor:
    """`ops.next_threshold`; compiled for a dense float32 tensor and a rule that looks at its histogram."""
    state = states.numpy()[row]
    current = int(state[0])
    if current != reference.UNSET and not training:
        return _scalar(current)
    if rule.adaptive and _has_histogram(x):
        chosen = shared_loops.choose_threshold(team(x.numel()), _memory(x), *_sampling(x, rule), _choice(rule), current)
    else:
        chosen = int(reference.choose_threshold(x, rule, _scalar(current)))
    used = chosen if current == reference.UNSET else current
    if training:
        state[:] = used, chosen
    return _scalar(rule.threshold_range[0] if used == reference.UNSET else used)


def _scalar(threshold: int) -> Tensor:
    return torch.scalar_tensor(threshold, dtype=torch.int32, device="cpu")


def histogram(x: Tensor, rule: Rule) -> Tensor:
    """`reference.histogram`; compiled for a dense float32 tensor."""
    if _has_histogram(x):
        return _tensor(shared_loops.histogram(team(x.numel()), _memory(x), *_sampling(x, rule)))
    return reference.histogram(x, rule)


def _has_histogram(x: Tensor) -> bool:
    return x.dtype == torch.float32 and buffers.is_dense(x)


def _sampling(x: Tensor, rule: Rule) -> tuple[Any, ...]:
    """What `shared_loops.histogram` takes besides a team and x."""
    turned = (0, 0) if x.is_contiguous() else (x.shape[1], prod(x.shape[2:]))
    return sample_step(x.numel()), rule.threshold_range, turned


@lru_cache(maxsize=128)
def _choice(rule: Rule) -> tuple[float, float, tuple[int, ...]]:
    """How a rule chooses: by `fp16_share` (negative: it does not), or by `max_error`, squared, and its formats."""
    low, wide = FORMATS[rule.low or "e4m3"], rule.wide
    lowest = int(window_exponent(rule, _scalar(rule.threshold_range[0])))
    formats = (low.mantissa, low.min_exponent, low.max_exponent, lowest, wide.mantissa, wide.min_exponent)
    return -1.0 if rule.fp16_share is None else rule.fp16_share, (rule.max_error or 0.0) ** 2, formats


class _Memory:
    """A dense tensor as it lies in memory, for numpy."""

    def __init__(self, x: Tensor) -> None:
        self._tensor = x  # which must live as long
        self.__array_interface__ = {
            "data": (x.data_ptr(), False),
            "shape": (x.numel(),),
            "typestr": KINDS[x.dtype],
            "version": 3,
        }


def _memory(x: Tensor) -> Array:
    """A dense tensor as it lies in memory, one-dimensional.

    Unlike `Tensor.numpy`, this leaves its storage resizable, as FSDP needs it; DLPack takes three times as long.
    """
    return np.asarray(_Memory(x))


@lru_cache(maxsize=4096)
def _parameters(rule: Rule, threshold: int) -> tuple[Any, ...]:
    """What `loops.quantize` needs to know of a rule and its T: bit patterns, exponents, limits."""
    t, wide = _scalar(threshold), rule.wide
    last = np.int32(-1)  # the bits of the largest magnitude that is FP8's: none
    low_mantissa, low_least, low_max = wide.mantissa, wide.min_exponent, float("inf")
    if rule.low:
        low = FORMATS[rule.low]
        window = int(window_exponent(rule, t)) - low.max_exponent
        low_mantissa, low_least = low.mantissa, low.min_exponent + window
        last = np.float32(float(tau(t, torch.float64))).view(np.int32) - 1 if rule.high else np.int32(2**31 - 1)
        low_max = float("inf") if rule.high else low.max * 2.0**window
    exponents = (low_mantissa, 127 + low_least, wide.mantissa, 127 + wide.min_exponent)
    with np.errstate(over="ignore"):  # float32's infinity, where the format reaches as far as float32
        beyond = np.float32(2.0 ** (wide.max_exponent + 1)).view(np.int32)
    return (np.int32(last), *map(np.int32, exponents), beyond, np.float32(low_max), np.float32(wide.max))
