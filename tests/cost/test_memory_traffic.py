"""What a step moves through SRAM and DRAM, on paper: who stays, who comes again, and what the format makes of it."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest

from helpers.handmade import counts, step, variant
from lnpu_torch.cost.cost_row import CostRow
from lnpu_torch.cost.energy_table import EnergyTable
from lnpu_torch.cost.memory_traffic import fetches
from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.schema import Counts
from lnpu_torch.counts.vector_ops import VectorOp, VectorOpCounts
from lnpu_torch.hardware.chip import Chip, chip

SRAM = 200  # bytes: 100 elements of FP16, 50 partial sums


def holding(sram_bytes: int = SRAM, **values: Any) -> Chip:
    return variant(sram_bytes=sram_bytes, **values)


@pytest.mark.parametrize(
    ("first", "second", "result", "often"),
    [
        (100, 100, 999, (1, 1)),  # the smaller operand fits, whichever it is
        (999, 100, 999, (1, 1)),
        (100, 999, 999, (1, 1)),
        (999, 999, 50, (1, 1)),  # the partial sums fit
        (999, 101, 999, (2, 1)),  # the second stays in two parts: the first, larger, comes twice
        (101, 999, 999, (1, 2)),
        (2000, 301, 1000, (4, 1)),  # 301 elements are 4 parts; partial sums of 1000 are as large as the first
        (2001, 301, 1000, (1, 20)),  # now the result stays, in 20 parts, and the smaller operand comes again
        (301, 2001, 1000, (20, 1)),
        (300, 300, 51, (2, 1)),  # the result stays in 2 parts; of two alike the first comes again
        (300, 300, 999, (1, 3)),  # one of two alike stays: the first
    ],
)
def test_how_often_operands_are_fetched(first: int, second: int, result: int, often: tuple[int, int]) -> None:
    assert fetches((first, second, result), holding()) == often


def test_what_is_fetched_again_is_never_less_with_less_sram() -> None:
    """Whatever the zeros: both operands come at most as often, for a hundred shapes."""
    chips = [holding(sram_bytes) for sram_bytes in (20, 50, 100, 200, 300, 400, 900, 5000)]
    for sizes in product((40, 99, 150, 300, 2000), repeat=3):
        often = [fetches(sizes, chip) for chip in chips]
        assert all(more[0] >= less[0] and more[1] >= less[1] for more, less in pairwise(often))


def row_of(rows: tuple[CostRow, ...], name: str) -> CostRow:
    return next(row for row in rows if row.step == name)


def bits(entry: Any, chip: Chip, *others: Any) -> tuple[int, ...]:
    """DRAM, SRAM and dense DRAM bits of one entry, priced beside others of its layer."""
    row = row_of(price(counts(entry, *others), chip).rows, entry.step)
    return row.dram_bits, row.sram_bits, row.dense_dram_bits


# Of handmade.step's operands the first is 5 zeros, 3 FP8, 2 FP16 = 71 bits, the second 6 and 2 = 96; results have 6.
def test_forward_reads_its_operands_and_books_the_write_of_its_input() -> None:
    assert bits(step(), holding()) == (71 + 96 + 71, (71 + 96 + 71) + 71, 16 * (10 + 8 + 10))


def test_grad_weight_writes_the_gradient_in_fp16() -> None:
    told = step("grad_input")  # it has read the error before
    assert bits(step("grad_weight"), holding(), told) == (71 + 96 + 6 * 16, 71 + 96 + 2 * 6 * 16, 16 * (10 + 8 + 6))


def test_an_error_that_only_grad_weight_reads_was_written_too() -> None:
    untold = step("grad_input", pairs=((0, 0, 0),) * 3, padding=0, not_run=9, first=(0, 0, 0), second=(0, 0, 0))
    for others in ((), (untold,)):
        dram, _, dense = bits(step("grad_weight"), holding(), *others)
        assert (dram, dense) == (71 + 96 + 6 * 16 + 96, 16 * (10 + 8 + 6 + 8))
    elsewhere = step("grad_input", layer="conv2")
    rows = price(counts(step("grad_weight"), elsewhere), holding()).rows
    assert rows[0].dram_bits == 71 + 96 + 6 * 16 + 96


def test_operands_that_do_not_fit_are_fetched_again() -> None:
    # a call of 10, 8 and 6 elements; 14 bytes hold 7 elements or 3 partial sums: the second stays in two parts
    assert bits(step(), holding(14))[0] == 2 * 71 + 96 + 71
    # 10 bytes hold 5 elements; 32 * 4 < 16 * 10: the result stays, in 2 parts, and the smaller operand comes twice
    assert bits(step(result=4), holding(10))[0] == 71 + 2 * 96 + 71


@pytest.mark.parametrize(
    ("name", "per_element"), [("lnpu", (1, 10, 18)), ("lnpu-fp16", (1, 17, 17)), ("dense-fp16", (16, 16, 16))]
)
def test_formats_of_the_built_in_chips(name: str, per_element: tuple[int, int, int]) -> None:
    first, second = (5, 3, 2), (0, 6, 2)
    stored = [sum(n * b for n, b in zip(x, per_element, strict=True)) for x in (first, second)]
    (row,) = price(counts(step(first=first, second=second)), name).rows
    assert row.dram_bits == 2 * stored[0] + stored[1]


def test_energies_are_bits_times_constants() -> None:
    (row,) = price(counts(step()), "lnpu").rows
    read, wrote = 71 + 96, 71
    assert row.sram_energy_pj == pytest.approx(wrote * 0.3195 + (read + wrote) * 0.2469)
    seconds = (read + wrote) / 8 / 6.4e9
    assert row.dram_energy_pj == pytest.approx((read + wrote) * 20 + 10e-3 * seconds * 1e12)
    assert row.energy_pj == pytest.approx(row.mac_energy_pj + row.sram_energy_pj + row.idle_energy_pj)  # DRAM is apart
    busy = (15 / 1536 + 24 / 768) / 50e6
    assert row.idle_energy_pj == pytest.approx(8.6e-3 * (seconds - busy) * 1e12)


# In FP16 words: operands of 10 and 8, a result of 6 (partial sums: 12).
@pytest.mark.parametrize(
    ("sram", "passed", "moved"),
    [
        (2 * 18, (0, 999, 0), 96),  # the weight stays for the plan, the input from before: 18 words
        (2 * 18 - 2, (0, 999, 0), 2 * 71 + 96),  # a word too few: it went out, and comes back
        (2 * 999, (0, 981, 0), 0),  # the weight is still there from the step before, too: 8 + 981, beside the input
        (2 * 989 - 2, (0, 981, 0), 96),
        (2 * 5000, None, 2 * 71 + 96),  # nobody saw in which order things ran
    ],
)
def test_what_sram_still_holds_is_not_fetched(sram: int, passed: tuple[int, int, int] | None, moved: int) -> None:
    first = step(layer="first")
    (_, row) = price(counts(first, step(passed=passed)), holding(sram)).rows
    assert row.dram_bits == moved


def test_images_come_from_outside() -> None:
    assert bits(step(passed=(0, 0, 0)), holding(5000))[0] == 2 * 71  # a model's first layer; its weight stays


@pytest.mark.parametrize(
    ("saved", "until_used", "sram", "moved"),
    [
        (300, 300, 2 * 400, 0),  # input 10 + 300, error 8, gradient 6 + 300, beside what the plan keeps
        (300, 300, 2 * 317, 71 + 71),  # the input did not wait; forward had it in SRAM, so that it was written for this
        (300, 9999, 2 * 400, 6 * 16),  # the gradient does not wait for the update
        (9999, 9999, 2 * 400, 71 + 71 + 6 * 16),
        (9999, 9999, 2 * 12, 71 + 96 + 6 * 16),  # forward and grad_input had fetched both, so that both were there
    ],
)
def test_what_waits_for_grad_weight(saved: int, until_used: int, sram: int, moved: int) -> None:
    entry, told = step("grad_weight", passed=(saved, 0, until_used)), step("grad_input", passed=(0, 0, 0))
    rows = price(counts(step(layer="first"), entry, told), holding(sram)).rows
    assert row_of(rows, "grad_weight").dram_bits == moved


@pytest.mark.parametrize(("sram", "moved"), [(5000, (0, 0)), (2 * 99, (30, 20)), (2 * 49, (30 + 7, 20 + 5))])
def test_vector_operations_fetch_what_sram_does_not_hold(sram: int, moved: tuple[int, int]) -> None:
    norm = VectorOp.model_validate(
        {
            **{"kind": "normalisation", "phase": "forward", "op": "norm", "calls": 1, "read": 60, "written": 40},
            **{"operations": 1, "special": 0, "uses": ((50, 7, 5), (100, 30, 20))},
        }
    )
    alone = Counts(steps=(), vector_ops=VectorOpCounts(entries=(norm,)))
    (row,) = price(alone, holding(sram)).rows
    assert (row.bits["dram_read"], row.bits["dram_write"]) == tuple(16 * words for words in moved)
    assert (row.bits["sram_read"], row.bits["sram_write"]) == (16 * (60 + moved[1]), 16 * (40 + moved[0]))


def test_a_bit_of_a_larger_sram_takes_more() -> None:
    small, large = (EnergyTable.of(chip("lnpu").with_values({"sram_bytes": n * 380928})) for n in (1, 4))
    assert large.sram_read_bit == pytest.approx(2 * small.sram_read_bit, rel=1e-8)
    assert EnergyTable.of(chip("lnpu")).sram_read_bit == 319_500_000


def test_calls_of_different_size_are_planned_apart() -> None:
    small, large = step(), step(first=(50, 30, 20), second=(0, 6, 2), result=60)
    chip = holding(14)  # the larger call fits no better than the smaller one
    apart = [price(counts(each), chip).total for each in (small, large)]
    merged = price(Counts.merge([counts(small), counts(large)]), chip).total
    assert merged.energy_zj == {key: sum(total.energy_zj[key] for total in apart) for key in merged.energy_zj}
    assert len((counts(small) + counts(large)).steps[0].by_size) == 2
