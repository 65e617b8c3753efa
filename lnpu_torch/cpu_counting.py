"""`counting`'s sums, compiled: the same integers, without a dozen small torch calls for each step of each layer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lnpu_torch import loops
from lnpu_torch.counting import pair_table
from lnpu_torch.cpu import split
from lnpu_torch.geometry import Geometry

Array = np.ndarray[Any, Any]
Side = Literal["big", "small"]


def grid_by_weight(position: Tensor, weight: Tensor, geometry: Geometry, side: Side) -> Tensor:
    """`counting.grid_by_weight`."""
    sums = _reached(position, geometry, side)
    others = (geometry.small_channels if side == "big" else geometry.big_channels) // geometry.groups
    weights = weight.reshape(2, -1).numpy().astype(np.float64)
    both = sums.astype(np.float64) @ weights.T  # exact: every sum is below 2^53
    met = np.tile(np.asarray(geometry.meetings(), np.float64), len(weights[0]) // max(1, len(geometry.meetings())))
    return _table(both, sums.sum(1) * others, (weights @ met) * geometry.batch, geometry)


def grid_by_grid(
    big_sample: Tensor, small_sample: Tensor, big_position: Tensor, small_position: Tensor, geometry: Geometry
) -> Tensor:
    """`counting.grid_by_grid`."""
    big, small = (_solid(x.flatten(1, 2), 2) for x in (big_sample, small_sample))
    arguments = (_meets(geometry, "big"), _meets(geometry, "small"), _strides(geometry))

    def run(start: int, stop: int) -> Array:
        both = np.zeros((2, 2), np.int64)
        loops.meetings(big[:, start:stop], small[:, start:stop], *arguments, both)
        return both

    both = sum(split(run, big.shape[1], small.size))
    big_only = _reached(big_position, geometry, "big").sum(1) * (geometry.small_channels // geometry.groups)
    small_only = _reached(small_position, geometry, "small").sum(1) * (geometry.big_channels // geometry.groups)
    return _table(both, big_only, small_only, geometry)


def _reached(position: Tensor, geometry: Geometry, side: Side) -> Array:
    """`counting._reached`: int64 [2, channels * offsets]."""
    grid = _solid(position.flatten(0, 1), 1)
    sums = np.empty((len(grid), *((1,) * (3 - len(geometry.kernel)) + geometry.kernel)), np.int64)
    strides = _strides(geometry) if side == "big" else np.ones(3, np.int64)
    loops.reached(grid, _meets(geometry, side), strides, sums)
    return sums.reshape(2, -1)


def _solid(x: Tensor, leading: int) -> Array:
    """A tensor with exactly three dimensions after the leading ones."""
    return x.reshape(*x.shape[:leading], *(1,) * (3 + leading - x.dim()), *x.shape[leading:]).numpy()


@lru_cache(maxsize=1024)
def _meets(geometry: Geometry, side: Side) -> Array:
    """For each of three dimensions and each kernel offset: the first position that it meets, and how many."""
    missing = 3 - len(geometry.kernel)
    meets = np.zeros((3, max((1, *geometry.kernel)), 2), np.int64)
    meets[:missing, 0, 1] = 1
    for dim in range(len(geometry.kernel)):
        for offset, (small, big) in enumerate(geometry.meets(dim)):
            meets[missing + dim, offset] = ((big if side == "big" else small).start, small.stop - small.start)
    return meets


def _strides(geometry: Geometry) -> Array:
    return np.asarray((1,) * (3 - len(geometry.stride)) + geometry.stride, np.int64)


def _table(both: Array, first: Array, second: Array, geometry: Geometry) -> Tensor:
    tables = [torch.from_numpy(np.asarray(each, np.int64)) for each in (both, first, second)]
    return pair_table(tables[0], tables[1], tables[2], geometry.inside)
