"""The ops of a ReLU that keeps one bit per element for its backward. They know no layers and no autograd."""

from __future__ import annotations

from torch import Tensor

from lnpu_torch.registry import op


@op(["out"])
def packed_relu(x: Tensor, out: Tensor) -> Tensor:
    """ReLU of a tensor that `backends.dense_loops` takes, into `out` (which may be x); one bit per element."""
    from lnpu_torch import cpu  # only here is it sure that Numba is installed

    return cpu.relu(x, out)


@op()
def packed_relu_backward(error: Tensor, signs: Tensor) -> Tensor:
    """The gradient of `packed_relu`'s input from its bits; `error` lies in memory as x did."""
    from lnpu_torch import cpu

    return cpu.relu_backward(error, signs)
