"""The three products of a linear layer, a convolution and a batched matrix product. No rounding of operands here.

Where the accumulator is float32 they are torch's own products. In steps without rounding, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch.ops.dispatch import backend_of
from lnpu_torch.ops.gemm import half_precision
from lnpu_torch.ops.memory_format import lies_last
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape, part


class Like(NamedTuple):
    """What a gradient is like: what it is the gradient of."""

    shape: torch.Size
    dtype: torch.dtype
    form: torch.memory_format

    @classmethod
    def of(cls, x: Tensor) -> Like:
        """A tensor's."""
        return cls.laid_out(x.shape, x.dtype, lies_last(x))

    @classmethod
    def laid_out(cls, shape: torch.Size, dtype: torch.dtype, last: bool) -> Like:
        """Of a tensor that is contiguous or in channels_last."""
        form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        return cls(shape, dtype, form if last else torch.contiguous_format)


@dataclass(frozen=True)
class Accumulator:
    """Format of the accumulator, rounded every `chunk` products; "fp32" is torch's own.

    `exact`: binary16 operands are summed in float32 whatever torch does with them, and rounded once, after the bias.
    `reordered`: whether sums may be in another order than torch's own. `rounded`: results are rounded to binary16, so
    that a product may leave its sums so.
    """

    form: str = "fp32"
    chunk: int = 64
    exact: bool = False
    reordered: bool = False
    rounded: bool = False

    def widens(self, x: Tensor) -> bool:
        """Whether torch's own product is not enough, for operands such as x."""
        return self.exact and self.form == "fp32" and x.dtype == torch.float16

    def bias(self, bias: Tensor | None, x: Tensor) -> Tensor | None:
        """A bias in the dtype in which it is added to products of operands such as x: that of their sums."""
        summed = self.exact or self.form != "fp32"  # in float32, but for float64
        return None if bias is None else bias.to(torch.float32 if summed and x.dtype == torch.float16 else x.dtype)

    def __call__(self, product: str, a: Tensor, b: Tensor, geometry: ConvShape) -> Tensor:
        """One of the products of `lnpu_torch.ops.gemm.reference`, by name."""
        return backend_of(a).accumulate(product, a, b, geometry.pack(), self.form, self.chunk)


