"""What a layer brings to each of its calls: how its operands are rounded, its T's, its counters. No products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lnpu_torch import counting, ops
from lnpu_torch.precision import Precision, Rule
from lnpu_torch.products import Accumulator
from lnpu_torch.reference import UNSET

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


def new_thresholds() -> Tensor:
    """T's of a layer that has seen nothing: int32 [len(READS), 2], in use and to come."""
    return torch.full((len(READS), 2), UNSET, dtype=torch.int32)


def new_counters() -> Tensor:
    """Counters of a layer that has done nothing: int64 [len(STEPS), counting.WIDTH]."""
    return torch.zeros(len(STEPS), counting.WIDTH, dtype=torch.int64)


class Quantized(NamedTuple):
    """An operand as a step reads it: its values, and each element's group."""

    values: Tensor
    groups: Tensor


class Read(NamedTuple):
    """How a step reads an operand: by which rule (its JSON; None leaves it in float), and with which row's T.

    The row is that of the first read of the same operand under the same rule, so that equal reads share one T.
    """

    rule: str | None
    row: int
    stochastic: bool


class Emulation:
    """What a layer brings to each of its calls: precision, T's, and the counters that its steps add to."""

    def __init__(self, chosen: Precision, device: torch.device | None = None) -> None:
        rules = [chosen.rule(*read) for read in READS]
        self.precision = chosen
        self.reads = {read: _read(rules, index) for index, read in enumerate(READS)}
        self.accumulator = Accumulator(chosen.accumulate, chosen.chunk)
        self.result_format: str = chosen.result
        self.training = False
        self.thresholds = new_thresholds().to(device)
        self.counters = new_counters().to(device)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the tensors, as `nn.Module._apply` does."""
        self.thresholds, self.counters = fn(self.thresholds), fn(self.counters)

    def emulates(self, step: str) -> bool:
        """Whether any operand of the step is rounded; else the step is torch's own, bit for bit."""
        return any(read.rule is not None for (name, _), read in self.reads.items() if name == step)

    def seed(self, x: Tensor) -> Tensor | None:
        """The key of one call's random bits, from torch's generator; None if nothing is rounded stochastically."""
        return ops.draw_seed(x) if any(read.stochastic for read in self.reads.values()) else None

    def quantize(
        self, tensors: dict[str, Tensor], steps: Sequence[str], seed: Tensor | None
    ) -> dict[tuple[str, str], Quantized]:
        """Each operand as each of the steps reads it, rounded once for each rule."""
        rounded: dict[int, Quantized] = {}
        results = {}
        for (step, operand), read in self.reads.items():
            if step in steps and operand in tensors:
                if read.row not in rounded:
                    rounded[read.row] = self._quantize(tensors[operand], read, seed)
                results[step, operand] = rounded[read.row]
        return results

    def result(self, step: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A step's result as it leaves the chip, in the dtype that torch would return."""
        if self.emulates(step) and self.result_format != "fp32":
            x = ops.round_result(x, self.result_format)
        return x.to(dtype)

    def _quantize(self, x: Tensor, read: Read, seed: Tensor | None) -> Quantized:
        if read.rule is None:
            return Quantized(x, ops.float_groups(x))
        threshold = ops.next_threshold(x, self.thresholds, read.row, read.rule, self.training)
        values, groups = ops.quantize(x, threshold, seed if read.stochastic else None, read.rule, read.row)
        return Quantized(values, groups)


def _read(rules: list[Rule | None], index: int) -> Read:
    rule, operand = rules[index], READS[index][1]
    row = next(i for i, read in enumerate(READS) if read[1] == operand and rules[i] == rule)
    return Read(rule.model_dump_json() if rule else None, row, rule is not None and rule.rounding == "stochastic")
