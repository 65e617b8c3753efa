"""The counting kernels in Triton's interpreter, against the plain sums, for all kinds of geometry."""

import pytest
import torch

from helpers.conv_shapes import GEOMETRIES, assert_large_counts, make, operands
from lnpu_torch.ops.pair_counts import reference as counting

pytest.importorskip("triton")
pytestmark = pytest.mark.triton_interpreter
MORE = {
    "several tiles": make(5, 12, 16, 2, (17, 19), (3, 3), (2, 1), (1, 1), (1, 1)),
    "several tiles of positions": make(1, 2, 2, 1, (37, 31), (1, 2), (1, 1), (0, 1), (1, 1)),
    "a large linear": make(63, 500, 1000, 1, (), (), (), (), ()),
}
ALL = {**GEOMETRIES, **MORE}


@pytest.fixture(params=[512, 2], ids=["many programs", "few programs"])
def kernels(request, monkeypatch):
    from lnpu_torch.kernels import pair_counts

    monkeypatch.setattr(pair_counts, "PROGRAMS", request.param)
    for launch in vars(pair_counts).values():
        if hasattr(launch, "cache_clear"):
            launch.cache_clear()  # planned for another number of programs
    return pair_counts


def sums(geometry):
    """Per grid its counts by position and by sample; and the weight's, as they meet the input and the output grid."""
    conv_input, conv_output, weight = operands(geometry)
    groups, share = geometry.groups, geometry.out_channels // geometry.groups
    grids = [
        (counting.per_position(x, geometry.batch).squeeze(1), counting.per_sample(x, groups))
        for x in (conv_input, conv_output)
    ]
    weights = counting.per_position(weight, share).flatten(1, 2), counting.per_sample(weight, 1).squeeze(2)
    return *grids, *weights


@pytest.mark.parametrize(
    ("kernels", "name"),
    [(2, name) for name in ALL] + [(512, name) for name in ("3x3", "groups", "1d", "3d", "linear", *MORE)],
    indirect=["kernels"],
)
def test_steps(kernels, name):
    geometry = ALL[name]
    conv_input, conv_output, weight_of_input, weight_of_output = sums(geometry)
    start = torch.arange(100, 100 + kernels.WIDTH)
    for side, grid, weight in (
        ("conv_input", conv_input, weight_of_input),
        ("conv_output", conv_output, weight_of_output),
    ):
        counter = start.clone()
        kernels.add_weight_step(counter, grid[0], weight, geometry.pack(), side)
        assert torch.equal(counter - start, counting.weight_step(grid[0], weight, geometry, side))
    for first in ("conv_input", "conv_output"):
        counter = start.clone()
        kernels.add_grid_step(counter, conv_input, conv_output, geometry.pack(), first)
        assert torch.equal(counter - start, counting.grid_step(conv_input, conv_output, geometry, first))


def test_counts_beyond_int32(kernels):
    geometry = make(2**12, 2**11, 2**11, 1, (), (), (), (), ())
    position, weight = (torch.zeros(2, 2**11, dtype=torch.int32) for _ in range(2))
    position[1], weight[1] = 2**12, 2**11
    counter = torch.zeros(kernels.WIDTH, dtype=torch.int64)
    kernels.add_weight_step(counter, position, weight, geometry.pack(), "conv_input")
    assert counter[12] == geometry.macs == 2**34


def test_large_counts_are_exact(kernels):
    assert_large_counts(kernels, *[2**12 + 1] * 3)


def test_width(kernels):
    assert kernels.WIDTH == counting.WIDTH


def test_what_is_refused(kernels):
    geometry = GEOMETRIES["3x3"]
    conv_input, conv_output, weight, _ = sums(geometry)
    counter = torch.zeros(kernels.WIDTH, dtype=torch.int64)
    with pytest.raises(ValueError, match="side is 'conv_input' or 'conv_output'"):
        kernels.add_weight_step(counter, conv_input[0], weight, geometry.pack(), "input")
    with pytest.raises(ValueError, match="first is 'conv_input' or 'conv_output'"):
        kernels.add_grid_step(counter, conv_input, conv_output, geometry.pack(), "input")
    with pytest.raises(ValueError, match=r"position .* does not fit the geometry"):
        kernels.add_weight_step(counter, conv_output[0], weight, geometry.pack(), "conv_input")
    with pytest.raises(ValueError, match="19 integers"):
        kernels.add_weight_step(counter[1:], conv_input[0], weight, geometry.pack(), "conv_input")
    with pytest.raises(TypeError, match="weight is torch"):
        kernels.add_weight_step(counter, conv_input[0], weight.long(), geometry.pack(), "conv_input")
    with pytest.raises(ValueError, match="0 to 3 dimensions"):
        kernels.add_weight_step(counter, conv_input[0], weight, geometry.pack()[1:], "conv_input")
