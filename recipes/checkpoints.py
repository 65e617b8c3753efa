"""Checkpoints on disk: written whole or not at all, checked when read, the last few kept. It knows no training."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lnpu_torch.files import ConfigError, inside, write

NAME = re.compile(r"[0-9]+-epoch[0-9]+-step[0-9]+\.pt")


class Checkpoints:
    """The files `NUMBER-epochE-stepS.pt` in a folder; the highest number is the newest.

    A file is written beside its place, brought to the disk, and then renamed, so that a process that is killed, or a
    machine that loses its power, leaves the earlier ones whole.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def files(self) -> list[Path]:
        """The newest last. Files of other names, such as copies, are left alone."""
        numbered = [file for file in self.folder.glob("*.pt") if NAME.fullmatch(file.name)]
        return sorted(numbered, key=lambda file: int(file.name.split("-")[0]))

    def save(self, state: Mapping[str, Any], epoch: int, step: int) -> None:
        """Write a checkpoint, and drop those older than the last `keep`. Raises ConfigError if the disk is full."""
        if not self._keep:
            return
        files = self.files()
        number = int(files[-1].name.split("-")[0]) + 1 if files else 1
        self._write(self.folder / f"{number:06d}-epoch{epoch}-step{step}.pt", dict(state))
        for old in self.files()[: -self._keep]:
            old.unlink()

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest state that is whole; None if none was ever written. `warn` is told of those that are damaged.

        Raises:
            ConfigError: all are damaged.
        """
        files = self.files()
        for file in reversed(files):
            try:
                return read_checkpoint(inside(self.folder, file.name))
            except ConfigError as error:
                warn(f"{error}; trying the one before")
        if files:
            raise ConfigError(f"{self.folder}: every checkpoint in it is damaged")
        return None

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        for left in self.folder.glob(".*.partial"):  # by a process that was killed
            left.unlink()
        try:
            self.folder.mkdir(exist_ok=True)
            write(path, lambda file: torch.save(state, file), own=True)
        except (OSError, RuntimeError) as error:  # torch's RuntimeError hides the OSError of a full disk behind it
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise ConfigError(f"{path}: cannot be written: {reason}") from None


def read_checkpoint(file: Path) -> dict[str, Any]:
    """What a file holds. Raises ConfigError if it is damaged, or no checkpoint."""
    try:
        with zipfile.ZipFile(file) as parts:  # torch's format; its own reader does not check the sums
            if broken := parts.testzip():
                raise ConfigError(f"{file}: damaged: the checksum of {broken} is wrong")
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ConfigError(f"{file}: not a checkpoint, but {type(state).__name__}")
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # whatever torch's reader raises of what is no state
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{file}: damaged, or not a checkpoint: {reason}") from None
    return state
