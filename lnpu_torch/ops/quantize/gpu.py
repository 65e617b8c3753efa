"""Fast GPU implementations: what `ops` asks for, put to the Triton kernels. Nothing here waits for the device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lnpu_torch.kernels import operand, thresholds
from lnpu_torch.kernels import quantize as kernels
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


def chooses(rule: str) -> bool:
    """Whether an operand's threshold is chosen while it is read; else in a launch of its own, from all elements."""
    chosen = parsed(rule)
    mode: int = choice(chosen).mode
    return chosen.window is None and bool(mode != thresholds.LARGEST.value)


def read(
    x: Tensor,
    seed: Tensor | None,
    request: Request,
    *,
    states: Tensor | None = None,
    training: bool = False,
    threshold: Tensor | None = None,
) -> Rounded:
    """`Backend.quantize_operand` by states, and `Backend.round_and_count` by a threshold."""
    rule, (single, half, sampled, lanes) = parsed(request.rule), request.wanted
    x = x if operand.takes(x) else x.contiguous()
    joined = request.joined or x.dim() == 2
    along = lanes and operand.finds_runs(x.shape, request.layout, joined)
    wanted = operand.Wanted(single, half, sampled, along, joined)
    found = operand.read(
        x,
        choice(rule),
        rule.low,
        rule.high,
        request.layout,
        wanted,
        states=states,
        row=request.row,
        training=training,
        threshold=threshold,
        seed=seed,
    )
    runs, profile = found.runs, found.profile
    if lanes and not along:
        values = found.single if found.half is None else found.half
        assert values is not None
        runs, profile = joined_runs(values, gpu_lanes.runs_of), gpu_lanes.no_profile(x.device)
    return Rounded(found.single, found.half, found.position, found.sample, profile, found.threshold, runs)


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
