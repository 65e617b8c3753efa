"""The tutorials: scripts in cells (`# %%`, as Jupyter and editors read them), run and written down as Markdown."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "tutorials"


def cells(path: Path) -> Iterator[tuple[bool, str]]:
    """The cells of a script: whether a cell is text, and what stands in it."""
    _, *parts = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for part in parts:
        kind, _, body = part.partition("\n")
        is_text = kind.strip() == "[markdown]"
        yield is_text, (re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_text else body).strip("\n")


def page(path: Path) -> str:
    """A tutorial as Markdown: its text, its code, and what the code prints and draws when it is run.

    What notebooks show as a table is one here, too. The files that it writes go into a folder that is removed.
    """
    blocks, names = list[str](), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for is_text, body in cells(path):
            if is_text:
                blocks.append(body)
            else:
                blocks += [f"```python\n{body}\n```", *_run(compile(body, str(path), "exec"), names)]
    download = f"[This page as a script]({path.name}), to run or to open in Jupyter by jupytext."
    return "\n\n".join([blocks[0], download, *blocks[1:]]) + "\n"


def _run(code: Any, names: dict[str, Any]) -> list[str]:
    """Run a cell; returns what it prints, in order, and then the pictures that it saves, which it removes."""
    shown: list[str] = []

    def show(*things: Any, **options: Any) -> None:
        if len(things) == 1 and hasattr(things[0], "_repr_html_"):
            shown.append(things[0]._repr_html_())
            return
        text = io.StringIO()
        print(*things, file=text, **options)
        before = shown.pop().removesuffix("```") if shown and shown[-1].startswith("```") else "```text\n"
        shown.append(f"{before}{text.getvalue()}```")

    names["print"] = show
    exec(code, names)
    for picture in sorted(Path().glob("*.svg")):
        drawn = base64.b64encode(picture.read_bytes()).decode()
        shown.append(f'<img alt="{picture.stem}" src="data:image/svg+xml;base64,{drawn}">')
        picture.unlink()
    return shown
