"""Which rounding rule each operand of each step gets. It knows formats, and no tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lnpu_torch.files import ConfigError, Frozen, is_file, listed, nearest, parse_yaml, read_text, validate
from lnpu_torch.named_files import NamedFile, file_to_read
from lnpu_torch.quant.formats import ALIASES, FORMATS, Format

MAX_ERROR = 0.013
"""Default bound on a tensor's relative RMS error (assumed). On a Gaussian it leaves 27 to 37 % of the elements in
FP16, depending on where its scale lies between two thresholds."""


NARROW = [name for name, form in FORMATS.items() if form.bits <= 8]
WIDE = [name for name, form in FORMATS.items() if 8 < form.bits <= 16]
"""Formats that can be a rule's `low` and `high`."""


def _named(known: Sequence[str]) -> AfterValidator:
    """Takes the names of these formats alone, or others' names for them."""

    def check(name: str) -> str:
        name = ALIASES.get(name, name)
        if name not in known:
            raise ValueError(f"unknown format; known: {listed(known)}")
        return name

    return AfterValidator(check)


class Rule(Frozen):
    """How one operand is rounded.

    With both formats, FGMP: |x| below the threshold 2^e (1 + k/4) is rounded to `low`, whose window ends in the
    threshold's binade, the rest to `high`; T = 4e + k is chosen by exactly one of `max_error` (smallest FP16 share
    whose predicted relative RMS error is at most this), `fp16_share` (of the non-zeros) and a static `threshold`.
    Only `low`: uniform, its window over the last step's largest magnitude (or the static `threshold`), saturating.
    Only `high`: uniform, overflow gives infinity. `window`: how many binades of `low`'s window are kept, counted from
    its top; smaller values become zero. None keeps all of them, subnormals included: 18 of e4m3.
    """

    low: Annotated[str, _named(NARROW)] | None = "e4m3"
    high: Annotated[str, _named(WIDE)] | None = "fp16"
    max_error: Annotated[float, Field(gt=0)] | None = None
    fp16_share: Annotated[float, Field(ge=0, le=1)] | None = None
    threshold: int | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    window: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        set_ = [key for key in ("max_error", "fp16_share", "threshold") if getattr(self, key) is not None]
        allowed = {"max_error", "fp16_share", "threshold"} if self.low and self.high else {"threshold"}
        if not (self.low or self.high):
            raise ValueError("a rule needs low, high or both; write null for an operand left in float")
        if len(set_) > 1:
            raise ValueError(f"give one of max_error, fp16_share and threshold, not {listed(set_)}")
        if set_ and (set_[0] not in allowed or not self.low):
            raise ValueError(f"{set_[0]} has no meaning for {'a uniform rule' if self.low else 'high alone'}")
        if self.threshold is not None:
            self.check_threshold(self.threshold)
        if self.window is not None and (not self.low or self.window > FORMATS[self.low].binades):
            raise ValueError(
                f"window: {f'{self.low} has {FORMATS[self.low].binades} binades' if self.low else 'there is no low'}"
            )
        if self.low and self.high and not set_:
            object.__setattr__(self, "max_error", MAX_ERROR)
        return self

    @property
    def adaptive(self) -> bool:
        """Whether the threshold is chosen from the tensor's histogram."""
        return self.max_error is not None or self.fp16_share is not None

    @property
    def wide(self) -> Format:
        """The format whose codes hold every rounded value: `high`, or binary16 for uniform FP8."""
        return FORMATS[self.high or "fp16"]

    @property
    def threshold_range(self) -> tuple[int, int]:
        """Smallest and largest threshold: below, nothing is in the FP8 group; above, FP8 codes would leave `wide`."""
        return 4 * (self.wide.ulp_exponent - 1), 4 * self.wide.max_exponent + 3

    def check_threshold(self, threshold: int) -> None:
        """Raises ValueError for a threshold outside `threshold_range`."""
        smallest, largest = self.threshold_range
        if not smallest <= threshold <= largest:
            raise ValueError(f"threshold {threshold} is outside {smallest} ... {largest}")


