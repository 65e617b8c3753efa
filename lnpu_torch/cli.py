"""The command `lnpu`: train, price, sweep, report, chips, profile. It reads arguments; the work is done elsewhere."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ParamSpec

import torch
import typer
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

import lnpu_torch as lnpu
from lnpu_torch import cli_cost, cli_report
from lnpu_torch.cli_cost import By, Chips, Format, Voltage, print_reports
from lnpu_torch.config import ConfigError, find, parse_yaml, read_text, validate

USER_ERROR = 2
"""Exit code for a mistake in what the user gave, and for a run that cannot go on; Ctrl-C's is 130."""

app = typer.Typer(name="lnpu", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
P = ParamSpec("P")


def main() -> None:
    """Entry point of the command."""
    app()


def _errors_as_messages(command: Callable[P, None]) -> Callable[P, None]:
    """A user's mistake ends a command with one message on stderr, and no traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ConfigError, OSError) as error:
            _fail(str(error), USER_ERROR)
        except KeyboardInterrupt:
            _fail("Stopped.", 130)

    return wrapped


def _fail(message: str, exit_code: int) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(message, style="red"))
    raise typer.Exit(exit_code)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version, and exit.")] = False,
) -> None:
    """Train PyTorch models as the LNPU chip would: FP8-FP16 per element, zeros skipped, energy per epoch."""
    if show_version:
        print(f"lnpu {lnpu.__version__}")
        raise typer.Exit


@app.command()
@_errors_as_messages
def train(
    config: Annotated[str, typer.Argument(help="A built-in recipe (digits_resnet18) or a YAML file.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, such as lr=0.05 data.crop=2.")
    ] = None,
) -> None:
    """Train by a recipe; print accuracy and energy per epoch, and keep both in a run folder."""
    from lnpu_torch.recipes import train as recipe

    path = find("recipes", config, "recipe")
    data = parse_yaml(read_text(path, "recipe"), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a recipe: a mapping of keys is expected")
    changed = with_settings(data, settings or [])
    try:
        recipe.train(validate(recipe.TrainConfig, changed, str(path)), Console())
    except recipe.Stopped as stopped:
        _fail(str(stopped), stopped.exit_code)


for command in (cli_cost.price, cli_cost.sweep, cli_report.report, cli_cost.chips):
    app.command()(_errors_as_messages(command))


@app.command()
@_errors_as_messages
def profile(
    model: Annotated[str, typer.Argument(help="MODULE:ATTR, an nn.Module or a function that returns one.")],
    input_shape: Annotated[str, typer.Option(help="Shape of a batch, such as 8,3,224,224.")],
    chip: Chips = ["lnpu"],  # noqa: B006 - typer reads it, and hands out copies
    voltage: Voltage = None,
    precision: Annotated[str, typer.Option(help="fgmp, fp8, fp16 or a YAML file.")] = "fgmp",
    by: By = None,
    format: Format = "table",
) -> None:
    """Run one training step of any importable model on random input, and price it.

    The loss is the mean of all outputs. Weights are the model's own, so a model that is not trained shows
    the zeros and the FP8 share of one that is not trained.
    """
    chips = [lnpu.chip(name, voltage) for name in chip]
    batch = torch.randn(parse_shape(input_shape))
    network = lnpu.convert(import_model(model), precision)
    if not lnpu.coverage(network).emulated:
        raise ConfigError(f"{model}: nothing to price. {lnpu.coverage(network)}")
    with lnpu.CostCounter(network) as cost:
        _training_step(network, batch)
    if format == "table":
        print(lnpu.coverage(network))
    print_reports([cost.report(chip=each) for each in chips], by, format)


def with_settings(data: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """`data` with each KEY=VALUE laid on it: a dotted key, and a value in YAML (so null, true, 2e-3, [a, b]).

    Raises:
        ConfigError: no "=", an empty key, a value that is not YAML, or a key inside what is no mapping.
    """
    changed = dict(data)
    for setting in settings:
        key, equals, value = setting.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{setting!r}: settings are written KEY=VALUE, such as lr=0.05 or data.crop=2")
        changed = _with(changed, parts, parse_yaml(value, key), key)
    return changed


def _with(data: Any, parts: list[str], value: Any, key: str) -> dict[str, Any]:
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{key}: {parts[0]!r} is inside {data!r}, which has no keys")
    data = data or {}
    return {**data, parts[0]: _with(data.get(parts[0]), parts[1:], value, key) if parts[1:] else value}


def import_model(target: str) -> nn.Module:
    """The nn.Module that MODULE:ATTR names, or that calling it returns; the current folder is searched too.

    Raises:
        ConfigError: the module or attribute does not exist, importing or calling it fails, or it is no nn.Module.
    """
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{target!r}: a model is written MODULE:ATTR, such as torchvision.models:resnet18")
    found = _import_attribute(module, attribute)
    if not isinstance(found, nn.Module):
        found = _call(found, target)
    if not isinstance(found, nn.Module):
        kind = type(found).__name__
        raise ConfigError(f"{target}: an nn.Module is expected, or a function that returns one; got {kind}")
    return found


def _import_attribute(module: str, attribute: str) -> Any:
    if module.split(".")[0] == "torchvision":
        from lnpu_torch.recipes.torchvision_compat import import_torchvision

        import_torchvision()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"{module}:{attribute}: cannot be imported: {type(error).__name__}: {error}") from error


def _call(found: Any, target: str) -> Any:
    try:
        return found()
    except Exception as error:  # whatever the user's function raises
        raise ConfigError(f"{target}: cannot be called without arguments: {type(error).__name__}: {error}") from error


def parse_shape(text: str) -> tuple[int, ...]:
    """The shape that "8,3,224,224" gives. Raises ConfigError unless it is positive integers between commas."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"--input-shape: {text!r} is not a shape such as 8,3,224,224")
    return shape


def _training_step(network: nn.Module, batch: Tensor) -> None:
    try:
        outputs = _tensors(network.train()(batch))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"the model cannot take an input of shape {tuple(batch.shape)}: {error}") from error
    losses = [output.float().mean() for output in outputs if output.requires_grad]
    if not losses:
        raise ConfigError("the model returns no tensor that depends on its parameters; there is nothing to train")
    sum(losses[1:], start=losses[0]).backward()


def _tensors(output: Any) -> list[Tensor]:
    """Every tensor in a model's output, which may nest mappings, sequences and dataclasses of them."""
    leaves, _ = torch.utils._pytree.tree_flatten(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
