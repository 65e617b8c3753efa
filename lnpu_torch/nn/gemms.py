"""The three products of a linear layer and of a convolution, and what each joins. No rounding of operands here.

Where the accumulator is float32 they are torch's own products. In steps without rounding, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch.ops import dispatch as backends
from lnpu_torch.ops.gemm import half_precision as product_ops
from lnpu_torch.ops.gemm import toeplitz
from lnpu_torch.ops.pair_counts.conv_shape import Geometry, part

ONEDNN = torch.backends.mkldnn.is_available()
MANY = 2**23
"""Multiplications from which on oneDNN's linear layers are faster than MKL's, up to twice (measured on AMD's Zen 5)."""


@dataclass(frozen=True)
class Accumulator:
    """Format of the accumulator, rounded every `chunk` products; "fp32" is torch's own.

    `exact`: binary16 operands are summed in float32 whatever torch does with them, and rounded once, after the bias.
    `reordered`: whether sums may be in another order than torch's own.
    """

    form: str = "fp32"
    chunk: int = 64
    exact: bool = False
    reordered: bool = False

    def widens(self, x: Tensor) -> bool:
        """Whether torch's own product is not enough, for operands such as x."""
        return self.exact and self.form == "fp32" and x.dtype == torch.float16

    def bias(self, bias: Tensor | None, x: Tensor) -> Tensor | None:
        """A bias in the dtype in which it is added to products of operands such as x: that of their sums."""
        summed = self.exact or self.form != "fp32"  # in float32, but for float64
        return None if bias is None else bias.to(torch.float32 if summed and x.dtype == torch.float16 else x.dtype)

    def __call__(self, product: str, a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
        """One of the products of `lnpu_torch.ops.gemm.reference`, by name."""
        result: Tensor = product_ops.accumulate(product, a, b, geometry.pack(), self.form, self.chunk)
        return result


@dataclass(frozen=True)
class Linear:
    """input [*, in], weight [out, in] -> output [*, out]. In `Geometry`'s terms the input is the big grid."""

    input_side: str = "big"
    output_side: str = "small"

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
            flat = by("small_from_big", self.grid(x), weight, geometry=self.geometry(x.shape, weight.shape))
            out = flat.reshape(*x.shape[:-1], weight.shape[0])
            out = out if bias is None else out + bias
        # a view that autograd does not know as one, or what an autograd function returns could not be changed in place
        fresh: Tensor = torch.ops.aten._unsafe_view(out, out.shape)
        return fresh

    def grad_input(self, error: Tensor, weight: Tensor, shape: torch.Size, last: bool, by: Accumulator) -> Tensor:
        if by.form == "fp32":
            return _linear(error, weight.T, None, by)
        geometry = self.geometry(shape, weight.shape)
        return by("big_from_small", self.grid(error), weight, geometry=geometry).reshape(shape)

    def grad_weight(
        self, error: Tensor, x: Tensor, shape: torch.Size, last: bool, wanted: tuple[bool, ...], by: Accumulator
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias, as far as `wanted`."""
        flat, weight_grad = self.grid(error), None
        if wanted[0] and by.form == "fp32":
            weight_grad = _linear(flat.T, self.grid(x).T, None, by)
        elif wanted[0]:
            geometry = self.geometry(x.shape, shape)
            weight_grad = by("weight_from_both", self.grid(x), flat, geometry=geometry)
        return weight_grad, flat.sum(0, dtype=torch.float32 if by.widens(flat) else None) if wanted[1] else None

    def grid(self, x: Tensor) -> Tensor:
        """The tensor as `Geometry` sees it: [batch, channels]."""
        return x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 tells nothing where a size is 0

    def cut(self, counts: Tensor) -> Tensor:
        """Counts of an input without its margin, of which it has none."""
        return counts

    def last(self, x: Tensor, geometry: Geometry, by: Accumulator) -> bool:
        """Whether operands are laid out in channels_last for the product: a matter of convolutions."""
        return False

    def geometry(self, shape: torch.Size, weight: torch.Size) -> Geometry:
        rows = shape[:-1].numel()
        return Geometry(rows, weight[1], weight[0], 1, (), (), (), (), (), ())


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
        return "small" if self.transposed else "big"

    @property
    def output_side(self) -> str:
        return "big" if self.transposed else "small"

    def check(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Raises torch's own error if these do not fit together, before anything is kept of them."""
        channels = [weight.shape[0], weight.shape[1] * self.groups]
        inputs, results = channels if self.transposed else reversed(channels)
        grid = [self._output(x.shape[2 + d], weight.shape[2 + d], d) for d in range(len(self.stride))]
        fits = x.shape[1] == inputs and weight.shape[0] % self.groups == 0 and min((*grid, *x.shape[2:])) > 0
        if not fits or (bias is not None and bias.shape != (results,)):
            torch.ops.aten.convolution(x, weight, bias, *self._arguments)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, by: Accumulator) -> Tensor:
        bias = by.bias(bias, x)
        if by.widens(x) and bias is not None:
            geometry = self.geometry(x.shape, weight.shape, margin=False).pack()
            lists = (self.stride, self.padding, self.dilation, self.output_padding)
            rounded: Tensor = product_ops.half_convolution(
                x, weight, bias, geometry, *lists, self.groups, self.transposed
            )
            return rounded
        out: Tensor
        if sizes := self._toeplitz(x, x.shape, weight.shape, by):
            out = toeplitz.toeplitz("small_from_big", x, weight, sizes)
        elif by.form == "fp32":
            module = product_ops if torch.compiler.is_compiling() else torch.ops.aten
            out = module.convolution(x, weight, bias, *self._arguments)
            return out
        else:
            product = "big_from_small" if self.transposed else "small_from_big"
            out = by(product, x, weight, geometry=self.geometry(x.shape, weight.shape, margin=False))
        return out if bias is None else out + bias.reshape(-1, *(1 for _ in self.stride))

    def grad_input(self, error: Tensor, weight: Tensor, shape: torch.Size, last: bool, by: Accumulator) -> Tensor:
        """The gradient of an input of this shape, which lay in channels_last if `last`."""
        if sizes := self._toeplitz(error, shape, weight.shape, by):
            dense: Tensor = toeplitz.toeplitz("big_from_small", error, weight, sizes)
            return dense
        if by.form == "fp32":
            return self._backward(error, None, weight, shape, last, [True, False, False])[0]
        product = "small_from_big" if self.transposed else "big_from_small"
        return by(product, error, weight, geometry=self.geometry(shape, weight.shape, margin=False))

    def grad_weight(
        self, error: Tensor, x: Tensor, shape: torch.Size, last: bool, wanted: tuple[bool, ...], by: Accumulator
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight (of this shape, in channels_last if `last`) and bias, as far as `wanted`."""
        if by.form == "fp32" and not (by.reordered and error.device.type == "cpu"):
            grads = iter(self._backward(error, x, None, shape, last, [False, *wanted]))
            return next(grads) if wanted[0] else None, next(grads) if wanted[1] else None
        weight_grad = None
        if wanted[0] and (sizes := self._toeplitz(error, x.shape, shape, by)):
            weight_grad = toeplitz.toeplitz("weight_from_both", x, error, sizes)
        elif wanted[0] and by.form == "fp32":  # for a bias, oneDNN takes several times as long as a sum on its own
            (weight_grad,) = self._backward(error, x, None, shape, last, [False, True, False])
        elif wanted[0]:
            big, small = (error, x) if self.transposed else (x, error)
            geometry = self.geometry(x.shape, shape, margin=False)
            weight_grad = by("weight_from_both", big, small, geometry=geometry)
        return weight_grad, error.sum((0, *range(2, error.dim()))) if wanted[1] else None

    def grid(self, x: Tensor) -> Tensor:
        """The tensor as `Geometry` sees it: [batch, channels, *grid]."""
        return x

    def cut(self, counts: Tensor) -> Tensor:
        """Counts [..., *grid] of an input without those of its margin."""
        return part(counts, [slice(0, -size or None) for size in self.margin]) if any(self.margin) else counts

    def last(self, x: Tensor, geometry: Geometry, by: Accumulator) -> bool:
        """Whether operands are laid out in channels_last: where the model's own are, and for Toeplitz products.

        oneDNN is often faster so, but torch 2.13's corrupts the heap in gradients of strided 1x1 weights of fewer than
        8 channels on AVX2: a layout that the model did not choose must not be forced on its convolutions.
        """
        if not self._by_onednn(x, by):
            return False
        if backends.memory_format(x) == torch.channels_last:
            return True
        return not self.transposed and toeplitz.suits(replace(geometry, big=tuple(x.shape[2:])))

    def geometry(self, shape: torch.Size, weight: torch.Size, margin: bool = True) -> Geometry:
        """Of an input and weight shape; with `margin`, padding put there beforehand counts as padding."""
        sizes = [self._output(shape[2 + d], weight[2 + d], d) for d in range(len(self.stride))]
        small_channels, big_channels = weight[0], weight[1] * self.groups
        cut = self.margin if margin else (0,) * len(self.stride)
        inner = tuple(size - c for size, c in zip(shape[2:], cut, strict=True))
        big, small = (tuple(sizes), inner) if self.transposed else (inner, tuple(sizes))
        kernel = tuple(weight[2:])
        return Geometry(
            shape[0],
            big_channels,
            small_channels,
            self.groups,
            big,
            small,
            kernel,
            self.stride,
            self.padding,
            self.dilation,
        )

    def _output(self, size: int, kernel: int, d: int) -> int:
        reach = self.dilation[d] * (kernel - 1)
        if self.transposed:
            return (size - 1) * self.stride[d] - 2 * self.padding[d] + reach + self.output_padding[d] + 1
        return (size + 2 * self.padding[d] - reach - 1) // self.stride[d] + 1

    @property
    def _arguments(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        lists = (list(self.stride), list(self.padding), list(self.dilation))
        return *lists, self.transposed, list(self.output_padding), self.groups

    def _by_onednn(self, x: Tensor, by: Accumulator) -> bool:
        """Whether oneDNN computes two-dimensional products, of an operand such as x."""
        cpu = ONEDNN and x.device.type == "cpu" and not backends.on_gpu(x)
        return cpu and x.dim() == 4 and by.form == "fp32" and x.dtype != torch.float64

    def _toeplitz(self, x: Tensor, shape: torch.Size, weight: torch.Size, by: Accumulator) -> list[int] | None:
        """The sizes for products by the weight's Toeplitz matrix, if those are faster; x is one of their operands."""
        if not toeplitz.is_small(shape[2:], weight[2:]) or self.transposed:  # as most are, which takes no geometry
            return None
        if not by.reordered or x.dtype != torch.float32 or not self._by_onednn(x, by):
            return None
        geometry = self.geometry(shape, weight, margin=False)
        return geometry.pack() if toeplitz.suits(geometry) else None

    def _backward(
        self, error: Tensor, x: Tensor | None, weight: Tensor | None, shape: torch.Size, last: bool, mask: list[bool]
    ) -> list[Tensor]:
        """The gradients that the mask asks for, as `product_ops.gradients` has them."""
        operands = (error, x, weight, shape, last, [error.shape[1]] if mask[2] else None)
        if torch.compiler.is_compiling():
            return product_ops.convolution_backward(*operands, *self._arguments, mask)  # type: ignore[no-any-return]
        return product_ops.gradients(*operands, self._arguments, mask)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, by: Accumulator) -> Tensor:
    """x [*, K] by weight [N, K], and a bias [N]."""
    many = x.numel() * weight.shape[0] >= MANY
    if by.widens(x):
        sums: Tensor = product_ops.half_matmul(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight.T, bias)
    elif many and by.reordered and ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        sums = product_ops.fast_linear(x.reshape(-1, x.shape[-1]), weight, bias)
    elif torch.compiler.is_compiling():
        sums = product_ops.linear(x, weight, bias)
    else:
        return F.linear(x, weight, bias)
    return sums.reshape(*x.shape[:-1], weight.shape[0])
