"""The operations on a GPU, by the Triton kernels: what they do not take is left to plain torch. Nothing here waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lnpu_torch.kernels import gemm, launch, operand
from lnpu_torch.kernels.round_output import round_result
from lnpu_torch.ops.lanes import gpu as lane_profiles
from lnpu_torch.ops.lanes import reference as lane_reference
from lnpu_torch.ops.memory_format import dense, memory_format
from lnpu_torch.ops.pair_counts import gpu as pair_counts
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape
from lnpu_torch.ops.quantize import gpu as quantize
from lnpu_torch.ops.quantize.reference import Request, Rounded, Threshold
from lnpu_torch.ops.reference import Backend, GridStep, WeightStep, parsed

NARROW = 16
"""Channels of a group below which cuDNN multiplies: a tile of the kernel's would be mostly empty."""
LARGE, SHORT = 2**20, 1024
"""Elements of a linear layer's result from which on, and products of each below which, our kernel multiplies: it adds
the bias and rounds as it writes, where cuBLAS leaves float32 to two more passes. Chosen by reasoning, not yet by
measurement."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRODUCTS = {
    "conv_forward": gemm.conv_forward,
    "conv_grad_input": gemm.conv_grad_input,
    "conv_grad_weight": gemm.conv_grad_weight,
}


class GpuBackend(Backend):
    """See `Backend`."""

    keeps_weights = True

    def obstacle(self, device: torch.device) -> str | None:
        reason: str | None = launch.obstacle(device)
        return reason

    def quantize(
        self, x: Tensor, threshold: Threshold, seed: Tensor | None, rule: str, stream: int, want_classes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _takes(x):
            return super().quantize(x, threshold, seed, rule, stream, want_classes)
        x = self.within_window(x, rule, threshold)
        return quantize.quantize_flat(x, parsed(rule), _tensor(threshold, x), seed, stream, want_classes)

    def round_and_count(self, x: Tensor, threshold: Threshold, seed: Tensor | None, request: Request) -> Rounded:
        if not _takes(x):
            return super().round_and_count(x, threshold, seed, request)
        x = self.within_window(x, request.rule, threshold)
        return quantize.read(x, seed, request, threshold=_tensor(threshold, x))

    def quantize_operand(
        self, x: Tensor, states: Tensor, seed: Tensor | None, request: Request, training: bool
    ) -> Rounded:
        if not (_takes(x) and quantize.chooses(request.rule)):
            return super().quantize_operand(x, states, seed, request, training)
        return quantize.read(x, seed, request, states=states, training=training)

    def next_threshold(self, x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Threshold:
        if not _takes(x):
            return super().next_threshold(x, states, row, rule, training)
        return quantize.next_threshold(x, states, row, parsed(rule), training)

    def histogram(self, x: Tensor, rule: str) -> Tensor | None:
        if not (_takes(x) and parsed(rule).adaptive):
            return super().histogram(x, rule)
        return quantize.histogram(x, parsed(rule))

    def sample_dtype(self, channels: int, groups: int) -> torch.dtype:
        dtype: torch.dtype = operand.sample_dtype(channels, groups)
        return dtype

    def lane_profile(self, values: Tensor, joined: bool = False) -> Tensor:
        if not values.numel():
            return super().lane_profile(values, joined)
        x, runs_of = dense(values), lane_profiles.runs_of
        return lane_profiles.profile(lane_reference.joined_runs(x, runs_of) if joined else runs_of(x))

    def count(
        self,
        geometry: Sequence[int],
        weight: WeightStep | None = None,
        grids: GridStep | None = None,
        thresholds: Tensor | None = None,
    ) -> None:
        if (weight or grids) and pair_counts.takes(tuple(geometry)):
            pair_counts.count(tuple(geometry), weight, grids, thresholds)
            return
        for each in (weight and weight.operand, weight and weight.kept, grids and grids.error):
            pair_counts.fill(each)
        super().count(geometry, weight, grids, thresholds)

    def accumulate(self, product: str, a: Tensor, b: Tensor, geometry: Sequence[int], form: str, chunk: int) -> Tensor:
        halves, dims = a.dtype == b.dtype == torch.float16, b.dim() - 2
        if not (_takes(a) and halves and form == "fp16" and dims <= 2 and _multiplies(a, geometry)):
            return super().accumulate(product, a, b, geometry, form, chunk)
        result: Tensor = PRODUCTS[product](a, b, geometry, chunk=chunk)
        return result.contiguous()

    def half_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int], arguments: tuple[Any, ...]
    ) -> Tensor:
        last, narrow = memory_format(x) == torch.channels_last, min(weight.shape[:2]) < NARROW
        if not (_takes(x) and last and not narrow and _multiplies(x, geometry)):
            return super().half_convolution(x, weight, bias, geometry, arguments)
        transposed = arguments[3]
        product = gemm.conv_grad_input if transposed else gemm.conv_forward
        result: Tensor = product(x, weight, geometry, bias=bias, dtype=torch.float16)
        return result

    def half_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: bool) -> Tensor:
        rows, products = x.shape
        fits = LARGE <= rows * weight.shape[0] < launch.INT32 and 0 < products < SHORT and x.is_contiguous()
        if not (rounded and fits and _takes(x) and _takes(weight) and launch.multiplies_on(x.device)):
            return super().half_linear(x, weight, bias, rounded)
        result: Tensor = gemm.matmul(x, weight.T, bias=bias, dtype=torch.float16)
        return result

    def round_result(self, x: Tensor, form: str, dtype: torch.dtype) -> Tensor:
        if x.dtype not in DTYPES or dtype not in DTYPES:
            return super().round_result(x, form, dtype)
        rounded: Tensor = round_result(x, form, dtype)
        return rounded


def _multiplies(x: Tensor, geometry: Sequence[int]) -> bool:
    """Whether the kernels multiply where x is, and reach all elements of such a product."""
    shape = ConvShape.unpack(geometry)
    largest = max(shape.elements(name) for name in ("conv_input", "conv_output", "weight"))
    return bool(launch.multiplies_on(x.device) and largest < launch.INT32)


def _takes(x: Tensor) -> bool:
    """Whether the kernels take a tensor: at most float32, neither empty nor too large."""
    return x.dtype in DTYPES and 0 < x.numel() < launch.INT32


def _tensor(threshold: Threshold, x: Tensor) -> Tensor:
    return torch.as_tensor(threshold, dtype=torch.int32, device=x.device)


BACKEND = GpuBackend()
