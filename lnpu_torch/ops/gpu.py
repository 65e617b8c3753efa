"""The operations on a GPU, by the Triton kernels: what they do not take is left to plain torch. Nothing here waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lnpu_torch.kernels import gemm, launch
from lnpu_torch.kernels import pair_counts as pair_count_kernels
from lnpu_torch.kernels.round_output import round_result
from lnpu_torch.ops.lanes import gpu as lane_profiles
from lnpu_torch.ops.lanes import reference as lane_reference
from lnpu_torch.ops.memory_format import dense, memory_format
from lnpu_torch.ops.quantize import gpu as quantize
from lnpu_torch.ops.quantize.reference import Request, Rounded, Threshold
from lnpu_torch.ops.reference import Backend, parsed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRODUCTS = {
    "conv_forward": gemm.conv_forward,
    "conv_grad_input": gemm.conv_grad_input,
    "conv_grad_weight": gemm.conv_grad_weight,
}


class GpuBackend(Backend):
    """See `Backend`."""

    def runs_on(self, device: torch.device) -> bool:
        runs: bool = launch.runs_on(device)
        return runs

    def quantize(
        self, x: Tensor, threshold: Threshold, seed: Tensor | None, rule: str, stream: int, want_classes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _takes(x):
            return super().quantize(x, threshold, seed, rule, stream, want_classes)
        return quantize.quantize_flat(x, parsed(rule), _tensor(threshold, x), seed, stream, want_classes)

    def round_and_count(self, x: Tensor, threshold: Threshold, seed: Tensor | None, request: Request) -> Rounded:
        if not _takes(x):
            return super().round_and_count(x, threshold, seed, request)
        return quantize.quantize(dense(x), _tensor(threshold, x), seed, request)

    def next_threshold(self, x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Threshold:
        if not _takes(x):
            return super().next_threshold(x, states, row, rule, training)
        return quantize.next_threshold(x, states, row, parsed(rule), training)

    def histogram(self, x: Tensor, rule: str) -> Tensor | None:
        if not (_takes(x) and parsed(rule).adaptive):
            return super().histogram(x, rule)
        return quantize.histogram(x, parsed(rule))

    def sample_dtype(self, channels: int, groups: int) -> torch.dtype:
        return torch.int32  # as all the kernels' counts

    def lane_profile(self, values: Tensor, joined: bool = False) -> Tensor:
        if not values.numel():
            return super().lane_profile(values, joined)
        x, runs_of = dense(values), lane_profiles.runs_of
        return lane_profiles.profile(lane_reference.joined_runs(x, runs_of) if joined else runs_of(x))

    def add_weight_step(
        self, counter: Tensor, position: Tensor, weight: Tensor, geometry: Sequence[int], side: str
    ) -> None:
        pair_count_kernels.add_weight_step(counter, position, weight, geometry, side)

    def add_grid_step(
        self,
        counter: Tensor,
        conv_input: Sequence[Tensor],
        conv_output: Sequence[Tensor],
        geometry: Sequence[int],
        first: str,
    ) -> None:
        grids = (
            [position, sample.to(torch.int32)] for position, sample in (conv_input, conv_output)
        )  # bytes, counted on a CPU
        pair_count_kernels.add_grid_step(counter, *grids, geometry, first)

    def accumulate(self, product: str, a: Tensor, b: Tensor, geometry: Sequence[int], form: str, chunk: int) -> Tensor:
        dims = b.dim() - 2
        if not (_takes(a) and a.dtype == b.dtype == torch.float16 and form == "fp16" and dims <= 2):
            return super().accumulate(product, a, b, geometry, form, chunk)
        result: Tensor = PRODUCTS[product](a, b, geometry, chunk=chunk)
        return result.contiguous()

    def half_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int], arguments: tuple[Any, ...]
    ) -> Tensor:
        if not (_takes(x) and memory_format(x) == torch.channels_last):
            return super().half_convolution(x, weight, bias, geometry, arguments)
        transposed = arguments[3]
        product = gemm.conv_grad_input if transposed else gemm.conv_forward
        result: Tensor = product(x, weight, geometry, bias=bias, dtype=torch.float16)
        return result

    def round_result(self, x: Tensor, form: str, dtype: torch.dtype) -> Tensor:
        if x.dtype not in DTYPES or dtype not in DTYPES:
            return super().round_result(x, form, dtype)
        rounded: Tensor = round_result(x, form, dtype)
        return rounded


def _takes(x: Tensor) -> bool:
    """Whether the kernels take a tensor: at most float32, neither empty nor too large."""
    return x.dtype in DTYPES and 0 < x.numel() < launch.INT32


def _tensor(threshold: Threshold, x: Tensor) -> Tensor:
    return torch.as_tensor(threshold, dtype=torch.int32, device=x.device)


BACKEND = GpuBackend()
