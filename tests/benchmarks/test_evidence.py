"""The programs behind docs/results.md, on a few random images: no figure that comes out means anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.paths import ROOT
from lnpu_torch.recipes.checkpoints import Checkpoints
from lnpu_torch.recipes.models import ModelConfig, build
from lnpu_torch.recipes.short_training import load_weights

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    parts = {f"x_{part}": draw.integers(0, 256, (32, 3, 32, 32), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "images.npz", **parts, **{f"y_{part}": np.arange(32) % 10 for part in ("train", "test")})
    return tmp_path / "images.npz"


def printed(program: str, *arguments: str) -> list[list[str]]:
    """The cells of the tables that a program prints."""
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the tests themselves
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=one_thread)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def test_gradients_of_more_precise_operands_are_nearer(images: Path) -> None:
    head, _, *rows = printed("gradients.py", str(images), "--steps=2", "--width=2", "--batch=8", "--batches=1")
    assert len(head) == 5 and [row[0] for row in rows][:2] == ["batch", "fgmp"]
    errors = {name: [float(cell.split(" ")[0]) for cell in cells] for name, *cells in rows}
    for network in range(4):
        fp16, fgmp, batch = (errors[name][network] for name in ("fp16", "fgmp", "batch"))
        assert 0 < fp16 < fgmp < batch


def test_accuracy_makes_the_runs_that_are_missing_and_their_tables(images: Path, tmp_path: Path) -> None:
    options = ["--seeds=1", "--networks", "vgg16", "--precisions=fgmp", "--full"]
    settings = ["data.kind=npz", f"data.path={images}", "model.width=2", "epochs=1", "limit=1", "batch_size=8"]
    tables = printed("accuracy.py", str(tmp_path / "runs"), *options, *settings)
    learned = {row[1]: row[2:] for row in tables if row[0] == "VGG16"}
    assert learned["float32"][2] == "-" and 0 <= float(learned["float32"][1].split(" ")[0]) <= 100
    assert learned.keys() == {"float32", "fgmp"}
    spent = [row[1:] for row in tables if row[0] in ("fgmp on lnpu", "fgmp on dense-fp16")]
    assert [row[0].count("J") for row in spent] == [2, 2] and {cell for row in spent for cell in row[1:]} == {"-"}
    assert [row[2] for row in tables if row[0] == "fgmp"] == ["1"]  # pair of runs
    begun, pages = time.time(), tmp_path / "pages"
    pages.mkdir()
    for file in (tmp_path / "runs").glob("*.csv"):
        shutil.copy(file, pages)
    assert printed("accuracy.py", str(pages), "--tables", "--plots", str(pages)) == tables
    for name in ("accuracy", "energy_to_accuracy"):
        assert "<svg" in (pages / f"{name}.svg").read_text()
    assert printed("accuracy.py", str(tmp_path / "runs"), *options, *settings) == tables
    assert all(file.stat().st_mtime < begun for file in (tmp_path / "runs").rglob("metrics.csv"))
    run = tmp_path / "runs" / "vgg16-fgmp-0"
    printed("keep_weights.py", str(run), str(tmp_path / "kept.pt"))
    learned_by = Checkpoints(run / "checkpoints", keep=1).newest(print)
    kept = build(ModelConfig(name="vgg16_cifar", width=2), 10, (3, 32, 32))
    load_weights(kept, str(tmp_path / "kept.pt"))
    assert learned_by is not None and (tmp_path / "kept.pt").stat().st_size < 2e5
    for name, value in kept.state_dict().items():
        torch.testing.assert_close(value, learned_by["model"][name], rtol=2**-11, atol=2**-25)
