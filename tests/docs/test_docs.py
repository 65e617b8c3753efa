"""The site: it builds without a warning, and what is made for it from the library is all there."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lnpu_torch as lnpu
from helpers.paths import ROOT
from lnpu_torch.hardware.chip import chips

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


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # strict: a warning is an error
    assert "operating_point" in (tmp_path / "constants.html").read_text()
    assert 'id="lnpu_torch.nn.convert.convert"' in (tmp_path / "api.html").read_text()
