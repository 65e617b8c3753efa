"""What the site is made of besides the pages: tables from YAML files, examples, tutorials. MkDocs calls it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import lnpu_torch as lnpu
from lnpu_torch.hardware.chip import Chip, chip, chips
from lnpu_torch.hardware.sourced_value import SourcedValue, value_text
from lnpu_torch.text_tables import markdown_table

ROOT = Path(__file__).parent.parent.parent
CONSTANTS = re.compile(r"<!-- constants of ([\w-]+)(?: beside ([\w-]+))? -->")
TAGS = re.compile(r"<!-- how many constants are of which tag -->")


def on_config(config: Any) -> Any:
    """The foot of every page says of which version it is."""
    config.copyright = f"lnpu_torch {lnpu.__version__}"
    return config


def on_files(files: Files, config: Any) -> Files:
    """The examples are a part of the site, so that pages can link to them; and so are the tutorials, which are run."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{path.name}", content=path.read_text()))
    made = runpy.run_path(str(Path(__file__).with_name("tutorials.py")))
    for path in sorted(made["FOLDER"].glob("*.py")):
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=made["page"](path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in the tables, and lead links to examples and tutorials to where they are on the site."""
    markdown = CONSTANTS.sub(lambda match: constants(chip(match[1]), match[2] and chip(match[2])), markdown)
    markdown = TAGS.sub(lambda _: tags(), markdown)
    if page.file.src_uri == "reference.md":  # the other pages need neither commands nor recipes
        made = runpy.run_path(str(Path(__file__).with_name("reference.py")))
        markdown = markdown.replace("<!-- settings of a run -->", made["settings"]())
        markdown = markdown.replace("<!-- commands -->", made["commands"]())
    markdown = markdown.replace("](../examples/", "](examples/")
    markdown = re.sub(r"\]\((tutorials/\w+)\.py\)", r"](\1.md)", markdown)
    return markdown if page.file.src_uri == "glossary.md" else f"{markdown}\n\n{abbreviations()}"


def abbreviations() -> str:
    """The glossary's abbreviations, for what pages show above such a word."""
    rows = re.findall(r"^\| \*\*(.*?)\*\* \| (.*?) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = [(word, meaning) for words, meaning in rows for word in words.split(", ")]
    short = [each for each in words if re.fullmatch(r"[A-Z][A-Z0-9/ ]+|streamed operand", each[0])]
    return "\n".join(f"*[{word}]: {meaning.partition(' ([')[0]}" for word, meaning in short)


def constants(shown: Chip, beside: Chip | None) -> str:
    """Every constant of a chip that another has not, or has otherwise; by its place in the file."""
    known = beside.values() if beside else {}
    differ = {key: entry for key, entry in shown.values().items() if known.get(key) != entry}
    places: dict[str, dict[str, SourcedValue[Any]]] = {}
    for key, entry in differ.items():
        places.setdefault(key.split(".")[0], {})[key] = entry
    return "\n\n".join(_table(place, entries) for place, entries in places.items())


def tags() -> str:
    """A line per built-in chip: what it is, and how many of the constants that it uses are of which tag."""
    rows = [[each.name, each.description, *map(str, each.tags().values())] for each in chips()]
    return markdown_table(["chip", "what it is", "published", "derived", "assumed"], rows)


def _table(place: str, entries: dict[str, SourcedValue[Any]]) -> str:
    inner = [key.partition(".")[2] or key for key in entries]
    values = [value_text(entry).replace("\n", "<br>") for entry in entries.values()]
    tags = [f'<span class="tag {entry.tag}">{entry.tag}</span>' for entry in entries.values()]
    sources = [entry.source.replace("*", r"\*") for entry in entries.values()]
    rows = [[f"`{key}`", *rest] for key, *rest in zip(inner, values, tags, sources, strict=True)]
    return f"**`{place}`**\n\n" + markdown_table(["key", "value", "tag", "source"], rows)
