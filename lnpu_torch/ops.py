"""The registered torch ops that the layers are made of. Opaque to compilers, so that no rounding is optimised away.

Each picks its implementation by device; every one of them gives the bits of `reference` and `counting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lnpu_torch import counting, reference
from lnpu_torch.formats import FORMATS
from lnpu_torch.geometry import Geometry
from lnpu_torch.precision import Rule


@lru_cache(maxsize=256)
def _rule(text: str) -> Rule:
    return Rule.model_validate_json(text)


@torch.library.custom_op("lnpu::quantize", mutates_args=())
def quantize(x: Tensor, threshold: Tensor, seed: Tensor | None, rule: str, stream: int) -> tuple[Tensor, Tensor]:
    """Round by a rule (its JSON): the rounded tensor in `reference.compute_dtype(x)`, and each element's group."""
    random = None if seed is None else reference.random_bits(x.shape, seed, stream)
    return reference.quantize(x, _rule(rule), threshold, random)


@quantize.register_fake
def _(x: Tensor, threshold: Tensor, seed: Tensor | None, rule: str, stream: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=reference.compute_dtype(x)), torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("lnpu::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_seed(x: Tensor) -> Tensor:
    """A key for `reference.random_bits`, from torch's generator of x's device: the same compiled or not."""
    return torch.randint(2**62, (), device=x.device)


@draw_seed.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.int64)


@torch.library.custom_op("lnpu::next_threshold", mutates_args=("states",))
def next_threshold(x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Tensor:
    """The T to use for x now. In training also chooses the next one, from x.

    Args:
        states: int32 [rows, 2], T in use and T to come; `reference.UNSET` before the first step, which uses its own T.
    """
    current = states[row, 0]
    chosen = reference.choose_threshold(x, _rule(rule), current)
    used = torch.where(current == reference.UNSET, chosen, current)
    if training:
        states[row] = torch.stack((used, chosen))
    return torch.where(used == reference.UNSET, _rule(rule).threshold_range[0], used)


@next_threshold.register_fake
def _(x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Tensor:
    return states.new_empty(())


@torch.library.custom_op("lnpu::commit_thresholds", mutates_args=("states",))
def commit_thresholds(states: Tensor) -> None:
    """Put the T's to come into use: [..., 2], after the layer's backward."""
    states[..., 0] = states[..., 1]


@torch.library.custom_op("lnpu::round_result", mutates_args=())
def round_result(x: Tensor, form: str) -> Tensor:
    """Round a step's result to a format, nearest, overflow to infinity."""
    if form == "fp16" and x.dtype == torch.float32:
        return x.half().float()
    return reference.round_to(x, FORMATS[form])


@round_result.register_fake
def _(x: Tensor, form: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lnpu::float_groups", mutates_args=())
def float_groups(x: Tensor) -> Tensor:
    """Groups of an operand left in float: 0 for zeros, 16 for the rest."""
    return reference.float_groups(x)


@float_groups.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("lnpu::grid_sums", mutates_args=())
def grid_sums(groups: Tensor, channel_groups: int, sample: bool) -> tuple[Tensor, Tensor]:
    """`counting.per_position` of a grid [N, C, *grid], and `counting.per_sample` if asked for (else empty)."""
    position = counting.per_position(groups)
    return position, counting.per_sample(groups, channel_groups) if sample else position.new_empty(0)


@grid_sums.register_fake
def _(groups: Tensor, channel_groups: int, sample: bool) -> tuple[Tensor, Tensor]:
    batch, channels, *grid = groups.shape
    shape = (2, batch, channel_groups, *grid) if sample else (0,)
    return groups.new_empty((2, channels, *grid), dtype=torch.int32), groups.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("lnpu::weight_sums", mutates_args=())
def weight_sums(groups: Tensor, channel_groups: int) -> tuple[Tensor, Tensor]:
    """`counting.per_weight` of a weight over its small and over its big channels."""
    return tuple(counting.per_weight(groups, channel_groups, over) for over in ("small", "big"))  # type: ignore[return-value]


@weight_sums.register_fake
def _(groups: Tensor, channel_groups: int) -> tuple[Tensor, Tensor]:
    small, big, *kernel = groups.shape
    shapes = ((2, big * channel_groups, *kernel), (2, small, *kernel))
    return groups.new_empty(shapes[0], dtype=torch.int32), groups.new_empty(shapes[1], dtype=torch.int32)


@torch.library.custom_op("lnpu::count_grid_by_weight", mutates_args=("counter",))
def count_grid_by_weight(counter: Tensor, position: Tensor, weight: Tensor, geometry: Sequence[int], side: str) -> None:
    """Add a step that multiplies a grid ("big" or "small") by the weight to a counter, int64 [counting.WIDTH]."""
    shape = Geometry.unpack(geometry)
    table = counting.grid_by_weight(position, weight, shape, side)
    grid = shape.elements("big" if side == "big" else "small")
    first, second = counting.elements(position, grid), counting.elements(weight, shape.elements("weight"))
    _add(counter, shape, table, first, second)


@torch.library.custom_op("lnpu::count_grid_by_grid", mutates_args=("counter",))
def count_grid_by_grid(
    counter: Tensor, big: Sequence[Tensor], small: Sequence[Tensor], geometry: Sequence[int], first: str
) -> None:
    """Add a step that multiplies two grids to a counter; each is its `grid_sums`, `first` names the first operand."""
    shape = Geometry.unpack(geometry)
    table = counting.grid_by_grid(big[1], small[1], big[0], small[0], shape)
    counts = {"big": counting.elements(big[0], shape.elements("big"))}
    counts["small"] = counting.elements(small[0], shape.elements("small"))
    second = "small" if first == "big" else "big"
    _add(counter, shape, table if first == "big" else table.T, counts[first], counts[second])


@torch.library.custom_op("lnpu::count_not_run", mutates_args=("counter",))
def count_not_run(counter: Tensor, slots: int) -> None:
    """Add a step that nobody asked for, such as the first layer's grad_input."""
    counter[:4] += counter.new_tensor((1, slots, 0, slots))


def _add(counter: Tensor, geometry: Geometry, table: Tensor, first: Tensor, second: Tensor) -> None:
    head = counter.new_tensor((1, geometry.slots, geometry.slots - geometry.inside, 0))
    counter += torch.cat((head, table.flatten(), first, second))
