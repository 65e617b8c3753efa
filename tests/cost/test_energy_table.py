"""What events cost at each voltage, and by each energy model."""

from __future__ import annotations

from fractions import Fraction

import pytest

from helpers.handmade import bottom_up, counts, network, step, variant
from helpers.paths import ROOT
from lnpu_torch.cost.energy_table import EnergyTable
from lnpu_torch.cost.pricing import price
from lnpu_torch.files import ConfigError
from lnpu_torch.hardware.chip import Chip, chip
from lnpu_torch.units import ZJ_PER_PJ, pj, zj


def test_both_ends_of_the_range_are_as_in_the_file() -> None:
    low, high = chip("lnpu"), chip("lnpu", voltage=1.1)
    assert (low.clock_hz, high.clock_hz) == (50e6, 200e6)
    assert (low.operating_point.energy_scale, high.operating_point.energy_scale) == (1, (0.367 / 200) / (0.0431 / 50))


def test_between_both_ends_clock_and_energy_are_powers_of_the_voltage() -> None:
    middle = chip("lnpu", voltage=(0.78 * 1.1) ** 0.5).operating_point  # half-way between the logarithms
    assert middle.clock_hz == pytest.approx((50e6 * 200e6) ** 0.5)
    assert middle.energy_scale == pytest.approx(((0.367 / 200) / (0.0431 / 50)) ** 0.5)
    at_one = chip("lnpu", voltage=1.0).operating_point
    assert at_one.energy_scale == pytest.approx((1 / 0.78) ** 2.20, rel=1e-3)  # the exponent that chip.md derives


def test_energies_are_rounded_to_the_nearest_zeptojoule() -> None:
    """Neither up nor down, so that the sum of many is no more wrong in one direction than in the other."""
    assert all(zj(pj(n)) == n for n in range(2000))  # the nearest float is often a little less
    for thousandths in (1, 499, 501, 999):
        assert zj((7 + thousandths / 1000) * 1e-9) == 7 + (thousandths > 500)
    for voltage in (0.78, 0.91, 1.0, 1.1):
        scale, energy = chip("lnpu", voltage).operating_point.energy_scale, chip("lnpu").energy
        exact = energy.fp8_mac_pj.value * scale, energy.sram_read_pj_per_bit.value * scale
        energies = EnergyTable.of(chip("lnpu", voltage))
        for whole, value in zip((energies.fp8_mac, energies.sram_read_bit), exact, strict=True):
            assert abs(whole - Fraction(value) * ZJ_PER_PJ) <= 0.501


def test_voltage_moves_the_chips_energies_and_not_drams() -> None:
    low, high = price(counts(step()), "lnpu").total, price(counts(step()), chip("lnpu", voltage=1.1)).total
    for part in ("mac", "sram"):
        assert high.energy_zj[part] / low.energy_zj[part] == pytest.approx((0.367 / 200) / (0.0431 / 50), rel=1e-6)
    assert high.dram_bits == low.dram_bits
    assert high.cycles == low.cycles
    notes = price(counts(step()), chip("lnpu", voltage=1.1)).notes
    assert any("at 1.1 V, 200 MHz" in note for note in notes)


@pytest.mark.parametrize("voltage", [0.77, 1.11, 0.0, -1.0, float("nan")])
def test_a_voltage_outside_the_range_is_refused(voltage: float) -> None:
    said = r"(: voltage_v.*0\.78 \.\.\. 1\.1 V|.*greater than 0|.*finite)"
    with pytest.raises(ConfigError, match=f"lnpu: operating_point{said}"):
        chip("lnpu", voltage)


def test_a_chip_with_one_operating_point_has_one_voltage() -> None:
    fixed = variant(operating_point__high=None)
    assert (fixed.clock_hz, fixed.operating_point.energy_scale) == (50e6, 1)
    with pytest.raises(ConfigError, match=r"0\.9 is outside the chip's range, 0\.78 \.\.\. 0\.78 V"):
        chip(fixed, 0.9)


def test_bottom_up_energies_by_hand() -> None:
    energies = EnergyTable.of(bottom_up())
    to_65nm = (3.755 * 0.78**2 - 4.398 * 0.78 + 1.975) / (1.103 * 0.9**2 - 0.362 * 0.9 + 0.2767)
    assert to_65nm == pytest.approx(0.98, abs=0.005)  # as chip.md has it; 1.99 at 1.1 V
    read = 24.2 / 32 * (0.78 / 1.2) ** 2
    assert pj(energies.fp16_mac) == pytest.approx((1.1 + 0.9) * to_65nm + 36 * read / 48)
    assert pj(energies.fp8_mac) == pytest.approx((0.4 + 0.9) * to_65nm + 28 * read / 48)
    assert pj(energies.skipped_mac) == pytest.approx(read / 48)
    assert pj(energies.sram_read_bit) == pytest.approx(read)
    assert pj(energies.sram_write_bit) == pytest.approx(18.7 / 32 * (0.78 / 1.2) ** 2)
    assert energies.dram_bit == EnergyTable.of(chip("lnpu")).dram_bit
    at_high = bottom_up().bottom_up.arithmetic.scale(1.1)  # type: ignore[union-attr]
    assert at_high == pytest.approx(1.99, abs=0.005)


