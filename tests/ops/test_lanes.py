"""Lane profiles: the reference against a lane-by-lane simulator, the compiled loops against the reference."""

import pytest
import torch

from helpers.lane_simulator import Simulator
from lnpu_torch.counts.lane_configs import BALANCE_GROUPS, LANE_CONFIGS, SYNC_INTERVALS, LaneConfig
from lnpu_torch.ops import cpu
from lnpu_torch.ops.dispatch import backend, backend_of
from lnpu_torch.ops.lanes import cpu as cpu_lanes
from lnpu_torch.ops.lanes import reference as lanes

SHAPES = {
    "grid": (3, 20, 9, 7),
    "one channel": (2, 1, 33, 1),
    "prime channels": (2, 37, 5, 5),
    "wide": (2, 64, 17, 17),
    "more channels than lanes": (1, 1100, 5, 2),
    "as many channels as lanes": (3, 1024, 5, 2),
    "twice as many": (2, 2048, 37),
    "small planes": (5, 48, 2, 2),
    "1d": (2, 6, 300),
    "3d": (2, 9, 3, 5, 20),
    "linear": (63, 50),
    "wide linear": (70, 2048),
    "long linear": (1000, 6),
}


def lane_profile(x, joined=False):
    return backend_of(x).lane_profile(x, joined)


def sparse(shape, seed=0):
    """Values with zeros of both signs, that are denser in some channels and samples than in others."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(shape[:2] + (1,) * (len(shape) - 2), generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, torch.randn(shape, generator=generator), -0.0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_reference_agrees_with_lanes_walked_one_by_one(shape):
    x = sparse(shape)
    runs = lanes.runs_of(x)
    assert runs.dtype == torch.uint8 and runs.sum() == x.count_nonzero()
    simulator = Simulator(x != 0)
    assert lanes.profile(runs).tolist() == [simulator.lane_cycles(member) for member in LANE_CONFIGS]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_compiled_loops(shape, dtype, last):
    x = sparse(shape).to(dtype)
    x.view(-1)[-2:] = torch.tensor([torch.nan, -torch.inf])
    expected = lanes.runs_of(x)
    x = x.to(memory_format=torch.channels_last) if last and x.dim() == 4 else x
    assert torch.equal(lane_profile(x), lanes.profile(expected))
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])  # the runs go on from sample to sample
    assert torch.equal(lane_profile(x, joined=True), lanes.profile(lanes.runs_of(rows)))


def test_tiles_and_threads_do_not_matter(monkeypatch):
    for shape in ((9, 130, 32, 32), (3, 2, 300, 300), (40_000, 8), (6, 1500, 8, 8)):
        x = sparse(shape)
        expected = lanes.profile(lanes.runs_of(x))
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert torch.equal(cpu_lanes.lane_profile(x, False), expected)


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (3, 5, 0, 4), (0, 7)])
def test_nothing_is_no_work(shape):
    assert lane_profile(torch.empty(shape)).tolist() == [0] * len(LANE_CONFIGS)


def test_any_memory_order_gives_the_same():
    x = sparse((4, 6, 10, 8))
    expected = lane_profile(x)
    turned = x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert torch.equal(lane_profile(turned), expected)
    rows = sparse((64, 10))
    assert torch.equal(lane_profile(rows.T.contiguous().T), lane_profile(rows))


def test_the_reference_backend_is_plain_torch(monkeypatch):
    monkeypatch.setattr(cpu.CpuBackend, "lane_profile", None)
    x = sparse((2, 3, 4, 4))
    with backend("reference"):
        assert torch.equal(lane_profile(x), lanes.profile(lanes.runs_of(x)))


@pytest.mark.parametrize("seed", range(5))
def test_what_must_never_cost_more(seed):
    """Longer runs and larger groups never hold lanes longer; nor do more lanes, that do more in the same time."""
    x = sparse((3, 64 if seed else 1024, 20, 20), seed)
    held = dict(zip(LANE_CONFIGS, lanes.profile(lanes.runs_of(x)).tolist(), strict=True))
    for run, balancer, count in LANE_CONFIGS:
        mine = held[run, balancer, count]
        assert mine >= held[SYNC_INTERVALS[0], 1, 1]
        assert mine <= held[SYNC_INTERVALS[0], balancer, count]
        assert mine <= held[run, 1, count]
        if balancer == 4 and count >= 16:
            assert mine >= held[run, 16, count]
        if count > balancer:
            assert mine / count <= held[run, balancer, count // 2] / (count // 2)


def test_worked_by_hand():
    """Three channels of 20 positions: 16 + 4 non-zeros, 8 + 0 and 3 + 2."""
    x = torch.zeros(1, 3, 20)
    x[0, 0], x[0, 1, :8], x[0, 2, :3], x[0, 2, 17:19] = 1, 1, 1, 1
    held = dict(zip(LANE_CONFIGS, lanes.profile(lanes.runs_of(x)).tolist(), strict=True))
    assert held[16, 1, 1] == held[256, 1, 1] == 33
    assert held[16, 1, 2] == 2 * (16 + 4) + (3 + 2)
    assert held[16, 1, 4] == held[16, 1, 1024] == 3 * (16 + 4)
    assert held[64, 1, 4] == 3 * 20
    assert held[16, 4, 4] == 3 * (9 + 2)  # 27 / 3 and 6 / 3
    assert held[64, 16, 16] == 3 * 11
    assert LaneConfig(16, 4, 2) not in held
    assert BALANCE_GROUPS == (1, 4, 16)


@pytest.mark.parametrize("rows", [17, 784])
def test_a_sample_whose_last_part_is_short_is_counted_whole(rows):
    assert lane_profile(torch.ones(rows, 576)).tolist() == [rows * 576] * len(LANE_CONFIGS)
