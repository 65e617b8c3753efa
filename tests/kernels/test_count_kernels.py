"""The counting kernel in Triton's interpreter, against the plain sums, for all kinds of geometry."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helpers.conv_shapes import GEOMETRIES, assert_large_counts, make, operands
from lnpu_torch.ops.lanes.reference import profile
from lnpu_torch.ops.pair_counts import reference as counting

pytest.importorskip("triton")
pytestmark = pytest.mark.triton_interpreter
MORE = {
    "several tiles": make(5, 12, 16, 2, (17, 19), (3, 3), (2, 1), (1, 1), (1, 1)),
    "several tiles of positions": make(1, 2, 2, 1, (37, 31), (1, 2), (1, 1), (0, 1), (1, 1)),
    "a large linear": make(63, 500, 1000, 1, (), (), (), (), ()),
}
ALL = {**GEOMETRIES, **MORE}
MEMBERS = 81


@pytest.fixture(params=[512, 2], ids=["many programs", "few programs"])
def kernels(request, monkeypatch):
    from lnpu_torch.kernels import count

    monkeypatch.setattr(count, "PROGRAMS", request.param)
    for launch in vars(count).values():
        if hasattr(launch, "cache_clear"):
            launch.cache_clear()  # planned for another number of programs
    return count


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
    start, lanes = torch.arange(300).reshape(3, 100), torch.zeros(6, MEMBERS, dtype=torch.int64)
    for side, grid, weight in (
        ("conv_input", conv_input, weight_of_input),
        ("conv_output", conv_output, weight_of_output),
    ):
        counter = start.clone()
        weight_step = kernels.WeightStep(100, grid[0], weight, side)
        kernels.count(
            counter, lanes, geometry.pack(), weight_step, kernels.GridStep(219, conv_input, conv_output, side)
        )
        found = (counter - start).flatten()
        assert torch.equal(found[100:119], counting.weight_step(grid[0], weight, geometry, side))
        assert torch.equal(found[219:238], counting.grid_step(conv_input, conv_output, geometry, side))
        assert not found[:100].any() and not found[119:219].any() and not found[238:].any() and not lanes.any()


def few_bytes(geometry, grids):
    return [(position, sample.to(torch.uint8)) for position, sample in grids] if geometry.groups > 1 else grids


def test_all_of_a_pass(kernels):
    geometry = GEOMETRIES["depthwise"]
    conv_input, conv_output, weight, _ = sums(geometry)
    runs = torch.randint(0, 17, (3, 21, 5), dtype=torch.uint8)
    counters, lanes = torch.zeros(3, 19, dtype=torch.int64), torch.zeros(6, MEMBERS, dtype=torch.int64)
    known, also = torch.arange(MEMBERS), torch.ones(MEMBERS, dtype=torch.int64)
    states = torch.arange(6, dtype=torch.int32).reshape(3, 2)
    kernels.count(
        counters,
        lanes,
        geometry.pack(),
        kernels.WeightStep(0, conv_input[0], weight, "conv_input"),
        kernels.GridStep(38, *few_bytes(geometry, (conv_input, conv_output)), "conv_input"),
        kernels.Profile(runs, MEMBERS, also),
        kernels.Known(known, 3 * MEMBERS),
        states,
    )
    assert torch.equal(counters[2], counting.grid_step(conv_input, conv_output, geometry, "conv_input"))
    assert torch.equal(counters[0], counting.weight_step(conv_input[0], weight, geometry, "conv_input"))
    expected = profile(runs)
    assert torch.equal(lanes[1], expected) and torch.equal(also, expected + 1) and torch.equal(lanes[3], known)
    assert not lanes[[0, 2, 4, 5]].any() and not counters[1].any()
    assert states.tolist() == [[1, 1], [3, 3], [5, 5]]


def test_a_profile_goes_to_two_parts_of_the_lanes(kernels):
    geometry = GEOMETRIES["linear"]
    conv_input, _, weight, _ = sums(geometry)
    runs = torch.randint(0, 17, (1, 40, 9), dtype=torch.uint8)
    counters, lanes = torch.zeros(19, dtype=torch.int64), torch.zeros(6, MEMBERS, dtype=torch.int64)
    step = kernels.WeightStep(0, conv_input[0], weight, "conv_input")
    twice = kernels.Profile(runs, 0, lanes, 5 * MEMBERS)
    kernels.count(counters, lanes, geometry.pack(), step, profile=twice)
    assert torch.equal(lanes[0], profile(runs)) and torch.equal(lanes[5], lanes[0]) and not lanes[1:5].any()


def add_weight_step(kernels, counter, position, weight, packed, side):
    lanes = torch.zeros(MEMBERS, dtype=torch.int64)
    kernels.count(counter, lanes, packed, kernels.WeightStep(0, position, weight, side))


def add_grid_step(kernels, counter, conv_input, conv_output, packed, first):
    lanes = torch.zeros(MEMBERS, dtype=torch.int64)
    kernels.count(counter, lanes, packed, None, kernels.GridStep(0, conv_input, conv_output, first))


def test_counts_beyond_int32(kernels):
    geometry = make(2**12, 2**11, 2**11, 1, (), (), (), (), ())
    position, weight = (torch.zeros(2, 2**11, dtype=torch.int32) for _ in range(2))
    position[1], weight[1] = 2**12, 2**11
    counter = torch.zeros(kernels.WIDTH, dtype=torch.int64)
    add_weight_step(kernels, counter, position, weight, geometry.pack(), "conv_input")
    assert counter[12] == geometry.macs == 2**34


def test_large_counts_are_exact(kernels):
    steps = SimpleNamespace(
        add_weight_step=partial(add_weight_step, kernels), add_grid_step=partial(add_grid_step, kernels)
    )
    assert_large_counts(steps, *[2**12 + 1] * 3)


def test_width(kernels):
    assert kernels.WIDTH == counting.WIDTH


def test_what_is_refused(kernels):
    geometry = GEOMETRIES["3x3"]
    conv_input, conv_output, weight, _ = sums(geometry)
    counter = torch.zeros(kernels.WIDTH, dtype=torch.int64)
    with pytest.raises(ValueError, match="side is 'conv_input' or 'conv_output'"):
        add_weight_step(kernels, counter, conv_input[0], weight, geometry.pack(), "input")
    with pytest.raises(ValueError, match="first is 'conv_input' or 'conv_output'"):
        add_grid_step(kernels, counter, conv_input, conv_output, geometry.pack(), "input")
    with pytest.raises(ValueError, match="do not fit the geometry"):
        add_weight_step(kernels, counter, conv_output[0], weight, geometry.pack(), "conv_input")
    with pytest.raises(ValueError, match="contiguous"):
        add_weight_step(kernels, counter[::2], conv_input[0], weight, geometry.pack(), "conv_input")
    with pytest.raises(TypeError, match=r"counters is torch\.int32"):
        add_weight_step(kernels, counter.int(), conv_input[0], weight, geometry.pack(), "conv_input")
    with pytest.raises(TypeError, match=r"operand is torch\.int64"):
        add_weight_step(kernels, counter, conv_input[0], weight.long(), geometry.pack(), "conv_input")
    with pytest.raises(ValueError, match="0 to 3 dimensions"):
        add_weight_step(kernels, counter, conv_input[0], weight, geometry.pack()[1:], "conv_input")
