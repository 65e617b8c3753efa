"""Ops as plain calls inside layers: only where nobody could tell."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lnpu_torch as lnpu
from lnpu_torch.ops import registry
from lnpu_torch.ops.gemm import half_precision as product_ops
from lnpu_torch.ops.quantize import torch_ops as ops


class Seen(TorchDispatchMode):
    """Notes the names of the ops that torch's dispatcher is asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """Whose ops may mean something else."""


def direct():
    with registry.direct(True):
        return registry._thread.direct


def test_outside_of_layers_ops_are_torchs():
    with torch.no_grad(), Seen() as seen:
        product_ops.round_result(torch.ones(3), torch.ones(3), "fp16")
    assert "lnpu::round_result" in seen.names and not registry._thread.direct


def test_inside_a_layer_they_are_plain_calls(monkeypatch):
    found = []
    round_half = ops.reference.round_to
    monkeypatch.setattr(ops.reference, "round_to", lambda *a: found.append(registry._thread.direct) or round_half(*a))
    with ops.backend("reference"):
        layer = lnpu.nn.Linear(3, 2, precision=lnpu.Precision(input="fgmp", grad_output="fgmp", result="e6m9"))
        layer(torch.randn(4, 3)).sum().backward()
    assert found and all(found) and not registry._thread.direct


@pytest.mark.filterwarnings("ignore")  # the profiler's own
def test_where_somebody_looks_they_are_torchs():
    with torch.no_grad():
        assert direct() and registry.is_plain([torch.nn.Parameter(torch.ones(3)), None])
        for foreign in (torch.ones(3).as_subclass(Subclass), torch.ones(3, device="meta")):
            assert not registry.is_plain([torch.ones(3), foreign])
        with Seen() as seen:
            lnpu.nn.Linear(3, 2)(torch.randn(4, 3))
        assert "lnpu::read" in seen.names
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            lnpu.nn.Linear(3, 2)(torch.randn(4, 3))
            assert not direct()
    assert not direct()  # with gradients
    assert any(event.key == "lnpu::read" for event in profile.key_averages())


def test_an_error_ends_it():
    with torch.no_grad(), pytest.raises(ValueError, match="here"), registry.direct(True):
        raise ValueError("here")
    assert not registry._thread.direct
