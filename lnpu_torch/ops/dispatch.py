"""Which implementation is used for a tensor: plain torch, Numba's loops, Triton's kernels. It knows none of the ops."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lnpu_torch.files import listed
from lnpu_torch.quant.precision import Rule

Backend = Literal["auto", "reference", "triton"]
_chosen: list[Backend] = ["auto"]


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Within the block, in all threads: which implementation of the ops is used.

    "auto" is the fastest there is for each tensor: Triton on a GPU (of compute capability 8.0 or newer), Numba on a
    CPU, else plain torch. "reference" is plain torch throughout. "triton" is Triton for whatever its kernels take, on a
    CPU too if its interpreter is on.

    Raises:
        ValueError: no such backend.
    """
    if name not in get_args(Backend):
        raise ValueError(f"unknown backend {name!r}; known: {listed(get_args(Backend))}")
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


@cache
def _module(name: str) -> ModuleType | None:
    """A module of the package that needs Numba or Triton, imported when it is first of use; None without those."""
    try:
        return importlib.import_module(f"lnpu_torch.{name}")
    except ModuleNotFoundError as missing:
        if missing.name in ("numba", "llvmlite", "triton"):
            return None
        raise


def on_gpu(x: Tensor) -> bool:
    """Whether the GPU's ways are taken for a tensor: binary16 products, Triton's kernels where they run."""
    return _chosen[-1] == "triton" or (_chosen[-1] == "auto" and x.is_cuda)


def gpu_module(x: Tensor, name: str = "ops.quantize.gpu") -> ModuleType | None:
    """A module that puts work to Triton's kernels, if those run where x is."""
    if not on_gpu(x):
        return None
    module, launch = _module(name), _module("kernels.launch")
    return module if module is not None and launch is not None and launch.runs_on(x.device) else None


def fast(x: Tensor, rule: Rule | None = None) -> ModuleType | None:
    """`ops.quantize.gpu` or `.cpu`, whichever can take a tensor (and rule); None leaves it to plain torch."""
    module = _module("ops.quantize.cpu") if _chosen[-1] == "auto" and x.is_cpu else gpu_module(x)
    return module if module is not None and module.supports(x, rule) else None


def cpu_loops(x: Tensor) -> Any:
    """`ops.quantize.cpu`, if its loops over float32 as it lies in memory take this tensor (and rounding to nearest)."""
    if not (x.is_cpu and x.dtype == torch.float32 and _chosen[-1] == "auto" and is_dense(x)):
        return None
    loops = _module("ops.quantize.cpu")
    return loops if loops is not None and loops.supports(x, None) else None


def cpu_module(x: Tensor, name: str) -> Any:
    """A module of compiled loops, if those run where x is; not for an empty tensor."""
    return _module(name) if x.is_cpu and _chosen[-1] == "auto" and x.numel() else None


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
