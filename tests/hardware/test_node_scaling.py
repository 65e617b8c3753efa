"""Energy from one process to another: the table's own values, between them, and outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from lnpu_torch.files import ConfigError
from lnpu_torch.hardware.chip import chip
from lnpu_torch.hardware.node_scaling import interpolated, node_energy, node_scale, node_table


def test_nodes_of_the_table_by_hand() -> None:
    assert node_energy(65, 0.78) == pytest.approx(3.755 * 0.78**2 - 4.398 * 0.78 + 1.975)
    assert node_energy(7, 0.5) == pytest.approx(0.09365 * 0.25 - 0.03409 * 0.5 + 0.02043)
    assert node_energy(130, 1.2) == pytest.approx(7.171 * 1.44 - 6.709 * 1.2 + 2.904)
    assert node_scale(65, 0.78, 45, 0.9) == pytest.approx(0.8443 / 0.8291, rel=1e-3)
    assert node_scale(65, 0.78, 65, 0.78) == 1


def test_the_table_is_the_one_that_the_bottom_up_model_has() -> None:
    table = {node.nm: node.polynomial for node in node_table().energy.value}
    arithmetic = chip("lnpu").bottom_up.arithmetic  # type: ignore[union-attr]
    assert (table[45], table[65]) == (arithmetic.measured_in.polynomial.value, arithmetic.chip_in.polynomial.value)


def test_every_smaller_node_takes_less_at_usual_voltages() -> None:
    nodes = [node.nm for node in node_table().energy.value]
    assert nodes == sorted(nodes, reverse=True)
    for voltage in (0.5, 0.65, 0.8, 1.0, 1.2):
        energies = [node_energy(nm, voltage) for nm in (130, 110, 90, 65, 45, 40, 32, 28, 22, 20, 16, 14, 12, 10, 7)]
        assert energies == sorted(energies, reverse=True) and energies[-1] > 0


def test_between_two_nodes_energy_is_a_power_of_the_node() -> None:
    middle = (32 * 20) ** 0.5
    assert node_energy(middle, 0.9) == pytest.approx((node_energy(32, 0.9) * node_energy(20, 0.9)) ** 0.5)
    assert interpolated(28) and interpolated(12) and not interpolated(32)


@pytest.mark.parametrize("nm", [180, 131, 6.9, 4])
def test_a_node_outside_the_table_is_an_error(nm: float) -> None:
    with pytest.raises(ConfigError, match=rf"{nm:g} nm lies outside the table of processes, 130 \.\.\. 7 nm"):
        node_energy(nm, 0.8)


OTHER = """
like: lnpu
description: x
node_nm: {value: 45, tag: assumed, source: x}
operating_point:
  voltage_v: {value: 0.9, tag: assumed, source: x}
  low: {voltage_v: {value: 0.9, tag: assumed, source: x}}
energy: {sram_write_pj_per_bit: {value: 0.1, tag: assumed, source: x}}
"""


def test_a_file_of_another_node_takes_energies_at_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OTHER)
    mine, lnpu = chip(tmp_path / "mine.yaml"), chip("lnpu")
    scale = node_scale(65, 0.78, 45, 0.9)
    read, simd = mine.energy.sram_read_pj_per_bit, mine.simd.operation_pj  # type: ignore[union-attr]
    assert read.value == lnpu.energy.sram_read_pj_per_bit.value * scale
    assert simd.value == lnpu.simd.operation_pj.value * scale  # type: ignore[union-attr]
    assert (read.tag, mine.inherited["energy.sram_read_pj_per_bit"]) == ("derived", "lnpu")
    assert read.source.endswith("; times 1.018, from 65 nm and 0.78 V (Stillmaker & Baas 2017)")
    assert mine.energy.sram_write_pj_per_bit.value == 0.1
    assert mine.energy.fp8_mac_pj == lnpu.energy.fp8_mac_pj


def test_a_file_that_gives_no_node_takes_energies_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OTHER.replace("node_nm: {value: 45, tag: assumed, source: x}\n", ""))
    assert chip(tmp_path / "mine.yaml").energy.sram_read_pj_per_bit == chip("lnpu").energy.sram_read_pj_per_bit


def test_a_node_that_energies_cannot_be_taken_to(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OTHER.replace("value: 45", "value: 3"))
    with pytest.raises(ConfigError, match=r"mine\.yaml: energy\.sram_read.* cannot be taken from lnpu: node: 3 nm"):
        chip(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text(OTHER.replace("value: 45", "value: small"))
    with pytest.raises(ConfigError, match=r"node_nm\.value.*'small'"):
        chip(tmp_path / "mine.yaml")
