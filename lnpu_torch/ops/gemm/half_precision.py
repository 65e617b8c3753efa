"""The registered torch ops of products: of binary16 operands with float32 sums, and with reduced accumulators."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from lnpu_torch.ops import buffers
from lnpu_torch.ops import dispatch as backends
from lnpu_torch.ops.gemm import reference as accumulating
from lnpu_torch.ops.pair_counts.conv_shape import Geometry
from lnpu_torch.ops.quantize import reference
from lnpu_torch.ops.registry import OPS, fake, op
from lnpu_torch.quant.formats import FORMATS


def _vendor() -> str:
    """Text in which the CPU's vendor stands."""
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        return "".join(islice(lines, 2))
    return platform.processor()


MKL_IS_FAST = torch.backends.mkl.is_available() and "GenuineIntel" in _vendor()
"""MKL, which torch takes for linear layers, is slow on CPUs of others than Intel."""


@op()
def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand in a wider dtype, as the other one of its product is in."""
    if x.device.type == "cpu" and buffers.is_dense(x):
        return buffers.empty_like(x, dtype).copy_(x)
    return x.to(dtype)


@fake("widened")
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


@op()
def half_matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a [M, K] by b [K, N], both binary16, and a bias [N], summed and returned in float32.

    cuBLAS' reductions in reduced precision are a switch of the whole process, but touch only results that are narrower
    than the sums. Where the process has sums themselves in binary16, operands are widened first: their products are
    exact in float32 and in TF32 alike.
    """
    if a.is_cuda and not torch.backends.cuda.matmul.allow_fp16_accumulation:
        sums = torch.mm(a, b, out_dtype=torch.float32)
    else:
        sums = a.float() @ b.float()
    return sums if bias is None else sums.add_(bias)


@fake("half_matmul")
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


@op()
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's own, unseen by compilers, and so by those who look for products outside of emulated layers."""
    return F.linear(x, weight, bias)


@fake("linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] by weight [N, K], and a bias [N], float32 on a CPU, large: by MKL or oneDNN, whichever is faster."""
    out: Tensor = (linear if MKL_IS_FAST else onednn_linear)(x, weight, bias)
    return out


@op()
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] by weight [N, K], and a bias [N], float32 on a CPU, by oneDNN where torch itself would take MKL."""
    if not torch.backends.mkldnn.enabled:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


@fake("onednn_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@register_flop_formula(OPS.onednn_linear)
def _(x: torch.Size, weight: torch.Size, bias: torch.Size | None, **_: Any) -> int:
    """Torch's FlopCounterMode gives the shapes."""
    return 2 * x.numel() * weight[0]


@op()
def half_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    geometry: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    transposed: bool,
) -> Tensor:
    """Torch's convolution of binary16 operands, with the bias added to the float32 sums; binary16, rounded once.

    cuDNN's own binary16 convolutions round before torch adds the bias. So either Triton's product is taken, or cuDNN's
    on TF32: binary16 is exact in it, and its sums come in float32. The TF32 switch is this call's alone.
    """
    module, last = backends.gpu_module(x), backends.memory_format(x) == torch.channels_last
    if module is not None and last and module.supports(x, None):
        return module.biased_convolution(x, weight, bias, geometry, transposed)  # type: ignore[no-any-return]
    cudnn = torch.backends.cudnn
    lists = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
    switches = (cudnn.benchmark, cudnn.deterministic or torch.are_deterministic_algorithms_enabled(), cudnn.enabled)
    sums = torch.ops.aten._convolution(x.float(), weight.float(), None, *lists, *switches, True)
    rounded = sums.add_(bias.reshape(-1, *(1 for _ in stride))).half()
    return rounded.contiguous(memory_format=backends.memory_format(x))  # type: ignore[no-any-return]


@fake("half_convolution")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    geometry: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    transposed: bool,
) -> Tensor:
    result = x.new_empty(Geometry.unpack(geometry).shape("big" if transposed else "small"))
    return result.to(memory_format=backends.memory_format(x))