@dataclass(frozen=True)
class Linear:
    """input [*, in], weight [out, in] -> output [*, out]. In `ConvShape`'s terms, a convolution without dimensions."""

    input_side: str = "conv_input"
    output_side: str = "conv_output"

    def check(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Raises torch's own error if these do not fit together, before anything is kept of them."""
        inputs, results = (
            x.dim() > 0 and x.shape[-1:] == weight.shape[1:],
            bias is None or bias.shape == weight.shape[:1],
        )
        if not (inputs and results):
            F.linear(x, weight, bias)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, by: Accumulator) -> Tensor:
        bias = by.bias(bias, x)
        if by.form == "fp32":
            out = _linear(x, weight, bias, by)
        else:
            flat = by("conv_forward", self.grid(x), weight, geometry=self.geometry(x.shape, weight.shape))
            out = flat.reshape(*x.shape[:-1], weight.shape[0])
            out = out if bias is None else out + bias
        # a view that autograd does not know as one, or what an autograd function returns could not be changed in place
        fresh: Tensor = torch.ops.aten._unsafe_view(out, out.shape)
        return fresh

    def grad_input(self, error: Tensor, weight: Tensor, like: Like, by: Accumulator) -> Tensor:
        if by.form == "fp32":
            return _linear(error, weight.T, None, by)
        geometry = self.geometry(like.shape, weight.shape)
        return by("conv_grad_input", self.grid(error), weight, geometry=geometry).reshape(like.shape)

    def grad_weight(
        self,
        error: Tensor,
        x: Tensor,
        like: Like,
        wanted: Sequence[bool],
        by: Accumulator,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias, as far as `wanted`."""
        flat, weight_grad = self.grid(error), None
        if wanted[0] and by.form == "fp32":
            weight_grad = _linear(flat.T, self.grid(x).T, None, by)
        elif wanted[0]:
            geometry = self.geometry(x.shape, like.shape)
            weight_grad = by("conv_grad_weight", self.grid(x), flat, geometry=geometry)
        return weight_grad, flat.sum(0, dtype=torch.float32 if by.widens(flat) else None) if wanted[1] else None

    def grid(self, x: Tensor) -> Tensor:
        """The tensor as `ConvShape` sees it: [batch, channels]."""
        return x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 tells nothing where a size is 0

    def cut(self, counts: Tensor) -> Tensor:
        """Counts of an input without its margin, of which it has none."""
        return counts

    def geometry(self, shape: torch.Size, weight: torch.Size) -> ConvShape:
        rows = prod(shape[:-1])
        return ConvShape(rows, weight[1], weight[0], 1, (), (), (), (), (), ())

    def output_shape(self, shape: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Of an input and a weight of such shapes."""
        return (*shape[:-1], weight[0])

    def pack(self) -> list[int]:
        """The product as integers, for the signature of an op; `product_of` is its inverse."""
        return []

    def layout(self, x: torch.Size) -> tuple[int, int]:
        """Of an input or error of such a shape, for `Request`."""
        return prod(x[:-1]), 1

    def kernel(self, weight: Tensor) -> Tensor:
        """The weight as [rows, channels, *kernel]."""
        return weight

    def kernel_layout(self, weight: torch.Size) -> tuple[int, int]:
        """Of a weight of such a shape, for `Request`."""
        return weight[0], 1

    def counted_over_channels(self, step: str) -> bool:
        """Whether a step of forward and grad_input meets the weight's counts over its channels, else over its rows."""
        return step == "grad_input"


@dataclass(frozen=True)
class MatMul:
    """a [B, M, K] by b [B, K, N] -> [B, M, N]: of two tensors that both may change with each call.

    b stands where weights do; `turned` says that it comes as [B, N, K]. In `ConvShape`'s terms it is a linear layer of
    B groups, of which each has rows, channels and weights of its own.
    """

    turned: bool
    input_side: str = "conv_input"
    output_side: str = "conv_output"

    def check(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Raises torch's own error if these do not fit together."""
        if x.dim() != 3 or weight.dim() != 3 or x.shape[::2] != weight.shape[:: 2 if self.turned else 1][:2]:
            torch.bmm(x, self._b(weight))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, by: Accumulator) -> Tensor:
        if by.form == "fp32":
            return self._product(x, self._b(weight), by)
        return self._ungrouped(by("conv_forward", *self._grouped(x, weight), geometry=self._of(x, weight)), len(x))

    def grad_input(self, error: Tensor, weight: Tensor, like: Like, by: Accumulator) -> Tensor:
        """The gradient of a."""
        if by.form == "fp32":
            return self._product(error, self._b(weight).mT, by)
        geometry = self.geometry(like.shape, weight.shape)
        return self._ungrouped(by("conv_grad_input", *self._grouped(error, weight), geometry=geometry), len(error))

    def grad_weight(
        self, error: Tensor, x: Tensor, like: Like, wanted: Sequence[bool], by: Accumulator
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of b, as it came."""
        if not wanted[0]:
            return None, None
        if by.form == "fp32":
            return self._product(error.mT, x, by) if self.turned else self._product(x.mT, error, by), None
        operands = (self._rows_first(x), self._rows_first(error))
        turned = by("conv_grad_weight", *operands, geometry=self.geometry(x.shape, like.shape))
        grad = turned.reshape(len(x), error.shape[2], x.shape[2])
        return grad if self.turned else grad.mT.contiguous(), None

    def grid(self, x: Tensor) -> Tensor:
        """All rows of all entries, [B M, channels]; what is counted over rows is counted for each entry."""
        return x.reshape(x.shape[0] * x.shape[1], x.shape[2])

    def cut(self, counts: Tensor) -> Tensor:
        return counts

    def geometry(self, shape: Sequence[int], weight: Sequence[int]) -> ConvShape:
        batch, rows, channels = shape
        outputs = weight[1 if self.turned else 2]
        return ConvShape(rows, batch * channels, batch * outputs, batch, (), (), (), (), (), ())

    def output_shape(self, shape: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Of operands of such shapes."""
        return (*shape[:2], weight[1 if self.turned else 2])

    def pack(self) -> list[int]:
        """The product as integers, for the signature of an op; `product_of` is its inverse."""
        return [int(self.turned)]

    def layout(self, x: torch.Size) -> tuple[int, int]:
        """Of an a or error of such a shape, for `Request`."""
        return x[1], 1

    def kernel(self, weight: Tensor) -> Tensor:
        """b as rows, in the order in which it came."""
        return self.grid(weight)

    def kernel_layout(self, weight: torch.Size) -> tuple[int, int]:
        """Of a b of such a shape, for `Request`."""
        return weight[1], 1

    def counted_over_channels(self, step: str) -> bool:
        """Whether a step of forward and grad_input meets b's counts over the dimension in which it lies last."""
        return (step == "grad_input") == self.turned

    def _b(self, weight: Tensor) -> Tensor:
        return weight.mT if self.turned else weight

    def _product(self, a: Tensor, b: Tensor, by: Accumulator) -> Tensor:
        return half_precision.half_matmul(a, b, None) if by.widens(a) else torch.bmm(a, b)

    def _of(self, x: Tensor, weight: Tensor) -> ConvShape:
        return self.geometry(x.shape, weight.shape)

    def _grouped(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Operands of a linear layer of groups: [M, B channels] and [B N, K]."""
        return self._rows_first(x), (weight if self.turned else weight.mT).flatten(0, 1)

    def _rows_first(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1)

    def _ungrouped(self, out: Tensor, batch: int) -> Tensor:
        """The result of one, [M, B channels] -> [B, M, channels]."""
        return out.reshape(len(out), batch, out.shape[1] // batch).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Convolution:
    """input [N, C, *grid], weight as torch's; any number of dimensions, plain or transposed.

    `margin` is how many elements at the end of each dimension of the input are padding put there beforehand.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    margin: tuple[int, ...]

    @property
    def input_side(self) -> str:
        return "conv_output" if self.transposed else "conv_input"

    @property
    def output_side(self) -> str:
        return "conv_input" if self.transposed else "conv_output"

    def check(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Raises torch's own error if these do not fit together, before anything is kept of them."""
        channels = [weight.shape[0], weight.shape[1] * self.groups]
        inputs, results = channels if self.transposed else reversed(channels)
        grid = [self._output(x.shape[2 + d], weight.shape[2 + d], d) for d in range(len(self.stride))]
        fits = x.shape[1] == inputs and weight.shape[0] % self.groups == 0 and min((*grid, *x.shape[2:])) > 0
        if not fits or (bias is not None and bias.shape != (results,)):
            torch.ops.aten.convolution(x, weight, bias, *self.arguments)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, by: Accumulator) -> Tensor:
        bias = by.bias(bias, x)
        if by.widens(x) and bias is not None:
            geometry = self.geometry(x.shape, weight.shape, margin=False).pack()
            return backend_of(x).half_convolution(x, weight, bias, geometry, self.arguments)
        if by.form == "fp32":
            return torch.ops.aten.convolution(x, weight, bias, *self.arguments)  # type: ignore[no-any-return]
        product = "conv_grad_input" if self.transposed else "conv_forward"
        out = by(product, x, weight, geometry=self.geometry(x.shape, weight.shape, margin=False))
        return out if bias is None else out + bias.reshape(-1, *(1 for _ in self.stride))

    def grad_input(self, error: Tensor, weight: Tensor, like: Like, by: Accumulator) -> Tensor:
        """The gradient of an input that was like this."""
        if by.form == "fp32":
            return self._backward(error, None, weight, like, [True, False, False])[0]
        product = "conv_forward" if self.transposed else "conv_grad_input"
        return by(product, error, weight, geometry=self.geometry(like.shape, weight.shape, margin=False))

    def grad_weight(
        self,
        error: Tensor,
        x: Tensor,
        like: Like,
        wanted: Sequence[bool],
        by: Accumulator,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of a weight that is like this, and of the bias, as far as `wanted`."""
        if by.form == "fp32" and not (by.reordered and error.device.type == "cpu"):
            grads = iter(self._backward(error, x, None, like, [False, *wanted]))
            return next(grads) if wanted[0] else None, next(grads) if wanted[1] else None
        weight_grad = None
        if wanted[0] and by.form == "fp32":  # for a bias, oneDNN takes several times as long as a sum on its own
            (weight_grad,) = self._backward(error, x, None, like, [False, True, False])
        elif wanted[0]:
            conv_input, conv_output = (error, x) if self.transposed else (x, error)
            geometry = self.geometry(x.shape, like.shape, margin=False)
            weight_grad = by("conv_grad_weight", conv_input, conv_output, geometry=geometry)
        return weight_grad, error.sum((0, *range(2, error.dim()))) if wanted[1] else None

    def grid(self, x: Tensor) -> Tensor:
        """The tensor as `ConvShape` sees it: [batch, channels, *grid]."""
        return x

    def cut(self, counts: Tensor) -> Tensor:
        """Counts [..., *grid] of an input without those of its margin."""
        return part(counts, [slice(0, -size or None) for size in self.margin]) if any(self.margin) else counts

    def geometry(self, shape: torch.Size, weight: torch.Size, margin: bool = True) -> ConvShape:
        """Of an input and weight shape; with `margin`, padding put there beforehand counts as padding."""
        sizes = [self._output(shape[2 + d], weight[2 + d], d) for d in range(len(self.stride))]
        out_channels, in_channels = weight[0], weight[1] * self.groups
        cut = self.margin if margin else (0,) * len(self.stride)
        inner = tuple(size - c for size, c in zip(shape[2:], cut, strict=True))
        conv_input, conv_output = (tuple(sizes), inner) if self.transposed else (inner, tuple(sizes))
        kernel = tuple(weight[2:])
        return ConvShape(
            shape[0],
            in_channels,
            out_channels,
            self.groups,
            conv_input,
            conv_output,
            kernel,
            self.stride,
            self.padding,
            self.dilation,
        )

    def output_shape(self, shape: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Of an input and a weight of such shapes."""
        channels = weight[1] * self.groups if self.transposed else weight[0]
        return (shape[0], channels, *(self._output(shape[2 + d], weight[2 + d], d) for d in range(len(self.stride))))

    def layout(self, x: torch.Size) -> tuple[int, int]:
        """Of an input or error of such a shape, for `Request`."""
        return x[0], self.groups

    def kernel(self, weight: Tensor) -> Tensor:
        """The weight as [rows, channels, *kernel]."""
        return weight

    def kernel_layout(self, weight: torch.Size) -> tuple[int, int]:
        """Of a weight of such a shape, for `Request`."""
        return weight[0] // self.groups, 1

    def counted_over_channels(self, step: str) -> bool:
        """Whether a step of forward and grad_input meets the weight's counts over its channels, else over its rows."""
        return (step == "grad_input") != self.transposed

    def pack(self) -> list[int]:
        """The product as integers, for the signature of an op; `product_of` is its inverse."""
        sizes = (*self.stride, *self.padding, *self.dilation, *self.output_padding, *self.margin)
        return [int(self.transposed), self.groups, *sizes]

    def _output(self, size: int, kernel: int, d: int) -> int:
        reach = self.dilation[d] * (kernel - 1)
        if self.transposed:
            return (size - 1) * self.stride[d] - 2 * self.padding[d] + reach + self.output_padding[d] + 1
        return (size + 2 * self.padding[d] - reach - 1) // self.stride[d] + 1

    @cached_property
    def arguments(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        """Of `aten.convolution`, after the bias."""
        lists = (list(self.stride), list(self.padding), list(self.dilation))
        return *lists, self.transposed, list(self.output_padding), self.groups

    def _backward(
        self,
        error: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        like: Like,
        mask: list[bool],
    ) -> list[Tensor]:
        """The gradients that the mask asks for, as `half_precision.gradients` has them."""
        operands = (error, x, weight, like.shape, like.form, [error.shape[1]] if mask[2] else None)
        return half_precision.gradients(*operands, self.arguments, mask)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, by: Accumulator) -> Tensor:
    """x [*, K] by weight [N, K], and a bias [N]."""
    if by.widens(x):
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return backend_of(x).half_linear(rows, weight, bias, by.rounded).reshape(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


Product = Linear | MatMul | Convolution


@lru_cache(maxsize=1024)
def _unpacked(sizes: tuple[int, ...]) -> Product:
    if len(sizes) < 2:
        return MatMul(bool(sizes[0])) if sizes else Linear()
    transposed, groups, *rest = sizes
    dims = len(rest) // 5
    stride, padding, dilation, output_padding, margin = (tuple(rest[i * dims : (i + 1) * dims]) for i in range(5))
    return Convolution(stride, padding, dilation, groups, bool(transposed), output_padding, margin)


def product_of(sizes: Sequence[int]) -> Product:
    """The product that was packed so."""
    return _unpacked(tuple(sizes))
