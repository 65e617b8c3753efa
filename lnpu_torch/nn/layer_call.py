"""One call of a layer: forward, and the two steps of backward. Planned once for each layer and shape; no autograd.

quantize input and weight      one call each: choose the threshold, round, count by precision class
multiply                       torch's own product, in the memory format that the model has
count the pairs, round the result
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lnpu_torch.counts.lane_configs import LANE_CONFIGS, SYNC_INTERVALS
from lnpu_torch.nn.gemms import Convolution, Like, Product, product_of
from lnpu_torch.nn.layer_state import LayerState
from lnpu_torch.nn.reads import STEPS, OperandPlan, PrecisionPlan, precision_plan
from lnpu_torch.ops.dispatch import backend_of, on_gpu
from lnpu_torch.ops.gemm.half_precision import alike
from lnpu_torch.ops.memory_format import memory_format
from lnpu_torch.ops.quantize.reference import Rounded, Threshold, compute_dtype
from lnpu_torch.ops.reference import GridStep, WeightStep
from lnpu_torch.ops.registry import OPS, fake, op

STATE = ("thresholds", "counters", "call_sizes", "lanes", "histograms")
"""What the ops of a layer change."""
PAIRS = tuple(itertools.product((False, True), repeat=2))
"""Whether grad_input, and grad_weight, are run."""


class Saved(NamedTuple):
    """What backward needs of forward: of the input as grad_weight reads it, and the threshold of the weight.

    None stands for what is not needed.
    """

    values: Tensor | None = None
    counts_over_batch: Tensor | None = None
    counts_over_channels: Tensor | None = None
    lanes: Tensor | None = None
    threshold: Tensor | None = None


class LayerPlan:
    """What is the same for all calls of a layer with inputs of one shape."""

    def __init__(
        self,
        product: Product,
        precision: PrecisionPlan,
        x: torch.Size,
        weight: torch.Size,
        halves: bool,
        counting: bool,
    ) -> None:
        self.product = product
        geometry = product.geometry(x, weight)
        self.sizes, self.macs = tuple(geometry.pack()), geometry.macs
        self.counting = counting
        # the runs of lanes go on from sample to sample; where samples are whole runs they end there in either case
        joined = geometry.pointwise and geometry.batch > 1 and prod(geometry.conv_input) % SYNC_INTERVALS[-1] != 0
        grid = partial(precision.operands, halves=halves, lanes=counting, joined=joined)
        kernel = partial(precision.operands, "weight", layout=product.kernel_layout(weight), halves=halves)
        self.sampled = {step: product.counted_over_channels(step) for step in STEPS[:2]}
        inputs, errors = product.layout(x), product.layout(torch.Size(product.output_shape(x, weight)))
        self.input = {
            later: grid("input", ("forward",), STEPS[2:] if later else (), layout=inputs) for later in (False, True)
        }
        self.weight = {step: kernel((step,), sampled=self.sampled[step])[0] for step in STEPS[:2]}
        steps = {now: tuple(step for step, run in zip(STEPS[1:], now, strict=True) if run) for now in PAIRS}
        self.grad_output = {now: grid("grad_output", steps[now], layout=errors) for now in PAIRS}
        rows_of = [precision.reads[step, "weight"].row for step in ("forward", "grad_input")]
        self.same_weight = rows_of[0] == rows_of[1]
        """Whether grad_input reads the weight by the rule of forward, and so by the same threshold."""
        self.kept_weight = kernel(STEPS[:2], sampled=True)[0] if self.same_weight else None
        self.accumulators = {step: precision.accumulators[step, halves] for step in STEPS}


@lru_cache(maxsize=4096)
def _plan(
    product: Product, precision: PrecisionPlan, x: torch.Size, weight: torch.Size, halves: bool, counting: bool
) -> LayerPlan:
    return LayerPlan(product, precision, x, weight, halves, counting)


def plan(product: Product, state: LayerState, shape: torch.Size, weight: torch.Size, x: Tensor) -> LayerPlan:
    """The plan of a call with input and weight of these shapes, where x is."""
    # binary16 products are summed in float32; a convolution's sums then leave cuDNN as binary16, rounded once
    precision = state.plan
    exact = precision.result == "fp16" or not isinstance(product, Convolution)
    halves = exact and precision.accumulate in ("fp32", "fp16") and on_gpu(x)
    return _plan(product, precision, shape, weight, halves, state.counting)


def forward(
    state: LayerState,
    plan: LayerPlan,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    wants: Sequence[bool],
    dtype: torch.dtype,
    keep: bool = False,
) -> tuple[Tensor, Saved, Rounded | None]:
    """The first step. `wants` says which gradients will be asked for: input, weight, bias.

    Args:
        keep: whether the rounded weight may be kept for backward, as a third result, where the backend does so.
    """
    product, grid, backend = plan.product, plan.product.grid(input), backend_of(input)
    xs = [(use, state.quantize(grid, use, seed, backend)) for use in plan.input[wants[1]]]
    (use, x), by = xs[0], plan.weight["forward"]
    keep = keep and wants[0] and backend.keeps_weights
    if keep and plan.kept_weight is not None:
        by = plan.kept_weight
    ws = state.quantize(product.kernel(weight), by, seed, backend)
    operands = alike(_values(x, input, use, use.half_now), _values(ws, weight, by, by.half_now))
    output = product.forward(*operands, bias, plan.accumulators["forward"])
    if plan.counting:
        step = _weight_step(state, plan, "forward", x, ws, product.input_side)
        with state.lock:
            backend.count(plan.sizes, step._replace(kept=xs[-1][1] if wants[1] else None))
    saved = _saved(plan, input, *xs[-1]) if wants[1] else Saved()
    if wants[0]:
        threshold = (
            ws.threshold if plan.same_weight else state.choose(product.kernel(weight), plan.weight["grad_input"])
        )
        saved = saved._replace(threshold=_tensor(threshold, weight))
    kept = ws if by is plan.kept_weight else None
    del xs, x, ws, operands  # the result may lie where they did
    return state.result("forward", output, dtype, backend), saved, kept


def backward(
    state: LayerState,
    plan: LayerPlan,
    grad_output: Tensor,
    weight: Tensor | None,
    saved: Saved,
    seed: Tensor | None,
    wants: Sequence[bool],
    likes: tuple[Like, Like, torch.dtype | None],
    kept: Rounded | None = None,
) -> list[Tensor | None]:
    """Both other steps: the wanted gradients of input, weight and bias.

    Args:
        likes: what input and weight are like, and the dtype of the bias.
        kept: the weight as forward has rounded it.
    """
    grads: list[Tensor | None] = [None, None, None]
    product, (input, weight_like, bias) = plan.product, likes
    now, backend = (wants[0], wants[1] or wants[2]), backend_of(grad_output)
    errors: dict[str, tuple[Rounded, Tensor]] = {}
    weight_step, grid_step = None, None
    grid = product.grid(grad_output)
    for use in plan.grad_output[now]:
        error = state.quantize(grid, use, seed, backend)
        errors |= dict.fromkeys(use.steps, (error, _values(error, grad_output, use, use.half_now)))
    if wants[0] and weight is not None:
        (error, values), use = errors["grad_input"], plan.weight["grad_input"]
        ws = kept or state.quantize(product.kernel(weight), use, seed, backend, saved.threshold)
        operands = alike(values, _values(ws, weight, use, use.half_now))
        values = product.grad_input(*operands, input, plan.accumulators["grad_input"])
        if plan.counting:
            weight_step = _weight_step(state, plan, "grad_input", error, ws, product.output_side)
        grads[0] = state.result("grad_input", values, input.dtype, backend)
        del ws, operands, values
    elif plan.counting:
        state.not_run("grad_input", plan.macs)
    if now[1]:
        error, values = errors["grad_weight"]
        x = values.new_empty(1).expand(input.shape) if saved.values is None else saved.values
        operands, by = alike(values, x), plan.accumulators["grad_weight"]
        results = product.grad_weight(*operands, weight_like, wants[1:], by)
        if wants[1] and saved.counts_over_batch is not None and plan.counting:
            grid_step = _grid_step(state, plan, error, saved)
        for place, (result, dtype) in enumerate(zip(results, (weight_like.dtype, bias), strict=True), start=1):
            if result is not None:
                grads[place] = state.result("grad_weight", result, dtype or result.dtype, backend)
    if plan.counting and not wants[1]:
        state.not_run("grad_weight", plan.macs)
    with state.lock:
        backend.count(plan.sizes, weight_step, grid_step, state.thresholds if state.training else None)
    return grads


def _values(rounded: Rounded, original: Tensor, use: OperandPlan, half: bool) -> Tensor:
    """An operand's values as a product takes them: what came in itself, if it is read in float."""
    values = rounded.half if half and rounded.half is not None else rounded.single
    if use.rule is None or values is None:
        return original
    return values if values.shape == original.shape else values.reshape(original.shape)


