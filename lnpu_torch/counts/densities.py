"""Densities: which share of operands' elements is not zero, and which share of those is FP8, by layer and step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import accumulate, chain, pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lnpu_torch.files import ConfigError, Frozen, listed, nearest

Triple = tuple[int, int, int]
"""Elements that are zero, FP8, wide."""
Transition = tuple[tuple[Fraction, ...], ...]
"""`transition[i][j]` is the share of the elements of group i that move to group j; groups are (zero, fp8, wide)."""
STAYS: Transition = tuple(tuple(Fraction(int(i == j)) for j in range(3)) for i in range(3))
"""Nothing moves."""

OperandName = Literal["input", "weight", "grad_output"]
Share = Annotated[float, Field(ge=0, le=1)]


class Density(Frozen):
    """One operand: the share of its elements that is not zero, and the share of those that is FP8.

    None is what nobody says. A number alone stands for `nonzero`.
    """

    nonzero: Share | None = None
    fp8: Share | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, data: Any) -> Any:
        return {"nonzero": data} if isinstance(data, int | float) and not isinstance(data, bool) else data


class ForwardDensities(Frozen):
    """The operands of forward."""

    input: Density | None = None
    weight: Density | None = None


class GradInputDensities(Frozen):
    """The operands of grad_input."""

    grad_output: Density | None = None
    weight: Density | None = None


class GradWeightDensities(Frozen):
    """The operands of grad_weight."""

    input: Density | None = None
    grad_output: Density | None = None


class LayerDensities(Frozen):
    """A layer's operands; what a step says holds there, and what the layer says in all its steps."""

    input: Density | None = None
    weight: Density | None = None
    grad_output: Density | None = None
    forward: ForwardDensities | None = None
    grad_input: GradInputDensities | None = None
    grad_weight: GradWeightDensities | None = None

    def said(self, step: str, operand: str) -> Iterator[Density]:
        """What is said of an operand, the closest first."""
        for place in (getattr(self, step), self):
            found = getattr(place, operand) if place else None
            if found:
                yield found


class Densities(Frozen):
    """Densities of a whole model.

    `layers` are by name or pattern ("conv1", "layer1.*"); the last pattern that matches a layer and says something of
    an operand holds. `default` is for what none of them says.
    """

    default: LayerDensities = LayerDensities()
    layers: dict[str, LayerDensities] = {}

    def check(self, layers: Iterable[str]) -> None:
        """Raises ConfigError if a pattern matches none of these layers."""
        layers = list(layers)
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in layers):
                hint = nearest(pattern, layers) or f" (such as {listed(layers[:3])})"
                raise ConfigError(f"densities.layers.{pattern}: no such layer was counted{hint}")

    def of(self, layer: str, step: str, operand: str) -> Density:
        """An operand's density in a step of a layer; None in what nothing is said of."""
        matching = [said for pattern, said in reversed(self.layers.items()) if fnmatchcase(layer, pattern)]
        said = list(chain.from_iterable(each.said(step, operand) for each in (*matching, self.default)))
        nonzero, fp8 = ([getattr(each, name) for each in said] for name in ("nonzero", "fp8"))
        return Density(nonzero=_first(nonzero), fp8=_first(fp8))


def _first(values: Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


def transition(elements: Triple, wanted: Density) -> Transition:
    """How elements move from group to group, so that an operand has a density.

    Elements that change are chosen at random. First zeros become non-zeros, of which as many are FP8 as of the others,
    or non-zeros zeros; then FP8 elements become wide ones, or wide ones FP8.
    """
    _, fp8, wide = elements
    if not sum(elements):
        return STAYS
    density, of_fp8 = Fraction(fp8 + wide, sum(elements)), Fraction(fp8, fp8 + wide) if fp8 + wide else Fraction(0)
    target = density if wanted.nonzero is None else Fraction(str(wanted.nonzero))
    target_fp8 = of_fp8 if wanted.fp8 is None else Fraction(str(wanted.fp8))
    filled = (target - density) / (1 - density) if target > density else Fraction(0)
    kept = target / density if target < density else Fraction(1)
    lifted = (target_fp8 - of_fp8) / (1 - of_fp8) if target_fp8 > of_fp8 else Fraction(0)
    left = target_fp8 / of_fp8 if target_fp8 < of_fp8 else Fraction(1)
    return (
        (1 - filled, filled * target_fp8, filled * (1 - target_fp8)),
        (1 - kept, kept * left, kept * (1 - left)),
        (1 - kept, kept * lifted, kept * (1 - lifted)),
    )


def moved(elements: Triple, by: Transition) -> Triple:
    """Elements after a transition, in whole numbers of the same sum."""
    a, b, c = whole([sum((elements[i] * by[i][j] for i in range(3)), Fraction(0)) for j in range(3)])
    return a, b, c


def moved_pairs(pairs: Sequence[Sequence[int]], first: Transition, second: Transition) -> tuple[Triple, Triple, Triple]:
    """Pairs after transitions of both operands, independent of each other, in whole numbers of the same sum."""
    places = range(3)
    cells = [
        sum((pairs[a][b] * first[a][i] * second[b][j] for a in places for b in places), Fraction(0))
        for i in places
        for j in places
    ]
    a, b, c, d, e, f, g, h, i = whole(cells)
    return (a, b, c), (d, e, f), (g, h, i)


def whole(parts: Sequence[Fraction]) -> list[int]:
    """Parts of a whole number, each rounded up or down so that their sum stays."""
    ends = [0, *(int(end + Fraction(1, 2)) for end in accumulate(parts))]
    return [end - start for start, end in pairwise(ends)]
