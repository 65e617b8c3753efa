"""The command that prices what was never run: lnpu estimate. It reads arguments and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lnpu_torch.cli.importing import import_model
from lnpu_torch.cli.price import By, Chips, Format, Full, Json, Voltage, print_reports
from lnpu_torch.cost.pricing import price
from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import ConfigError, read_yaml, user_path, validate
from lnpu_torch.hardware.chip import chip as read_chip

if TYPE_CHECKING:
    from torch import nn


def estimate(
    file: Annotated[Path, typer.Argument(metavar="FILE", parser=user_path, help="YAML: shapes and densities.")],
    model: Annotated[
        str | None, typer.Option(help="MODULE:ATTR in place of the file's model, as `lnpu profile` takes it.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Samples, in place of the file's.")] = None,
    inference: Annotated[bool, typer.Option("--inference", help="A forward pass in evaluation mode alone.")] = False,
    chip: Chips = ["lnpu"],  # noqa: B006 - typer reads it, and hands out copies
    voltage: Voltage = None,
    by: By = None,
    format: Format = "table",
    as_json: Json = False,
    full: Full = False,
    out: Annotated[
        Path | None, typer.Option(parser=user_path, metavar="PATH", help="Write the counts too, for `lnpu price`.")
    ] = None,
) -> None:
    """Price one step of a model, or of a table of layers, from shapes and densities. Nothing is run.

    The file has `model: {name: resnet18, classes: 1000}` and `input: [3, 224, 224]`, or `layers:` with their shapes;
    `batch`, `training`; and `densities:` with the share of non-zeros, and of FP8 among them, by layer and step.
    """
    chips = [read_chip(name, voltage) for name in chip]
    counts = _estimated(file, model, batch, inference)
    if out:
        counts.save(out)
    print_reports([price(counts, each) for each in chips], by, "json" if as_json else format, full)


def _estimated(path: Path, model: str | None, batch: int | None, inference: bool) -> Counts:
    from lnpu_torch.profiler import estimate as estimates

    file = read_yaml(estimates.EstimateFile, path)
    if sum(each is not None for each in (model or file.model, file.layers)) != 1:
        raise ConfigError(f"{path}: either a model (a key, or --model) or layers are to be estimated")
    what: nn.Module | dict[str, Any]
    if file.layers is not None:
        what = {name: layer.model_dump(exclude_unset=True) for name, layer in file.layers.items()}
    elif file.input is None:
        raise ConfigError(f"{path}: input: a model needs the shape of one sample, such as [3, 224, 224]")
    else:
        what = import_model(model) if model else _recipes_model(file.model or {}, file.input, f"{path}: model")
    if file.layers is not None and file.input is not None:
        raise ConfigError(f"{path}: input: each of the layers has its own")
    return estimates.estimate(
        what,
        file.batch if batch is None else batch,
        file.densities,
        input_shape=file.input,
        training=file.training and not inference,
        optimizer=file.optimizer,
        loss=file.loss,
    )


def _recipes_model(config: dict[str, Any], shape: tuple[int, ...], where: str) -> nn.Module:
    from lnpu_torch.recipes.models import ModelConfig, build

    found = validate(ModelConfig, config, where)
    if found.classes is None:
        raise ConfigError(f"{where}.classes: how many outputs it has")
    if len(shape) != 3:
        raise ConfigError(f"{where}: takes images; input is [channels, height, width], got {list(shape)}")
    model: nn.Module = build(found, found.classes, (shape[0], shape[1], shape[2]))
    return model
