"""Vector operations priced by hand: energy, cycles and traffic of the SIMD core, and how reports show them."""

from __future__ import annotations

import pytest

from helpers.handmade import counts, network, step, variant
from lnpu_torch.cost.comparison import Comparison
from lnpu_torch.cost.pricing import price
from lnpu_torch.cost.report import Report
from lnpu_torch.cost.sweep import sweep
from lnpu_torch.counts.schema import Counts
from lnpu_torch.counts.vector_ops import NotCounted, VectorOp, VectorOpCounts
from lnpu_torch.files import ConfigError
from lnpu_torch.hardware.chip import chips

OPERATION, SRAM_READ, SRAM_WRITE, DRAM = 0.736, 0.3195, 0.2469, 20.0  # pJ an operation, pJ a bit, as in lnpu.yaml


def op(kind: str, phase: str, name: str = "op", **sums: int) -> VectorOp:
    none = dict.fromkeys(("calls", "read", "written", "operations", "special"), 0)
    return VectorOp.model_validate({"kind": kind, "phase": phase, "op": name, **none, **sums})


RELU = op("activation", "forward", calls=1, read=100, written=100, operations=100)
RELU_BACKWARD = op("activation", "backward", calls=1, read=100, written=100, operations=100)
ADAM = op("optimizer", "update", calls=1, read=90, written=60, operations=240, special=40, fetched=80, stored=60)


def counted(*entries: VectorOp, **uncounted: int) -> Counts:
    return network().model_copy(update={"vector_ops": VectorOpCounts(entries=entries, uncounted=uncounted)})


def test_an_activation_by_hand() -> None:
    (row,) = price(counts().model_copy(update={"vector_ops": VectorOpCounts(entries=(RELU,))}), "lnpu").rows
    assert (row.layer, row.kind, row.step) == ("(activation)", "SIMD", "forward")
    assert (row.operations, row.simd_cycles) == (100, 100 / 128)
    assert row.simd_energy_pj == pytest.approx(100 * OPERATION)
    assert row.sram_energy_pj == pytest.approx(100 * 16 * (SRAM_READ + SRAM_WRITE))
    assert row.energy_pj == pytest.approx(row.simd_energy_pj + row.sram_energy_pj + row.idle_energy_pj)
    assert row.idle_energy_pj == pytest.approx(8.6e-3 / 50e6 * 1e12 * 100 / 128)  # all the time, as nothing multiplies
    assert row.sram_bits == 2 * 100 * 16
    assert (row.macs, row.executed, row.cycles, row.mac_energy_pj) == (0, 0, 0.0, None)
    assert (row.dram_bits, row.dram_energy_pj) == (None, None)  # it is the layers' that it comes from and goes to


def test_an_update_by_hand() -> None:
    (row,) = price(counts().model_copy(update={"vector_ops": VectorOpCounts(entries=(ADAM,))}), "lnpu").rows
    assert (row.operations, row.simd_cycles) == (280, (240 + 4 * 40) / 128)  # a special function takes four
    assert row.simd_energy_pj == pytest.approx((240 + 4 * 40) * OPERATION)
    assert row.dram_bits == row.dense_dram_bits == 16 * (80 + 60)
    seconds = (240 + 4 * 40) / 128 / 50e6  # longer than the bits take, 280 bytes at 6.4 GB/s
    assert row.dram_energy_pj == pytest.approx(16 * (80 + 60) * DRAM + 10e-3 * seconds * 1e12)
    # what comes from DRAM is written to SRAM, what goes there is read from it
    assert row.sram_energy_pj == pytest.approx(16 * ((90 + 60) * SRAM_READ + (60 + 80) * SRAM_WRITE))


def test_one_line_for_each_kind_and_phase() -> None:
    report = price(counted(RELU, RELU_BACKWARD, ADAM), "lnpu")
    lines = [(row.layer, row.step, row.operations) for row in report.rows if row.kind == "SIMD"]
    assert lines == [
        ("(activation)", "forward", 100),
        ("(activation)", "backward", 100),
        ("(optimizer)", "update", 280),
    ]
    by_layer = [(row.layer, row.step, row.operations) for row in report.by("layer").rows if row.kind == "SIMD"]
    assert by_layer == [("(activation)", "all", 200), ("(optimizer)", "all", 280)]
    by_step = {row.step: row for row in report.by("step").rows}
    assert list(by_step) == ["forward", "grad_input", "grad_weight", "backward", "update"]
    assert by_step["forward"].operations == 100
    assert by_step["forward"].macs == network().steps[0].macs + network().steps[3].macs


def test_ops_of_one_kind_are_one_line() -> None:
    more = op("activation", "forward", "gelu", calls=2, read=1, written=2, operations=3, special=4)
    row = next(row for row in price(counted(RELU, more), "lnpu").rows if row.kind == "SIMD")
    assert (row.operations, row.simd_cycles, row.sram_bits) == (107, (103 + 4 * 4) / 128, 16 * 203)


def test_totals_close_and_know_the_rest_by_what_it_was_without() -> None:
    without, report = price(network(), "lnpu"), price(counted(RELU, ADAM), "lnpu")
    simd = [row for row in report.rows if row.kind == "SIMD"]
    assert report.total.energy_pj == pytest.approx(without.total.energy_pj + sum(row.energy_pj for row in simd))
    assert report.total.macs == without.total.macs
    assert report.total.zero_share == without.total.zero_share
    assert report.total.operations == 100 + 280


