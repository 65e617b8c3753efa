"""`lnpu export`: a run's workloads, for other tools."""

from __future__ import annotations

from pathlib import Path

import pytest

import lnpu_torch as lnpu
from helpers import small_run
from helpers.command import lnpu_command, refused
from lnpu_torch.counts.schema import Counts
from lnpu_torch.profiler.loop_nests import loop_nests
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.models import build
from lnpu_torch.reporting.loop_nest_formats import TOOLS, files

TABLE = {"fc": {"kind": "Linear", "in_channels": 3, "out_channels": 2}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    recipe.train(small_run.config(out=str(folder), accumulate=2), small_run.QUIET)
    return folder


def small() -> object:
    from torch import nn

    return nn.ModuleDict({"fc": nn.Linear(3, 2)})["fc"]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_runs_own_model_is_written(run: Path, tmp_path: Path, tool: str) -> None:
    result = lnpu_command("export", str(run), "--to", tool, "--out", str(tmp_path / "new" / tool))
    assert result.exit_code == 0, result.output
    whole = Counts.merge(Counts.load(run / "counts" / f"epoch{number}.json") for number in (1, 2))
    nests = loop_nests(build(small_run.config().model, 10, (1, 8, 8)), whole, (16, 1, 8, 8))
    wanted = files(nests, tool)
    assert {path.name: path.read_text() for path in (tmp_path / "new" / tool).iterdir()} == wanted


def test_counts_of_anyones_model_at_another_batch(tmp_path: Path) -> None:
    found = lnpu.estimate(small(), 4, {"default": {"input": 0.25, "weight": 1}}, input_shape=(3,), training=False)
    found.save(tmp_path / "counts.json")
    options = ["--model", "test_cli_export:small", "--input-shape", "4,3", "--batch", "7", "--out", str(tmp_path)]
    result = lnpu_command("export", str(tmp_path / "counts.json"), "--to", "scalesim", *options)
    assert result.exit_code == 0, result.output
    assert "_forward, 7, 2, 3, 16:16," in (tmp_path / "topology.csv").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "a file of counts does not say of which model: give --model and --input-shape"),
        (["--model", "test_cli_export:small"], "--model and --input-shape go together"),
        (["--model", "test_cli_export:small", "--input-shape", "4,x"], "'4,x' is not a shape"),
        (["--model", "test_cli_export:small", "--input-shape", "4,3", "--batch", "0"], "--batch: 0 samples"),
        (
            ["--model", "test_cli_export:small", "--input-shape", "4,5"],
            "cannot take an input of shape (4, 5)",
        ),
        (["--model", "test_cli_export:small", "--input-shape", "4,3"], "that the model does not run: fc"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, options: list[str], told: str) -> None:
    lnpu.estimate(TABLE, 4).save(tmp_path / "counts.json")
    assert told in refused("export", str(tmp_path / "counts.json"), "--to", "zigzag", "--out", str(tmp_path), *options)
    assert [path.name for path in tmp_path.iterdir()] == ["counts.json"]
