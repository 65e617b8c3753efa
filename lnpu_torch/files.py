"""Writes files, whole or not at all, into whatever a path leads to: a file, a link's target, a pipe, a device."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from lnpu_torch.config import ConfigError

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
