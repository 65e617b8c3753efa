"""The registered torch ops that the layers are made of. Opaque to compilers, so that no rounding is optimised away.

Each picks its implementation by device and dtype; all give the bits of `reference` and `counting`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS
from lnpu_torch.ops import dispatch as backends
from lnpu_torch.ops.dispatch import backend as backend
from lnpu_torch.ops.lanes import reference as lanes
from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.quantize import reference
from lnpu_torch.ops.registry import fake, op
from lnpu_torch.quant.precision import Rule


@lru_cache(maxsize=256)
def _rule(text: str) -> Rule:
    return Rule.model_validate_json(text)


@op()
def quantize(
    x: Tensor, threshold: Tensor, seed: Tensor | None, rule: str, stream: int, want_groups: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a tensor: values in `reference.compute_dtype(x)`, groups (uint8, or empty), elements of each group [3].

    Args:
        threshold: T, int32 [].
        seed, stream: key of the random bits, for stochastic rounding only.
        rule: a `Rule` as JSON.
    """
    fast, parsed = backends.fast(x, _rule(rule)), _rule(rule)
    if fast:
        return fast.quantize_flat(x, parsed, threshold, seed, stream, want_groups)  # type: ignore[no-any-return]
    random = None if seed is None else reference.random_bits(x.shape, seed, stream)
    values, groups = reference.quantize(x, parsed, threshold, random)
    totals = torch.stack([(groups == group).sum() for group in (0, 8, 16)])
    return values, groups if want_groups else groups.new_empty(0), totals


