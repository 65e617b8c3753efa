"""Energies of single circuits from published tables, for a model that uses no figure of the chip itself."""

from __future__ import annotations

import math
from typing import Self

from pydantic import model_validator

from lnpu_torch.files import Frozen
from lnpu_torch.hardware.sourced_value import Natural, NotNegative, Positive, SourcedValue

Polynomial = tuple[float, float, float]
"""Coefficients of V^2, V and 1."""


class Process(Frozen):
    """Energy of a process against voltage, as a polynomial whose unit cancels in a ratio of two (Stillmaker & Baas)."""

    polynomial: SourcedValue[Polynomial]

    def energy(self, voltage: float) -> float:
        a, b, c = self.polynomial.value
        return a * voltage**2 + b * voltage + c


class Arithmetic(Frozen):
    """Circuits in the process and at the voltage that they were measured in, and the chip's own process.

    `fp8_multiply_pj` is the multiplication that runs at FP8's rate, `accumulate_pj` the addition after either.
    """

    fp8_multiply_pj: SourcedValue[NotNegative]
    fp16_multiply_pj: SourcedValue[NotNegative]
    accumulate_pj: SourcedValue[NotNegative]
    measured_at_v: SourcedValue[Positive]
    measured_in: Process
    chip_in: Process

    @model_validator(mode="after")
    def _measured_something(self) -> Self:
        voltage = self.measured_at_v.value
        if not self.measured_in.energy(voltage) > 0:
            raise ValueError(f"measured_in has no energy at measured_at_v, {voltage:g} V")
        return self

    def scale(self, voltage: float) -> float:
        """From the measured circuits to the chip's process at a voltage."""
        return self.chip_in.energy(voltage) / self.measured_in.energy(self.measured_at_v.value)


class Macro(Frozen):
    """One SRAM block: its bytes, its width, and the energy of reading and of writing one word."""

    bytes: Natural
    word_bits: Natural
    read_pj: Positive
    write_pj: Positive

    def __str__(self) -> str:
        return f"{self.bytes} x {self.word_bits} b: {self.read_pj:g}/{self.write_pj:g} pJ"


class Sram(Frozen):
    """SRAM blocks of several sizes at one voltage, and the size of the chip's own.

    Energy goes with the square of the voltage, and between two blocks as a power of their size.
    """

    macros: SourcedValue[tuple[Macro, ...]]
    macros_at_v: SourcedValue[Positive]
    bank_bytes: SourcedValue[Natural]

    @model_validator(mode="after")
    def _in_table(self) -> Self:
        sizes = [macro.bytes for macro in self.macros.value]
        if sorted(set(sizes)) != sizes or not sizes:
            raise ValueError("macros do not stand in the order of their bytes")
        if not sizes[0] <= self.bank_bytes.value <= sizes[-1]:
            bank = self.bank_bytes.value
            raise ValueError(f"bank_bytes {bank} is outside the table of macros, {sizes[0]} ... {sizes[-1]}")
        return self

    def read_pj_per_bit(self, voltage: float) -> float:
        """Energy of reading one bit of a bank."""
        return self._per_bit([macro.read_pj / macro.word_bits for macro in self.macros.value], voltage)

    def write_pj_per_bit(self, voltage: float) -> float:
        """Energy of writing one bit of a bank."""
        return self._per_bit([macro.write_pj / macro.word_bits for macro in self.macros.value], voltage)

    def _per_bit(self, energies: list[float], voltage: float) -> float:
        bank, sizes = self.bank_bytes.value, [macro.bytes for macro in self.macros.value]
        above = next(i for i, size in enumerate(sizes) if size >= bank)
        low, high = max(above - 1, 0), above
        share = math.log(bank / sizes[low]) / math.log(sizes[high] / sizes[low]) if high > low else 0.0
        at_table = energies[low] * math.pow(energies[high] / energies[low], share)
        return at_table * math.pow(voltage / self.macros_at_v.value, 2)


class BottomUp(Frozen):
    """Multipliers, adders and SRAM from tables.

    `macs_per_read` is how many multiplications one value read from SRAM serves; a skipped MAC costs its share of
    reading the bit that says so.
    """

    arithmetic: Arithmetic
    sram: Sram
    macs_per_read: SourcedValue[Positive]
