"""Bits that a step moves through SRAM and DRAM.

Of a step's three tensors - two operands and a result - one stays in SRAM while the others pass by:

- If the smaller operand fits, or the result does, it stays, and both operands are fetched once.
- Else it stays in parts. Either the smaller operand stays, and the larger is fetched again for every part; or the
  result stays, and the smaller operand is fetched again. The one that fetches less is taken.

The plan is made in dense FP16, before the zeros are known. So it depends only on the sizes of a call, bits are linear
in what was counted, and a sum of runs moves the sum of their bits.
"""

from __future__ import annotations

from lnpu_torch.counts.schema import Calls, StepCounts, Triple
from lnpu_torch.hardware.chip import Chip, Storage

FP16_BITS = 16


def bits_moved(entry: StepCounts, chip: Chip, *, error_is_new: bool) -> dict[str, int]:
    """Bits of one step by kind, as `CostRow.bits` names them; empty if the sizes of its calls were not recorded.

    DRAM: operands are read as often as they are fetched. An activation or error was written once, by whoever made it,
    in the format in which it is read; so its write is added to the step that reads it first: a layer's input on
    forward, its error on grad_input. grad_weight writes the gradient, in FP16.

    SRAM: what comes is written, what goes is written and read. Reading towards the multipliers is part of a MAC.

    Args:
        error_is_new: grad_weight is the first step to read this layer's error, as nobody asked for grad_input.
    """
    if not entry.by_size and any(entry.first.elements):
        return {}
    read = write = dense = 0
    for calls in entry.by_size:
        came, went = _moved(entry.step, calls, chip, _stored(calls, chip.storage), error_is_new)
        read, write = read + came, write + went
        dense += sum(_moved(entry.step, calls, chip, _dense(calls), error_is_new))
    memory = {"dram_read": read, "dram_write": write, "dense_dram": dense}
    return {"sram_read": write, "sram_write": read + write, **memory}


def fetches(sizes: Triple, chip: Chip) -> tuple[int, int]:
    """How often the first and the second operand are fetched in a call of these sizes."""
    first, second, result = sizes
    capacity = 8 * chip.sram_bytes.value
    smaller, larger = FP16_BITS * min(first, second), FP16_BITS * max(first, second)
    partial_sums = chip.storage.partial_sum_bits.value * result
    if min(smaller, partial_sums) <= capacity:
        return 1, 1
    if partial_sums < larger:
        again, first_again = -(-partial_sums // capacity), first <= second
    else:
        again, first_again = -(-smaller // capacity), first > second
    return (again, 1) if first_again else (1, again)


def _moved(step: str, calls: Calls, chip: Chip, bits: tuple[int, int], error_is_new: bool) -> tuple[int, int]:
    """Bits from and to DRAM, for operands of so many bits."""
    often, result = fetches(calls.sizes, chip), FP16_BITS * calls.sizes[2] * calls.count
    read = often[0] * bits[0] + often[1] * bits[1]
    if step == "grad_weight":
        return read, result + (bits[1] if error_is_new else 0)
    if chip.storage.results.value == "through_dram":
        return read + result, bits[0] + result
    return read, bits[0]


def _stored(calls: Calls, storage: Storage) -> tuple[int, int]:
    """Bits of both operands as the chip stores them."""
    per_element = (storage.zero_bits.value, storage.fp8_bits.value, storage.fp16_bits.value)
    first, second = (sum(n * bits for n, bits in zip(x, per_element, strict=True)) for x in (calls.first, calls.second))
    return first, second


def _dense(calls: Calls) -> tuple[int, int]:
    """Bits of both operands in dense FP16."""
    return FP16_BITS * sum(calls.first), FP16_BITS * sum(calls.second)
