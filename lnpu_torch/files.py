"""Files: YAML and JSON read into frozen, validated models; anything written whole or not at all."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import secrets
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

CONFIGS = next(
    folder
    for folder in (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")
    if folder.is_dir()
)


class ConfigError(ValueError):
    """A mistake in what the user wrote; the message names the place and what would be right."""


LONGEST_YAML = 2**18
"""Characters of YAML that are read, ten times the longest file that ships; so many take seconds."""

MOST = 10**30
"""No count and no constant of a chip is larger; so all that is made of them is a number that a float holds."""


class Frozen(BaseModel):
    """Base of everything read from a file: immutable, strictly typed, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain YAML 1.2: its floats (PyYAML alone reads 2.0e8 as text), no key twice, no dates or merges.

    libyaml's parser, where PyYAML has it, is ten times as fast.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.endswith(("null", "bool", "int", "float"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise yaml.MarkedYAMLError(problem=f"key {twice[0]!r} stands twice", problem_mark=node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _TextLoader(_Loader):
    """Every value is text, but for null."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.endswith("null")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def parse_yaml(text: str, where: str, *, as_text: bool = False) -> Any:
    """Parse one YAML document of plain values.

    Args:
        as_text: leave numbers and booleans as the text that they are written in.

    Raises:
        ConfigError: the text is not YAML, longer than LONGEST_YAML, deeper than DEEPEST_YAML, has a tag or an alias, or
            a key stands twice.
    """
    if len(text) > LONGEST_YAML:
        raise ConfigError(f"{where}: {len(text)} characters of YAML; at most {LONGEST_YAML} are read")
    try:
        _check_structure(text)
        return _TextLoader(text).get_single_data() if as_text else yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


DEEPEST_YAML = 100
"""Lists and mappings within each other; libyaml would follow as many as the text has, and crash."""


def _check_structure(text: str) -> None:
    """Raises YAMLError for a tag, an alias (a few lines of those stand for billions of values), and deep nesting."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        refused = "an alias (*)" if isinstance(event, yaml.AliasEvent) else "a tag (!)"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise yaml.YAMLError(f"{refused} is not read{event.start_mark}")
        if depth > DEEPEST_YAML:
            raise yaml.YAMLError(f"more than {DEEPEST_YAML} lists within each other{event.start_mark}")


def read_text(path: Path, what: str = "file") -> str:
    """The text of a UTF-8 file, without a byte order mark; a ConfigError that says why if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def parse_json(text: str, where: str) -> Any:
    """Parse one JSON document. Raises ConfigError if it is damaged or truncated, or a key stands twice."""
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return found


def validate(model: type[Model], data: Any, where: str, given: Iterable[str] = ()) -> Model:
    """Build `model` from plain data; a ConfigError names every wrong key, and the known ones.

    Args:
        model: the class to build.
        data: mappings, lists, numbers and strings, as YAML or JSON gives them.
        where: what to call the source in messages, such as the file's path.
        given: dotted keys whose values are not from there, but from the command line.
    """
    try:
        return model.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise ConfigError(_explain(error, model, where, [f"{key}." for key in given])) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or lists in lists in lists
        raise ConfigError(f"{where}: cannot be read: {error}") from None


def read_yaml(model: type[Model], path: Path, what: str = "file") -> Model:
    """Read one YAML file into `model`. Raises ConfigError."""
    return validate(model, parse_yaml(read_text(path, what), str(path)), str(path))


def find(folder: str, name_or_path: str | Path, what: str) -> Path:
    """The YAML file that a built-in name (`configs/<folder>/<name>.yaml`) or a path means.

    Raises:
        ConfigError: neither exists; the message lists the built-in names.
    """
    path = Path(name_or_path)
    builtin = CONFIGS / folder / f"{name_or_path}.yaml"
    if is_file(path):
        return path
    if len(path.parts) == 1 and is_file(builtin):
        return builtin
    known = builtin_names(folder)
    near = nearest(str(name_or_path), known)
    raise ConfigError(
        f"unknown {what} {str(name_or_path)!r}{near}: no such file, and the built-in ones are {listed(known)}"
    )


def is_file(path: Path) -> bool:
    """Whether there is a regular file of this name; no name is too strange or too long to ask."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder. Raises ConfigError if its name, or a link, leads out of the folder."""
    path = folder / name
    try:
        leads_out = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, or no name of a file at all
        leads_out = True
    if leads_out:
        raise ConfigError(f"{path}: leads out of {folder}, where a run's files are")
    return path


