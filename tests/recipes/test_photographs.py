"""Photographs in class folders are read alike by any number of workers, and what is wrong with them is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.small_run import QUIET, config, photographs
from lnpu_torch.files import ConfigError
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.batching import Division
from lnpu_torch.recipes.data import Pair
from lnpu_torch.recipes.photographs import MEAN, STD, Photographs, class_folders
from lnpu_torch.recipes.settings import DataConfig

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return photographs(tmp_path / "images")


def opened(
    root: Path, warnings: list[str] | None = None, ranks: int = 1, rank: int = 0, **changes: object
) -> Photographs:
    settings = {"kind": "imagefolder", "path": str(root), "size": 32, "workers": 0, "flip": True, **changes}
    warn = [].append if warnings is None else warnings.append
    return Photographs(DataConfig.model_validate(settings), Division(4, ranks=ranks, rank=rank), CPU, warn)


def pairs(data: Photographs, epoch: int, first: int = 0) -> list[Pair]:
    return [pair for pieces in data.train(epoch, first) for pair in pieces]


def same(ones: list[Pair], others: list[Pair]) -> bool:
    return all(
        torch.equal(a, b) for one, other in zip(ones, others, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_workers_change_nothing_and_an_epoch_goes_on_at_any_step(root: Path) -> None:
    alone, helped = opened(root, cutout=8), opened(root, cutout=8, workers=2)
    assert (alone.classes, alone.shape, alone.images, alone.sizes) == (3, (3, 32, 32), (12, 6), [4, 4, 4])
    whole = pairs(alone, 1)
    assert [tuple(images.shape) for images, _ in whole] == [(4, 3, 32, 32)] * 3
    assert torch.cat([labels for _, labels in whole]).bincount().tolist() == [4, 4, 4]
    next(helped.train(1))  # and left there
    assert same(pairs(helped, 1), whole) and same(pairs(helped, 1, 1), whole[1:])
    assert not same(pairs(helped, 2), whole)
    assert same(list(helped.test()), list(alone.test()))


def test_ranks_see_the_photographs_of_one_process(root: Path) -> None:
    alone, ranks = opened(root), [opened(root, ranks=2, rank=rank) for rank in (0, 1)]
    parts = zip(*(pairs(data, 1) for data in ranks), strict=True)
    assert same([(torch.cat((a, c)), torch.cat((b, d))) for (a, b), (c, d) in parts], pairs(alone, 1))
    tested = [labels for data in ranks for _, labels in data.test()]
    assert torch.cat(tested).bincount().tolist() == [2, 2, 2]


def test_reading_leaves_torchs_generator_alone(root: Path) -> None:
    before = torch.get_rng_state()
    pairs(opened(root), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_pixels_are_the_photographs(tmp_path: Path) -> None:
    """One colour, whatever is cropped of it, normalised as ImageNet's; grey ones become coloured."""
    for part, colour, mode in (("train", (255, 128, 0), "RGB"), ("val", 51, "L")):
        (tmp_path / part / "one").mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.new(mode, (50, 40), colour).save(tmp_path / part / "one" / name)
    data = opened(tmp_path)
    for (images, _), colour in ((pairs(data, 1)[0], (255, 128, 0)), (next(iter(data.test())), (51, 51, 51))):
        expected = (torch.tensor(colour) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        assert torch.allclose(images, expected.reshape(1, 3, 1, 1).expand_as(images), atol=1e-5)


def damage(root: Path) -> list[Path]:
    """One photograph is cut short, one is no image."""
    cut, text = sorted((root / "train" / "class1").iterdir())[:2]
    cut.write_bytes(cut.read_bytes()[:300])
    text.write_text("not an image")
    return [cut, text]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_photograph_is_fatal_and_named(root: Path, workers: int) -> None:
    bad = damage(root)
    with pytest.raises(ConfigError, match=r"unreadable: .*\nMend it or take it away; data\.unreadable=skip") as error:
        pairs(opened(root, workers=workers), 1)
    assert any(str(path) in str(error.value) for path in bad)


def test_unreadable_photographs_are_skipped_and_named_once_if_asked(root: Path) -> None:
    bad, warnings = damage(root), list[str]()
    test = sorted((root / "val" / "class0").iterdir())[0]
    test.write_bytes(b"")
    data = opened(root, warnings, unreadable="skip", workers=2)
    for epoch in (1, 2):
        assert [len(labels) for _, labels in pairs(data, epoch)] == [4, 4, 4]  # the next in the list stand in
    assert sum(len(labels) for _, labels in data.test()) == 5
    assert sorted(warnings) == sorted(w for w in warnings if w.startswith("left out: ")) and len(warnings) == 3
    assert all(sum(str(path) in warning for warning in warnings) == 1 for path in (*bad, test))


def test_nothing_readable_is_an_error_even_so(root: Path) -> None:
    for path in (root / "val").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match="of a whole batch, no photograph can be read"):
        list(opened(root, unreadable="skip").test())


def test_a_wrong_layout_says_what_is_expected_and_what_is_there(root: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no such folder .*train/CLASS/\*\.jpg(?s:.*)image-net\.org(?s:.*)ImageNet\('.*nowhere'"
    ):
        class_folders(root / "nowhere")
    (root / "val" / "class2").rename(root / "val" / "other")
    with pytest.raises(ConfigError, match=r"not the same classes: class2 \(in train only\), other \(in val only\)"):
        class_folders(root)
    shutil.rmtree(root / "val" / "other")
    (root / "val" / "class2").mkdir()
    with pytest.raises(ConfigError, match=r"val: no photographs in class2; expected"):
        class_folders(root)
    shutil.rmtree(root / "val")
    with pytest.raises(ConfigError, match=r"has no folder val/; expected: .*; found: train"):
        class_folders(root)
    (root / "val").mkdir()
    (root / "val" / "flat.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"val: has no class folders; expected: .*; found: flat\.jpg"):
        class_folders(root)


def test_a_model_trains_on_photographs(root: Path, tmp_path: Path) -> None:
    data = {"kind": "imagefolder", "path": str(root), "size": 16, "workers": 1, "flip": True}
    # in channels_last torch 2.13's own gradients of fewer than 8 channels corrupt memory on some CPUs (docs/limits.md)
    model = {"name": "resnet18_cifar", "width": 16}
    settings = {"batch_size": 4, "channels_last": True, "epochs": 1, "out": str(tmp_path / "run")}
    row = recipe.train(config(data=data, model=model, **settings), QUIET)[-1]
    assert row["lnpu_energy_pj"] > 0
