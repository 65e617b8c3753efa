"""Multiply-accumulates of torch's own ops, as its FLOP formulas have them, and of a whole forward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from lnpu_torch.nn.attention import is_weight
from lnpu_torch.nn.observers import LayerObserver, LayerSteps

_aten = torch.ops.aten


def _recurrent(x: Tensor, weights: Iterable[Tensor]) -> int:
    """Each row of a recurrent layer's input, and the state that goes with it, is multiplied by the weight matrices."""
    return x.numel() // x.shape[-1] * sum(each.numel() for each in weights if each.dim() == 2)


def _trilinear(args: Sequence[Any]) -> int:
    """One for each element of the three operands' common space."""
    sizes = [list(x.shape) for x in args[:3]]
    for size, expanded in zip(sizes, args[3:6], strict=True):
        for dim in sorted(expanded):
            size.insert(dim, 1)
    return prod(map(max, zip(*sizes, strict=True)))


def _grouped(args: Sequence[Any]) -> int:
    """a [M, K] or [groups, M, K] by b [K, N] or [groups, K, N], each row, column or entry of one group alone."""
    a, b = args[:2]
    entries: int = b.numel() * a.shape[-2] if a.dim() > b.dim() else a.numel() * b.shape[-1]
    return entries


OWN: dict[str, Callable[[Sequence[Any]], int]] = {
    "mkldnn_rnn_layer": lambda args: _recurrent(args[0], args[1:3]),
    "mkldnn_rnn_layer_backward": lambda args: 2 * _recurrent(args[0], args[1:3]),
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), lambda args: _recurrent(args[0], args[1])),
    **dict.fromkeys(("_cudnn_rnn_backward", "miopen_rnn_backward"), lambda args: 2 * _recurrent(args[0], args[1])),
    "_trilinear": _trilinear,
    "_grouped_mm": _grouped,
    "addbmm": lambda args: args[1].numel() * args[2].shape[-1],
    "mv": lambda args: args[0].numel(),
    "addmv": lambda args: args[1].numel(),
    **dict.fromkeys(("dot", "vdot"), lambda args: args[0].numel()),
}
"""Multiply-accumulates, from its arguments, of each op that torch's FlopCounterMode does not know."""

FLOPS = {
    **flop_registry,
    **{
        getattr(_aten, f"_scaled_dot_product_flash_attention_for_cpu{end}"): flop_registry[
            getattr(_aten, f"_scaled_dot_product_flash_attention{end}")
        ]
        for end in ("", "_backward")
    },
}


def is_product(func: Any) -> bool:
    """Whether `macs` has a formula for an op."""
    packet = getattr(func, "_overloadpacket", None)
    return packet in FLOPS or (packet is not None and func._schema.name.removeprefix("aten::") in OWN)


def macs(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Multiply-accumulates in one call of an op that `is_product`."""
    if func._overloadpacket in FLOPS:
        flops: int = FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
        return flops // 2
    return OWN[func._schema.name.removeprefix("aten::")](args)


HARMLESS = {
    *("embedding", "_embedding_bag", "_to_copy", "clone", "copy_", "cat", "stack", "index_select", "gather", "index"),
    *("sum", "mean", "linalg_vector_norm", "norm", "_weight_norm_interface", "native_layer_norm", "detach", "equal"),
    *("var", "var_mean", "std", "std_mean"),
}
"""Ops that read weights and multiply nothing by them, beside views and pointwise ops."""


def _may_multiply(func: Any, args: Any) -> bool:
    """Whether an op calls others, or reads a Parameter of two dimensions or more and does not only move or scale it."""
    if isinstance(func, torch._ops.HigherOrderOperator):
        return True
    if not isinstance(func, torch._ops.OpOverload) or func.is_view or torch.Tag.pointwise in func.tags:
        return False
    return func._schema.name.removeprefix("aten::") not in HARMLESS and any(map(_is_weight, args))


def _is_weight(arg: Any) -> bool:
    if isinstance(arg, list | tuple):
        return any(map(_is_weight, arg))
    return isinstance(arg, Tensor) and is_weight(arg) and arg.dim() > 1


class _Products(LayerObserver):
    """Adds up multiply-accumulates by innermost module and op; None for one that may multiply, and has no formula.

    Those of emulated products are out of sight.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: dict[tuple[str, str], int | None] = {}
        self.inside = [""]

    def layer_ran(self, steps: LayerSteps) -> None:
        """Its own counters tell of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if self.blind:
            return out
        place = (self.inside[-1], str(getattr(func, "_overloadpacket", func)))
        if is_product(func):
            self.macs[place] = (self.macs.get(place) or 0) + macs(func, args, kwargs or {}, out)
        elif _may_multiply(func, args):
            self.macs.setdefault(place, None)
        return out


def forward_macs(
    model: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]
) -> dict[tuple[str, str], int | None]:
    """Multiply-accumulates of `model(*inputs, **named)` in training, by module and op ("aten.bmm").

    Not those of emulated products. Those of an op that may multiply and has no formula (flex_attention) are None.
    Torch's random numbers stay as they are, but the model does not: hooks are added, and batch norm sees the batch.

    Args:
        model: a copy.
    """
    products = _Products()
    for name, module in model.named_modules():
        module.training = True
        module.register_forward_pre_hook(lambda *_, name=name: products.inside.append(name), prepend=True)
        module.register_forward_hook(lambda *_: (products.inside.pop(), None)[1], always_call=True)
    # what is compiled runs as it is written: compiled, its ops would not be seen
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.random.fork_rng(), torch.no_grad(), eager, products:
        model(*inputs, **named)
    return products.macs
