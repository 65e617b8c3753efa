"""Vector operations, against small cases worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnpu_torch as lnpu
from lnpu_torch.profiler.op_tracer import OpTracer

Key = tuple[str, str, str]


def seen(run: Callable[[], object]) -> dict[Key, tuple[int, int, int, int]]:
    """What a function does: elements read and written, operations and special functions, by kind, phase and op."""
    with OpTracer() as tracer:
        run()
    assert not tracer.vector_ops.uncounted
    return {
        (entry.kind, entry.phase, entry.op): (entry.read, entry.written, entry.operations, entry.special)
        for entry in tracer.vector_ops.entries
    }


def network() -> nn.Sequential:
    """Batch norm over 3 channels, ReLU, and a max pooling of 2x2, behind a convolution with bias."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return lnpu.convert(nn.Sequential(*layers, nn.Linear(12, 5)))


IMAGES, LABELS = torch.randn(2, 2, 4, 4), torch.tensor([0, 3])
N, C = 2 * 3 * 4 * 4, 3  # elements of what the convolution returns, and its channels


def test_a_small_network_by_hand() -> None:
    model = network()

    def step() -> None:
        F.cross_entropy(model(IMAGES), LABELS).backward()

    assert seen(step) == {
        # sum, square and sum, scale and shift, over all; a root for each channel. x is read twice.
        ("normalisation", "forward", "native_batch_norm"): (2 * N + 4 * C, N + 2 * C, 5 * N + 15 * C, C),
        # dbeta: 1, dgamma: 3, dx: 4. Error and x are read twice; weight, mean and scale once.
        ("normalisation", "backward", "native_batch_norm_backward"): (4 * N + 3 * C, N + 2 * C, 8 * N + 9 * C, 0),
        ("activation", "forward", "relu"): (N, N, N, 0),
        ("activation", "backward", "threshold_backward"): (N, N, N, 0),
        ("pooling", "forward", "max_pool2d_with_indices"): (N, N // 4, 3 * N // 4, 0),
        ("pooling", "backward", "max_pool2d_with_indices_backward"): (N // 4, N, N // 4, 0),
        # maximum, difference, exp, sum, difference; a logarithm for each of two rows
        ("loss", "forward", "_log_softmax"): (10, 10, 40, 10 + 2),
        ("loss", "forward", "nll_loss_forward"): (10, 2, 4, 0),
        ("loss", "backward", "nll_loss_backward"): (1 + 10 + 1, 10, 2, 0),
        ("loss", "backward", "_log_softmax_backward_data"): (20, 10, 30, 10),
        # biases, added as results leave the accumulators; their gradients are sums of errors
        ("other", "forward", "bias"): (C + 5, 0, N + 10, 0),
        ("other", "backward", "bias"): (N + 10, C + 5, N + 10, 0),
    }


def test_a_residual_addition_and_its_gradients() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert seen(lambda: (x.tanh() + x).sum().backward()) == {
        ("activation", "forward", "tanh"): (12, 12, 0, 12),
        ("activation", "backward", "tanh_backward"): (24, 12, 36, 0),
        ("other", "forward", "add"): (24, 12, 12, 0),
        ("loss", "forward", "sum"): (12, 1, 12, 0),
        ("other", "backward", "add"): (24, 12, 12, 0),  # both branches' gradients
    }


def test_global_average_pooling_is_a_mean() -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    assert seen(lambda: nn.AdaptiveAvgPool2d(1)(x).square().mean().backward()) == {
        ("pooling", "forward", "mean"): (120, 6, 120, 0),
        ("pooling", "backward", "div"): (120, 120, 120, 0),
        ("other", "forward", "pow"): (6, 6, 6, 0),
        ("loss", "forward", "mean"): (6, 1, 6, 0),
        ("loss", "backward", "div"): (6, 6, 6, 0),
        ("other", "backward", "pow"): (6, 6, 0, 6),
        ("other", "backward", "mul"): (18, 12, 12, 0),
    }


POOLS: list[tuple[nn.Module, int, int]] = [
    # operations forward and backward, of [2, 3, 6, 6] = 216 elements in 6 planes
    (nn.MaxPool2d(3, 2, 1), 54 * 8, 54),
    (nn.AvgPool2d((2, 3)), 36 * 6, 36 * 7),
    (nn.AdaptiveAvgPool2d(3), 216, 54 + 216),
    (nn.AdaptiveAvgPool2d((4, 3)), 6 * 8 * 6, 72 + 6 * 8 * 6),  # windows of 2 rows at 0, 1, 3, 4: rows 1 and 4 twice
    (nn.AdaptiveMaxPool2d(2), 216, 24),
]


@pytest.mark.parametrize(("pool", "forward", "backward"), POOLS)
def test_pooling_windows(pool: nn.Module, forward: int, backward: int) -> None:
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    counted = seen(lambda: pool(x).backward(torch.ones_like(pool(x.detach()))))
    pooling = {phase: work for (kind, phase, _), work in counted.items() if kind == "pooling"}
    assert pooling["forward"][2] == 2 * forward  # the second one gives the shape
    assert pooling["backward"][2] == backward


SGD = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
UPDATES: list[tuple[type[torch.optim.Optimizer], dict[str, Any], tuple[int, int], tuple[int, int]]] = [
    # per parameter, in a step that is not the first: operations, special functions, tensors fetched and stored
    (torch.optim.SGD, {}, (2, 0), (2, 1)),  # p - lr g
    (torch.optim.SGD, {"momentum": 0.9}, (4, 0), (3, 2)),  # b = mu b + g; p - lr b
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}, (5, 0), (3, 2)),
    (torch.optim.SGD, SGD, (8, 0), (3, 2)),  # g + wd p; b = mu b + g; g + mu b; p - lr g
    (torch.optim.Adam, {}, (11, 2), (4, 3)),  # m: 3, v: 4; root, / c, + eps; p - s m / root
    (torch.optim.Adam, {"weight_decay": 0.01}, (13, 2), (4, 3)),
    (torch.optim.Adam, {"amsgrad": True}, (12, 2), (5, 4)),
    (torch.optim.AdamW, {}, (12, 2), (4, 3)),  # its decay is one multiplication
    (torch.optim.Adagrad, {}, (5, 2), (3, 2)),
]


