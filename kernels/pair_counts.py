"""The pair tables of steps on a GPU, from the sums that the quantizer leaves: one launch, added to counters in place.

Equal to `counting.weight_step` and `counting.grid_step`. All sums are int64.
The programs of a launch are few: each ends with one addition of a whole counter, and those take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.geometry import in_dims
from lnpu_torch.kernels.launch import INT32, Launch, check_device, check_dtype, power_of_2
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape

WIDTH = 19
"""Integers of a counter: calls, macs, padding, not_run, pairs [3, 3], elements of both operands [2, 3]."""
TILE = 1024
PROGRAMS = 256
"""For each step: two for each multiprocessor of an H100, not yet measured."""


@triton.jit
def _split(index, grid):
    """Coordinates of a row-major index."""
    return index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]


@triton.jit
def _overlap(p0, p1, p2, offset, conv_input, kernel, stride, padding, dilation):
    """The row-major input position that an offset joins with output position (p0, p1, p2); and if it is inside."""
    r0, r1, r2 = _split(offset, kernel)
    h0 = p0 * stride[0] - padding[0] + r0 * dilation[0]
    h1 = p1 * stride[1] - padding[1] + r1 * dilation[1]
    h2 = p2 * stride[2] - padding[2] + r2 * dilation[2]
    inside = (h0 >= 0) & (h0 < conv_input[0]) & (h1 >= 0) & (h1 < conv_input[1]) & (h2 >= 0) & (h2 < conv_input[2])
    return (h0 * conv_input[1] + h1) * conv_input[2] + h2, inside


@triton.jit
def _sums(x_ptr, half, pid, programs, STEPS: tl.constexpr, TILE: tl.constexpr):
    """A program's share of the sums of x [2, half]."""
    low = tl.zeros((TILE,), tl.int64)
    high = tl.zeros((TILE,), tl.int64)
    for step in range(STEPS):
        index = (step * programs + pid) * TILE + tl.arange(0, TILE)
        low += tl.load(x_ptr + index, mask=index < half, other=0)
        high += tl.load(x_ptr + half + index, mask=index < half, other=0)
    return tl.sum(low), tl.sum(high)


@triton.jit
def _add(
    counter_ptr,
    pid,
    both,
    first,
    second,
    first_found,
    second_found,
    first_count,
    second_count,
    macs,
    inside,
    TRANSPOSED: tl.constexpr,
):
    """Add a program's share of a step to a counter. Everything in a counter is a sum, so that shares just add up.

    both: pairs of non-zeros (8x8, 8x16, 16x8, 16x16). first, second: pairs in which the first, or the second, is a
    non-zero (8, 16). first_found, second_found: non-zeros of the operands (8, 16). The counts and sizes, of which
    there is one each, are added by the first program. TRANSPOSED: the counter's first operand is the second here.
    """
    once = tl.where(pid == 0, 1, 0).to(tl.int64)
    b88, b8x, bx8, bxx = both
    f8, fx = first
    s8, sx = second
    f0, s0 = f8 + fx - (b88 + b8x + bx8 + bxx), s8 + sx
    first_zero = once * first_count - first_found[0] - first_found[1]
    second_zero = once * second_count - second_found[0] - second_found[1]
    if TRANSPOSED:
        b8x, bx8 = bx8, b8x
        f8, fx, s8, sx = s8, sx, f8, fx
        e10, e18, e1x, e20, e28, e2x = (
            second_zero,
            second_found[0],
            second_found[1],
            first_zero,
            first_found[0],
            first_found[1],
        )
    else:
        e10, e18, e1x, e20, e28, e2x = (
            first_zero,
            first_found[0],
            first_found[1],
            second_zero,
            second_found[0],
            second_found[1],
        )
    values = (
        once, once * macs, once * (macs - inside), once * 0,
        once * inside - f0 - s0, s8 - b88 - bx8, sx - b8x - bxx,
        f8 - b88 - b8x, b88, b8x,
        fx - bx8 - bxx, bx8, bxx,
        e10, e18, e1x, e20, e28, e2x,
    )  # fmt: skip
    place = tl.arange(0, 32)
    row = tl.zeros((32,), tl.int64)
    for i in tl.static_range(19):
        row = tl.where(place == i, values[i], row)
    tl.atomic_add(counter_ptr + place, row, mask=place < 19, sem="relaxed")


