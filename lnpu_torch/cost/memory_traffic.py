"""Bits that a step moves through SRAM and DRAM.

Each group of a step is a product of its own: two operands and a result, of which one stays in SRAM while the others
pass by. If either operand fits, or the result's partial sums do, both operands are fetched once. Else the plan is that
of these which fetches least:

- An operand stays in parts, and the other one is fetched again for every part.
- The result stays in tiles, n by m of them. A tile takes one of n parts of the second operand and one of m parts of the
  first, so that the first operand is fetched n times and the second m times.

Only elements that are used are fetched: those that a strided kernel steps over are not.

A tensor is not fetched at all if SRAM still holds it: if it, and all that has passed since it was there, fit beside the
tensor that stays. Otherwise it was written to DRAM, and comes from there.

The plan is made in dense FP16, before the zeros are known. So it depends only on the sizes of a call, bits are linear
in what was counted, and a sum of runs moves the sum of their bits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

from lnpu_torch.counts.schema import Calls, StepCounts, Triple
from lnpu_torch.counts.vector_ops import VectorOp
from lnpu_torch.files import MOST
from lnpu_torch.hardware.chip import Chip, Storage

FP16_BITS = 16


class Context(NamedTuple):
    """Where a layer's operands come from.

    `outside`: its input comes from outside the chip, as that of a model's first layer. `error_is_new`: grad_weight is
    the first step to read its error, as nobody asked for grad_input.
    """

    outside: bool
    error_is_new: bool


def bits_moved(entry: StepCounts, chip: Chip, context: Context) -> dict[str, int]:
    """Bits of one step by kind, as `CostRow.bits` names them; empty if the sizes of its calls were not recorded.

    DRAM: operands that SRAM does not hold are read as often as they are fetched. An activation or error was written
    once, by whoever made it, in the format in which it is read; so its write is added to the step that is the first to
    read it from DRAM. grad_weight writes the gradient, in FP16.

    SRAM: what comes is written, what goes is written and read. Reading towards the multipliers is part of a MAC.
    """
    if not entry.by_size and any(entry.first.elements):
        return {}
    read = write = dense = 0
    for calls in entry.by_size:
        came, went = _moved(entry.step, calls, chip, _stored(calls, chip.storage), context)
        read, write = read + came, write + went
        dense += sum(_moved(entry.step, calls, chip, _dense(calls), context))
    memory = {"dram_read": read, "dram_write": write, "dense_dram": dense}
    return {"sram_read": write, "sram_write": read + write, **memory}


def vector_bits(entry: VectorOp, chip: Chip, width: int) -> dict[str, int]:
    """Bits that the calls of a vector op move, of words of so many bits, by kind.

    Operands come from SRAM and results go there; in an update each tensor once a step. What SRAM does not hold comes
    from DRAM and is written to SRAM first, and what it cannot keep is read from it last. Where the order was not
    recorded, an update alone moves anything from and to DRAM, its elements being words.
    """
    if entry.uses is None:
        read, written, came, went = entry.read, entry.written, entry.fetched, entry.stored
    else:
        missed = [use for use in entry.uses if use[0] > capacity(chip)]
        came, went = sum(use[1] for use in missed), sum(use[2] for use in missed)
        read, written = entry.read, entry.written
        if entry.phase == "update":
            read, written = sum(use[1] for use in entry.uses), sum(use[2] for use in entry.uses)
    bits = {"sram_read": width * (read + went), "sram_write": width * (written + came)}
    if entry.uses is None and entry.phase != "update":
        return bits
    return {**bits, "dram_read": width * came, "dram_write": width * went, "dense_dram": width * (came + went)}


def dram_cycles(bits: Mapping[str, int], chip: Chip) -> float | None:
    """Cycles in which these bits come from DRAM and go there; None if no DRAM is among them."""
    if "dram_read" not in bits:
        return None
    return (bits["dram_read"] + bits["dram_write"]) / (8 * chip.dram_bytes_per_s.value) * chip.clock_hz


def capacity(chip: Chip) -> int:
    """Words of 16 bits that fit into SRAM."""
    return 8 * chip.sram_bytes.value // FP16_BITS


EXACT = 4096
"""Rows and columns of tiles up to which every number is tried; then each is a hundredth larger than the last."""


def _sides() -> tuple[int, ...]:
    sides = [*range(1, EXACT + 1)]
    while sides[-1] < 32 * MOST:
        sides.append(sides[-1] * 101 // 100)
    return tuple(sides)


SIDES = _sides()
"""Numbers of rows or columns of tiles that are tried; they do not depend on SRAM's size, so more of it never hurts."""


