"""Peak memory of training steps, each variant in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rows import Operation


def peak_in_a_process(script: str, *arguments: str) -> int:
    """The bytes that a script prints, run with these arguments, whose freed blocks go back to the system at once.

    Otherwise the peak is that of the allocator's gaps, which differ by a third from run to run.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return int(done.stdout)


def resident(what: str) -> int:
    """Bytes of resident memory now (VmRSS) or at the most (VmHWM); getrusage's would include the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) * 1024


def growth(before: int, step: Operation) -> int:
    """The most resident memory of three steps, less what the process had before the model was built."""
    for _ in range(3):
        step()
    return resident("VmHWM") - before
