"""Emulated layers in torch's own tools for training: each computes and counts as without it.

Compiling, autocast, channels_last: nn/test_training.py, too. Copies, pickles and checkpoints: nn/test_convert.py.
"""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import lnpu_torch as lnpu
from helpers.processes import on_ranks
from lnpu_torch import ConfigError
from lnpu_torch.nn.modules import EmulatedModule


def network(precision: str = "fp16") -> nn.Sequential:
    """By default without a T, so that halves of a batch are rounded as the whole is."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 8), nn.ReLU(), nn.Linear(8, 5)]
    return lnpu.convert(nn.Sequential(*layers), precision)


class Block(nn.Module):
    """Multiplies in its own forward, by a weight and by another activation, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight, self.last = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8) / 4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x.mean(1)) @ self.weight
        out: Tensor = self.last(rows @ rows.mT)
        return out


def block(precision: str = "fp16") -> nn.Module:
    torch.manual_seed(0)
    return lnpu.convert(Block(), precision)


def batch() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.detach().clone() for parameter in model.parameters() if parameter.grad is not None]


def macs(counts: lnpu.Counts) -> dict[tuple[str, str], int]:
    return {(entry.layer, entry.step): entry.macs for entry in counts.steps}


def trained(model: nn.Module, images: Tensor) -> tuple[list[Tensor], lnpu.Counts]:
    """Gradients and counts of one backward; each sample weighs the same in any batch."""
    with lnpu.CostCounter(model) as cost:
        (model(images).square().sum() / 8).backward()
    return gradients(model), cost.counts


def parallel(images: Tensor) -> tuple[list[Tensor], lnpu.Counts]:
    rank, wrapped = dist.get_rank(), DistributedDataParallel(network())
    found, counts = trained(wrapped, images[4 * rank : 4 * rank + 4])
    return [2 * each for each in found], counts  # DDP takes the ranks' mean


def test_ddp_counts_and_computes_as_one_process_does() -> None:
    expected, whole = trained(network(), batch())
    for ours, counts in on_ranks(parallel, batch()):
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-4)  # sums in another order, rounded to binary16
        half = {key: value / 2 for key, value in macs(whole).items()}
        assert macs(counts) == half


def sharded(make: Callable[[], nn.Module], images: Tensor) -> tuple[list[Tensor], lnpu.Counts, str]:
    rank, model = dist.get_rank(), make()
    for layer in [module for module in model.modules() if isinstance(module, EmulatedModule)]:
        fully_shard(layer)
    fully_shard(model)
    with lnpu.CostCounter(model) as cost:
        (model(images[4 * rank : 4 * rank + 4]).square().sum() / 8).backward()
    found = [2 * parameter.grad.full_tensor() for parameter in model.parameters()]
    try:
        lnpu.revert(model)
        said = "nothing"
    except ConfigError as error:
        said = str(error)
    return found, cost.counts, said


@pytest.mark.parametrize("make", [network, block])
def test_fsdp2_counts_and_computes_as_one_process_does_and_refuses_to_be_reverted(
    make: Callable[[], nn.Module],
) -> None:
    """Of layers, and of a module that multiplies in its own forward."""
    expected, whole = trained(make(), batch())
    assert make is network or {":matmul", ":matmul.2"} <= {layer for layer, _ in macs(whole)}
    for ours, counts, said in on_ranks(partial(sharded, make), batch()):
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-4)
        half = {key: value / 2 for key, value in macs(whole).items()}
        assert macs(counts) == half
        assert "FSDP" in said and "before" in said


def test_activation_checkpointing_computes_alike_and_counts_its_second_forward() -> None:
    plain, recomputed = network("fgmp"), network("fgmp")
    expected, once = trained(plain, batch())
    with lnpu.CostCounter(recomputed) as cost:
        output = checkpoint_sequential(recomputed, 2, batch().requires_grad_(), use_reentrant=False)
        (output.square().sum() / 8).backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(recomputed), expected, strict=True))
    ours, theirs = macs(cost.counts), macs(once)
    again = [layer for layer in ("0", "3", "5") if ours[layer, "forward"] == 2 * theirs[layer, "forward"]]
    assert again == ["0"]  # the last segment is not recomputed
    assert ours["3", "grad_weight"] == theirs["3", "grad_weight"]
    states = lnpu.thresholds(recomputed)
    assert all(torch.equal(states[name], value) for name, value in lnpu.thresholds(plain).items())


