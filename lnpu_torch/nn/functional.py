"""Products as LNPU computes them: three steps, each with its own operand precisions.

    forward       output      = input       * weight
    grad_input    grad_input  = grad_output * weight
    grad_weight   grad_weight = grad_output * input

Each operand is rounded once and used by both steps that read it, where their rules agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from lnpu_torch.nn import attention
from lnpu_torch.nn.gemms import Convolution, Like, Linear, MatMul, Product
from lnpu_torch.nn.layer_call import (
    Saved,
    backward,
    forward,
    layer_backward,
    layer_forward,
    plan,
)
from lnpu_torch.nn.layer_state import LayerState
from lnpu_torch.nn.observers import notify_observers, opaque
from lnpu_torch.ops.memory_format import lies_last


def _refuse_double_backward() -> None:
    """Raises RuntimeError inside a backward whose own gradient is asked for."""
    if torch.is_grad_enabled():  # as it is in a backward with create_graph=True alone
        raise RuntimeError(
            "double backward (create_graph=True) through an emulated layer is not supported: revert it to torch's own"
        )


class _LayerCall(torch.autograd.Function):
    """The three steps of one layer. `wants` says which gradients are asked for: input, weight, bias."""

    @staticmethod
    @notify_observers
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product: Product,
        state: LayerState,
        wants: tuple[bool, bool, bool],
        dtype: torch.dtype,
    ) -> Tensor:
        seed = state.seed(input)
        if opaque():
            chosen = (product.pack(), state.text, wants, state.training, state.counting)
            output, values, *counts = layer_forward(input, weight, bias, *state.tensors(), seed, *chosen, dtype)
            if wants[1] and state.plan.reads["grad_weight", "input"].rule is None:
                values = input
            ctx.plan = None
            ctx.save_for_backward(weight, seed, values, *counts)
            ctx.like = input.shape, lies_last(input), input.dtype
        else:
            ctx.plan = plan(product, state, input.shape, weight.shape, input)
            output, saved, ctx.weight = forward(state, ctx.plan, input, weight, bias, seed, wants, dtype, keep=True)
            ctx.save_for_backward(weight if wants[0] else None, seed, *saved)
            ctx.like = Like.of(input), Like.of(weight)
        ctx.layer = product, state, wants, None if bias is None else bias.dtype
        return output  # type: ignore[no-any-return]

    @staticmethod
    @notify_observers
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        with _without_autocast(grad_output.device.type):
            return _backward(ctx, grad_output.resolve_neg())


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    (product, state, asked, bias), (weight, seed, *saved) = ctx.layer, ctx.saved_tensors
    wants = _asked(ctx, asked)
    if ctx.plan is None:
        chosen = (product.pack(), state.text, wants, state.training, state.counting)
        found = layer_backward(grad_output, weight, saved, *state.tensors(), seed, *chosen, *ctx.like, bias)
        grads = [grad if wanted else None for grad, wanted in zip(found, wants, strict=True)]
    else:
        input, kernel = ctx.like
        planned = ctx.plan
        if planned.counting != state.counting:  # a forward of another block
            planned = plan(product, state, input.shape, kernel.shape, grad_output)
        likes = (input, kernel, bias)
        kept, ctx.weight = ctx.weight, None  # memory that a graph which is kept does not hold
        grads = backward(state, planned, grad_output, weight, Saved(*saved), seed, wants, likes, kept)
    return (*grads, None, None, None, None)


def _asked(ctx: Any, wants: tuple[bool, bool, bool]) -> tuple[bool, ...]:
    """Which gradients the running backward asks for, of input, weight and bias.

    `torch.autograd.grad` and `backward(inputs=...)` may ask for fewer than have `requires_grad`. Compiled code computes
    those that it was compiled for.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return wants
    nodes = [node for node, _ in ctx.next_functions]
    return tuple(wanted and _will_run(node) for wanted, node in zip(wants, [*nodes, None], strict=False))


