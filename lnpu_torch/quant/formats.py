"""The table of floating-point formats. Data only: rounding to them is in `reference`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: one sign bit, `exponent` bits, `mantissa` bits, subnormals.

    `finite` formats (OCP's "fn") have no infinity and use the top exponent for numbers, all but the last code.
    """

    name: str
    exponent: int
    mantissa: int
    finite: bool = False

    @property
    def bits(self) -> int:
        """Width of one element, in bits."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is added to an exponent to store it."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number."""
        return self.bias + self.finite

    @property
    def ulp_exponent(self) -> int:
        """Exponent of the smallest subnormal number, the finest step of the format."""
        return self.min_exponent - self.mantissa

    @property
    def binades(self) -> int:
        """Binades that hold a number, those of subnormals included."""
        return self.max_exponent - self.ulp_exponent + 1

    @property
    def max(self) -> float:
        """The largest finite number."""
        return (2 - (1 + self.finite) * 2.0**-self.mantissa) * 2.0**self.max_exponent


FORMATS = {
    entry.name: entry
    for entry in (
        Format("e4m3", 4, 3, finite=True),  # OCP 8-bit Floating Point Specification 1.0: E4M3
        Format("e5m2", 5, 2),  # same source: E5M2
        Format("fp16", 5, 10),  # IEEE 754 binary16
        Format("e6m9", 6, 9),  # "1-6-9", for FP16 with a wider range
        Format("fp32", 8, 23),  # IEEE 754 binary32
    )
}
ALIASES = {"e4m3fn": "e4m3"}
"""Names that other libraries have for these formats."""
