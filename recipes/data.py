"""Batches of images on the training device, whichever way they come there. It knows nothing of models or precisions."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

import torch
from torch import Tensor

import lnpu_torch as lnpu
from lnpu_torch.recipes.arrays import Data, load
from lnpu_torch.recipes.augment import Augment, Moves
from lnpu_torch.recipes.batching import Division
from lnpu_torch.recipes.settings import DataConfig

Pair = tuple[Tensor, Tensor]
"""Normalised images, float32 [B, C, H, W], and their classes, int64 [B]."""


class Batches(Protocol):
    """This rank's share of every batch. What is random follows from the division's seed and the step alone.

    Processes that read images live as long as the generators that need them: close what is not used up.
    """

    classes: int
    shape: tuple[int, int, int]
    images: tuple[int, int]  # training and test images, over all ranks

    @property
    def sizes(self) -> list[int]:
        """Images in each training batch of an epoch, over all ranks."""

    def train(self, epoch: int, first: int = 0) -> Generator[Iterator[Pair], None, None]:
        """The batches of an epoch from step `first` on, shuffled and augmented, each as its pieces in time."""

    def test(self) -> Generator[Pair, None, None]:
        """The test images, as they are."""


def open_batches(
    config: DataConfig, division: Division, device: torch.device, warn: Callable[[str], None] = print
) -> Batches:
    """The images that `config` names; `warn` is told of images that are left out.

    Raises:
        ConfigError: they are missing or damaged, or too few for the division.
    """
    if config.kind == "imagefolder":
        from lnpu_torch.recipes.photographs import Photographs

        photographs: Batches = Photographs(config, division, device, warn)
        return photographs
    return BytesOnDevice(load(config), config, division, device)


class BytesOnDevice:
    """Images kept as bytes on the training device, and augmented there in batches."""

    def __init__(self, data: Data, config: DataConfig, division: Division, device: torch.device) -> None:
        self.classes, self.shape, self.images = data.classes, data.shape, (len(data.train), len(data.test))
        self._division, self._train, self._test = division, data.train.to(device), data.test.to(device)
        mean, std = (value.to(device) for value in data.normalisation())
        self._augment = Augment(config.crop, config.flip, config.cutout, mean, std)
        self.sizes = division.sizes(len(data.train))

    def train(self, epoch: int, first: int = 0) -> Generator[Iterator[Pair], None, None]:
        """As `Batches.train`."""
        batches = self._division.batches(len(self._train), epoch)
        for step, batch in enumerate(batches[first:], start=first):
            most = min(self._division.batch_size, len(self._train))
            moves = self._augment.draw(most, self._division.random(epoch, step))
            index = batch.to(self._train.labels.device)  # a copy is no operation
            yield (self._piece(index[own], moves.of(own)) for own in self._division.own(len(batch)))

    def test(self) -> Generator[Pair, None, None]:
        """As `Batches.test`."""
        for batch in self._division.test(len(self._test)):
            index = torch.tensor(batch, device=self._test.labels.device)
            yield self._augment.normalised(self._test.images[index]), self._test.labels[index]

    @lnpu.pause_op_tracing()
    def _piece(self, index: Tensor, moves: Moves) -> Pair:
        return self._augment(self._train.images[index], moves), self._train.labels[index]


def loader_speed(batches: Batches, device: torch.device, limit: int | None = None) -> tuple[int, float]:
    """Training images that come, on this rank, and how many a second: an epoch, or its first `limit` batches.

    The first batch is not timed: workers start in it.
    """
    images, started = 0, 0.0
    with contextlib.closing(batches.train(1)) as epoch:
        for step, pieces in enumerate(itertools.islice(epoch, limit)):
            for pixels, _ in pieces:
                images += len(pixels) if step else 0
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = started or time.perf_counter()
    return images, images / (time.perf_counter() - started)
