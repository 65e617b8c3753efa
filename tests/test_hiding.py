"""What emulated layers hide from a counter's mode, and that it and other modes do not disturb each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_step import counted, network, operations, step, train
from torch.utils.flop_counter import FlopCounterMode

import lnpu_torch as lnpu
from lnpu_torch.watch import Watch


def test_uncounted_steps_are_not_watched_whatever_other_mode_is_active() -> None:
    model, once = network(), step(network())
    with lnpu.CostCounter(model) as cost:
        train(model)
        with lnpu.uncounted(model):
            train(model)
            with lnpu.uncounted(model):
                train(model)
            train(model)
        with FlopCounterMode(display=False), lnpu.uncounted(model):
            train(model)
    assert counted(cost) == once


def test_other_modes_see_what_they_would_without_a_counter() -> None:
    flops = []
    for watch in (True, False):
        model = network()
        with lnpu.CostCounter(model, elements=watch), FlopCounterMode(display=False) as mode:
            train(model)
        flops.append(mode.get_flop_counts())
    assert flops[0] == flops[1]


def test_below_another_mode_it_counts_as_on_top() -> None:
    once, model = step(network()), network()
    with lnpu.CostCounter(model) as cost, FlopCounterMode(display=False):  # this one splits native_batch_norm
        train(model)
    assert operations(counted(cost)) == operations(once)
    assert cost.counts.elements.uncounted == {}


class Names(Watch):
    """Also keeps the names of what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_the_ops_inside_layers_are_hidden_and_those_after_an_error_in_one_are_not() -> None:
    model = network()
    with Names() as watch:
        train(model)
        assert watch.names and not any(name.startswith("lnpu::") for name in watch.names)
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
