"""The commands that train: train, recipes. They read arguments; the work is done in the recipes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from lnpu_torch.cli.errors import Console, fail, show
from lnpu_torch.files import ConfigError, builtin_names, find, inside, parse_yaml, read_text, validate
from lnpu_torch.text_tables import Blocks

if TYPE_CHECKING:
    from lnpu_torch.recipes.settings import TrainConfig


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            parser=expanduser,
            autocompletion=lambda: builtin_names("recipes"),
            help="A recipe (see lnpu recipes) or a YAML file.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, such as lr=0.05 data.crop=2.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", parser=expanduser, help="Go on with the run in this folder; with CONFIG, or begin it there."
        ),
    ] = None,
    accept_changes: Annotated[bool, typer.Option(help="Go on although settings have changed.")] = False,
) -> None:
    """Train by a recipe; print accuracy and energy per epoch, and keep both in a run folder."""
    from lnpu_torch.recipes import train as recipe
    from lnpu_torch.recipes.interrupts import Stopped

    if config and "=" in config:
        settings = [config, *(settings or [])]
        config = None
    resolved = read_recipe(config, settings or [], resume)
    try:
        recipe.train(resolved, Console(), resume, accept_changes)
    except Stopped as stopped:
        fail(str(stopped), stopped.exit_code)


def read_recipe(config: str | None, settings: Iterable[str], resume: str | None = None) -> TrainConfig:
    """The settings of a recipe, or of the run to resume, with changes laid on them. Raises ConfigError."""
    from lnpu_torch.recipes.settings import TrainConfig

    if config is None and resume is None:
        raise ConfigError("a recipe is needed (lnpu recipes lists them), or --resume RUN")
    path = find("recipes", config, "recipe") if config else inside(Path(str(resume)), "config.yaml")
    data = parse_yaml(read_text(path, "recipe" if config else "run to resume"), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a recipe: a mapping of keys is expected")
    settings = list(settings)
    found = validate(TrainConfig, with_settings(data, settings, TrainConfig), str(path), keys(settings))
    return found if config else found.holding_files(again=True)


def recipes(as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """List the built-in recipes."""
    from lnpu_torch.recipes.console_output import built_in, recipes_table

    if as_json:
        print(json.dumps({name: settings.model_dump(mode="json") for name, settings, _ in built_in()}, indent=1))
    else:
        show(Blocks(recipes_table()))


def keys(settings: Iterable[str]) -> list[str]:
    """The dotted keys of KEY=VALUE settings."""
    return [setting.partition("=")[0] for setting in settings]


def with_settings(data: Mapping[str, Any], settings: Iterable[str], model: type[BaseModel]) -> dict[str, Any]:
    """`data` with each KEY=VALUE laid on it: a dotted key, and a value in YAML (so null, true, 2e-3, [a, b]).

    Where `model` has text, the value is the text as it is given, whatever YAML would make of it; but for null.

    Raises:
        ConfigError: no "=", an empty key, a value that is not YAML, or a key inside what is no mapping.
    """
    changed = dict(data)
    for setting in settings:
        key, equals, value = setting.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{setting!r}: settings are written KEY=VALUE, such as lr=0.05 or data.crop=2")
        changed = _with(changed, parts, _value(value, _kinds(model, parts), key), key)
    return changed


def _value(text: str, kinds: Sequence[Any], key: str) -> Any:
    """The value that a setting's text stands for, where it may be of these types."""
    if str in kinds and not (type(None) in kinds and text in ("", "null")):
        return text
    several = [kind for kind in kinds if any(str in _members(inner) for inner in _items(kind))]
    if any(get_origin(kind) is tuple for kind in several) and not text.lstrip().startswith("["):
        return text  # one for several
    return parse_yaml(text, key, as_text=bool(several))


def _items(kind: Any) -> tuple[Any, ...]:
    """The types of a container's items; of a mapping's values alone."""
    return get_args(kind)[1:] if get_origin(kind) is dict else get_args(kind)


def _kinds(kind: Any, parts: Sequence[str]) -> list[Any]:
    """The types of what is under a dotted key of a type; none, if it has no such key."""
    if not parts:
        return _members(kind)
    found = []
    for member in _members(kind):
        if get_origin(member) is dict:
            found += _kinds(get_args(member)[1], parts[1:])
        elif isinstance(member, type) and issubclass(member, BaseModel) and parts[0] in member.model_fields:
            found += _kinds(member.model_fields[parts[0]].annotation, parts[1:])
    return found


def _members(kind: Any) -> list[Any]:
    """The types that a type is a union of; of one that is annotated, what it annotates; of names, that of text."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return list(map(type, get_args(kind)))
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return [each for member in get_args(kind) for each in _members(member)]
    return [kind]


def _with(data: Any, parts: list[str], value: Any, key: str) -> dict[str, Any]:
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{key}: {parts[0]!r} is inside {data!r}, which has no keys")
    data = data or {}
    return {**data, parts[0]: _with(data.get(parts[0]), parts[1:], value, key) if parts[1:] else value}
