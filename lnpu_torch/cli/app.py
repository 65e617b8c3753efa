"""The command `lnpu`: its parts put together, and `profile`. It reads arguments; the work is done elsewhere."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import lnpu_torch as lnpu
from lnpu_torch.cli import chips as chip_commands
from lnpu_torch.cli import compare, estimate, export, price, report, reproduce, train
from lnpu_torch.cli.errors import errors_as_messages
from lnpu_torch.cli.importing import import_model, parse_shape
from lnpu_torch.cli.price import By, Chips, Format, Voltage, print_reports
from lnpu_torch.files import ConfigError
from lnpu_torch.profiler.training_step import Loss, OptimizerName, TrainingStep, infer, silent_layers

app = typer.Typer(name="lnpu", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the command. What a terminal cannot show, such as part of a path, is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version, and exit.")] = False,
) -> None:
    """Train PyTorch models as the LNPU chip would: FP8-FP16 per element, zeros skipped, energy per epoch."""
    if show_version:
        print(f"lnpu {lnpu.__version__}")
        raise typer.Exit


PARTS: tuple[Callable[..., None], ...] = (train.train, train.recipes, price.price, price.sweep)
PARTS += (report.report, reproduce.reproduce, chip_commands.chips, chip_commands.normalize)
PARTS += (estimate.estimate, compare.compare, export.export)
for command in PARTS:
    app.command()(errors_as_messages(command))


@app.command()
@errors_as_messages
def profile(
    model: Annotated[str, typer.Argument(help="MODULE:ATTR, an nn.Module or a function that returns one.")],
    input_shape: Annotated[str, typer.Option(help="Shape of a batch, such as 8,3,224,224.")],
    chip: Chips = ["lnpu"],  # noqa: B006 - typer reads it, and hands out copies
    voltage: Voltage = None,
    precision: Annotated[
        str, typer.Option(parser=os.path.expanduser, metavar="NAME", help="fgmp, fp8, fp16 or a YAML file.")
    ] = "fgmp",
    loss: Annotated[
        Loss | None, typer.Option(help="Else cross-entropy with random labels where there are classes, or the mean.")
    ] = None,
    optimizer: Annotated[OptimizerName, typer.Option(help="SGD has momentum.")] = "sgd",
    inference: Annotated[bool, typer.Option("--inference", help="A forward pass in evaluation mode alone.")] = False,
    by: By = None,
    format: Format = "table",
) -> None:
    """Run one training step of any importable model on random input, and price it.

    The loss is scaled, as in mixed precision: a step before, which is not counted, finds a scale at which nothing
    overflows. Weights are the model's own, so a model that is not trained shows the zeros and the FP8 share of one
    that is not trained.
    """
    if inference and (loss or optimizer != "sgd"):
        raise ConfigError("--inference: a forward pass has neither --loss nor --optimizer")
    chips = [lnpu.chip(name, voltage) for name in chip]
    batch = make_batch(parse_shape(input_shape))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that nothing was converted is an error here
        network = lnpu.convert(import_model(model), precision)
    if not lnpu.coverage(network).emulated:
        raise ConfigError(f"{model}: nothing to price, as it has no layer that can be emulated{_left(network)}")
    step = None if inference else TrainingStep(network, batch, loss, optimizer)
    if step:
        step.warm_up()
    with lnpu.CostCounter(network) as cost:
        step.run() if step else infer(network, batch)
    if format == "table":
        print(lnpu.coverage(network))
        print("one forward pass" if step is None else f"one training step, its loss times {step.scale:g}")
    if silent := silent_layers(cost.counts):
        told = f"all errors of {len(silent)} layers are zero, and their products skipped; the first is {silent[0]}"
        print(told, file=sys.stderr)
    print_reports([cost.report(chip=each) for each in chips], by, format)


def _left(network: nn.Module) -> str:
    """The kinds of the layers that stayed in float, ": only BatchNorm2d, LayerNorm"."""
    kinds = sorted({row.kind for row in lnpu.coverage(network).in_float})
    return f": only {', '.join(kinds)}" if kinds else ""


def make_batch(shape: tuple[int, ...]) -> Tensor:
    """Random input of a shape. Raises ConfigError if there is no memory for it."""
    try:
        return torch.randn(shape)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--input-shape: a batch of shape {shape} cannot be made: {reason}") from None
