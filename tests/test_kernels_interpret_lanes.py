"""The lane kernels in Triton's interpreter, against plain torch."""

import pytest
import torch
from test_kernels_interpret import interpret
from test_lanes import SHAPES, sparse

from lnpu_torch import lane_ops, lanes, ops
from lnpu_torch.lane_family import JOIN, LANES, LONGEST, MEMBERS, RUN

pytest.importorskip("triton")


def test_lanes_in_the_interpreter():
    interpret(__file__)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def check_lanes(shape, dtype, last):
    x = sparse(shape).to(dtype)
    x.view(-1)[-2:] = torch.tensor([torch.nan, -torch.inf])
    expected = lanes.runs_of(x)
    x = x.to(memory_format=torch.channels_last) if last and x.dim() == 4 else x
    with ops.backend("triton"):
        assert torch.equal(lane_ops.count_runs(x), expected)
        assert torch.equal(lane_ops.lane_profile(expected), lanes.profile(expected))


def check_more_tiles_than_programs(monkeypatch):
    from lnpu_torch.kernels import lanes as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    runs = lanes.runs_of(sparse((4, 20, 40, 40)))
    assert torch.equal(kernels.profile(runs), lanes.profile(runs))


def check_constants_are_the_familys():
    from lnpu_torch.kernels import lanes as kernels

    family = (LANES, RUN, JOIN, LONGEST, len(MEMBERS))
    constants = (kernels.RUN, kernels.JOIN, kernels.LONGEST, kernels.MEMBERS)
    assert (kernels.LANES, *(constant.value for constant in constants)) == family


def check_what_is_refused():
    from lnpu_torch.kernels import lanes as kernels

    with pytest.raises(TypeError, match="values is"):
        kernels.runs_of(torch.zeros(2, 3, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="runs is"):
        kernels.profile(torch.zeros(2, 3, 4))
