"""Every command line on a page is one that the program takes; the quick start's code runs."""

from __future__ import annotations

import re
import shlex

import pytest
import typer

from helpers.paths import ROOT
from lnpu_torch.cli.app import app

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = [(page.name, line) for page in PAGES for line in re.findall(r"^ {4}lnpu (.*)$", page.read_text(), re.MULTILINE)]
LINES += [
    ("cheat_sheet.md", line) for line in re.findall(r"`lnpu (.*?)`", (ROOT / "docs" / "cheat_sheet.md").read_text())
]


@pytest.mark.parametrize("page", sorted({page for page, _ in LINES}))
def test_the_program_takes_it(page: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in (line for name, line in LINES if name == page):
        command, *words = shlex.split(line, comments=True)
        assert commands[command].make_context(command, words).command.name == command


def test_there_are_many() -> None:
    assert len(LINES) > 40 and {page for page, _ in LINES} >= {"index.md", "cheat_sheet.md", "recipes.md", "README.md"}


def test_the_quick_start_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    exec(code, {})
    assert "Energy and time" in capsys.readouterr().out
