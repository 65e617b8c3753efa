"""The command that runs a step of anyone's model and prices it: lnpu profile. It reads arguments and prints."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Annotated

import typer

import lnpu_torch as lnpu
from lnpu_torch.cli.errors import Console
from lnpu_torch.cli.importing import import_model, parse_shape
from lnpu_torch.cli.price import By, Chips, Format, Full, Json, Voltage, print_reports
from lnpu_torch.files import ConfigError
from lnpu_torch.profiler.step_choices import Loss, OptimizerName

if TYPE_CHECKING:
    from torch import Tensor

    from lnpu_torch.nn.convert import Coverage


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
    as_json: Json = False,
    full: Full = False,
) -> None:
    """Run one training step of any importable model on random input, and price it.

    The loss is scaled, as in mixed precision: a step before, which is not counted, finds a scale at which nothing
    overflows. Weights are the model's own, so a model that is not trained shows the zeros and the FP8 share of one
    that is not trained.
    """
    from lnpu_torch.profiler.training_step import TrainingStep, infer, silent_layers
    from lnpu_torch.recipes.console_output import compiling_shown

    format = "json" if as_json else format
    if inference and (loss or optimizer != "sgd"):
        raise ConfigError("--inference: a forward pass has neither --loss nor --optimizer")
    chips = [lnpu.chip(name, voltage) for name in chip]
    batch = make_batch(parse_shape(input_shape))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that nothing was converted is an error here
        network = lnpu.convert(import_model(model), precision)
    covered = lnpu.coverage(network)
    if not covered.emulated:
        raise ConfigError(f"{model}: nothing to price, as it has no layer that can be emulated{_left(covered)}")
    step = None if inference else TrainingStep(network, batch, loss, optimizer)
    with compiling_shown(Console(stderr=True)):
        if step:
            step.warm_up()
        with lnpu.CostCounter(network) as cost:
            step.run() if step else infer(network, batch)
    if format == "table":
        ran = str(lnpu.coverage(network))  # of sites it is known now which are there
        print(ran if full else ran.partition(" In float:")[0])
        print("one forward pass" if step is None else f"one training step, its loss times {step.scale:g}")
    if silent := silent_layers(cost.counts):
        told = f"all errors of {len(silent)} layers are zero, and their products skipped; the first is {silent[0]}"
        print(told, file=sys.stderr)
    print_reports([cost.report(chip=each) for each in chips], by, format, full)


def _left(covered: Coverage) -> str:
    """The kinds of the layers that stayed in float, ": only BatchNorm2d, LayerNorm"."""
    kinds = sorted({row.kind for row in covered.in_float})
    return f": only {', '.join(kinds)}" if kinds else ""


def make_batch(shape: tuple[int, ...]) -> Tensor:
    """Random input of a shape. Raises ConfigError if there is no memory for it."""
    import torch

    try:
        return torch.randn(shape)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--input-shape: a batch of shape {shape} cannot be made: {reason}") from None
