"""Fast GPU implementations: what `ops` asks for, put to the Triton kernels. Nothing here waits for the device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lnpu_torch.kernels import quantize as kernels
from lnpu_torch.kernels import thresholds
from lnpu_torch.ops.lanes import gpu as gpu_lanes
from lnpu_torch.ops.lanes.reference import joined_runs
from lnpu_torch.ops.quantize.reference import Request, Rounded
from lnpu_torch.ops.reference import parsed
from lnpu_torch.quant.precision import Rule


def quantize_flat(
    x: Tensor, rule: Rule, threshold: Tensor, seed: Tensor | None, stream: int, want_classes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.quantize`."""
    values, groups, totals = kernels.quantize(
        x,
        threshold,
        rule.low,
        rule.high,
        seed=seed,
        stream=stream,
        dtype=torch.float32,
        groups=want_classes,
        totals=True,
    )
    return values, x.new_empty(0, dtype=torch.uint8) if groups is None else groups, totals


def quantize(x: Tensor, threshold: Tensor, seed: Tensor | None, request: Request) -> Rounded:
    """`Backend.round_and_count`."""
    rule, (single, half, sampled, lanes) = parsed(request.rule), request.wanted
    apart = lanes and (request.joined or x.dim() == 2)  # the kernel's runs end with each sample
    rounded = kernels.quantize_grid(
        x,
        threshold,
        rule.low,
        rule.high,
        *request.layout,
        single=single,
        half=half,
        sample=sampled,
        runs=lanes and not apart,
        seed=seed,
        stream=request.row,
    )
    runs = rounded.runs
    if apart:
        values = rounded.single if rounded.half is None else rounded.half
        assert values is not None
        runs = joined_runs(values, gpu_lanes.runs_of)
    profile = None if runs is None else gpu_lanes.profile(runs)
    return Rounded(rounded.single, rounded.half, rounded.position, rounded.sample, profile, threshold)


def next_threshold(x: Tensor, states: Tensor, row: int, rule: Rule, training: bool) -> Tensor:
    """`Backend.next_threshold`."""
    used: Tensor = thresholds.choose(x, choice(rule), states, row, training)
    return used


def histogram(x: Tensor, rule: Rule) -> Tensor:
    """`reference.histogram`, in int32."""
    counts = torch.zeros(choice(rule).bins, dtype=torch.int32, device=x.device)
    thresholds.choose(x, choice(rule), counts, 0, training=False, counts=counts)  # any states will do
    return counts


@lru_cache(maxsize=256)
def choice(rule: Rule) -> thresholds.Choice:
    """A rule's choice of thresholds, as the kernel sees it."""
    return thresholds.Choice.of(
        rule.low, rule.high, max_error=rule.max_error, fp16_share=rule.fp16_share, threshold=rule.threshold
    )