def test_gradient_accumulation_adds_gradients_and_counts() -> None:
    expected, whole = trained(network(), batch())
    model = network()
    with lnpu.CostCounter(model) as cost:
        for part in batch().split(4):
            (model(part).square().sum() / 8).backward()
    torch.testing.assert_close(gradients(model), expected, rtol=2e-3, atol=1e-4)
    assert macs(cost.counts) == macs(whole) and {entry.calls for entry in cost.counts.steps} == {2}


def test_an_averaged_model_is_emulated_with_counters_of_its_own() -> None:
    model = network("fgmp")
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    trained(model, batch())
    average.update_parameters(model)
    assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), model.parameters(), strict=True))
    with lnpu.CostCounter(model) as ours, lnpu.CostCounter(average) as its, torch.no_grad():
        output = average.eval()(batch())
    assert not ours.counts.steps and {entry.step for entry in its.counts.steps} == {"forward"}
    # its thresholds stay those of the copy: the first step's own were not yet chosen then
    twin = copy.deepcopy(average)
    assert torch.equal(twin(batch()), output)


def test_a_reverted_model_is_exported_and_computes_as_before() -> None:
    model = network("fgmp")
    trained(model, batch())
    exported: Any = torch.export.export(lnpu.revert(model).eval(), (batch(),))
    assert torch.equal(exported.module()(batch()), model(batch()))
    assert not any("lnpu" in str(node.target) for node in exported.graph.nodes)


def test_an_emulated_model_is_exported_and_rounds_as_before() -> None:
    model = network("fgmp")
    trained(model, batch())
    model.eval()
    exported: Any = torch.export.export(model, (batch(),))
    found = exported.module()(batch())
    assert torch.equal(found, model(batch()))
    assert not torch.equal(found, lnpu.revert(model)(batch()))


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_compiled_step_in_autocast_counts_as_an_eager_one() -> None:
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        model = network("fgmp")
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with lnpu.CostCounter(model) as cost, torch.autocast("cpu", torch.bfloat16):
            run(batch()).float().square().sum().backward()
        # in what order things ran, compiled code does not tell
        steps = [entry.model_dump(exclude={"by_size": {"__all__": {"passed"}}}) for entry in cost.counts.steps]
        found.append((gradients(model), steps))
    torch.compiler.reset()
    assert found[0][1] == found[1][1]
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


class Residual(nn.Module):
    """A block with a projection, whose gradients inductor lays out anew."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.projection = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(self.body(x) + self.projection(x))
        return out


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_model_compiled_to_machine_code_computes_and_counts_as_an_eager_one() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    eager = lnpu.convert(Residual(), "fgmp")
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True)
    x = torch.randn(4, 4, 8, 8)
    with lnpu.CostCounter(eager) as a, lnpu.CostCounter(call) as b:
        for run in (eager, call, eager, call):
            run(x).square().sum().backward()
    assert a.counts == b.counts
    assert all(torch.equal(p, q) for p, q in zip(gradients(eager), gradients(compiled), strict=True))


class Calls(TorchDispatchMode):
    """Counts the calls of each op."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[str(func)] += 1
        return func(*args, **kwargs or {})


def test_selective_checkpointing_keeps_what_its_policy_names() -> None:
    model = lnpu.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "fp16")
    x, products, gradients = torch.randn(4, 8), [], []
    for kept in (None, [], [torch.ops.aten.addmm.default]):
        inner = x.clone().requires_grad_()
        contexts = partial(create_selective_checkpoint_contexts, kept)
        with Calls() as calls:
            out = model(inner) if kept is None else checkpoint(model, inner, use_reentrant=False, context_fn=contexts)
            out.square().sum().backward()
        products.append(calls.of["aten.addmm.default"])
        gradients.append(inner.grad)
    assert products == [2, 4, 2]
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
