"""The command that hands a run's shapes and densities to other tools: lnpu export. It reads arguments, writes files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lnpu_torch.cli.importing import import_model, parse_shape
from lnpu_torch.cli.train import read_recipe
from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import ConfigError, user_path, write_text
from lnpu_torch.reporting.loop_nest_formats import Tool, files
from lnpu_torch.reporting.run_comparison import read_runs

if TYPE_CHECKING:
    from torch import nn


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=user_path, help="A run's folder, or a file of counts.")],
    to: Annotated[Tool, typer.Option(help="The tool whose format to write.")],
    out: Annotated[Path, typer.Option(parser=user_path, metavar="DIR", help="The folder to write into.")],
    model: Annotated[
        str | None, typer.Option(help="MODULE:ATTR, the model that was counted; else that of the run.")
    ] = None,
    input_shape: Annotated[str | None, typer.Option(help="Shape of a batch, such as 8,3,224,224; for --model.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples, in place of those of the run's batch.")] = None,
) -> None:
    """Write the shapes and measured densities of each layer's steps as another tool's workload.

    Densities are those of the whole run. Shapes are the model's, for one batch.
    """
    from lnpu_torch.profiler.loop_nests import loop_nests

    (found,) = read_runs([run])
    counts = Counts.merge(epoch.counts for epoch in found.epochs)
    if (model is None) != (input_shape is None):
        raise ConfigError("--model and --input-shape go together")
    if model and input_shape:
        network, shape = import_model(model), parse_shape(input_shape)
    elif run.is_dir():
        network, shape = _of_run(run)
    else:
        raise ConfigError(f"{run}: a file of counts does not say of which model: give --model and --input-shape")
    if batch is not None:
        if batch < 1:
            raise ConfigError(f"--batch: {batch} samples; a batch has 1 or more")
        shape = (batch, *shape[1:])
    texts = files(loop_nests(network, counts, shape), to)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(out / name, text)
    print(f"saved: {len(texts)} file{'s' * (len(texts) > 1)} in {out}")


def _of_run(run: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """A run's model, and the shape of its batches."""
    from lnpu_torch.recipes.arrays import load
    from lnpu_torch.recipes.models import build

    config = read_recipe(None, [], str(run))
    if config.data.kind == "imagefolder":
        raise ConfigError(f"{run}: its photographs are not read for this: give --model and --input-shape")
    data = load(config.data)
    model: nn.Module = build(config.model, data.classes, data.shape)
    return model, (max(config.batch_size // config.accumulate, 1), *data.shape)
