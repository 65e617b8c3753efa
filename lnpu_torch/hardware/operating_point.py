"""A chip's voltage, and what follows from it: its clock, and how its energies scale."""

from __future__ import annotations

import math
from typing import Self

from pydantic import model_validator

from lnpu_torch.files import Frozen
from lnpu_torch.hardware.sourced_value import Positive, SourcedValue


class Point(Frozen):
    """A voltage at which clock and power of the whole chip are known."""

    voltage_v: SourcedValue[Positive]
    clock_hz: SourcedValue[Positive]
    power_w: SourcedValue[Positive]

    @property
    def energy_per_cycle_j(self) -> float:
        return self.power_w.value / self.clock_hz.value


class OperatingPoint(Frozen):
    """The voltage that a chip runs at, between the `low` and the `high` end of its range.

    Clock and energy are interpolated between the two ends as powers of the voltage, without a term for leakage. The
    energies in the chip's file hold at the low end. Without a high end (null) there is one voltage, the low end's.
    """

    voltage_v: SourcedValue[Positive]
    low: Point
    high: Point | None

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        low, high = self.low.voltage_v.value, self.highest_v
        if self.high and not low < high:
            raise ValueError(f"low.voltage_v {low:g} is not below high.voltage_v {high:g}")
        if not low <= self.voltage_v.value <= high:
            raise ValueError(f"voltage_v {self.voltage_v.value:g} is outside the chip's range, {low:g} ... {high:g} V")
        return self

    @property
    def highest_v(self) -> float:
        """The highest voltage that the chip runs at."""
        return (self.high or self.low).voltage_v.value

    @property
    def clock_hz(self) -> float:
        """The clock at this voltage."""
        if self.high is None:
            return self.low.clock_hz.value
        return self._between(self.low.clock_hz.value, self.high.clock_hz.value)

    @property
    def energy_scale(self) -> float:
        """What energies at the low end are multiplied with at this voltage."""
        if self.high is None:
            return 1.0
        return self._between(1.0, self.high.energy_per_cycle_j / self.low.energy_per_cycle_j)

    @property
    def power_w(self) -> float:
        """The chip's power at this voltage."""
        return self.low.energy_per_cycle_j * self.energy_scale * self.clock_hz

    def _between(self, low: float, high: float) -> float:
        """A quantity at this voltage from those at both ends, on a line between their logarithms; exact at the ends."""
        assert self.high is not None
        voltage, ends = self.voltage_v.value, (self.low.voltage_v.value, self.high.voltage_v.value)
        if voltage in ends:
            return (low, high)[ends.index(voltage)]
        share = math.log(voltage / ends[0]) / math.log(ends[1] / ends[0])
        return low * math.pow(high / low, share)
