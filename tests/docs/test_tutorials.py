"""The tutorials run, and their pages show what they print and draw; the cheat sheet's lines run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from helpers.paths import ROOT

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

MADE = runpy.run_path(str(ROOT / "docs" / "generate" / "tutorials.py"))
SCRIPTS = sorted(MADE["FOLDER"].glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs_and_shows_a_picture_and_leads_on(path: Path) -> None:
    page = MADE["page"](path)
    assert page.startswith(f"# {path.stem[0]}. ") and f"]({path.name})" in page
    assert '<img alt="' in page and "```text\n" in page
    following = SCRIPTS[SCRIPTS.index(path) + 1 :]
    assert re.search(r"\nNext: .*" + (following[0].stem if following else "recipes"), page)
    for target in re.findall(r"\]\((?!data:)([^)#]+)", page):
        there = path.parent / target
        assert there.exists() or there.with_suffix(".py").exists(), target


def test_all_are_in_the_path() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    places = [nav.index(f"tutorials/{path.stem}.md") for path in SCRIPTS]
    assert len(places) == 4 and places == sorted(places)


def test_a_page_has_text_tables_and_pictures_in_order(tmp_path: Path) -> None:
    (tmp_path / "1_short.py").write_text(
        "# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nfrom pathlib import Path\n\n"
        "class Shown:\n    def _repr_html_(self):\n        return '<table></table>'\n\n"
        "print('one')\nprint('two', 3)\nprint(Shown())\nprint('after')\nPath('drawn.svg').write_text('<svg/>')\n"
        "# %% [markdown]\n# Next: nothing\n"
    )
    page = MADE["page"](tmp_path / "1_short.py")
    shown = page.partition("```\n\n")[2].partition("\n\nNext: nothing\n")
    assert page.startswith("# Title\n\nWords.\n\n") and shown[1]
    picture = '<img alt="drawn" src="data:image/svg+xml;base64,PHN2Zy8+">'
    assert shown[0] == f"```text\none\ntwo 3\n```\n\n<table></table>\n\n```text\nafter\n```\n\n{picture}"
    assert not (tmp_path / "drawn.svg").exists()


def test_the_cheat_sheet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cheat_sheet.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    exec("\n".join(blocks), {})
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "rows.csv", "rows.json", "m.pt"}
