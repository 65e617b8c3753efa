"""Settings that name files, together with what the files say: so a run holds what it ran with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import field_validator

from lnpu_torch.chip import Chip
from lnpu_torch.chip import chip as read_chip
from lnpu_torch.files import Frozen, is_file, validate
from lnpu_torch.precision import PRESETS, Precision
from lnpu_torch.precision import precision as read_precision

NOT_SET = "(not set)"


class PrecisionFile(Frozen):
    """A precision's file, and what it said."""

    file: str
    content: Precision


class ChipFile(Frozen):
    """A chip's file, and what it said, with what it is `like` filled in."""

    file: str
    content: Chip

    @field_validator("content", mode="before")
    @classmethod
    def _of_plain_data(cls, value: Any) -> Any:
        return validate(Chip, value, "content") if isinstance(value, dict) else value


def hold_precision(value: str | PrecisionFile, again: bool = False) -> str | PrecisionFile:
    """A precision's name as it is; its file's name with what the file says.

    Args:
        value: a name, a path, or what this function gave for a path.
        again: read the file anew, if it is there.

    Raises:
        ConfigError: the file is no precision.
    """
    name = _file(value, again)
    if name is None or name in PRESETS:
        return value
    return PrecisionFile(file=os.path.abspath(name), content=read_precision(name))


def hold_chip(value: str | ChipFile, again: bool = False) -> str | ChipFile:
    """As `hold_precision`, for a chip."""
    name = _file(value, again)
    return value if name is None else ChipFile(file=os.path.abspath(name), content=read_chip(name))


def held(value: Any) -> Any:
    """What was held for a file's name; anything else as it is."""
    return value.content if isinstance(value, PrecisionFile | ChipFile) else value


def names(settings: Any) -> Any:
    """Settings as plain data, in which a file's name stands for what was held for it."""
    if _is_file(settings):
        return settings["file"]
    if isinstance(settings, Mapping):
        return {key: names(value) for key, value in settings.items()}
    return [names(value) for value in settings] if isinstance(settings, list) else settings


def differences(before: Any, now: Any, key: str = "") -> dict[str, str]:
    """Where two settings differ, by dotted key: "fp16 -> fp8", with the file that says so. Files count by content."""
    old, new = (value["content"] if _is_file(value) else value for value in (before, now))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and any(map(_has_keys, old + new)):
        old, new = (dict(enumerate(value, start=1)) for value in (old, new))
    if not (_has_keys(old) and _has_keys(new)):
        return {} if old == new else {key: f"{names(before)} -> {names(now)}"}
    found: dict[str, str] = {}
    for name in dict.fromkeys([*old, *new]):
        inner = f"{key}.{name}" if key else str(name)
        found |= differences(old.get(name, NOT_SET), new.get(name, NOT_SET), inner)
    return {where: f"{what} (in {now['file']})" for where, what in found.items()} if _is_file(now) else found


def _file(value: str | PrecisionFile | ChipFile, again: bool) -> str | None:
    """The file to be read, if there is one."""
    name = value if isinstance(value, str) else value.file if again else None
    return name if name is not None and is_file(Path(name)) else None


def _is_file(value: Any) -> bool:
    """Whether plain data are those of a PrecisionFile or ChipFile."""
    return _has_keys(value) and value.keys() == PrecisionFile.model_fields.keys() and _has_keys(value["content"])


def _has_keys(value: Any) -> bool:
    return isinstance(value, Mapping)
