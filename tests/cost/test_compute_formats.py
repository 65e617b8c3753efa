"""Chips that compute in one format, or in another one than FP8 and FP16: what they cost by hand, and what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.handmade import counts, lanes, step, with_lanes
from lnpu_torch.cost.pricing import price
from lnpu_torch.files import ConfigError
from lnpu_torch.hardware.chip import Chip, chip

INT8 = """
like: lnpu
description: 8-bit integers alone, zeros of both operands skipped
macs_per_cycle: {fp8: {value: 10, tag: assumed, source: test}, fp16: null}
formats: {fp8: {value: INT8, tag: assumed, source: test}}
fp8_pairs: {value: always, tag: assumed, source: test}
energy:
  fp8_mac_pj: {value: 0.5, tag: assumed, source: test}
  skipped_mac_pj: {value: 0.01, tag: assumed, source: test}
  fp16_to_fp8: null
lanes: null
skip: {forward: {value: both, tag: assumed, source: test}}
"""
FP16 = """
like: lnpu
description: FP16 alone, nothing skipped
macs_per_cycle: {fp8: null, fp16: {value: 10, tag: assumed, source: test}}
fp8_pairs: {value: never, tag: assumed, source: test}
energy:
  fp8_mac_pj: null
  fp16_mac_pj: {value: 3.0, tag: assumed, source: test}
  fp16_to_fp8: null
skip: {forward: {value: none, tag: assumed, source: test}}
"""


def made(text: str, folder: Path) -> Chip:
    (folder / "mine.yaml").write_text(text)
    return chip(folder / "mine.yaml")


def test_a_chip_of_8_bits_prices_every_format_as_its_own_and_says_so(tmp_path: Path) -> None:
    report = price(counts(step(padding=0)), made(INT8, tmp_path))
    (row,) = report.rows
    assert (row.executed, row.skipped) == (28, 17)  # of 45 pairs 1 + 2 + 3 + 4 + 7 have a zero on either side
    assert row.mac_energy_pj == pytest.approx(28 * 0.5 + 17 * 0.01)
    assert row.cycles == pytest.approx(2.8)
    assert report.energy_range is None
    assert "this chip has no FP16: FP16 values are priced as FP8" in report.notes
    assert "formats of this chip: what is priced as FP8 is INT8 there" in report.notes
    assert not any("cannot: priced as if it could" in note for note in report.notes)


def test_a_ratio_to_fp16_moves_nothing_where_nothing_runs_in_it(tmp_path: Path) -> None:
    inherits = made(INT8.replace("  fp16_to_fp8: null\n", ""), tmp_path)
    assert inherits.energy.fp16_to_fp8 and price(counts(step()), inherits).energy_range is None


def test_a_chip_of_fp16_gives_its_energy_without_that_of_fp8(tmp_path: Path) -> None:
    report = price(counts(step(padding=0)), made(FP16, tmp_path))
    (row,) = report.rows
    assert row.mac_energy_pj == pytest.approx(45 * 3.0)
    assert row.cycles == 4.5
    assert not any(note.startswith("formats of this chip") for note in report.notes)


BOTH = """
like: lnpu
description: FP8 and FP16, each with its own energy
energy:
  fp16_mac_pj: {value: 0.9, tag: assumed, source: test}
  fp16_to_fp8: null
"""


def test_fp8_and_fp16_each_with_its_own_energy(tmp_path: Path) -> None:
    report = price(counts(step(padding=0)), made(BOTH, tmp_path))
    assert report.rows[0].mac_energy_pj == pytest.approx(15 * 0.575 + 24 * 0.9 + 6 * 0.024)
    assert report.energy_range is None


def test_lanes_that_nobody_knows_never_wait(tmp_path: Path) -> None:
    entry = with_lanes(step(padding=0), first=lanes(3, 5, lambda config: 5 * config.lanes))
    ours, theirs = price(counts(entry), made(INT8, tmp_path)), price(counts(entry), "lnpu")
    assert (ours.rows[0].cycles, ours.rows[0].utilisation) == (2.8, 1.0)
    assert theirs.rows[0].utilisation < 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("fp8_pairs: {value: always", "fp8_pairs: {value: both"), r"macs_per_cycle\.fp16 is null if, and only if"),
        (
            ("fp16: null}", "fp16: {value: 5, tag: assumed, source: test}}"),
            r"macs_per_cycle\.fp16 is null if, and only",
        ),
        (("fp8_mac_pj: {value: 0.5, tag: assumed, source: test}", "fp8_mac_pj: null"), "no fp8_mac_pj"),
        (("fp16_to_fp8: null", "fp16_mac_pj: {value: 1, tag: assumed, source: test}"), "one of them is null"),
        ((INT8.split("energy:\n")[1].split("lanes")[0], "  fp8_mac_pj: null\n"), "fp16_to_fp8 needs fp8_mac_pj"),
        (("value: INT8", "value: ''"), r"formats\.fp8\.value"),
        (("{fp8: {value: INT8", "{int8: {value: INT8"), r"formats\.int8.*known: fp8, fp16"),
    ],
)
def test_formats_that_do_not_fit_are_refused(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    assert INT8.count(change[0]) == 1
    with pytest.raises(ConfigError, match=said):
        made(INT8.replace(*change), tmp_path)


@pytest.mark.parametrize("name", ["h100", "ibm-hfp8", "redmule", "trainer", "ganpu"])
def test_data_of_both_formats_on_a_published_chip_that_has_one_a_tensor(name: str) -> None:
    mixed = "2 of 2 operands mix FP8 and FP16, which this chip cannot: priced as if it could"
    assert any(note.startswith(mixed) for note in price(counts(step(second=(1, 4, 3))), name).notes)
    alone = step(pairs=((0, 0, 0), (0, 9, 0), (0, 0, 0)), padding=0, first=(0, 3, 0), second=(0, 3, 0))
    assert not any("which this chip cannot" in note for note in price(counts(alone), name).notes)
