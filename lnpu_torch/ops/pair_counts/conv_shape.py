"""Which elements of a convolution's two grids its kernel brings together. Integers only, no values.

A convolution joins its input grid, its output grid and a weight [out_channels, in_channels / groups, *kernel]. A
transposed convolution runs the other way: its own output is `conv_input` here, its own input is `conv_output`.
Along each dimension, offset r joins output position p with input position h = p * stride - padding + r * dilation.
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
    """Sizes of one convolution. `padding` is what lies before the input's first element in each dimension."""

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    conv_input: tuple[int, ...]
    conv_output: tuple[int, ...]
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
        return alone and self.conv_input == self.conv_output

    @property
    def per_offset(self) -> int:
        """Multiplications for each kernel offset and output position."""
        return self.batch * self.out_channels * (self.in_channels // self.groups)

    @property
    def macs(self) -> int:
        """Multiplications of a dense convolution, padding included.

        Torch's own flop count / 2, but for the backward of grouped convolutions, which torch takes for dense ones.
        """
        return self.per_offset * prod(self.kernel) * prod(self.conv_output)

    @property
    def inside(self) -> int:
        """Slots whose input position lies inside the input grid."""
        return self.per_offset * sum(self.overlaps())

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of the "conv_input" grid, the "conv_output" grid or the "weight"."""
        if tensor == "weight":
            return (self.out_channels, self.in_channels // self.groups, *self.kernel)
        if tensor == "conv_input":
            return (self.batch, self.in_channels, *self.conv_input)
        return (self.batch, self.out_channels, *self.conv_output)

    def elements(self, tensor: str) -> int:
        """Elements of the "conv_input" grid, the "conv_output" grid or the "weight"."""
        return prod(self.shape(tensor))

    def used(self, tensor: str) -> int:
        """Elements of a tensor that the kernel joins with any of the other two tensors.

        Fewer than all where a stride exceeds the kernel, or where a kernel offset falls outside of the grid everywhere.
        """
        return prod(self.shape(tensor)[:2]) * prod(self._used(tensor, dim) for dim in range(len(self.kernel)))

    def call_sizes(self, first: str, second: str) -> tuple[int, ...]:
        """Sizes of a step with these operands [CALL]; its result is the tensor that is left."""
        (result,) = {"conv_input", "conv_output", "weight"} - {first, second}
        tensors = (first, second, result)
        return *(self.elements(each) for each in tensors), *(self.used(each) for each in tensors), self.groups

    def pack(self) -> list[int]:
        """The sizes as one list, for the signature of an op; `unpack` is its inverse."""
        grids = (self.conv_input, self.conv_output, self.kernel, self.stride, self.padding, self.dilation)
        return [self.batch, self.in_channels, self.out_channels, self.groups, *itertools.chain(*grids)]

    @classmethod
    def unpack(cls, sizes: Sequence[int]) -> ConvShape:
        dims = (len(sizes) - 4) // 6
        batch, conv_input, conv_output, groups, *rest = sizes
        return cls(batch, conv_input, conv_output, groups, *(tuple(rest[i * dims : (i + 1) * dims]) for i in range(6)))

    def overlap(self, dim: int) -> list[tuple[slice, slice]]:
        """For each kernel offset along a dimension: the output positions that it joins with input ones, and those."""
        return [self._overlap(dim, offset) for offset in range(self.kernel[dim])]

    def overlaps(self) -> list[int]:
        """For each kernel offset, row-major: how many output positions it joins with one inside the input grid."""
        dims = range(len(self.kernel))
        per_dimension = [[conv_output.stop - conv_output.start for conv_output, _ in self.overlap(dim)] for dim in dims]
        return [prod(combination) for combination in itertools.product(*per_dimension)]

    def _used(self, tensor: str, dim: int) -> int:
        """Positions of a tensor along one dimension that are joined with any other."""
        if tensor == "weight":
            return sum(conv_output.stop > conv_output.start for conv_output, _ in self.overlap(dim))
        joined = bytearray(self.shape(tensor)[2 + dim])
        for conv_output, conv_input in self.overlap(dim):
            positions = conv_input if tensor == "conv_input" else conv_output
            joined[positions] = b"\1" * len(joined[positions])
        return sum(joined)

    def _overlap(self, dim: int, offset: int) -> tuple[slice, slice]:
        stride = self.stride[dim]
        start = offset * self.dilation[dim] - self.padding[dim]  # input position of output position 0
        first = max(0, -(start // stride))
        count = min(self.conv_output[dim], (self.conv_input[dim] - 1 - start) // stride + 1) - first
        if count <= 0:
            return slice(0, 0), slice(0, 0)
        begin = start + first * stride
        return slice(first, first + count), slice(begin, begin + (count - 1) * stride + 1, stride)
