"""Settings that name files, together with what the files say: so a run holds what it ran with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lnpu_torch.files import Frozen, is_file

NOT_SET = "(not set)"


class NamedFile(Frozen):
    """A file that a setting names, and what it said."""

    file: str
    content: Any


def file_to_read(value: str | NamedFile, again: bool) -> str | None:
    """The file that a setting names, if it is to be read: that of a NamedFile only where `again`."""
    name = value if isinstance(value, str) else value.file if again else None
    return name if name is not None and is_file(Path(name)) else None


def content_of(value: Any) -> Any:
    """What a NamedFile said; anything else as it is."""
    return value.content if isinstance(value, NamedFile) else value


def names(settings: Any) -> Any:
    """Settings as plain data, in which a NamedFile is its file's name."""
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


def _is_file(value: Any) -> bool:
    """Whether plain data are those of a NamedFile."""
    return _has_keys(value) and value.keys() == NamedFile.model_fields.keys() and _has_keys(value["content"])


def _has_keys(value: Any) -> bool:
    return isinstance(value, Mapping)
