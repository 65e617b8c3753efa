"""The site: it builds without a warning, and what is made for it from the library is all there."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lnpu_torch as lnpu
from helpers.paths import ROOT
from lnpu_torch.cli.app import MODULES
from lnpu_torch.cost.chip_checks import run_checks
from lnpu_torch.hardware.chip import chips
from lnpu_torch.recipes.settings import TrainConfig

DOCS = ROOT / "docs"


def test_all_that_is_public_is_on_the_page_of_the_api() -> None:
    page = (DOCS / "api.md").read_text().split("\n")
    things = {name: getattr(lnpu, name) for name in lnpu.__all__ if not isinstance(getattr(lnpu, name), ModuleType)}
    assert [name for name, thing in things.items() if f"::: {thing.__module__}.{name}" not in page] == []


def test_drawings_are_those_that_the_pages_show() -> None:
    figures = runpy.run_path(str(DOCS / "generate" / "drawings.py"))["figures"]()
    page = (DOCS / "fgmp.md").read_text()
    assert all(f"images/{name}.svg" in page and (DOCS / "images" / f"{name}.svg").is_file() for name in figures)


def test_the_drawn_layer_closes() -> None:
    pytest.importorskip("matplotlib")
    drawn = runpy.run_path(str(DOCS / "generate" / "drawings.py"))["skipping"]()
    told = [axis.texts[0].get_text() for axis in drawn.axes]
    assert ["75 of 120" in told[0], "66 of 120" in told[1], "75 of 120" in told[2]] == [True] * 3


def test_every_constant_is_in_the_tables() -> None:
    pytest.importorskip("mkdocs")
    constants = runpy.run_path(str(DOCS / "generate" / "hooks.py"))["constants"]
    for chip in chips():
        table = constants(chip, None).replace("\\*", "*")
        for key, entry in chip.values().items():
            assert f"`{key.partition('.')[2] or key}`" in table and entry.source in table, (chip.name, key)


def test_the_page_of_published_chips_is_what_the_files_say() -> None:
    made = runpy.run_path(str(DOCS / "generate" / "chips.py"))
    page = (DOCS / "chips.md").read_text()
    assert page == made["filled"](page), "make drawings"
    for chip in made["published"]():
        assert all(
            f"| {chip.name} ({chip.node_nm.value:g} nm, {chip.year.value}) | {name} |" in page for name in chip.checks
        )
    (ours,) = (each.ours for each in run_checks(lnpu.chip("lnpu")) if each.name == "over-v100")
    assert f"is {ours:.2f}x where two abstracts have 4.9x and 4.4x" in page


def test_the_picture_of_published_chips_has_them_all() -> None:
    pytest.importorskip("matplotlib")
    made = runpy.run_path(str(DOCS / "generate" / "chips.py"))
    (axes,) = made["efficiency_by_zeros"]().axes
    names = {text.get_text() for text in axes.texts}
    assert {chip.name for chip in chips() if chip.checks} <= names and "lnpu peak-fp16" in names
    (lnpu_line,) = (line for line in axes.lines if line.get_linewidth() > 2)
    assert lnpu_line.get_ydata()[[0, -1]] == pytest.approx([2 / 0.575, 2 / (0.1 * 0.575 + 0.9 * 0.024)])
    assert "images/chips.svg" in (DOCS / "chips.md").read_text() and (DOCS / "images" / "chips.svg").is_file()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # strict: a warning is an error
    assert "operating_point" in (tmp_path / "constants.html").read_text()
    assert 'id="lnpu_torch.nn.convert.convert"' in (tmp_path / "api.html").read_text()
    assert 'src="data:image/svg+xml;base64,' in (tmp_path / "tutorials" / "3_chips.html").read_text()
    first = (tmp_path / "index.html").read_text()
    assert "tutorials/3_chips.html" in first and f"lnpu_torch {lnpu.__version__}" in first.rpartition("<footer")[2]
    assert '<abbr title="multiply-accumulate: one multiplication' in (tmp_path / "cost.html").read_text()


def test_abbreviations_are_the_glossarys() -> None:
    pytest.importorskip("mkdocs")
    made = runpy.run_path(str(DOCS / "generate" / "hooks.py"))["abbreviations"]()
    found = dict(re.findall(r"^\*\[(.*?)\]: (.*)$", made, re.MULTILINE))
    assert {"FP8", "FGMP", "MAC", "FF", "EP", "WG", "TFLOPS/W"} <= found.keys()
    assert found["FF"] == "input x weight" and "lane" not in found and "T" not in found
    assert all(" " in meaning and "](" not in meaning for meaning in found.values())


def test_the_reference_has_every_command_and_every_setting() -> None:
    reference = runpy.run_path(str(DOCS / "generate" / "reference.py"))
    commands, settings = reference["commands"](), reference["settings"]()
    assert all(f"### lnpu {name}\n" in commands for name in ("train", "price", "doctor", "chips", "reproduce"))
    assert "--resume" in commands and commands.count("```text") == len(MODULES)
    keys = re.findall(r"^\| `([\w.]+)` \|", settings, re.MULTILINE)
    assert {"epochs", "data.crop", "model.width", "count.every", "checkpoint.keep"} <= set(keys)
    assert {key for key in keys if "." not in key} | {"model", "data", "count", "checkpoint"} == set(
        TrainConfig.model_fields
    )
    assert "| `data.crop` | integer from 0 | `0` | random shift" in settings
