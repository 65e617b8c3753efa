"""What holds for the price of any run: parts add up, sums of runs cost the sum, and less work never costs more."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.handmade import step
from lnpu_torch.cost.cost_row import CostRow
from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.schema import STEPS, Counts, StepCounts
from lnpu_torch.counts.vector_ops import VectorOp, VectorOpCounts
from lnpu_torch.files import builtin_names
from lnpu_torch.hardware.chip import Chip, chip
from lnpu_torch.units import COMPONENTS, ON_CHIP

CHIPS = {
    **{name: chip(name) for name in builtin_names("chips")},
    "bottom-up": chip("lnpu").with_values({"energy_model": "bottom_up"}),
    "both, tiny SRAM": chip("lnpu").with_values({"fp8_pairs": "both", "sram_bytes": 500}),
    "mixed, 0.93 V": chip("lnpu", 0.93).with_values(
        {"skip.forward": "both", "skip.grad_input": "none", "sram_bytes": 64}
    ),
}
names = st.sampled_from(sorted(CHIPS))
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

count = st.integers(0, 10**12)
sizes = st.sampled_from([(900, 40, 900), (400, 40, 400), (64, 5000, 64), (3000, 2000, 700), (3000, 2000, 9000)])


@st.composite
def groups(draw: st.DrawFn, elements: int) -> tuple[int, int, int]:
    """So many elements, fallen into zero, FP8 and FP16."""
    cuts = sorted(draw(st.tuples(st.integers(0, elements), st.integers(0, elements))))
    return cuts[0], cuts[1] - cuts[0], elements - cuts[1]


@st.composite
def calls(draw: st.DrawFn) -> StepCounts:
    """One call of one step of one of two layers."""
    first, second, result = draw(sizes)
    pairs = tuple(tuple(draw(count) for _ in range(3)) for _ in range(3))
    entry = step(
        draw(st.sampled_from(STEPS)),
        layer=draw(st.sampled_from(["conv1", "conv2"])),
        pairs=pairs,
        padding=draw(count),
        first=draw(groups(first)),
        second=draw(groups(second)),
        result=result,
        passed=draw(st.none() | st.tuples(*[st.sampled_from([0, 1, 100, 5000])] * 3)),
    )
    return grouped(entry, draw(st.sampled_from([1, 4])))


def grouped(entry: StepCounts, groups: int, used: tuple[int, int, int] | None = None) -> StepCounts:
    """The same call in so many groups, of so many elements."""
    (one,) = entry.by_size
    return entry.model_copy(update={"by_size": (one.model_copy(update={"groups": groups, "used": used}),)})


def beside(entry: StepCounts) -> VectorOpCounts:
    """Some vector operations, as if there were an optimizer with as many as the call has padding."""
    names = ("calls", "read", "written", "operations", "special", "fetched", "stored")
    update = {"kind": "optimizer", "phase": "update", "op": "add_"}
    norm = {"kind": "normalisation", "phase": "backward", "op": "norm", "layer": entry.layer}
    words = entry.padding
    uses = {"optimizer": ((700, 3 * words, 2 * words),), "normalisation": ((90, words, 0), (4000, words, words))}
    return VectorOpCounts(
        entries=tuple(
            VectorOp.model_validate({**op, **dict.fromkeys(names, words), "uses": uses[op["kind"]]})
            for op in (update, norm)
        )
    )


def run(entries: list[StepCounts]) -> Counts:
    return Counts.merge(Counts(steps=(entry,), vector_ops=beside(entry)) for entry in entries)


def exact(total: CostRow) -> dict[str, int]:
    """What must add up to the last digit."""
    bits = {name: getattr(total, name) or 0 for name in ("sram_bits", "dram_bits", "dense_dram_bits")}
    return {**{part: total.energy_zj.get(part, 0) for part in COMPONENTS}, **bits}


def still(chip: Chip) -> Chip:
    """The chip without power that flows as time passes: the longest of sums is less than the sum of the longest."""
    return chip.with_values({"energy.idle_w": 1e-30, "energy.dram_static_w": 1e-30})


def added(tables: list[dict[str, int]]) -> dict[str, int]:
    return {key: sum(table[key] for table in tables) for key in tables[0]}


@quick
@given(st.lists(calls(), min_size=1, max_size=5), names)
def test_layers_steps_and_parts_add_up_to_one_total(entries: list[StepCounts], name: str) -> None:
    report = price(run(entries), CHIPS[name])
    for grouped in (report, report.by("layer"), report.by("step")):
        assert added([exact(row) for row in grouped.rows]) == exact(report.total) == exact(grouped.total)
        assert grouped.total == report.total
    on_chip = sum(report.total.energy_zj.get(part, 0) for part in ON_CHIP)
    assert report.total.energy_pj == float(Fraction(on_chip, 10**9))


@quick
@given(st.lists(calls(), min_size=2, max_size=5), st.integers(1, 4), names)
def test_a_sum_of_runs_costs_the_sum_of_their_costs(entries: list[StepCounts], cut: int, name: str) -> None:
    # of one model: which layer is the first, and whether grad_input runs, is no matter of chance
    told = [step("grad_input", layer=layer) for layer in ("conv1", "conv2")]
    whole = run([*told, *told, *entries])
    parts = [run([*told, *entries[:cut]]), run([*told, *entries[cut:]])]
    chip = still(CHIPS[name])
    assert added([exact(price(part, chip).total) for part in parts]) == exact(price(whole, chip).total)
    times = [price(part, CHIPS[name]).time_s for part in parts]
    assert price(whole, CHIPS[name]).time_s <= sum(times) * (1 + 1e-12)


@quick
@given(st.lists(groups(900), min_size=2, max_size=5), st.integers(1, 900), names)
def test_a_sum_of_runs_that_use_some_elements_costs_the_sum_to_a_bit(
    firsts: list[tuple[int, int, int]], used: int, name: str
) -> None:
    entries = [grouped(step(first=first, second=(0, 30, 10), result=50), 1, (used, 40, 50)) for first in firsts]
    whole, parts = price(run(entries), CHIPS[name]), [price(run([entry]), CHIPS[name]) for entry in entries]
    more = sum(part.total.dram_bits or 0 for part in parts) - (whole.total.dram_bits or 0)
    assert 0 <= more < len(entries)


@settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(st.lists(calls(), min_size=2, max_size=6), names)
def test_split_saved_loaded_and_merged_is_priced_alike(tmp_path: Path, entries: list[StepCounts], name: str) -> None:
    for place, entry in enumerate(entries):
        run([entry]).save(tmp_path / f"{place}.json")
    loaded = Counts.merge(Counts.load(tmp_path / f"{place}.json") for place in range(len(entries)))
    assert price(loaded, CHIPS[name]) == price(run(entries), CHIPS[name])


def moved(entry: StepCounts, operand: str, source: int, target: int, share: float) -> StepCounts:
    """The same call with a share of one operand's elements, and of what they multiply, in another group."""

    def move(values: list[Any]) -> list[Any]:
        part = int(values[source] * share)
        values[source], values[target] = values[source] - part, values[target] + part
        return values

    pairs = [list(row) for row in entry.pairs]
    lines = [list(column) for column in zip(*pairs, strict=True)] if operand == "first" else pairs
    lines = [move(line) for line in lines]
    pairs = [list(row) for row in zip(*lines, strict=True)] if operand == "first" else lines
    elements = {name: getattr(entry, name).elements for name in ("first", "second")}
    elements[operand] = tuple(move(list(elements[operand])))
    one = entry.by_size[0]
    rest = {"result": one.sizes[2], "passed": one.passed}
    return grouped(step(entry.step, entry.layer, pairs, entry.padding, entry.not_run, **elements, **rest), one.groups)