def _will_run(node: Any) -> bool:
    """Whether the running backward comes to a node of autograd's graph."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient `torch.autograd.grad` returns; of another leaf it is said
        return True


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, emulation: LayerState) -> Tensor:
    """`torch.nn.functional.linear`, emulated: input [*, in], weight [out, in], bias [out] -> [*, out]."""
    return _emulate(input, weight, bias, Linear(), emulation)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    emulation: LayerState,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> Tensor:
    """Torch's conv1d/2d/3d and conv_transpose1d/2d/3d, emulated; the weight tells the number of dimensions.

    Args:
        input: [N, C, *grid] or [C, *grid].
        weight: [K, C / groups, *kernel], or [C, K / groups, *kernel] if transposed.
        padding: numbers, "same" or "valid".

    Raises:
        ValueError: input and weight do not fit together.
    """
    dims = weight.dim() - 2
    if input.dim() not in (dims + 1, dims + 2):
        raise ValueError(f"expected {dims + 1}D (unbatched) or {dims + 2}D input, got {list(input.shape)}")
    sizes = (stride, padding, dilation, output_padding)
    make = _convolution.__wrapped__ if torch.compiler.is_compiling() else _convolution  # a cache makes dynamo warn
    product = make(tuple(weight.shape[2:]), *map(_hashable, sizes), groups, transposed)
    batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
    if any(product.margin):
        batched = F.pad(batched, [side for cut in reversed(product.margin) for side in (0, cut)])
    output: Tensor
    if batched.shape[1]:
        output = _emulate(batched, weight, bias, product, emulation)
    else:  # nothing is multiplied, and torch gives the result no channels either
        output = torch.ops.aten.convolution(batched, weight, bias, *product.arguments)
    return output if input.dim() == dims + 2 else output.squeeze(0)


def matmul(input: Tensor, other: Tensor, emulation: LayerState) -> Tensor:
    """`torch.matmul`, emulated, of two tensors that both may change with each call; `other` stands where weights do.

    Args:
        input, other: of one dimension or more; leading dimensions are broadcast.

    Raises:
        RuntimeError: they do not fit together.
    """
    if input.dim() == 1 or other.dim() == 1:
        rows = input.unsqueeze(0) if input.dim() == 1 else input
        out = matmul(rows, other.unsqueeze(1) if other.dim() == 1 else other, emulation)
        out = out.squeeze(-1) if other.dim() == 1 else out
        return out.squeeze(-1 if other.dim() == 1 else -2) if input.dim() == 1 else out
    if input.shape[-1] != other.shape[-2]:
        raise RuntimeError(f"cannot multiply {list(input.shape)} by {list(other.shape)}")
    if not (input.numel() and other.numel()):
        return torch.matmul(input, other)  # nothing is multiplied
    outputs, turned = other.shape[-1], other.stride(-2) == 1 != other.stride(-1)
    right = other.mT if turned else other
    if other.dim() == 2:  # by which the rows of all entries are multiplied
        out = _emulate(input.reshape(1, -1, input.shape[-1]), right[None], None, MatMul(turned), emulation)
        return out.reshape(*input.shape[:-1], outputs)
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    a, b = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (input, right))
    return _emulate(a, b, None, MatMul(turned), emulation).reshape(*batch, input.shape[-2], outputs)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, emulation: tuple[LayerState, LayerState], *args: Any, **kwargs: Any
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, emulated: two products, and a softmax in float between them.

    Args:
        query, key, value: [..., L, E], [..., S, E] and [..., S, Ev].
        emulation: of the product of query and key, and of that of probabilities and value.
        args, kwargs: as torch's: attn_mask, dropout_p, is_causal, scale, enable_gqa.
    """
    states = dict(zip(("scores", "values"), emulation, strict=True))
    return attention.scaled_dot_product_attention(
        lambda a, b, part: matmul(a, b, states[part]), query, key, value, *args, **kwargs
    )


def _of_each(size: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """A size for each dimension, of one number, alone or in a tuple, or several."""
    several = (size,) if isinstance(size, int) else size
    return several * dims if len(several) == 1 else several


def _hashable(size: str | int | Sequence[int]) -> Any:
    return size if isinstance(size, str | int) else tuple(size)


@lru_cache(maxsize=1024)
def _convolution(
    kernel: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    output_padding: Any,
    groups: int,
    transposed: bool,
) -> Convolution:
    """A convolution from sizes as torch takes them."""
    sizes = partial(_of_each, dims=len(kernel))
    dilations, margin = sizes(dilation), (0,) * len(kernel)
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        padding, margin = tuple(total // 2 for total in totals), tuple(total % 2 for total in totals)
    return Convolution(sizes(stride), sizes(padding), dilations, groups, transposed, sizes(output_padding), margin)


def _emulate(input: Tensor, weight: Tensor, bias: Tensor | None, product: Product, emulation: LayerState) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack():  # which would see each of many calls
        with torch._C.DisableTorchFunction():
            return _emulated(input, weight, bias, product, emulation)
    return _emulated(input, weight, bias, product, emulation)


def _emulated(input: Tensor, weight: Tensor, bias: Tensor | None, product: Product, emulation: LayerState) -> Tensor:
    for name, tensor in (("input", input), ("weight", weight)):
        if not tensor.is_floating_point():
            raise TypeError(f"an emulated layer takes floating-point tensors, but its {name} is {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"an emulated layer takes strided tensors, but its {name} is {tensor.layout}")
    check_untransformed(input)
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.device != input.device:
            raise RuntimeError(
                f"a layer is where its input is, but its input is on {input.device} and its {name} on {other.device}"
            )
    kind, dtype = input.device.type, input.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if "forward" not in emulation.plan.emulated:  # torch's own product, then, on torch's own casts
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif input.dtype != weight.dtype:
        raise TypeError(f"input is {input.dtype} and weight {weight.dtype}: convert one, or use autocast")
    product.check(input, weight, bias)
    input, weight = input.resolve_neg(), weight.resolve_neg()  # ops read memory, which such views do not tell of
    bias = None if bias is None else bias.resolve_neg()
    asked = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (input, weight, bias)]
    with _without_autocast(kind):
        output: Tensor = _LayerCall.apply(input, weight, bias, product, emulation, tuple(asked), dtype)  # type: ignore[no-untyped-call]
    return output


def check_untransformed(x: Tensor) -> None:
    """Raises RuntimeError within torch.func's transforms, and for an x with a forward-mode derivative."""
    if _is_transformed(x):
        raise RuntimeError(
            "torch.func transforms and forward-mode derivatives through an emulated layer are not supported: "
            "lnpu_torch.revert the model first"
        )


def _is_transformed(x: Tensor) -> bool:
    """Whether torch.func transforms the call (vmap, grad, jvp ...), or x carries a forward-mode derivative."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or (
        forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    )


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Autocast off; compiled, even where it seems off: dynamo traces a backward in the forward's state, not its own."""
    on = torch.is_autocast_enabled(kind) or torch.compiler.is_compiling()
    return torch.autocast(kind, enabled=False) if on else nullcontext()
