"""`counting`'s sums, compiled: the same integers, without a dozen small torch calls for each step of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lnpu_torch import loops
from lnpu_torch.cpu import split
from lnpu_torch.geometry import Geometry

Array = np.ndarray[Any, Any]
Side = Literal["big", "small"]


def add_weight_step(counter: Tensor, position: Tensor, weight: Tensor, sizes: Sequence[int], side: Side) -> None:
    """`counting.add_weight_step`."""
    geometry = Geometry.unpack(sizes)
    reached, weights = _reached(position, geometry, side), weight.numpy().reshape(2, -1)
    others = (geometry.small_channels if side == "big" else geometry.big_channels) // geometry.groups
    met = np.asarray(geometry.meetings())
    weight_only = weights.reshape(2, -1, len(met)).sum(1, dtype=np.int64) @ met * geometry.batch
    table = _table(loops.dots(reached, weights), reached.sum(1) * others, weight_only, geometry.inside)
    counter += _record(geometry, table, _elements(position, geometry, side), _elements(weight, geometry, "weight"))


def add_grid_step(
    counter: Tensor, big: Sequence[Tensor], small: Sequence[Tensor], sizes: Sequence[int], first: Side
) -> None:
    """`counting.add_grid_step`."""
    geometry = Geometry.unpack(sizes)
    samples = [_solid(grid[1].flatten(1, 2), 2) for grid in (big, small)]
    meets = (_meets(geometry, "big"), _meets(geometry, "small"), _strides(geometry))

    def run(start: int, stop: int) -> Array:
        both = np.zeros((2, 2), np.int64)
        loops.meetings(samples[0][:, start:stop], samples[1][:, start:stop], *meets, both)
        return both

    both = sum(split(run, samples[0].shape[1], small[1].numel()))
    big_only = _reached(big[0], geometry, "big").sum(1) * (geometry.small_channels // geometry.groups)
    small_only = _reached(small[0], geometry, "small").sum(1) * (geometry.big_channels // geometry.groups)
    table = _table(both, big_only, small_only, geometry.inside)
    counts = [_elements(big[0], geometry, "big"), _elements(small[0], geometry, "small")]
    counter += _record(geometry, table, *counts) if first == "big" else _record(geometry, table.T, *counts[::-1])


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


def _table(both: Any, first: Array, second: Array, inside: int) -> Array:
    """`counting.pair_table`."""
    table = np.empty((3, 3), np.int64)
    table[1:, 1:] = both
    table[1:, 0] = first - both.sum(1)
    table[0, 1:] = second - both.sum(0)
    table[0, 0] = inside - first.sum() - table[0, 1:].sum()
    return table


def _elements(position: Tensor, geometry: Geometry, tensor: str) -> list[int]:
    """`counting.elements`."""
    fp8, wide = position.numpy().reshape(2, -1).sum(1, dtype=np.int64).tolist()
    return [geometry.elements(tensor) - fp8 - wide, fp8, wide]


def _record(geometry: Geometry, table: Array, first: list[int], second: list[int]) -> Tensor:
    slots = geometry.slots
    return torch.tensor([1, slots, slots - geometry.inside, 0, *table.flatten().tolist(), *first, *second])
