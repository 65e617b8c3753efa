"""LoopNest: a layer's step as a nest of loops over two operands, with their densities; what other tools take in."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

Place = Literal["conv_input", "weight", "conv_output"]
"""A convolution joins three tensors; which of them a step reads and which it makes differs."""


class NestTensor(NamedTuple):
    """A tensor of a nest: what the layer calls it, and the share of its elements that is not zero; None of a result."""

    name: str
    density: float | None


@dataclass(frozen=True)
class LoopNest:
    """One step of one layer, as loops over groups, batch, channels, the output grid and the kernel.

    All three steps run the same loops; they differ in which tensor is the result. Along each dimension, offset r and
    output position p meet input position p * stride - padding + r * dilation. `channels` and `filters` are those of
    one group. `calls` is how often the step runs in a pass over one batch.
    """

    layer: str
    step: str
    tensors: dict[Place, NestTensor]
    groups: int
    batch: int
    filters: int
    channels: int
    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    input: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    calls: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call, padding included."""
        loops = (self.groups, self.batch, self.filters, self.channels, *self.grid, *self.kernel)
        return prod(loops)

    @property
    def result(self) -> Place:
        """The tensor that the step makes."""
        return next(place for place, tensor in self.tensors.items() if tensor.density is None)
