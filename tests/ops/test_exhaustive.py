"""What `make exhaustive` does, on patterns chosen for their ties; and that it would see a difference."""

from __future__ import annotations

import pytest
import torch

import exhaustive
from lnpu_torch.ops.quantize import reference


def test_reference_and_numba() -> None:
    assert exhaustive.compare(["reference", "numba"], exhaustive.some_patterns()) == 2**19


@pytest.mark.slow
@pytest.mark.triton_interpreter
def test_triton() -> None:
    pytest.importorskip("triton")
    assert exhaustive.compare(["triton"], exhaustive.some_patterns()) == 2**19


def test_all_patterns_are_walked_once() -> None:
    chunks = exhaustive.every_pattern()
    first, second = next(chunks), next(chunks)
    assert first.size == 2**16 and 2**32 % first.size == 0
    assert (first.view("u4")[0], first.view("u4")[-1], second.view("u4")[0]) == (0, 2**16 - 1, 2**16)


@pytest.mark.parametrize("bit", [0, 12, 31])
def test_a_difference_ends_it_and_is_named(bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that is wrong in one element of a chunk, by one bit."""
    right = reference.quantize

    def wrong(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, groups = right(*args)
        values.view(torch.int32)[5] ^= -(2**31) if bit == 31 else 1 << bit
        return values, groups

    monkeypatch.setattr(reference, "quantize", wrong)
    with pytest.raises(SystemExit, match=r"reference: .*low='e4m3', threshold=-100.*1 of 65536 .*bits 0x0000"):
        exhaustive.compare(["reference"], exhaustive.some_patterns())