def builtin_names(folder: str) -> list[str]:
    """Names of the YAML files that ship in `configs/<folder>`."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def listed(names: Iterable[str]) -> str:
    """Names as a message has them: `a, b, c`."""
    return ", ".join(names)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a message: ` (nearest: a, b)`, or nothing where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f" (nearest: {listed(close)})" if close else ""


def _explain(error: ValidationError, model: type[BaseModel], source: str, given: Sequence[str]) -> str:
    lines = []
    missing: dict[str, list[str]] = {}
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        by_hand = any(f"{key}.".startswith(each) or each.startswith(f"{key}.") for each in given)
        where = "command line" if by_hand else source
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, problem["loc"][:-1])
            near = nearest(str(problem["loc"][-1]), known)
            lines.append(f"{where}: unknown key {key!r}{near}; known: {listed(known)}")
        elif problem["type"] == "missing":
            missing.setdefault(where, []).append(key)
        else:
            got = "" if isinstance(problem["input"], dict) else f", got {repr(problem['input'])[:80]}"
            lines.append(f"{where}: {key}: {_complaint(problem)}{got}")
    lines += [f"{where}: {MISSING}: {listed(keys)}" for where, keys in missing.items()]
    return "\n".join(lines)


MISSING = "missing"
"""How a message begins that lists the keys which a file has to give, and does not."""


def _complaint(problem: ErrorDetails) -> str:
    """What pydantic says of a value; of a bare number where its tag and source are asked for, how to write it."""
    if problem["type"] == "model_type" and problem.get("ctx", {}).get("class_name", "").startswith("SourcedValue"):
        return "a value needs its tag and source, as in {value: 64, tag: assumed, source: my own choice}"
    return problem["msg"].removeprefix("Value error, ")


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The fields of the model that a pydantic error location points into."""
    for part in location:
        field = model.model_fields.get(str(part))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()  # itself, or a member of `X | None`
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return list(model.model_fields)


Writer = Callable[[IO[bytes]], object]
"""Writes the content of a file into it, open and binary."""


def user_path(text: str) -> Path:
    """A path as a user writes it, in which `~` is the home folder, also where the shell left it."""
    return Path(os.path.expanduser(text))


def write_text(path: str | Path, text: str, *, own: bool = False) -> None:
    """As `write`, UTF-8; what cannot be encoded, as part of a path may be, is written as an escape."""
    write(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")), own=own)


def write(path: str | Path, writer: Writer, *, own: bool = False) -> None:
    """Write a file whole or not at all: beside its place first, then renamed.

    A link is followed: its target is replaced, and the link stays. An existing file keeps its mode and, where that is
    allowed, its owner. What exists and is no regular file, such as a pipe or a terminal, is written into.

    Args:
        own: put a regular file at `path` itself, in place of a link or a pipe; for a folder that others may have made.

    Raises:
        ConfigError: the folder is missing, read-only or full; an earlier file stays as it was.
    """
    path = Path(path)
    try:
        special = None if own else _special(path)
        if special:
            with special:
                writer(special)
        else:
            place = path if own else Path(os.path.realpath(path))
            with _beside(place, writer) as written:
                written.replace(place)
    except (OSError, ValueError) as error:  # ValueError: no name of a file at all
        raise ConfigError(f"{path}: cannot be written: {_reason(error)}") from None


def create_text(path: Path, text: str) -> None:
    """Write a file that is not there yet, whole; of several that try at once one succeeds.

    Raises:
        FileExistsError: it is there.
        ConfigError: it cannot be written.
    """
    try:
        with _beside(path, lambda file: file.write(text.encode("utf-8", "backslashreplace"))) as written:
            try:
                path.hardlink_to(written)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                with path.open("xb") as file:
                    file.write(written.read_bytes())
    except FileExistsError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {_reason(error)}") from None


def _special(path: Path) -> IO[bytes] | None:
    """What is at the path, open, if a new file must not take its place; a file that is our own output among it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with contextlib.suppress(OSError):  # it may be closed
            if os.path.samestat(found, os.fstat(number)):
                stream.flush()
                return os.fdopen(os.dup(number), "wb")
    if stat.S_ISREG(found.st_mode) and os.path.exists(os.path.realpath(path)):
        return None
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_TRUNC), "wb")


@contextlib.contextmanager
def _beside(place: Path, writer: Writer) -> Iterator[Path]:
    """A file beside its place, written to the disk, with the mode and owner of the file that is there."""
    beside = place.with_name(f".{secrets.token_hex(8)}.partial")
    earlier = _regular(place)
    mode = stat.S_IMODE(earlier.st_mode) if earlier else 0o666
    try:
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if earlier:
                with contextlib.suppress(PermissionError):
                    os.chown(beside, earlier.st_uid, earlier.st_gid)
                with contextlib.suppress(PermissionError):
                    os.chmod(beside, mode)
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        yield beside
        _to_disk(place.parent)
    finally:
        beside.unlink(missing_ok=True)


def _regular(place: Path) -> os.stat_result | None:
    """The status of the regular file there, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        found = place.lstat()
        return found if stat.S_ISREG(found.st_mode) else None
    return None


def _to_disk(folder: Path) -> None:
    """Bring a renaming to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