PRESETS = {
    "fgmp": Rule(),
    "fp8": Rule(high=None),
    "fp16": Rule(low=None),
}


def _named_rule(value: Any) -> Any:
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"unknown rule {value!r}; known: {listed(PRESETS)}")
        return PRESETS[value]
    return value


RuleLike = Annotated[Rule | None, BeforeValidator(_named_rule)]
FormatName = Annotated[str, _named([*WIDE, "fp32"])]


class Precision(Frozen):
    """The rule of every operand in every step, and how results are accumulated and stored.

    `input`, `weight` and `grad_output` hold for all steps; `forward`, `grad_input` and `grad_weight` override
    single operands in one step. `None` leaves an operand in float. `accumulate` is the accumulator's format,
    rounded every `chunk` products; `result` the format in which a step's result leaves (steps whose operands
    are all in float are left alone). `matmul` is the precision of products of two activations, such as attention's.
    """

    input: RuleLike = None
    weight: RuleLike = None
    grad_output: RuleLike = None
    forward: dict[Literal["input", "weight"], RuleLike] = {}
    grad_input: dict[Literal["grad_output", "weight"], RuleLike] = {}
    grad_weight: dict[Literal["input", "grad_output"], RuleLike] = {}
    matmul: Precision | None = None
    accumulate: FormatName = "fp32"
    chunk: Annotated[int, Field(ge=1)] = 64
    result: FormatName = "fp16"

    def rule(self, step: str, operand: str) -> Rule | None:
        """The rule of `operand` ("input", "weight", "grad_output") in `step`."""
        override: dict[str, Rule | None] = getattr(self, step)
        rule: Rule | None = override[operand] if operand in override else getattr(self, operand)
        return rule

    def of_activations(self) -> Precision:
        """The precision of a product of two activations: `matmul`, or this one with the input's rule for both."""
        if self.matmul is not None:
            return self.matmul
        second = {step: {"weight": self.rule("forward", "input")} for step in ("forward", "grad_input")}
        forward, grad_input = ({**getattr(self, step), **second[step]} for step in second)
        return self.model_copy(update={"weight": self.input, "forward": forward, "grad_input": grad_input})


def precision(value: str | Path | Rule | Precision) -> Precision:
    """A Precision from a preset's name ("fgmp", "fp8", "fp16"), a YAML file's path, one rule for all, or itself.

    Raises:
        ConfigError: neither a preset nor a file; or the file's keys or values are wrong.
    """
    if isinstance(value, Precision):
        return value
    rule = PRESETS.get(value) if isinstance(value, str) else value
    if isinstance(rule, Rule):
        return Precision(input=rule, weight=rule, grad_output=rule)
    if not isinstance(value, str | Path):
        raise ConfigError(
            f"a precision is a name ({listed(PRESETS)}), a YAML file, a Rule or a Precision; got {value!r}"
        )
    if not is_file(Path(value)):
        raise ConfigError(
            f"unknown precision {str(value)!r}{nearest(str(value), PRESETS)}; known: {listed(PRESETS)}, or a YAML file"
        )
    return validate(Precision, parse_yaml(read_text(Path(value)), str(value)), str(value))


class PrecisionFile(NamedFile):
    """A precision's file, and what it said."""

    content: Precision


def hold_precision(value: str | PrecisionFile, again: bool = False) -> str | PrecisionFile:
    """A precision's name as it is; its file's name with what the file says.

    Args:
        value: a name, a path, or what this function gave for a path.
        again: read the file anew, if it is there.

    Raises:
        ConfigError: the file is no precision.
    """
    name = file_to_read(value, again)
    if name is None or name in PRESETS:
        return value
    return PrecisionFile(file=os.path.abspath(name), content=precision(name))
