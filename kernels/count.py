"""The pair tables of steps on a GPU, from the sums that the quantizer leaves: one launch, added to counters in place.

Equal to `counting.weight_step` and `counting.grid_step`. All sums are int64.
The programs of a launch are few: each ends with one addition of a whole counter, and those take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.launch import INT32, Launch, check_device, check_dtype, power_of_2

WIDTH = 19
"""Integers of a counter: calls, slots, padding, not_run, pairs [3, 3], elements of both operands [2, 3]."""
TILE = 1024
PROGRAMS = 256
"""For each step: two for each multiprocessor of an H100, not yet measured."""


class Sizes(NamedTuple):
    """`geometry.Geometry` as the kernels see it: three dimensions, the first ones 1 where a convolution has fewer."""

    batch: int
    big_channels: int
    small_channels: int
    groups: int
    big: tuple[int, int, int]
    small: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]

    @property
    def per_offset(self) -> int:
        return self.batch * self.small_channels * (self.big_channels // self.groups)

    @property
    def slots(self) -> int:
        return self.per_offset * prod(self.kernel) * prod(self.small)

    @property
    def inside(self) -> int:
        """Slots whose big position lies inside the big grid; the dimensions are independent."""
        return self.per_offset * prod(self._met(d) for d in range(3))

    @property
    def weights(self) -> int:
        return self.small_channels * (self.big_channels // self.groups) * prod(self.kernel)

    def _met(self, d: int) -> int:
        total = 0
        for offset in range(self.kernel[d]):
            start = offset * self.dilation[d] - self.padding[d]  # big position of small position 0
            first = max(0, -(start // self.stride[d]))
            total += max(0, min(self.small[d] - 1, (self.big[d] - 1 - start) // self.stride[d]) - first + 1)
        return total


@lru_cache(maxsize=512)
def _sizes(packed: tuple[int, ...]) -> Sizes:
    """The sizes that `Geometry.pack` lists.

    Raises:
        ValueError: not such a list, or of more than three dimensions.
    """
    dims, rest = divmod(len(packed) - 4, 6)
    if rest or not 0 <= dims <= 3:
        raise ValueError(f"{len(packed)} numbers are not the packed geometry of 0 to 3 dimensions")
    fill = (1, 1, 1, 1, 0, 1)  # big, small, kernel, stride, padding, dilation
    lists = [packed[4 + i * dims : 4 + (i + 1) * dims] for i in range(6)]
    batch, big_channels, small_channels, groups = packed[:4]
    grids = [(value,) * (3 - dims) + part for value, part in zip(fill, lists, strict=True)]
    return Sizes(batch, big_channels, small_channels, groups, *((a, b, c) for a, b, c in grids))


@triton.jit
def _split(index, grid):
    """Coordinates of a row-major index."""
    return index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]


@triton.jit
def _meet(p0, p1, p2, offset, big, kernel, stride, padding, dilation):
    """The row-major big position that a kernel offset joins with small position (p0, p1, p2); and if it is inside."""
    r0, r1, r2 = _split(offset, kernel)
    h0 = p0 * stride[0] - padding[0] + r0 * dilation[0]
    h1 = p1 * stride[1] - padding[1] + r1 * dilation[1]
    h2 = p2 * stride[2] - padding[2] + r2 * dilation[2]
    inside = (h0 >= 0) & (h0 < big[0]) & (h1 >= 0) & (h1 < big[1]) & (h2 >= 0) & (h2 < big[2])
    return (h0 * big[1] + h1) * big[2] + h2, inside


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
    slots,
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
        once, once * slots, once * (slots - inside), once * 0,
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


@triton.jit
def _weight_step(
    counter_ptr,
    position_ptr,
    weight_ptr,
    pid,
    programs,
    channels,
    others,
    batch,
    big,
    small,
    kernel,
    stride,
    padding,
    dilation,
    position_count,
    weight_count,
    slots,
    inside,
    OF_BIG: tl.constexpr,
    STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    WEIGHT_STEPS: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """position [2, channels, *grid] by weight [2, channels, *kernel]; the grid is the big one or the small one.

    A tile is some channels by some small positions under one kernel offset.
    """
    offsets = kernel[0] * kernel[1] * kernel[2]
    positions = small[0] * small[1] * small[2]
    grid = positions
    if OF_BIG:
        grid = big[0] * big[1] * big[2]
    position_tiles = tl.cdiv(positions, TILE_P)
    zero = tl.zeros((TILE_C,), tl.int64)
    b88, b8x, bx8, bxx = zero, zero, zero, zero
    f8, fx, s8, sx = zero, zero, zero, zero
    for step in range(STEPS):
        tile = pid * STEPS + step
        p = tile % position_tiles * TILE_P + tl.arange(0, TILE_P)
        offset = tile // position_tiles % offsets
        c = tile // (position_tiles * offsets) * TILE_C + tl.arange(0, TILE_C)
        p0, p1, p2 = _split(p, small)
        at, met = _meet(p0, p1, p2, offset, big, kernel, stride, padding, dilation)
        met = met & (p < positions)
        if not OF_BIG:
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
        slots,
        inside,
        False,
    )


@triton.jit
def _grid_step(
    counter_ptr,
    big_position_ptr,
    big_sample_ptr,
    small_position_ptr,
    small_sample_ptr,
    pid,
    programs,
    rows,
    big_channels,
    small_channels,
    groups,
    big,
    small,
    kernel,
    stride,
    padding,
    dilation,
    big_count,
    small_count,
    slots,
    inside,
    SMALL_FIRST: tl.constexpr,
    OFFSETS: tl.constexpr,
    STEPS: tl.constexpr,
    BIG_STEPS: tl.constexpr,
    SMALL_STEPS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """big_sample [2, rows, *big] by small_sample [2, rows, *small], a row being a channel group of a sample.

    A tile is some rows by some small positions. What all kernel offsets find in the big grid is summed before it is
    multiplied, since the small grid's element is the same under every offset.
    """
    positions = small[0] * small[1] * small[2]
    grid = big[0] * big[1] * big[2]
    position_tiles = tl.cdiv(positions, TILE_P)
    zero = tl.zeros((TILE_P,), tl.int64)
    b88, b8x, bx8, bxx = zero, zero, zero, zero
    f8, fx, s8, sx = zero, zero, zero, zero
    for step in range(STEPS):
        tile = pid * STEPS + step
        p = tile % position_tiles * TILE_P + tl.arange(0, TILE_P)
        row = tile // position_tiles * TILE_R + tl.arange(0, TILE_R)
        p0, p1, p2 = _split(p, small)
        seen8 = tl.zeros((TILE_R, TILE_P), tl.int32)
        seenx = tl.zeros((TILE_R, TILE_P), tl.int32)
        times = tl.zeros((TILE_P,), tl.int32)
        for offset in range(OFFSETS):
            at, met = _meet(p0, p1, p2, offset, big, kernel, stride, padding, dilation)
            met = met & (p < positions)
            mask = (row < rows)[:, None] & met[None, :]
            from_big = big_sample_ptr + row[:, None] * grid + at[None, :]
            seen8 += tl.load(from_big, mask=mask, other=0)
            seenx += tl.load(from_big + rows * grid, mask=mask, other=0)
            times += met.to(tl.int32)
        mask = (row < rows)[:, None] & (p < positions)[None, :]
        from_small = small_sample_ptr + row[:, None] * positions + p[None, :]
        d8 = tl.load(from_small, mask=mask, other=0).to(tl.int64)
        dx = tl.load(from_small + rows * positions, mask=mask, other=0).to(tl.int64)
        b88 += tl.sum(seen8 * d8, axis=0)
        b8x += tl.sum(seen8 * dx, axis=0)
        bx8 += tl.sum(seenx * d8, axis=0)
        bxx += tl.sum(seenx * dx, axis=0)
        f8 += tl.sum(seen8.to(tl.int64), axis=0)
        fx += tl.sum(seenx.to(tl.int64), axis=0)
        s8 += tl.sum(d8, axis=0) * times
        sx += tl.sum(dx, axis=0) * times
    small_others = small_channels // groups
    big_others = big_channels // groups
    _add(
        counter_ptr,
        pid,
        (tl.sum(b88), tl.sum(b8x), tl.sum(bx8), tl.sum(bxx)),
        (tl.sum(f8) * small_others, tl.sum(fx) * small_others),
        (tl.sum(s8) * big_others, tl.sum(sx) * big_others),
        _sums(big_position_ptr, big_channels * grid, pid, programs, BIG_STEPS, 1024),
        _sums(small_position_ptr, small_channels * positions, pid, programs, SMALL_STEPS, 1024),
        big_count,
        small_count,
        slots,
        inside,
        SMALL_FIRST,
    )


@triton.jit
def _add_not_run(counter_ptr, slots):
    """Add a step that nobody asked for."""
    place = tl.arange(0, 4)
    row = tl.where(place == 0, 1, tl.where(place == 2, 0, slots)).to(tl.int64)
    tl.atomic_add(counter_ptr + place, row, sem="relaxed")


@triton.jit(do_not_specialize=["position_count", "weight_count", "big_count", "small_count", "slots", "inside"])
def _steps_kernel(
    counters_ptr,
    position_ptr,
    weight_ptr,
    big_ptr,
    big_sample_ptr,
    small_ptr,
    small_sample_ptr,
    states_ptr,
    weight_programs,
    grid_programs,
    weight_counter,
    grid_counter,
    weight_at,
    big_sample_at,
    small_sample_at,
    rows,
    batch,
    big_channels,
    small_channels,
    groups,
    big,
    small,
    kernel,
    stride,
    padding,
    dilation,
    position_count,
    weight_count,
    big_count,
    small_count,
    slots,
    inside,
    WEIGHT: tl.constexpr,
    GRID: tl.constexpr,
    OF_BIG: tl.constexpr,
    SMALL_FIRST: tl.constexpr,
    W_STEPS: tl.constexpr,
    W_SHARES: tl.constexpr,
    TILE_C: tl.constexpr,
    W_TILE_P: tl.constexpr,
    G_STEPS: tl.constexpr,
    G_SHARES: tl.constexpr,
    OFFSETS: tl.constexpr,
    TILE_R: tl.constexpr,
    G_TILE_P: tl.constexpr,
):
    """A step that multiplies a grid by the weight, one that multiplies the two grids, or both, of one convolution.

    counters: int64, the steps' own begin at weight_counter and grid_counter. The weight's counts begin at weight_at,
    the grids' by sample at big_sample_at and small_sample_at of their tensors. states: int32 [rows of T's, 2] of which
    the T's to come are put into use, or None. The counts are of the operands' elements.
    WEIGHT, GRID: 0: leave the step out; 1: count it; 2: count it as asked for by nobody. OF_BIG: the weight step's grid
    is the big one. SMALL_FIRST: the grid step's first operand is the small one. SHARES: see `_share`.
    """
    pid = tl.program_id(0)
    if WEIGHT == 1 and pid < weight_programs:
        channels, others = small_channels, big_channels // groups
        if OF_BIG:
            channels, others = big_channels, small_channels // groups
        _weight_step(
            counters_ptr + weight_counter, position_ptr, weight_ptr + weight_at, pid, weight_programs, channels, others,
            batch, big, small, kernel, stride, padding, dilation, position_count, weight_count, slots, inside,
            OF_BIG, W_STEPS, W_SHARES[0], W_SHARES[1], TILE_C, W_TILE_P,
        )  # fmt: skip
    if GRID == 1 and pid >= weight_programs:
        _grid_step(
            counters_ptr + grid_counter, big_ptr, big_sample_ptr + big_sample_at, small_ptr,
            small_sample_ptr + small_sample_at, pid - weight_programs, grid_programs, rows, big_channels,
            small_channels, groups, big, small, kernel, stride, padding, dilation, big_count, small_count, slots,
            inside, SMALL_FIRST, OFFSETS, G_STEPS, G_SHARES[0], G_SHARES[1], TILE_R, G_TILE_P,
        )  # fmt: skip
    if pid == 0:
        if WEIGHT == 2:
            _add_not_run(counters_ptr + weight_counter, slots)
        if GRID == 2:
            _add_not_run(counters_ptr + grid_counter, slots)
        if states_ptr is not None:
            row = tl.arange(0, 8)
            coming = tl.load(states_ptr + 2 * row + 1, mask=row < 6, other=0)
            tl.store(states_ptr + 2 * row, coming, mask=row < 6)


LEFT_OUT, COUNTED, NOT_RUN = 0, 1, 2
"""What is done with a step: `_steps_kernel`'s WEIGHT and GRID."""


