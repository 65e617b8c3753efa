"""Matrix products and 2D convolutions on a GPU whose accumulator may be rounded every few products.

Twins of `accumulate.reduce`, `conv_forward`, `conv_grad_input` and `conv_grad_weight`: the same order of products,
the same chunks. FP16 operands, FP32 sums on the tensor cores; with a chunk, each chunk's sum is added to the
accumulator and that rounded to binary16. Within a chunk the order of additions is the hardware's, so that results equal
the reference bit by bit only where every sum of a chunk is exact in FP32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lnpu_torch.kernels.geometry import in_dims
from lnpu_torch.kernels.launch import INT32, Launch, check_device, check_dtype, power_of_2, processors
from lnpu_torch.ops.pair_counts.conv_shape import ConvShape

MATMUL = tl.constexpr(0)  # a [m, k] by b [k, n]
FORWARD = tl.constexpr(1)  # the output grid from the input grid (a) and the weight (b)
GRAD_INPUT = tl.constexpr(2)  # the input grid from the output grid (a) and the weight (b)
GRAD_WEIGHT = tl.constexpr(3)  # the weight from the output grid (a) and the input grid (b)
DEPTH = 64
"""Products along a tile."""


class Config(NamedTuple):
    """The widest tiles, the stages of the pipeline that fills them, and warps enough to hold one in registers."""

    m: int
    n: int
    stages: int = 3
    warps: int = 8


class Configs(NamedTuple):
    """What is used for what. Chosen by reasoning, not yet by measurement."""

    streamed: Config = Config(128, 128)
    """operands that are copied to shared memory in wide pieces"""
    gathered: Config = Config(64, 64)
    """operands fetched element by element, which takes registers for the addresses"""


CONFIGS = Configs()


class Tiles(NamedTuple):
    """How a product [m, k] by [k, n] is cut."""

    m: int
    n: int
    k: int
    chunk: int
    """Products between two roundings, or just the tile."""
    parts: int
    """Tiles along a chunk; the last may reach beyond it, and is padded with zeros."""
    stages: int = 3
    warps: int = 4

    @classmethod
    def of(cls, m: int, n: int, k: int, chunk: int | None, config: Config = CONFIGS.streamed) -> Tiles:
        tile_m, tile_n = (min(wide, max(16, power_of_2(size))) for size, wide in ((m, config.m), (n, config.n)))
        options = config.stages, config.warps if (tile_m, tile_n) == (config.m, config.n) else 4
        if chunk is None:
            return cls(tile_m, tile_n, DEPTH, DEPTH, 1, *options)
        chunk = min(chunk, max(k, 1))
        tile = min(DEPTH, chunk & -chunk)  # the widest that divides it
        if tile < 16:  # the tensor cores' least
            tile = min(DEPTH, max(16, power_of_2(chunk)))
        return cls(tile_m, tile_n, tile, chunk, triton.cdiv(chunk, tile), *options)

    @property
    def options(self) -> dict[str, int]:
        """The launch's own."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@triton.jit
def _dot(a, b, total, part, ROUND: tl.constexpr):
    """One tile's products, onto the accumulator, or onto the chunk's sum if the accumulator is rounded."""
    if ROUND:
        # The last argument means nothing for FP16, but keeps the compiler from adding the chunk to the accumulator
        # within the tensor core, where the sum would be cut off rather than rounded.
        part = tl.dot(a, b, part, max_num_imprecise_acc=1)
    else:
        total = tl.dot(a, b, total)
    return total, part


@triton.jit
def _tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a program's tile. GROUP rows are walked together, so that they share columns in the cache."""
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = pid % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def _pixel(index, grid):
    """Sample, row and column of a row-major index of [N, *grid]."""
    return index // (grid[0] * grid[1]), index // grid[1] % grid[0], index % grid[1]


@triton.jit
def _tap(first, lane, channels, kernel, CHANNELS_INNER: tl.constexpr, ONE_TAP: tl.constexpr):
    """Channel and kernel offset at the places first + lane of a weight's row.

    CHANNELS_INNER: channels run fastest, as in channels_last memory, else offsets do. ONE_TAP: all lanes share an
    offset, which is then computed once.
    """
    index = first + lane
    if ONE_TAP:
        tap = first // channels
        same = tl.zeros_like(lane)
        # Not first % channels: of a remainder the compiler does not know what divides it, and so how wide to load.
        return first - tap * channels + lane, tap // kernel[1] + same, tap % kernel[1] + same
    if CHANNELS_INNER:
        tap = index // channels
        return index % channels, tap // kernel[1], tap % kernel[1]
    tap = index % (kernel[0] * kernel[1])
    return index // (kernel[0] * kernel[1]), tap // kernel[1], tap % kernel[1]


