"""Convolutions of all kinds, their operands, and their counts by brute force: a walk over every slot of every step."""

import itertools

import torch

from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape


def make(batch, in_channels, out_channels, groups, conv_input, kernel, stride, padding, dilation):
    conv_output = tuple(
        (h + 2 * p - d * (r - 1) - 1) // s + 1
        for h, r, s, p, d in zip(conv_input, kernel, stride, padding, dilation, strict=True)
    )
    return ConvShape(
        batch, in_channels, out_channels, groups, conv_input, conv_output, kernel, stride, padding, dilation
    )


GEOMETRIES = {
    "1x1": make(3, 4, 5, 1, (4, 3), (1, 1), (1, 1), (0, 0), (1, 1)),
    "3x3": make(2, 3, 4, 1, (5, 6), (3, 3), (1, 1), (1, 1), (1, 1)),
    "stride 2": make(2, 3, 4, 1, (7, 6), (3, 3), (2, 2), (1, 1), (1, 1)),
    "stride 3, rows and columns unlike": make(2, 2, 3, 1, (9, 8), (3, 2), (3, 2), (2, 0), (1, 1)),
    "1x1 stride 2": make(2, 4, 2, 1, (5, 5), (1, 1), (2, 2), (0, 0), (1, 1)),
    "dilation": make(2, 2, 3, 1, (8, 7), (3, 3), (1, 2), (2, 3), (2, 3)),
    "groups": make(2, 6, 4, 2, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    "depthwise": make(2, 4, 8, 4, (5, 5), (3, 3), (2, 2), (1, 1), (1, 1)),
    "7x7": make(1, 2, 2, 1, (9, 9), (7, 7), (2, 2), (3, 3), (1, 1)),
    "kernel larger than the image": make(1, 2, 2, 1, (2, 2), (5, 5), (1, 1), (3, 3), (1, 1)),
    "padding beyond the kernel": make(1, 1, 2, 1, (3, 3), (1, 1), (1, 1), (2, 2), (1, 1)),
    "1d": make(3, 4, 6, 2, (11,), (3,), (2,), (1,), (2,)),
    "3d": make(1, 2, 3, 1, (3, 4, 3), (2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 1)),
    "linear": make(6, 7, 5, 1, (), (), (), (), ()),
}


def random_groups(generator, *shape):
    return torch.tensor([0, 8, 16], dtype=torch.uint8)[torch.randint(0, 3, shape, generator=generator)]


def operands(g):
    generator = torch.Generator().manual_seed(len(g.kernel) + g.macs)
    conv_input = random_groups(generator, g.batch, g.in_channels, *g.conv_input)
    conv_output = random_groups(generator, g.batch, g.out_channels, *g.conv_output)
    weight = random_groups(generator, g.out_channels, g.in_channels // g.groups, *g.kernel)
    return conv_input, conv_output, weight


def brute_force(g, conv_input, conv_output, weight):
    """Walk all macs; tables input by weight, output by weight, input by output, and how many lie outside the input."""
    tables, outside = torch.zeros(3, 3, 3, dtype=torch.int64), 0
    index = {0: 0, 8: 1, 16: 2}
    ranges = [range(g.batch), range(g.out_channels), range(g.in_channels // g.groups)]
    for n, k, c in itertools.product(*ranges):
        channel = k // (g.out_channels // g.groups) * (g.in_channels // g.groups) + c
        for p in itertools.product(*map(range, g.conv_output)):
            for r in itertools.product(*map(range, g.kernel)):
                h = tuple(p[d] * g.stride[d] - g.padding[d] + r[d] * g.dilation[d] for d in range(len(p)))
                if any(not 0 <= h[d] < g.conv_input[d] for d in range(len(p))):
                    outside += 1
                    continue
                x, d, w = (
                    index[int(conv_input[(n, channel, *h)])],
                    index[int(conv_output[(n, k, *p)])],
                    index[int(weight[(k, c, *r)])],
                )
                tables[0, x, w] += 1
                tables[1, d, w] += 1
                tables[2, x, d] += 1
    return tables, outside


def per_position(groups):
    return counting.per_position(groups, len(groups)).squeeze(1)


def over_out_channels(weight, groups):
    return counting.per_position(weight, len(weight) // groups).flatten(1, 2)


def over_in_channels(weight):
    return counting.per_sample(weight, 1).squeeze(2)


def assert_large_counts(module, batch, conv_input, conv_output):
    """A linear layer's steps of so many rows and channels, all of whose values are FP16, are added exactly."""

    def alike(elements, *shape):
        return torch.stack((torch.zeros(shape), torch.full(shape, elements))).int()

    packed = make(batch, conv_input, conv_output, 1, (), (), (), (), ()).pack()
    grids = [(alike(batch, channels), alike(channels, batch, 1)) for channels in (conv_input, conv_output)]
    for add, arguments, first, second in (
        (
            module.add_weight_step,
            (grids[0][0], alike(conv_output, conv_input), packed, "conv_input"),
            batch * conv_input,
            conv_input * conv_output,
        ),
        (
            module.add_weight_step,
            (grids[1][0], alike(conv_input, conv_output), packed, "conv_output"),
            batch * conv_output,
            conv_input * conv_output,
        ),
        (module.add_grid_step, (*grids, packed, "conv_input"), batch * conv_input, batch * conv_output),
        (module.add_grid_step, (*grids, packed, "conv_output"), batch * conv_output, batch * conv_input),
    ):
        before = torch.arange(100, 100 + counting.WIDTH)
        counter, added = before.clone(), torch.zeros_like(before)
        add(counter, *arguments)
        macs = batch * conv_input * conv_output
        added[[0, 1, 12, 15, 18]] = torch.tensor((1, macs, macs, first, second))
        assert torch.equal(counter - before, added)
