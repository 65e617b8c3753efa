"""`reference`'s sums on a CPU: puts tensors and sizes to the compiled loops. The same integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS
from lnpu_torch.ops.pair_counts import cpu_loops
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape
from lnpu_torch.ops.pair_counts.reference import CALL, ROWS, SIZES, WIDTH, StepCounters
from lnpu_torch.ops.parallel import team

Array = np.ndarray[Any, Any]


def count_weight_step(
    to: StepCounters,
    position: Tensor,
    weight: Tensor,
    profile: Tensor | None,
    geometry: Sequence[int],
    side: str,
) -> None:
    """`Backend.count_weight_step`."""
    call, shape, constants = _weight_step(tuple(geometry), side)
    counting = (*_addresses(to), call)
    position, weight = position.contiguous(), weight.contiguous()
    places = (position.data_ptr(), weight.data_ptr(), shape, 0 if profile is None else profile.data_ptr())
    cpu_loops.add_weight_step(team(position.numel()), counting, *places, *constants)


def count_grid_step(
    to: StepCounters,
    conv_input: Sequence[Tensor],
    conv_output: Sequence[Tensor],
    profiles: Sequence[Tensor | None],
    geometry: Sequence[int],
    first: str,
) -> None:
    """`Backend.count_grid_step`."""
    call, shapes, samples, constants = _grid_step(tuple(geometry), first)
    counting = (*_addresses(to), call)
    few = conv_input[1].dtype == conv_output[1].dtype == torch.uint8
    grids, kept = [], []  # as long as their addresses are of use
    ordered = profiles if first == "conv_input" else (profiles[1], profiles[0])
    for (position, sample), shape, profile in zip((conv_input, conv_output), shapes, ordered, strict=True):
        kept += [position.contiguous(), sample.contiguous() if few else sample.to(torch.int32).contiguous()]
        place = 0 if profile is None else profile.data_ptr()
        grids.append((kept[-2].data_ptr(), shape, kept[-1].data_ptr(), samples, few, place))
    cpu_loops.add_grid_step(team(conv_output[1].numel()), counting, *grids, *constants, first == "conv_output")


def _addresses(to: StepCounters) -> tuple[int, int, int]:
    """Of a step's counters, of the sizes of call that their rows stand for, and of its lane profiles."""
    counters, sizes, lanes, step = to
    return (
        counters.data_ptr() + 8 * step * ROWS * WIDTH,
        sizes.data_ptr() + 8 * step * (SIZES + 1) * CALL,
        lanes.data_ptr() + 8 * step * 2 * len(LANE_CONFIGS),
    )


@lru_cache(maxsize=4096)
def _weight_step(packed: tuple[int, ...], side: str) -> tuple[Any, ...]:
    """What the loops need to know of a geometry: sizes of the call, of the grid, and the rest in their order."""
    geometry = ConvShape.unpack(packed)
    missing = (1,) * (3 - len(geometry.kernel))
    strides = np.asarray(missing + geometry.stride if side == "conv_input" else (1, 1, 1), np.int64)
    others = (geometry.out_channels if side == "conv_input" else geometry.in_channels) // geometry.groups
    elements = (geometry.elements(side), geometry.elements("weight"))
    met = np.asarray(geometry.overlaps(), np.int64).reshape(missing + geometry.kernel)
    numbers = (geometry.macs, geometry.inside, others, geometry.batch, *elements)
    call = geometry.call_sizes(side, "weight")
    return call, _solid(geometry, side), (_meets(geometry, side), strides, met, numbers)


@lru_cache(maxsize=4096)
def _grid_step(packed: tuple[int, ...], first: str) -> tuple[Any, ...]:
    """The same: sizes of the call, of both grids, the number of their samples, and the rest."""
    geometry = ConvShape.unpack(packed)
    sides: tuple[str, str] = ("conv_input", "conv_output") if first == "conv_input" else ("conv_output", "conv_input")
    others = (geometry.out_channels // geometry.groups, geometry.in_channels // geometry.groups)
    numbers = (geometry.macs, geometry.inside, *others, *(geometry.elements(side) for side in sides))
    strides = np.asarray((1,) * (3 - len(geometry.kernel)) + geometry.stride, np.int64)
    meets = (_meets(geometry, "conv_input"), _meets(geometry, "conv_output"), strides, np.ones(3, np.int64))
    shapes = (_solid(geometry, "conv_input"), _solid(geometry, "conv_output"))
    return geometry.call_sizes(*sides), shapes, geometry.batch * geometry.groups, (meets, numbers)


def _solid(geometry: ConvShape, side: str) -> tuple[int, int, int, int]:
    """A grid's channels, and exactly three dimensions after them."""
    _, channels, *grid = geometry.shape(side)
    depth, height, width = (*(1,) * (3 - len(grid)), *grid)
    return channels, depth, height, width


def _meets(geometry: ConvShape, side: str) -> Array:
    """For each of three dimensions and each kernel offset: the first position that it meets, and how many."""
    missing = 3 - len(geometry.kernel)
    meets = np.full((3, max((1, *geometry.kernel)), 2), -1, np.int64)
    meets[:missing, 0] = (0, 1)
    for dim in range(len(geometry.kernel)):
        for offset, (conv_output, conv_input) in enumerate(geometry.overlap(dim)):
            meets[missing + dim, offset] = (
                (conv_input if side == "conv_input" else conv_output).start,
                conv_output.stop - conv_output.start,
            )
    return meets
