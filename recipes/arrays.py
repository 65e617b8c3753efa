"""Images that fit into memory, read whole as bytes: scikit-learn's digits, CIFAR, .npz files. It augments nothing."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch.files import ConfigError, listed
from lnpu_torch.recipes.settings import CIFAR_FOLDER, DataConfig
from lnpu_torch.recipes.torchvision_compat import import_torchvision

MOST_CLASSES = 100_000
"""Labels from here on are taken for a mistake: a classifier of so many classes would fill the memory."""
NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
CIFAR = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100)}
"""torchvision's name of a data set, and its number of classes."""

Arrays = dict[str, np.ndarray[Any, Any]]


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


def load(config: DataConfig) -> Data:
    """Read the images that `config` names.

    Raises:
        ConfigError: a library or a file is missing; the file is damaged, lacks an array, or one has the wrong type or
            shape.
    """
    readers = {"digits": _digits, "npz": _npz, "cifar10": _cifar, "cifar100": _cifar}
    arrays = readers[config.kind](config)
    train, test = (
        Split(_resized(arrays[f"x_{part}"], config.size), torch.from_numpy(arrays[f"y_{part}"].astype(np.int64)))
        for part in ("train", "test")
    )
    classes = CIFAR[config.kind][1] if config.kind in CIFAR else int(train.labels.max()) + 1
    return Data(train, test, classes)


def _digits(config: DataConfig) -> Arrays:
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


def _cifar(config: DataConfig) -> Arrays:
    """torchvision's CIFAR, fetched and checked by it."""
    name, folder, arrays = CIFAR[config.kind][0], config.path or CIFAR_FOLDER, {}
    dataset = getattr(import_torchvision().datasets, name)
    for part in ("train", "test"):
        try:
            split = dataset(folder, train=part == "train", download=config.download)
        except (RuntimeError, OSError) as error:
            raise ConfigError(_how_to_fetch(name, folder, error)) from None
        arrays[f"x_{part}"] = np.ascontiguousarray(split.data.transpose(0, 3, 1, 2))
        arrays[f"y_{part}"] = np.asarray(split.targets)
    return arrays


def _how_to_fetch(name: str, folder: str, error: Exception) -> str:
    command = f"from torchvision.datasets import {name}; {name}({folder!r}, download=True)"
    return (
        f"{name} is not in {folder!r}, or is damaged: {error}\n"
        f'Let torchvision fetch it (about 170 MB): add data.download=true, or run: python -c "{command}"'
    )


def _npz(config: DataConfig) -> Arrays:
    path = Path(str(config.path))
    arrays = _read_npz(path)
    for part in ("train", "test"):
        _check(arrays[f"x_{part}"], arrays[f"y_{part}"], f"{path}: x_{part}, y_{part}")
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise ConfigError(f"{path}: images of x_train and x_test differ in shape")
    if arrays["y_test"].max() > arrays["y_train"].max():
        raise ConfigError(f"{path}: y_test has class {arrays['y_test'].max()}, which y_train lacks")
    return arrays


def _read_npz(path: Path) -> Arrays:
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
    if labels.max() >= MOST_CLASSES:
        raise ConfigError(f"{where}: labels must be classes, counted from 0; {labels.max()} is none of {MOST_CLASSES}")


def _resized(images: np.ndarray[Any, Any], size: int | None) -> Tensor:
    tensor = torch.from_numpy(images)
    if size is None or tensor.shape[2:] == (size, size):
        return tensor
    return F.interpolate(tensor.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)
