"""Counts against brute force: every slot of every step, walked one by one, for all kinds of geometry."""

import pytest
import torch

from helpers.conv_shapes import (
    GEOMETRIES,
    assert_large_counts,
    brute_force,
    make,
    operands,
    over_big,
    over_small,
    per_position,
)
from lnpu_torch.counts.lane_configs import LANE_CONFIGS
from lnpu_torch.ops.pair_counts import cpu as cpu_counting
from lnpu_torch.ops.pair_counts import reference as counting


@pytest.fixture(params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def geometry(request):
    return request.param


def test_pair_tables(geometry):
    big, small, weight = operands(geometry)
    expected, outside = brute_force(geometry, big, small, weight)
    groups = geometry.groups
    grids = [(per_position(grid), counting.per_sample(grid, groups)) for grid in (big, small)]
    steps = (
        counting.weight_step(grids[0][0], over_small(weight, groups), geometry, "big"),
        counting.weight_step(grids[1][0], over_big(weight), geometry, "small"),
        counting.grid_step(*grids, geometry, "big"),
    )
    assert torch.equal(torch.stack([step[4:13].reshape(3, 3) for step in steps]), expected)
    assert all(step[:4].tolist() == [1, geometry.macs, outside, 0] for step in steps)
    turned = counting.grid_step(*grids, geometry, "small")
    assert torch.equal(turned[4:13].reshape(3, 3), expected[2].T)
    assert torch.equal(turned[13:], steps[2][13:].roll(3))
    assert geometry.macs == expected[0].sum() + outside


def test_elements(geometry):
    big, _, weight = operands(geometry)
    for groups, partial in (
        (big, per_position(big)),
        (big, counting.per_sample(big, geometry.groups)),
        (weight, over_small(weight, geometry.groups)),
        (weight, over_big(weight)),
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
    def add_grid_step(counter, big, small, packed, first):
        _counted(counter, cpu_counting.count_grid_step, big, small, (None, None), tuple(packed), first)


def _counted(counter, count, *arguments):
    counters = torch.zeros(1, counting.ROWS, counting.WIDTH, dtype=torch.int64)
    sizes, lanes = torch.zeros(1, counting.SIZES + 1, 3, dtype=torch.int64), torch.zeros(1, 2, len(LANE_CONFIGS)).long()
    count(cpu_counting.Counters(counters, sizes, lanes, 0), *arguments)
    assert sizes[0, 0].all() and not lanes.any()
    counter += counters[0, 0]


@pytest.mark.parametrize("sizes", [(1, ODD, ODD), (ODD, 1, ODD), (ODD, ODD, 1)])
@pytest.mark.parametrize("module", [counting, Compiled], ids=["reference", "compiled"])
def test_large_counts_are_exact(module, sizes):
    assert_large_counts(module, *sizes)


def test_counts_beyond_int32():
    g = make(2**12, 2**11, 2**11, 1, (), (), (), (), ())
    ones = torch.full((1, 1), 16, dtype=torch.uint8)
    big, weight = ones.expand(g.batch, g.big_channels), ones.expand(g.small_channels, g.big_channels)
    step = counting.weight_step(per_position(big), over_small(weight, 1), g, "big")
    assert step[12] == g.macs == 2**34
