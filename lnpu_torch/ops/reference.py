"""The operations that layers are made of, in plain torch: what a backend does, and the specification of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnpu_torch.ops.gemm import half_precision
from lnpu_torch.ops.gemm import reference as gemm
from lnpu_torch.ops.lanes import reference as lane_profiles
from lnpu_torch.ops.memory_format import dense
from lnpu_torch.ops.pair_counts import reference as pair_counts
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape
from lnpu_torch.ops.pair_counts.reference import StepCounters
from lnpu_torch.ops.quantize import reference as quantize
from lnpu_torch.ops.quantize.reference import CLASSES, UNSET, Request, Rounded, Threshold
from lnpu_torch.quant.formats import FORMATS
from lnpu_torch.quant.precision import Rule


class WeightStep(NamedTuple):
    """A step that multiplies a grid by the weight, to be counted: forward, or grad_input."""

    to: StepCounters
    position: Tensor
    """of the grid, int32 [2, channels, *grid]"""
    weight: Tensor
    """int32 [2, channels, *kernel]"""
    side: str
    """conv_input or conv_output: which grid it is"""
    operand: Rounded
    """the grid; its lane profile is counted"""
    kept: Rounded | None = None
    """what grad_weight will read of the same tensor"""


class GridStep(NamedTuple):
    """A step that multiplies the two grids, to be counted: grad_weight."""

    to: StepCounters
    conv_input: tuple[Tensor, Tensor]
    """int32 [2, channels, *grid], and int32 or `sample_dtype` [2, N, g, *grid]"""
    conv_output: tuple[Tensor, Tensor]
    first: str
    """conv_input or conv_output: which grid is the first operand"""
    lanes: Tensor | None
    """the lane profile that was kept of the layer's input"""
    error: Rounded
    """the error; its lane profile is counted"""


