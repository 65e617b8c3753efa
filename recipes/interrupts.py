"""Notes that the process is asked to stop, for a loop to stop where it can go on later. It knows nothing of loops."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 0}
"""Ctrl-C, and a scheduler that wants its machine back: to be stopped by one is no failure."""


class Stopped(Exception):
    """Training ended before its last epoch. The message says where and how to go on; `exit_code` is the process's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupts:
    """While entered, notes a first Ctrl-C or SIGTERM in `asked`, as its signal number; a second one acts at once."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = number
        self._restore()
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nStopping after this step; Ctrl-C again stops at once.\n")

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
