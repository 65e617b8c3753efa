"""LaneProfile: how long lanes work and wait for the fullest of them, for any lane count."""

from __future__ import annotations

from itertools import pairwise
from math import log2
from typing import Annotated, Self

from pydantic import Field, model_validator

from lnpu_torch.counts.lane_configs import LANE_CONFIGS, LaneConfig
from lnpu_torch.files import MOST, ConfigError, Frozen

Cycles = Annotated[int, Field(ge=0, le=MOST)]
PLACES = {config: place for place, config in enumerate(LANE_CONFIGS)}
ONE_LANE = [place for config, place in PLACES.items() if config.lanes == 1]


class LaneProfile(Frozen):
    """An operand's lane-cycles for each of LANE_CONFIGS, summed over all calls.

    A lane-cycle is one lane that has a channel, for the time of one non-zero, whether it works or waits.
    """

    channels: Annotated[int, Field(ge=0, le=MOST)]
    cycles_by_config: Annotated[tuple[Cycles, ...], Field(min_length=len(LANE_CONFIGS), max_length=len(LANE_CONFIGS))]

    @model_validator(mode="after")
    def _one_lane_never_waits(self) -> Self:
        if len({self.cycles_by_config[place] for place in ONE_LANE}) != 1:
            raise ValueError("cycles_by_config: one lane does the same work whatever the interval")
        return self

    @property
    def work(self) -> int:
        """Non-zeros of the operand: lane-cycles of a single lane, which never waits."""
        return self.cycles_by_config[0]

    def __add__(self, other: LaneProfile) -> LaneProfile:
        """The sum over the calls of both. Raises ConfigError if their channels differ."""
        if self.channels != other.channels:
            raise ConfigError(f"lane profiles of {self.channels} and of {other.channels} channels: not one model")
        sums = (mine + theirs for mine, theirs in zip(self.cycles_by_config, other.cycles_by_config, strict=True))
        return self.model_copy(update={"cycles_by_config": tuple(sums)})

    def lane_cycles(self, config: LaneConfig) -> float:
        """Lane-cycles of these lanes, a multiple of the balance group; exact for LANE_CONFIGS.

        Between those: passes of `lanes` channels, and one of what is left over; a lane's share of a pass of k channels
        is interpolated in log k.
        """
        if (place := PLACES.get(config)) is not None:
            return self.cycles_by_config[place]
        lanes, shares = config.lanes, self._shares(config)
        rest = self.channels % lanes
        return (self.channels - rest) * _at(lanes, shares) + rest * _at(rest, shares)

    def _shares(self, wanted: LaneConfig) -> dict[int, float]:
        """Lane-cycles of one channel in a pass of k channels, if all passes were like that, for each known k."""
        shares: dict[int, float] = {}
        for config, cycles in self._entries():
            if config[:2] != wanted[:2] or not cycles:
                continue
            if not shares or config.lanes >= self.channels:
                shares[min(config.lanes, self.channels)] = cycles / self.channels
            else:
                rest = self.channels % config.lanes
                shares[config.lanes] = (cycles - rest * _at(rest, shares)) / (self.channels - rest)
        return shares

    def _entries(self) -> zip[tuple[LaneConfig, int]]:
        return zip(LANE_CONFIGS, self.cycles_by_config, strict=True)


def _at(k: int, shares: dict[int, float]) -> float:
    """The share at k, linear in log k between what is known, and constant beyond."""
    for (low, before), (high, after) in pairwise(shares.items()):
        if low < k < high:
            return before + (after - before) * log2(k / low) / log2(high / low)
    known = [share for lanes, share in shares.items() if lanes <= k]
    return known[-1] if known else next(iter(shares.values()), 0.0)
