"""Rounding a tensor as an operand would be, apart from any layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lnpu_torch.files import ConfigError, listed, nearest
from lnpu_torch.ops.quantize import torch_ops as ops
from lnpu_torch.quant.precision import PRESETS, Rule


def quantize(
    x: Tensor, rule: str | Rule = "fgmp", *, threshold: int | None = None, return_classes: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Round a tensor as an operand would be, by `reference.quantize`. Gradients pass straight through.

    Args:
        x: any shape and floating dtype.
        rule: "fgmp", "fp8", "fp16", or a `Rule`.
        threshold: an integer, 4 e + k; without it, the rule chooses one for x itself.
        return_classes: also return each element's precision class (uint8: 0 zero, 8 FP8, 16 FP16).

    Raises:
        ConfigError: no such rule.
        TypeError: x is no floating-point tensor, or the threshold no integer.
        ValueError: the threshold is out of range, or the rule has none.
    """
    if not isinstance(rule, Rule):
        if not isinstance(rule, str) or rule not in PRESETS:
            raise ConfigError(
                f"unknown rule {rule!r}{nearest(str(rule), PRESETS)}; known: {listed(PRESETS)}, or a Rule"
            )
        rule = PRESETS[rule]
    if not (isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)):
        raise TypeError(f"a tensor of 16, 32 or 64-bit floats can be rounded, not {getattr(x, 'dtype', type(x))}")
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, int):
            raise TypeError(f"a threshold is an integer, T = 4 e + k, not {threshold!r}")
        if not rule.low:
            raise ValueError("a rule without FP8 has no threshold")
        rule.check_threshold(threshold)
        rule = Rule(low=rule.low, high=rule.high, threshold=threshold, rounding=rule.rounding, window=rule.window)
    values, classes = _StraightThrough.apply(x, rule, return_classes)  # type: ignore[no-untyped-call]
    return (values, classes) if return_classes else values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, want_classes: bool) -> tuple[Tensor, Tensor]:
        text = rule.model_dump_json()
        seed = ops.draw_seed(x) if rule.rounding == "stochastic" else None
        values, classes, _ = ops.quantize(x, ops.own_threshold(x, text), seed, text, 0, want_classes)
        ctx.mark_non_differentiable(classes)
        return values.to(x.dtype), classes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
