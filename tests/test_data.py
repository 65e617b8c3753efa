"""Images are read, refused, ordered and augmented as documented; every model can be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lnpu_torch as lnpu
from lnpu_torch.config import ConfigError, validate
from lnpu_torch.recipes.data import Batches, DataConfig, augment, load
from lnpu_torch.recipes.models import NAMES, ModelConfig, build


def image_file(path: Path, **changes: Any) -> Path:
    """A file of colour images, with some of its arrays replaced, or left out (None)."""
    random = np.random.default_rng(0)
    arrays = {
        f"x_{part}": random.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8) for part, n in (("train", 33), ("test", 9))
    }
    arrays |= {f"y_{part}": np.arange(n) % 3 for part, n in (("train", 33), ("test", 9))}
    np.savez(path, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
    return path


def test_digits_are_split_evenly_and_the_same_every_time() -> None:
    first, second = load(DataConfig(kind="digits")), load(DataConfig(kind="digits"))
    assert (len(first.train), len(first.test), first.shape, first.classes) == (1437, 360, (1, 8, 8), 10)
    assert torch.equal(first.train.images, second.train.images)
    assert first.test.labels.bincount().min() >= 35
    assert int(first.train.images.max()) == 240
    assert load(DataConfig(kind="digits", size=12)).shape == (1, 12, 12)


def test_batches_are_normalised_and_ordered_by_seed_and_epoch() -> None:
    batches = Batches(load(DataConfig(kind="digits")), DataConfig(kind="digits"), 200, torch.device("cpu"))
    epochs = {key: [labels for _, labels in batches.train(*key)] for key in ((0, 1), (0, 2), (1, 1))}
    assert [len(labels) for labels in epochs[0, 1]] == [200] * 7 + [37]
    assert all(map(torch.equal, epochs[0, 1], (labels for _, labels in batches.train(0, 1))))
    assert not torch.equal(epochs[0, 1][0], epochs[0, 2][0])
    assert not torch.equal(epochs[0, 1][0], epochs[1, 1][0])
    pixels = torch.cat([images for images, _ in batches.train(0, 1)])
    assert pixels.mean().abs() < 1e-3
    assert (pixels.std() - 1).abs() < 1e-3


def test_a_last_batch_of_one_image_is_left_out(tmp_path: Path) -> None:
    settings = DataConfig(kind="npz", path=str(image_file(tmp_path / "x.npz")))
    batches = Batches(load(settings), settings, 16, torch.device("cpu"))
    assert [len(labels) for _, labels in batches.train(0, 1)] == [16, 16]  # of 33
    assert len(batches) == 2


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    original = torch.arange(1, 13, dtype=torch.uint8).reshape(1, 1, 3, 4).expand(64, 2, 3, 4)
    seen = augment(original, 1, False, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(original[0], (1, 1, 1, 1))
    windows = [padded[:, top : top + 3, left : left + 4] for top in range(3) for left in range(3)]
    matches = [[torch.equal(image, window) for window in windows] for image in seen]
    assert all(any(row) for row in matches)
    assert all(any(column) for column in zip(*matches, strict=True))
    flipped = augment(original, 0, True, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(image, original[0].flip(-1)) for image in flipped]
    assert all(was or torch.equal(image, original[0]) for was, image in zip(mirrored, flipped, strict=True))
    assert 16 < sum(mirrored) < 48


BAD_FILES = {
    "lacks y_test; it has x_train, x_test, y_train": {"y_test": None},
    r"images must be uint8 \[N, C, H, W\], not float64 \[33, 3, 8, 8\]": {"x_train": np.zeros((33, 3, 8, 8))},
    r"images must be .*, not uint8 \[9, 8, 8\]": {"x_test": np.zeros((9, 8, 8), np.uint8)},
    r"labels must be integers \[33\], not int64 \[32\]": {"y_train": np.zeros(32, np.int64)},
    r"labels must be integers \[9\], not float64 \[9\]": {"y_test": np.zeros(9)},
    "labels must be 0 or more, not -1": {"y_train": np.full(33, -1)},
    "y_test has class 7, which y_train lacks": {"y_test": np.full(9, 7)},
    "images of x_train and x_test differ in shape": {"x_test": np.zeros((9, 1, 8, 8), np.uint8)},
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_a_wrong_data_file_says_what_is_wrong(message: str, tmp_path: Path) -> None:
    path = image_file(tmp_path / "x.npz", **BAD_FILES[message])
    with pytest.raises(ConfigError, match=message):
        load(DataConfig(kind="npz", path=str(path)))


def test_a_damaged_or_missing_data_file_is_named(tmp_path: Path) -> None:
    path = image_file(tmp_path / "x.npz")
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for damaged in (whole[:500], b"", b"text", (tmp_path / "array.npy").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"x\.npz: not a readable \.npz file"):
            load(DataConfig(kind="npz", path=str(path)))
    with pytest.raises(ConfigError, match=r"no such data file \(data\.path\)"):
        load(DataConfig(kind="npz", path=str(tmp_path / "nowhere.npz")))
    with pytest.raises(ConfigError, match=r"give both or neither"):
        validate(DataConfig, {"kind": "npz"}, "test")


@pytest.mark.parametrize("name", NAMES)
def test_every_model_can_be_built_and_emulated(name: str) -> None:
    with torch.device("meta"):  # shapes without numbers, for VGG16 has 138 million
        model = build(ModelConfig(name=name), 5, (3, 64, 64))
        assert model.training
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert lnpu.coverage(lnpu.convert(model, "fgmp")).emulated


def test_a_model_that_cannot_be_built_says_why() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'resnet81' \(nearest: resnet18"):
        build(ModelConfig(name="resnet81"), 10, (3, 32, 32))
    with pytest.raises(ConfigError, match="alexnet has a fixed width"):
        build(ModelConfig(name="alexnet", width=8), 10, (3, 64, 64))
    with pytest.raises(ConfigError, match=r"alexnet cannot take images of 3x16x16 \(data\.size may help\)"):
        build(ModelConfig(name="alexnet"), 10, (3, 16, 16))
