from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from helpers.handmade import variant
from lnpu_torch.cost.energy_table import EnergyTable
from lnpu_torch.files import CONFIGS, ConfigError, builtin_names, parse_yaml, validate
from lnpu_torch.hardware.chip import ChipFile, chip, chips
from lnpu_torch.reporting.chip_tables import chips_table
from lnpu_torch.text_tables import plain
from lnpu_torch.units import pj


@pytest.mark.parametrize("name", builtin_names("chips"))
def test_every_chip_loads_and_says_what_each_value_rests_on(name: str) -> None:
    loaded = chip(name)
    assert loaded.name == name
    models = ("calibrated", "bottom_up") if loaded.bottom_up else ("calibrated",)
    each_model = [loaded.with_values({"energy_model": model}) for model in models]
    assert all(20 < sum(each.tags().values()) < len(loaded.values()) for each in each_model)  # each uses its own part
    assert all(len(entry.source) > 10 for entry in loaded.values().values())


def test_the_built_in_chips() -> None:
    names = {each.name for each in chips()}
    published = {"redmule", "pnpu", "tsunami", "t-pim", "ibm-hfp8", "ibm-14nm", "ibm-14nm-2020", "trainer", "ganpu"}
    published |= {"omnidrl", "kim-2020", "sp-pim", "snu-fp8", "sigma", "v100", "a100", "h100", "lnpu"}
    assert names == published | {"lnpu-fp16", "dense-fp16", "sparse-inference"}
    ours = [chip(name) for name in ("dense-fp16", "lnpu", "lnpu-fp16", "sparse-inference")]
    policies = {
        each.name: (each.skip.forward.value, each.skip.grad_input.value, each.skip.grad_weight.value) for each in ours
    }
    assert policies == {
        "dense-fp16": ("none", "none", "none"),
        "lnpu": ("input", "grad_output", "input"),
        "lnpu-fp16": ("input", "grad_output", "input"),
        "sparse-inference": ("input", "none", "none"),
    }
    assert {each.name for each in ours if each.macs_per_cycle.fp8} == {"lnpu"}


@pytest.mark.parametrize("name", [each.name for each in chips() if each.checks])
def test_a_published_chip_says_when_and_in_what_process(name: str) -> None:
    """And it has its own energies of MACs, rates and formats, and whether elements of both may stand in one tensor."""
    loaded = chip(name)
    assert loaded.node_nm and loaded.year and 2017 <= loaded.year.value <= 2023
    assert name == "lnpu" or not {"energy.skipped_mac_pj", "mixed_tensors", "skip.forward"} & set(loaded.inherited)
    for check in loaded.checks.values():
        assert len(check.source) > 10
    assert not any(entry.tag == "published" and "recalled" in entry.source for entry in loaded.values().values())
    assert not any(check.tag == "published" and "recalled" in check.source for check in loaded.checks.values())


