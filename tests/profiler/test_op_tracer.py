"""All vector operations are counted however they ran; or else the counts say why not."""

from __future__ import annotations

import copy
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lnpu_torch as lnpu
from helpers.one_step import IMAGES, LABELS, counted, network, operations, step, train
from helpers.processes import on_ranks
from lnpu_torch.counts.vector_ops import NotCounted, VectorOpCounts, merge
from lnpu_torch.profiler.op_formulas import Formula
from lnpu_torch.profiler.op_table import FORMULAS, MOVES
from lnpu_torch.profiler.op_tracer import COMPILED, COMPILED_FUNCTION, OpTracer
from lnpu_torch.recipes.models import NAMES, ModelConfig, build


@pytest.fixture(autouse=True)
def no_compiled_code() -> None:
    """Code that other tests have compiled is alive in this process."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def test_a_checkpoint_runs_its_forward_twice_and_its_backward_once() -> None:
    plain, model = step(network()), network()
    once = operations(plain)
    twice = operations({key: entry for key, entry in plain.items() if key[1] == "forward" and key[0] != "loss"})
    twice["other", "forward"] -= 10  # the last layer's bias is outside
    for reentrant in (False, True):
        with lnpu.CostCounter(model) as cost:
            model.zero_grad()
            images = IMAGES.clone().requires_grad_()
            hidden = checkpoint(model[:4], images, use_reentrant=reentrant)
            F.cross_entropy(model[4:](hidden), LABELS).backward()
        assert operations(counted(cost)) == once + twice
        assert cost.counts.vector_ops.uncounted == {}


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_evaluation_counts_alike_with_gradients_off_either_way(off: Callable[[], Any]) -> None:
    model = network().eval()
    with lnpu.CostCounter(model) as cost, off():
        F.cross_entropy(model(IMAGES), LABELS)
    elements = 2 * 4 * 8 * 8
    assert {key: entry.operations for key, entry in counted(cost).items()} == {
        ("normalisation", "forward", "native_batch_norm"): 2 * elements + 4 * 4,
        ("activation", "forward", "relu"): elements,
        ("pooling", "forward", "max_pool2d_with_indices"): 3 * elements // 4,
        ("loss", "forward", "_log_softmax"): 4 * 10,
        ("loss", "forward", "nll_loss_forward"): 4,
        ("other", "forward", "bias"): elements + 10,
    }


def test_counters_nest_start_anew_and_show_what_they_have_so_far() -> None:
    model = network()
    with lnpu.CostCounter(model) as outer:
        train(model)
        live = counted(outer)
        with lnpu.CostCounter(model) as inner:
            train(model)
        train(model)
    assert counted(inner) == live
    assert {key: entry.operations for key, entry in counted(outer).items()} == {
        key: 3 * entry.operations for key, entry in live.items()
    }
    with outer:
        train(model)
    assert counted(outer) == live


def test_a_counter_that_is_switched_off_says_so() -> None:
    model = network()
    with lnpu.CostCounter(model, vector_ops=False) as cost:
        train(model)
    assert cost.counts.vector_ops == NotCounted(reason="CostCounter(vector_ops=False)")


def test_steps_in_a_thread_of_the_programs_own_are_out_of_sight() -> None:
    model = network()
    with lnpu.CostCounter(model) as cost:
        train(model)
        thread = threading.Thread(target=train, args=(model,))
        thread.start()
        thread.join()
    assert cost.counts.vector_ops == NotCounted(reason="only 6 of 12 steps of layers ran in sight")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("what", ["model", "function"])
def test_compiled_code_runs_as_ever_and_is_said_not_to_be_counted(what: str) -> None:
    plain, model = network(), network()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True) if what == "model" else model
    with lnpu.CostCounter(plain, vector_ops=False) as expected:
        train(plain)
    with lnpu.CostCounter(model) as cost:
        train(compiled)
        if what == "function":
            torch.compile(F.relu, backend=backend)(IMAGES)
    assert len(graphs) == 1
    assert cost.counts.vector_ops == NotCounted(reason=COMPILED)
    assert cost.counts.steps == expected.counts.steps
    torch._dynamo.reset()
    assert step(network())
    assert cost.counts.vector_ops == NotCounted(reason=COMPILED)  # as it was when the block ended


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_leaves_others_counted_and_a_compiled_function_might_run_unseen() -> None:
    once = step(network())
    other = torch.compile(network(), backend="eager")
    train(other)
    assert step(network()) == once
    with lnpu.CostCounter(other) as cost:
        train(other)
    assert cost.counts.vector_ops == NotCounted(reason=COMPILED)
    assert step(network()) == once
    torch.compile(lambda x: x.square().sum(), backend="eager")(IMAGES)
    with lnpu.CostCounter(model := network()) as cost:
        train(model)
    assert cost.counts.vector_ops == NotCounted(reason=COMPILED_FUNCTION)
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_products_in_float_have_their_share_beside_the_total() -> None:
    torch.compiler.reset()
    model, x = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 32), nn.Linear(32, 8)), torch.randn(16, 40)
    lnpu.convert(model, overrides={"2": None})
    shares = []
    for each in (model, torch.compile(model), torch.compile(model)):
        with lnpu.CostCounter(model) as cost:
            each(x).sum().backward()
        shares.append(cost.report().float_macs)
    assert shares == [3 * 16 * 64 * 32] * 3
    torch.compiler.reset()


def ddp_step() -> dict[tuple[str, str, str], int]:
    model = DistributedDataParallel(network())
    with lnpu.CostCounter(model) as cost:
        train(model)
    return {key: entry.operations for key, entry in counted(cost).items()}


def test_a_rank_counts_as_one_process_does() -> None:
    alone = {key: entry.operations for key, entry in step(network()).items()}
    for rank in on_ranks(ddp_step):
        communication = {key: work for key, work in rank.items() if key not in alone}
        assert {key: rank[key] for key in alone} == alone
        assert all(kind == "other" for kind, _, _ in communication), communication


def test_what_has_no_formula_is_named() -> None:
    with OpTracer() as tracer:
        torch.sort(torch.ones(3))
        torch.sort(torch.ones(3))
        torch.sort(torch.tensor([3, 1]))  # integers are nothing for a floating-point core
    assert tracer.vector_ops == VectorOpCounts(uncounted={"aten.sort.default": 2})


def test_a_call_that_its_formula_cannot_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMULAS, "neg", Formula("other", lambda call: (call.args[7], 0)))
    found: list[VectorOpCounts] = []

    def run() -> None:  # in a thread that has looked no formula up yet
        with OpTracer() as tracer:
            torch.neg(torch.ones(3))
        found.append(tracer.vector_ops)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [VectorOpCounts(uncounted={"aten.neg.default": 1})]


def test_products_outside_emulated_layers_have_their_share_beside_the_total() -> None:
    model = network()
    lnpu.convert(model, overrides={"5": None})
    with FlopCounterMode(display=False) as flops:
        train(lnpu.revert(copy.deepcopy(model)))
    with lnpu.CostCounter(model) as cost:
        train(model)
    report, counts = cost.report(), cost.counts
    assert counts.in_float is not None
    assert {op: each.calls for op, each in counts.in_float.items()} == {"aten.addmm.default": 1, "aten.mm.default": 2}
    assert 2 * (report.float_macs + report.total.macs - report.total.not_run) == flops.get_total_flops()
    assert report.float_share == report.float_macs / (flops.get_total_flops() // 2)
    data = report.to_dict()
    assert data["float_share"] == report.float_share and data["in_float"]["aten.mm.default"]["calls"] == 2
    printed = " ".join(str(report).split())
    assert f"NOT IN THE TOTAL: {report.float_share:.1%} of all multiply-accumulates" in printed
    assert "aten.mm.default (2 x)" in printed
    assert (counts + counts).in_float["aten.mm.default"].macs == 2 * counts.in_float["aten.mm.default"].macs
    with lnpu.CostCounter(converted := network()) as cost:
        train(converted)
    assert cost.counts.in_float == {} and cost.report().float_share == 0
    assert "NOT IN THE TOTAL" not in str(cost.report())


def test_formulas_and_moves_are_of_ops_that_exist() -> None:
    gpu_only = {"miopen_batch_norm", "miopen_batch_norm_backward"}
    for name in (FORMULAS.keys() | MOVES) - gpu_only:
        op = getattr(torch.ops.aten, name, None) or getattr(torch.ops.aten, f"{name}_", None)
        assert op is not None, name
    assert not FORMULAS.keys() & MOVES


@pytest.mark.parametrize("name", NAMES)
def test_every_recipes_model_is_counted_whole(name: str) -> None:
    size = 32 if name.endswith("_cifar") else 64
    model = lnpu.convert(build(ModelConfig(name=name, width=2 if size == 32 else None), 3, (3, size, size)))
    with lnpu.CostCounter(model) as cost:
        F.cross_entropy(model(torch.randn(2, 3, size, size)), torch.tensor([0, 2]), label_smoothing=0.1).backward()
    vector_ops = cost.counts.vector_ops
    assert isinstance(vector_ops, VectorOpCounts)
    assert not vector_ops.uncounted
    kinds = {entry.kind for entry in vector_ops.entries}
    assert kinds >= {"activation", "pooling", "loss", "other"}
    assert ("normalisation" in kinds) == ("alexnet" not in name and name != "vgg16")


def test_sums_and_files(tmp_path: Path) -> None:
    model = network()
    with lnpu.CostCounter(model) as cost:
        train(model)
        torch.sort(IMAGES)
    counts = cost.counts
    counts.save(tmp_path / "counts.json")
    assert lnpu.Counts.load(tmp_path / "counts.json") == counts
    both = (counts + counts).vector_ops
    assert isinstance(both, VectorOpCounts) and isinstance(counts.vector_ops, VectorOpCounts)
    assert [entry.operations for entry in both.entries] == [2 * entry.operations for entry in counts.vector_ops.entries]
    assert both.uncounted == {"aten.sort.default": 2}
    assert (counts * 3).vector_ops == (counts + counts + counts).vector_ops
    assert (counts * 0).vector_ops == VectorOpCounts()
    off = NotCounted(reason="switched off")
    assert merge([counts.vector_ops, off, off]) == off  # a part that is missing makes the sum no sum