@op()
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Torch's own, unseen by inductor.

    It lays out whatever is next to a convolution in channels_last, on a CPU, and so turned what had just been turned.
    """
    arguments = (stride, padding, dilation, transposed, output_padding, groups)
    return torch.ops.aten.convolution(x, weight, bias, *arguments)  # type: ignore[no-any-return]


fake("convolution")(inspect.unwrap(convolution))


def gradients(
    error: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    shape: Sequence[int],
    last: bool,
    bias: Sequence[int] | None,
    arguments: tuple[Any, ...],
    mask: Sequence[bool],
) -> list[Tensor]:
    """Torch's own `convolution_backward`: the gradients of x, weight and bias that the mask asks for.

    One of x and weight is None: it is not read, of this shape, and `last` says whether it lies in channels_last, for
    torch computes in the format of these two.
    """
    if x is None or weight is None:
        form = (torch.channels_last if len(shape) == 4 else torch.channels_last_3d) if last else torch.contiguous_format
        unread = torch.empty(shape, dtype=error.dtype, device=error.device, memory_format=form)
        x, weight = unread if x is None else x, unread if weight is None else weight
    grads = torch.ops.aten.convolution_backward(error, x, weight, bias, *arguments, mask)
    return [grad for grad, wanted in zip(grads, mask, strict=True) if wanted]  # oneDNN gives others, too


@op()
def convolution_backward(
    error: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    shape: Sequence[int],
    last: bool,
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> list[Tensor]:
    """`gradients`, unseen by inductor, as `convolution` is."""
    arguments = (stride, padding, dilation, transposed, output_padding, groups)
    return gradients(error, x, weight, shape, last, bias, arguments, mask)


fake("convolution_backward")(inspect.unwrap(convolution_backward))


@op()
def accumulate(product: str, a: Tensor, b: Tensor, geometry: Sequence[int], form: str, chunk: int) -> Tensor:
    """A product of `ops.gemm.reference`, by name; its accumulator is rounded to a format every `chunk` products."""
    shape, module = Geometry.unpack(geometry), backends.gpu_module(a)
    if module is not None and module.accumulates(a, b, form, len(shape.kernel)):
        return module.accumulate(product, a, b, geometry, chunk).contiguous()  # type: ignore[no-any-return]
    compute = torch.promote_types(reference.compute_dtype(a), reference.compute_dtype(b))
    result = getattr(accumulating, product)(a.to(compute), b.to(compute), shape, FORMATS[form], chunk)
    return result.contiguous()  # type: ignore[no-any-return]


@fake("accumulate")
def _(product: str, a: Tensor, b: Tensor, geometry: Sequence[int], form: str, chunk: int) -> Tensor:
    compute = torch.promote_types(reference.compute_dtype(a), reference.compute_dtype(b))
    return a.new_empty(Geometry.unpack(geometry).shape(product.split("_")[0]), dtype=compute)


@op()
def rounded_result(x: Tensor, form: str, dtype: torch.dtype, turned: bool = False, lent: bool = False) -> Tensor:
    """A step's fresh result rounded to a format, nearest, overflow to infinity, in another dtype; x may be used up.

    Args:
        turned: whether it lies in channels_last, and shall be contiguous.
        lent: whether it may lie in `buffers.POOL`.
    """
    module = backends.gpu_module(x)
    if module is not None and module.rounds_results(x, dtype):
        out: Tensor = module.round_result(x, None, form, dtype)
        return out.clone() if out is x else out
    out = _fresh(x, turned, lent)
    _round(x, out, form)
    return out.to(dtype)


@fake("rounded_result")
def _(x: Tensor, form: str, dtype: torch.dtype, turned: bool = False, lent: bool = False) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype) if turned else torch.empty_like(x, dtype=dtype)


@op(["out"])
def round_result(x: Tensor, out: Tensor, form: str) -> None:
    """Round a step's result to a format, as `rounded_result` does, into a tensor as from `place`."""
    _round(x, out, form)


def place(x: Tensor, turned: bool, lent: bool) -> Tensor:
    """Where a step's result x may be written to: in its own memory, unless it is large and `lent`."""
    if lent and x.is_cpu and x.nbytes >= buffers.LARGE:
        return _fresh(x, turned, lent)
    return torch.ops.aten._unsafe_view(x.permute(0, 2, 3, 1), x.shape) if turned else x


def _fresh(x: Tensor, turned: bool, lent: bool) -> Tensor:
    """Memory for a result, contiguous if `turned`, else in x's order."""
    if lent and x.is_cpu and (turned or buffers.is_dense(x)):
        return buffers.POOL.empty(x.shape, x.dtype, last=not (turned or x.is_contiguous()))
    return x.new_empty(x.shape) if turned else torch.empty_like(x)


def _round(x: Tensor, out: Tensor, form: str) -> None:
    fast, turned = backends.dense_loops(x), out.stride() != x.stride()
    if fast and turned and form in ("fp16", "fp32"):
        fast.turn_half(x, out, form == "fp16")
    elif fast and form == "fp16":
        fast.round_half(x, out)
    else:  # by a copy, as `out` may be x's memory in another order
        compute = x.to(reference.compute_dtype(x), copy=True)
        out.copy_(compute if form == "fp32" else reference.round_to(compute, FORMATS[form]))
