"""Which implementation of the operations is used for a tensor: plain torch, Numba's loops, or Triton's kernels."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from lnpu_torch.files import listed
from lnpu_torch.ops.pair_counts.reference import StepCounters
from lnpu_torch.ops.quantize.reference import Request, Rounded, Threshold
from lnpu_torch.ops.reference import ReferenceBackend

Choice = Literal["auto", "reference", "triton"]
_chosen: list[Choice] = ["auto"]
REFERENCE = ReferenceBackend()


class Backend(Protocol):
    """The operations that layers are made of. Each implementation gives the bits and integers of `ReferenceBackend`.

    A rule is given as a `Rule`'s JSON, a geometry as `ConvShape.pack` makes it; `seed` and `stream` are the key of
    random bits, for stochastic rounding only: without, the seed is None.
    """

    def runs_on(self, device: torch.device) -> bool:
        """Whether tensors on a device are taken."""

    def quantize(
        self, x: Tensor, threshold: Threshold, seed: Tensor | None, rule: str, stream: int, want_classes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Round a tensor: values in `compute_dtype(x)`, precision classes (uint8, or empty), elements of each [3]."""

    def round_and_count(self, x: Tensor, threshold: Threshold, seed: Tensor | None, request: Request) -> Rounded:
        """Round an operand and count its classes, in one pass."""

    def quantize_operand(
        self, x: Tensor, states: Tensor, seed: Tensor | None, request: Request, training: bool
    ) -> Rounded:
        """`next_threshold`, and by that threshold `round_and_count`."""

    def next_threshold(self, x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Threshold:
        """The threshold to use for x now. In training also chooses the next one, from x.

        Args:
            states: int32 [rows, 2], in use and to come; `UNSET` before the first step, which uses its own.
        """

    def histogram(self, x: Tensor, rule: str) -> Tensor | None:
        """What the choice of x's threshold rests on: counts of magnitudes, or `largest_bin`; None if it is fixed."""

    def count_float(self, x: Tensor, request: Request) -> Rounded:
        """An operand left in float, as it is, and counted: its non-zeros are FP16. The request's rule means nothing."""

    def sample_dtype(self, channels: int, groups: int) -> torch.dtype:
        """Of counts by sample."""

    def lane_profile(self, values: Tensor, joined: bool = False) -> Tensor:
        """Lane-cycles of every lane configuration for an operand [N, C, *grid] or [rows, C]: int64 [configurations]."""

    def count_weight_step(
        self,
        to: StepCounters,
        position: Tensor,
        weight: Tensor,
        profile: Tensor | None,
        geometry: Sequence[int],
        side: str,
    ) -> None:
        """Count one of a layer's steps by `weight_step`, and the lane profile of the operand that it streams."""

    def count_grid_step(
        self,
        to: StepCounters,
        conv_input: Sequence[Tensor],
        conv_output: Sequence[Tensor],
        profiles: Sequence[Tensor | None],
        geometry: Sequence[int],
        first: str,
    ) -> None:
        """Count a step by `grid_step`, as `count_weight_step` does, and the lane profiles of both operands."""

    def accumulate(self, product: str, a: Tensor, b: Tensor, geometry: Sequence[int], form: str, chunk: int) -> Tensor:
        """A product of `gemm.reference`, by name; its accumulator is rounded to a format every `chunk` products."""

    def half_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int], arguments: tuple[Any, ...]
    ) -> Tensor:
        """`half_precision.half_convolution`."""

    def round_result(self, x: Tensor, form: str, dtype: torch.dtype) -> Tensor:
        """A step's fresh result rounded to a format, nearest, overflow to infinity, in a dtype; x may be used up."""


@contextmanager
def backend(name: Choice) -> Iterator[None]:
    """Within the block, in all threads: which implementation of the operations is used.

    "auto" is the fastest there is for each tensor: Triton on a GPU (of compute capability 8.0 or newer), Numba on a
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
    if on_gpu(x):
        gpu = found("gpu")
        return gpu if gpu.runs_on(x.device) else REFERENCE
    return REFERENCE


def on_gpu(x: Tensor) -> bool:
    """Whether the GPU's ways are taken for a tensor: binary16 products, Triton's kernels where they run."""
    return _chosen[-1] == "triton" or (_chosen[-1] == "auto" and x.is_cuda)


@cache
def found(name: str) -> Backend:
    """The implementation that needs Numba or Triton, imported when it is first of use; plain torch without those."""
    try:
        backend: Backend = importlib.import_module(f"lnpu_torch.ops.{name}").BACKEND
    except ModuleNotFoundError as missing:
        if missing.name not in ("numba", "llvmlite", "triton"):
            raise
        return REFERENCE
    return backend