@pytest.mark.parametrize("how", ["for loop", "foreach", "fused"])
@pytest.mark.parametrize(("optimizer", "settings", "operations", "tensors"), UPDATES)
def test_optimizers_count_alike_however_they_are_implemented(
    optimizer: type[torch.optim.Optimizer],
    settings: dict[str, Any],
    operations: tuple[int, int],
    tensors: tuple[int, int],
    how: str,
) -> None:
    parameters = [nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(7))]
    ways = {"foreach": how == "foreach", "fused": how == "fused"}
    update = optimizer(parameters, lr=0.1, **settings, **ways)  # type: ignore[call-arg]
    for each in parameters:
        each.grad = torch.ones_like(each)
    update.step()
    with OpTracer() as tracer:
        update.step()
        update.step()
    counted = tracer.vector_ops.entries
    assert {(entry.kind, entry.phase) for entry in counted} == {("optimizer", "update")}
    steps = 2 * (optimizer is not torch.optim.SGD)  # each parameter's own step number
    assert sum(entry.operations for entry in counted) == 2 * (operations[0] * 27 + steps)
    assert sum(entry.special for entry in counted) == 2 * operations[1] * 27
    assert sum(entry.fetched for entry in counted) == 2 * tensors[0] * 27
    assert sum(entry.stored for entry in counted) == 2 * tensors[1] * 27


def test_a_first_step_fetches_the_same_wherever_its_states_come_to_lie() -> None:
    """They are made during the step, where something else may have lain."""
    fetched = set()
    for keep in (False, True):
        parameters = [nn.Parameter(torch.ones(64)) for _ in range(20)]
        update = torch.optim.SGD(parameters, lr=0.1, **SGD, foreach=False)
        for each in parameters:
            each.grad = torch.ones_like(each)
        kept = [torch.ones(64) for _ in range(1000 if keep else 0)]
        del kept[::2]
        with OpTracer() as tracer:
            update.step()
        fetched.add(sum(entry.fetched for entry in tracer.vector_ops.entries))
    assert fetched == {20 * 64 * 2}


def test_gradients_clipped_and_scaled_are_part_of_the_update() -> None:
    weight = nn.Parameter(torch.ones(4, 5))
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()

    def update() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([weight], 1.0)
        scaler.step(optimizer)
        scaler.update()

    counted = {op: work for (kind, _, op), work in seen(update).items() if kind == "optimizer"}
    assert counted["_amp_foreach_non_finite_check_and_unscale"][2] == 20
    assert counted["_foreach_norm"][2:] == (2 * 20, 1)
    assert counted["_foreach_mul"][2] == 20
    assert counted["add"][2] == 2 * 20


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_closure_counts_as_what_runs_before_its_step(how: dict[str, bool]) -> None:
    counts = []
    for inside in (False, True):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, **SGD, **how)

        def closure(net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(IMAGES), LABELS)
            loss.backward()
            return loss

        with lnpu.CostCounter(net) as cost:
            for _ in range(2):
                if not inside:
                    closure()
                optimizer.step(closure if inside else None)  # type: ignore[arg-type]
        counts.append(cost.counts)
    assert counts[0] == counts[1]
