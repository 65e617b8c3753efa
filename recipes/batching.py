"""Divides a run's images into batches, and each batch among ranks and pieces in time. It knows numbers, no images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lnpu_torch.files import ConfigError

LEAST = 2
"""Images in a piece at least: of a single one, batch norm could make nothing."""


@dataclass(frozen=True)
class Division:
    """One batch is `accumulate` pieces in time, each of them a share for every rank; all shares are equally large.

    The order of an epoch and what is random about a step follow from the seed and their numbers alone. So a resumed run
    sees what the first would have seen, and any number of ranks sees the same batches.

    Raises:
        ConfigError: `batch_size` cannot be divided so.
    """

    batch_size: int
    accumulate: int = 1
    ranks: int = 1
    rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.shares or self.batch_size < LEAST * self.shares:
            parts = f"{self.ranks} rank(s) x {self.accumulate} piece(s) in time (accumulate)"
            near = max(LEAST, round(self.batch_size / self.shares)) * self.shares
            raise ConfigError(
                f"batch_size: {self.batch_size} images cannot be shared evenly among {parts}, at least {LEAST} each: "
                f"take a multiple of {self.shares}, such as batch_size={near}"
            )

    @property
    def shares(self) -> int:
        return self.accumulate * self.ranks

    def sizes(self, images: int) -> list[int]:
        """Sizes of an epoch's batches. The last may be smaller; what cannot be shared evenly is left out of it."""
        full, rest = divmod(images, self.batch_size)
        rest -= rest % self.shares
        sizes = [self.batch_size] * full + [rest] * (rest >= LEAST * self.shares)
        if not sizes:
            raise ConfigError(f"data: {images} training image(s) are too few for {self.shares} share(s) of a batch")
        return sizes

    def own(self, size: int) -> list[slice]:
        """This rank's pieces of a batch of that size."""
        share = size // self.shares
        starts = [(piece * self.ranks + self.rank) * share for piece in range(self.accumulate)]
        return [slice(start, start + share) for start in starts]

    def batches(self, images: int, epoch: int) -> tuple[Tensor, ...]:
        """Indices of the images of each batch of an epoch, shuffled: int64, on the CPU."""
        random, sizes = torch.Generator().manual_seed(self.random(epoch)), self.sizes(images)
        batches: tuple[Tensor, ...] = torch.randperm(images, generator=random)[: sum(sizes)].split(sizes)
        return batches

    def random(self, *numbers: int) -> int:
        """A seed of its own for each sequence of numbers, such as an epoch and a step."""
        return int(np.random.SeedSequence([self.seed, *numbers]).generate_state(1, np.uint64)[0]) >> 1

    def test(self, images: int) -> list[list[int]]:
        """Indices of this rank's share of the test images, in batches as large as its share of a training batch."""
        own = range(self.rank, images, self.ranks)
        size = self.batch_size // self.shares
        return [list(own[start : start + size]) for start in range(0, len(own), size)]
