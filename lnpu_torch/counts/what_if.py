"""What a run would do with other zeros, or in other batches: counts made from counts, and marked as an estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import reduce
from typing import Any, NamedTuple

from lnpu_torch.counts.densities import (
    STAYS,
    Densities,
    Transition,
    moved,
    moved_pairs,
    transition,
    whole,
)
from lnpu_torch.counts.lane_profile import LaneProfile
from lnpu_torch.counts.schema import (
    OPERANDS,
    Calls,
    Counts,
    Operand,
    Step,
    StepCounts,
    Triple,
    add_groups,
    add_tables,
)
from lnpu_torch.counts.vector_ops import NEVER, SUMS, Use, VectorOp, VectorOpCounts, rounded, sum_uses
from lnpu_torch.files import ConfigError, validate

ZEROS_AT_RANDOM = "zeros and FP8 elements from given densities, independent of each other"


def densities(counts: Counts) -> Densities:
    """The densities of each layer's operands in each step that has elements."""
    layers: dict[str, dict[str, Any]] = {}
    for entry in counts.steps:
        found = {name: _density(each.elements) for name, each in _operands(entry) if sum(each.elements)}
        if found:
            layers.setdefault(entry.layer, {})[entry.step] = found
    return validate(Densities, {"layers": layers}, "densities")


def _density(elements: Triple) -> dict[str, float]:
    zero, fp8, wide = elements
    fp8_share = {"fp8": fp8 / (fp8 + wide)} if fp8 + wide else {}
    return {"nonzero": (fp8 + wide) / (zero + fp8 + wide), **fp8_share}


def _operands(entry: StepCounts) -> tuple[tuple[str, Operand], tuple[str, Operand]]:
    first, second = OPERANDS[entry.step]
    return (first, entry.first), (second, entry.second)


def with_sparsity(counts: Counts, wanted: Densities | Mapping[str, Any]) -> Counts:
    """`Counts.with_sparsity`."""
    asked = wanted if isinstance(wanted, Densities) else validate(Densities, dict(wanted), "densities")
    asked.check(dict.fromkeys(entry.layer for entry in counts.steps))
    steps = tuple(_with_densities(entry, asked) for entry in counts.steps)
    return _estimated(counts, ZEROS_AT_RANDOM, steps=steps)


def _estimated(counts: Counts, how: str, **changes: Any) -> Counts:
    known = (counts.estimate or "").split("; ")
    estimate = counts.estimate if how in known else "; ".join(filter(None, (*known, how)))
    return counts.model_copy(update={**changes, "estimate": estimate})


def _with_densities(entry: StepCounts, asked: Densities) -> StepCounts:
    by = [transition(each.elements, asked.of(entry.layer, entry.step, name)) for name, each in _operands(entry)]
    if all(each == STAYS for each in by):
        return entry
    by_size = tuple(_calls(calls, *by) for calls in entry.by_size)
    tables = [calls.pairs for calls in by_size if calls.pairs]
    all_known = tables and len(tables) == len(by_size)
    return entry.model_copy(
        update={
            "pairs": reduce(add_tables, tables) if all_known else moved_pairs(entry.pairs, *by),
            "first": _operand(entry.first, by[0], [calls.first for calls in by_size]),
            "second": _operand(entry.second, by[1], [calls.second for calls in by_size]),
            "by_size": by_size,
        }
    )


def _calls(calls: Calls, first: Transition, second: Transition) -> Calls:
    pairs = calls.pairs and moved_pairs(calls.pairs, first, second)
    groups = {"first": moved(calls.first, first), "second": moved(calls.second, second)}
    return calls.model_copy(update={**groups, "pairs": pairs})


def _operand(operand: Operand, by: Transition, parts: Sequence[Triple]) -> Operand:
    """An operand after a transition; the sum of its parts by the size of calls, if those are known."""
    elements = reduce(add_groups, parts) if parts else moved(operand.elements, by)
    lanes = operand.lanes and _lanes(operand.lanes, sum(elements[1:]))
    return operand.model_copy(update={"elements": elements, "lanes": lanes})


