"""What a step moves through SRAM and DRAM, on paper: who stays, who comes again, and what the format makes of it."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.handmade import counts, step, variant
from lnpu_torch.cost.cost_row import CostRow
from lnpu_torch.cost.energy_table import EnergyTable
from lnpu_torch.cost.memory_traffic import Tensors, fetches
from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.schema import Counts, StepCounts
from lnpu_torch.counts.vector_ops import VectorOp, VectorOpCounts
from lnpu_torch.hardware.chip import Chip, chip
from lnpu_torch.profiler.estimate import estimate


def conv(in_channels: int, out_channels: int, kernel: int, grid: int, **more: int) -> dict[str, Any]:
    """A convolution that keeps its grid, but for a stride, as `estimate` takes it."""
    sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel, "padding": kernel // 2}
    return {"kind": "Conv2d", **sizes, "input": (grid, grid), **more}


def linear(in_channels: int, out_channels: int) -> dict[str, Any]:
    return {"kind": "Linear", "in_channels": in_channels, "out_channels": out_channels}


SRAM = 200  # bytes: 100 elements of FP16, 50 partial sums


@cache
def holding(sram_bytes: int = SRAM) -> Chip:
    return variant(sram_bytes=sram_bytes)


@pytest.mark.parametrize(
    ("first", "second", "result", "often"),
    [
        (100, 100, 999, (1, 1)),  # the smaller operand fits, whichever it is
        (999, 100, 999, (1, 1)),
        (100, 999, 999, (1, 1)),
        (999, 999, 50, (1, 1)),  # the partial sums fit
        (999, 119, 9999, (2, 1)),  # the second stays in two parts: the first, larger, comes twice
        (119, 999, 9999, (1, 2)),
        (401, 301, 9999, (4, 1)),  # four parts of the second fetch 1905, five of the first 1906
        (400, 301, 9999, (1, 4)),
        (1000, 301, 500, (2, 5)),  # the result stays in 10 tiles: of 1 by 10 they fetch 4010, of 2 by 5 3505
        (301, 1000, 500, (5, 2)),
        (1000, 301, 550, (2, 6)),  # 12 tiles, though 11 would do; those of 1 by 11 fetch 4311
        (2001, 310, 600, (1, 12)),
        (300, 300, 51, (2, 1)),  # of two alike the first comes again
        (300, 300, 9999, (3, 1)),
        (0, 300, 0, (1, 1)),  # an empty batch
    ],
)
def test_how_often_operands_are_fetched(first: int, second: int, result: int, often: tuple[int, int]) -> None:
    assert fetches((first, second, result), holding()) == often


SHAPES = st.tuples(*[st.integers(1, 3000)] * 3)
ROOMS = st.sampled_from([8, 13, 50, 77, 200, 333, 900, 1500])
QUICK = settings(max_examples=100, deadline=None)


def planned(sizes: tuple[int, int, int], sram_bytes: int) -> int:
    """Elements of both operands that a plan fetches."""
    often = fetches(sizes, holding(sram_bytes))
    return often[0] * sizes[0] + often[1] * sizes[1]


@QUICK
@given(SHAPES, ROOMS)
def test_no_plan_of_these_fetches_less(sizes: tuple[int, int, int], sram_bytes: int) -> None:
    """Over all grids of tiles, and both operands in parts; one that stays whole is the case of one part."""
    first, second, result = sizes
    room = 8 * sram_bytes
    tiles = ceil(32 * result / room)
    grids = [n * first + m * second for n in range(1, tiles + 1) for m in [ceil(tiles / n)]]
    parts = [ceil(16 * second / room) * first + second, first + ceil(16 * first / room) * second]
    assert planned(sizes, sram_bytes) == min(grids + parts)


@QUICK
@given(SHAPES, ROOMS, ROOMS)
def test_more_sram_never_fetches_more(sizes: tuple[int, int, int], one: int, other: int) -> None:
    assert planned(sizes, max(one, other)) <= planned(sizes, min(one, other))


def walked(m: int, k: int, n: int, sram_bytes: int) -> int:
    """The least that any blocking of [m, k] x [k, n] fetches, by walking over its blocks.

    One tensor's block stays while those of the others pass by, whose rows and columns need no room. Partial sums are
    never written out.
    """
    room, least = 8 * sram_bytes, 10**9
    cuts = [range(1, size + 1) for size in (m, k, n)]
    for rows, depth, columns in product(*cuts):
        blocks = ceil(m / rows), ceil(k / depth), ceil(n / columns)
        if 32 * rows * columns <= room:  # the result stays: for each block, all its rows and columns pass by
            least = min(least, blocks[2] * m * k + blocks[0] * k * n)
        if 16 * depth * columns <= room and depth == k:  # the second stays: for each block, the first passes by
            least = min(least, blocks[2] * m * k + k * n)
        if 16 * rows * depth <= room and depth == k:
            least = min(least, m * k + blocks[0] * k * n)
    return least


@QUICK
@given(st.tuples(*[st.integers(1, 9)] * 3), ROOMS)
def test_a_plan_is_the_best_blocking_where_blocks_divide_the_product(
    shape: tuple[int, int, int], sram_bytes: int
) -> None:
    """Rows and columns are whole, so that the best real blocking may fetch more than a plan, and never less."""
    m, k, n = shape
    assert planned((m * k, k * n, m * n), sram_bytes) <= walked(m, k, n, sram_bytes)


@pytest.mark.parametrize("shape", [(16, 8, 16), (16, 32, 8), (4, 64, 32), (8, 64, 32), (32, 2, 32)], ids=str)
@pytest.mark.parametrize("sram_bytes", [16, 64, 256])
def test_a_plan_is_a_real_blocking(shape: tuple[int, int, int], sram_bytes: int) -> None:
    m, k, n = shape
    assert planned((m * k, k * n, m * n), sram_bytes) == walked(m, k, n, sram_bytes)


def read(entry: StepCounts, chip: Chip) -> int:
    """Bits that a forward step reads from DRAM."""
    return row_of(price(counts(entry), chip).rows, "forward").bits["dram_read"]


def with_calls(entry: StepCounts, **changes: Any) -> StepCounts:
    """A step of calls that are otherwise alike."""
    (calls,) = entry.by_size
    return entry.model_copy(update={"by_size": (calls.model_copy(update=changes),)})


def test_what_no_kernel_touches_is_not_fetched() -> None:
    """It is written all the same: whoever made it does not know who reads it."""
    strided = with_calls(step(), used=(4, 8, 6))  # four of ten elements, which are stored in 71 bits
    assert bits(strided, holding()) == (29 + 96 + 71, (29 + 96 + 71) + 71, 16 * (4 + 8 + 10))
    border = with_calls(step(), used=(10, 2, 6))
    assert bits(border, holding())[0] == 71 + 96 // 4 + 71
    told = step("grad_input")
    assert bits(with_calls(step("grad_weight"), used=(4, 8, 3)), holding(), told)[0] == 29 + 96 + 6 * 16


def test_what_is_used_makes_the_plan() -> None:
    chip = holding(14)  # seven elements, or three partial sums
    assert read(with_calls(step(), used=(7, 8, 6)), chip) == 50 + 96  # the used ones of the input fit
    assert read(with_calls(step(), used=(10, 8, 3)), chip) == 71 + 96  # the partial sums do


def test_groups_are_planned_one_by_one() -> None:
    chip = holding(14)
    assert read(step(), chip) == 71 + 2 * 96
    assert read(with_calls(step(), groups=2), chip) == 71 + 96  # five, four and three elements each


def test_a_group_leaves_room_for_what_stays_from_before() -> None:
    entry = step(passed=(0, 999, 0))
    chip = holding(2 * 14)  # the input's ten words, and the weight's eight or one group's four
    rows = [price(counts(step(layer="first"), each), chip).rows[1] for each in (entry, with_calls(entry, groups=2))]
    assert [row.dram_bits for row in rows] == [2 * 71 + 96, 96]


def test_counts_that_know_no_geometry_are_one_dense_product(tmp_path: Path) -> None:
    data = json.loads(counts(step()).json_text())
    del data["steps"][0]["by_size"][0]["groups"]
    (tmp_path / "old.json").write_text(json.dumps({**data, "version": 5}))
    old = Counts.load(tmp_path / "old.json")
    assert price(old, holding(14)) == price(counts(step()), holding(14))


MB = 10**6


@pytest.mark.parametrize(
    ("layer", "batch", "name", "moved"),
    [
        (conv(64, 64, 3, 56), 1, "forward", 0.88),
        (conv(64, 128, 1, 56, stride=2), 1, "forward", 0.317),  # once 0.62
        (conv(256, 256, 3, 14), 16, "forward", 9.1),
        (conv(256, 256, 3, 14), 16, "grad_weight", 10.8),
        (conv(512, 512, 3, 7), 16, "forward", 9.5),
        (conv(512, 512, 3, 28), 16, "forward", 143.1),  # once 185
        (conv(512, 512, 3, 28), 16, "grad_weight", 133.2),  # 339
        (conv(1024, 1024, 3, 14, groups=32), 64, "forward", 52.0),  # 78
        (conv(1024, 1024, 3, 14, groups=32), 64, "grad_weight", 52.0),  # 129
        (linear(768, 3072), 16 * 197, "forward", 85.6),  # 87
        (linear(768, 3072), 16 * 197, "grad_weight", 106.4),  # 145
        (linear(4096, 4096), 4096, "forward", 939.5),  # 3053
    ],
)
def test_steps_move_what_the_table_in_the_docs_says(layer: dict[str, Any], batch: int, name: str, moved: float) -> None:
    """Each with its own result written once, in dense FP16, as other tools count it."""
    (calls,) = next(
        entry.by_size for entry in estimate({"before": layer, "it": layer}, batch).steps[3:] if entry.step == name
    )
    tensors = Tensors.of(calls)
    often = fetches(tensors.group, chip("dense-fp16"))
    used = calls.used or calls.sizes
    words = often[0] * used[0] + often[1] * used[1] + calls.sizes[2]
    assert 2 * words / MB == pytest.approx(moved, rel=6e-3)


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
    # a call of 10, 8 and 6 elements; 14 bytes hold 7 elements or 3 partial sums: the result stays in two parts
    assert bits(step(), holding(14))[0] == 71 + 2 * 96 + 71
    assert bits(step(result=60), holding(14))[0] == 71 + 2 * 96 + 71  # the first does
    assert bits(step(first=(5, 7, 3), result=60), holding(14))[0] == 2 * 129 + 96 + 129  # the second in two, not three


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
        (2 * 989, (0, 981, 0), 0),  # the weight is still there from the step before, too: 8 + 981, beside the input
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


def test_as_many_tiles_as_counts_allow_are_planned_at_once() -> None:
    """Not all grids of so many are tried: the best of those is near the best of all, and more SRAM is no worse."""
    first, second, result = 10**30, 10**29, 10**30
    moved = []
    for sram_bytes in (10**3, 10**6, 10**9, 10**12):
        often, again = fetches((first, second, result), holding(sram_bytes))
        moved.append(often * first + again * second)
        assert moved[-1] <= 1.02 * 2 * (32 * result / (8 * sram_bytes) * first * second) ** 0.5
    assert moved == sorted(moved, reverse=True)
