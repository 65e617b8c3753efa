"""Runs small enough for a test, and images made on the spot for them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lnpu_torch.files import validate
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.run_folder import RunFolder
from lnpu_torch.recipes.settings import TrainConfig

SMALL: dict[str, Any] = {
    "model": {"name": "resnet18_cifar", "width": 2},
    "data": {"kind": "digits", "crop": 1, "flip": True},
    **{"precision": "fgmp", "epochs": 2, "batch_size": 32, "limit": 2, "lr": 0.05, "chip": ["lnpu", "dense-fp16"]},
    **{"threads": 1, "device": "cpu"},
}
EVERYTHING: dict[str, Any] = {
    "model": {"name": "alexnet_cifar", "width": 2},  # it has dropout, which draws from torch's generator
    "data": {"kind": "digits", "size": 16, "crop": 1, "flip": True, "cutout": 3},
    **{"accumulate": 2, "limit": 5, "ema": 0.9, "schedule": "cosine", "checkpoint": {"every": 1, "keep": 2}},
}
QUIET = Console(quiet=True)


def config(**changes: Any) -> TrainConfig:
    return validate(TrainConfig, {**SMALL, **changes}, "test")


def run(console: Console = QUIET, **changes: Any) -> recipe.Run:
    """A run that has begun, and taken no step."""
    begun = recipe.Run(config(**changes), console)
    begun.open(None, False)
    return begun


def image_file(path: Path, classes: int = 3, size: int = 8, **changes: Any) -> Path:
    """A file of colour images, with some of its arrays replaced, or left out (None)."""
    random, parts = np.random.default_rng(0), (("train", 11 * classes), ("test", 3 * classes))
    arrays = {f"x_{part}": random.integers(0, 256, (n, 3, size, size), dtype=np.uint8) for part, n in parts}
    arrays |= {f"y_{part}": np.arange(n) % classes for part, n in parts}
    np.savez(path, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
    return path


def photographs(root: Path, classes: int = 3, each: int = 4, size: int = 40) -> Path:
    """A folder of noise in class folders, of unequal shapes; half of it JPEG, half PNG."""
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", each), ("val", 2)):
        for name in (f"class{i}" for i in range(classes)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (size + 3 * i, size + 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{('jpg', 'png')[i % 2]}")
    return root


def equal(a: Any, b: Any) -> bool:
    """Whether two nested states are the same, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items() if key != "images_per_s")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def same_end(one: Path, other: Path) -> bool:
    """Whether two runs ended alike: last checkpoint, metrics but for the speed, counts of every epoch."""
    states = [RunFolder(path).checkpoints.newest(print) for path in (one, other)]
    rows = [list(csv.DictReader((path / "metrics.csv").read_text().splitlines())) for path in (one, other)]
    return equal(*states) and equal(*rows) and RunFolder(one).counts() == RunFolder(other).counts()
