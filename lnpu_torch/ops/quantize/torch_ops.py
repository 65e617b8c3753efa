"""Rounding a tensor apart from any layer, as torch ops, opaque to compilers."""

from __future__ import annotations

import torch
from torch import Tensor

from lnpu_torch.ops.dispatch import backend_of
from lnpu_torch.ops.quantize.reference import UNSET, compute_dtype
from lnpu_torch.ops.registry import fake, op


@op()
def quantize(
    x: Tensor, threshold: Tensor, seed: Tensor | None, rule: str, stream: int, want_classes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.quantize`."""
    return backend_of(x).quantize(x, threshold, seed, rule, stream, want_classes)


@fake("quantize")
def _(
    x: Tensor, threshold: Tensor, seed: Tensor | None, rule: str, stream: int, want_classes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    classes = torch.empty_like(x, dtype=torch.uint8) if want_classes else x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(x, dtype=compute_dtype(x)), classes, x.new_empty(3, dtype=torch.int64)


@op((), torch.Tag.nondeterministic_seeded)
def draw_seed(x: Tensor) -> Tensor:
    """A key for `random_bits`, from torch's generator of x's device: the same compiled or not.

    Where a network has branches, a compiler may run them in another order, and the layers draw each other's keys.
    """
    return torch.randint(2**62, (), device=x.device)


@fake("draw_seed")
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.int64)


@op()
def own_threshold(x: Tensor, rule: str) -> Tensor:
    """The threshold that a rule chooses for x itself: int32 []."""
    states = torch.full((1, 2), UNSET, dtype=torch.int32, device=x.device)
    threshold = backend_of(x).next_threshold(x, states, 0, rule, False)
    return torch.as_tensor(threshold, dtype=torch.int32, device=x.device)


@fake("own_threshold")
def _(x: Tensor, rule: str) -> Tensor:
    return x.new_empty((), dtype=torch.int32)
