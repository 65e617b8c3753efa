"""What was run for the claims, and the figures that are read from it by pricing. It knows no claim."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import lnpu_torch as lnpu
from lnpu_torch.recipes.short_training import Probe
from lnpu_torch.recipes.sparsity_curve import Curves

STEPS = {"forward": "FF", "grad_input": "EP", "grad_weight": "WG"}

Chip = str | lnpu.Chip


@dataclass(frozen=True)
class Evidence:
    """What was run: three networks, and one layer at synthetic zeros.

    `images` says in words what the networks were trained on.
    """

    probes: dict[str, Probe]
    curves: Curves
    images: str


def layers(counts: lnpu.Counts, chip: Chip = "lnpu") -> lnpu.Report:
    """The three steps of all layers, priced: MACs and SRAM, without what is no MAC."""
    return lnpu.price(counts, built_in(chip) if isinstance(chip, str) else chip).of_layers()


built_in = functools.cache(lnpu.chip)
"""A built-in chip by name and, if need be, voltage; its file is read once."""


def energy(counts: lnpu.Counts, chip: Chip = "lnpu", *, dram: bool = False) -> float:
    """Energy of the layers' steps on the chip, in pJ; with DRAM's if asked for."""
    total = layers(counts, chip).total
    return _known(total.energy_pj) + (_known(total.dram_energy_pj) if dram else 0.0)


def tflops_per_watt(counts: lnpu.Counts, chip: Chip = "lnpu", *, dram: bool = False) -> float:
    """2 FLOP per MAC of the layers' steps over their energy on the chip; over DRAM's too if asked for."""
    total = layers(counts, chip).total
    return 2 * total.asked / energy(counts, chip, dram=dram)


def over_sparse(probe: Probe, ratio: float | None = None) -> float:
    """Efficiency of FGMP over sparse FP16; an FP16 MAC costs `ratio` times an FP8 one, or what the chips say."""
    values = {} if ratio is None else {"energy.fp16_to_fp8": ratio}
    mine, sparse = (built_in(name).with_values(values) for name in ("lnpu", "lnpu-fp16"))
    return energy(probe.fp16, sparse) / energy(probe.fgmp, mine)


def access(row: lnpu.CostRow) -> float:
    """DRAM traffic against dense FP16's, as a change: -0.4 is 40 % less."""
    return _known(row.dram_bits) / _known(row.dense_dram_bits) - 1


def zero_shares(report: lnpu.Report) -> dict[str, float]:
    """Share of zeros among the streamed elements of all layers, by step."""
    return {row.step: _known(row.zero_share) for row in report.by("step").rows}


def fp8_shares(report: lnpu.Report) -> dict[str, float]:
    """Share of FP8 among the streamed non-zeros of all layers, by the step's short name."""
    return {STEPS[row.step]: _known(row.fp8_share) for row in report.by("step").rows}


def by_layer(report: lnpu.Report, step: str) -> tuple[float, float]:
    """Least and greatest share of zeros that a layer streams in a step."""
    shares = [row.zero_share for row in report.rows if row.step == step and row.zero_share is not None]
    return min(shares), max(shares)


def elements(counts: lnpu.Counts) -> tuple[int, int, int]:
    """Zero, FP8 and FP16 elements of both operands of all steps."""
    operands = [operand.elements for entry in counts.steps for operand in (entry.first, entry.second)]
    zero, fp8, wide = (sum(column) for column in zip(*operands, strict=True))
    return zero, fp8, wide


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def each(values: Mapping[str, object], form: str = "{}") -> str:
    """ "vgg16 1.61x, alexnet 1.7x": names and values in words."""
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items())


def _known(value: float | None) -> float:
    """A figure that every built-in chip models of every step."""
    assert value is not None
    return value
