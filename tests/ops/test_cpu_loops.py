"""The compiled rounding loops where their counters are full and their chunks end."""

import itertools

import pytest
import torch

from helpers.tensors import scalar
from lnpu_torch.ops.dispatch import backend, backend_of
from lnpu_torch.ops.lanes import reference as lanes
from lnpu_torch.ops.quantize.reference import Request
from lnpu_torch.quant.precision import Rule


def round_and_count(x, threshold, *rest):
    return backend_of(x).round_and_count(x, scalar(threshold), None, Request(*rest))


LIES = ["contiguous", "channels_last"]


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("count", [15, 16, 17, 254, 255, 256, 257, 510, 511, 32767])
@pytest.mark.parametrize("dimension", ["rows", "channels"])
def test_counters_at_their_limits(dimension, count, lies):
    shape = (count, 3, 1, 2) if dimension == "rows" else (2, count, 1, 3)
    channels_last = torch.channels_last if lies == "channels_last" else torch.contiguous_format
    for value in (1.0, 100.0):
        x = torch.full(shape, value).contiguous(memory_format=channels_last)
        rest = (4, Rule().model_dump_json(), 0, (shape[0], 1), (True,) * 4)
        _, _, position, sample, profile, *_ = round_and_count(x, *rest)
        group = int(value == 100.0)
        assert (position[group] == shape[0]).all() and (sample[group] == shape[1]).all()
        assert torch.equal(profile, lanes.profile(torch.full((*shape[:2], 1), shape[3], dtype=torch.uint8)))
        assert not position[1 - group].any() and not sample[1 - group].any()


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("groups", ["one", "each"])
@pytest.mark.parametrize(("channels", "positions"), [*itertools.product([1, 7, 16, 33, 300], [1, 9, 16, 49, 1500])])
def test_chunks_of_any_length(channels, positions, lies, groups):
    form = torch.channels_last if lies == "channels_last" else torch.contiguous_format
    x = (torch.randn(5, channels, 1, positions) * (torch.rand(5, 1, 1, positions) > 0.3)).to(memory_format=form)
    rest = (1, Rule().model_dump_json(), 0, (5, channels if groups == "each" else 1), (True,) * 4)
    with backend("reference"):
        expected = round_and_count(x, *rest)
    found = round_and_count(x, *rest)
    assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(found[:6], expected[:6], strict=True))