@triton.jit
def _big_offsets(n, c, p, q, r, s, geometry, strides):
    """Where the input's elements lie that offset (r, s) joins with output position (p, q), and if they are inside."""
    conv_input, _, _, stride, padding, dilation = geometry
    h = p * stride[0] - padding[0] + r * dilation[0]
    w = q * stride[1] - padding[1] + s * dilation[1]
    inside = (h >= 0) & (h < conv_input[0]) & (w >= 0) & (w < conv_input[1])
    return n * strides[0] + c * strides[1] + h * strides[2] + w * strides[3], inside


@triton.jit
def _small_offsets(n, k, h, w, r, s, geometry, strides):
    """Where the output's elements lie that offset (r, s) joins with input position (h, w), and if there are any."""
    _, conv_output, _, stride, padding, dilation = geometry
    y = h + padding[0] - r * dilation[0]
    x = w + padding[1] - s * dilation[1]
    p, q = y // stride[0], x // stride[1]
    there = (
        (y >= 0) & (y == p * stride[0]) & (p < conv_output[0]) & (x >= 0) & (x == q * stride[1]) & (q < conv_output[1])
    )
    return n * strides[0] + k * strides[1] + p * strides[2] + q * strides[3], there


@triton.jit
def _load_a(
    ptr,
    rows,
    first,
    lane,
    inside,
    group,
    in_channels,
    out_channels,
    geometry,
    strides,
    STEP: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    ONE_TAP: tl.constexpr,
):
    """A tile of the first operand: rows [M, 1] by the places first + lane [1, K] of the reduction."""
    if STEP == MATMUL:
        at = rows * strides[0] + (first + lane) * strides[1]
    elif STEP == FORWARD:
        n, p, q = _pixel(rows, geometry[1])
        c, r, s = _tap(first, lane, in_channels, geometry[2], CHANNELS_INNER, ONE_TAP)
        at, there = _big_offsets(n, group * in_channels + c, p, q, r, s, geometry, strides)
        inside = inside & there
    elif STEP == GRAD_INPUT:
        n, h, w = _pixel(rows, geometry[0])
        c, r, s = _tap(first, lane, out_channels, geometry[2], CHANNELS_INNER, ONE_TAP)
        r, s = geometry[2][0] - 1 - r, geometry[2][1] - 1 - s  # mirrored, as `accumulate` walks it
        at, there = _small_offsets(n, group * out_channels + c, h, w, r, s, geometry, strides)
        inside = inside & there
    else:
        n, p, q = _pixel(first + lane, geometry[1])
        at = n * strides[0] + (group * out_channels + rows) * strides[1] + p * strides[2] + q * strides[3]
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def _load_b(
    ptr,
    columns,
    first,
    lane,
    inside,
    group,
    in_channels,
    out_channels,
    geometry,
    strides,
    STEP: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    ONE_TAP: tl.constexpr,
):
    """A tile of the second operand: the places first + lane [K, 1] of the reduction by columns [1, N]."""
    if STEP == MATMUL:
        at = (first + lane) * strides[0] + columns * strides[1]
    elif STEP == FORWARD:
        c, r, s = _tap(first, lane, in_channels, geometry[2], CHANNELS_INNER, ONE_TAP)
        at = (group * out_channels + columns) * strides[0] + c * strides[1] + r * strides[2] + s * strides[3]
    elif STEP == GRAD_INPUT:
        c, r, s = _tap(first, lane, out_channels, geometry[2], CHANNELS_INNER, ONE_TAP)
        r, s = geometry[2][0] - 1 - r, geometry[2][1] - 1 - s
        at = (group * out_channels + c) * strides[0] + columns * strides[1] + r * strides[2] + s * strides[3]
    else:
        n, p, q = _pixel(first + lane, geometry[1])
        c, r, s = _tap(0, columns, in_channels, geometry[2], CHANNELS_INNER, False)
        at, there = _big_offsets(n, group * in_channels + c, p, q, r, s, geometry, strides)
        inside = inside & there
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def _product_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    bias_ptr,
    m,
    n,
    k,
    in_channels,
    out_channels,
    geometry,
    a_strides,
    b_strides,
    out_strides,
    split_stride,
    STEP: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    ONE_TAP: tl.constexpr,
    ROUND: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A matrix product [m, k] by [k, n] for each channel group, or a convolution's step that is one.

    bias: of each output channel, added to the float32 result, or None. in_channels, out_channels: of one group.
    geometry: pairs (conv_input, conv_output, kernel, stride, padding, dilation). ROUND: round the accumulator to
    binary16 after each chunk. SPLITS: parts of the reduction, each its own program, their results split_stride apart.
    """
    group = tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(m, TILE_M), tl.cdiv(n, TILE_N)
    tile_m, tile_n = _tile_of(tl.program_id(0), tiles_m, tiles_n, 8)
    rows = tile_m * TILE_M + tl.arange(0, TILE_M)[:, None]
    columns = tile_n * TILE_N + tl.arange(0, TILE_N)[None, :]
    steps = tl.cdiv(k, CHUNK)
    start = 0
    if SPLITS > 1:
        part_steps = tl.cdiv(steps, SPLITS)
        start = tl.program_id(2) * part_steps
        steps = tl.minimum(steps, start + part_steps)
        out_ptr += tl.cast(tl.program_id(2), tl.int64) * split_stride

    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for chunk in range(start, steps):
        part = tl.zeros((TILE_M, TILE_N), tl.float32)
        for i in range(PARTS):
            lane = tl.arange(0, TILE_K)
            first = chunk * CHUNK + i * TILE_K
            inside = first + lane < k
            if CHUNK % TILE_K:
                inside = inside & (i * TILE_K + lane < CHUNK)
            a_mask = (rows < m) & inside[None, :]
            b_mask = inside[:, None] & (columns < n)
            a = _load_a(
                a_ptr, rows, first, lane[None, :], a_mask, group, in_channels, out_channels, geometry, a_strides,
                STEP, CHANNELS_INNER, ONE_TAP,
            )  # fmt: skip
            b = _load_b(
                b_ptr, columns, first, lane[:, None], b_mask, group, in_channels, out_channels, geometry, b_strides,
                STEP, CHANNELS_INNER, ONE_TAP,
            )  # fmt: skip
            total, part = _dot(a, b, total, part, ROUND)
        if ROUND:
            total = (total + part).to(tl.float16).to(tl.float32)

    if bias_ptr is not None:
        output_channels = n if STEP == MATMUL else out_channels if STEP == FORWARD else in_channels
        total += tl.load(bias_ptr + group * output_channels + columns, mask=columns < n, other=0.0).to(tl.float32)
    if STEP == MATMUL:
        at = rows * out_strides[0] + columns * out_strides[1]
    elif STEP == GRAD_WEIGHT:
        c, r, s = _tap(0, columns, in_channels, geometry[2], CHANNELS_INNER, False)
        at = (group * out_channels + rows) * out_strides[0] + c * out_strides[1]
        at += r * out_strides[2] + s * out_strides[3]
    else:
        grid, channels = (geometry[1], out_channels) if STEP == FORWARD else (geometry[0], in_channels)
        sample, y, x = _pixel(rows, grid)
        at = sample * out_strides[0] + (group * channels + columns) * out_strides[1]
        at += y * out_strides[2] + x * out_strides[3]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=(rows < m) & (columns < n))


_matmul_kernel = triton.jit(_product_kernel.fn, do_not_specialize=["m"])
"""The same for matrix products, of which m is mostly a batch: another one compiles nothing."""


class Problem(NamedTuple):
    """One product, as `_product_kernel` is to see it."""

    step: int
    shape: tuple[int, ...]
    """of the result"""
    m: int
    n: int
    k: int
    a_strides: tuple[int, ...]
    b_strides: tuple[int, ...]
    groups: int = 1
    in_channels: int = 1
    out_channels: int = 1
    geometry: tuple[tuple[int, int], ...] = ((1, 1),) * 6
    channels_inner: bool = False

    def tiles(self, chunk: int | None, configs: Configs) -> Tiles:
        """How it is cut."""
        gathers = not self.channels_inner and self.step != MATMUL.value
        return Tiles.of(self.m, self.n, self.k, chunk, configs.gathered if gathers else configs.streamed)

    def splits(self, programs: int, tiles: Tiles, processors: int) -> int:
        """Into how many parts to cut the reduction so that two programs run on each multiprocessor, of 8 tiles each."""
        return max(1, min(2 * processors // max(1, programs), self.k // (8 * tiles.k), 64))

    def reduction(self, tiles: Tiles) -> dict[str, Any]:
        """The options by which the reduction is walked."""
        channels = self.in_channels if self.step == FORWARD.value else self.out_channels
        return {
            "STEP": self.step,
            "CHANNELS_INNER": self.channels_inner,
            "ONE_TAP": self.channels_inner and channels % tiles.k == 0,
            "TILE_K": tiles.k,
            "CHUNK": tiles.chunk,
            "PARTS": tiles.parts,
        }


class Plan(NamedTuple):
    """How a problem is computed: its launch, and where the results go."""

    tiles: Tiles
    splits: int
    launch: Launch
    memory: tuple[int, ...]
    """the result's dimensions in the order of memory: channels last where they are innermost"""

    def empty(self, dtype: torch.dtype, device: torch.device, inner: bool) -> Tensor:
        """[splits, *shape]"""
        out = torch.empty(self.memory, dtype=dtype, device=device)
        return out.movedim(-1, 2) if inner else out


