"""The unit that energies are counted in, and the one that they are shown in. Nothing else."""

from __future__ import annotations

ZJ_PER_PJ = 10**9
"""Energies are whole zeptojoules (1e-21 J) until they are shown: sums of integers close to the last digit."""


def zj(pj: float) -> int:
    """Picojoules in whole zeptojoules."""
    return round(pj * ZJ_PER_PJ)


def pj(zj: int) -> float:
    """Zeptojoules in picojoules: the nearest float."""
    return zj / ZJ_PER_PJ
