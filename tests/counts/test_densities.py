"""Densities: what is said of which operand, and how elements and pairs move so that an operand has one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lnpu_torch.counts.densities import STAYS, Densities, Density, moved, moved_pairs, transition, whole
from lnpu_torch.files import ConfigError, validate

ELEMENTS = st.tuples(*[st.integers(0, 10**6)] * 3)
SHARES = st.none() | st.floats(0, 1)


def said(data: dict[str, Any], layer: str = "conv1", step: str = "forward", operand: str = "input") -> Density:
    return validate(Densities, data, "test").of(layer, step, operand)


def test_the_closest_word_holds() -> None:
    data = {
        "default": {"input": {"nonzero": 0.5, "fp8": 0.9}, "forward": {"weight": 0.25}, "weight": 1},
        "layers": {"conv*": {"input": 0.4}, "conv1": {"grad_weight": {"input": 0.3}}, "fc": {"input": {"fp8": 0}}},
    }
    assert said(data) == Density(nonzero=0.4, fp8=0.9)
    assert said(data, step="grad_weight") == Density(nonzero=0.3, fp8=0.9)
    assert said(data, "fc") == Density(nonzero=0.5, fp8=0)
    assert said(data, operand="weight").nonzero == 0.25
    assert said(data, step="grad_input", operand="weight").nonzero == 1
    assert said(data, step="grad_input", operand="grad_output") == Density()


def test_of_two_patterns_the_last_holds() -> None:
    assert said({"layers": {"conv1": {"input": 0.1}, "conv*": {"input": 0.2}}}).nonzero == 0.2


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"default": {"input": 1.2}}, "default.input.nonzero: Input should be less than or equal to 1, got 1.2"),
        ({"layers": {"fc": {"weight": {"fp8": -0.1}}}}, "layers.fc.weight.fp8: Input should be greater than or equal"),
        ({"default": {"inputs": 0.5}}, "unknown key 'default.inputs' (nearest: input, grad_input)"),
        ({"default": {"grad_input": {"input": 0.5}}}, "unknown key 'default.grad_input.input'"),
        ({"default": {"input": True}}, "default.input"),
        ({"default": {"input": "half"}}, "default.input"),
    ],
)
def test_wrong_densities_are_named(data: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(Densities, data, "test")
    assert told in str(error.value)


@given(ELEMENTS, SHARES, SHARES)
def test_elements_get_their_density_and_stay_as_many(
    elements: tuple[int, int, int], nonzero: float | None, fp8: float | None
) -> None:
    zero, fp8s, wide = after = moved(elements, transition(elements, Density(nonzero=nonzero, fp8=fp8)))
    assert sum(after) == sum(elements)
    assert min(after) >= 0
    if nonzero is not None:
        assert fp8s + wide == pytest.approx(nonzero * sum(elements), abs=1)
    else:
        assert zero == elements[0]
    if fp8 is not None:
        assert fp8s == pytest.approx(fp8 * (fp8s + wide), abs=1.5)


@given(ELEMENTS)
def test_what_has_its_density_stays(elements: tuple[int, int, int]) -> None:
    assert transition(elements, Density()) == STAYS


@given(st.lists(ELEMENTS, min_size=3, max_size=3), ELEMENTS, ELEMENTS, SHARES, SHARES)
def test_pairs_stay_as_many(
    pairs: list[tuple[int, int, int]],
    first: tuple[int, int, int],
    second: tuple[int, int, int],
    nonzero: float | None,
    fp8: float | None,
) -> None:
    by = transition(first, Density(nonzero=nonzero)), transition(second, Density(nonzero=nonzero, fp8=fp8))
    after = moved_pairs(pairs, *by)
    assert sum(map(sum, after)) == sum(map(sum, pairs))
    assert min(map(min, after)) >= 0


def test_independent_operands_meet_as_the_product_of_their_densities() -> None:
    dense = (0, 0, 100)
    by = transition(dense, Density(nonzero=0.5, fp8=0.2)), transition(dense, Density(nonzero=0.4, fp8=1))
    assert moved_pairs([(0, 0, 0), (0, 0, 0), (0, 0, 10**4)], *by) == ((3000, 2000, 0), (600, 400, 0), (2400, 1600, 0))


def test_what_was_not_independent_stays_so() -> None:
    pairs = ((50, 0, 0), (0, 0, 0), (0, 0, 50))  # zeros meet zeros alone
    half = transition((50, 0, 50), Density(nonzero=0.25))
    assert moved_pairs(pairs, half, STAYS) == ((50, 0, 25), (0, 0, 0), (0, 0, 25))


def test_parts_are_rounded_to_their_sum() -> None:
    assert whole([Fraction(1, 3)] * 3) == [0, 1, 0]
    assert whole([Fraction(1, 2), Fraction(1, 2)]) == [1, 0]
