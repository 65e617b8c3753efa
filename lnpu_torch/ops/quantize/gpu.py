"""Fast GPU implementations: what `ops` asks for, put to the Triton kernels. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lnpu_torch.kernels import launch, thresholds
from lnpu_torch.kernels import quantize as kernels
from lnpu_torch.ops.lanes import gpu as gpu_lanes
from lnpu_torch.ops.quantize.reference import Rounded
from lnpu_torch.quant.precision import Rule

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(x: Tensor, rule: Rule | None) -> bool:
    """Whether this module takes a tensor (and any rule): at most float32, neither empty nor too large."""
    return x.dtype in DTYPES and 0 < x.numel() < launch.INT32


def quantize_flat(
    x: Tensor, rule: Rule, threshold: Tensor, seed: Tensor | None, stream: int, want_groups: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.quantize`."""
    values, groups, totals = kernels.quantize(
        x,
        threshold,
        rule.low,
        rule.high,
        seed=seed,
        stream=stream,
        dtype=torch.float32,
        groups=want_groups,
        totals=True,
    )
    return values, _or_empty(groups, x, torch.uint8), _or_empty(totals, x, torch.int64)


def quantize(
    x: Tensor,
    rule: Rule,
    threshold: Tensor,
    seed: Tensor | None,
    stream: int,
    layout: Sequence[int],
    wanted: Sequence[bool],
) -> Rounded:
    """`ops.round_and_count`."""
    rounded = kernels.quantize_grid(
        x,
        threshold,
        rule.low,
        rule.high,
        *layout,
        single=wanted[0],
        half=wanted[1],
        sample=wanted[2],
        runs=wanted[3] and x.dim() > 2,
        seed=seed,
        stream=stream,
    )
    values = _or_empty(rounded.single, x, torch.float32), _or_empty(rounded.half, x, torch.float16)
    runs = gpu_lanes.runs_of(values[wanted[1]]) if wanted[3] and x.dim() == 2 else rounded.runs
    profile = None if runs is None else gpu_lanes.profile(runs)
    sample = _or_empty(rounded.sample, x, torch.int32)
    sample = sample.clone() if sample.data_ptr() % 16 else sample  # as compilers expect of results
    return Rounded(*values, rounded.position, sample, _or_empty(profile, x, torch.int64))


def next_threshold(x: Tensor, states: Tensor, row: int, rule: Rule, training: bool) -> Tensor:
    """`ops.next_threshold`."""
    used: Tensor = thresholds.choose(x, choice(rule), states, row, training)
    return used


def histogram(x: Tensor, rule: Rule) -> Tensor:
    """`reference.histogram`, in int32."""
    counts = torch.zeros(choice(rule).bins, dtype=torch.int32, device=x.device)
    thresholds.choose(x, choice(rule), counts, 0, training=False, counts=counts)  # any states will do
    return counts


@lru_cache(maxsize=256)
def choice(rule: Rule) -> thresholds.Choice:
    """A rule's choice of T, as the kernel sees it."""
    return thresholds.Choice.of(
        rule.low, rule.high, max_error=rule.max_error, fp16_share=rule.fp16_share, threshold=rule.threshold
    )


def _or_empty(x: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(0, dtype=dtype) if x is None else x
