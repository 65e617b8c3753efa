"""Which step of a layer reads which operand, by which rule and in which form. No tensors here."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from lnpu_torch.nn.gemms import Accumulator
from lnpu_torch.ops.quantize.reference import Request
from lnpu_torch.quant.precision import Precision, Rule

STEPS = ("forward", "grad_input", "grad_weight")
READS = (
    ("forward", "input"),
    ("forward", "weight"),
    ("grad_input", "grad_output"),
    ("grad_input", "weight"),
    ("grad_weight", "input"),
    ("grad_weight", "grad_output"),
)
"""Which step reads which operand; a place in this list is also a row of a layer's thresholds."""


class Read(NamedTuple):
    """How a step reads an operand: by which rule (its JSON; None leaves it in float), and with which row's threshold.

    The row is that of the first read of the same operand under the same rule, so that equal reads share a threshold.
    `half` says that all its values are exact in binary16.
    """

    rule: str | None
    row: int
    stochastic: bool
    half: bool


class OperandPlan(NamedTuple):
    """How an operand is quantized for the steps that read it by one rule.

    `request`: what is asked of the backend. `half_now`, `half_kept`: whether the steps that read it at once, and later,
    take it in binary16.
    """

    rule: str | None
    stochastic: bool
    steps: tuple[str, ...]
    half_now: bool
    half_kept: bool
    request: Request


class PrecisionPlan:
    """How each step of a layer of some precision reads its operands, accumulates, and rounds its result."""

    def __init__(self, chosen: Precision) -> None:
        rules = [chosen.rule(*read) for read in READS]
        self.reads = {read: _read(rules, index) for index, read in enumerate(READS)}
        self.emulated = {step for (step, _), read in self.reads.items() if read.rule is not None}
        self.stochastic = any(read.stochastic for read in self.reads.values())
        self.accumulate, self.result = chosen.accumulate, chosen.result
        self.accumulators = {
            (step, halves): Accumulator(
                chosen.accumulate,
                chosen.chunk,
                exact=halves and step in self.emulated,
                reordered=step in self.emulated,
                rounded=chosen.result == "fp16" and step in self.emulated,
            )
            for step in STEPS
            for halves in (False, True)
        }  # of each step, and whether its operands are in binary16

    def operands(
        self,
        operand: str,
        now: tuple[str, ...],
        later: tuple[str, ...] = (),
        *,
        layout: tuple[int, int],
        halves: bool = False,
        sampled: bool = False,
        lanes: bool = False,
        joined: bool = False,
    ) -> tuple[OperandPlan, ...]:
        """How an operand is quantized, once for each rule, for steps that read it now and later.

        Args:
            halves: whether the steps can compute with binary16 values.
            sampled: whether its counts by sample are asked for, as they are for grad_weight anyway.
        """
        rows: dict[int, list[str]] = {}
        for step in (*now, *later):
            rows.setdefault(self.reads[step, operand].row, []).append(step)
        plans = []
        for steps in rows.values():
            read = self.reads[steps[0], operand]
            reads_now, reads_later = ({*steps} & {*some} for some in (now, later))
            half_now, half_kept = bool(reads_now) and read.half and halves, bool(reads_later) and read.half
            single = (bool(reads_now) and not half_now) or (bool(reads_later) and not half_kept)
            wanted = (single, half_now or half_kept, sampled or "grad_weight" in steps, lanes)
            request = Request(read.rule or "", read.row, layout, wanted, joined)
            plans.append(OperandPlan(read.rule, read.stochastic, tuple(steps), half_now, half_kept, request))
        return tuple(plans)


@lru_cache(maxsize=256)
def precision_plan(precision: str) -> PrecisionPlan:
    """Of a `Precision` as JSON."""
    return PrecisionPlan(Precision.model_validate_json(precision))


def _read(rules: list[Rule | None], index: int) -> Read:
    rule, operand = rules[index], READS[index][1]
    row = next(i for i, read in enumerate(READS) if read[1] == operand and rules[i] == rule)
    if rule is None:
        return Read(None, row, stochastic=False, half=False)
    return Read(rule.model_dump_json(), row, rule.rounding == "stochastic", rule.wide.name == "fp16")
