"""One call of a layer: what its three steps share, and how each reads, multiplies and is counted. No autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lnpu_torch.nn.gemms import Accumulator, Convolution, Linear
from lnpu_torch.nn.layer_state import Emulation, Operand, counting_lock
from lnpu_torch.ops import dispatch as backends
from lnpu_torch.ops.gemm import half_precision as product_ops
from lnpu_torch.ops.pair_counts import torch_ops as count_ops
from lnpu_torch.ops.pair_counts.conv_shape import Geometry


class Call:
    """One call of one layer."""

    def __init__(
        self,
        product: Linear | Convolution,
        emulation: Emulation,
        geometry: Geometry,
        wants: tuple[bool, bool, bool],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        self.product, self.emulation, self.geometry, self.wants = product, emulation, geometry, wants
        self.sizes, self.layout = geometry.pack(), (geometry.batch, geometry.groups)
        self.shapes = (input.shape, weight.shape)
        self.last = product.last(input, geometry, emulation.accumulator)
        self.lasts = [self.last or backends.lies_last(x) for x in (input, weight)]
        self.turned = [self.last and backends.memory_format(x) != torch.channels_last for x in (input, weight)]
        self.dtypes = (input.dtype, weight.dtype, None if bias is None else bias.dtype)
        # binary16 products are summed in float32; a convolution's sums then leave cuDNN as binary16, rounded once
        exact = emulation.result_format == "fp16" or isinstance(product, Linear)
        self.halves = backends.on_gpu(input) and exact and emulation.accumulator.form in ("fp32", "fp16")

    def accumulator(self, step: str) -> Accumulator:
        """How a step's products are summed."""
        return self.emulation.accumulators[step, self.halves]

    def values(self, rounded: Tensor, original: Tensor, step: str, operand: str) -> Tensor:
        """An operand's values as the product takes them: what came in itself, if the step reads it in float."""
        if self.emulation.reads[step, operand].rule is None:
            return original
        return rounded if rounded.shape == original.shape else rounded.reshape(original.shape)

    def read(
        self,
        operand: str,
        x: Tensor,
        seed: Tensor | None,
        now: tuple[str, ...],
        later: tuple[str, ...] = (),
    ) -> dict[str, Operand]:
        """Input or grad_output as the steps read it."""
        return self.emulation.read(
            operand,
            x,
            self.layout,
            seed,
            now=now,
            later=later,
            halves=self.halves,
            last=self.last,
            joined=self.geometry.pointwise,
        )

    def weights(self, weight: Tensor, seed: Tensor | None, step: str, threshold: Tensor | None = None) -> Operand:
        """The weight as a step reads it; its counts by sample if the step multiplies it with the small grid."""
        layout = (self.geometry.small_channels // self.geometry.groups, 1)
        side = self.product.input_side if step == "forward" else self.product.output_side
        return self.emulation.read(
            "weight",
            weight,
            layout,
            seed,
            now=(step,),
            sampled=side == "small",
            halves=self.halves,
            last=self.last,
            threshold=threshold,
        )[step]

    def threshold(self, weight: Tensor, read: Operand) -> Tensor | None:
        """The T by which grad_input is to read the weight, which forward has read so: with the same T, by one rule."""
        rows = [self.emulation.reads[step, "weight"].row for step in ("forward", "grad_input")]
        return read.threshold if rows[0] == rows[1] else self.emulation.choose("weight", weight, "grad_input")

    def count(self, step: str, grid: Operand, weight: Operand, side: str) -> None:
        """Count forward or grad_input, the product of a weight and the grid on one side."""
        position = grid.position.squeeze(1)
        counts = self.product.cut(position) if step == "forward" else position, _over(weight, side)
        with counting_lock(self.emulation):
            count_ops.count_weight_step(*self.emulation.counter(step), *counts, grid.lanes, self.sizes, side)

    def count_grids(self, error: Operand, position: Tensor, sample: Tensor, lanes: Tensor | None) -> None:
        """Count grad_weight, the product of the error and the input, of which these counts were kept."""
        first = self.product.input_side
        sides = {first: (position, sample), self.product.output_side: (error.position.squeeze(1), error.sample)}
        counter = self.emulation.counter("grad_weight")
        with counting_lock(self.emulation):
            count_ops.count_grid_step(*counter, sides["big"], sides["small"], lanes, error.lanes, self.sizes, first)

    def forward(self, x: Operand, original: Tensor, weight: Operand, bias: Tensor | None) -> Tensor:
        """The first step, its result not yet rounded."""
        values = _alike(self.values(x.values, original, "forward", "input"), weight.values)
        output = self.product.forward(*values, bias, self.accumulator("forward"))
        if self.emulation.counting:
            self.count("forward", x, weight, self.product.input_side)
        return output

    def grad_input(self, error: Operand, weight: Tensor, threshold: Tensor | None, seed: Tensor | None) -> Tensor:
        """The second step. The weight is rounded anew, with the T of the forward, which costs less than to keep it."""
        weights = self.weights(weight, seed, "grad_input", threshold)
        operands = _alike(error.values, weights.values)
        values = self.product.grad_input(*operands, self.shapes[0], self.lasts[0], self.accumulator("grad_input"))
        if self.emulation.counting:
            self.count("grad_input", error, weights, self.product.output_side)
        return self.emulation.result("grad_input", values, self.dtypes[0], self.turned[0])

    def grad_weight(
        self, error: Operand, kept: Sequence[Tensor | None], wanted: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """The third step: the wanted gradients of weight and bias, from the error and what was kept of the input."""
        values, position, sample, lanes = kept
        x = error.values.new_empty(1).expand(self.shapes[0]) if values is None else values
        operands, by = _alike(error.values, x), self.accumulator("grad_weight")
        results = self.product.grad_weight(*operands, self.shapes[1], self.lasts[1], wanted, by)
        if wanted[0] and position is not None and sample is not None:
            self.count_grids(error, position, sample, lanes)
        return [
            None if result is None else self.emulation.result("grad_weight", result, dtype or result.dtype, turned)
            for result, dtype, turned in zip(results, self.dtypes[1:], (self.turned[1], False), strict=True)
        ]


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two operands in the wider of their dtypes."""
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    widened = [x if x.dtype == dtype else product_ops.widened(x, dtype) for x in (a, b)]
    return widened[0], widened[1]


def _over(weight: Operand, side: str) -> Tensor:
    """A weight's counts as they meet a grid on one side: over the other side's channels, [2, channels, *kernel]."""
    return weight.position.flatten(1, 2) if side == "big" else weight.sample.squeeze(2)