def test_energy_line_and_rates() -> None:
    lnpu = chip("lnpu")
    energies = EnergyTable.of(lnpu)
    assert pj(energies.fp8_mac) == pytest.approx(2 / 3.48, rel=1e-3)  # 2 FLOP, 3.48 TFLOPS/W
    assert pj(energies.fp8_mac + 9 * energies.skipped_mac) / 10 == pytest.approx(2 / 25.3, rel=2e-3)  # 90 % zeros
    assert energies.fp16_mac == 2 * energies.fp8_mac
    assert energies.fp16_range == (-2 * energies.fp8_mac // 5, 2 * energies.fp8_mac)  # from 1.6 to four times
    assert lnpu.cycles(1536, 0) == lnpu.cycles(0, 768) == 1
    assert chip("lnpu-fp16").cycles(0, 1536) == 2


@pytest.mark.parametrize(
    ("when", "fp8"),
    [
        ("streamed", {"zero*zero", "zero*fp8", "zero*fp16", "fp8*zero", "fp8*fp8", "fp8*fp16"}),
        ("both", {"zero*zero", "zero*fp8", "fp8*zero", "fp8*fp8"}),
    ],
)
def test_which_pairs_run_as_fp8(when: str, fp8: set[str]) -> None:
    tried = [(a, b) for a in ("zero", "fp8", "fp16", "fp32") for b in ("zero", "fp8", "fp16")]
    assert {f"{a}*{b}" for a, b in tried if variant(fp8_pairs=when).runs_fp8(a, b)} == fp8
    assert not any(chip("lnpu-fp16").runs_fp8(a, b) for a, b in tried)


def test_a_chip_is_frozen_and_stands_for_itself() -> None:
    lnpu = chip("lnpu")
    assert chip(lnpu) is lnpu
    with pytest.raises(ValidationError):
        lnpu.energy.fp8_mac_pj.value = 0.1


def _edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    data = parse_yaml((CONFIGS / "chips" / "lnpu.yaml").read_text(), "lnpu.yaml")
    edit(data)
    path.write_text(yaml.safe_dump(data))
    return path


def _at(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    """An edit that sets a dotted key; `...` deletes it."""

    def edit(data: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for part in path:
            data = data[part]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return edit


BAD = [
    ("energy.fp8_mac_pj", ..., ["energy.fp8_mac_pj", "missing: "]),
    ("energy.fp8_mac_pj", 0.575, ["energy.fp8_mac_pj"]),
    ("energy.fp8_mac_pj.value", -0.575, ["energy.fp8_mac_pj.value", "-0.575"]),
    ("energy.fp8_mac_pj.value", float("nan"), ["energy.fp8_mac_pj.value"]),
    ("energy.skipped_mac_pj.value", -1, ["energy.skipped_mac_pj.value"]),
    ("energy.fp8_mac_pj.unit", "nJ", ["energy.fp8_mac_pj.unit", "known: value, tag, source"]),
    ("energy.fp8_mac_pj.range", [0.5, 0.6], ["energy.fp8_mac_pj.range", "unknown key"]),
    ("energy.fp16_to_fp8.range", [3.0, 4.0], ["energy.fp16_to_fp8", "outside its range"]),
    ("energy.fp16_to_fp8.value", 0.0, ["energy.fp16_to_fp8.value"]),
    ("operating_point.low.clock_hz.value", "50 MHz", ["operating_point.low.clock_hz.value", "'50 MHz'"]),
    ("operating_point.low.clock_hz.value", 0.0, ["operating_point.low.clock_hz.value"]),
    ("operating_point.voltage_v.value", True, ["operating_point.voltage_v.value"]),
    ("operating_point.low.clock_mhz", 50, ["clock_mhz", "nearest: clock_hz"]),
    ("operating_point.high", ..., ["operating_point.high", "missing: "]),
    ("operating_point.high.voltage_v.value", 0.7, ["operating_point", "0.78 is not below high.voltage_v 0.7"]),
    ("operating_point.voltage_v.value", 1.2, ["operating_point", "1.2 is outside the chip's range, 0.78 ... 1.1 V"]),
    ("energy.dram_pj_per_bit", ..., ["energy.dram_pj_per_bit", "missing: "]),
    ("energy.dram_pj_per_bit.value", 7.0, ["energy.dram_pj_per_bit", "outside its range"]),
    ("energy.sram_read_pj_per_bit.value", -0.1, ["energy.sram_read_pj_per_bit.value", "-0.1"]),
    ("energy.sram_read_fj_per_bit", 319, ["sram_read_fj_per_bit", "nearest: sram_read_pj_per_bit"]),
    ("sram_bytes.value", 0, ["sram_bytes.value"]),
    ("sram_kb", 372, ["unknown key 'sram_kb'", "nearest: sram_bytes"]),
    ("storage.zero_bits.value", -1, ["storage.zero_bits.value"]),
    ("energy.sram_size.exponent", {"value": 3.0, "tag": "assumed", "source": "x"}, ["energy.sram_size", "above 2"]),
    ("energy.sram_size.exponent.value", -1.0, ["energy.sram_size.exponent.value", "greater than 0"]),
    ("storage", ..., ["storage", "missing: "]),
    ("energy_model", "guess", ["energy_model", "'guess'"]),
    ("bottom_up.macs_per_read.source", ..., ["bottom_up.macs_per_read.source", "missing: "]),
    ("bottom_up.sram.bank_bytes.value", 1024, ["bottom_up.sram", "bank_bytes 1024 is outside the table"]),
    ("bottom_up.sram.macros.value", [], ["bottom_up.sram", "in the order of their bytes"]),
    ("operating_point", 50, ["operating_point"]),
    ("macs_per_cycle.fp16.value", 768.5, ["macs_per_cycle.fp16.value"]),
    ("macs_per_cycle.fp8.value", 0, ["macs_per_cycle.fp8.value"]),
    ("macs_per_cycle.fp8.rate", 1, ["macs_per_cycle.fp8.rate", "known: value, tag, source"]),
    ("macs_per_cycle.fp8", None, ["macs_per_cycle.fp8", "fp8_pairs"]),
    ("fp8_pairs.value", "never", ["macs_per_cycle.fp8", "fp8_pairs"]),
    ("fp8_pairs.value", "always", ["macs_per_cycle.fp16", "fp8_pairs"]),
    ("fp8_pairs.value", "sometimes", ["fp8_pairs.value", "'sometimes'"]),
    ("macs_per_cycle.fp16", None, ["macs_per_cycle.fp16", "fp8_pairs"]),
    ("node_nm", 65, ["node_nm"]),
    ("year.value", 2019.5, ["year.value"]),
    ("skip.forward.value", "grad_output", ["skip.forward.value", "'grad_output'"]),
    ("skip.grad_input.value", "input", ["skip.grad_input.value"]),
    ("skip.grad_weight.value", "weight", ["skip.grad_weight.value"]),
    ("skip.grad_weight", ..., ["skip.grad_weight", "missing: "]),
    ("padding.value", "sometimes", ["padding.value"]),
    ("padding.source", ..., ["padding.source", "missing: "]),
    ("padding.source", "", ["padding.source"]),
    ("padding.tag", ..., ["padding.tag", "missing: "]),
    ("padding.tag", "guessed", ["padding.tag", "'guessed'"]),
    ("description", ..., ["description", "missing: "]),
    ("lanes.count.value", 18, ["lanes", "18 is not a multiple of balance_group 4"]),
    ("lanes.count.value", 2048, ["lanes.count.value", "1024"]),
    ("lanes.sync_interval.value", 32, ["lanes.sync_interval.value", "16, 64 or 256"]),
    ("lanes.balance_group.value", 8, ["lanes.balance_group.value", "1, 4 or 16"]),
    ("lanes", ..., ["lanes", "missing: "]),
    ("sram", 1, ["unknown key 'sram'"]),
]


@pytest.mark.parametrize(("key", "value", "said"), BAD)
def test_bad_values_are_named(key: str, value: object, said: list[str], tmp_path: Path) -> None:
    path = _edited(tmp_path / "bad.yaml", _at(key, value))
    with pytest.raises(ConfigError) as error:
        chip(path)
    assert all(words in str(error.value) for words in ["bad.yaml", *said])


def test_unknown_chip_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown chip 'tpu'.*dense-fp16, ganpu, h100"):
        chip("tpu")


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"list\.yaml: not a chip"):
        chip(tmp_path / "list.yaml")


MINE = """
like: lnpu
description: mine
energy:
  fp8_mac_pj: {value: 0.5, tag: assumed, source: a hunch}
"""


def test_like_takes_all_but_what_is_given(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "yours.yaml").write_text("like: mine.yaml\nname: your chip\ndescription: yours\n")
    mine, yours, lnpu = chip(tmp_path / "mine.yaml"), chip(tmp_path / "yours.yaml"), chip("lnpu")
    assert mine.name == "mine"
    assert mine.energy.fp8_mac_pj.value == 0.5
    assert mine.energy.skipped_mac_pj == lnpu.energy.skipped_mac_pj
    assert (yours.name, yours.description, yours.energy) == ("your chip", "yours", mine.energy)
    assert (yours.node_nm, yours.year) == (lnpu.node_nm, None)
    (tmp_path / "bare.yaml").write_text("like: lnpu\ndescription: no tables\nbottom_up: null\n")
    bare = chip(tmp_path / "bare.yaml")
    (tmp_path / "short.yaml").write_text("like: mine.yaml\n")
    assert chip(tmp_path / "short.yaml").description == "mine, with other values"
    assert not any(key.startswith("bottom_up") for key in (*bare.values(), *bare.inherited))


def test_keys_of_older_files_are_read(tmp_path: Path) -> None:
    value = "{value: 0.03, tag: assumed, source: a hunch}"
    older = f"energy:\n  skipped_slot_pj: {value}\nlanes:\n  run: {{value: 256, tag: assumed, source: a hunch}}\n"
    (tmp_path / "mine.yaml").write_text(f"like: lnpu\ndescription: mine\n{older}")
    mine = chip(tmp_path / "mine.yaml")
    assert (mine.energy.skipped_mac_pj.value, mine.lanes.sync_interval.value) == (0.03, 256)
    content = mine.model_dump(mode="json")
    content["energy"]["skipped_slot_pj"] = content["energy"].pop("skipped_mac_pj")
    assert validate(ChipFile, {"file": "mine.yaml", "content": content}, "config.yaml").content == mine


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("like: lnpu\nsram_bytes: 100\n", r"sram_bytes: a value needs its tag and source, as in .*, got 100"),
        ("sram_bytes: {value: 1, tag: assumed, source: x}\n", r"missing: description, operating_point, .*`like: lnpu`"),
        ("like: nothing\ndescription: x\n", "unknown chip in .*: like: 'nothing'"),
        ("like: 3\ndescription: x\n", "like: a chip's name or path is expected, got 3"),
        ("like: self.yaml\ndescription: x\n", "comes back to itself"),
        ("like: lnpu\ndescription: x\npadding: {value: free}\n", "missing: padding.tag"),
        ("like: lnpu\ndescription: x\npadding: {source: elsewhere}\n", "missing: padding.value"),
    ],
)
def test_bad_like_files(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "self.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"(?s)self.yaml.*{said}|{said}"):
        chip(tmp_path / "self.yaml")


def test_tables_show_every_chip_and_every_value() -> None:
    listing = plain(chips_table(chips()))
    assert all(f"  {each.name} " in listing for each in chips()) and max(map(len, listing.splitlines())) <= 160
    lnpu_line = next(line for line in listing.splitlines() if line.startswith("  lnpu "))
    numbers = "65 2019 0.78 50 0.154 0.0768 3.48 1.74 3%"  # 2 * 1536 * 50 MHz; 2 / 0.575 pJ; 1 constant of 39
    assert lnpu_line.split("FP8; FP16")[1].split() == ["input,", "grad_output,", "input", *numbers.split()]
    dense_line = next(line for line in listing.splitlines() if line.startswith("  dense-fp16 "))
    assert dense_line.split()[-9:] == ["65", "-", "0.78", "50", "-", "0.0768", "-", "1.74", "11%"]
    assert "INT8 " in next(line for line in listing.splitlines() if line.startswith("  kim-2020 "))
    shown = str(chip("lnpu"))
    for key, entry in chip("lnpu").values().items():
        line = next(line for line in shown.splitlines() if line.startswith(f"  {key} "))
        assert entry.tag in line
        assert entry.source in line
    assert "50000000" in shown
    rows = {row["key"]: row for row in chip("dense-fp16").to_rows()}
    assert rows.keys() == chip("dense-fp16").values().keys()
    ratio = rows["energy.fp16_to_fp8"]
    assert ratio["value"] == 2.0 and ratio["range"] == [1.6, 4.0] and ratio["from"] == "lnpu"
    assert "2 (1.6 ... 4)" in shown
