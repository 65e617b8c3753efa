"""Formulas for softmax, normalisations and poolings, by the rules of `formulas`. They do not know ops' names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lnpu_torch.profiler.op_formulas import Call, Formula, Operations, elements


def softmax(call: Call) -> Operations:
    """Maximum, difference, exp, sum, and a factor or difference; a quotient or a logarithm for each row."""
    rows = call.size // max(call.result.shape[call.args[1]], 1) if call.result.dim() else 1
    return 4 * call.size, call.size + rows


def batch_norm(call: Call) -> Operations:
    """Training: sum; square and sum; scale and shift; 15 per channel. Evaluation: scale and shift; 4 per channel."""
    per_element, per_channel = (5, 15) if call.args[5] else (2, 4)
    channels = call.args[0].shape[1]
    return per_element * call.args[0].numel() + per_channel * channels, channels


def batch_norm_reads(call: Call) -> Any:
    """The input is read for its statistics, and again."""
    return [call.args, call.args[0] if call.args[5] else None]


def batch_norm_backward(call: Call) -> Operations:
    """dbeta: 1. dgamma: difference, product, sum. dx: a dy + b x + c, or a dy in evaluation. 9 per channel."""
    error, training, (into, gamma, beta) = call.args[0], call.args[7], call.args[9]
    per_element = (4 if training or gamma or beta else 0) + ((4 if training else 1) if into else 0)
    return per_element * error.numel() + 9 * error.shape[1], 0


def batch_norm_backward_reads(call: Call) -> Any:
    """Error and input are read for the sums, and again for dx."""
    error, x, weight, mean, variance, saved_mean, saved_scale, training, _, mask = call.args
    again = [error, x] if training and mask[0] else []
    return [error, x, weight, *again, *((saved_mean, saved_scale) if training else (mean, variance))]


def gpu_batch_norm_backward(call: Call) -> Operations:
    """As in training; cuDNN's and MIOpen's ops, which compute all three gradients."""
    return 8 * call.size + 9 * call.result.shape[1], 0


def gpu_batch_norm_backward_reads(call: Call) -> Any:
    """Input and error twice, the weight, and the saved mean and scale."""
    return [call.args[:2], call.args[:3], call.args[5:7]]


def row_norm(call: Call) -> Operations:
    """Layers and groups. Sum; square and sum; scale and shift; weight; bias. 6 and a root per row."""
    affine = sum(isinstance(argument, Tensor) for argument in call.args[1:])
    rows = elements(call.out[1])
    return (5 + affine) * call.size + 6 * rows, rows


def row_norm_backward(mean: int, weight: int) -> Callable[[Call], Operations]:
    """xhat: 2, its and the error's sums: 3, dx: 4, dy gamma: 1, dgamma and dbeta: 3. 2 per row. At these places."""

    def count(call: Call) -> Operations:
        per_element = 9 if call.args[weight] is None else 13
        return per_element * elements(call.args[0]) + 2 * elements(call.args[mean]), 0

    return count


def rms_norm(call: Call) -> Operations:
    """Square and sum; scale; weight. 2 and a root per row."""
    per_element, rows = 3 + isinstance(call.get(2, "weight", None), Tensor), elements(call.out[1])
    return per_element * call.size + 2 * rows, rows


def rms_norm_backward(call: Call) -> Operations:
    """The error's sum with x: 2, dx = a dy + b x: 3, dy gamma: 1, dgamma: 3. 3 per row."""
    per_element = 5 if call.args[4] is None else 9
    return per_element * elements(call.args[0]) + 3 * elements(call.args[3]), 0


def twice(*places: int) -> Callable[[Call], Any]:
    """All arguments; and those at these places once more, first for sums, then for the result."""
    return lambda call: [call.args, [call.args[place] for place in places]]


def max_pool(dims: int) -> Formula:
    """A window of K elements takes K - 1 comparisons, at the image's border too."""
    return Formula("pooling", lambda call: ((_window(call.args[1], dims) - 1) * call.size, 0))


def average_pool(dims: int) -> Formula:
    """K - 1 additions and a multiplication."""
    return Formula("pooling", lambda call: (_window(call.args[1], dims) * call.size, 0))


def average_pool_backward(dims: int) -> Formula:
    """Each error is scaled, and then added K times."""
    count = lambda call: ((_window(call.args[2], dims) + 1) * elements(call.args[0]), 0)  # noqa: E731
    return Formula("pooling", count, lambda call: call.args[0])


def adaptive_pool(dims: int) -> Formula:
    """An operation for each element of each window."""

    def count(call: Call) -> Operations:
        return _taps(call.args[0].shape, call.result.shape, dims), 0

    return Formula("pooling", count)


def adaptive_pool_backward(dims: int) -> Formula:
    """Each error is scaled, and then added to each element of its window."""

    def count(call: Call) -> Operations:
        error, x = call.args[:2]
        return error.numel() + _taps(x.shape, error.shape, dims), 0

    return Formula("pooling", count, lambda call: call.args[0])


def _window(kernel: Sequence[int], dims: int) -> int:
    """Elements of a window; one number stands for all dimensions."""
    return math.prod(kernel) if len(kernel) == dims else int(kernel[0]) ** dims


def _taps(inputs: Sequence[int], outputs: Sequence[int], dims: int) -> int:
    """Elements in all windows of an adaptive pooling, which overlap where sizes do not divide."""
    ends = zip(inputs[-dims:], outputs[-dims:], strict=True)
    sizes = (sum(-(-(i + 1) * size // count) - i * size // count for i in range(count)) for size, count in ends)
    return math.prod(outputs[:-dims]) * math.prod(sizes)
