"""Which step of a layer reads which operand, and by which rule: planned once for a layer. No tensors here."""

from __future__ import annotations

from typing import NamedTuple

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

Reading = tuple[str, tuple[str, ...], tuple[str, ...]]
READINGS: tuple[Reading, ...] = (
    *(("input", ("forward",), later) for later in ((), ("grad_weight",))),
    *(("weight", (step,), ()) for step in ("forward", "grad_input")),
    *(("grad_output", now, ()) for now in ((), ("grad_input",), ("grad_weight",), ("grad_input", "grad_weight"))),
)
"""How operands are read in a layer's calls: which one, by which steps at once, and by which later."""


class Read(NamedTuple):
    """How a step reads an operand: by which rule (its JSON; None leaves it in float), and with which row's T.

    The row is that of the first read of the same operand under the same rule, so that equal reads share one T.
    `half` says that all its values are exact in binary16.
    """

    rule: str | None
    row: int
    stochastic: bool
    half: bool


class Use(NamedTuple):
    """What a reading reads by one rule: for which steps, whether any at once or later, whether for grad_weight."""

    read: Read
    steps: tuple[str, ...]
    now: bool
    later: bool
    sampled: bool


def plan(chosen: Precision) -> dict[tuple[str, str], Read]:
    """How each step reads its operands."""
    rules = [chosen.rule(*read) for read in READS]
    return {read: _read(rules, index) for index, read in enumerate(READS)}


def uses(reads: dict[tuple[str, str], Read], reading: Reading) -> tuple[Use, ...]:
    """What is read, once for each rule."""
    operand, now, later = reading
    rows: dict[int, list[str]] = {}
    for step in (*now, *later):
        rows.setdefault(reads[step, operand].row, []).append(step)
    return tuple(
        Use(
            reads[steps[0], operand],
            tuple(steps),
            any(step in now for step in steps),
            any(step in later for step in steps),
            "grad_weight" in steps,
        )
        for steps in rows.values()
    )


def _read(rules: list[Rule | None], index: int) -> Read:
    rule, operand = rules[index], READS[index][1]
    row = next(i for i, read in enumerate(READS) if read[1] == operand and rules[i] == rule)
    if rule is None:
        return Read(None, row, stochastic=False, half=False)
    return Read(rule.model_dump_json(), row, rule.rounding == "stochastic", rule.wide.name == "fp16")