def assert_no_dearer(less: CostRow, more: CostRow, parts: tuple[str, ...] = COMPONENTS) -> None:
    """Part by part; but multipliers that have less to do wait more, which takes less than what they would have done."""
    if "mac" in parts:
        assert less.chip_zj <= more.chip_zj
        parts = tuple(part for part in parts if part != "idle")
    assert all(less.energy_zj[part] <= more.energy_zj[part] for part in more.energy_zj if part in parts)
    assert less.cycles <= more.cycles * (1 + 1e-12)
    assert less.dram_bits <= more.dram_bits  # type: ignore[operator]


CHEAPER = [(1, 0), (2, 0), (2, 1)]  # FP8 or FP16 to zero, FP16 to FP8


@pytest.mark.parametrize("groups", CHEAPER, ids=["fp8 to zero", "fp16 to zero", "fp16 to fp8"])
@quick
@given(entry=calls(), operand=st.sampled_from(["first", "second"]), share=st.floats(0, 1), name=names)
def test_more_zeros_and_fewer_fp16_elements_never_cost_more(
    groups: tuple[int, int], entry: StepCounts, operand: str, share: float, name: str
) -> None:
    fewer = moved(entry, operand, *groups, share)
    assert_no_dearer(price(run([fewer]), CHIPS[name]).total, price(run([entry]), CHIPS[name]).total)


@quick
@given(st.lists(calls(), min_size=1, max_size=5), names, st.integers(1, 5000), st.integers(0, 20000))
def test_more_sram_never_moves_more(entries: list[StepCounts], name: str, few: int, more: int) -> None:
    """In dense FP16, in which the plan is made. A bit of a larger SRAM takes more energy; it is DRAM that it saves."""
    less, most = (
        price(run(entries), CHIPS[name].with_values({"sram_bytes": size})).total for size in (few + more, few)
    )
    assert less.dense_dram_bits <= most.dense_dram_bits  # type: ignore[operator]
    if name == "dense-fp16":
        assert_no_dearer(less, most, ("simd", "dram"))


@quick
@given(st.lists(calls(), min_size=1, max_size=5), names, st.integers(1, 4), st.sampled_from(["fp8", "fp16"]))
def test_more_lanes_take_no_longer_and_cost_nothing(
    entries: list[StepCounts], name: str, times: int, kind: str
) -> None:
    lanes = getattr(CHIPS[name].macs_per_cycle, kind)
    if lanes is not None:
        wider = price(run(entries), CHIPS[name].with_values({f"macs_per_cycle.{kind}": lanes.value * times})).total
        assert wider.cycles <= price(run(entries), CHIPS[name]).total.cycles
        narrow = price(run(entries), CHIPS[name]).total
        assert all(wider.energy_zj.get(part) == narrow.energy_zj.get(part) for part in ("mac", "sram", "simd"))


@quick
@given(st.lists(calls(), min_size=1, max_size=5), names, st.floats(0, 1), st.floats(0, 1))
def test_a_lower_voltage_takes_longer_and_less_energy(
    entries: list[StepCounts], name: str, one: float, other: float
) -> None:
    point = CHIPS[name].operating_point
    least, most = point.low.voltage_v.value, point.highest_v
    volts = (min(least + share * (most - least), most) for share in sorted((one, other)))
    low, high = (price(run(entries), CHIPS[name].with_values({"operating_point.voltage_v": v})) for v in volts)
    assert low.time_s >= high.time_s * (1 - 1e-12)  # DRAM alone may take it: the same, by another clock
    assert all(low.total.energy_zj[part] <= high.total.energy_zj[part] for part in ("mac", "sram", "simd"))
    assert low.total.dram_bits == high.total.dram_bits