def _saved(plan: LayerPlan, input: Tensor, use: OperandPlan, x: Rounded) -> Saved:
    """What backward needs of the input."""
    counts = (x.counts_over_batch, x.counts_over_channels, x.lanes) if plan.counting else ()
    return Saved(_values(x, input, use, use.half_kept), *counts)


def _tensor(threshold: Threshold | None, like: Tensor) -> Tensor | None:
    """A threshold as autograd can save it."""
    return None if threshold is None else torch.as_tensor(threshold, dtype=torch.int32, device=like.device)


def _weight_step(
    state: LayerState, plan: LayerPlan, step: str, grid: Rounded, weight: Rounded, side: str
) -> WeightStep:
    """What is counted of forward or grad_input, the product of a weight and the grid on one side."""
    position = grid.counts_over_batch.flatten(1, 2)
    position = plan.product.cut(position) if step == "forward" else position
    # a weight's counts as they meet a grid on one side: over the other side's channels, [2, channels, *kernel]
    counts = weight.counts_over_batch.flatten(1, 2)
    if plan.sampled[step] and weight.counts_over_channels is not None:
        counts = weight.counts_over_channels.squeeze(2)
    return WeightStep(state.counter(step), position, counts, side, grid)


def _grid_step(state: LayerState, plan: LayerPlan, error: Rounded, saved: Saved) -> GridStep:
    """What is counted of grad_weight, the product of the error and the input."""
    product, first = plan.product, plan.product.input_side
    assert (
        saved.counts_over_batch is not None
        and saved.counts_over_channels is not None
        and error.counts_over_channels is not None
    )
    kept = product.cut(saved.counts_over_batch.flatten(1, 2)), product.cut(saved.counts_over_channels)
    sides = {first: kept, product.output_side: (error.counts_over_batch.flatten(1, 2), error.counts_over_channels)}
    to = state.counter("grad_weight")
    return GridStep(to, sides["conv_input"], sides["conv_output"], first, saved.lanes, error)


