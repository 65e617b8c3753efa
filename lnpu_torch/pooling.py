"""Max pooling that keeps a byte per result for its backward, not eight and its input; and its ops. No layers here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch import backends
from lnpu_torch.registry import fake, op
from lnpu_torch.relu import refuse_double_backward

Size = int | tuple[int, ...]
MOST = 254
"""Elements of a window for which a byte is enough."""


def max_pool2d(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Torch's max pooling, bit for bit: x [N, C, H, W] or [C, H, W]. Its backward keeps a byte per result where it can.

    That is in training on a CPU, of a contiguous float32 tensor, without dilation or `ceil_mode`, and not compiled.
    """
    trained, compiled = torch.is_grad_enabled() and x.requires_grad, torch.compiler.is_compiling()
    if trained and not compiled and not ceil_mode:
        window, by, before, spread = map(
            _two, (kernel_size, kernel_size if stride is None else stride, padding, dilation)
        )
        if spread == [1, 1] and _suits(x, window, by, before):
            output: Tensor = _CodedMaxPool.apply(x, window, by, before)  # type: ignore[no-untyped-call]
            return output
    return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)


def _two(size: Size) -> list[int]:
    """A size for each dimension; none of what torch takes besides, or refuses."""
    sizes = [size, size] if type(size) is int else size
    return list(sizes) if isinstance(sizes, tuple | list) and [type(each) for each in sizes] == [int, int] else []


def _suits(x: Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether the compiled loops take x. They do not take what torch refuses."""
    if not (window and stride and padding) or x.dim() not in (3, 4):
        return False
    if not x.is_contiguous() or backends.dense_loops(x) is None:
        return False
    sound = all(k > 0 and s > 0 and 0 <= 2 * p <= k for k, s, p in zip(window, stride, padding, strict=True))
    return sound and window[0] * window[1] <= MOST and min(_results(x, window, stride, padding)) > 0


def _results(x: Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """The shape of the result."""
    sizes = zip(x.shape[-2:], window, stride, padding, strict=True)
    return [*x.shape[:-2], *((size + 2 * p - k) // s + 1 for size, k, s, p in sizes)]


class _CodedMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *sizes: Sequence[int]) -> Tensor:
        out: Tensor
        out, codes = coded_max_pool(x, *sizes)
        ctx.save_for_backward(codes)
        ctx.shape, ctx.sizes = x.shape, sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (codes,) = ctx.saved_tensors
        return coded_max_pool_backward(grad_output.contiguous(), codes, ctx.shape, *ctx.sizes), None, None, None


@op()
def coded_max_pool(
    x: Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The largest element of each window, and, uint8, which of the window it is, row-major.

    Args:
        x: [..., H, W], contiguous float32 on a CPU.
        window, stride, padding: two sizes each, that torch would take.
    """
    from lnpu_torch import cpu  # only here is it sure that Numba is installed

    return cpu.max_pool(x, _results(x, window, stride, padding), window, stride, padding)


@fake("coded_max_pool")
def _(x: Tensor, *sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = _results(x, *sizes)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)


@op()
def coded_max_pool_backward(
    error: Tensor,
    codes: Tensor,
    shape: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """The gradient of `coded_max_pool`'s input, which has this shape, from a contiguous error."""
    from lnpu_torch import cpu

    return cpu.max_pool_backward(error, codes, shape, window, stride, padding)


fake("coded_max_pool_backward")(lambda error, codes, shape, *_: error.new_empty(shape))
