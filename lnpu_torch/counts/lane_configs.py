"""The family of lane counts, run lengths and balancer groups that a lane profile is measured for. Integers only.

A lane takes one channel. Lanes side by side wait for each other after every run of so many positions; before that, a
load balancer shares the work of so many neighbouring lanes among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

RUN = 16
"""Positions of the shortest run."""
JOIN = 4
"""Runs that make one of the next length."""
LONGEST = JOIN**2
"""Shortest runs that make a longest one."""
RUNS = (RUN, RUN * JOIN, RUN * LONGEST)
BALANCERS = (1, 4, 16)
"""Lanes that share their work; 1 is a chip without balancer, or with its balancer off."""
LANES = 1024
"""The most lanes; the others are halves of it, down to one balancer group."""


class Member(NamedTuple):
    """One chip of the family."""

    run: int
    balancer: int
    lanes: int


def runs_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Of the counts of all shortest runs of an operand [N, C, *grid], or [rows, C], whose rows are the positions."""
    batch, channels, positions = (shape[0], shape[1], prod(shape[2:])) if len(shape) > 2 else (1, shape[1], shape[0])
    return batch, channels, -(-positions // RUN)


def _powers(first: int) -> list[int]:
    return [first << i for i in range((LANES // first).bit_length())]


LEVELS = tuple(len(_powers(balancer)) for balancer in BALANCERS)
"""How many lane counts there are with each balancer."""
MEMBERS = tuple(Member(run, balancer, lanes) for run in RUNS for balancer in BALANCERS for lanes in _powers(balancer))
"""A profile's entries: by run, then by balancer, then by lanes."""
