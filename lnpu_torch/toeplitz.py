"""Convolutions over grids smaller than their kernels: each a product with the Toeplitz matrix of its weight, on a CPU.

Where every position of one grid meets every one of the other, that matrix is dense: 512 channels on a grid of 2 x 2,
padded by 1, take 4 multiplications for each output and channel by it, where a kernel of 3 x 3 that reaches over the
padding takes 9. Its rows are small positions and channels; its columns, big ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lnpu_torch import buffers
from lnpu_torch.geometry import Geometry
from lnpu_torch.product_ops import onednn_linear
from lnpu_torch.registry import fake, op

Sizes = tuple[int, ...]
LAST = torch.channels_last
FEW = 32
"""Samples from which on the products make up for writing the matrix (measured)."""


def suits(geometry: Geometry) -> bool:
    """Whether a two-dimensional convolution of float32 operands is faster so: by a quarter to six times (measured)."""
    positions = prod(geometry.big)
    if geometry.groups > 1 or 2 * positions > prod(geometry.kernel):
        return False
    return 0 < sum(geometry.meetings()) == prod(geometry.small) * positions and geometry.batch >= FEW


@op()
def toeplitz(product: str, a: Tensor, b: Tensor, geometry: Sequence[int]) -> Tensor:
    """A product of float32 operands named as in `accumulate`, where `suits`; in channels_last.

    The matrix is written for one small position at a time: that much of it stays in the caches.
    """
    shape = Geometry.unpack(geometry)
    offsets = _offsets(shape.big, shape.small, shape.kernel, shape.stride, shape.padding, shape.dilation)
    if product == "weight_from_both":
        return _weight_from_both(a, b, offsets, shape)
    kernels = b.permute(0, 2, 3, 1).flatten(1, 2)
    matrix = buffers.POOL.empty((len(b), len(offsets[0]), b.shape[1]), torch.float32)
    if product == "small_from_big":
        small, x = a.new_empty(len(offsets), len(a), len(b)), _rows(a)
        for out, each in zip(small, offsets, strict=True):
            out.copy_(onednn_linear(x, _block(kernels, each, matrix), None))
        return small.view(*shape.small, len(a), len(b)).permute(2, 3, 0, 1).contiguous(memory_format=LAST)
    errors = _rows(a).view(len(a), len(offsets), -1).unbind(1)
    parts = [onednn_linear(e, _block(kernels, each, matrix).T, None) for e, each in zip(errors, offsets, strict=True)]
    big = torch.stack(parts).sum(0)
    return big.view(len(a), *shape.big, -1).permute(0, 3, 1, 2).clone()


@fake("toeplitz")
def _(product: str, a: Tensor, b: Tensor, geometry: Sequence[int]) -> Tensor:
    return a.new_empty(Geometry.unpack(geometry).shape(product.split("_")[0])).contiguous(memory_format=LAST)


@register_flop_formula(torch.ops.lnpu.toeplitz)
def _(product: str, a: Any, b: Any, geometry: Sequence[int], **_: Any) -> int:
    """As torch has it of any convolution, padding included."""
    return 2 * Geometry.unpack(geometry).slots


@lru_cache(maxsize=256)
def _offsets(big: Sizes, small: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> list[Tensor]:
    """For each small position: which kernel offset joins it with each big one, int64."""

    def joining(at: Sizes, reached: Sizes) -> int:
        place = 0
        for p, h, size, step, before, spread in zip(at, reached, kernel, stride, padding, dilation, strict=True):
            place = place * size + (h + before - p * step) // spread
        return place

    smalls, bigs = (list(itertools.product(*map(range, grid))) for grid in (small, big))
    return [torch.tensor([joining(p, h) for h in bigs], device="cpu") for p in smalls]


def _block(kernels: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    """The rows of the matrix for one small position: kernels [K, offsets, C] -> [K, big positions * C], in `out`."""
    return torch.index_select(kernels, 1, offsets, out=out).flatten(1)


def _weight_from_both(big: Tensor, small: Tensor, offsets: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """The gradient of a weight: that of each block of the matrix, added where its elements came from."""
    x, errors = _rows(big).T, _rows(small).view(len(small), len(offsets), -1).unbind(1)
    sums = big.new_zeros(geometry.small_channels, prod(geometry.kernel), geometry.big_channels)
    for error, each in zip(errors, offsets, strict=True):
        sums.index_add_(1, each, onednn_linear(error.T, x, None).view(len(sums), len(each), -1))
    return sums.view(len(sums), *geometry.kernel, -1).permute(0, 3, 1, 2)


def _rows(grid: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, positions * C]."""
    return grid.permute(0, 2, 3, 1).flatten(1)
