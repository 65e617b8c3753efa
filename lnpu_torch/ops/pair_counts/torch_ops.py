"""Counts a layer's steps, from sums over their operands' groups (see `reference`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

from torch import Tensor

from lnpu_torch.ops import dispatch as backends
from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape


def count_weight_step(
    counters: Tensor,
    sizes: Tensor,
    lanes: Tensor,
    step: int,
    position: Tensor,
    weight: Tensor,
    profile: Tensor | None,
    geometry: Sequence[int],
    side: str,
) -> None:
    """Count one of a layer's steps by `counting.weight_step`, and the lane profile of the operand that it streams.

    Args:
        counters: int64 [steps, ROWS, WIDTH], to the row of which that `counting.row_of` tells.
        sizes: int64 [steps, SIZES + 1, 3], on the host.
        lanes: int64 [steps, operands, LANE_CONFIGS].
    """
    loops = backends.cpu_module(position, "ops.pair_counts.cpu")
    if loops:
        state = loops.Counters(counters, sizes, lanes, step)
        loops.count_weight_step(state, position, weight, profile, tuple(geometry), side)
        return
    row = counting.row_of(sizes[step], _call_sizes(tuple(geometry), side, "weight"))
    _counting(position).add_weight_step(counters[step, row], position, weight, geometry, side)
    _add_lanes(lanes, step, profile)


def count_grid_step(
    counters: Tensor,
    sizes: Tensor,
    lanes: Tensor,
    step: int,
    big: Sequence[Tensor],
    small: Sequence[Tensor],
    first_profile: Tensor | None,
    second_profile: Tensor | None,
    geometry: Sequence[int],
    first: str,
) -> None:
    """Count a step by `counting.grid_step`, as `count_weight_step` does, and the lane profiles of both operands."""
    loops = backends.cpu_module(big[0], "ops.pair_counts.cpu")
    if loops:
        state, profiles = loops.Counters(counters, sizes, lanes, step), (first_profile, second_profile)
        loops.count_grid_step(state, big, small, profiles, tuple(geometry), first)
        return
    second = "small" if first == "big" else "big"
    row = counting.row_of(sizes[step], _call_sizes(tuple(geometry), first, second))
    _counting(big[0]).add_grid_step(counters[step, row], big, small, geometry, first)
    _add_lanes(lanes, step, first_profile, second_profile)


def _add_lanes(lanes: Tensor, step: int, *profiles: Tensor | None) -> None:
    for operand, profile in enumerate(profiles):
        if profile is not None:
            lanes[step, operand].add_(profile)


@lru_cache(maxsize=1024)
def _call_sizes(geometry: tuple[int, ...], first: str, second: str) -> tuple[int, int, int]:
    return ConvShape.unpack(geometry).call_sizes(first, second)


def _counting(sums: Tensor) -> ModuleType:
    """The module that counts a step from such sums, if compiled loops do not."""
    return backends.gpu_module(sums, "ops.pair_counts.gpu") or counting


def count_not_run(counters: Tensor, step: int, macs: int) -> None:
    """Count a step that nobody asked for, such as the first layer's grad_input."""
    row = counters[step, counting.NOT_RUN]
    row[:1] += 1  # by numbers, for which a GPU need not be waited for
    row[1:4:2] += macs
