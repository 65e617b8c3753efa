"""What all commands share: how they print, and how they end that cannot go on."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import typer
from rich import console
from rich.text import Text

from lnpu_torch.files import ConfigError
from lnpu_torch.text_tables import Tables

USER_ERROR = 2
"""Exit code for a mistake in what the user gave, and for a run that cannot go on; Ctrl-C's is 130."""

BROKEN_PIPE = 141
"""Exit code of a command whose reader went away: a shell's for SIGPIPE."""

P = ParamSpec("P")


class Console(console.Console):
    """Rich's, which leaves it to the command what happens when its reader goes away."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError."""
        raise BrokenPipeError


def show(tables: Tables) -> None:
    """Print tables and lines: at a terminal within its width, else whole."""
    if sys.stdout is not None and sys.stdout.isatty():
        Console().print(tables)
    else:
        print(tables)


def errors_as_messages(command: Callable[P, None]) -> Callable[P, None]:
    """A user's mistake ends a command with one message on stderr, and no traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            if sys.stdout is not None:  # as it is where it was closed
                sys.stdout.flush()
        except BrokenPipeError:  # as in `lnpu price COUNTS | head`: who reads our output has enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is left of the output has to go somewhere
            raise typer.Exit(BROKEN_PIPE) from None
        except (ConfigError, OSError) as error:
            fail(str(error), USER_ERROR)
        except KeyboardInterrupt:
            fail("Stopped.", 130)

    return wrapped


def fail(message: str, exit_code: int) -> NoReturn:
    """End the command. Of several processes that train together, the first speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True, soft_wrap=True).print(Text(message, style="red" if exit_code else ""))
    raise typer.Exit(exit_code)
