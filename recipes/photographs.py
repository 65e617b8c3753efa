"""Photographs in class folders, such as ImageNet, read and cropped by worker processes. What follows is `augment`'s."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lnpu_torch.files import ConfigError, listed
from lnpu_torch.recipes.augment import Augment
from lnpu_torch.recipes.batching import Division
from lnpu_torch.recipes.interrupts import EXIT_CODES
from lnpu_torch.recipes.settings import DataConfig
from lnpu_torch.recipes.torchvision_compat import import_torchvision

SIZE = 224
RESIZE = 256 / 224
"""A test photograph's shorter side over the square that is cut out of its middle, as is customary for ImageNet."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of pixels between 0 and 1: red, green, blue (torchvision's documentation of its models)."""

IMAGENET = """ImageNet is fetched by hand, with an account at image-net.org: ILSVRC2012_img_train.tar, \
ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz. Put them into the folder, and let torchvision sort them:
  python -c "from torchvision.datasets import ImageNet; ImageNet({0!r}, 'train'); ImageNet({0!r}, 'val')\""""

GRACE_S = 30
"""What a worker waits to be let go after a signal, in seconds."""

Files = list[tuple[str, int]]
"""Photographs and their classes."""
Key = tuple[int, int]
"""Which photograph of a list, and in which epoch, which decides how it is cropped."""
Item = tuple[Tensor | None, int, list[str]]
"""A photograph, uint8 [3, size, size], or none; its class; what could not be read."""
Batch = tuple[Tensor, Tensor, list[str]]


class Photographs:
    """Batches of the photographs in `path`/train/CLASS/ and `path`/val/CLASS/; see `data.Batches`.

    Raises:
        ConfigError: a folder is missing, empty or laid out otherwise; or, in use, a photograph is unreadable.
    """

    def __init__(
        self, config: DataConfig, division: Division, device: torch.device, warn: Callable[[str], None]
    ) -> None:
        size, (classes, train, test) = config.size or SIZE, class_folders(Path(str(config.path)))
        self.classes, self.shape, self.images = len(classes), (3, size, size), (len(train), len(test))
        self.sizes = division.sizes(len(train))
        self._config, self._division, self._device, self._warn = config, division, device, warn
        self._named: set[str] = set()
        mean, std = (255 * torch.tensor(value, device=device).reshape(3, 1, 1) for value in (MEAN, STD))
        self._augment = Augment(0, config.flip, config.cutout, mean, std)
        self._train = _Reader(_Crops(train, size, division, replace=config.unreadable == "skip"), config, device)
        self._test = _Reader(_Middles(test, size), config, device)

    def train(self, epoch: int, first: int = 0) -> Generator[Iterator[tuple[Tensor, Tensor]], None, None]:
        """As `data.Batches.train`."""
        batches, own = self._division.batches(self.images[0], epoch)[first:], self._division.own
        keys = ([(i, epoch) for i in batch[part].tolist()] for batch in batches for part in own(len(batch)))
        with contextlib.closing(self._read(self._train, keys)) as pieces:
            for step, batch in enumerate(batches, start=first):
                moves = self._augment.draw(self._division.batch_size, self._division.random(epoch, step))
                parts = itertools.islice(pieces, self._division.accumulate)
                yield (
                    (self._augment(images, moves.of(part)), labels)
                    for part, (images, labels) in zip(own(len(batch)), parts, strict=True)
                )

    def test(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """As `data.Batches.test`."""
        keys = ([(i, 0) for i in batch] for batch in self._division.test(self.images[1]))
        with contextlib.closing(self._read(self._test, keys)) as batches:
            for images, labels in batches:
                yield self._augment.normalised(images), labels

    def _read(self, reader: _Reader, keys: Iterator[list[Key]]) -> Generator[tuple[Tensor, Tensor], None, None]:
        for images, labels, unreadable in reader.read(keys):
            for note in unreadable:
                self._leave_out(note)
            if not len(images):
                raise ConfigError(f"{self._config.path}: of a whole batch, no photograph can be read")
            yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)

    def _leave_out(self, note: str) -> None:
        if self._config.unreadable == "fatal":
            raise ConfigError(f"{note}\nMend it or take it away; data.unreadable=skip leaves such photographs out")
        if note not in self._named:
            self._named.add(note)
            self._warn(f"left out: {note}")


