"""Which elements of a convolution's two grids its kernel brings together. Integers only, no values.

A convolution joins a *big* grid (its input; a transposed convolution's output), a *small* grid (its output; a
transposed convolution's input) and a weight [small channels, big channels / groups, *kernel]. Along each dimension,
kernel offset r joins small position p with big position h = p * stride - padding + r * dilation.
A linear layer is the case without dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor


def part(x: Tensor, index: Sequence[slice | int]) -> Tensor:
    """The part of a tensor that an index of its last dimensions selects."""
    whole: tuple[Any, ...] = (..., *index)
    return x[whole]


@dataclass(frozen=True)
class ConvShape:
    """Sizes of one convolution. `padding` is what lies before the big grid's first element in each dimension."""

    batch: int
    big_channels: int
    small_channels: int
    groups: int
    big: tuple[int, ...]
    small: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def pointwise(self) -> bool:
        """Whether each position meets only the same one of the other grid, as in a linear layer of as many rows.

        There the end of a sample means nothing.
        """
        alone = not any(self.padding) and all(size == 1 for size in self.kernel)
        return alone and self.big == self.small

    @property
    def per_offset(self) -> int:
        """Multiplications for each kernel offset and small position."""
        return self.batch * self.small_channels * (self.big_channels // self.groups)

    @property
    def macs(self) -> int:
        """Multiplications of a dense convolution, padding included.

        Torch's own flop count / 2, but for the backward of grouped convolutions, which torch takes for dense ones.
        """
        return self.per_offset * prod(self.kernel) * prod(self.small)

    @property
    def inside(self) -> int:
        """Slots whose big position lies inside the big grid."""
        return self.per_offset * sum(self.overlaps())

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of the "big" grid, the "small" grid or the "weight"."""
        if tensor == "weight":
            return (self.small_channels, self.big_channels // self.groups, *self.kernel)
        if tensor == "big":
            return (self.batch, self.big_channels, *self.big)
        return (self.batch, self.small_channels, *self.small)

    def elements(self, tensor: str) -> int:
        """Elements of the "big" grid, the "small" grid or the "weight"."""
        return prod(self.shape(tensor))

    def call_sizes(self, first: str, second: str) -> tuple[int, int, int]:
        """Elements of a step's two operands and of its result, which is the tensor that is left."""
        (result,) = {"big", "small", "weight"} - {first, second}
        return self.elements(first), self.elements(second), self.elements(result)

    def pack(self) -> list[int]:
        """The sizes as one list, for the signature of an op; `unpack` is its inverse."""
        grids = (self.big, self.small, self.kernel, self.stride, self.padding, self.dilation)
        return [self.batch, self.big_channels, self.small_channels, self.groups, *itertools.chain(*grids)]

    @classmethod
    def unpack(cls, sizes: Sequence[int]) -> ConvShape:
        dims = (len(sizes) - 4) // 6
        batch, big, small, groups, *rest = sizes
        return cls(batch, big, small, groups, *(tuple(rest[i * dims : (i + 1) * dims]) for i in range(6)))

    def overlap(self, dim: int) -> list[tuple[slice, slice]]:
        """For each kernel offset along a dimension: the small positions it joins with big ones, and those big ones."""
        return [self._overlap(dim, offset) for offset in range(self.kernel[dim])]

    def overlaps(self) -> list[int]:
        """For each kernel offset, row-major: how many small positions it joins with one inside the big grid."""
        dims = range(len(self.kernel))
        per_dimension = [[small.stop - small.start for small, _ in self.overlap(dim)] for dim in dims]
        return [prod(combination) for combination in itertools.product(*per_dimension)]

    def _overlap(self, dim: int, offset: int) -> tuple[slice, slice]:
        stride = self.stride[dim]
        start = offset * self.dilation[dim] - self.padding[dim]  # big position of small position 0
        first = max(0, -(start // stride))
        count = min(self.small[dim], (self.big[dim] - 1 - start) // stride + 1) - first
        if count <= 0:
            return slice(0, 0), slice(0, 0)
        begin = start + first * stride
        return slice(first, first + count), slice(begin, begin + (count - 1) * stride + 1, stride)
