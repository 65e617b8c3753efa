"""LaneProfile: how long lanes were held by their fullest one, for any lane count. It knows no tensors and no prices."""

from __future__ import annotations

from itertools import pairwise
from math import log2
from typing import Annotated, Self

from pydantic import Field, model_validator

from lnpu_torch.counts.lane_configs import MEMBERS, Member
from lnpu_torch.files import MOST, ConfigError, Frozen

Cycles = Annotated[int, Field(ge=0, le=MOST)]
PLACES = {member: place for place, member in enumerate(MEMBERS)}


class LaneProfile(Frozen):
    """An operand's lane-cycles, as `lanes.profile` measures them, by member of the family, summed over all calls.

    A lane-cycle is one lane that has a channel, for the time of one non-zero, whether it works or waits.
    """

    channels: Annotated[int, Field(ge=0, le=MOST)]
    lane_cycles: Annotated[tuple[Cycles, ...], Field(min_length=len(MEMBERS), max_length=len(MEMBERS))]

    @model_validator(mode="after")
    def _one_lane_never_waits(self) -> Self:
        if len({cycles for member, cycles in self._entries() if member.lanes == 1}) != 1:
            raise ValueError("lane_cycles: one lane does the same work whatever the run")
        return self

    @property
    def work(self) -> int:
        """Non-zeros of the operand: lane-cycles of a single lane, which never waits."""
        return self.lane_cycles[0]

    def __add__(self, other: LaneProfile) -> LaneProfile:
        """The sum over the calls of both. Raises ConfigError if their channels differ."""
        if self.channels != other.channels:
            raise ConfigError(f"lane profiles of {self.channels} and of {other.channels} channels: not one model")
        sums = (mine + theirs for mine, theirs in zip(self.lane_cycles, other.lane_cycles, strict=True))
        return self.model_copy(update={"lane_cycles": tuple(sums)})

    def held(self, run: int, balancer: int, lanes: int) -> float:
        """Lane-cycles of so many lanes (a multiple of the balancer's); exact at the family's members.

        Between them: passes of `lanes` channels, and one of what is left over; a lane's share of a pass of k channels
        is interpolated in log k.
        """
        if (place := PLACES.get(Member(run, balancer, lanes))) is not None:
            return self.lane_cycles[place]
        shares, rest = self._shares(run, balancer), self.channels % lanes
        return (self.channels - rest) * _at(lanes, shares) + rest * _at(rest, shares)

    def _shares(self, run: int, balancer: int) -> dict[int, float]:
        """Lane-cycles of one channel in a pass of k channels, if all passes were like that, for each known k."""
        shares: dict[int, float] = {}
        for member, cycles in self._entries():
            if (member.run, member.balancer) != (run, balancer) or not cycles:
                continue
            if not shares or member.lanes >= self.channels:
                shares[min(member.lanes, self.channels)] = cycles / self.channels
            else:
                rest = self.channels % member.lanes
                shares[member.lanes] = (cycles - rest * _at(rest, shares)) / (self.channels - rest)
        return shares

    def _entries(self) -> zip[tuple[Member, int]]:
        return zip(MEMBERS, self.lane_cycles, strict=True)


def _at(k: int, shares: dict[int, float]) -> float:
    """The share at k, linear in log k between what is known, and constant beyond."""
    for (low, before), (high, after) in pairwise(shares.items()):
        if low < k < high:
            return before + (after - before) * log2(k / low) / log2(high / low)
    known = [share for lanes, share in shares.items() if lanes <= k]
    return known[-1] if known else next(iter(shares.values()), 0.0)
