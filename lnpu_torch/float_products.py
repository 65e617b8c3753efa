"""What one forward pass multiplies, by module and op, as torch's own FLOP formulas have it. It rounds nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
FORMULAS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
}


class _Products(TorchDispatchMode):
    """Adds up the slots of matrix products, convolutions and attention, by innermost module and op."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots: Counter[tuple[str, str]] = Counter()
        self.inside = [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        formula = FORMULAS.get(func._overloadpacket)
        if formula:
            flops = formula(*args, **kwargs or {}, out_val=out)
            self.slots[self.inside[-1], str(func._overloadpacket)] += flops // 2
        return out


def forward_slots(model: nn.Module, inputs: Sequence[Any]) -> Counter[tuple[str, str]]:
    """Slots, a multiplication each, of `model(*inputs)` in training, by module and op ("aten.bmm").

    Torch's random numbers stay as they are, but the model does not: hooks are added, and batch norm sees the batch.

    Args:
        model: a copy, without emulated layers.
    """
    model.train()
    products = _Products()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: products.inside.append(name), prepend=True)
        module.register_forward_hook(lambda *_: (products.inside.pop(), None)[1], always_call=True)
    with torch.random.fork_rng(), torch.no_grad(), products:
        model(*inputs)
    return products.slots
