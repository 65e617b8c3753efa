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

LAST = torch.channels_last
FEW = 32
"""Samples from which on the products make up for writing the matrix (measured)."""


def suits(geometry: Geometry) -> bool:
    """Whether a two-dimensional convolution of float32 operands is faster so: by a quarter to six times (measured)."""
    positions = prod(geometry.big)
    if geometry.groups > 1 or geometry.batch < FEW or 2 * positions > prod(geometry.kernel):
        return False
    return 0 < sum(geometry.meetings()) == prod(geometry.small) * positions


@op()
def toeplitz(product: str, a: Tensor, b: Tensor, geometry: Sequence[int]) -> Tensor:
    """A product of float32 operands named as in `accumulate`, where `suits`; in channels_last."""
    shape = Geometry.unpack(geometry)
    taps = _taps(shape)
    if product == "weight_from_both":
        return _sums(onednn_linear(_rows(b).T, _rows(a).T, None), taps, shape)
    matrix = _matrix(b, taps)
    if product == "small_from_big":
        return _grid(onednn_linear(_rows(a), matrix, None), shape.shape("small"))
    return _grid(onednn_linear(_rows(a), matrix.T, None), shape.shape("big"))


@fake("toeplitz")
def _(product: str, a: Tensor, b: Tensor, geometry: Sequence[int]) -> Tensor:
    return a.new_empty(Geometry.unpack(geometry).shape(product.split("_")[0])).contiguous(memory_format=LAST)


@register_flop_formula(torch.ops.lnpu.toeplitz)
def _(product: str, a: Any, b: Any, geometry: Sequence[int], **_: Any) -> int:
    """As torch has it of any convolution, padding included."""
    return 2 * Geometry.unpack(geometry).slots


@lru_cache(maxsize=256)
def _taps(geometry: Geometry) -> tuple[Tensor, ...]:
    """For each small position: which kernel offset joins it with each big one, int64."""

    def offset(small: Sequence[int], big: Sequence[int]) -> int:
        place = 0
        for p, h, size, stride, before, dilation in zip(
            small, big, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
        ):
            place = place * size + (h + before - p * stride) // dilation
        return place

    bigs = list(itertools.product(*map(range, geometry.big)))
    return tuple(torch.tensor([offset(p, h) for h in bigs]) for p in itertools.product(*map(range, geometry.small)))


def _matrix(weight: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """[small positions * channels, big positions * channels]."""
    kernels = weight.permute(0, 2, 3, 1).flatten(1, 2)
    matrix = buffers.POOL.empty((len(taps), len(weight), len(taps[0]), weight.shape[1]), torch.float32)
    for rows, offsets in zip(matrix, taps, strict=True):
        torch.index_select(kernels, 1, offsets, out=rows)
    return matrix.flatten(2).flatten(0, 1)


def _sums(matrix: Tensor, taps: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """The gradient of a weight from that of its matrix: sums over the pairs of positions that an offset joins."""
    small, big = geometry.small_channels, geometry.big_channels
    sums = matrix.new_zeros(small, prod(geometry.kernel), big)
    for rows, offsets in zip(matrix.view(len(taps), small, -1, big), taps, strict=True):
        sums.index_add_(1, offsets, rows)
    return sums.view(small, *geometry.kernel, big).permute(0, 3, 1, 2)


def _rows(grid: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, positions * C]."""
    return grid.permute(0, 2, 3, 1).flatten(1)


def _grid(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse, in memory of its own: no view, which autograd would mind."""
    batch, channels, *grid = shape
    return rows.view(batch, *grid, channels).permute(0, 3, 1, 2).clone()
