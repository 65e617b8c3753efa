"""On what the kernels may run, and how many programs fill it. It knows devices and sizes, and no numerics."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter was asked for (TRITON_INTERPRET) when this module was imported."""
INT32 = 2**31
"""Sizes from here on do not fit the kernels' 32-bit offsets."""


def check_device(**tensors: Tensor | None) -> None:
    """The tensors lie on one device that Triton can run on.

    Raises:
        ValueError: they lie on different devices.
        RuntimeError: they lie on a CPU, and Triton's interpreter is off.
    """
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(
            "a kernel's tensors lie on different devices: " + ", ".join(f"{n} on {d}" for n, d in devices.items())
        )
    device = next(iter(devices.values()))
    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"Triton kernels run on GPUs, but the tensors are on {device}")


def check_dtype(allowed: tuple[torch.dtype, ...], **tensors: Tensor | torch.dtype) -> None:
    """Each tensor has (or each dtype is) one of the allowed dtypes.

    Raises:
        TypeError: one has not.
    """
    for name, tensor in tensors.items():
        dtype = tensor if isinstance(tensor, torch.dtype) else tensor.dtype
        if dtype not in allowed:
            raise TypeError(f"{name} is {dtype}; the kernel takes {', '.join(map(str, allowed))}")


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device_of(tensor)


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few in the interpreter, so that small tests take every path."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def power_of_2(size: int) -> int:
    """The smallest power of two not below size (1 for 0)."""
    return 1 << max(0, size - 1).bit_length()


def alignment(*sizes: int) -> int:
    """The largest power of two, up to 16, that divides all sizes; it bounds how wide an access may be."""
    return gcd(16, *sizes)
