"""A model whose convolutions are given cast operands in all three steps. How they are cast is the caller's choice.

With mere copies it is the least that an emulation outside the convolution can cost: operands copied where a layer would
round them, the input kept in binary16, each result written once more. With a peer's cast it is that peer, at its best:
each operand is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Arguments = tuple[list[int], list[int], list[int], bool, list[int], int]
Cast = Callable[[Tensor], Tensor]


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, arguments: Arguments, cast: Cast, kept: torch.dtype
    ) -> Tensor:
        ctx.arguments, ctx.cast, ctx.wants = arguments, cast, ctx.needs_input_grad[:3]
        values = cast(x)
        ctx.save_for_backward(values.to(kept), weight)
        output: Tensor = torch.ops.aten.convolution(values, cast(weight), bias, *arguments)
        return output.mul_(1.0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        error, x = ctx.cast(grad_output), kept.float()
        bias = [len(weight)] if ctx.wants[2] else None

        def gradients(weight: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
            grads = torch.ops.aten.convolution_backward(error, x, weight, bias, *ctx.arguments, mask)
            return tuple(grad if grad is None else grad.mul_(1.0) for grad in grads)

        _, grad_weight, grad_bias = gradients(weight, [False, *ctx.wants[1:]])
        grad_input = gradients(ctx.cast(weight), [True, False, False])[0] if ctx.wants[0] else None
        return grad_input, grad_weight, grad_bias, None, None, None


class CastConv2d(nn.Conv2d):
    """`nn.Conv2d` with cast operands."""

    cast: Cast
    kept: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        arguments = (list(self.stride), list(self.padding), list(self.dilation), False, [0, 0], self.groups)
        output: Tensor = _Cast.apply(x, self.weight, self.bias, arguments, self.cast, self.kept)  # type: ignore[no-untyped-call]
        return output


def with_casts(model: nn.Module, cast: Cast = torch.clone, kept: torch.dtype = torch.float16) -> nn.Module:
    """The model with its convolutions replaced, in place; `kept` is the dtype in which they keep their inputs."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = CastConv2d
            module.cast, module.kept = cast, kept  # type: ignore[assignment]
    return model