class Backend:
    """The operations that layers are made of, in plain torch on any device.

    Other backends derive from this one, leave to it what they do not take, and give the same bits and integers.
    A rule is given as a `Rule`'s JSON, a geometry as `ConvShape.pack` makes it; `seed` and `stream` are the key of
    random bits, for stochastic rounding only: without, the seed is None.
    """

    keeps_weights = False
    """Whether backward reads the weight that forward rounded; else it rounds it anew."""

    def obstacle(self, device: torch.device) -> str | None:
        """Why tensors on a device are not taken, in words; None if they are."""
        return None

    def quantize(
        self, x: Tensor, threshold: Threshold, seed: Tensor | None, rule: str, stream: int, want_classes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Round a tensor: values in `compute_dtype(x)`, precision classes (uint8, or empty), elements of each [3]."""
        random = None if seed is None else quantize.random_bits(x.shape, seed, stream)
        values, classes = quantize.quantize(x, parsed(rule), _on(threshold, x), random)
        totals = torch.stack([(classes == each).sum() for each in CLASSES])
        return values, classes if want_classes else classes.new_empty(0), totals

    def round_and_count(self, x: Tensor, threshold: Threshold, seed: Tensor | None, request: Request) -> Rounded:
        """Round an operand and count its classes, in one pass."""
        x, (single, half, *_) = dense(x), request.wanted
        random = None if seed is None else quantize.random_bits(x.shape, seed, request.row)
        values, classes = quantize.quantize(x, parsed(request.rule), _on(threshold, x), random)
        counts = self._counts(values, classes, request)
        return Rounded(values if single else None, values.half() if half else None, *counts, threshold)

    def within_window(self, x: Tensor, rule: str, threshold: Threshold) -> Tensor:
        """`quantize.within_window`, for those who then round x themselves."""
        chosen = parsed(rule)
        return x if chosen.window is None else quantize.within_window(x, chosen, _on(threshold, x))

    def _counts(self, x: Tensor, classes: Tensor, request: Request) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Over samples, over channels, and the lane profile."""
        (share, groups), (*_, sampled, lanes) = request.layout, request.wanted
        over_channels = None
        if sampled:
            over_channels = pair_counts.per_sample(classes, groups, self.sample_dtype(x.shape[1], groups))
        profile = self.lane_profile(x, request.joined) if lanes else None
        return pair_counts.per_position(classes, share), over_channels, profile

    def quantize_operand(
        self, x: Tensor, states: Tensor, seed: Tensor | None, request: Request, training: bool
    ) -> Rounded:
        """`next_threshold`, and by that threshold `round_and_count`."""
        threshold = self.next_threshold(x, states, request.row, request.rule, training)
        return self.round_and_count(x, threshold, seed, request)

    def next_threshold(self, x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Threshold:
        """The threshold to use for x now. In training also chooses the next one, from x.

        Args:
            states: int32 [rows, 2], in use and to come; `UNSET` before the first step, which uses its own.
        """
        current = states[row, 0]
        chosen = quantize.choose_threshold(x, parsed(rule), current)
        used = torch.where(current == UNSET, chosen, current)
        if training:
            states[row] = torch.stack((used, chosen))
        return torch.where(used == UNSET, parsed(rule).threshold_range[0], used)

    def histogram(self, x: Tensor, rule: str) -> Tensor | None:
        """What the choice of x's threshold rests on: counts of magnitudes, or `largest_bin`; None if it is fixed."""
        chosen = parsed(rule)
        if chosen.adaptive:
            return quantize.histogram(x, chosen)
        return quantize.largest_bin(x, chosen) if chosen.threshold is None and chosen.high is None else None

    def count_float(self, x: Tensor, request: Request) -> Rounded:
        """An operand left in float, as it is, and counted: its non-zeros are FP16. The request's rule means nothing."""
        return Rounded(x, None, *self._counts(x, quantize.float_classes(x), request))

    def sample_dtype(self, channels: int, groups: int) -> torch.dtype:
        """Of counts by sample."""
        return pair_counts.sample_dtype(channels, groups)

    def lane_profile(self, values: Tensor, joined: bool = False) -> Tensor:
        """Lane-cycles of every lane configuration for an operand [N, C, *grid] or [rows, C]: int64 [configurations]."""
        runs = lane_profiles.joined_runs(values) if joined else lane_profiles.runs_of(values)
        return lane_profiles.profile(runs)

    def count(
        self,
        geometry: Sequence[int],
        weight: WeightStep | None = None,
        grids: GridStep | None = None,
        thresholds: Tensor | None = None,
    ) -> None:
        """Count what a pass of a layer has done, and put the thresholds to come into use, if these are given."""
        if weight is not None:
            args = weight.position, weight.weight, weight.operand.lanes, geometry, weight.side
            self.count_weight_step(weight.to, *args)
        if grids is not None:
            profiles = grids.lanes, grids.error.lanes
            self.count_grid_step(grids.to, grids.conv_input, grids.conv_output, profiles, geometry, grids.first)
        if thresholds is not None:
            thresholds[..., 0] = thresholds[..., 1]

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
        row = pair_counts.row_of(to.sizes[to.step], call_sizes(tuple(geometry), side, "weight"))
        self.add_weight_step(to.counters[to.step, row], position, weight, geometry, side)
        _add_lanes(to, profile)

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
        second = "conv_output" if first == "conv_input" else "conv_input"
        row = pair_counts.row_of(to.sizes[to.step], call_sizes(tuple(geometry), first, second))
        self.add_grid_step(to.counters[to.step, row], conv_input, conv_output, geometry, first)
        _add_lanes(to, *profiles)

    def add_weight_step(
        self, counter: Tensor, position: Tensor, weight: Tensor, geometry: Sequence[int], side: str
    ) -> None:
        """Add a `weight_step` to a counter."""
        counter += pair_counts.weight_step(position, weight, ConvShape.unpack(geometry), side)

    def add_grid_step(
        self,
        counter: Tensor,
        conv_input: Sequence[Tensor],
        conv_output: Sequence[Tensor],
        geometry: Sequence[int],
        first: str,
    ) -> None:
        """Add a `grid_step` to a counter."""
        counter += pair_counts.grid_step(conv_input, conv_output, ConvShape.unpack(geometry), first)

    def accumulate(self, product: str, a: Tensor, b: Tensor, geometry: Sequence[int], form: str, chunk: int) -> Tensor:
        """A product of `gemm.reference`, by name; its accumulator is rounded to a format every `chunk` products."""
        compute = torch.promote_types(quantize.compute_dtype(a), quantize.compute_dtype(b))
        operands = a.to(compute), b.to(compute), ConvShape.unpack(geometry)
        return gemm.PRODUCTS[product](*operands, FORMATS[form], chunk).contiguous()

    def half_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int], arguments: tuple[Any, ...]
    ) -> Tensor:
        """`half_precision.half_convolution`."""
        return half_precision.half_convolution(x, weight, bias, arguments)

    def half_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: bool) -> Tensor:
        """x [M, K] by weight [N, K], both binary16, and a bias [N], summed in float32; binary16 only if `rounded`."""
        return half_precision.half_matmul(x, weight.T, bias)

    def round_result(self, x: Tensor, form: str, dtype: torch.dtype) -> Tensor:
        """A step's fresh result rounded to a format, nearest, overflow to infinity, in a dtype; x may be used up."""
        x.copy_(quantize.round_to(x.to(quantize.compute_dtype(x)), FORMATS[form]))
        return x if x.dtype == dtype else x.to(dtype)


@lru_cache(maxsize=256)
def parsed(rule: str) -> Rule:
    """A rule, of its JSON."""
    return Rule.model_validate_json(rule)


@lru_cache(maxsize=1024)
def call_sizes(geometry: tuple[int, ...], first: str, second: str) -> tuple[int, ...]:
    """`ConvShape.call_sizes` of a packed geometry."""
    return ConvShape.unpack(geometry).call_sizes(first, second)


def _add_lanes(to: StepCounters, *profiles: Tensor | None) -> None:
    for operand, profile in enumerate(profiles):
        if profile is not None:
            to.lanes[to.step, operand].add_(profile)


def _on(threshold: Threshold, x: Tensor) -> Tensor:
    """A threshold as a tensor, int32 [], where x is."""
    return torch.as_tensor(threshold, dtype=torch.int32, device=x.device)