@lru_cache(maxsize=1024)
def _plan(problem: Problem, chunk: int | None, device: torch.device, configs: Configs, processors: int) -> Plan:
    tiles = problem.tiles(chunk, configs)
    programs = triton.cdiv(problem.m, tiles.m) * triton.cdiv(problem.n, tiles.n)
    splits = problem.splits(programs * problem.groups, tiles, processors) if chunk is None else 1
    shape = problem.shape
    memory = (splits, *((shape[0], *shape[2:], shape[1]) if problem.channels_inner else shape))
    like = Plan(tiles, splits, None, memory).empty(torch.float32, torch.device("meta"), problem.channels_inner)  # type: ignore[arg-type]
    launch = Launch(
        device,
        _matmul_kernel if problem.step == MATMUL.value else _product_kernel,
        (programs, problem.groups, splits),
        problem.m,
        problem.n,
        problem.k,
        problem.in_channels,
        problem.out_channels,
        problem.geometry,
        problem.a_strides,
        problem.b_strides,
        like.stride()[1:],
        like.stride(0),
        ROUND=chunk is not None,
        SPLITS=splits,
        TILE_M=tiles.m,
        TILE_N=tiles.n,
        **problem.reduction(tiles),
        **tiles.options,
    )
    return Plan(tiles, splits, launch, memory)


