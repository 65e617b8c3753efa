"""What a run shows at a terminal while loops are compiled."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable

import numba
import pytest
from rich.console import Console

from lnpu_torch.recipes.console_output import Progress, compiling, compiling_shown
from lnpu_torch.recipes.interrupts import Interrupts


def compile_something() -> None:
    @numba.njit
    def inner(x: int) -> int:
        return x + 1

    @numba.njit
    def outer(x: int) -> int:
        return inner(x) * 2

    assert outer(1) == 4


def test_what_is_compiled_is_told_and_counted() -> None:
    said: list[str] = []
    with compiling(said.append):
        compile_something()
        compile_something()
    compile_something()
    assert said == [f"compiling loops once, up to a minute ({done} so far)" for done in (0, 1)]


def terminal() -> tuple[Console, Callable[[], str]]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=100), file.getvalue


def test_a_spinner_is_at_terminals_alone() -> None:
    console, read = terminal()
    with compiling_shown(console):
        compile_something()
        time.sleep(0.2)
    assert "compiling loops once" in read()
    silent = Console(file=io.StringIO())
    with compiling_shown(silent):
        compile_something()
    assert silent.file.getvalue() == ""  # type: ignore[attr-defined]


def test_an_epochs_bar_says_it_until_a_step_is_done() -> None:
    console, read = terminal()
    with Progress(console, "epoch 1/1", 3) as bar:
        compile_something()
        time.sleep(0.2)
        assert "0/3\x1b[0m compiling loops once" in read()
        bar.advance(1.5, 0.25, 100)
    assert "loss 1.5000, accuracy 25.00%, 100 images/s" in read()


def test_the_first_interrupt_is_answered_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked == signal.SIGINT
    assert capfd.readouterr().err == "\nStopping after this step; Ctrl-C again stops at once.\n"
