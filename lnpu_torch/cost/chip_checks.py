"""Holds a chip's published figures against ours, which come from pricing one large product at the same condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.schema import Counts, Operand, StepCounts
from lnpu_torch.hardware.checks import Check, Format, Quantity
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.chip import chip as read_chip

ELEMENTS = 10**6
"""Elements of each operand of the product."""


class CheckResult(NamedTuple):
    """A check and our own figure; None where no source tells the condition, so that there is nothing to compute."""

    name: str
    check: Check
    ours: float | None

    @property
    def deviation(self) -> float | None:
        """Ours over the published figure, less 1."""
        return None if self.ours is None else self.ours / self.check.value - 1

    @property
    def basis(self) -> str:
        """Whether ours tells anything: it is "held out", "circular" where a constant is fitted to it, or not there."""
        if self.ours is None:
            return "condition not stated"
        return f"circular: {', '.join(self.check.fitted)}" if self.check.fitted else "held out"


def run_checks(chip: Chip) -> list[CheckResult]:
    """Every check of a chip's file beside our own figure. Raises ConfigError if a ratio is to a chip that is none."""
    return [CheckResult(name, check, _ours(chip, check)) for name, check in chip.checks.items()]


def figure(chip: Chip, of: Quantity, format: Format, zeros: Sequence[float]) -> float:
    """Efficiency in TFLOPS/W, throughput in TFLOPS or power in W of a forward step that keeps all multipliers busy.

    Args:
        chip: at the voltage that it is meant for.
        of: what is asked for.
        format: of all elements that are not zero.
        zeros: shares of zeros in the input and in the weight, spread evenly.
    """
    report = price(Counts(steps=(_product(format, zeros),)), chip)
    if of == "power":
        return report.power_w or 0.0
    if of == "efficiency":
        return report.tflops_per_watt or 0.0
    return 2 * report.total.asked / report.time_s / 1e12 if report.time_s else 0.0


def _ours(chip: Chip, check: Check) -> float | None:
    if check.zeros is None:
        return None
    at = chip if check.voltage_v is None else read_chip(chip, check.voltage_v)
    found, over = figure(at, check.of, check.format, check.zeros), check.over
    if over is None:
        return found
    other = figure(at if over.chip is None else read_chip(over.chip), check.of, over.format, over.zeros)
    return found / other if other else None


def _product(format: Format, zeros: Sequence[float]) -> StepCounts:
    """A product of two operands, every element of one with every element of the other."""
    operands = []
    for share in zeros:
        zero = round(share * ELEMENTS)
        operands.append((zero, ELEMENTS - zero, 0) if format == "fp8" else (zero, 0, ELEMENTS - zero))
    first, second = operands
    pairs = tuple(tuple(a * b for b in second) for a in first)
    none = Operand(wide="fp16", elements=(0, 0, 0))  # what moves is no part of a peak
    return StepCounts.model_validate(
        {"layer": "product", "kind": "Linear", "step": "forward", "calls": 1, "macs": ELEMENTS**2, "padding": 0}
        | {"not_run": 0, "pairs": pairs, "first": none, "second": none}
    )
