"""Says why training cannot go on: where a number stopped being finite, what fills the memory. It trains nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

CPU_IS_FULL = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
"""What torch's errors say where a CPU's memory is full; they have no class of their own."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full."""
    full = isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_IS_FULL)
    return full or isinstance(error, torch.OutOfMemoryError | MemoryError)


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Tensor) -> str:
    """Words for the first parameter, or else the first layer's output for `images`, that is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"; the first parameter that is not finite: {name}"
    for name, output in layer_outputs(model, images):
        if not output.isfinite().all():
            return f"; the first layer whose output is not finite: {name}"
    return ""


def layer_outputs(model: nn.Module, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Name and output of every innermost layer of a forward pass, in the order in which they ran."""
    outputs: list[tuple[str, Tensor]] = []
    leaves = {name: module for name, module in model.named_modules() if not any(module.children())}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.append((name, output)))
        for name, module in leaves.items()
    ]
    model(images)
    for handle in handles:
        handle.remove()
    yield from outputs