class _Reader:
    """Reads the photographs of one list by the settings' workers."""

    def __init__(self, photographs: Dataset[Item], config: DataConfig, device: torch.device) -> None:
        self._keys: Iterator[list[Key]] = iter(())
        self._loader: DataLoader[Item] = DataLoader(
            photographs,
            batch_sampler=self,
            num_workers=config.workers,
            collate_fn=_stacked,
            pin_memory=device.type == "cuda",
            worker_init_fn=_outlast_signals,
            generator=torch.Generator(),  # else it would draw from torch's own whenever an epoch begins
        )

    def __iter__(self) -> Iterator[list[Key]]:
        return self._keys

    def read(self, keys: Iterator[list[Key]]) -> Iterator[Batch]:
        """A batch for each list of keys."""
        self._keys = keys
        yield from self._loader


def _outlast_signals(_: int) -> None:
    """Let a worker live on for a while if it is told to stop: a scheduler tells all, and training ends in order."""
    for number in EXIT_CODES:
        signal.signal(number, lambda *_: signal.alarm(GRACE_S))


def _stacked(items: list[Item]) -> Batch:
    """A batch of those photographs that could be read."""
    good = [(image, label) for image, label, _ in items if image is not None]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    unreadable = [note for *_, notes in items for note in notes]
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), unreadable


class _Middles(Dataset[Item]):
    """The middle of each photograph."""

    def __init__(self, files: Files, size: int) -> None:
        v2 = _transforms()
        self.files, self.to_tensor = files, v2.functional.pil_to_tensor
        self.cut = v2.Compose([v2.Resize(round(size * RESIZE)), v2.CenterCrop(size)])

    def __getitem__(self, key: Key) -> Item:
        path, label = self.files[key[0]]
        try:
            return self.to_tensor(self.cut(_open(path))), label, []
        except MemoryError:
            raise
        except Exception as error:  # whatever a decoder raises
            return None, label, [f"{path}: unreadable: {error}"]


class _Crops(_Middles):
    """A random piece of each photograph. If `replace`, the next that can be read stands in for one that cannot."""

    def __init__(self, files: Files, size: int, division: Division, replace: bool) -> None:
        super().__init__(files, size)
        self.cut = _transforms().RandomResizedCrop(size)
        self._division, self._replace = division, replace

    def __getitem__(self, key: Key) -> Item:
        unreadable: list[str] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._division.random(key[1], key[0]))
            for step in range(len(self.files)):
                image, label, notes = super().__getitem__(((key[0] + step) % len(self.files), key[1]))
                unreadable += notes
                if image is not None or not self._replace:
                    break
        return image, label, unreadable


def _transforms() -> Any:
    import_torchvision()
    return importlib.import_module("torchvision.transforms.v2")


def _open(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def class_folders(root: Path) -> tuple[list[str], Files, Files]:
    """Names of the classes, and the training and test photographs.

    Raises:
        ConfigError: the folders are not there, or not laid out as expected; the message says what is.
    """
    expected = "expected: train/CLASS/*.jpg and val/CLASS/*.jpg"
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder (data.path); {expected}\n{IMAGENET.format(str(root))}")
    found = {part: _photographs(root, part, expected) for part in ("train", "val")}
    (names, train), (others, test) = found["train"], found["val"]
    if names != others:
        only = [f"{name} (in {part} only)" for name, part in _differences(names, others)]
        raise ConfigError(f"{root}: train/ and val/ have not the same classes: {listed(only[:5])}")
    return names, train, test


def _differences(names: list[str], others: list[str]) -> list[tuple[str, str]]:
    mine, theirs = set(names), set(others)
    return sorted([(name, "train") for name in mine - theirs] + [(name, "val") for name in theirs - mine])


def _photographs(root: Path, part: str, expected: str) -> tuple[list[str], Files]:
    folder = import_torchvision().datasets.folder
    here = sorted(path.name for path in (root / part).iterdir()) if (root / part).is_dir() else None
    if here is None:
        has = listed(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise ConfigError(f"{root}: has no folder {part}/; {expected}; found: {has}\n{IMAGENET.format(str(root))}")
    names = [name for name in here if (root / part / name).is_dir()]
    if not names:
        raise ConfigError(f"{root / part}: has no class folders; {expected}; found: {listed(here[:5]) or 'nothing'}")
    places = {name: place for place, name in enumerate(names)}
    files: Files = folder.make_dataset(root / part, places, extensions=folder.IMG_EXTENSIONS, allow_empty=True)
    seen = {label for _, label in files}
    empty = [name for name, place in places.items() if place not in seen]
    if empty:
        raise ConfigError(f"{root / part}: no photographs in {listed(empty[:5])}; {expected}")
    return names, files