@fake("quantize")
def _(
    x: Tensor, threshold: Tensor, seed: Tensor | None, rule: str, stream: int, want_groups: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups = torch.empty_like(x, dtype=torch.uint8) if want_groups else x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(x, dtype=reference.compute_dtype(x)), groups, x.new_empty(3, dtype=torch.int64)


@op()
def round_and_count(
    x: Tensor,
    threshold: Tensor,
    seed: Tensor | None,
    rule: str,
    stream: int,
    layout: Sequence[int],
    wanted: Sequence[bool],
    last: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Round an operand [N, C, *grid] and count its groups, in one pass. What is not wanted is empty.

    Args:
        layout: how many samples in a row share one count by position, and the number of channel groups.
        wanted: values in `reference.compute_dtype(x)`; in binary16; counts by sample; a lane profile.
        last: whether the values shall lie in channels_last, even if x does not.

    Returns:
        Both kinds of values, `counting.per_position`, `counting.per_sample` and `lanes.profile` of the values.
    """
    fast, parsed, x = backends.fast(x, _rule(rule)), _rule(rule), x.contiguous(memory_format=backends.memory_format(x))
    if fast:
        return fast.quantize(x, parsed, threshold, seed, stream, layout, wanted, last)  # type: ignore[no-any-return]
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    random = None if seed is None else reference.random_bits(x.shape, seed, stream)
    values, groups = reference.quantize(x, parsed, threshold, random)
    sample = _per_sample(groups, layout[1], wanted[2])
    half = values.half() if wanted[1] else values.new_empty(0, dtype=torch.float16)
    profile = lanes.profile(lanes.runs_of(values)) if wanted[3] else values.new_empty(0, dtype=torch.int64)
    return values if wanted[0] else values.new_empty(0), half, counting.per_position(groups, layout[0]), sample, profile


@fake("round_and_count")
def _(
    x: Tensor,
    threshold: Tensor,
    seed: Tensor | None,
    rule: str,
    stream: int,
    layout: Sequence[int],
    wanted: Sequence[bool],
    last: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    form = torch.channels_last if last else backends.memory_format(x)
    dtypes, x = (reference.compute_dtype(x), torch.float16), x.contiguous(memory_format=form)
    values = [
        torch.empty_like(x, dtype=d) if w else x.new_empty(0, dtype=d) for d, w in zip(dtypes, wanted, strict=False)
    ]
    profile = x.new_empty(len(LANE_CONFIGS) if wanted[3] else 0, dtype=torch.int64)
    return values[0], values[1], *_empty_counts(x, layout, wanted[2]), profile


@op(["states"])
def read(
    x: Tensor,
    states: Tensor,
    seed: Tensor | None,
    rule: str,
    row: int,
    layout: Sequence[int],
    wanted: Sequence[bool],
    last: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`next_threshold`, and by that T `round_and_count`, in one: T first, then the rest. The row is also the stream."""
    x, parsed = x.contiguous(memory_format=backends.memory_format(x)), _rule(rule)
    loops = backends.dense_loops(x, parsed)
    if loops:
        return loops.read(x, states, row, parsed, layout, wanted, last, training)  # type: ignore[no-any-return]
    choose, quantize = inspect.unwrap(next_threshold), inspect.unwrap(round_and_count)  # no ops inside an op
    threshold = choose(x, states, row, rule, training)
    return threshold, *quantize(x, threshold, seed, rule, row, layout, wanted, last)


@fake("read")
def _(x: Tensor, states: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *rounding, _ = others
    return states.new_empty(()), *round_and_count(x, states[0, 0], *rounding)


@op()
def count_float(x: Tensor, layout: Sequence[int], sample: bool) -> tuple[Tensor, Tensor]:
    """Counts of an operand left in float, as `round_and_count` gives them: its non-zeros are in the wide group."""
    groups = reference.float_groups(x)
    return counting.per_position(groups, layout[0]), _per_sample(groups, layout[1], sample)


@fake("count_float")
def _(x: Tensor, layout: Sequence[int], sample: bool) -> tuple[Tensor, Tensor]:
    return _empty_counts(x, layout, sample)


def _empty_counts(x: Tensor, layout: Sequence[int], sample: bool) -> tuple[Tensor, Tensor]:
    batch, channels, *grid = x.shape
    shape = (2, batch, layout[1], *grid) if sample else (0,)
    blocks = batch // layout[0] if layout[0] else 1
    position = x.new_empty((2, blocks, channels, *grid), dtype=torch.int32)
    return position, x.new_empty(shape, dtype=_sample_dtype(x, layout[1]))


def _per_sample(groups: Tensor, channel_groups: int, wanted: bool) -> Tensor:
    dtype = _sample_dtype(groups, channel_groups)
    return counting.per_sample(groups, channel_groups, dtype) if wanted else groups.new_empty(0, dtype=dtype)


def _sample_dtype(x: Tensor, channel_groups: int) -> torch.dtype:
    """The kernels' counts are int32 throughout."""
    kernels = x.device.type != "cpu" or backends.on_gpu(x)
    return torch.int32 if kernels else counting.sample_dtype(x.shape[1], channel_groups)


@op((), torch.Tag.nondeterministic_seeded)
def draw_seed(x: Tensor) -> Tensor:
    """A key for `reference.random_bits`, from torch's generator of x's device: the same compiled or not.

    Where a network has branches, a compiler may run them in another order, and the layers draw each other's keys.
    """
    return torch.randint(2**62, (), device=x.device)


@fake("draw_seed")
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.int64)


@op(["states"])
def next_threshold(x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Tensor:
    """The T to use for x now. In training also chooses the next one, from x.

    Args:
        states: int32 [rows, 2], T in use and T to come; `reference.UNSET` before the first step, which uses its own T.
    """
    parsed = _rule(rule)
    fast = backends.fast(x, parsed)
    if fast:
        return fast.next_threshold(x, states, row, parsed, training)  # type: ignore[no-any-return]
    current = states[row, 0]
    chosen = reference.choose_threshold(x, parsed, current)
    used = torch.where(current == reference.UNSET, chosen, current)
    if training:
        states[row] = torch.stack((used, chosen))
    return torch.where(used == reference.UNSET, parsed.threshold_range[0], used)


@fake("next_threshold")
def _(x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Tensor:
    return states.new_empty(())


@op(["histograms"])
def add_histogram(x: Tensor, histograms: Tensor, row: int, rule: str) -> None:
    """Add to a row what the choice of x's T rests on, so that several ranks' can be summed (int32 [rows, bins])."""
    parsed = _rule(rule)
    if parsed.adaptive:
        counts = (backends.fast(x, parsed) or reference).histogram(x, parsed)
    elif parsed.threshold is None and parsed.high is None:
        counts = reference.largest_bin(x, parsed)
    else:
        return  # this T is none of x's
    histograms[row, : len(counts)] += counts.to(histograms.dtype)


@op(["states"])
def commit_thresholds(states: Tensor) -> None:
    """Put the T's to come into use: [..., 2], after the layer's backward."""
    states[..., 0] = states[..., 1]
