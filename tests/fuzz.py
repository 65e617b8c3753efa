"""Whatever a file holds, its loader answers or raises ConfigError; nothing hangs, and nothing is written.

python tests/fuzz.py 100000    # so many damaged files over all loaders; test_loaders.py tries a few
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lnpu_torch as lnpu
from helpers.damaged import json_files, text_files, yaml_files
from helpers.handmade import network
from helpers.loading import load
from helpers.run_by_hand import epoch_counts, write_run
from lnpu_torch.cli.train import read_recipe
from lnpu_torch.files import CONFIGS
from lnpu_torch.quant.precision import precision
from lnpu_torch.recipes.run_folder import RunFolder
from lnpu_torch.reporting.run_reader import read_run


class Loader(NamedTuple):
    """What reads a file, how the file may be damaged, and the share of all inputs that it gets."""

    load: Callable[[Path], object]
    files: st.SearchStrategy[bytes]
    share: float
    file: str = "file"


def short(value: Any) -> Any:
    """A chip's data with little said about each value."""
    if not isinstance(value, dict):
        return value
    return {key: "s" if key == "source" else short(inner) for key, inner in value.items() if key != "bottom_up"}


def use_chip(path: Path) -> None:
    chip = lnpu.chip(path)
    str(chip)
    lnpu.price(network(), chip).to_dict()


def use_run(file: Path) -> None:
    folder = file.parents["/counts/" in file.as_posix()]
    read_run(folder)
    RunFolder(folder).settings()
    RunFolder(folder).counts()


LNPU = lnpu.chip("lnpu")
PRECISIONS = (
    {"input": "fgmp", "weight": {"low": "e4m3", "high": "fp16", "fp16_share": 0.1}, "grad_output": None},
    {"grad_weight": {"input": "fp16"}, "accumulate": "fp16", "chunk": 64, "result": "e6m9"},
)
CHIPS = (
    short(lnpu.chip("dense-fp16").model_dump(mode="json")),
    {"like": "dense-fp16", "description": "d", "padding": {"value": "free", "tag": "assumed", "source": "s"}},
)
RECIPE = yaml.safe_load((CONFIGS / "recipes" / "digits_resnet18.yaml").read_text())
COUNTS = tuple(counts.model_dump(mode="json") for counts in (network(), epoch_counts(1)))
SETTINGS = {"model": {"name": "tiny"}, "precision": "fgmp", "chip": ["lnpu"], "lr": 0.1}

LOADERS = {
    "precision": Loader(precision, yaml_files(*PRECISIONS), 0.3),
    "chip": Loader(use_chip, yaml_files(*CHIPS), 0.1),
    "recipe": Loader(lambda path: read_recipe(str(path), []), yaml_files(RECIPE), 0.15),
    "setting": Loader(
        lambda path: read_recipe("digits_resnet18", [path.read_text(errors="replace")]),
        text_files("data.crop=2", "overrides={fc: null}"),
        0.05,
    ),
    "counts": Loader(lambda path: str(lnpu.price(lnpu.Counts.load(path), LNPU)), json_files(*COUNTS), 0.2),
    "run: settings": Loader(use_run, yaml_files(SETTINGS), 0.05, "config.yaml"),
    "run: metrics": Loader(use_run, text_files("epoch,loss,word\n1,0.5,warm\n2,nan,\n"), 0.05, "metrics.csv"),
    "run: counts": Loader(use_run, json_files(COUNTS[0]), 0.05, "counts/epoch1.json"),
    "run: versions": Loader(use_run, json_files({"torch": "9.9"}), 0.05, "versions.json"),
}


def fuzz(name: str, folder: Path, examples: int) -> None:
    """Put so many damaged files to a loader. Raises what the loader raised, if that is no ConfigError."""
    loader = LOADERS[name]
    phases = [Phase.generate, Phase.shrink]
    write_run(folder / "run", epochs=1)

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=phases
    )
    @given(loader.files)
    def holds(content: bytes) -> None:
        load(loader.load, folder / "run" / loader.file, content)

    holds()


def main(inputs: int) -> None:
    """Fuzz every loader, and print a line for each."""
    print(
        ", ".join(f"{name} {version}" for name, version in lnpu.versions().items()),
        f"hypothesis {hypothesis.__version__}",
    )
    for name, loader in LOADERS.items():
        began, examples = time.perf_counter(), round(inputs * loader.share)
        with tempfile.TemporaryDirectory() as folder:
            fuzz(name, Path(folder), examples)
        print(f"{datetime.now(UTC).date()} {name}: {examples} files, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
