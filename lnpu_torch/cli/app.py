"""The command `lnpu`: its parts put together."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import lnpu_torch as lnpu
from lnpu_torch.cli import chips as chip_commands
from lnpu_torch.cli import compare, doctor, estimate, export, price, profile, report, reproduce, train
from lnpu_torch.cli.errors import errors_as_messages

app = typer.Typer(name="lnpu", pretty_exceptions_enable=False)


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


PARTS: tuple[Callable[..., None], ...] = (train.train, train.recipes, price.price, price.sweep)
PARTS += (report.report, reproduce.reproduce, chip_commands.chips, chip_commands.normalize)
PARTS += (estimate.estimate, compare.compare, export.export, profile.profile, doctor.doctor)
for command in PARTS:
    app.command()(errors_as_messages(command))
