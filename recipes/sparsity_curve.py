"""Runs one layer on operands with a given share of zeros, and prices it. It trains nothing, and knows no claim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lnpu_torch as lnpu
from lnpu_torch.recipes.short_training import CurveConfig

ZEROS = tuple(step / 10 for step in range(10))
"""The shares of zeros that are run: 0, 10 ... 90 %."""


@dataclass(frozen=True)
class Point:
    """All three steps at one share of zeros: TFLOPS/W of MACs alone and with SRAM's filling, and mW at full speed."""

    zeros: float
    macs: float
    chip: float
    power_mw: float


Curves = dict[str, tuple[Point, ...]]


def curves(config: CurveConfig, seed: int = 0) -> Curves:
    """A curve for each chip: "lnpu" in FP8, "lnpu-fp16" and "dense-fp16" in FP16; the first two also bottom-up."""
    runs = {
        precision: [(share, run(config, share, precision, seed)) for share in ZEROS] for precision in ("fp8", "fp16")
    }
    chips = {"lnpu": "fp8", "lnpu-fp16": "fp16", "dense-fp16": "fp16"}
    priced = {name: (lnpu.chip(name), precision) for name, precision in chips.items()}
    for name in ("lnpu", "lnpu-fp16"):
        priced[f"{name}, bottom-up"] = (lnpu.chip(name).with_values({"energy_model": "bottom_up"}), chips[name])
    return {
        name: tuple(point(lnpu.price(counts, chip), share) for share, counts in runs[precision])
        for name, (chip, precision) in priced.items()
    }


def run(config: CurveConfig, zeros: float, precision: str, seed: int = 0) -> lnpu.Counts:
    """Counts of one training step of a convolution whose input and error have this share of zeros, spread at random."""
    random = torch.Generator().manual_seed(seed)
    layer = lnpu.convert(nn.Sequential(nn.Conv2d(config.channels, config.channels, 3, bias=False)), precision)
    images = masked((config.batch, config.channels, config.size + 2, config.size + 2), zeros, random).requires_grad_()
    error = masked((config.batch, config.channels, config.size, config.size), zeros, random)
    with lnpu.CostCounter(layer, vector_ops=False) as cost:
        layer(images).backward(error)
    return cost.counts


def masked(shape: tuple[int, ...], zeros: float, random: torch.Generator) -> Tensor:
    """Values of either sign between 1 and 2, which no rounding makes zero; of them so many, to the element, are 0."""
    values = 1 + torch.rand(shape, generator=random)
    values = torch.where(torch.rand(shape, generator=random) < 0.5, -values, values)
    order = torch.randperm(values.numel(), generator=random)
    values.view(-1)[order[: round(zeros * values.numel())]] = 0
    return values


def point(report: lnpu.Report, zeros: float) -> Point:
    """What a priced run says of one share of zeros."""
    total = report.total
    macs = 2 * total.asked / (total.mac_energy_pj or float("nan"))
    power_mw = (total.mac_energy_pj or 0.0) * 1e-9 / report.mac_time_s
    return Point(zeros, macs, report.tflops_per_watt or float("nan"), power_mw)
