"""A training process that is killed at any moment is gone on with, and ends as one that never was, to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.processes import CONTEXT, start
from helpers.small_run import EVERYTHING, QUIET, config, same_end
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.checkpoints import Checkpoints


def train(settings: dict[str, Any], out: Path, begun: Any) -> None:
    """In a process of its own: begin the run, or go on with it."""
    torch.set_num_threads(1)
    begun.set()
    recipe.train(config(**settings), QUIET, resume=str(out))


def process(settings: dict[str, Any], out: Path) -> Any:
    begun = CONTEXT.Event()
    started = start(train, settings, out, begun)
    assert begun.wait(120)
    return started


def seconds_to_the_end(settings: dict[str, Any], out: Path) -> float:
    """Let it end. Raises AssertionError if it fails."""
    last, began = process(settings, out), time.monotonic()
    last.join()
    assert last.exitcode == 0
    return time.monotonic() - began


def kill(settings: dict[str, Any], out: Path, times: int, longest_s: float) -> int:
    """Go on with it and kill it, so many times, after random whiles. Returns how often it was not done before."""
    moments, found = random.Random(0), 0
    for _ in range(times):
        victim = process(settings, out)
        victim.join(timeout=moments.uniform(0.0, longest_s))
        found += victim.is_alive()
        victim.kill()
        victim.join()
    return found


def kill_and_compare(settings: dict[str, Any], tmp_path: Path, times: int) -> None:
    """Each while is 2 / times of the run at most, so that all of them together are about the run."""
    whole_s = seconds_to_the_end(settings, tmp_path / "whole")
    assert kill(settings, tmp_path / "cut", times, 2 * whole_s / times) > times / 4
    seconds_to_the_end(settings, tmp_path / "cut")
    assert same_end(tmp_path / "whole", tmp_path / "cut")


def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    kill_and_compare(EVERYTHING, tmp_path, times=3)


def killed_within_a_write(folder: Path) -> None:
    """In a process of its own: be killed when half of a checkpoint is written."""

    def half(state: object, file: Any) -> None:
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    Checkpoints(folder, 3).save({}, 9, 0)


def test_killed_within_a_write_the_checkpoints_before_are_left_as_they_were(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.save({"epoch": 1}, 1, 0)
    (whole,) = checkpoints.files()
    victim = start(killed_within_a_write, tmp_path)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert checkpoints.files() == [whole] and checkpoints.newest(pytest.fail) == {"epoch": 1}


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_killed_30_times_and_resumed(every: int, tmp_path: Path) -> None:
    kill_and_compare({**EVERYTHING, "limit": 20, "epochs": 10, "count": {"every": every}}, tmp_path, times=30)
