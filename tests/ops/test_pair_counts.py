"""Counts against brute force: every slot of every step, walked one by one, for all kinds of geometry."""

import itertools

import pytest
import torch

from helpers.conv_shapes import (
    GEOMETRIES,
    assert_large_counts,
    brute_force,
    make,
    operands,
    over_in_channels,
    over_out_channels,
    per_position,
)
from lnpu_torch.counts.lane_configs import LANE_CONFIGS
from lnpu_torch.ops.dispatch import REFERENCE
from lnpu_torch.ops.pair_counts import cpu as cpu_counting
from lnpu_torch.ops.pair_counts import reference as counting


@pytest.fixture(params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def geometry(request):
    return request.param


def test_used_elements(geometry):
    """Against a walk over all slots of a channel and a sample."""
    g, used = geometry, {"conv_input": set(), "conv_output": set(), "weight": set()}
    for p, r in itertools.product(*(itertools.product(*map(range, sizes)) for sizes in (g.conv_output, g.kernel))):
        h = tuple(p[d] * g.stride[d] - g.padding[d] + r[d] * g.dilation[d] for d in range(len(p)))
        if all(0 <= h[d] < g.conv_input[d] for d in range(len(p))):
            used["conv_input"].add(h)
            used["conv_output"].add(p)
            used["weight"].add(r)
    channels = {tensor: g.shape(tensor)[0] * g.shape(tensor)[1] for tensor in used}
    assert {tensor: g.used(tensor) for tensor in used} == {each: channels[each] * len(used[each]) for each in used}


def test_pair_tables(geometry):
    conv_input, conv_output, weight = operands(geometry)
    expected, outside = brute_force(geometry, conv_input, conv_output, weight)
    groups = geometry.groups
    grids = [(per_position(grid), counting.per_sample(grid, groups)) for grid in (conv_input, conv_output)]
    steps = (
        counting.weight_step(grids[0][0], over_out_channels(weight, groups), geometry, "conv_input"),
        counting.weight_step(grids[1][0], over_in_channels(weight), geometry, "conv_output"),
        counting.grid_step(*grids, geometry, "conv_input"),
    )
    assert torch.equal(torch.stack([step[4:13].reshape(3, 3) for step in steps]), expected)
    assert all(step[:4].tolist() == [1, geometry.macs, outside, 0] for step in steps)
    turned = counting.grid_step(*grids, geometry, "conv_output")
    assert torch.equal(turned[4:13].reshape(3, 3), expected[2].T)
    assert torch.equal(turned[13:], steps[2][13:].roll(3))
    assert geometry.macs == expected[0].sum() + outside


def test_elements(geometry):
    conv_input, _, weight = operands(geometry)
    for groups, partial in (
        (conv_input, per_position(conv_input)),
        (conv_input, counting.per_sample(conv_input, geometry.groups)),
        (weight, over_out_channels(weight, geometry.groups)),
        (weight, over_in_channels(weight)),
    ):
        expected = [int((groups == value).sum()) for value in (0, 8, 16)]
        assert counting.elements(partial, groups.numel()).tolist() == expected


ODD = 2**16 + 1
"""Elements, whose square neither 32 bits nor a float32 can hold."""


class Compiled:
    """The compiled counting, with the functions of `reference`."""

    @staticmethod
    def add_weight_step(counter, position, weight, packed, side):
        _counted(counter, cpu_counting.count_weight_step, position, weight, None, tuple(packed), side)

    @staticmethod
    def add_grid_step(counter, conv_input, conv_output, packed, first):
        _counted(counter, cpu_counting.count_grid_step, conv_input, conv_output, (None, None), tuple(packed), first)


def _counted(counter, count, *arguments):
    counters = torch.zeros(1, counting.ROWS, counting.WIDTH, dtype=torch.int64)
    sizes = torch.zeros(1, counting.SIZES + 1, counting.CALL, dtype=torch.int64)
    lanes = torch.zeros(1, 2, len(LANE_CONFIGS), dtype=torch.int64)
    count(counting.StepCounters(counters, sizes, lanes, 0), *arguments)
    assert sizes[0, 0].all() and not lanes.any()
    counter += counters[0, 0]


@pytest.mark.parametrize("sizes", [(1, ODD, ODD), (ODD, 1, ODD), (ODD, ODD, 1)])
@pytest.mark.parametrize("module", [REFERENCE, Compiled], ids=["reference", "compiled"])
def test_large_counts_are_exact(module, sizes):
    assert_large_counts(module, *sizes)


def test_counts_beyond_int32():
    g = make(2**12, 2**11, 2**11, 1, (), (), (), (), ())
    ones = torch.full((1, 1), 16, dtype=torch.uint8)
    conv_input, weight = ones.expand(g.batch, g.in_channels), ones.expand(g.out_channels, g.in_channels)
    step = counting.weight_step(per_position(conv_input), over_out_channels(weight, 1), g, "conv_input")
    assert step[12] == g.macs == 2**34
