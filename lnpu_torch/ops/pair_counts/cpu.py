"""`counting`'s sums on a CPU: puts tensors and sizes to the compiled loops. The same integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import MEMBERS
from lnpu_torch.ops import shared_loops
from lnpu_torch.ops.pair_counts.conv_shape import Geometry
from lnpu_torch.ops.pair_counts.reference import ROWS, SIZES, WIDTH
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


class _Counters(NamedTuple):
    """Where a step is counted: a layer's counters, call sizes and lane profiles, the step's place, the call's sizes."""

    counters: Tensor
    sizes: Tensor
    lanes: Tensor
    step: int
    call: tuple[int, int, int]

    def addresses(self) -> tuple[int, int, int, tuple[int, int, int]]:
        """Of the step's part of each."""
        step = self.step
        return (
            self.counters.data_ptr() + 8 * step * ROWS * WIDTH,
            self.sizes.data_ptr() + 8 * step * (SIZES + 1) * 3,
            self.lanes.data_ptr() + 8 * step * 2 * len(MEMBERS),
            self.call,
        )


def count_weight_step(
    state: Sequence[Any],
    position: Tensor,
    weight: Tensor,
    profile: Tensor | None,
    packed: Sequence[int],
    side: Side,
) -> None:
    """`torch_ops.count_weight_step`; `state`: what a `_Counters` has."""
    sizes, big = _sizes(tuple(packed)), side == "big"
    position, weight = position.contiguous(), weight.contiguous()
    elements = (sizes.elements[side], sizes.elements["weight"])
    numbers = (sizes.slots, sizes.inside, sizes.big_others if big else sizes.small_others, sizes.batch, *elements)
    meets, strides = (sizes.big_meets, sizes.big_strides) if big else (sizes.small_meets, sizes.small_strides)
    shared_loops.add_weight_step(
        team(position.numel()),
        _Counters(*state).addresses(),
        position.data_ptr(),
        weight.data_ptr(),
        _solid(position.shape[1:]),
        _address(profile),
        meets,
        strides,
        sizes.met,
        numbers,
    )


def count_grid_step(
    state: Sequence[Any],
    big: Sequence[Tensor],
    small: Sequence[Tensor],
    profiles: Sequence[Tensor | None],
    packed: Sequence[int],
    first: Side,
) -> None:
    """`torch_ops.count_grid_step`; `state`: what a `_Counters` has. The profiles are of first and second operand."""
    sizes = _sizes(tuple(packed))
    sides = ("big", "small") if first == "big" else ("small", "big")
    elements = (sizes.elements[side] for side in sides)
    numbers = (sizes.slots, sizes.inside, sizes.big_others, sizes.small_others, *elements)
    in_order = profiles if first == "big" else profiles[::-1]
    few = big[1].dtype == small[1].dtype == torch.uint8
    held = [[x.contiguous() for x in grid] for grid in (big, small)]
    held = held if few else [[position, sample.to(torch.int32)] for position, sample in held]
    grids = [
        (
            position.data_ptr(),
            _solid(position.shape[1:]),
            sample.data_ptr(),
            sample.shape[1] * sample.shape[2],
            few,
            _address(lanes),
        )
        for (position, sample), lanes in zip(held, in_order, strict=True)
    ]
    meets = (sizes.big_meets, sizes.small_meets, sizes.big_strides)
    state = _Counters(*state).addresses()
    shared_loops.add_grid_step(team(small[1].numel()), state, *grids, meets, numbers, first == "small")


def _solid(shape: torch.Size) -> tuple[int, int, int, int]:
    """A channel count, and exactly three dimensions after it."""
    channels, *grid = shape
    depth, height, width = (*(1,) * (3 - len(grid)), *grid)
    return channels, depth, height, width


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
