"""What a model's layers did in a block, whichever of them came, went or were converted anew meanwhile."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import multiprocessing as mp
from torch import nn

import lnpu_torch as lnpu
from helpers.processes import CONTEXT

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    return lnpu.convert(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))


def step(model: nn.Module, times: int = 1) -> None:
    for _ in range(times):
        model(X).sum().backward()


def calls(counts: lnpu.Counts) -> dict[str, int]:
    """Calls of each layer, whose three steps have as many."""
    found: dict[str, set[int]] = {}
    for entry in counts.steps:
        found.setdefault(entry.layer, set()).add(entry.calls)
    assert all(len(each) == 1 for each in found.values())
    return {name: each.pop() for name, each in found.items()}


def macs(counts: lnpu.Counts) -> int:
    return sum(entry.macs for entry in counts.steps)


def simd_pj(counts: lnpu.Counts) -> float:
    return sum(row.energy_pj or 0 for row in lnpu.price(counts, "lnpu").rows if row.kind == "SIMD")


def operations(counts: lnpu.Counts) -> int:
    return sum(row.operations or 0 for row in lnpu.price(counts, "lnpu").rows)


def test_a_call_says_what_of_it_is_used_and_in_how_many_groups() -> None:
    strided, grouped, few = (
        nn.Conv2d(4, 8, 1, stride=2, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(8, 4, 3, stride=3, padding=1, bias=False),  # of a 2x2 image, where five of nine weights meet border
    )
    model = lnpu.convert(nn.Sequential(strided, grouped, few), "fp16")
    with lnpu.CostCounter(model) as cost:
        model(torch.randn(2, 4, 4, 4)).sum().backward()
    found = {(entry.layer, entry.step): entry.by_size[0] for entry in cost.counts.steps if entry.by_size}
    assert {key: (calls.sizes, calls.used, calls.groups) for key, calls in found.items()} == {
        ("0", "forward"): ((128, 32, 64), (32, 32, 64), 1),
        ("0", "grad_weight"): ((128, 64, 32), (32, 64, 32), 1),
        ("1", "forward"): ((64, 288, 64), None, 2),
        ("1", "grad_input"): ((64, 288, 64), None, 2),
        ("1", "grad_weight"): ((64, 64, 288), None, 2),
        ("2", "forward"): ((64, 288, 8), (64, 128, 8), 1),
        ("2", "grad_input"): ((8, 288, 64), (8, 128, 64), 1),
        ("2", "grad_weight"): ((64, 8, 288), (64, 8, 128), 1),
    }


def test_a_batched_product_has_a_group_for_each_entry() -> None:
    class Heads(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b

    model = lnpu.convert(Heads(), "fp16")
    with lnpu.CostCounter(model) as cost, torch.no_grad():
        model(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 7))
    ((calls,),) = (entry.by_size for entry in cost.counts.steps)
    assert (calls.sizes, calls.used, calls.groups) == ((6 * 20, 6 * 35, 6 * 28), None, 6)


@pytest.mark.parametrize("before", [0, 2, 9])
def test_what_was_done_before_a_conversion_is_kept_and_added(before: int) -> None:
    model = network()
    step(model, before)
    with lnpu.CostCounter(model) as cost:
        step(model, 3)
        lnpu.convert(lnpu.revert(model))
        step(model, 4)
        assert calls(cost.counts) == {"0": 7, "2": 7}
        lnpu.convert(model, "fp8")
        step(model)
        lnpu.revert(model)
        step(model, 5)  # in float
        lnpu.convert(model, "fp16")
        step(model, 2)
    assert calls(cost.counts) == {"0": 10, "2": 10}
    step(model)
    assert calls(cost.counts) == {"0": 10, "2": 10}
    assert lnpu.price(cost.counts, "lnpu").total.macs == macs(cost.counts)


def test_with_other_operands_in_float_a_layer_is_one_of_its_own() -> None:
    model = network()
    with lnpu.CostCounter(model) as cost:
        step(model)
        lnpu.convert(model, lnpu.Precision(input="fp8"), overrides={"2": "fgmp"})
        step(model, 2)
    assert calls(cost.counts) == {"0": 1, "2": 3, "0 (2)": 2}


@pytest.mark.parametrize("before", [0, 2, 9])
def test_a_new_head_is_counted_from_its_beginning(before: int) -> None:
    model = network()
    step(model, before)
    with lnpu.CostCounter(model) as cost:
        model[2] = lnpu.convert(nn.Linear(16, 4))
        step(model, 5)
    assert calls(cost.counts) == {"0": 5, "2": 5}


def test_layers_that_go_leave_what_they_did_and_those_that_come_bring_nothing() -> None:
    model, heads = network(), [lnpu.convert(nn.Linear(16, width)) for width in (4, 7, 5)]
    for head in heads:
        head(torch.randn(3, 16)).sum().backward()
    step(model)
    with lnpu.CostCounter(model) as cost:
        step(model)
        for times, head in enumerate(heads, 1):
            model[2] = head
            step(model, times)
        model[2] = nn.Identity()
        step(model)
    assert calls(cost.counts) == {"0": 5 + 3, "2": 2, "2 (2)": 2, "2 (3)": 3}


def test_a_model_reverted_in_the_block_keeps_its_exception() -> None:
    model = network()
    with pytest.raises(KeyError, match="mine"), lnpu.CostCounter(model) as cost:
        step(model)
        lnpu.revert(model)
        raise KeyError("mine")
    assert calls(cost.counts) == {"0": 1, "2": 1}


def test_nothing_is_left_behind_by_a_counter() -> None:
    hooks = torch.nn.modules.module._global_module_registration_hooks
    model, before = network(), len(hooks)
    with pytest.raises(KeyError), lnpu.CostCounter(model), lnpu.CostCounter(model):
        assert len(hooks) == before + 2
        raise KeyError
    counter = lnpu.CostCounter(model)
    counter.__enter__()
    counter.__enter__()  # anew
    counter.__exit__(None, None, None)
    assert len(hooks) == before and not lnpu.nn.modules.LISTENERS


def test_of_two_models_that_are_counted_together_each_operation_is_counted_once() -> None:
    def pair() -> tuple[nn.Sequential, nn.Sequential]:
        torch.manual_seed(0)
        first, second = (lnpu.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU())) for _ in range(2))
        return first, second

    first, second = pair()
    with lnpu.CostCounter(both := nn.ModuleList([first, second])) as expected:
        second(first(X)).sum().backward()
    assert both
    first, second = pair()
    with lnpu.CostCounter(first) as one, lnpu.CostCounter(second) as other:
        second(first(X)).sum().backward()
    assert operations(one.counts) + operations(other.counts) == operations(expected.counts) > 0
    assert macs(one.counts) + macs(other.counts) == macs(expected.counts)
    assert "opened last" in str(one.report()) and "opened last" not in str(other.report())
    merged = lnpu.Counts.merge([one.counts, other.counts])
    assert calls(merged) == {"0": 1, "0 (2)": 1} and calls(merged + one.counts) == {"0": 2, "0 (2)": 1}
    prices = [lnpu.price(counts, "lnpu").total.energy_pj for counts in (merged, expected.counts)]
    assert prices[0] == pytest.approx(prices[1], rel=0.01)  # the second knows nothing of tensors that the first made


def test_a_part_of_a_model_that_is_counted_apart_is_counted_in_both() -> None:
    model = network()
    with lnpu.CostCounter(model) as whole, lnpu.CostCounter(model[:2]) as part:
        step(model)
    assert calls(whole.counts) == {"0": 1, "2": 1} and calls(part.counts) == {"0": 1}
    assert whole.counts.vector_ops == part.counts.vector_ops or simd_pj(whole.counts) > simd_pj(part.counts) > 0
    assert "opened last" not in str(whole.report())


def _work(model: nn.Module, times: int) -> None:
    step(model, times)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # is multi-threaded
def test_processes_that_share_a_model_count_together(method: str) -> None:
    if method not in mp.get_all_start_methods():
        pytest.skip("processes do not begin so here")
    alone, model = network(), network()
    model.load_state_dict(alone.state_dict())
    with lnpu.CostCounter(alone) as expected:
        step(alone, 60)
    model.share_memory()
    with lnpu.CostCounter(model) as cost:
        # a forkserver's process gets the model as a spawned one does
        context = CONTEXT if method == "forkserver" else mp.get_context(method)
        processes = [context.Process(target=_work, args=(model, 20)) for _ in range(2)]
        for process in processes:
            process.start()
        step(model, 20)
        for process in processes:
            process.join()
            assert process.exitcode == 0
    assert calls(cost.counts) == {"0": 60, "2": 60}
    for ours, theirs in zip(cost.counts.steps, expected.counts.steps, strict=True):
        assert [(each.count, each.sizes) for each in ours.by_size] == [
            (each.count, each.sizes) for each in theirs.by_size
        ]
        assert ours.macs == theirs.macs and ours.not_run == theirs.not_run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_counts_though_a_thread_of_its_parent_was_counting() -> None:
    model = network()
    with model[0].emulation.lock:
        if not (child := os.fork()):
            step(model)
            os._exit(0)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        assert time.monotonic() < deadline, "it waits for a lock that nobody will release"
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