def test_the_slower_core_tells_the_time() -> None:
    """Layer after layer; a vector operation goes with the layer that it follows."""
    chip = variant().with_values({"dram_bytes_per_s": 1e15})
    long = op("other", "forward", calls=1, read=1, written=1, operations=128 * 10**6)
    cycles = {(row.layer, row.step): row.cycles for row in price(network(), chip).rows}
    beside = price(counted(long.model_copy(update={"layer": "conv1"})), chip)
    rest = sum(cycles.values()) - cycles["conv1", "forward"]
    assert beside.time_s == pytest.approx((10**6 + rest) / 50e6)
    assert beside.total.time_by == pytest.approx({"SIMD": 10**6, "multipliers": rest})
    assert [row.bound for row in beside.rows if row.step == "forward"] == [None, "multipliers", "SIMD"]
    short = op("other", "forward", calls=1, read=1, written=1, operations=1, layer="conv1")
    assert price(counted(short), chip).time_s == price(network(), chip).time_s
    apart = price(counted(long), chip)  # nobody knows after which layer
    assert apart.time_s == pytest.approx((10**6 + sum(cycles.values())) / 50e6)


def test_energy_goes_with_the_voltage() -> None:
    low, high = (price(counted(RELU), variant(operating_point__voltage_v=volt)).total for volt in (0.78, 1.1))
    assert high.simd_energy_pj / low.simd_energy_pj == pytest.approx((367 / 200) / (43.1 / 50))


@pytest.mark.parametrize("vector_ops", [NotCounted(reason="it rained"), VectorOpCounts()])
def test_what_was_not_counted_is_no_zero(vector_ops: VectorOpCounts | NotCounted) -> None:
    report = price(network().model_copy(update={"vector_ops": vector_ops}), "lnpu")
    assert report.total.simd_energy_pj is None and report.total.operations is None
    assert "SIMD" not in str(report).split("total:")[0]
    assert ("vector operations were not counted: it rained" in str(report)) == (vector_ops != VectorOpCounts())
    assert "not modelled, and not in these figures" in str(report)


def test_ops_that_were_not_counted_are_named() -> None:
    text = str(price(counted(RELU, **{"aten.sort.default": 3, "aten.mm.default": 1}), "lnpu")).replace("\n", " ")
    assert "ran, but not counted: aten.sort.default (3 x), aten.mm.default (1 x)" in text


def test_a_chip_without_a_simd_core_says_so() -> None:
    chip = variant().model_copy(update={"simd": None, "name": "bare"})
    report = price(counted(RELU), chip)
    row = next(row for row in report.rows if row.kind == "SIMD")
    assert (row.operations, row.simd_cycles, row.simd_energy_pj, row.sram_bits) == (100, None, None, None)
    assert "no SIMD core of bare is modelled" in str(report)
    assert row.energy_pj is None  # and not 0
    (line,) = [line.split() for line in str(report).splitlines() if line.startswith("  (activation)")][1:]
    assert set(line[4:]) == {"-"}
    alone = counts().model_copy(update={"vector_ops": VectorOpCounts(entries=(RELU,))})
    with pytest.raises(ConfigError, match="bare: no model covers any of what was counted"):
        sweep(alone, [chip], {"sram_bytes": [1000]})
    assert "normalisation" in str(report).split("not in these figures:")[1]
    assert str(Comparison([report, price(counted(RELU), "lnpu")]))


def test_every_built_in_chip_has_one() -> None:
    reports = [price(counted(RELU, ADAM), chip) for chip in chips()]
    energies = {report.chip: report.total.simd_energy_pj for report in reports}
    assert all(energies.values())
    of_lnpu = {energies[name] for name in ("lnpu", "lnpu-fp16", "dense-fp16", "sparse-inference", "ganpu")}
    assert len(of_lnpu) == 1 and energies["v100"] < min(of_lnpu) / 5  # of another process
    assert str(Comparison(reports))


def test_the_table() -> None:
    report: Report = price(counted(RELU), "lnpu")
    lines = [line.split() for line in str(report).splitlines()]
    work, energy = (line for line in lines if line[:2] == ["(activation)", "SIMD"])
    assert work[2:] == ["forward", "(FF)", "100", "781.2", "m"]
    assert " ".join(energy[4:]) == "SIMD - 0.906 nJ 73.6 pJ 134.4 pJ 1.114 nJ - 1.114 nJ 3.200 kbit - -"
    assert step().layer == lines[4][0]


def test_the_report_says_what_takes_the_time() -> None:
    slow = RELU.model_copy(update={"operations": 128 * 10**6})
    report = price(counted(slow), "lnpu")
    assert report.simd_time_s == 1e6 / 50e6
    assert report.mac_time_s == price(network(), "lnpu").total.cycles / 50e6
    assert report.dram_time_s == report.total.dram_bits / 8 / 6.4e9
    text = str(report).replace("\n", " ")
    assert "time: each alone multipliers 2.878 ns, DRAM 26.09 ns, SIMD 20 ms; layer after layer the longest: " in text
    assert "SIMD 100%" in text


def test_the_layers_steps_alone() -> None:
    report = price(counted(RELU, ADAM), "lnpu")
    layers = report.of_layers()
    assert layers.total == price(network(), "lnpu").total
    assert report.total.dram_bits == layers.total.dram_bits + 16 * (80 + 60)
    told = f"DRAM access of the layers' steps alone: {layers.total.dram_bits / 1000:.3f} kbit, "
    assert told in str(report)
    assert "steps alone" not in str(price(counted(RELU), "lnpu"))  # all of DRAM's is the layers'