class Tensors(NamedTuple):
    """Elements of a call's operands and of its result: all of them, and those of one group that are used."""

    whole: Triple
    group: Triple

    @classmethod
    def of(cls, calls: Calls) -> Tensors:
        """The tensors of one of these calls."""
        first, second, result = (-(-used // calls.groups) for used in calls.used or calls.sizes)
        return cls(calls.sizes, (first, second, result))

    def ordered(self, a: int, b: int, c: int) -> Tensors:
        """The tensors in another order, as another step of the layer has them."""
        return Tensors(*((each[a], each[b], each[c]) for each in self))


def fetches(group: Triple, chip: Chip) -> tuple[int, int]:
    """How often the first and the second operand are fetched for a product of these elements."""
    return _fetches(group, 8 * chip.sram_bytes.value, chip.storage.partial_sum_bits.value)


@lru_cache(maxsize=4096)
def _fetches(group: Triple, room: int, partial_sum_bits: int) -> tuple[int, int]:
    first, second, result = group

    def parts(bits: int) -> int:
        return max(1, -(-bits // room))

    def words(often: tuple[int, int]) -> tuple[int, int, int]:
        return often[0] * first + often[1] * second, often[1], often[0]  # of two alike, the first operand comes again

    plans = [(parts(FP16_BITS * second), 1), (1, parts(FP16_BITS * first))]
    tiles = parts(partial_sum_bits * result)
    # the best grid has at most so many rows, or columns; beyond EXACT, grids are too many to try all
    most = isqrt(tiles) + 1 if tiles <= EXACT**2 else tiles
    for few in SIDES[: bisect_right(SIDES, most)]:
        many = -(-tiles // few)
        plans += [(few, many), (many, few)]
    return min(plans, key=words)


def stays(place: int, passed: int, tensors: Tensors, chip: Chip) -> bool:
    """Whether SRAM holds a tensor of a call from before, or until later, though so much passes meanwhile.

    Args:
        place: of the tensor: first operand, second operand, result.
        passed: words of 16 bits.
    """
    partial_sums = chip.storage.partial_sum_bits.value * tensors.group[2]
    kept = (FP16_BITS * tensors.group[0], FP16_BITS * tensors.group[1], partial_sums)
    plan = min(kept)
    if place < 2 and kept[place] == plan:  # an operand that stays during the step anyway
        plan = 0
    return FP16_BITS * (tensors.whole[place] + passed) + plan <= 8 * chip.sram_bytes.value


def _moved(step: str, calls: Calls, chip: Chip, bits: tuple[int, int], context: Context) -> tuple[int, int]:
    """Bits from and to DRAM, for operands of so many bits."""
    tensors = Tensors.of(calls)
    shares = zip(calls.used or calls.sizes, calls.sizes, strict=True)
    fetched = [
        -(-often * each * used // size) if size else 0  # rounded up to a bit
        for often, each, (used, size) in zip(fetches(tensors.group, chip), bits, shares, strict=False)
    ]

    def here(place: int, passed: int, tensors: Tensors = tensors) -> bool:
        return calls.passed is not None and stays(place, passed, tensors, chip)

    (first, _, result), (since_first, since_second, until_used) = calls.sizes, calls.passed or (0, 0, 0)
    if step != "grad_weight":
        read = 0 if here(1, since_second) else fetched[1]
        if here(0, since_first) and not (step == "forward" and context.outside):
            return read, 0
        return read + fetched[0], bits[0]
    read, write = 0, 0 if here(2, until_used) else FP16_BITS * result * calls.count
    if not here(0, since_first):
        held = here(0, 0, tensors.ordered(0, 2, 1)) and not context.outside  # in forward, so it is not in DRAM yet
        read, write = read + fetched[0], write + (bits[0] if held else 0)
    if not here(1, since_second if context.error_is_new else since_second + first + result):
        held = context.error_is_new or here(0, 0, tensors.ordered(1, 2, 0))  # in grad_input
        read, write = read + fetched[1], write + (bits[1] if held else 0)
    return read, write


def _stored(calls: Calls, storage: Storage) -> tuple[int, int]:
    """Bits of both operands as the chip stores them."""
    per_element = (storage.zero_bits.value, storage.fp8_bits.value, storage.fp16_bits.value)
    first, second = (sum(n * bits for n, bits in zip(x, per_element, strict=True)) for x in (calls.first, calls.second))
    return first, second


def _dense(calls: Calls) -> tuple[int, int]:
    """Bits of both operands in dense FP16."""
    return FP16_BITS * sum(calls.first), FP16_BITS * sum(calls.second)
