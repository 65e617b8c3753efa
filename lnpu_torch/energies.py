"""What every event costs on a chip at its operating point, in whole zeptojoules. It knows nothing of what was run."""

from __future__ import annotations

from dataclasses import dataclass

from lnpu_torch.chip import Chip
from lnpu_torch.units import zj


@dataclass(frozen=True)
class Energies:
    """Energy of one event each, in zJ; `fp16_band` is what the ends of the chip's ratio range add to an FP16 MAC."""

    fp8_mac: int
    fp16_mac: int
    fp16_band: tuple[int, int]
    skipped_slot: int


def event_energies(chip: Chip) -> Energies:
    """The chip's energies, each rounded once, to 1 zJ."""
    line = chip.energy
    ratio = line.fp16_to_fp8
    low, high = ratio.range or (ratio.value, ratio.value)
    fp16 = zj(line.fp8_mac_pj.value * ratio.value)
    band = (zj(line.fp8_mac_pj.value * low) - fp16, zj(line.fp8_mac_pj.value * high) - fp16)
    return Energies(zj(line.fp8_mac_pj.value), fp16, band, zj(line.skipped_slot_pj.value))
