"""The least that an emulation outside the convolution can cost: operands and results copied, no more.

Each operand is copied where a layer would round it, the input kept in binary16, each result written once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Arguments = tuple[list[int], list[int], list[int], bool, list[int], int]


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, arguments: Arguments) -> Tensor:
        ctx.arguments, ctx.wants = arguments, ctx.needs_input_grad[:3]
        copy = x.clone()
        ctx.save_for_backward(copy.half(), weight)
        output: Tensor = torch.ops.aten.convolution(copy, weight.clone(), bias, *arguments)
        return output.mul_(1.0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        half, weight = ctx.saved_tensors
        error, x = grad_output.clone(), half.float()
        bias = [len(weight)] if ctx.wants[2] else None

        def gradients(weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
            grads = torch.ops.aten.convolution_backward(error, x, weight, bias, *ctx.arguments, mask)
            return tuple(grad if grad is None else grad.mul_(1.0) for grad in grads)

        _, grad_weight, grad_bias = gradients(weight, [False, *ctx.wants[1:]])
        grad_input = gradients(weight.clone(), [True, False, False])[0] if ctx.wants[0] else None
        return grad_input, grad_weight, grad_bias, None


class CopiedConv2d(nn.Conv2d):
    """`nn.Conv2d` with copies in all three steps."""

    def forward(self, x: Tensor) -> Tensor:
        arguments = (list(self.stride), list(self.padding), list(self.dilation), False, [0, 0], self.groups)
        output: Tensor = _Copied.apply(x, self.weight, self.bias, arguments)  # type: ignore[no-untyped-call]
        return output


def copied(model: nn.Module) -> nn.Module:
    """The model with its convolutions replaced, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = CopiedConv2d
    return model