@triton.jit(do_not_specialize=["position_count", "weight_count", "macs", "inside"])
def _weight_kernel(
    counter_ptr,
    position_ptr,
    weight_ptr,
    channels,
    others,
    batch,
    conv_input,
    conv_output,
    kernel,
    stride,
    padding,
    dilation,
    position_count,
    weight_count,
    macs,
    inside,
    OF_INPUT: tl.constexpr,
    STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    WEIGHT_STEPS: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """position [2, channels, *grid] by weight [2, channels, *kernel]; the grid is the input or the output.

    A tile is some channels by some output positions under one offset. POSITION_STEPS, WEIGHT_STEPS: see `_share`.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    offsets = kernel[0] * kernel[1] * kernel[2]
    positions = conv_output[0] * conv_output[1] * conv_output[2]
    grid = positions
    if OF_INPUT:
        grid = conv_input[0] * conv_input[1] * conv_input[2]
    position_tiles = tl.cdiv(positions, TILE_P)
    zero = tl.zeros((TILE_C,), tl.int64)
    b88, b8x, bx8, bxx = zero, zero, zero, zero
    f8, fx, s8, sx = zero, zero, zero, zero
    for step in range(STEPS):
        tile = pid * STEPS + step
        p = tile % position_tiles * TILE_P + tl.arange(0, TILE_P)
        offset = tile // position_tiles % offsets
        c = tile // (position_tiles * offsets) * TILE_C + tl.arange(0, TILE_C)
        p0, p1, p2 = _split(p, conv_output)
        at, met = _overlap(p0, p1, p2, offset, conv_input, kernel, stride, padding, dilation)
        met = met & (p < positions)
        if not OF_INPUT:
            at = p
        mask = (c < channels)[:, None] & met[None, :]
        from_grid = position_ptr + c[:, None] * grid + at[None, :]
        g8 = tl.sum(tl.load(from_grid, mask=mask, other=0).to(tl.int64), axis=1)
        gx = tl.sum(tl.load(from_grid + channels * grid, mask=mask, other=0).to(tl.int64), axis=1)
        from_weight = weight_ptr + c * offsets + offset
        w8 = tl.load(from_weight, mask=c < channels, other=0).to(tl.int64)
        wx = tl.load(from_weight + channels * offsets, mask=c < channels, other=0).to(tl.int64)
        b88 += g8 * w8
        b8x += g8 * wx
        bx8 += gx * w8
        bxx += gx * wx
        f8 += g8
        fx += gx
        times = tl.sum(met.to(tl.int32))
        s8 += w8 * times
        sx += wx * times
    _add(
        counter_ptr,
        pid,
        (tl.sum(b88), tl.sum(b8x), tl.sum(bx8), tl.sum(bxx)),
        (tl.sum(f8) * others, tl.sum(fx) * others),
        (tl.sum(s8) * batch, tl.sum(sx) * batch),
        _sums(position_ptr, channels * grid, pid, programs, POSITION_STEPS, 1024),
        _sums(weight_ptr, channels * offsets, pid, programs, WEIGHT_STEPS, 1024),
        position_count,
        weight_count,
        macs,
        inside,
        False,
    )


@triton.jit(do_not_specialize=["input_count", "output_count", "macs", "inside"])
def _grid_kernel(
    counter_ptr,
    input_position_ptr,
    input_sample_ptr,
    output_position_ptr,
    output_sample_ptr,
    rows,
    in_channels,
    out_channels,
    groups,
    conv_input,
    conv_output,
    kernel,
    stride,
    padding,
    dilation,
    input_count,
    output_count,
    macs,
    inside,
    OUTPUT_FIRST: tl.constexpr,
    OFFSETS: tl.constexpr,
    STEPS: tl.constexpr,
    INPUT_STEPS: tl.constexpr,
    OUTPUT_STEPS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """input_sample [2, rows, *input] by output_sample [2, rows, *output], a row being a channel group of a sample.

    A tile is some rows by some output positions. What all kernel offsets find in the input is summed before it is
    multiplied, since the output's element is the same under every offset. INPUT_STEPS, OUTPUT_STEPS: see `_share`.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    positions = conv_output[0] * conv_output[1] * conv_output[2]
    grid = conv_input[0] * conv_input[1] * conv_input[2]
    position_tiles = tl.cdiv(positions, TILE_P)
    zero = tl.zeros((TILE_P,), tl.int64)
    b88, b8x, bx8, bxx = zero, zero, zero, zero
    f8, fx, s8, sx = zero, zero, zero, zero
    for step in range(STEPS):
        tile = pid * STEPS + step
        p = tile % position_tiles * TILE_P + tl.arange(0, TILE_P)
        row = tile // position_tiles * TILE_R + tl.arange(0, TILE_R)
        p0, p1, p2 = _split(p, conv_output)
        seen8 = tl.zeros((TILE_R, TILE_P), tl.int32)
        seenx = tl.zeros((TILE_R, TILE_P), tl.int32)
        times = tl.zeros((TILE_P,), tl.int32)
        for offset in range(OFFSETS):
            at, met = _overlap(p0, p1, p2, offset, conv_input, kernel, stride, padding, dilation)
            met = met & (p < positions)
            mask = (row < rows)[:, None] & met[None, :]
            from_input = input_sample_ptr + row[:, None] * grid + at[None, :]
            seen8 += tl.load(from_input, mask=mask, other=0)
            seenx += tl.load(from_input + rows * grid, mask=mask, other=0)
            times += met.to(tl.int32)
        mask = (row < rows)[:, None] & (p < positions)[None, :]
        from_output = output_sample_ptr + row[:, None] * positions + p[None, :]
        d8 = tl.load(from_output, mask=mask, other=0).to(tl.int64)
        dx = tl.load(from_output + rows * positions, mask=mask, other=0).to(tl.int64)
        b88 += tl.sum(seen8 * d8, axis=0)
        b8x += tl.sum(seen8 * dx, axis=0)
        bx8 += tl.sum(seenx * d8, axis=0)
        bxx += tl.sum(seenx * dx, axis=0)
        f8 += tl.sum(seen8.to(tl.int64), axis=0)
        fx += tl.sum(seenx.to(tl.int64), axis=0)
        s8 += tl.sum(d8, axis=0) * times
        sx += tl.sum(dx, axis=0) * times
    output_others = out_channels // groups
    input_others = in_channels // groups
    _add(
        counter_ptr,
        pid,
        (tl.sum(b88), tl.sum(b8x), tl.sum(bx8), tl.sum(bxx)),
        (tl.sum(f8) * output_others, tl.sum(fx) * output_others),
        (tl.sum(s8) * input_others, tl.sum(sx) * input_others),
        _sums(input_position_ptr, in_channels * grid, pid, programs, INPUT_STEPS, 1024),
        _sums(output_position_ptr, out_channels * positions, pid, programs, OUTPUT_STEPS, 1024),
        input_count,
        output_count,
        macs,
        inside,
        OUTPUT_FIRST,
    )


@lru_cache(maxsize=1024)
def _weight_launch(packed: tuple[int, ...], side: str, device: torch.device) -> Launch:
    g = in_dims(packed, 3)
    channels, others, grid = g.in_channels, g.out_channels // g.groups, prod(g.conv_input)
    if side == "conv_output":
        channels, others, grid = g.out_channels, g.in_channels // g.groups, prod(g.conv_output)
    positions, offsets = prod(g.conv_output), prod(g.kernel)
    tile_p = min(TILE, power_of_2(positions))
    tile_c = min(TILE // tile_p, power_of_2(channels))
    programs, steps = _programs(triton.cdiv(channels, tile_c) * offsets * triton.cdiv(positions, tile_p))
    return Launch(
        device,
        _weight_kernel,
        (programs,),
        channels,
        others,
        g.batch,
        *_walk(g),
        g.batch * channels * grid,
        g.elements("weight"),
        g.macs,
        g.inside,
        OF_INPUT=side == "conv_input",
        STEPS=steps,
        POSITION_STEPS=_share(channels * grid, programs),
        WEIGHT_STEPS=_share(channels * offsets, programs),
        TILE_C=tile_c,
        TILE_P=tile_p,
    )


@lru_cache(maxsize=1024)
def _grid_launch(packed: tuple[int, ...], first: str, device: torch.device) -> Launch:
    g = in_dims(packed, 3)
    rows, positions = g.batch * g.groups, prod(g.conv_output)
    tile_p = min(TILE, power_of_2(positions))
    tile_r = min(TILE // tile_p, power_of_2(rows))
    programs, steps = _programs(triton.cdiv(rows, tile_r) * triton.cdiv(positions, tile_p))
    return Launch(
        device,
        _grid_kernel,
        (programs,),
        rows,
        g.in_channels,
        g.out_channels,
        g.groups,
        *_walk(g),
        g.elements("conv_input"),
        g.elements("conv_output"),
        g.macs,
        g.inside,
        OUTPUT_FIRST=first == "conv_output",
        OFFSETS=prod(g.kernel),
        STEPS=steps,
        INPUT_STEPS=_share(g.in_channels * prod(g.conv_input), programs),
        OUTPUT_STEPS=_share(g.out_channels * positions, programs),
        TILE_R=tile_r,
        TILE_P=tile_p,
    )


def _walk(g: ConvShape) -> tuple[tuple[int, ...], ...]:
    return g.conv_input, g.conv_output, g.kernel, g.stride, g.padding, g.dilation


def add_weight_step(counter: Tensor, position: Tensor, weight: Tensor, geometry: Sequence[int], side: str) -> None:
    """Add a step that multiplies a grid by the weight (forward, grad_input) to a counter, in one launch.

    Args:
        counter: int64 [WIDTH].
        position: int32 [2, channels, *grid], the grid's elements of each group over the batch.
        weight: int32 [2, channels, *kernel], the weight's over the other side's channels.
        geometry: `ConvShape.pack()`.
        side: which grid it is, "conv_input" or "conv_output".

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or side; RuntimeError: not on a GPU.
    """
    _check_side("side", side)
    g = in_dims(tuple(geometry), 3)
    channels, grid = (
        (g.in_channels, prod(g.conv_input)) if side == "conv_input" else (g.out_channels, prod(g.conv_output))
    )
    _check(counter, position=(position, 2 * channels * grid), weight=(weight, 2 * channels * prod(g.kernel)))
    _weight_launch(tuple(geometry), side, counter.device)(counter, position.contiguous(), weight.contiguous())


def add_grid_step(
    counter: Tensor, conv_input: Sequence[Tensor], conv_output: Sequence[Tensor], geometry: Sequence[int], first: str
) -> None:
    """Add a step that multiplies the two grids (grad_weight) to a counter, in one launch.

    Args:
        counter: int64 [WIDTH].
        conv_input, conv_output: of each grid int32 [2, channels, *grid], its elements of each group over the batch, and
            int32 [2, N, g, *grid], over a channel group.
        geometry: `ConvShape.pack()`.
        first: which grid is the step's first operand, "conv_input" or "conv_output".

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or side; RuntimeError: not on a GPU.
    """
    _check_side("first", first)
    g = in_dims(tuple(geometry), 3)
    rows, grids = g.batch * g.groups, (prod(g.conv_input), prod(g.conv_output))
    _check(
        counter,
        input_position=(conv_input[0], 2 * g.in_channels * grids[0]),
        input_sample=(conv_input[1], 2 * rows * grids[0]),
        output_position=(conv_output[0], 2 * g.out_channels * grids[1]),
        output_sample=(conv_output[1], 2 * rows * grids[1]),
    )
    launch = _grid_launch(tuple(geometry), first, counter.device)
    launch(counter, *(part.contiguous() for side in (conv_input, conv_output) for part in side))


def _programs(tiles: int) -> tuple[int, int]:
    """Programs, and tiles of each (a power of 2, so that there are few variants to compile)."""
    steps = power_of_2(triton.cdiv(tiles, PROGRAMS))
    return max(1, triton.cdiv(tiles, steps)), steps


def _share(count: int, programs: int) -> int:
    """Tiles of a tensor that each program sums, rounded up so that there are few variants to compile."""
    return power_of_2(triton.cdiv(count, TILE * programs)) if count else 0


def _check_side(name: str, side: str) -> None:
    if side not in ("conv_input", "conv_output"):
        raise ValueError(f"{name} is 'conv_input' or 'conv_output', not {side!r}")


def _check(counter: Tensor, **operands: tuple[Tensor, int]) -> None:
    check_dtype((torch.int64,), counter=counter)
    check_dtype((torch.int32,), **{name: tensor for name, (tensor, _) in operands.items()})
    check_device(counter=counter, **{name: tensor for name, (tensor, _) in operands.items()})
    if counter.shape != (WIDTH,) or not counter.is_contiguous():
        raise ValueError(f"a counter is contiguous and has {WIDTH} integers, not {list(counter.shape)}")
    for name, (tensor, size) in operands.items():
        if tensor.numel() != size:
            raise ValueError(f"{name} {list(tensor.shape)} does not fit the geometry, which asks for {size} elements")
        if size >= INT32:
            raise ValueError(f"{name} has {size} elements, more than the kernel's 32-bit offsets reach")