def _run(
    problem: Problem,
    a: Tensor,
    b: Tensor,
    chunk: int | None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """A problem's product, in its shape."""
    _check(a, b, problem.shape, chunk, dtype, bias)
    plan = _plan(problem, chunk, a.device, CONFIGS, processors(a.device))
    out = plan.empty(dtype if plan.splits == 1 else torch.float32, a.device, problem.channels_inner)
    if 0 in (problem.m, problem.n):
        return out[0].to(dtype)
    plan.launch(a, b, out, bias if plan.splits == 1 else None)
    if plan.splits == 1:
        return out[0]
    # in the order of memory, which a sum would not keep
    total = out.movedim(2, -1).sum(0).movedim(-1, 1) if problem.channels_inner else out.sum(0)
    if bias is not None:
        total += bias.reshape(-1, *(1 for _ in problem.shape[2:]))
    return total.to(dtype)


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """a @ b + bias, as `accumulate.reduce` walks it.

    Args:
        a: float16 [M, K], any strides.
        b: float16 [K, N], any strides.
        bias: float32 or float16 [N], added in float32; or None.
        chunk: products whose FP32 sum is added to the accumulator before that is rounded to binary16; None leaves
            the accumulator in FP32.
        dtype: of the result, float32 or float16.

    Returns:
        [M, N], contiguous.

    Raises:
        TypeError, ValueError: a dtype, shape, chunk or device that the kernel does not take.
        RuntimeError: the tensors are not on a GPU.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"expected [M, K] and [K, N], got {list(a.shape)} and {list(b.shape)}")
    m, n, k = a.shape[0], b.shape[1], a.shape[1]
    problem = Problem(MATMUL.value, (m, n), m, n, k, a.stride(), b.stride())
    return _run(problem, a, b, chunk, dtype, bias)


def conv_forward(
    conv_input: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A convolution's forward (a transposed one's grad_input), as `accumulate.conv_forward` walks it.

    Args:
        conv_input: float16 [N, C, *conv_input], contiguous or channels_last.
        weight: float16 [K, C / groups, *kernel].
        geometry: `ConvShape.pack()`, of at most two dimensions.
        bias: float32 or float16 [K], added in float32; or None.
        chunk, dtype: as in `matmul`.

    Returns:
        [N, K, *output]; channels_last if `conv_input` is and the accumulator is not rounded.

    Raises:
        As `matmul`; ValueError also if a tensor does not fit the geometry, or that has three dimensions.
    """
    shape = _Shape.of(geometry)
    conv_input, weight = shape.fit(conv_input=conv_input, weight=weight)
    inner = chunk is None and _channels_last(conv_input)
    problem = shape.problem(FORWARD, conv_input, weight, "conv_output", inner)
    return shape.unpadded(_run(problem, conv_input, weight, chunk, dtype, bias))


def conv_grad_input(
    conv_output: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A convolution's grad_input (a transposed one's forward), as `accumulate.conv_grad_input` walks it.

    Args:
        conv_output: float16 [N, K, *conv_output], contiguous or channels_last.
        weight, geometry, chunk, dtype: as in `conv_forward`.
        bias: float32 or float16 [C], added in float32; or None.

    Returns:
        [N, C, *input]; channels_last if `conv_output` is and the accumulator is not rounded.
    """
    shape = _Shape.of(geometry)
    conv_output, weight = shape.fit(conv_output=conv_output, weight=weight)
    inner = chunk is None and _channels_last(conv_output)
    problem = shape.problem(GRAD_INPUT, conv_output, weight, "conv_input", inner)
    return shape.unpadded(_run(problem, conv_output, weight, chunk, dtype, bias))


def conv_grad_weight(
    conv_input: Tensor,
    conv_output: Tensor,
    geometry: Sequence[int],
    *,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The grad_weight of either convolution, as `accumulate.conv_grad_weight` walks it.

    Args:
        conv_input, conv_output, geometry, chunk, dtype: as in `conv_forward` and `conv_grad_input`.

    Returns:
        [K, C / groups, *kernel]; channels_last if `conv_input` is.
    """
    shape = _Shape.of(geometry)
    conv_input, conv_output = shape.fit(conv_input=conv_input, conv_output=conv_output)
    inner = _channels_last(conv_input)  # the reduction is over positions, so that this order is free
    problem = shape.problem(GRAD_WEIGHT, conv_output, conv_input, "weight", inner)
    return shape.unpadded(_run(problem, conv_output, conv_input, chunk, dtype))


class _Shape(NamedTuple):
    """A geometry in two dimensions."""

    geometry: ConvShape
    dims: int
    """that the convolution has"""

    @classmethod
    def of(cls, packed: Sequence[int]) -> _Shape:
        return cls(in_dims(tuple(packed), 2), (len(packed) - 4) // 6)

    def problem(self, step: tl.constexpr, a: Tensor, b: Tensor, result: str, inner: bool) -> Problem:
        """One of the steps as a product; `result` is the tensor that it makes."""
        g = self.geometry
        channels = g.in_channels // g.groups, g.out_channels // g.groups
        conv_input, conv_output, offsets = g.batch * prod(g.conv_input), g.batch * prod(g.conv_output), prod(g.kernel)
        mnk = {
            "conv_output": (conv_output, channels[1], channels[0] * offsets),
            "conv_input": (conv_input, channels[0], channels[1] * offsets),
            "weight": (channels[1], channels[0] * offsets, conv_output),
        }[result]
        pairs = g.conv_input, g.conv_output, g.kernel, g.stride, g.padding, g.dilation
        return Problem(step.value, g.shape(result), *mnk, a.stride(), b.stride(), g.groups, *channels, pairs, inner)

    def unpadded(self, x: Tensor) -> Tensor:
        """A tensor without the dimensions that were put there to make two."""
        return x if self.dims == 2 else x.reshape(*x.shape[:2], *x.shape[4 - self.dims :])

    def fit(self, **tensors: Tensor) -> list[Tensor]:
        """The tensors with two dimensions; ValueError if one does not have the geometry's shape."""
        for name, tensor in tensors.items():
            shape = self.geometry.shape(name)
            expected = (*shape[:2], *shape[4 - self.dims :])
            if tensor.shape != expected:
                raise ValueError(f"{name} is {list(tensor.shape)}; the geometry says {list(expected)}")
        return [x if self.dims == 2 else x.reshape(self.geometry.shape(name)) for name, x in tensors.items()]


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1 and prod(x.shape[2:]) > 1


def _check(
    a: Tensor, b: Tensor, result: tuple[int, ...], chunk: int | None, dtype: torch.dtype, bias: Tensor | None
) -> None:
    check_dtype((torch.float16,), first=a, second=b)
    check_dtype((torch.float16, torch.float32), result=dtype)
    check_device(first=a, second=b, bias=bias)
    if bias is not None:
        check_dtype((torch.float16, torch.float32), bias=bias)
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk has at least one product, not {chunk}")
    for tensor in (a, b):
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if reach >= INT32:
            raise ValueError(f"{list(tensor.shape)} is larger than the kernel's 32-bit offsets reach")
    if prod(result) >= INT32:
        raise ValueError(f"a result of {list(result)} is larger than the kernel's 32-bit offsets reach")
