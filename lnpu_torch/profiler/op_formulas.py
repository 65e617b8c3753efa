"""Formulas for the operations that one call of a torch op takes.

An operation is an addition, a multiplication, or a comparison with the selection that it decides. A special function is
one that a SIMD core looks up or iterates: division, roots, exp, log, tanh, sigmoid, erf, powers. Constants are folded
(a division by a number is a multiplication), and batch statistics take one pass of sums and sums of squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lnpu_torch.counts.vector_ops import Kind


class Call(NamedTuple):
    """One call of an op: its arguments as the dispatcher has them, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def get(self, place: int, name: str, default: Any) -> Any:
        """An argument that may be given by place, by name, or not at all."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def result(self) -> Any:
        """The main result. An op on lists of tensors that changes the first list returns nothing."""
        if self.out is None:
            return self.args[0]
        return self.out[0] if isinstance(self.out, tuple) else self.out

    @property
    def operands(self) -> Any:
        """All arguments, but for the one to write to."""
        return (
            [self.args, [value for name, value in self.kwargs.items() if name != "out"]] if self.kwargs else self.args
        )

    @property
    def size(self) -> int:
        """Elements of the main result."""
        return elements(self.result)


Operations = tuple[int, int]
"""Operations and special functions."""


@dataclass(frozen=True)
class Formula:
    """An op's kind, and its operations and special functions in a call; None if that call is no vector operation.

    `read` and `written` give the tensors that go in and out, where those are not all arguments and all results.
    `product`: it is a matrix product or a convolution; here is what it adds to it. `whole`: it needs all of a tensor
    before it reads any of it again, as batch norm does. `mask`: a tensor, and how many bits were kept of all of it.
    `on_the_way`: it works on data as they pass, which nobody has to fetch for it.
    """

    kind: Kind
    count: Callable[[Call], Operations | None]
    read: Callable[[Call], Any] | None = None
    written: Callable[[Call], Any] | None = None
    product: bool = False
    whole: bool = False
    mask: Callable[[Call], tuple[Tensor, int]] | None = None
    on_the_way: bool = False

    def reads(self, call: Call) -> Any:
        """What a call reads."""
        return self.read(call) if self.read else call.operands

    def results(self, call: Call) -> Any:
        """What a call writes; an op on lists of tensors that changes the first list returns nothing."""
        if self.written:
            return self.written(call)
        return call.args[0] if call.out is None else call.out


def elements(x: Any) -> int:
    """Elements in a tensor, or in all tensors of nested lists."""
    if isinstance(x, Tensor):
        return x.numel()
    return sum(map(elements, x)) if isinstance(x, list | tuple) else 0


def tensors(x: Any) -> list[Tensor]:
    """Floating-point tensors in nested lists."""
    if isinstance(x, Tensor):
        return [x] if x.is_floating_point() else []
    found: list[Tensor] = []
    for one in x if isinstance(x, (list, tuple)) else ():
        if isinstance(one, Tensor):
            if one.is_floating_point():
                found.append(one)
        elif isinstance(one, (list, tuple)):
            found += tensors(one)
    return found


def size_of(found: list[Tensor]) -> int:
    """Elements of all of them."""
    return sum([x.numel() for x in found])


def each(kind: Kind, operations: int, special: int = 0) -> Formula:
    """So many for each element of the result."""
    return Formula(kind, lambda call: (operations * call.size, special * call.size))


def each_read(kind: Kind, operations: int, special: int = 0, root: bool = False) -> Formula:
    """So many for each element of the first argument, as in a reduction; with a root or a logarithm of each result."""

    def count(call: Call) -> Operations:
        n = elements(call.args[0])
        return operations * n, special * n + (call.size if root else 0)

    return Formula(kind, count)


def scatter_add(kind: Kind, place: int = 0) -> Formula:
    """An argument's elements are added where they belong, one addition each."""
    return Formula(kind, lambda call: (elements(call.args[place]), 0), lambda call: call.args[place])


def of_error(kind: Kind, operations: int, bits: int) -> Formula:
    """A backward that needs, besides the error, so many bits of each element of its second argument: a mask."""

    def mask(call: Call) -> tuple[Tensor, int]:
        return call.args[1], bits * elements(call.args[0])

    return Formula(kind, lambda call: (operations * elements(call.args[0]), 0), lambda call: call.args[0], mask=mask)


