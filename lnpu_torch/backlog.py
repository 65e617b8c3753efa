"""Counting put off until several steps can be counted at once: from cold caches each takes three times as long.

Whoever reads what is added to settles first. It knows none of the ops.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

LONGEST = 32
"""Calls that wait at most."""
LARGEST = 2**22
"""Bytes of tensors that they hold on to at most."""


class Backlog:
    """Calls that wait, first come, first served; none returns anything."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._bytes = 0
        self._renew()
        if hasattr(os, "register_at_fork"):  # as on all but Windows
            os.register_at_fork(after_in_child=self._renew)

    def add(self, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Put off a call, on real tensors of the CPU."""
        with self.lock:
            self._calls.append((function, args))
            self._bytes += sum(_bytes(args))
            if len(self._calls) >= LONGEST or self._bytes >= LARGEST:
                self.settle()

    def settle(self) -> None:
        """Do whatever waits, in order, seen by none of torch's modes; and wait for what other threads are at."""
        with self.lock:
            if self._calls:
                self._settle()

    def _settle(self) -> None:
        # in inference mode tensors of either kind can be written to
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.inference_mode():
            while self._calls:
                function, args = self._calls.popleft()
                function(*args)
        self._bytes = 0

    def _renew(self) -> None:
        """A forked process has the calls of its parent, but may have a lock that nobody will release."""
        self.lock = threading.RLock()


def _bytes(args: Iterable[Any]) -> Iterable[int]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg.nbytes
        elif type(arg) in (tuple, list) and arg and isinstance(arg[0], torch.Tensor):  # not a geometry's many sizes
            yield from _bytes(arg)


BACKLOG = Backlog()
"""Of this process: what its layers are still to count."""
