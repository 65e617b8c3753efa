"""ReLUs that keep little for their backward, and what autograd's functions of this package refuse. No layers here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch import backends, buffers, relu_ops


def refuse_double_backward() -> None:
    """Raises RuntimeError inside a backward whose own gradient is asked for."""
    if torch.is_grad_enabled():  # as it is in a backward with create_graph=True alone
        raise RuntimeError(
            "double backward (create_graph=True) through an emulated model is not supported: revert it to torch's own"
        )


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """Torch's ReLU, bit for bit, which keeps one bit per element for its backward where it can; compiled, one byte."""
    output: Tensor
    trained, compiled = torch.is_grad_enabled() and x.requires_grad, torch.compiler.is_compiling()
    if trained and compiled and x.dtype == torch.float32 and x.device.type == "cpu":
        output = _ByteReLU.apply(x)  # type: ignore[no-untyped-call]
        return x.copy_(output) if inplace else output
    if trained and not compiled and backends.dense_loops(x):
        output = _PackedReLU.apply(x, inplace)  # type: ignore[no-untyped-call]
        return output
    return F.relu(x, inplace)


class _PackedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        out = x if inplace else buffers.empty_like(x, x.dtype)
        ctx.format = backends.memory_format(x)
        ctx.save_for_backward(relu_ops.packed_relu(x, out))
        if inplace:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        refuse_double_backward()
        (signs,) = ctx.saved_tensors
        return relu_ops.packed_relu_backward(grad_output.contiguous(memory_format=ctx.format), signs), None


class _ByteReLU(torch.autograd.Function):
    """A float32 ReLU without truth values: inductor keeps those, and takes 20 times as long to write them on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = F.relu(x)
        ctx.save_for_backward(torch.where(out <= 0, 0.0, 1.0).to(torch.uint8))
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        refuse_double_backward()
        (signs,) = ctx.saved_tensors
        passed: Tensor = grad_output.view(torch.int32) & -signs.to(torch.int32)
        return passed.view(torch.float32)
