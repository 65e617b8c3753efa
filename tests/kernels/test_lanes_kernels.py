"""The lane profile's kernels in Triton's interpreter, against the plain sums."""

import pytest
import torch

from helpers.tensors import LAYOUTS
from lnpu_torch.counts import lane_configs
from lnpu_torch.ops.lanes import reference as lanes

pytest.importorskip("triton")
pytestmark = pytest.mark.triton_interpreter
SHAPES = [
    (3, 5, 9, 11),
    (2, 64, 8, 8),
    (5, 130, 3, 7),
    (1, 40, 301),
    (70, 33),
    (600, 20),
    (2, 1, 1, 1),
    (3, 20, 4, 4),
    (3, 20, 5, 5),
    (3, 20, 9, 7),
    (3, 20, 11, 11),
    (2, 1100, 2, 2),
]


@pytest.fixture
def kernels(monkeypatch):
    from lnpu_torch.kernels import lanes

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(77))
    return lanes


def values(*shape):
    """Zeros in clusters, of both signs."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    keep = torch.rand(shape, generator=generator) < torch.rand(shape[:2] + (1,) * (len(shape) - 2), generator=generator)
    return torch.where(keep, x, -0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_profiles(kernels, shape):
    x = values(*shape)
    runs = lanes.runs_of(x)
    for layout in ("contiguous", "channels_last", "transposed"):
        if layout != "channels_last" or x.dim() == 4:
            for y in (x, x.half(), x.bfloat16()) if layout == "contiguous" else (x,):
                assert torch.equal(kernels.runs_of(LAYOUTS[layout](y)), runs)
    assert torch.equal(kernels.profile(runs), lanes.profile(runs))


@pytest.mark.parametrize("processors", [1, 500])
def test_several_tiles(kernels, monkeypatch, processors):
    """One processor's programs walk all of them; of 500 some have none."""
    monkeypatch.setattr(kernels, "processors", lambda device: processors)
    full = torch.full((9, 48, 33), 16, dtype=torch.uint8)
    assert full[:, 0].numel() > 2 * kernels.COLUMNS
    for runs in (full, full * values(*full.shape).ne(0)):
        assert torch.equal(kernels.profile(runs), lanes.profile(runs))


def test_constants(kernels):
    assert kernels.RUN == lane_configs.RUN
    assert len(lane_configs.LANE_CONFIGS) == kernels.MEMBERS and lane_configs.BALANCE_GROUPS == (1, 4, 16)
    assert lane_configs.LEVELS == (11, 9, 7) and len(lane_configs.SYNC_INTERVALS) == 3


def test_empty(kernels):
    x = torch.ones(0, 3, 4, 4)
    assert kernels.runs_of(x).shape == (0, 3, 1) and torch.equal(
        kernels.profile(kernels.runs_of(x)), torch.zeros(81, dtype=torch.int64)
    )


def test_what_is_refused(kernels):
    with pytest.raises(TypeError, match=r"values is torch\.float64"):
        kernels.runs_of(torch.ones(2, 3).double())
    with pytest.raises(TypeError, match=r"runs is torch\.int32"):
        kernels.profile(torch.ones(1, 3, 2, dtype=torch.int32))