class Steps(NamedTuple):
    """Which of a convolution's steps are counted in one launch, and where their operands' counts lie."""

    geometry: tuple[int, ...]
    """`Geometry.pack()`"""
    weight: int = LEFT_OUT
    grid: int = LEFT_OUT
    side: str = "big"
    """which grid the weight step multiplies with the weight"""
    first: str = "big"
    """which grid is the grid step's first operand"""
    weight_counter: int = 0
    """where the step's counter begins, in integers"""
    grid_counter: int = 0
    weight_at: int = 0
    """where the weight's counts begin"""
    big_sample_at: int = 0
    """where a grid's counts by sample begin"""
    small_sample_at: int = 0


@lru_cache(maxsize=1024)
def steps_launch(steps: Steps, device: torch.device) -> Launch:
    """The launch that counts steps; its tensors are `_steps_kernel`'s, None where a step is not counted.

    Raises:
        ValueError: no such side, or a geometry of more than three dimensions.
    """
    sizes = _sizes(steps.geometry)
    _check_side("side", steps.side)
    _check_side("first", steps.first)
    grids = {"big": prod(sizes.big), "small": prod(sizes.small)}
    all_channels = {"big": sizes.big_channels, "small": sizes.small_channels}
    channels, grid, positions = all_channels[steps.side], grids[steps.side], grids["small"]
    offsets, rows = prod(sizes.kernel), sizes.batch * sizes.groups
    tile_p = min(TILE, power_of_2(positions))
    tile_c, tile_r = (min(TILE // tile_p, power_of_2(size)) for size in (channels, rows))
    position_tiles = triton.cdiv(positions, tile_p)
    weight_programs, weight_steps = _programs(triton.cdiv(channels, tile_c) * offsets * position_tiles)
    grid_programs, grid_steps = _programs(triton.cdiv(rows, tile_r) * position_tiles)
    weight_programs *= steps.weight == COUNTED
    grid_programs *= steps.grid == COUNTED
    return Launch(
        device,
        _steps_kernel,
        (max(1, weight_programs + grid_programs),),
        weight_programs,
        grid_programs,
        *steps[5:],
        rows,
        *sizes,
        sizes.batch * channels * grid,
        sizes.weights,
        *(sizes.batch * all_channels[side] * grids[side] for side in ("big", "small")),
        sizes.slots,
        sizes.inside,
        WEIGHT=steps.weight,
        GRID=steps.grid,
        OF_BIG=steps.side == "big",
        SMALL_FIRST=steps.first == "small",
        W_STEPS=weight_steps,
        W_SHARES=(_share(channels * grid, weight_programs), _share(channels * offsets, weight_programs)),
        TILE_C=tile_c,
        W_TILE_P=tile_p,
        G_STEPS=grid_steps,
        G_SHARES=tuple(_share(all_channels[side] * grids[side], grid_programs) for side in ("big", "small")),
        OFFSETS=offsets if steps.grid == COUNTED else 1,
        TILE_R=tile_r,
        G_TILE_P=tile_p,
    )


def add_weight_step(counter: Tensor, position: Tensor, weight: Tensor, geometry: Sequence[int], side: str) -> None:
    """Add a step that multiplies a grid by the weight (forward, grad_input) to a counter, in one launch.

    Args:
        counter: int64 [WIDTH].
        position: int32 [2, channels, *grid], the grid's elements of each group over the batch.
        weight: int32 [2, channels, *kernel], the weight's over the other side's channels.
        geometry: `Geometry.pack()`.
        side: which grid it is, "big" or "small".

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or side; RuntimeError: not on a GPU.
    """
    _check_side("side", side)
    sizes = _sizes(tuple(geometry))
    channels, grid = sizes.big_channels, prod(sizes.big)
    if side == "small":
        channels, grid = sizes.small_channels, prod(sizes.small)
    _check(counter, position=(position, 2 * channels * grid), weight=(weight, 2 * channels * prod(sizes.kernel)))
    launch = steps_launch(Steps(tuple(geometry), weight=COUNTED, side=side), counter.device)
    launch(counter, position.contiguous(), weight.contiguous(), *[None] * 5)


def add_grid_step(
    counter: Tensor, big: Sequence[Tensor], small: Sequence[Tensor], geometry: Sequence[int], first: str
) -> None:
    """Add a step that multiplies the two grids (grad_weight) to a counter, in one launch.

    Args:
        counter: int64 [WIDTH].
        big, small: of each grid int32 [2, channels, *grid], its elements of each group over the batch, and int32
            [2, N, g, *grid], over a channel group.
        geometry: `Geometry.pack()`.
        first: which grid is the step's first operand, "big" or "small".

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or side; RuntimeError: not on a GPU.
    """
    _check_side("first", first)
    sizes = _sizes(tuple(geometry))
    rows, grids = sizes.batch * sizes.groups, (prod(sizes.big), prod(sizes.small))
    _check(
        counter,
        big_position=(big[0], 2 * sizes.big_channels * grids[0]),
        big_sample=(big[1], 2 * rows * grids[0]),
        small_position=(small[0], 2 * sizes.small_channels * grids[1]),
        small_sample=(small[1], 2 * rows * grids[1]),
    )
    launch = steps_launch(Steps(tuple(geometry), grid=COUNTED, first=first), counter.device)
    launch(counter, None, None, *(part.contiguous() for side in (big, small) for part in side), None)


def _programs(tiles: int) -> tuple[int, int]:
    """Programs, and tiles of each (a power of 2, so that there are few variants to compile)."""
    steps = power_of_2(triton.cdiv(tiles, PROGRAMS))
    return max(1, triton.cdiv(tiles, steps)), steps


def _share(count: int, programs: int) -> int:
    """Tiles of a tensor that each program sums, rounded up so that there are few variants to compile."""
    return power_of_2(triton.cdiv(count, TILE * programs)) if count and programs else 0


def _check_side(name: str, side: str) -> None:
    if side not in ("big", "small"):
        raise ValueError(f"{name} is 'big' or 'small', not {side!r}")


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
