"""Which implementation of the operations is used for a tensor: plain torch, Numba's loops, or Triton's kernels."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from lnpu_torch.files import listed
from lnpu_torch.ops.reference import Backend

Choice = Literal["auto", "reference", "triton"]
_chosen: list[Choice] = ["auto"]
REFERENCE = Backend()


@contextmanager
def backend(name: Choice) -> Iterator[None]:
    """Within the block, in all threads: which implementation of the operations is used.

    "auto" is the fastest there is for each tensor: Triton on a GPU (NVIDIA's, from compute capability 7.5), Numba on a
    CPU, else plain torch. "reference" is plain torch throughout. "triton" is Triton for whatever its kernels take, on a
    CPU too if its interpreter is on.

    Raises:
        ValueError: no such backend.
    """
    if name not in get_args(Choice):
        raise ValueError(f"unknown backend {name!r}; known: {listed(get_args(Choice))}")
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def backend_of(x: Tensor) -> Backend:
    """The implementation for a tensor, by where it is."""
    chosen = _chosen[-1]
    if chosen == "auto" and x.is_cpu:
        return found("cpu")
    return on_device(x.device) if on_gpu(x) else REFERENCE


@cache
def on_device(device: torch.device) -> Backend:
    """The implementation for a GPU, or where Triton's interpreter is on. If it is plain torch, a warning says why."""
    gpu = found("gpu")
    reason = gpu.obstacle(device)
    if reason is None:
        return gpu
    _warn(reason, str(device))
    return REFERENCE


def on_gpu(x: Tensor) -> bool:
    """Whether the GPU's ways are taken for a tensor: binary16 products, Triton's kernels where they run."""
    return _chosen[-1] == "triton" or (_chosen[-1] == "auto" and x.is_cuda)


@cache
def found(name: str) -> Backend:
    """The implementation that needs Numba or Triton, imported when it is first of use; plain torch without those."""
    try:
        backend: Backend = importlib.import_module(f"lnpu_torch.ops.{name}").BACKEND
    except ImportError as error:  # Numba refuses versions of NumPy that it does not know
        missing = isinstance(error, ModuleNotFoundError)
        if (missing and error.name not in ("numba", "llvmlite", "triton")) or "lnpu_torch" in (error.name or ""):
            raise
        _warn(f"{error.name} is not installed" if missing else str(error), f"the {name.upper()}")
        return REFERENCE
    return backend


def _warn(reason: str, where: str) -> None:
    logging.getLogger("lnpu_torch").warning("%s: plain torch computes on %s, many times slower", reason, where)
