"""Watches a loader at work on a damaged file: it must answer or raise ConfigError, soon, and change nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lnpu_torch.files import ConfigError

SOON_S = 30
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect", "pickle.find_class")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_seen: list[tuple[str, tuple[Any, ...]]] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and (event in CHANGES or event in RUNS or (event == "open" and arguments[2] & WRITES)):
        _seen.append((event, arguments))


sys.addaudithook(_note)  # for good: Python has no way to take one off


@contextmanager
def nothing_happens() -> Iterator[None]:
    """Within the block no file is written, nothing is started, and it does not take long."""
    global _seen

    def too_long(_: int, frame: FrameType | None) -> None:
        raise AssertionError(f"longer than {SOON_S} s")

    before, _seen = signal.signal(signal.SIGALRM, too_long), []
    signal.setitimer(signal.ITIMER_REAL, SOON_S)
    try:
        yield
        assert not _seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _seen = None


def load(loader: Callable[[Path], object], file: Path, content: bytes, argument: Path | None = None) -> None:
    """Load a file of this content; `argument` is what the loader is told, if not the file itself."""
    file.write_bytes(content)
    with nothing_happens(), suppress(ConfigError):
        loader(argument or file)
