"""Values with their provenance: published, derived or assumed, and the source."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from lnpu_torch.files import MOST, Frozen

Tag = Literal["published", "derived", "assumed"]
Value = TypeVar("Value")


def _not_tiny(value: float) -> float:
    if value < 1 / MOST:
        raise ValueError(f"below {1 / MOST:g}")
    return value


NotNegative = Annotated[float, Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST), AfterValidator(_not_tiny)]
Bits = Annotated[int, Field(ge=0, le=MOST)]
Natural = Annotated[int, Field(gt=0, le=MOST)]


class SourcedValue(Frozen, Generic[Value]):
    """A value and its provenance: published in `source`, derived from it by a formula, or assumed by us."""

    value: Value
    tag: Tag
    source: Annotated[str, Field(min_length=1)]


class SourcedRange(SourcedValue[Positive]):
    """A number that is known only to lie in `range`."""

    range: tuple[Positive, Positive] | None = None

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.range and not self.range[0] <= self.value <= self.range[1]:
            raise ValueError(f"value {self.value} is outside its range {list(self.range)}")
        return self


def sourced_values(model: Frozen, prefix: str = "") -> dict[str, SourcedValue[Any]]:
    """Every sourced value in a model under its dotted key, as in the YAML."""
    found: dict[str, SourcedValue[Any]] = {}
    for key, value in model:
        if isinstance(value, SourcedValue):
            found[prefix + key] = value
        elif isinstance(value, Frozen):
            found |= sourced_values(value, f"{prefix}{key}.")
    return found


def value_text(entry: SourcedValue[Any]) -> str:
    """A value as it is shown, with its range if it has one."""
    if isinstance(entry, SourcedRange) and entry.range:
        return f"{entry.value:.10g} ({entry.range[0]:g} ... {entry.range[1]:g})"
    if isinstance(entry.value, tuple):
        return "\n".join(map(str, entry.value))
    return f"{entry.value:.10g}" if isinstance(entry.value, float) else f"{entry.value}"
