"""In which order a tensor's elements lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether x's elements lie in memory without gaps: contiguous or channels_last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def lies_last(x: Tensor) -> bool:
    """Whether torch takes x for channels_last: its strides are those, and not a contiguous tensor's, too."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return form is not None and x.is_contiguous(memory_format=form) and not x.is_contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """The order in which an operand is rounded and kept: its own if that is channels_last, else contiguous."""
    return torch.channels_last if x.dim() == 4 and lies_last(x) else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """x itself, or a copy in `memory_format`, without gaps."""
    return x if is_dense(x) else x.contiguous(memory_format=memory_format(x))
