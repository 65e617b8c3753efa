"""Published figures of chips beside ours: worked out by hand, for every chip, and refused where they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.handmade import variant
from lnpu_torch.cost.chip_checks import figure, run_checks
from lnpu_torch.files import ConfigError
from lnpu_torch.hardware.chip import chip, chips
from lnpu_torch.reporting.chip_tables import checks_tables
from lnpu_torch.text_tables import plain

E8, E16, SKIP = 0.575, 1.15, 0.024  # pJ, as in lnpu.yaml


@pytest.mark.parametrize(
    ("policy", "zeros", "run"),
    [("input", (0.9, 0.5), 0.1), ("weight", (0.9, 0.5), 0.5), ("both", (0.9, 0.5), 0.05)],
)
def test_figures_by_hand(policy: str, zeros: tuple[float, float], run: float) -> None:
    on, energy = variant(skip__forward=policy), E16 * run + SKIP * (1 - run)
    assert figure(on, "efficiency", "fp16", zeros) == pytest.approx(2 / energy)
    assert figure(on, "throughput", "fp16", zeros) == pytest.approx(2 * 768 * 50e6 / 1e12 / run)
    assert figure(on, "power", "fp16", zeros) == pytest.approx(energy * 1e-12 / run * 768 * 50e6)


def test_a_dense_chip_is_as_good_whatever_the_zeros() -> None:
    dense = chip("dense-fp16")
    for zeros in ((0.9, 0.5), (0, 0)):
        assert figure(dense, "efficiency", "fp16", zeros) == pytest.approx(2 / E16)


def test_lnpu_beside_its_own_figures() -> None:
    found = {each.name: each for each in run_checks(chip("lnpu"))}
    assert found["peak"].ours == pytest.approx(2 / (0.1 * E8 + 0.9 * SKIP))
    assert found["dense"].ours == pytest.approx(2 / E8)
    assert found["peak-fp16"].ours == pytest.approx(2 / (0.1 * E16 + 0.9 * SKIP))
    assert found["peak-fp16"].deviation == pytest.approx(14.64 / 15.6 - 1, abs=1e-3)
    assert [each.basis.split(":")[0] for each in found.values()][:3] == ["circular", "circular", "held out"]


CANNOT = {("tsunami", "sparse"), ("trainer", "fp16")}
"""Figures that no line through a MAC and a skipped one fits, whatever the constants."""


@pytest.mark.parametrize("name", [each.name for each in chips() if each.checks])
def test_a_figure_that_constants_are_fitted_to_comes_out(name: str) -> None:
    for found in run_checks(chip(name)):
        agrees = found.deviation is not None and abs(found.deviation) < 0.03
        assert agrees or found.check.why, f"{name}, {found.name}: it says why"
        assert agrees or not found.check.fitted or (name, found.name) in CANNOT
        assert (found.ours is None) == (found.check.zeros is None) and found.ours != 0


RATIO = """
like: lnpu
description: with ratios
checks:
  rate:
    {of: throughput, format: fp8, zeros: [0, 0], over: {format: fp16, zeros: [0, 0]}, value: 2, tag: assumed, source: x}
  dense:
    of: efficiency
    format: fp8
    zeros: [0.9, 0]
    voltage_v: 1.1
    over: {chip: dense-fp16, format: fp16, zeros: [0.9, 0]}
    value: 4
    tag: assumed
    source: x
"""


def test_ratios_and_other_voltages(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RATIO)
    rate, dense = run_checks(chip(tmp_path / "mine.yaml"))
    scale = (0.367 / 200) / (0.0431 / 50)  # energy at 1.1 V over that at 0.78 V
    assert (rate.ours, rate.deviation) == (2, 0)
    assert dense.ours == pytest.approx(E16 / (0.1 * E8 + 0.9 * SKIP) / scale, rel=1e-6)
    numbers, sources = checks_tables(chip(tmp_path / "mine.yaml"))
    lines = plain(numbers).splitlines()
    assert any("throughput, FP8, zeros 0 % x 0 %, over mine, FP16, zeros 0 % x 0 %" in line for line in lines)
    assert any("over dense-fp16, FP16, zeros 90 % x 0 %, 1.1 V, 200 MHz" in line for line in lines)
    assert "4x" in plain(numbers) and "assumed" in plain(sources)


def test_what_no_source_tells_is_not_computed(tmp_path: Path) -> None:
    check = "{of: power, format: fp8, zeros: null, value: 1, tag: assumed, source: x}"
    (tmp_path / "mine.yaml").write_text(f"like: lnpu\ndescription: x\nchecks: {{peak: {check}}}\n")
    (found,) = run_checks(chip(tmp_path / "mine.yaml"))
    assert (found.ours, found.deviation, found.basis) == (None, None, "condition not stated")
    assert "power, FP8, zeros not stated, 0.78 V, 50 MHz" in plain(*checks_tables(chip(tmp_path / "mine.yaml")))


def test_a_chip_that_is_like_another_has_none_of_its_figures() -> None:
    assert chip("lnpu").checks and not chip("lnpu-fp16").checks
    assert checks_tables(chip("lnpu-fp16")) == []


CHECK = {"of": "power", "format": "fp8", "zeros": "[0, 0]", "value": "1.0", "tag": "published", "source": "x"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fitted": "[energy.fp8]"}, r"checks\.mine: fitted: no value has the key 'energy\.fp8'"),
        ({"format": "fp16"}, r"checks\.mine: the chip does not compute in fp16"),
        ({"over": "{format: fp16, zeros: [0, 0]}"}, r"checks\.mine: the chip does not compute in fp16"),
        ({"voltage_v": "1.2"}, r"checks\.mine: voltage_v 1\.2 is outside 0\.78 \.\.\. 1\.1 V"),
        ({"zeros": "[0.5, 1.0]"}, r"checks\.mine\.zeros\.1"),
        ({"zeros": "[0.5]"}, r"checks\.mine\.zeros"),
        ({"of": "speed"}, r"checks\.mine\.of.*'speed'"),
        ({"sparsity": "[0, 0]"}, r"unknown key 'checks\.mine\.sparsity'"),
        ({"value": "0.0"}, r"checks\.mine\.value"),
    ],
)
def test_checks_that_cannot_be_are_refused(change: dict[str, str], said: str, tmp_path: Path) -> None:
    line = ", ".join(f"{key}: {value}" for key, value in {**CHECK, **change}.items())
    eight = "macs_per_cycle: {fp16: null}\nfp8_pairs: {value: always, tag: assumed, source: x}\n"
    (tmp_path / "mine.yaml").write_text(f"like: lnpu\ndescription: x\n{eight}checks: {{mine: {{{line}}}}}\n")
    with pytest.raises(ConfigError, match=said):
        chip(tmp_path / "mine.yaml")


def test_a_ratio_to_a_chip_that_is_none(tmp_path: Path) -> None:
    line = ", ".join(f"{key}: {value}" for key, value in CHECK.items())
    over = "over: {chip: tpu, format: fp16, zeros: [0, 0]}"
    (tmp_path / "mine.yaml").write_text(f"like: lnpu\ndescription: x\nchecks: {{mine: {{{line}, {over}}}}}\n")
    with pytest.raises(ConfigError, match="unknown chip 'tpu'"):
        run_checks(chip(tmp_path / "mine.yaml"))
