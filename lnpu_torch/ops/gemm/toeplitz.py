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

from lnpu_torch.ops import buffers
from lnpu_torch.ops.gemm.half_precision import fast_linear
from lnpu_torch.ops.pair_counts.conv_shape import Geometry
from lnpu_torch.ops.registry import OPS, fake, op

Sizes = tuple[int, ...]
FEW = 32
"""Samples from which on the products make up for writing the matrix (measured)."""


def is_small(big: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether a grid has at most half as many positions as a kernel."""
    return 2 * prod(big) <= prod(kernel)


def suits(geometry: Geometry) -> bool:
    """Whether a two-dimensional convolution of float32 operands is faster so: by a quarter to six times (measured)."""
    if geometry.groups > 1 or not is_small(geometry.big, geometry.kernel):
        return False
    return 0 < sum(geometry.meetings()) == prod(geometry.small) * prod(geometry.big) and geometry.batch >= FEW


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
        small, x = _empty(a, shape.shape("small")), _rows(a)
        for out, each in zip(_positions(small), offsets, strict=True):
            out.copy_(fast_linear(x, _block(kernels, each, matrix)))
        return small
    big = _empty(a, shape.shape("big")).zero_()
    rows = _rows(big)
    for error, each in zip(_positions(a), offsets, strict=True):
        rows += fast_linear(error, _block(kernels, each, matrix).T)
    return big


@fake("toeplitz")
def _(product: str, a: Tensor, b: Tensor, geometry: Sequence[int]) -> Tensor:
    return _empty(a, Geometry.unpack(geometry).shape(product.split("_")[0]))


@register_flop_formula(OPS.toeplitz)
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
    x = _rows(big).T
    sums = big.new_zeros(geometry.small_channels, prod(geometry.kernel), geometry.big_channels)
    for error, each in zip(_positions(small), offsets, strict=True):
        sums.index_add_(1, each, fast_linear(error.T, x).view(len(sums), len(each), -1))
    return sums.view(len(sums), *geometry.kernel, -1).permute(0, 3, 1, 2)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A grid in channels_last that is written to by its `_rows` or `_positions`, and itself no view."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _rows(grid: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, positions * C]."""
    return grid.permute(0, 2, 3, 1).flatten(1)


def _positions(grid: Tensor) -> Sequence[Tensor]:
    """[N, C, H, W] -> [N, C] at each position."""
    return grid.permute(0, 2, 3, 1).flatten(1, 2).unbind(1)