def _apart(x: Tensor) -> Tensor:
    """x, in memory of its own: kernels put all counts into one block, but an op's results lie apart."""
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


def _or_empty(some: Iterable[Tensor | None], like: Tensor) -> tuple[Any, ...]:
    """Tensors, empty ones in the place of None."""
    return tuple(like.new_empty(0) if each is None else each for each in some)


@op(STATE, torch.Tag.cudagraph_unsafe)  # what is known of call sizes stays on the host
def layer_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    thresholds: Tensor,
    counters: Tensor,
    call_sizes: Tensor,
    lanes: Tensor,
    histograms: Tensor | None,
    seed: Tensor | None,
    product: Sequence[int],
    precision: str,
    wants: Sequence[bool],
    training: bool,
    counting: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forward` as one op, for compilers and dispatch modes: the output, and what is saved, empty where nothing is.

    What is saved of an input that grad_weight reads in float is empty, too: it is the input itself.
    """
    layer = LayerState.of(precision, (thresholds, counters, call_sizes, lanes, histograms), training, counting)
    planned = plan(product_of(product), layer, input.shape, weight.shape, weight)
    output, saved, _ = forward(layer, planned, input, weight, bias, seed, wants, dtype)
    if planned.input[True][-1].rule is None:
        saved = saved._replace(values=None)
    saved = Saved(*(each if each is None or each is saved.values else _apart(each) for each in saved))
    return output, *_or_empty(saved, input)


@fake("layer_forward")
def _(input: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    product, precision, wants, _, counting, dtype = others[-6:]
    of, chosen = product_of(product), precision_plan(precision)
    output = input.new_empty(of.output_shape(input.shape, weight.shape), dtype=dtype)
    if output.dim() == 4 and torch.channels_last in (memory_format(input), memory_format(weight)):
        output = output.to(memory_format=torch.channels_last)
    saved = [input.new_empty(0) for _ in Saved._fields]
    if wants[1]:
        share, groups = of.layout(input.shape)
        (*_, use) = chosen.operands("input", ("forward",), ("grad_weight",), layout=(share, groups))
        if use.rule is not None:
            kept = torch.float16 if use.half_kept and input.dtype != torch.float64 else compute_dtype(input)
            saved[0] = torch.empty_like(input, dtype=kept, memory_format=memory_format(input))
        if counting:
            batch, channels, *grid = of.grid(input).shape
            saved[1] = input.new_empty((2, batch // share, channels, *grid), dtype=torch.int32)
            kind = backend_of(input).sample_dtype(channels, groups)
            saved[2] = input.new_empty((2, batch, groups, *grid), dtype=kind)
            saved[3] = input.new_empty(len(LANE_CONFIGS), dtype=torch.int64)
    if wants[0] and chosen.reads["grad_input", "weight"].rule is not None:
        saved[4] = input.new_empty((), dtype=torch.int32)
    return output, saved[0], saved[1], saved[2], saved[3], saved[4]


@op(STATE, torch.Tag.cudagraph_unsafe)
def layer_backward(
    grad_output: Tensor,
    weight: Tensor,
    saved: Sequence[Tensor],
    thresholds: Tensor,
    counters: Tensor,
    call_sizes: Tensor,
    lanes: Tensor,
    histograms: Tensor | None,
    seed: Tensor | None,
    product: Sequence[int],
    precision: str,
    wants: Sequence[bool],
    training: bool,
    counting: bool,
    shape: Sequence[int],
    last: bool,
    dtype: torch.dtype,
    bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` as one op: the gradients of input, weight and bias, empty where they are not wanted.

    Args:
        shape, last, dtype: of the input, and whether it was in channels_last.
        bias: its dtype.
    """
    layer, size = (
        LayerState.of(precision, (thresholds, counters, call_sizes, lanes, histograms), training, counting),
        torch.Size(shape),
    )
    planned = plan(product_of(product), layer, size, weight.shape, weight)
    kept = Saved(*(None if each.dim() == 1 and not each.numel() else each for each in saved))
    likes = Like.laid_out(size, dtype, last), Like.of(weight), bias
    grads = backward(layer, planned, grad_output, weight, kept, seed, wants, likes)
    return _or_empty(grads, grad_output)


@fake("layer_backward")
def _(grad_output: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    product, _, wants, _, _, shape, last, dtype, bias = others[-9:]
    grads = [grad_output.new_empty(0) for _ in wants]
    if wants[0]:
        grads[0] = grad_output.new_empty(shape, dtype=dtype)
        grads[0] = grads[0].to(memory_format=Like.laid_out(grads[0].shape, dtype, last).form) if last else grads[0]
    if wants[1]:
        grads[1] = torch.empty_like(weight, memory_format=Like.of(weight).form)
    if wants[2]:
        channels = grad_output.shape[1 if len(product) > 1 else -1]
        grads[2] = weight.new_empty(channels, dtype=bias)
    return grads[0], grads[1], grads[2]


@register_flop_formula(OPS.layer_forward)
def _(input: torch.Size, weight: torch.Size, *args: Any, **_: Any) -> int:
    """What torch's FlopCounterMode counts: two for each multiply-accumulate."""
    product: Sequence[int] = args[7]
    return 2 * product_of(product).geometry(input, weight).macs


@register_flop_formula(OPS.layer_backward)
def _(grad_output: torch.Size, weight: torch.Size, *args: Any, **_: Any) -> int:
    product, wants, shape = args[7], args[9], args[12]
    steps: int = wants[0] + wants[1]
    return 2 * steps * product_of(product).geometry(shape, weight).macs