def _lanes(profile: LaneProfile, work: int) -> LaneProfile:
    """Lanes that wait as much for each non-zero as they did; not at all, if there was none."""
    before = profile.work
    cycles = [-(-each * work // before) if before else work for each in profile.cycles_by_config]
    return profile.model_copy(update={"cycles_by_config": tuple(cycles)})


class Batches(NamedTuple):
    """Samples of one call before, and of each call now."""

    was: int
    now: int


def with_batch(counts: Counts, batch: int, was: int) -> Counts:
    """`Counts.with_batch`."""
    for name, value in (("batch", batch), ("was", was)):
        if value < 1:
            raise ConfigError(f"{name}: {value} samples; a batch has 1 or more")
    batches, words = Batches(was, batch), _words(counts)
    steps = tuple(_rebatched(entry, batches, words) for entry in counts.steps)
    calls = [(sum(e.calls for e in each if e.by_size)) for each in (counts.steps, steps)]
    ratio = Fraction(calls[1], calls[0]) if calls[0] else Fraction(1)
    vector_ops = counts.vector_ops
    if isinstance(vector_ops, VectorOpCounts):
        entries = tuple(_vector_op(each, batches, words, ratio) for each in vector_ops.entries)
        vector_ops = vector_ops.model_copy(update={"entries": entries})
    return _estimated(counts, f"batch {batch} in place of {was}", steps=steps, vector_ops=vector_ops)


WEIGHT: dict[Step, int] = {"forward": 1, "grad_input": 1, "grad_weight": 2}
"""The place of the weight, or of its gradient, among a call's sizes; the other two grow with the batch."""


class Words(NamedTuple):
    """Words that pass whatever the batch: weights between a layer's forward and backward, and in a whole period."""

    saved: dict[str, int]
    period: int


def _words(counts: Counts) -> Words:
    """Each layer's weights pass in forward, and twice in backward; and what an update moves, once."""
    weights = {entry.layer: entry.by_size[0].sizes[WEIGHT[entry.step]] for entry in counts.steps if entry.by_size}
    trained = any(entry.step != "forward" for entry in counts.steps)
    whole_pass, saved = (3 if trained else 1) * sum(weights.values()), dict[str, int]()
    later = whole_pass
    for layer, words in weights.items():
        later -= 3 * words
        saved[layer] = later + words if trained else 0
    first = next((entry.calls for entry in counts.steps if entry.by_size), 0)
    entries = counts.vector_ops.entries if isinstance(counts.vector_ops, VectorOpCounts) else ()
    updates = [Use._make(use) for each in entries if each.phase == "update" for use in each.uses or ()]
    return Words(saved, whole_pass + (sum(use.read + use.written for use in updates) // first if first else 0))


def _scaled(distance: int, words: int, batches: Batches) -> int:
    """What passes in other batches, of which so many words do not depend on them."""
    if distance >= NEVER:
        return distance
    words = min(words, distance)
    return rounded(words + (distance - words) * batches.now // batches.was)


def _rebatched(entry: StepCounts, batches: Batches, words: Words) -> StepCounts:
    """The same samples in other batches, of which the last may be smaller."""
    if not entry.by_size:
        if any(map(sum, entry.pairs)):
            raise ConfigError(
                f"{entry.layer} {entry.step}: other batches need the sizes of calls; they are not recorded"
            )
        return entry
    largest = max(entry.by_size, key=lambda calls: calls.sizes[0])
    if largest.sizes[0] % batches.was:
        told = f"{largest.sizes[0]} elements of {OPERANDS[entry.step][0]} are not those of {batches.was} samples"
        raise ConfigError(f"was: in the largest call of {entry.layer} {entry.step} {told}")
    samples = sum(calls.count * calls.sizes[0] for calls in entry.by_size) * batches.was // largest.sizes[0]
    full, rest = divmod(samples, batches.now)
    sizes = [(count, size) for count, size in ((full, batches.now), (1, rest)) if count and size]
    share, calls = Fraction(sizes[0][0] * sizes[0][1], samples), sum(count for count, _ in sizes)
    second = entry.second
    if entry.step != "grad_weight":  # a weight, which each call reads
        again = Fraction(calls, sum(each.count for each in entry.by_size))
        second = second.model_copy(update={"elements": _triple(whole([n * again for n in second.elements]))})
    first_parts, pair_parts = _cut(entry.first.elements, share), _cut([n for row in entry.pairs for n in row], share)
    second_parts = _cut(second.elements, share if entry.step == "grad_weight" else Fraction(sizes[0][0], calls))
    macs = [each.macs for each in entry.by_size]
    by_size = []
    for place, (count, size) in enumerate(sizes):
        now, cells = Batches(batches.was, size), pair_parts[place]
        known = None if None in macs else sum(each or 0 for each in macs) * count * size // samples
        changes = {
            "count": count,
            "sizes": _resized(largest.sizes, now, entry.step),
            "used": largest.used and _resized(largest.used, now, entry.step),
            "first": _triple(first_parts[place]),
            "second": _triple(second_parts[place]),
            "macs": known,
            "pairs": largest.pairs and (_triple(cells[:3]), _triple(cells[3:6]), _triple(cells[6:])),
            "passed": largest.passed and _passed(entry, largest.passed, now, words),
        }
        by_size.append(largest.model_copy(update=changes))
    return entry.model_copy(
        update={"calls": calls, "second": second, "by_size": tuple(sorted(by_size, key=lambda each: each.size))}
    )


def _resized(sizes: Triple, batches: Batches, step: Step) -> Triple:
    """A call's sizes in another batch: of all tensors but the weight."""
    numbers = [each * batches.now // batches.was for each in sizes]
    numbers[WEIGHT[step]] = sizes[WEIGHT[step]]
    return _triple(numbers)


def _cut(cells: Sequence[int], share: Fraction) -> tuple[list[int], list[int]]:
    """A share of whole numbers, and the rest of them."""
    part = whole([cell * share for cell in cells])
    return part, [cell - mine for cell, mine in zip(cells, part, strict=True)]


def _triple(numbers: Sequence[int]) -> Triple:
    a, b, c = numbers
    return a, b, c


def _passed(entry: StepCounts, passed: Triple, batches: Batches, words: Words) -> Triple:
    """`Calls.passed` in other batches: from backward to forward, from that to backward, between updates."""
    saved = words.saved[entry.layer]
    fixed = {
        "forward": (0, words.period - saved, 0),
        "grad_input": (0, saved, 0),
        "grad_weight": (saved, 0, words.period),
    }[entry.step]
    return _triple([_scaled(distance, mine, batches) for distance, mine in zip(passed, fixed, strict=True)])


def _vector_op(entry: VectorOp, batches: Batches, words: Words, ratio: Fraction) -> VectorOp:
    """An op of forward or backward has the same elements in other calls; one of an update is run as often as that."""
    update = entry.phase == "update"
    fixed = words.period if update else words.saved.get(entry.layer, 0)
    changed = SUMS if update else ("calls",)
    sums = {name: int(getattr(entry, name) * ratio + Fraction(1, 2)) for name in changed}
    uses = entry.uses
    if uses is not None:
        times = ratio if update else Fraction(1)
        uses = sum_uses(
            Use(
                _scaled(distance, fixed if distance > fixed or update else 0, batches),
                int(read * times),
                int(written * times),
            )
            for distance, read, written in uses
        )
    return entry.model_copy(update={**sums, "uses": uses})
