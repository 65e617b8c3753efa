"""The ReLU of converted models: torch's own, bit for bit, of which little is kept."""

import shutil

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(3,), (7, 11, 13), (64, 1000), (4, 6, 9, 8)])
def test_relu_is_torchs_bit_for_bit(inplace, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[:2] = torch.tensor([torch.nan, -0.0])
    for memory in [x, x.to(memory_format=torch.channels_last)] if x.dim() == 4 else [x]:
        results = []
        for layer in (nn.ReLU(inplace), lnpu.nn.ReLU(inplace)):
            leaf = memory.clone().requires_grad_()
            inner = leaf * 1
            output = layer(inner)
            output.backward(torch.arange(output.numel()).reshape(shape).float())
            results.append((output.detach(), leaf.grad, inner.detach()))
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*results, strict=True))


@NEEDS_COMPILER
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_compiled_relu_is_torchs_bit_for_bit(inplace):
    torch.compiler.reset()
    x = torch.tensor([1.5, -1.5, torch.nan, -torch.nan, 0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45])
    errors = torch.tensor([0.5, -0.5, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, 1e30, 2.0])
    x, errors = x.repeat_interleave(len(errors)), errors.repeat(len(x))
    results = []
    for layer, backend in ((nn.ReLU(inplace), "eager"), (lnpu.nn.ReLU(inplace), "inductor")):
        leaf = x.clone().requires_grad_()

        def call(leaf, layer=layer):
            inner = leaf * 1
            return layer(inner), inner.detach()

        output, inner = torch.compile(call, backend=backend, fullgraph=True)(leaf)
        output.backward(errors)
        results.append((output.detach(), leaf.grad, inner.detach()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(7).view(torch.int32), b.nan_to_num(7).view(torch.int32))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_COMPILER)])
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_relu_keeps_a_bit_per_element_or_compiled_a_byte(compiled):
    torch.compiler.reset()
    layer = lnpu.nn.ReLU()
    call = torch.compile(lambda x: layer(x + x), fullgraph=True) if compiled else layer
    call(torch.randn(64, 1024, requires_grad=True))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.nbytes, t.dtype)) or t, lambda t: t):
        call(torch.randn(64, 1024, requires_grad=True))
    assert kept == [(64 * 1024, torch.uint8) if compiled else (64 * 1024 // 8, torch.uint16)]


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_compiled_relu_refuses_second_derivatives():
    torch.compiler.reset()
    layer, x = lnpu.nn.ReLU(), torch.ones(3, requires_grad=True)
    call = torch.compile(lambda x: layer(x**3) ** 2, backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward"):
        (first,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
        torch.autograd.grad(first.sum(), x)
