"""Rounding operands and counting them, on whatever device they are.

Each function picks its implementation by device and dtype; all give the bits of `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lnpu_torch.ops import dispatch as backends
from lnpu_torch.ops.dispatch import backend as backend
from lnpu_torch.ops.lanes.torch_ops import lane_profile
from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.quantize import reference
from lnpu_torch.ops.quantize.reference import UNSET, Rounded
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
        threshold: int32 [].
        seed, stream: key of the random bits, for stochastic rounding only.
        rule: a `Rule` as JSON.
    """
    parsed = _rule(rule)
    fast = backends.fast(x, parsed)
    if fast and x.is_cpu and not backends.on_gpu(x):
        values, groups, totals = fast.quantize(x, fast.compiled_rule(rule), int(threshold), want_groups)
        return values, groups, torch.tensor(totals, device="cpu")
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


def round_and_count(
    x: Tensor,
    threshold: Tensor,
    seed: Tensor | None,
    rule: str,
    stream: int,
    layout: Sequence[int],
    wanted: Sequence[bool],
    joined: bool = False,
) -> Rounded:
    """Round an operand [N, C, *grid] and count its groups, in one pass. What is not wanted is empty.

    Args:
        layout: how many samples in a row share one count by position, and the number of channel groups.
        wanted: values in `reference.compute_dtype(x)`; in binary16; counts by sample; a lane profile.
        joined: whether the profile's runs go on from sample to sample.
    """
    rounded: Rounded
    loops = backends.cpu_loops(x) if seed is None else None
    if loops:
        return loops.quantize_operand(x, loops.compiled_rule(rule), int(threshold), layout, wanted, joined, False)[1]  # type: ignore[no-any-return]
    x, parsed = x.contiguous(memory_format=backends.memory_format(x)), _rule(rule)
    fast = backends.fast(x, parsed)
    if fast and not backends.on_gpu(x):
        arguments = (fast.compiled_rule(rule), int(threshold), layout, wanted, joined, False)
        return fast.quantize_operand(x.float(), *arguments)[1]  # type: ignore[no-any-return]
    if fast:
        rounded = fast.quantize(x, parsed, threshold, seed, stream, layout, (*wanted[:3], wanted[3] and not joined))
    else:
        random = None if seed is None else reference.random_bits(x.shape, seed, stream)
        values, groups = reference.quantize(x, parsed, threshold, random)
        half = values.half() if wanted[1] else values.new_empty(0, dtype=torch.float16)
        single = values if wanted[0] else values.new_empty(0)
        sample, lanes = _per_sample(groups, layout[1], wanted[2]), values.new_empty(0, dtype=torch.int64)
        rounded = Rounded(single, half, counting.per_position(groups, layout[0]), sample, lanes)
        if wanted[3] and not joined:
            rounded = rounded._replace(lanes=lane_profile(values))
    if wanted[3] and joined:
        rounded = rounded._replace(lanes=lane_profile(rounded.half if wanted[1] else rounded.single, joined))
    return rounded


def quantize_operand(
    x: Tensor,
    states: Tensor,
    seed: Tensor | None,
    rule: str,
    row: int,
    layout: Sequence[int],
    wanted: Sequence[bool],
    joined: bool,
    training: bool,
) -> tuple[Tensor, Rounded]:
    """`next_threshold`, and by that threshold `round_and_count`, in one. The row is also the stream of random bits."""
    loops = backends.cpu_loops(x) if seed is None else None
    if loops:
        state = states.numpy()[row]
        current, compiled = int(state[0]), loops.compiled_rule(rule)
        if current != UNSET and not (training and not compiled.choice):
            chosen, rounded = loops.quantize_operand(x, compiled, current, layout, wanted, joined, training)
            if training:
                state[1] = chosen
            return torch.scalar_tensor(current, dtype=torch.int32, device="cpu"), rounded
    threshold = next_threshold(x, states, row, rule, training)
    return threshold, round_and_count(x, threshold, seed, rule, row, layout, wanted, joined)


def count_float(x: Tensor, layout: Sequence[int], sample: bool) -> tuple[Tensor, Tensor]:
    """Counts of an operand left in float, as `round_and_count` gives them: its non-zeros are in the wide group."""
    groups = reference.float_groups(x)
    return counting.per_position(groups, layout[0]), _per_sample(groups, layout[1], sample)


def empty_counts(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The shapes of an input's counts by position, over the batch, and by sample, in this number of channel groups."""
    batch, channels, *grid = x.shape
    position = x.new_empty((2, 1, channels, *grid), dtype=torch.int32)
    return position, x.new_empty((2, batch, groups, *grid), dtype=_sample_dtype(x, groups))


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


@op()
def own_threshold(x: Tensor, rule: str) -> Tensor:
    """The threshold that a rule chooses for x itself: int32 []."""
    states = torch.full((1, 2), UNSET, dtype=torch.int32, device=x.device)
    return next_threshold(x, states, 0, rule, False)


@fake("own_threshold")
def _(x: Tensor, rule: str) -> Tensor:
    return x.new_empty((), dtype=torch.int32)


def next_threshold(x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Tensor:
    """The threshold to use for x now. In training also chooses the next one, from x.

    Args:
        states: int32 [rows, 2], in use and to come; `reference.UNSET` before the first step, which uses its own.
    """
    parsed = _rule(rule)
    fast = backends.fast(x, parsed)
    if fast and backends.on_gpu(x):
        return fast.next_threshold(x, states, row, parsed, training)  # type: ignore[no-any-return]
    if fast:
        state = states.numpy()[row]
        now = int(state[0])
        if now == UNSET or training:
            next_one = fast.choose_threshold(x, fast.compiled_rule(rule), now)
            now = next_one if now == UNSET else now
            if training:
                state[:] = now, next_one
        now = parsed.threshold_range[0] if now == UNSET else now
        return torch.scalar_tensor(now, dtype=torch.int32, device="cpu")
    current = states[row, 0]
    chosen = reference.choose_threshold(x, parsed, current)
    used = torch.where(current == UNSET, chosen, current)
    if training:
        states[row] = torch.stack((used, chosen))
    return torch.where(used == UNSET, parsed.threshold_range[0], used)


def add_histogram(x: Tensor, histograms: Tensor, row: int, rule: str) -> None:
    """Add what the choice of x's threshold rests on to a row of int32 [rows, bins], so that ranks can sum theirs."""
    parsed = _rule(rule)
    if parsed.adaptive:
        fast = backends.fast(x, parsed)
        if fast and not backends.on_gpu(x):
            counts = fast.histogram(x, fast.compiled_rule(rule))
        else:
            counts = (fast or reference).histogram(x, parsed)
    elif parsed.threshold is None and parsed.high is None:
        counts = reference.largest_bin(x, parsed)
    else:
        return  # this threshold is none of x's
    histograms[row, : len(counts)] += counts.to(histograms.dtype)


def commit_thresholds(states: Tensor) -> None:
    """Put the thresholds to come into use: [..., 2], after the layer's backward."""
    states[..., 0] = states[..., 1]
