"""On what the kernels may run, how many programs fill it, and how one is launched quickly. It knows no numerics."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import compress
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter was asked for (TRITON_INTERPRET) when this module was imported."""
REGISTERS = 255
"""All that a thread can have. Left to itself, ptxas keeps to fewer for some GPUs, and spills up to 96 bytes."""
INT32 = 2**31
"""Sizes from here on do not fit the kernels' 32-bit offsets."""
OLDEST = (7, 5)
"""The compute capability from which on the kernels run: they are compiled for sm_75, 80, 86, 90, 100 and 120."""
TENSOR_CORES = (8, 0)
"""The compute capability from which on Triton multiplies on tensor cores."""


def check_device(**tensors: Tensor | None) -> None:
    """The tensors lie on one device that Triton can run on.

    Raises:
        ValueError: they lie on different devices.
        RuntimeError: they lie on a CPU, and Triton's interpreter is off; or the GPU is too old.
    """
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(
            "a kernel's tensors lie on different devices: " + ", ".join(f"{n} on {d}" for n, d in devices.items())
        )
    check_runs(next(iter(devices.values())))


def obstacle(device: torch.device) -> str | None:
    """Why the kernels do not run on a device; None if they do: on a GPU, or a CPU if Triton's interpreter is on."""
    if device.type != "cuda":
        runs = INTERPRETED and device.type == "cpu"
        return None if runs else f"Triton kernels run on GPUs, but the tensors are on {device}"
    if torch.version.hip:  # barriers order less there, and nobody has tried
        return "the kernels are made for NVIDIA's GPUs, and untried on AMD's"
    if capability(device) >= OLDEST:
        return None
    found, needed = (".".join(map(str, pair)) for pair in (capability(device), OLDEST))
    return f"the kernels need compute capability {needed}, but {device} has {found}"


def check_runs(device: torch.device) -> None:
    """Raises RuntimeError if the kernels do not run on a device."""
    reason = obstacle(device)
    if reason is not None:
        raise RuntimeError(reason)


def multiplies_on(device: torch.device) -> bool:
    """Whether the kernels' products run on a device's tensor cores; else torch's own are faster."""
    return device.type != "cuda" or capability(device) >= TENSOR_CORES


def check_dtype(allowed: tuple[torch.dtype, ...], **tensors: Tensor | torch.dtype) -> None:
    """Each tensor has (or each dtype is) one of the allowed dtypes.

    Raises:
        TypeError: one has not.
    """
    for name, tensor in tensors.items():
        dtype = tensor if isinstance(tensor, torch.dtype) else tensor.dtype
        if dtype not in allowed:
            raise TypeError(f"{name} is {dtype}; the kernel takes {', '.join(map(str, allowed))}")


class Launch:
    """A kernel's launch, ready but for its tensors, which it is called with. They are the kernel's first parameters.

    Triton finds the compiled kernel of a launch by all of its arguments, which takes 8 to 13 us. Here all but the
    tensors stay the same from call to call, so that the kernel is looked up once for each combination of their dtypes
    (and of tensors that are None), and its own launcher is called directly. Integers that change come after the
    tensors: the kernel must not be specialized for their values.
    """

    def __init__(self, device: torch.device, kernel: Any, grid: tuple[int, ...], *scalars: Any, **options: Any) -> None:
        """`scalars`: the parameters after those of a call, in order; `options`: the constants after, and Triton's."""
        self.device, self.kernel, self.options = device, kernel, options
        self.grid = (*grid, 1, 1)[:3]
        self.scalars = scalars
        self._index = device.index or 0
        self._specialized = [not each.do_not_specialize_on_alignment for each in getattr(kernel, "params", ())]
        self._ready: dict[tuple[torch.dtype | None, ...], tuple[Any, ...]] = {}

    def __call__(self, *tensors: Tensor | None, scalars: tuple[int, ...] = ()) -> None:
        kinds = tuple([None if t is None else t.dtype for t in tensors])
        # A kernel compiled for addresses on 16-byte boundaries is right for those only.
        aligned = not any(t is not None and t.data_ptr() & 15 for t in compress(tensors, self._specialized))
        with _current(self.device):
            if aligned and kinds in self._ready and not triton.knobs.runtime.launch_enter_hook.calls:
                run, stream, function, metadata, rest = self._ready[kinds]
                run(*self.grid, stream(self._index), function, metadata, None, None, None, *tensors, *scalars, *rest)
                return
            compiled = self.kernel[self.grid](*tensors, *scalars, *self.scalars, **self.options)
            if aligned and compiled is not None:
                constants = self.kernel.arg_names[len(tensors) + len(scalars) + len(self.scalars) :]
                rest = (*self.scalars, *(self.options[name] for name in constants))
                stream = driver.active.get_current_stream
                self._ready[kinds] = compiled.run, stream, compiled.function, compiled.packed_metadata, rest


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = nullcontext()


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, on which Triton launches."""
    return _current(tensor.device)


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability."""
    return torch.cuda.get_device_capability(device)


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
