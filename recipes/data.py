"""Image classification data: read once, kept as bytes on the training device, augmented there in batches.

It knows files, pixels and labels, and nothing of models or precisions.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch.config import ConfigError, Frozen, listed

NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class DataConfig(Frozen):
    """Where the images come from, and how training batches are augmented.

    `kind`: "digits" (scikit-learn's 1,797 scans of handwritten digits, 8x8, shipped with it) or "npz" (the file
    `path` with x_train, x_test: uint8 [N, C, H, W] and y_train, y_test: integers [N]). `size`: images are resized to
    size x size pixels (null: left as they are). `crop`: random shift by up to this many pixels, zeros moving in.
    `flip`: mirrored left to right at random, half of the time.
    """

    kind: Literal["digits", "npz"]
    path: str | None = None
    size: Annotated[int, Field(ge=1)] | None = None
    crop: Annotated[int, Field(ge=0)] = 0
    flip: bool = False

    @model_validator(mode="after")
    def _path_belongs_to_npz(self) -> Self:
        if (self.kind == "npz") != (self.path is not None):
            raise ValueError("data.path is the file of data.kind=npz: give both or neither")
        return self


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] and their classes int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A training and a test split, and how to normalise both: by the training pixels, per channel."""

    train: Split
    test: Split
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training pixels, each float32 [C, 1, 1]."""
        channels = self.train.images.unbind(1)
        seen = torch.stack([images.flatten().bincount(minlength=256) for images in channels]).double()  # [C, 256]
        share, value = seen / seen.sum(1, keepdim=True), torch.arange(256)
        mean = (share * value).sum(1, keepdim=True)
        std = (share * (value - mean).square()).sum(1, keepdim=True).sqrt().clamp(min=1.0)
        return mean.float()[..., None], std.float()[..., None]


class Batches:
    """Normalised batches of a split, on its device; training batches are shuffled and augmented.

    The order and the augmentation of an epoch follow from (seed, epoch) alone, so that a resumed run sees the same.
    """

    def __init__(self, data: Data, config: DataConfig, batch_size: int, device: torch.device) -> None:
        self.config, self.batch_size = config, batch_size
        self.mean, self.std = (value.to(device) for value in data.normalisation())
        self._train, self._test = data.train.to(device), data.test.to(device)
        self._random = torch.Generator(device)
        if not len(self):
            raise ConfigError("data: a batch needs two training images at least, and there is only one")

    def __len__(self) -> int:
        """Training batches per epoch; the last may be smaller, but of a single image, batch norm could make nothing."""
        full, rest = divmod(len(self._train), self.batch_size)
        return full + (rest > 1)

    def train(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of one epoch: images float32 [B, C, H, W], labels int64 [B]."""
        self._random.manual_seed(seed * 1_000_003 + epoch)
        labels = self._train.labels
        order = torch.randperm(len(labels), generator=self._random, device=labels.device)
        for index in order.split(self.batch_size)[: len(self)]:
            images = augment(self._train.images[index], self.config.crop, self.config.flip, self._random)
            yield self._normalise(images), labels[index]

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test batches, in the file's order, as they are."""
        for images, labels in zip(
            self._test.images.split(self.batch_size), self._test.labels.split(self.batch_size), strict=True
        ):
            yield self._normalise(images), labels

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std


def augment(images: Tensor, crop: int, flip: bool, random: torch.Generator) -> Tensor:
    """Shift each image of [B, C, H, W] by up to `crop` pixels, and mirror half of them if `flip`, on their device."""
    batch, _, height, width = images.shape
    if crop:
        top, left = torch.randint(2 * crop + 1, (2, batch, 1), generator=random, device=images.device)
        rows = top + torch.arange(height, device=images.device)  # [B, H]
        columns = left + torch.arange(width, device=images.device)  # [B, W]
        padded = F.pad(images, (crop, crop, crop, crop))
        which = torch.arange(batch, device=images.device)[:, None, None]
        images = padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(batch, generator=random, device=images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images.contiguous()


def load(config: DataConfig) -> Data:
    """Read the images that `config` names.

    Raises:
        ConfigError: scikit-learn or the file is missing; the file is damaged, lacks an array, or one has the wrong
            type or shape.
    """
    arrays = _digits() if config.kind == "digits" else _npz(Path(str(config.path)))
    train, test = (
        Split(_resized(arrays[f"x_{part}"], config.size), torch.from_numpy(arrays[f"y_{part}"].astype(np.int64)))
        for part in ("train", "test")
    )
    return Data(train, test, classes=int(train.labels.max()) + 1)


def _digits() -> dict[str, np.ndarray[Any, Any]]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ConfigError("data.kind=digits needs scikit-learn: pip install 'lnpu-torch[recipes]'") from None
    digits = load_digits()
    images = (digits.images[:, None] * 15).astype(np.uint8)  # 0 ... 16 -> 0 ... 240, exactly
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def _npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    arrays = _read_npz(path)
    for part in ("train", "test"):
        _check(arrays[f"x_{part}"], arrays[f"y_{part}"], f"{path}: x_{part}, y_{part}")
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise ConfigError(f"{path}: images of x_train and x_test differ in shape")
    if arrays["y_test"].max() > arrays["y_train"].max():
        raise ConfigError(f"{path}: y_test has class {arrays['y_test'].max()}, which y_train lacks")
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = [name for name in NPZ_ARRAYS if name not in file]
            if missing:
                raise ConfigError(f"{path}: lacks {listed(missing)}; it has {listed(file.files) or 'no arrays'}")
            return {name: file[name] for name in NPZ_ARRAYS}
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such data file (data.path)") from None
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: not a readable .npz file: {error}") from None


def _check(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], where: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ConfigError(f"{where}: images must be uint8 [N, C, H, W], not {images.dtype} {list(images.shape)}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ConfigError(f"{where}: labels must be integers [{len(images)}], not {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0:
        raise ConfigError(f"{where}: labels must be 0 or more, not {labels.min()}")


def _resized(images: np.ndarray[Any, Any], size: int | None) -> Tensor:
    tensor = torch.from_numpy(images)
    if size is None or tensor.shape[2:] == (size, size):
        return tensor
    return F.interpolate(tensor.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)
