"""Rounded accumulators against torch's convolutions and against a loop that adds product by product."""

import numpy as np
import pytest
import torch

from helpers.conv_shapes import GEOMETRIES
from lnpu_torch.ops.gemm import reference as accumulate
from lnpu_torch.quant.formats import FORMATS

FP32, FP16 = FORMATS["fp32"], FORMATS["fp16"]


def torch_steps(g, conv_input, conv_output, weight):
    if not g.kernel:
        return conv_input @ weight.T, conv_output @ weight, conv_output.T @ conv_input
    args = (list(g.stride), list(g.padding), list(g.dilation), False, [0] * len(g.kernel), g.groups)
    forward = torch.ops.aten.convolution(conv_input, weight, None, *args)
    return forward, *torch.ops.aten.convolution_backward(
        conv_output, conv_input, weight, None, *args, [True, True, False]
    )[:2]


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_steps_are_torchs(geometry):
    """In float64 with a float32 accumulator over everything at once, only one rounding is left."""
    g, generator = geometry, torch.Generator().manual_seed(0)
    conv_input = torch.randn(g.batch, g.in_channels, *g.conv_input, generator=generator, dtype=torch.float64)
    conv_output = torch.randn(g.batch, g.out_channels, *g.conv_output, generator=generator, dtype=torch.float64)
    weight = torch.randn(g.out_channels, g.in_channels // g.groups, *g.kernel, generator=generator, dtype=torch.float64)
    everything = 10**6
    ours = (
        accumulate.conv_forward(conv_input, weight, g, FP32, everything),
        accumulate.conv_grad_input(conv_output, weight, g, FP32, everything),
        accumulate.conv_grad_weight(conv_input, conv_output, g, FP32, everything),
    )
    for mine, theirs in zip(ours, torch_steps(g, conv_input, conv_output, weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_reduce_is_the_loop(chunk):
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((4, 70)).astype(np.float16), generator.standard_normal((70, 5)).astype(np.float16)
    expected = np.zeros((4, 5), np.float16)
    for start in range(0, 70, chunk):
        # exact in float64, so that only the accumulator's own rounding is seen
        partial = a[:, start : start + chunk].astype(np.float64) @ b[start : start + chunk].astype(np.float64)
        expected = (expected.astype(np.float64) + partial).astype(np.float16)
    ours = accumulate.reduce(torch.from_numpy(a).double(), torch.from_numpy(b).double(), FP16, chunk)
    assert torch.equal(ours, torch.from_numpy(expected).double())


def test_chunk_changes_the_result():
    a = torch.full((1, 4096), 1.0)
    assert accumulate.reduce(a, a.T, FP16, 1).item() == 2048  # 2048 + 1 is a tie, and goes to even, for ever
    assert accumulate.reduce(a, a.T, FP16, 64).item() == 4096
