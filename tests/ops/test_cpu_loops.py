"""The compiled rounding loops where their counters are full and their vectors end."""

import numpy as np
import pytest
import torch

from helpers.tensors import scalar
from lnpu_torch.ops.lanes import reference as lanes
from lnpu_torch.ops.quantize import cpu, reference
from lnpu_torch.ops.quantize import cpu_loops as loops
from lnpu_torch.ops.quantize import torch_ops as ops
from lnpu_torch.quant.precision import Rule

LIES = ["contiguous", "channels_last"]
NUMBERS = cpu.CompiledRule(Rule()).parameters(1)
PARAMETERS = (*map(np.int32, NUMBERS[:6]), *map(np.float32, NUMBERS[6:]))


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("count", [15, 16, 17, 254, 255, 256, 257, 510, 511, 32767])
@pytest.mark.parametrize("dimension", ["rows", "channels"])
def test_counters_at_their_limits(dimension, count, lies):
    shape = (count, 3, 1, 2) if dimension == "rows" else (2, count, 1, 3)
    channels_last = torch.channels_last if lies == "channels_last" else torch.contiguous_format
    for value in (1.0, 100.0):
        x = torch.full(shape, value).contiguous(memory_format=channels_last)
        rest = (scalar(4), None, Rule().model_dump_json(), 0, (shape[0], 1), [True] * 4)
        *_, position, sample, profile = ops.round_and_count(x, *rest)
        group = int(value == 100.0)
        assert (position[group] == shape[0]).all() and (sample[group] == shape[1]).all()
        assert torch.equal(profile, lanes.profile(torch.full((*shape[:2], 1), shape[3], dtype=torch.uint8)))
        assert not position[1 - group].any() and not sample[1 - group].any()


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("channels", [1, 7, 16, 17, 33])
@pytest.mark.parametrize("positions", [1, 9, 16, 25, 49])
def test_vectors_end_within_their_arrays(channels, positions, lies):
    rows, size, edge = 3, channels * positions, 64
    x = torch.randn(rows, size).numpy()
    single = np.full(rows * size + 2 * edge, 7, np.float32)
    half = np.full(len(single), 7, np.uint16)
    counts, runs = np.zeros((1, 2, 1, size), np.int32), np.zeros((rows, channels, -(-positions // 16)), np.uint8)
    samples = np.zeros((2, rows, channels, positions), np.int32)
    targets = [array[edge:-edge] for array in (single, half)]
    rest = (counts, samples, runs, rows, (rows, channels, positions), PARAMETERS)
    if lies == "channels_last":
        loops.quantize_last(0, 1, x.reshape(-1), *targets, *rest)
    else:
        loops.quantize(0, 1, x.reshape(-1), *targets, *rest)
    expected = reference.quantize(torch.from_numpy(x), Rule(), scalar(1))[0]
    last = lies == "channels_last"
    rounded = expected.unflatten(1, (positions, channels)).mT if last else expected.unflatten(1, (channels, positions))
    expected = expected.reshape(-1).numpy()
    assert (targets[0] == expected).all() and (targets[1].view(np.float16) == expected).all()
    assert all((array[part] == 7).all() for array in (single, half) for part in (slice(edge), slice(-edge, None)))
    assert counts.sum() == samples.sum() == runs.sum() == np.count_nonzero(expected)
    assert torch.equal(torch.from_numpy(runs), lanes.runs_of(rounded))
