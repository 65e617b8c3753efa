"""Counting that is put off: whoever looks sees all of it."""

from __future__ import annotations

import copy
import io
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lnpu_torch as lnpu
from lnpu_torch import backends, backlog, count_ops
from lnpu_torch.backlog import BACKLOG, Backlog


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    BACKLOG.settle()
    yield
    BACKLOG.settle()


def waiting() -> int:
    return len(BACKLOG._calls)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)]
    model: nn.Sequential = lnpu.convert(nn.Sequential(*layers), "fgmp")
    return model


def batch() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module) -> None:
    model(batch()).square().sum().backward()


def found(model: nn.Sequential) -> list[Tensor]:
    """All that is counted, of layers that other readers have left alone."""
    emulations = [model[0].emulation, model[3].emulation]
    return [tensor.clone() for e in emulations for tensor in (e.counters, e.call_sizes, e.lanes)]


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of one step, counted at once."""
    model = network()
    with monkeypatch.context() as patch:
        patch.setattr(backlog, "LONGEST", 1)
        step(model)
        assert waiting() == 0
    return found(model)


def alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(a, b, strict=True))


def test_calls_wait_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "LONGEST", 3)
    monkeypatch.setattr(backlog, "LARGEST", 1000)
    done: list[int] = []
    calls = Backlog()
    for i in range(5):
        calls.add(lambda i, *_: done.append(i), (i, torch.zeros(2)))
    assert done == [0, 1, 2]
    calls.add(lambda *_: done.append(5), ((torch.zeros(250), None), 7))
    assert done == [0, 1, 2, 3, 4, 5]
    calls.settle()
    assert done == [0, 1, 2, 3, 4, 5]


def test_after_a_call_that_fails_the_others_still_wait() -> None:
    done: list[int] = []
    calls = Backlog()
    calls.add(lambda: done.append(1 // 0), ())
    calls.add(done.append, (2,))
    with pytest.raises(ZeroDivisionError):
        calls.settle()
    calls.settle()
    assert done == [2]


def test_whoever_settles_waits_for_what_another_thread_is_at() -> None:
    calls, begun, go_on, done = Backlog(), threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        go_on.wait()
        done.append(1)

    calls.add(slow, ())
    threads = [threading.Thread(target=calls.settle) for _ in range(2)]
    threads[0].start()
    begun.wait()
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and not done
    go_on.set()
    threads[0].join()
    threads[1].join()
    assert done == [1]


def test_a_backend_is_left_even_if_what_waits_fails() -> None:
    with pytest.raises(ZeroDivisionError), backends.backend("reference"):
        BACKLOG.add(lambda: 1 // 0, ())
    assert backends._chosen == ["auto"]


def test_readers_see_all(expected: list[Tensor]) -> None:
    model = network()
    step(model)
    assert waiting() == 6  # three of each layer, though the first's grad_input was not run
    assert alike(found(model), expected) and waiting() == 0
    with lnpu.CostCounter(model) as cost:
        step(model)
        assert waiting() == 6
    assert waiting() == 0 and sum(entry.calls for entry in cost.counts.steps) == 6
    step(model)
    model.to(torch.float32)
    assert waiting() == 0


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_copies_take_along_what_was_counted(how: str, expected: list[Tensor]) -> None:
    model = network()
    step(model)
    if how == "copied":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    step(other)
    assert alike(found(model), expected)
    twice = found(other)
    assert torch.equal(twice[0], 2 * expected[0]) and torch.equal(twice[1], expected[1])


def test_each_backend_counts_its_own(monkeypatch: pytest.MonkeyPatch, expected: list[Tensor]) -> None:
    model, chosen, count = network(), [], count_ops._counting
    monkeypatch.setattr(count_ops, "_counting", lambda sums: chosen.append(backends._chosen[-1]) or count(sums))
    step(model)
    with backends.backend("reference"):
        assert waiting() == 0
        step(model)
        assert waiting() > 0
    assert waiting() == 0 and chosen == ["auto"] * 5 + ["reference"] * 5
    assert torch.equal(found(model)[0], 2 * expected[0])


def test_no_mode_sees_it(expected: list[Tensor]) -> None:
    model = network()
    step(model)
    with FakeTensorMode(), FlopCounterMode(display=False) as flops:
        BACKLOG.settle()
    assert flops.get_total_flops() == 0 and alike(found(model), expected)
    other = network()
    step(other)
    with torch.device("meta"):
        BACKLOG.settle()
    assert alike(found(other), expected)


def test_counters_that_processes_share_are_added_to_at_once(expected: list[Tensor]) -> None:
    model = network().share_memory()
    step(model)
    assert waiting() == 0 and alike(found(model), expected)


def test_a_model_made_in_inference_mode_is_counted_out_of_it() -> None:
    with torch.inference_mode():
        model = network()
        model(batch())
    assert waiting() == 2 and found(model)[0].sum() > 0


def test_calls_in_inference_mode_are_counted_out_of_it() -> None:
    model = network()
    with torch.inference_mode():
        model(batch())
    assert waiting() == 2
    first = found(model)
    with torch.no_grad():
        model(batch())
    with torch.inference_mode():
        assert torch.equal(found(model)[0], 2 * first[0]) and first[0].sum() > 0


def test_threads_share_it(expected: list[Tensor]) -> None:
    models = [network() for _ in range(4)]
    threads = [threading.Thread(target=lambda m=m: [step(m) for _ in range(20)]) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        assert torch.equal(found(model)[0], 20 * expected[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:This process")  # is multi-threaded
def test_a_forked_process_does_not_wait_for_its_parents_threads() -> None:
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with BACKLOG.lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    if not (child := os.fork()):
        BACKLOG.add(lambda: os._exit(7), ())
        BACKLOG.settle()
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("wrong", [torch.ones(2, 6), torch.ones(2, 3, 4)], ids=str)
def test_a_call_that_torch_refuses_is_not_counted(wrong: torch.Tensor) -> None:
    layer, other = lnpu.nn.Linear(10, 4), lnpu.nn.Linear(10, 4)
    layer(torch.ones(2, 10))
    before = layer.emulation.counters.clone()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(wrong)
    for _ in range(40):  # more than may wait
        other(torch.ones(2, 10))
    assert torch.equal(layer.emulation.counters, before)