def test_both_models_agree_on_an_sram_bit() -> None:
    ours, theirs = EnergyTable.of(chip("lnpu")), EnergyTable.of(bottom_up())
    assert ours.sram_read_bit == pytest.approx(theirs.sram_read_bit, rel=1e-3)
    assert ours.sram_write_bit == pytest.approx(theirs.sram_write_bit, rel=1e-3)


def test_bottom_up_has_no_band_and_other_constants() -> None:
    report = price(counts(step()), bottom_up())
    assert (report.energy_range, report.energy_range_pj) == (None, (report.total.energy_pj,) * 2)
    assert any(note.startswith("constants: 7 published, ") for note in report.notes)


@pytest.mark.parametrize("voltage", [0.78, 1.1])
def test_the_ends_of_the_band_are_the_prices_at_these_ratios(voltage: float) -> None:
    def with_ratio(value: float, ends: tuple[float, float] | None) -> Chip:
        ratio = chip("lnpu").energy.fp16_to_fp8.model_copy(update={"value": value, "range": ends})
        energy = chip("lnpu").energy.model_copy(update={"fp16_to_fp8": ratio})
        return chip(chip("lnpu").model_copy(update={"energy": energy}), voltage)

    report, ends = price(network(), with_ratio(2.5, (1.5, 5.0))), (1.5, 5.0)
    assert report.energy_range_pj == tuple(price(network(), with_ratio(end, None)).total.energy_pj for end in ends)


def test_a_larger_bank_costs_more_per_bit() -> None:
    sram = bottom_up().bottom_up.sram  # type: ignore[union-attr]
    banks = [
        sram.model_copy(update={"bank_bytes": sram.bank_bytes.model_copy(update={"value": size})})
        for size in (4096, 10000, 32768, 65536, 131072, 327680)
    ]
    reads = [bank.read_pj_per_bit(1.2) for bank in banks]
    assert reads == sorted(reads)
    assert (reads[0], reads[-1]) == (pytest.approx(5.2 / 16), pytest.approx(78 / 32))
    assert reads[3] == pytest.approx((24.2 / 32 * 52 / 32) ** 0.5)  # half-way between two blocks' logarithms


def test_settings_replace_values_and_say_so() -> None:
    changed = chip("lnpu").with_values({"energy.fp16_to_fp8": 3.0, "sram_bytes": 1000, "energy_model": "bottom_up"})
    ratio = changed.energy.fp16_to_fp8
    assert (ratio.value, ratio.tag, ratio.source, ratio.range) == (3.0, "assumed", "set by hand", None)
    assert (changed.sram_bytes.value, changed.energy_model, changed.name) == (1000, "bottom_up", "lnpu")
    assert chip("lnpu").sram_bytes.value == 380928


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("macs_per_cycle.fp17", 1, r"no key 'macs_per_cycle\.fp17' \(nearest: macs_per_cycle\.fp16"),
        ("macs_per_cycle.fp16", 0, r"macs_per_cycle\.fp16\.value"),
        ("macs_per_cycle.fp16", 1.5, r"macs_per_cycle\.fp16\.value"),
        ("macs_per_cycle", 1, "no key 'macs_per_cycle'"),
        ("energy_model", "guess", "energy_model"),
        ("name", "mine", "no key 'name'"),
    ],
)
def test_wrong_settings_are_refused(key: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=f"lnpu: {said}"):
        chip("lnpu").with_values({key: value})


def test_bottom_up_needs_its_tables() -> None:
    bare = chip("lnpu").model_copy(update={"bottom_up": None})
    with pytest.raises(ConfigError, match="energy_model is 'bottom_up', but there is no bottom_up"):
        bare.with_values({"energy_model": "bottom_up"})


EVENTS = {
    "FP8 MAC": "fp8_mac",
    "FP16 MAC": "fp16_mac",
    "skipped MAC": "skipped_mac",
    "SRAM, bit read": "sram_read_bit",
    "SRAM, bit written": "sram_write_bit",
    "DRAM, bit": "dram_bit",
}


@pytest.mark.parametrize("voltage", [0.78, 1.1])
def test_the_page_that_compares_the_models_is_true(voltage: float) -> None:
    page = (ROOT / "docs" / "energy_models.md").read_text()
    table = page.split(f"| at {voltage:g} V, in pJ")[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [line[0] for line in lines] == list(EVENTS)
    ours = EnergyTable.of(chip("lnpu", voltage))
    theirs = EnergyTable.of(chip(bottom_up(), voltage))
    for name, *numbers in lines:
        energies = [pj(getattr(model, EVENTS[name])) for model in (ours, theirs)]
        assert numbers == [*(f"{energy:.4g}" for energy in energies), f"{energies[1] / energies[0]:.2f}"]
