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

from lnpu_torch import buffers, counting, cpu_lanes, reference, shared_loops, vectors
from lnpu_torch.formats import FORMATS
from lnpu_torch.lane_family import runs_shape
from lnpu_torch.precision import Rule
from lnpu_torch.reference import sample_step, tau, window_exponent
from lnpu_torch.threads import team

Array = np.ndarray[Any, Any]

KINDS = {**buffers.KINDS, torch.float16: "=u2"}
"""Numpy's names of dtypes, as the loops see them: binary16 as its bits."""
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.round_and_count`, for a contiguous or channels_last x."""
    (share, channel_groups), x = layout, x.float()
    lies_last = not x.is_contiguous()
    batch, channels, *grid = x.shape
    positions = prod(grid)
    turns = last and not lies_last and min(channels, positions) > 1
    last = last or lies_last
    # binary16 first: what is kept for backward leaves no gaps between what is not
    half = buffers.POOL.empty(x.shape, torch.float16, last) if wanted[1] else None
    single = buffers.POOL.empty(x.shape, torch.float32, last) if wanted[0] else None
    position = torch.empty((2, batch // share, channels, *grid), dtype=torch.int32)
    sample_dtype = counting.sample_dtype(channels, channel_groups)
    sample = torch.empty((2, batch, channel_groups, *grid) if wanted[2] else (0,), dtype=sample_dtype)
    fused = wanted[3] and bool(grid)  # without a grid, runs are along the rows
    runs = torch.empty(runs_shape(x.shape) if fused else (0,), dtype=torch.uint8)
    shared_loops.quantize(
        team(x.numel()),
        _memory(x),
        None if single is None else _memory(single),
        None if half is None else _memory(half),
        position.view(2, batch // share, -1).numpy(),
        sample.view(2, batch, channel_groups, positions).numpy() if wanted[2] else None,
        runs.numpy() if fused else None,
        share,
        (batch, channels, positions),
        _parameters(rule, int(threshold)),
        lies_last or None,
        turns or None,
    )
    single = torch.empty(0, dtype=torch.float32) if single is None else single
    half = torch.empty(0, dtype=torch.float16) if half is None else half
    if wanted[3] and not fused:
        runs = cpu_lanes.runs_of(half if wanted[1] else single)
    profile = cpu_lanes.profile(runs) if wanted[3] else torch.empty(0, dtype=torch.int64)
    return single, half, position, sample, profile


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
    totals = torch.tensor((len(source) - fp8 - wide, fp8, wide))
    return values, values.new_empty(0, dtype=torch.uint8) if groups is None else groups, totals


def round_half(x: Tensor, out: Tensor) -> Tensor:
    """Round a contiguous or channels_last float32 tensor to binary16, into one that lies as x does (which may be x)."""
    shared_loops.round_half(team(x.numel()), _memory(x), _memory(out))
    return out


def turn_half(x: Tensor, out: Tensor, rounds: bool) -> Tensor:
    """A dense float32 tensor in channels_last made contiguous, in memory (which may be x's), rounded if asked."""
    shared_loops.turn_half(team(x.numel()), _memory(x), _memory(out), rounds, x[0, 0].numel(), x.shape[1])
    return out


def relu(x: Tensor, out: Tensor) -> Tensor:
    """ReLU of a dense float32 tensor into `out` (which may be x). Returns one bit per element, for `relu_backward`."""
    signs = torch.empty(-(-x.numel() // vectors.LANES), dtype=torch.uint16)
    shared_loops.relu(team(x.numel()), _memory(x), _memory(out), signs.numpy())
    return signs


def relu_backward(error: Tensor, signs: Tensor) -> Tensor:
    """The gradient of `relu`'s input; `error` lies in memory as x did."""
    grad = buffers.empty_like(error, error.dtype)
    shared_loops.relu_backward(team(error.numel()), _memory(error), _memory(grad), signs.numpy())
    return grad


def max_pool(x: Tensor, shape: Sequence[int], *sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`pooling.coded_max_pool`, of results of this shape."""
    out, codes = buffers.POOL.empty(shape, x.dtype), torch.empty(shape, dtype=torch.uint8)
    pairs = map(tuple, (x.shape[-2:], shape[-2:], *sizes))
    shared_loops.max_pool(team(x.numel()), _memory(x), _memory(out), _memory(codes), *pairs)
    return out, codes


def max_pool_backward(error: Tensor, codes: Tensor, shape: Sequence[int], *sizes: Sequence[int]) -> Tensor:
    """`pooling.coded_max_pool_backward`."""
    grad = buffers.POOL.empty(shape, error.dtype)
    pairs = map(tuple, (shape[-2:], error.shape[-2:], *sizes))
    shared_loops.max_pool_backward(team(grad.numel()), _memory(error), _memory(codes), _memory(grad), *pairs)
    return grad


def next_threshold(x: Tensor, states: Tensor, row: int, rule: Rule, training: bool) -> Tensor:
    """`ops.next_threshold`; compiled for a dense float32 tensor and a rule that looks at its histogram."""
    state = states.numpy()[row]
    current = int(state[0])
    if rule.adaptive and _has_histogram(x):
        chosen = shared_loops.choose_threshold(*_sampling(x, rule), _choice(rule), current)
    else:
        chosen = int(reference.choose_threshold(x, rule, torch.tensor(current, dtype=torch.int32)))
    used = chosen if current == reference.UNSET else current
    if training:
        state[:] = used, chosen
    return torch.scalar_tensor(rule.threshold_range[0] if used == reference.UNSET else used, dtype=torch.int32)


def histogram(x: Tensor, rule: Rule) -> Tensor:
    """`reference.histogram`; compiled for a dense float32 tensor."""
    if _has_histogram(x):
        return torch.from_numpy(shared_loops.histogram(*_sampling(x, rule)))
    return reference.histogram(x, rule)


def _has_histogram(x: Tensor) -> bool:
    return x.dtype == torch.float32 and buffers.is_dense(x)


def _sampling(x: Tensor, rule: Rule) -> tuple[Any, ...]:
    """What `shared_loops.histogram` takes."""
    turned = (0, 0) if x.is_contiguous() else (x.shape[1], x[0, 0].numel())
    return team(x.numel()), _memory(x), sample_step(x.numel()), rule.threshold_range, turned


@lru_cache(maxsize=128)
def _choice(rule: Rule) -> tuple[float, float, tuple[int, ...]]:
    """How a rule chooses: by `fp16_share` (negative: it does not), or by `max_error`, squared, and its formats."""
    low, wide = FORMATS[rule.low or "e4m3"], rule.wide
    lowest = int(window_exponent(rule, torch.tensor(rule.threshold_range[0])))
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
    t, wide = torch.tensor(threshold, dtype=torch.int32), rule.wide
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
