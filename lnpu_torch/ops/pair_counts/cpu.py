"""`counting`'s sums on a CPU: puts tensors and sizes to the compiled loops. The same integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from lnpu_torch.ops import shared_loops
from lnpu_torch.ops.pair_counts.conv_shape import Geometry
from lnpu_torch.ops.threads import team

Array = np.ndarray[Any, Any]
Side = Literal["big", "small"]


class _Sizes(NamedTuple):
    """What the loops need to know of a geometry: see `count_loops`."""

    big_meets: Array
    small_meets: Array
    big_strides: Array
    small_strides: Array
    kernel: tuple[int, ...]
    met: Array
    slots: int
    inside: int
    batch: int
    big_others: int
    small_others: int
    elements: dict[str, int]


def add_weight_step(counter: Tensor, position: Tensor, weight: Tensor, packed: Sequence[int], side: Side) -> None:
    """`counting.add_weight_step`."""
    sizes, big = _sizes(tuple(packed)), side == "big"
    grid = _solid(position, 2)
    numbers = (
        sizes.slots,
        sizes.inside,
        sizes.big_others if big else sizes.small_others,
        sizes.batch,
        sizes.elements[side],
        sizes.elements["weight"],
    )
    meets, strides = (sizes.big_meets, sizes.big_strides) if big else (sizes.small_meets, sizes.small_strides)
    weights = weight.numpy().reshape(2, grid.shape[1], *sizes.kernel)
    threads = team(position.numel())
    shared_loops.add_weight_step(threads, counter.numpy(), grid, weights, meets, strides, sizes.met, numbers)


def add_grid_step(
    counter: Tensor, big: Sequence[Tensor], small: Sequence[Tensor], packed: Sequence[int], first: Side
) -> None:
    """`counting.add_grid_step`."""
    sizes = _sizes(tuple(packed))
    meets = (sizes.big_meets, sizes.small_meets, sizes.big_strides)
    sides = ("big", "small") if first == "big" else ("small", "big")
    elements = (sizes.elements[side] for side in sides)
    numbers = (sizes.slots, sizes.inside, sizes.big_others, sizes.small_others, *elements)
    positions = [_solid(grid[0], 2) for grid in (big, small)]
    samples = [_solid(grid[1].flatten(1, 2), 2) for grid in (big, small)]
    threads = team(small[1].numel())
    shared_loops.add_grid_step(threads, counter.numpy(), *positions, *samples, meets, numbers, first == "small")


def _solid(x: Tensor, leading: int) -> Array:
    """A contiguous array with exactly three dimensions after the leading ones."""
    shape = (*x.shape[:leading], *(1,) * (3 + leading - x.dim()), *x.shape[leading:])
    return np.ascontiguousarray(x.numpy().reshape(shape))


@lru_cache(maxsize=1024)
def _sizes(packed: tuple[int, ...]) -> _Sizes:
    geometry = Geometry.unpack(packed)
    missing = (1,) * (3 - len(geometry.kernel))
    kernel, strides = missing + geometry.kernel, missing + geometry.stride
    return _Sizes(
        _meets(geometry, "big"),
        _meets(geometry, "small"),
        np.asarray(strides, np.int64),
        np.ones(3, np.int64),
        kernel,
        np.asarray(geometry.meetings(), np.int64).reshape(kernel),
        geometry.slots,
        geometry.inside,
        geometry.batch,
        geometry.small_channels // geometry.groups,
        geometry.big_channels // geometry.groups,
        {tensor: geometry.elements(tensor) for tensor in ("big", "small", "weight")},
    )


def _meets(geometry: Geometry, side: Side) -> Array:
    """For each of three dimensions and each kernel offset: the first position that it meets, and how many."""
    missing = 3 - len(geometry.kernel)
    meets = np.full((3, max((1, *geometry.kernel)), 2), -1, np.int64)
    meets[:missing, 0] = (0, 1)
    for dim in range(len(geometry.kernel)):
        for offset, (small, big) in enumerate(geometry.meets(dim)):
            meets[missing + dim, offset] = ((big if side == "big" else small).start, small.stop - small.start)
    return meets
