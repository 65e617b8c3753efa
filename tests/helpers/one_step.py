"""A small network, a training step of it, and what vector operations a counter has seen of it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lnpu_torch as lnpu
from lnpu_torch.counts.vector_ops import VectorOp, VectorOpCounts

IMAGES, LABELS = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return lnpu.convert(nn.Sequential(*layers, nn.Linear(64, 5)))


def train(model: nn.Module, images: Tensor = IMAGES) -> None:
    model.zero_grad()
    F.cross_entropy(model(images), LABELS[: len(images)]).backward()


def counted(cost: lnpu.CostCounter) -> dict[tuple[str, str, str], VectorOp]:
    """What was counted by kind, phase and op, whatever the layer."""
    vector_ops = cost.counts.vector_ops
    assert isinstance(vector_ops, VectorOpCounts), vector_ops
    sums: dict[tuple[str, str, str], VectorOp] = {}
    for entry in vector_ops.entries:
        key, alone = (entry.kind, entry.phase, entry.op), entry.model_copy(update={"layer": ""})
        sums[key] = sums[key] + alone if key in sums else alone
    return sums


def step(model: nn.Module) -> dict[tuple[str, str, str], VectorOp]:
    with lnpu.CostCounter(model) as cost:
        train(model)
    return counted(cost)


def operations(counted: dict[tuple[str, str, str], VectorOp]) -> Counter[tuple[str, str]]:
    """Operations by kind and phase."""
    sums: Counter[tuple[str, str]] = Counter()
    for (kind, phase, _), entry in counted.items():
        sums[kind, phase] += entry.operations
    return sums
