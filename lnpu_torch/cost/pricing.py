"""Prices what a run did on a chip: counts times energies, as a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from lnpu_torch.cost.cost_row import CostRow
from lnpu_torch.cost.energy_table import EnergyTable
from lnpu_torch.cost.lane_timing import lane_cycles, not_recorded
from lnpu_torch.cost.memory_traffic import Context, bits_moved, dram_cycles
from lnpu_torch.cost.report import Report
from lnpu_torch.cost.step_timing import passes, power_w, timed
from lnpu_torch.cost.vector_op_pricing import vector_op_notes, vector_op_rows
from lnpu_torch.counts.schema import OPERANDS, Counts, Operand, StepCounts, Table
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.text_tables import si

EXTRAPOLATED = "extrapolated: only some of the steps were counted; the others are assumed to be like them"

MODELS = {
    "calibrated": "energy of a MAC: from efficiencies of the whole chip",
    "bottom_up": "energy of a MAC: bottom-up, from tables of single circuits, not calibrated",
}


def price(counts: Counts, chip: str | Path | Chip) -> Report:
    """What the counted work costs on a chip. Pure: one saved run can be priced on any number of chips.

    Args:
        counts: what a run did, as from `CostCounter.counts` or `Counts.load`.
        chip: a built-in chip's name, a YAML file's path, or a Chip.

    Raises:
        ConfigError: no such chip, or its file is wrong.
    """
    chip = read_chip(chip)
    energies, told = EnergyTable.of(chip), _who_reads_errors(counts)
    first = counts.steps[0].layer if counts.steps else ""
    steps = tuple(
        _part(entry, chip, energies, Context(entry.layer == first, entry.layer not in told)) for entry in counts.steps
    )
    parts = timed((*steps, *vector_op_rows(counts.vector_ops, chip, energies)), energies)
    if counts.estimate:
        parts = tuple(replace(part, estimate=True) for part in parts)
    return Report(
        chip=chip.name,
        clock_hz=chip.clock_hz,
        parts=parts,
        energy_range=_range(chip) if energies.fp16_range else None,
        notes=(*_notes(counts, chip), *not_recorded(steps), *_power(parts, chip)),
        in_float=counts.in_float,
        dram_pj_per_bit=_dram_range(chip),
        estimate=counts.estimate,
    )


def _who_reads_errors(counts: Counts) -> set[str]:
    """The layers whose grad_input was run: that is where their error is read first."""
    return {entry.layer for entry in counts.steps if entry.step == "grad_input" and entry.macs > entry.not_run}


def _part(entry: StepCounts, chip: Chip, energies: EnergyTable, context: Context) -> CostRow:
    """One step of one layer: what of it is executed, what is skipped, what is moved, and what all that costs."""
    policy = getattr(chip.skip, entry.step).value
    streamed = entry.second if policy == OPERANDS[entry.step][1] else entry.first
    pairs = _executed(entry, entry.pairs, policy)
    skipped = entry.macs - entry.padding - entry.not_run - sum(pairs.values())
    inside, border = _work(chip, pairs, skipped), _border(entry, chip, policy)
    scheduled = chip.padding.value == "as_zero"
    work = _added(inside, border) if scheduled else inside
    bits = bits_moved(entry, chip, context)
    zero, fp8, wide = streamed.elements
    ideal = chip.cycles(work.fp8, work.fp16)
    lanes = lane_cycles(entry, chip, ideal)
    fitted = chip.cycles(work.fp8, work.fp16, *_array(entry, streamed))
    energy = energies.of_work(*work) | energies.of_bits(bits)
    if "sram" in energy:
        energy["sram"] += _low_reuse(entry, chip, policy, energies)
    return CostRow(
        layer=entry.layer,
        kind=entry.kind,
        step=entry.step,
        macs=entry.macs,
        skipped=skipped,
        padding=entry.padding,
        not_run=entry.not_run,
        executed_pairs={"*".join(pair): macs for pair, macs in pairs.items()},
        zero=zero,
        fp8=fp8,
        wide=wide,
        cycles=lanes.balanced * fitted / ideal if lanes and ideal else fitted,
        lanes=lanes,
        dram_cycles=dram_cycles(bits, chip),
        energy_zj=energy,
        bits=bits,
        range_zj=energies.energy_range(work.fp16),
        border_zj=0 if scheduled else energies.of_work(*border)["mac"],
    )


def _dram_range(chip: Chip) -> tuple[float, float, float] | None:
    entry = chip.energy.dram_pj_per_bit
    return (entry.range[0], entry.value, entry.range[1]) if entry.range else None


def _range(chip: Chip) -> str:
    low, high = (chip.energy.fp16_to_fp8 and chip.energy.fp16_to_fp8.range) or (0.0, 0.0)
    return f"energy of an FP16 MAC {low:g} ... {high:g} times an FP8 MAC's"


def _array(entry: StepCounts, streamed: Operand) -> tuple[int | None, int]:
    """Channels of the streamed operand, and how many values of the other one each of its elements meets."""
    if not streamed.lanes or not streamed.lanes.channels or not entry.by_size:
        return None, 1
    weights = entry.by_size[0].sizes[2 if entry.step == "grad_weight" else 1]
    return streamed.lanes.channels, max(weights // streamed.lanes.channels, 1)


def _low_reuse(entry: StepCounts, chip: Chip, policy: str, energies: EnergyTable) -> int:
    """Energy of reading operands from SRAM for fewer multiplications than the energy of a MAC takes for granted."""
    storage, total = chip.storage, 0
    width = {"zero": storage.zero_bits.value, "fp8": storage.fp8_bits.value}
    for calls in entry.by_size:
        if not calls.macs or calls.pairs is None:
            continue
        executed = _executed(entry, calls.pairs, policy)
        if policy == OPERANDS[entry.step][1]:  # it is the streamed one, so that it stands first
            executed = {(b, a): macs for (a, b), macs in executed.items()}
        for operand, used in enumerate((calls.used or calls.sizes)[:2]):
            extra = Fraction(used * calls.count, calls.macs) - Fraction(1, chip.energy.reuse_in_mac.value)
            if extra > 0:
                bits = sum(macs * width.get(pair[operand], storage.fp16_bits.value) for pair, macs in executed.items())
                total += energies.of_reads(bits, extra)
    return total


def _power(parts: Sequence[CostRow], chip: Chip) -> list[str]:
    """Where the chip draws more than its own power at this voltage, or leaves, on average, the range of its power."""
    point, clock = chip.operating_point, chip.clock_hz
    least, most = point.low.power_w.value, (point.high or point.low).power_w.value
    own, mean = max(point.power_w, least), power_w(parts, clock)
    if mean is None:
        return []
    found = {each: power_w((parts[place] for place in places), clock) for each, places in passes(parts).items()}
    above = [(power, each) for each, power in found.items() if power is not None and power > 1.05 * own]
    told = f"power: {si(mean, 'W')} on average"
    if point.high and not 0.99 * least <= mean <= 1.01 * most:
        told += f", outside the chip's {si(least, 'W')} ... {si(most, 'W')}"
    if above:
        power, each = max(above)
        where = f"{each.layer or '(model)'}, {each.phase}"
        told += f"; {len(above)} of {len(found)} passes draw more than its {si(own, 'W')} at this voltage, "
        told += f"at most {si(power, 'W')} ({where})"
    return [told]


def _executed(entry: StepCounts, table: Table, policy: str) -> dict[tuple[str, str], int]:
    """Multiplications of a table that are executed, by the groups of the streamed and of the other operand."""
    first, second = OPERANDS[entry.step]
    run = {
        (a, b): table[i][j]
        for i, a in enumerate(("zero", "fp8", entry.first.wide))
        for j, b in enumerate(("zero", "fp8", entry.second.wide))
        if not (a == "zero" and policy in (first, "both")) and not (b == "zero" and policy in (second, "both"))
    }
    return {(b, a): macs for (a, b), macs in run.items()} if policy == second else run


class Work(NamedTuple):
    """Multiplications at FP8's and at FP16's rate, and skipped MACs."""

    fp8: int
    fp16: int
    skipped: int


def _added(a: Work, b: Work) -> Work:
    return Work(a.fp8 + b.fp8, a.fp16 + b.fp16, a.skipped + b.skipped)


def _work(chip: Chip, pairs: dict[tuple[str, str], int], skipped: int) -> Work:
    """What a step does inside the image."""
    fp8 = sum(macs for pair, macs in pairs.items() if chip.runs_fp8(*pair))
    return Work(fp8, sum(pairs.values()) - fp8, skipped)


def _border(entry: StepCounts, chip: Chip, policy: str) -> Work:
    """What a step does outside the image if that holds zeros of its first operand."""
    first, second = OPERANDS[entry.step]
    if policy in (first, "both"):
        return Work(0, 0, entry.padding)
    # executed: zero times a value that is not known, taken as FP16
    if chip.runs_fp8(*(("fp16", "zero") if policy == second else ("zero", "fp16"))):
        return Work(entry.padding, 0, 0)
    return Work(0, entry.padding, 0)


def _notes(counts: Counts, chip: Chip) -> list[str]:
    """What a reader of the report must know about how it came about."""
    operands = [operand for entry in counts.steps for operand in (entry.first, entry.second)]
    tags = ", ".join(f"{count} {tag}" for tag, count in chip.tags().items())
    voltage = chip.operating_point.voltage_v.value
    notes = [EXTRAPOLATED] if counts.extrapolated else []
    notes += [f"{MODELS[chip.energy_model]}; at {voltage:g} V, {chip.clock_hz / 1e6:.4g} MHz", f"constants: {tags}"]
    if any(not entry.by_size and any(entry.first.elements) for entry in counts.steps):
        notes.append("the sizes of some calls were not recorded: what these moved is not in the traffic")
    if any(operand.wide == "fp32" for operand in operands):
        notes.append("fp32, an operand left in float, is priced as FP16")
    if chip.inherited:
        whose = ", ".join(f"{count} of {name}" for name, count in chip.origins().items())
        notes.append(f"values that {chip.name} takes from others: {whose}; `lnpu chips` lists which")
    mixed = [each for each in operands if each.elements[1] and each.elements[2]]
    if mixed and chip.fp8_pairs.value in ("streamed", "both") and not chip.mixed_tensors.value:
        told = f"{len(mixed)} of {len(operands)} operands mix FP8 and {mixed[0].wide.upper()}, which this chip cannot"
        notes.append(f"{told}: priced as if it could; count a run with precision fp8 or fp16 for it")
    notes += _formats(operands, chip)
    return [*notes, *vector_op_notes(counts.vector_ops, chip)]


def _formats(operands: Sequence[Operand], chip: Chip) -> list[str]:
    """Which of the counted formats the chip prices as another one."""
    pairs, notes = chip.fp8_pairs.value, []
    fp8, wide = (any(operand.elements[place] for operand in operands) for place in (1, 2))
    if pairs == "never" and fp8:
        notes.append("this chip has no FP8: FP8 values are priced as FP16; zeros that FP8's rounding made stay zeros")
    if pairs == "always" and wide:
        notes.append("this chip has no FP16: FP16 values are priced as FP8")
    own = [
        f"what is priced as {name.upper()} is {entry.value} there"
        for name in ("fp8", "fp16")
        if (entry := getattr(chip.formats, name)) and getattr(chip.macs_per_cycle, name)
    ]
    return notes + ([f"formats of this chip: {'; '.join(own)}"] if own and (fp8 or wide) else [])
