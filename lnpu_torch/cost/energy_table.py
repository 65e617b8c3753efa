"""EnergyTable: the energy of every event on a chip at its operating point, in whole zeptojoules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.energy_tables import BottomUp
from lnpu_torch.units import Component, zj


@dataclass(frozen=True)
class EnergyTable:
    """Energy of one event each, in zJ: a multiplication or a skipped MAC, a bit of SRAM or DRAM, a cycle of waiting.

    A format that the chip does not compute in costs what the other does, and nothing runs in it. `fp16_range` is what
    the ends of the chip's range of FP16 to FP8 add to an FP16 MAC; None without such a range.
    """

    fp8_mac: int
    fp16_mac: int
    fp16_range: tuple[int, int] | None
    skipped_mac: int
    sram_read_bit: int
    sram_write_bit: int
    dram_bit: int
    simd_operation: int | None
    idle_cycle: int | None
    dram_cycle: int

    @classmethod
    def of(cls, chip: Chip) -> Self:
        """The chip's energies by its energy model and at its voltage, each rounded once, to 1 zJ."""
        if chip.energy_model == "bottom_up" and chip.bottom_up:
            return cls._bottom_up(chip, chip.bottom_up)
        energy, scale, larger = chip.energy, chip.operating_point.energy_scale, _sram_scale(chip)
        fp8, fp16 = _macs(chip)
        ends = energy.fp16_to_fp8.range if energy.fp16_to_fp8 and chip.macs_per_cycle.fp16 else None
        return cls(
            fp8_mac=zj(fp8),
            fp16_mac=zj(fp16),
            fp16_range=(zj(fp8 * ends[0]) - zj(fp16), zj(fp8 * ends[1]) - zj(fp16)) if ends else None,
            skipped_mac=zj(energy.skipped_mac_pj.value * scale),
            sram_read_bit=zj(energy.sram_read_pj_per_bit.value * scale * larger),
            sram_write_bit=zj(energy.sram_write_pj_per_bit.value * scale * larger),
            dram_bit=zj(energy.dram_pj_per_bit.value),
            simd_operation=_simd(chip),
            idle_cycle=_per_cycle(chip.idle_w, chip),
            dram_cycle=_per_cycle(energy.dram_static_w.value, chip),
        )

    @classmethod
    def _bottom_up(cls, chip: Chip, tables: BottomUp) -> Self:
        """A MAC is a multiplication, an addition, and its share of reading both operands; a skipped one reads a bit."""
        voltage, circuits, storage = chip.operating_point.voltage_v.value, tables.arithmetic, chip.storage
        scale, larger = circuits.scale(voltage), _sram_scale(chip)
        read = tables.sram.read_pj_per_bit(voltage) * larger
        per_bit = read / tables.macs_per_read.value
        add = circuits.accumulate_pj.value * scale
        fp8_read = (storage.fp8_bits.value + storage.fp16_bits.value) * per_bit  # the other operand may be FP16
        fp16_read = 2 * storage.fp16_bits.value * per_bit
        return cls(
            fp8_mac=zj(circuits.fp8_multiply_pj.value * scale + add + fp8_read),
            fp16_mac=zj(circuits.fp16_multiply_pj.value * scale + add + fp16_read),
            fp16_range=None,
            skipped_mac=zj(storage.zero_bits.value * per_bit),
            sram_read_bit=zj(read),
            sram_write_bit=zj(tables.sram.write_pj_per_bit(voltage) * larger),
            dram_bit=zj(chip.energy.dram_pj_per_bit.value),
            simd_operation=_simd(chip),
            idle_cycle=None,
            dram_cycle=_per_cycle(chip.energy.dram_static_w.value, chip),
        )

    def of_work(self, fp8_macs: int, fp16_macs: int, skipped: int) -> dict[Component, int]:
        """Energy of these multiplications and skipped MACs."""
        return {"mac": self.fp8_mac * fp8_macs + self.fp16_mac * fp16_macs + self.skipped_mac * skipped}

    def of_bits(self, bits: Mapping[str, int]) -> dict[Component, int]:
        """Energy of the bits moved, as `memory_traffic.bits_moved` names them; of none if none are known."""
        energy: dict[Component, int] = {}
        if "sram_read" in bits:
            energy["sram"] = self.sram_read_bit * bits["sram_read"] + self.sram_write_bit * bits["sram_write"]
        if "dram_read" in bits:
            energy["dram"] = self.dram_bit * (bits["dram_read"] + bits["dram_write"])
        return energy

    def of_time(self, cycles: float, idle: float, known: Mapping[Component, int]) -> dict[Component, int]:
        """Energy that flows in so many cycles, of which multipliers wait in some, on top of what is known of it.

        Of what is not known at all, it stays unknown.
        """
        energy: dict[Component, int] = {}
        if self.idle_cycle is not None and known:
            energy["idle"] = round(self.idle_cycle * idle)
        if "dram" in known:
            energy["dram"] = known["dram"] + round(self.dram_cycle * cycles)
        return energy

    def of_reads(self, bits: int, extra: Fraction) -> int:
        """Energy of reading bits from SRAM as often again as `extra` says, rounded once for each bit."""
        return bits * round(self.sram_read_bit * extra)

    def of_operations(self, operations: int) -> dict[Component, int]:
        """Energy of vector operations; of none if the chip's SIMD core is not modelled."""
        return {} if self.simd_operation is None else {"simd": self.simd_operation * operations}

    def energy_range(self, fp16_macs: int) -> tuple[int, int]:
        """What the ends of the chip's range of FP16 to FP8 add to the energy of these multiplications."""
        low, high = self.fp16_range or (0, 0)
        return low * fp16_macs, high * fp16_macs


def _macs(chip: Chip) -> tuple[float, float]:
    """Energy of a MAC in FP8 and in FP16, in pJ; the other's in a format that the chip does not compute in."""
    energy, scale = chip.energy, chip.operating_point.energy_scale
    fp8, fp16 = (entry.value * scale if entry else None for entry in (energy.fp8_mac_pj, energy.fp16_mac_pj))
    if fp8 is not None and energy.fp16_to_fp8:
        fp16 = fp8 * energy.fp16_to_fp8.value
    known = next((each for each in (fp8, fp16) if each is not None), 0.0)
    return known if fp8 is None else fp8, known if fp16 is None else fp16


def _per_cycle(power_w: float, chip: Chip) -> int:
    """Energy of a cycle at a power."""
    return zj(power_w / chip.clock_hz * 1e12)


def _sram_scale(chip: Chip) -> float:
    """Energy of a bit of the chip's SRAM over that of one as large as the one that its constants are of."""
    size = chip.energy.sram_size
    return float((chip.sram_bytes.value / size.at_bytes.value) ** size.exponent.value)


def _simd(chip: Chip) -> int | None:
    return zj(chip.simd.operation_pj.value * chip.operating_point.energy_scale) if chip.simd else None
