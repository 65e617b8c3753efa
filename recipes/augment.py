"""Augments and normalises whole batches of bytes on their device. It knows no files, and where the bytes come from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import lnpu_torch as lnpu


class Moves(NamedTuple):
    """What happens to each image of a batch: its shift and whether it is mirrored, [B]; its hole's middle, [B, 2]."""

    top: Tensor
    left: Tensor
    mirrored: Tensor
    hole: Tensor

    def of(self, part: slice) -> Moves:
        """The moves of some of the images."""
        return Moves(*(each[part] for each in self))


class Augment:
    """What the host does with images; no operation of the chip's, so it goes uncounted.

    Shifts by up to `crop` pixels, mirrors half of the images if `flip`, normalises, blanks a square of `cutout`.

    Args:
        mean, std: of the pixels, float32 [C, 1, 1] on the images' device.
    """

    def __init__(self, crop: int, flip: bool, cutout: int, mean: Tensor, std: Tensor) -> None:
        self.crop, self.flip, self.cutout, self.mean, self.std = crop, flip, cutout, mean, std
        self._random = torch.Generator(mean.device)

    @lnpu.pause_op_tracing()
    def draw(self, batch: int, seed: int) -> Moves:
        """What is random about a batch of at most that many images, on their device."""
        random, device = self._random.manual_seed(seed), self._random.device
        top, left = torch.randint(2 * self.crop + 1, (2, batch), generator=random, device=device)
        coin, *hole = torch.rand(3, batch, generator=random, device=device)
        return Moves(top, left, (coin < 0.5) & self.flip, torch.stack(hole, 1))

    @lnpu.pause_op_tracing()
    def __call__(self, images: Tensor, moves: Moves) -> Tensor:
        """A training batch: uint8 [B, C, H, W] -> float32."""
        images = self.normalised(move(images, moves, self.crop))
        return cut_out(images, moves.hole, self.cutout) if self.cutout else images

    @lnpu.pause_op_tracing()
    def normalised(self, images: Tensor) -> Tensor:
        """A test batch: uint8 [B, C, H, W] -> float32."""
        return (images.float() - self.mean) / self.std


def move(images: Tensor, moves: Moves, crop: int) -> Tensor:
    """Shift each image, zeros moving in from outside, and mirror those that are to be."""
    batch, _, height, width = images.shape
    if crop:
        rows = moves.top[:, None] + torch.arange(height, device=images.device)  # [B, H]
        columns = moves.left[:, None] + torch.arange(width, device=images.device)  # [B, W]
        padded = F.pad(images, (crop, crop, crop, crop))
        which = torch.arange(batch, device=images.device)[:, None, None]
        images = padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return torch.where(moves.mirrored[:, None, None, None], images.flip(-1), images).contiguous()


def cut_out(images: Tensor, hole: Tensor, side: int) -> Tensor:
    """Blank a square of each normalised image (DeVries & Taylor 2017): its middle is in the image, not always all.

    Args:
        images: [B, C, H, W], 0 being the mean.
        hole: the middle, as shares of height and width, [B, 2].
        side: of the square, in pixels.
    """
    inside = []
    for size, middle in zip(images.shape[2:], hole.unbind(1), strict=True):
        place = torch.arange(size, device=images.device) - (middle * size).long()[:, None] + side // 2  # [B, size]
        inside.append((place >= 0) & (place < side))
    return images.masked_fill(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0.0)
