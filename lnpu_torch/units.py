"""What energy is spent on, the unit that it is counted in, and the one that it is shown in. Nothing else."""

from __future__ import annotations

from typing import Literal

Component = Literal["mac", "sram", "simd", "idle", "dram"]
COMPONENTS: tuple[Component, ...] = ("mac", "sram", "simd", "idle", "dram")
"""What energy is spent on; "dram" is outside the chip, and outside TFLOPS/W."""

ON_CHIP: tuple[Component, ...] = ("mac", "sram", "simd", "idle")

ZJ_PER_PJ = 10**9
"""Energies are whole zeptojoules (1e-21 J) until they are shown: sums of integers close to the last digit."""


def zj(pj: float) -> int:
    """Picojoules in whole zeptojoules."""
    return round(pj * ZJ_PER_PJ)


def pj(zj: int) -> float:
    """Zeptojoules in picojoules: the nearest float."""
    return zj / ZJ_PER_PJ
