"""The command `lnpu`: its parts put together."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import lnpu_torch as lnpu

MODULES = {"train": "train", "recipes": "train", "price": "price", "sweep": "price", "report": "report"}
MODULES |= {"reproduce": "reproduce", "chips": "chips", "normalize": "chips", "estimate": "estimate"}
MODULES |= {"compare": "compare", "export": "export", "profile": "profile", "doctor": "doctor"}
"""The module of each command, a function of the command's name."""


class _Commands(MutableMapping[str, Any]):
    """The commands by name, each imported when it is asked for: what `lnpu price` needs does not slow `lnpu chips`."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            from lnpu_torch.cli.errors import errors_as_messages

            made = typer.Typer(add_completion=False)
            function = getattr(import_module(f"lnpu_torch.cli.{MODULES[name]}"), name)
            made.command(name)(errors_as_messages(function))
            self._made[name] = typer.main.get_command(made)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


class _Group(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()


app = typer.Typer(name="lnpu", cls=_Group, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the command. What a terminal cannot show, such as part of a path, is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()


FIRST = """\
lnpu trains PyTorch models as the LNPU chip would, and says what that costs. Three things to do first:

  lnpu train digits_resnet18             train a small network: accuracy, and energy per epoch
  lnpu profile torchvision.models:resnet18 --input-shape 1,3,224,224
                                         what a training step of your own model costs
  lnpu chips                             the chips that it can be priced on

lnpu --help lists all commands, lnpu COMMAND --help explains one, lnpu doctor looks at this machine."""


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version, and exit.")] = False,
) -> None:
    """Train PyTorch models as the LNPU chip would: FP8-FP16 per element, zeros skipped, energy per epoch."""
    if show_version:
        print(f"lnpu {lnpu.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(FIRST)
