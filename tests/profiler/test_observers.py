"""What emulated layers hide from a counter's mode, and that it and other modes do not disturb each other."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

import lnpu_torch as lnpu
from helpers.one_step import counted, network, operations, step, train
from lnpu_torch.nn.gemms import Convolution, Linear
from lnpu_torch.nn.observers import LayerObserver


def test_uncounted_steps_are_not_watched_whatever_other_mode_is_active() -> None:
    model, once = network(), step(network())
    with lnpu.CostCounter(model) as cost:
        train(model)
        with lnpu.no_count(model):
            train(model)
            with lnpu.no_count(model):
                train(model)
            train(model)
        with FlopCounterMode(display=False), lnpu.no_count(model):
            train(model)
    assert counted(cost) == once


def test_other_modes_see_what_they_would_without_a_counter() -> None:
    flops = []
    for watch in (True, False):
        model = network()
        with lnpu.CostCounter(model, vector_ops=watch), FlopCounterMode(display=False) as mode:
            train(model)
        flops.append(mode.get_flop_counts())
    assert flops[0] == flops[1]


def test_below_another_mode_it_counts_as_on_top() -> None:
    once, model = step(network()), network()
    with lnpu.CostCounter(model) as cost, FlopCounterMode(display=False):  # this one splits native_batch_norm
        train(model)
    assert operations(counted(cost)) == operations(once)
    assert cost.counts.vector_ops.uncounted == {}


class Names(LayerObserver):
    """Keeps the names of what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.blind:
            self.names.append(func._schema.name)
        return func(*args, **kwargs or {})

    def layer_ran(self, steps: Any) -> None:
        self.names.append(f"layer {steps.backward}")


def test_the_ops_inside_layers_are_hidden_and_those_after_an_error_in_one_are_not() -> None:
    model = network()
    with Names() as watch:
        train(model)
        assert watch.names and not any(name.startswith("lnpu::") for name in watch.names)
        assert watch.names.count("layer False") == watch.names.count("layer True") == 2
        watch.names.clear()
        with pytest.raises(RuntimeError):
            model[5](torch.ones(2, 3))
        torch.ones(2).tanh()
    assert "aten::tanh" in watch.names and not any(name.startswith("lnpu::") for name in watch.names)


def test_gradients_are_bit_equal_with_and_without_a_counter() -> None:
    models = [network(), network()]
    train(models[0])
    step(models[1])
    for plain, watched in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain.grad, watched.grad)


@pytest.mark.parametrize("others", [False, True])
def test_an_interrupt_in_a_layer_leaves_the_process_as_it_was(others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, once = network(), step(network())
    with FlopCounterMode(display=False) if others else nullcontext():
        for product, method in ((Convolution, "forward"), (Linear, "grad_input"), (Convolution, "grad_weight")):

            def interrupted(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, lnpu.CostCounter(model), pytest.raises(KeyboardInterrupt):
                patch.setattr(product, method, interrupted)
                train(model)
    assert not _get_current_dispatch_mode_stack()
    assert step(network()) == once


def test_counters_may_overlap_in_any_way() -> None:
    model, once = network(), step(network())
    first, second, flops = lnpu.CostCounter(model), lnpu.CostCounter(model), FlopCounterMode(display=False)
    first.__enter__()
    train(model)
    second.__enter__()
    train(model)
    first.__exit__(None, None, None)
    train(model)
    flops.__enter__()
    second.__exit__(None, None, None)  # below another mode
    assert _get_current_dispatch_mode_stack() == [flops.mode]
    flops.__exit__(None, None, None)
    assert not _get_current_dispatch_mode_stack()
    for cost in (first, second):
        assert {key: entry.calls for key, entry in counted(cost).items()} == {k: 2 * e.calls for k, e in once.items()}
        assert {entry.calls for entry in cost.counts.steps} == {2}
    assert step(network()) == once
