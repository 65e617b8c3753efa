"""The reference: what each command prints as its help, and a table of all settings of a run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from typer.testing import CliRunner

from lnpu_torch.cli.app import MODULES, app
from lnpu_torch.files import Frozen
from lnpu_torch.recipes.settings import TrainConfig
from lnpu_torch.text_tables import markdown_table


def commands() -> str:
    """A section for each command: what `lnpu COMMAND --help` prints."""
    names = sorted(MODULES)
    wide = {"COLUMNS": "110", "TERMINAL_WIDTH": "110"}
    helps = {name: CliRunner().invoke(app, [name, "--help"], env=wide).stdout.strip("\n") for name in names}
    return "\n\n".join(f"### lnpu {name}\n\n```text\n{text}\n```" for name, text in helps.items())


def settings() -> str:
    """A table of all settings of a run: key, values, default, meaning."""
    return markdown_table(["key", "values", "default", "meaning"], list(_settings(TrainConfig, "")))


def _settings(model: type[BaseModel], place: str) -> Iterator[list[str]]:
    schema, meanings = model.model_json_schema(), _meanings(model)
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Frozen):
            yield from _settings(inner, f"{place}{name}.")
            continue
        default = "needed" if field.is_required() else f"`{_text(field.default)}`"
        values = _values(schema["properties"][name])
        yield [f"`{place}{name}`", values, default, meanings.get(name, "")]


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """What a class's docstring says of its fields: "`name`: what it is"."""
    paragraphs = [" ".join(each.split()) for each in inspect.cleandoc(model.__doc__ or "").split("\n\n")]
    return dict(pair for each in paragraphs for pair in re.findall(r"`(\w+)`: (.*?)(?= `\w+`: |$)", each))


def _values(schema: dict[str, Any]) -> str:
    """What a value may be, from its JSON schema."""
    if "anyOf" in schema:
        return ", ".join(dict.fromkeys(_values(each) for each in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return "what a file of it says"
    kind = {"array": "several", "object": "a mapping", "boolean": "`true`, `false`", "string": "text"}.get(
        schema.get("type", ""), schema.get("type", "anything")
    )
    ends = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[key]:g}" for key, word in ends.items() if abs(schema.get(key, 1e9)) < 1e9]
    return " ".join([kind, *limits])


def _text(value: Any) -> str:
    """A default as YAML and the command line write it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