def add(call: Call) -> Operations:
    """x + alpha y."""
    return (1 if call.kwargs.get("alpha", 1) == 1 else 2) * call.size, 0


def divide(call: Call) -> Operations:
    """By numbers it is a multiplication; by tensors each quotient is a special function."""
    by = call.get(1, "other", 1)
    several = isinstance(by, list | tuple) and any(isinstance(one, Tensor) for one in by)
    return (0, call.size) if several or (isinstance(by, Tensor) and by.dim()) else (call.size, 0)


def power(call: Call) -> Operations:
    """A square is a multiplication."""
    return (call.size, 0) if call.get(1, "exponent", None) == 2 else (0, call.size)


def add_product(call: Call) -> Operations:
    """x + value a b."""
    return (2 if call.get(3, "value", 1) == 1 else 3) * call.size, 0


def add_quotient(call: Call) -> Operations:
    """x + value a / b."""
    return (1 if call.get(3, "value", 1) == 1 else 2) * call.size, call.size


def clamp(call: Call) -> Operations:
    """A comparison for each bound."""
    bounds = [call.get(1, "min", None), call.get(2, "max", None)]
    return sum(bound is not None for bound in bounds) * call.size, 0


def gelu(call: Call) -> Operations:
    """x/2 (1 + erf(x/sqrt2)); or with tanh, whose argument is x (a + b x^2)."""
    return (7 if call.kwargs.get("approximate") == "tanh" else 4) * call.size, call.size


def gelu_backward(call: Call) -> Operations:
    """dy (Phi(x) + x phi(x)), with erf and exp; or with t = tanh, dy ((1 + t)/2 + x/2 (1 - t^2)(a + 3 b x^2))."""
    return (14 * call.size, call.size) if call.kwargs.get("approximate") == "tanh" else (8 * call.size, 2 * call.size)


def product(bias: int | None = None) -> Formula:
    """A product; its bias is added as results leave the accumulators, so that nothing but the bias is read for it."""
    if bias is None:
        return Formula("other", lambda call: None, product=True)

    def count(call: Call) -> Operations | None:
        given = isinstance(call.args[bias], Tensor) and call.kwargs.get("beta", 1) != 0
        return (call.size, 0) if given else None

    return Formula("other", count, lambda call: call.args[bias], lambda call: None, product=True)


def bias_gradient(call: Call) -> Operations | None:
    """The sum of errors that a convolution's backward is asked for, or not."""
    return (elements(call.args[0]), 0) if call.args[10][2] else None


def states(call: Call) -> Any:
    """What a fused optimizer changes: parameters, and all its lists behind the gradients but the step numbers."""
    return [call.args[0], call.args[2:5] if len(call.args) > 5 else call.args[2:3]]


def sgd(call: Call) -> Operations:
    """g + wd p: 2; b = mu b + (1 - damping) g: 2 or 3; g + mu b: 2; p - lr g: 2. As torch's loop over tensors does."""
    given = call.kwargs
    momentum = (0 if given["is_first_step"] else 3 if given["dampening"] else 2) + 2 * given["nesterov"]
    per_element = 2 * bool(given["weight_decay"]) + given["maximize"] + (momentum if given["momentum"] else 0) + 2
    return per_element * elements(call.args[0]), 0


def adam(decay: int) -> Callable[[Call], Operations]:
    """m: 3; v: 4; root, / c, + eps: 2; p + s m / root: 2, a quotient; amsgrad: 1; `decay` if there is weight decay."""

    def count(call: Call) -> Operations:
        given, n = call.kwargs, elements(call.args[0])
        per_element = 11 + decay * bool(given["weight_decay"]) + given["amsgrad"] + given["maximize"]
        return per_element * n, 2 * n

    return count


def adagrad(call: Call) -> Operations:
    """s + g g: 2; root + eps: 1; p - lr g / root: 2, a quotient; g + wd p: 2."""
    n = elements(call.args[0])
    return (5 + 2 * bool(call.kwargs["weight_decay"]) + call.kwargs["maximize"]) * n, 2 * n


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
