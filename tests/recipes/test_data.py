"""Images that fit into memory are read, refused, ordered and augmented as documented; every model can be built."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lnpu_torch as lnpu
from helpers.small_run import image_file
from lnpu_torch.files import ConfigError, validate
from lnpu_torch.recipes.arrays import load
from lnpu_torch.recipes.augment import Augment, cut_out
from lnpu_torch.recipes.batching import Division
from lnpu_torch.recipes.data import BytesOnDevice, open_batches
from lnpu_torch.recipes.models import NAMES, ModelConfig, build
from lnpu_torch.recipes.settings import DataConfig
from lnpu_torch.recipes.torchvision_compat import import_torchvision

CPU = torch.device("cpu")
DIGITS = DataConfig(kind="digits", crop=2, flip=True, cutout=3)


def batches(config: DataConfig, batch_size: int = 200, **division: int) -> BytesOnDevice:
    return BytesOnDevice(load(config), config, Division(batch_size, **division), CPU)


def labels_of(data: BytesOnDevice, epoch: int, first: int = 0) -> list[torch.Tensor]:
    return [labels for pieces in data.train(epoch, first) for _, labels in pieces]


def test_digits_are_split_evenly_and_the_same_every_time() -> None:
    first, second = load(DataConfig(kind="digits")), load(DataConfig(kind="digits"))
    assert (len(first.train), len(first.test), first.shape, first.classes) == (1437, 360, (1, 8, 8), 10)
    assert torch.equal(first.train.images, second.train.images)
    assert first.test.labels.bincount().min() >= 35
    assert int(first.train.images.max()) == 240
    assert load(DataConfig(kind="digits", size=12)).shape == (1, 12, 12)


def test_batches_are_normalised_and_ordered_by_seed_and_epoch() -> None:
    data = batches(DataConfig(kind="digits"))
    assert [len(labels) for labels in labels_of(data, 1)] == [200] * 7 + [37] and data.sizes == [200] * 7 + [37]
    assert all(map(torch.equal, labels_of(data, 1), labels_of(data, 1)))
    assert not torch.equal(labels_of(data, 1)[0], labels_of(data, 2)[0])
    assert not torch.equal(labels_of(data, 1)[0], labels_of(batches(DataConfig(kind="digits"), seed=1), 1)[0])
    pixels = torch.cat([images for pieces in data.train(1) for images, _ in pieces])
    assert pixels.mean().abs() < 1e-3
    assert (pixels.std() - 1).abs() < 1e-3


def test_every_epoch_has_every_image_once_and_far_from_its_neighbours() -> None:
    """In a random order of n, images that follow each other were n / 3 apart."""
    images, seen = 1200, []
    for seed, epoch in ((0, 1), (0, 2), (1, 1)):
        order = torch.cat(Division(100, seed=seed).batches(images, epoch))
        assert torch.equal(order.sort().values, torch.arange(images))
        assert images / 3.5 < order.diff().abs().double().mean() < images / 2.5
        seen.append(order)
    assert all((one == other).sum() < 20 for one, other in itertools.combinations(seen, 2))


def test_an_epoch_goes_on_at_any_step_as_if_it_had_not_stopped() -> None:
    data = batches(DIGITS)
    whole = [pair for pieces in data.train(3) for pair in pieces]
    rest = [pair for pieces in data.train(3, 5) for pair in pieces]
    assert len(whole) == 8 and len(rest) == 3
    for pair, again in zip(whole[5:], rest, strict=True):
        assert all(map(torch.equal, pair, again))


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (1, 3), (2, 2), (3, 2)])
def test_ranks_and_pieces_see_the_batches_of_one_process(ranks: int, accumulate: int) -> None:
    """The same images, moved in the same way; only what cannot be shared evenly is left out of the last batch."""
    size = 120
    whole = [pair for pieces in batches(DIGITS, size).train(1) for pair in pieces]
    everyone = [batches(DIGITS, size, ranks=ranks, rank=rank, accumulate=accumulate) for rank in range(ranks)]
    for step, steps in enumerate(zip(*(data.train(1) for data in everyone), strict=True)):
        parts = [part for moment in zip(*steps, strict=True) for part in moment]  # in time, then by rank
        assert len(parts) == ranks * accumulate and len({len(labels) for _, labels in parts}) == 1
        together = [torch.cat(each) for each in zip(*parts, strict=True)]
        assert all(torch.equal(one, other[: len(one)]) for one, other in zip(together, whole[step], strict=True))
        assert len(whole[step][0]) - len(together[0]) < ranks * accumulate
    assert step + 1 == len(whole) == len(everyone[0].sizes)
    tested = torch.cat([labels for data in everyone for _, labels in data.test()])
    assert torch.equal(tested.bincount(), load(DIGITS).test.labels.bincount())


def test_a_batch_that_cannot_be_shared_says_what_can() -> None:
    words = r"100 images cannot be shared evenly among 8 rank\(s\) x 3 piece\(s\).*multiple of 24, such as .*=96"
    with pytest.raises(ConfigError, match=words):
        Division(100, accumulate=3, ranks=8)
    with pytest.raises(ConfigError, match=r"at least 2 each: .* batch_size=16"):
        Division(8, ranks=8)
    with pytest.raises(ConfigError, match=r"1 training image\(s\) are too few for 1 share\(s\)"):
        Division(8).sizes(1)


def test_a_last_batch_of_one_image_is_left_out(tmp_path: Path) -> None:
    data = batches(DataConfig(kind="npz", path=str(image_file(tmp_path / "x.npz"))), 16)
    assert [len(labels) for labels in labels_of(data, 1)] == [16, 16] and data.sizes == [16, 16]  # of 33


def augment(crop: int = 0, flip: bool = False, cutout: int = 0) -> Augment:
    return Augment(crop, flip, cutout, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    original = torch.arange(1, 13, dtype=torch.uint8).reshape(1, 1, 3, 4).expand(64, 2, 3, 4)
    shift, mirror = augment(crop=1), augment(flip=True)
    padded = torch.nn.functional.pad(original[0], (1, 1, 1, 1)).float()
    windows = [padded[:, top : top + 3, left : left + 4] for top in range(3) for left in range(3)]
    seen = shift(original, shift.draw(64, 0))
    matches = [[torch.equal(image, window) for window in windows] for image in seen]
    assert all(any(row) for row in matches)
    assert all(any(column) for column in zip(*matches, strict=True))
    flipped = mirror(original, mirror.draw(64, 0))
    mirrored = [torch.equal(image, original[0].flip(-1).float()) for image in flipped]
    assert all(was or torch.equal(image, original[0].float()) for was, image in zip(mirrored, flipped, strict=True))
    assert 16 < sum(mirrored) < 48


def test_cutout_blanks_a_square_whose_middle_is_in_the_image() -> None:
    hole = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.99, 0.2]])
    blank = cut_out(torch.ones(3, 2, 10, 8), hole, 4) == 0
    expected = torch.zeros(3, 2, 10, 8, dtype=torch.bool)
    expected[0, :, :2, :2] = True  # the middle at (0, 0): three quarters lie outside
    expected[1, :, 3:7, 2:6] = True
    expected[2, :, 7:10, :3] = True  # the middle at (9, 1)
    assert torch.equal(blank, expected)
    both = augment(cutout=4)
    sizes = (both(torch.ones(200, 1, 12, 12, dtype=torch.uint8), both.draw(200, 0)) == 0).sum((1, 2, 3))
    assert sizes.max() == 16 and sizes.min() >= 4 and len(sizes.unique()) > 4


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
    for wrong, message in (
        ({"kind": "npz"}, "data.kind=npz needs data.path"),
        ({"kind": "digits", "path": "x"}, "not to digits"),
        ({"kind": "imagefolder", "path": "x", "crop": 4}, "data.crop is not for an imagefolder"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(DataConfig, wrong, "test")


def cifar(root: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> dict[str, np.ndarray[Any, Any]]:
    """A few images of noise in torchvision's CIFAR layout, with checksums of their own."""
    dataset = getattr(import_torchvision().datasets, f"CIFAR{classes}")
    folder, pixels = root / dataset.base_folder, {}
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    key = "labels" if classes == 10 else "fine_labels"
    for name, _ in (*dataset.train_list, *dataset.test_list):
        pixels[name] = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels[name], key: list(range(4))}))
    meta = dataset.meta["filename"]
    (folder / meta).write_bytes(pickle.dumps({dataset.meta["key"]: ["name"] * classes}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    return pixels


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_torchvisions(classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = cifar(tmp_path / "data", monkeypatch, classes)
    monkeypatch.chdir(tmp_path)  # ./data is where it is looked for
    kind: Any = f"cifar{classes}"
    data = load(DataConfig(kind=kind))
    first = pixels["data_batch_1" if classes == 10 else "train"]
    assert torch.equal(data.train.images[:4], torch.from_numpy(first.reshape(4, 3, 32, 32)))
    assert (data.classes, data.shape, len(data.test)) == (classes, (3, 32, 32), 4)
    assert data.train.labels[:4].tolist() == [0, 1, 2, 3]


def test_cifar_that_is_missing_says_how_to_fetch_it(tmp_path: Path) -> None:
    words = r"(?s)CIFAR10 is not in .*not found or corrupted.*data\.download=true, or run: python -c \"from torchvision"
    with pytest.raises(ConfigError, match=words):
        open_batches(DataConfig(kind="cifar10", path=str(tmp_path)), Division(8), CPU)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_can_be_built_and_emulated(name: str) -> None:
    with torch.device("meta"):  # shapes without numbers, for VGG16 has 138 million
        model = build(ModelConfig(name=name), 5, (3, 64, 64))
        assert model.training
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert lnpu.coverage(lnpu.convert(model, "fgmp")).emulated


@pytest.mark.parametrize("name", ["vgg16", "vgg16_cifar"])
def test_vgg16_comes_with_and_without_batch_norm(name: str) -> None:
    with torch.device("meta"):
        models = {
            choice: build(ModelConfig(name=name, batch_norm=choice), 5, (3, 32, 32)) for choice in (True, False, None)
        }
    norms = {key: sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) for key, model in models.items()}
    assert norms == {True: 13, False: 0, None: 13 if "cifar" in name else 0}


def test_a_model_that_cannot_be_built_says_why() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'resnet81' \(nearest: resnet18"):
        build(ModelConfig(name="resnet81"), 10, (3, 32, 32))
    with pytest.raises(ConfigError, match="alexnet has a fixed width"):
        build(ModelConfig(name="alexnet", width=8), 10, (3, 64, 64))
    with pytest.raises(ConfigError, match=r"alexnet cannot take images of 3x16x16 \(data\.size may help\)"):
        build(ModelConfig(name="alexnet"), 10, (3, 16, 16))
    with pytest.raises(ConfigError, match="resnet18 comes in one form only"):
        build(ModelConfig(name="resnet18", batch_norm=False), 10, (3, 64, 64))
    with pytest.raises(ConfigError, match=r"model\.classes: 1000 outputs, but the data has 10 classes: leave it out"):
        build(ModelConfig(name="resnet18", classes=1000), 10, (3, 64, 64))
    assert build(ModelConfig(name="resnet18_cifar", width=2, classes=7), 7, (1, 8, 8)).fc.out_features == 7
