"""LANE_CONFIGS: the lane counts, synchronisation intervals and balance groups that a lane profile is measured for.

A lane takes one channel. All lanes wait for the fullest after every `sync_interval` positions; before that, a load
balancer shares the work of each `balance_group` neighbouring lanes among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

RUN = 16
"""Positions of the shortest interval; non-zeros are counted in runs of so many."""
JOIN = 4
"""Intervals that make one of the next length."""
LONGEST = JOIN**2
"""Shortest intervals that make a longest one."""
SYNC_INTERVALS = (RUN, RUN * JOIN, RUN * LONGEST)
BALANCE_GROUPS = (1, 4, 16)
"""Lanes that share their work; 1 is a chip without balancer, or with its balancer off."""
LANES = 1024
"""The most lanes; the other counts are halves of it, down to one balance group."""


class LaneConfig(NamedTuple):
    """How many lanes there are, after how many positions they wait for each other, and how many share their work."""

    sync_interval: int
    balance_group: int
    lanes: int


def runs_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Of the counts of all shortest runs of an operand [N, C, *grid], or [rows, C], whose rows are the positions."""
    batch, channels, positions = (shape[0], shape[1], prod(shape[2:])) if len(shape) > 2 else (1, shape[1], shape[0])
    return batch, channels, -(-positions // RUN)


def _powers(first: int) -> list[int]:
    return [first << i for i in range((LANES // first).bit_length())]


LEVELS = tuple(len(_powers(group)) for group in BALANCE_GROUPS)
"""How many lane counts there are with each balance group."""
LANE_CONFIGS = tuple(
    LaneConfig(interval, group, lanes)
    for interval in SYNC_INTERVALS
    for group in BALANCE_GROUPS
    for lanes in _powers(group)
)
"""A profile's entries: by interval, then by balance group, then by lanes."""
