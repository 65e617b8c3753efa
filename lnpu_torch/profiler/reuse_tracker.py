"""ReuseTracker: how much else passes through a chip between two uses of a tensor.

That decides which memories still hold the tensor, so that it can be measured once and priced for any of them. What
passes is counted in words of 16 bits: results of vector operations and of layers, weights, and what is read again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lnpu_torch.counts.vector_ops import NEVER, Use, rounded

PERIOD = 0
"""Stands for the distance from one optimizer's step to the next, until that is known."""


class Piece(NamedTuple):
    """A tensor that an op reads or writes: which one it is as long as it lives, and its words."""

    key: int
    storage: Any
    words: int


class Flow(NamedTuple):
    """What an op reads and writes.

    `reads` has a tensor as often as the op reads it. `whole` says that it reads all of it before it reads any of it
    again. `masks` are tensors of which bits were kept, and the words of those.
    """

    reads: tuple[Piece, ...]
    results: tuple[Piece, ...]
    whole: bool = False
    masks: tuple[Piece, ...] = ()


def pieces(found: list[Tensor], words: int | None = None) -> tuple[Piece, ...]:
    """Tensors, but for empty ones and single numbers; of so many words, or of one for each element."""
    kept = []
    for x in found:
        if x.dim() and (count := x.numel()):
            storage = x.untyped_storage()
            kept.append(Piece(storage._cdata, storage, count if words is None else words))
    return tuple(kept)


def _read_twice(reads: tuple[Piece, ...]) -> int:
    """Words of the tensors that are there more than once."""
    often = Counter(each.key for each in reads)
    return sum({each.key: each.words for each in reads if often[each.key] > 1}.values())


def width(x: Tensor) -> int:
    """Words of an element, as torch holds it."""
    return -(-x.element_size() // 2)


@dataclass(slots=True)
class _Known:
    """A tensor: what had passed when it was used last, and the greatest distance from which it was read again.

    Memories smaller than that distance have written it out. `alive` keeps its key from being given to another one.
    """

    last: int
    alive: StorageWeakRef
    written_for: int = 0
    mask_for: int = 0


class ReuseTracker:
    """Follows vector operations and layers' passes in the order in which they run.

    Each forward and backward is followed for itself, as if the same were done again and again. So a run that is
    stopped between two steps and goes on has the distances of one that was not.
    """

    def __init__(self) -> None:
        self.passed = 0
        self._known: dict[int, _Known] = {}
        self._made: set[int] = set()  # what the op before has made
        self._begun = 0  # what had passed when this forward and backward began
        self._updated = 0  # and when the last update was over
        self._went_back = False
        self._forward_at: dict[int, int] = {}
        self._calls: Counter[int] = Counter()
        self._saved: dict[int, dict[int, int]] = defaultdict(dict)
        self._idle: dict[int, dict[int, tuple[int, int, int]]] = defaultdict(dict)
        self._updates: set[int] = set()
        self._limit = 1000

    def begins(self, backward: bool) -> int | None:
        """Before a layer's pass, or an op that is no update: begin anew if it is a forward that comes after a backward.

        Returns:
            What passed from one optimizer's step to the next, if such a period is over; else None.
        """
        period = self.period if self._updates else None
        if self._updates or (self._went_back and not backward):
            for layer in self._calls:
                self._idle[layer] |= self._waits(layer)
            self._begun, self._went_back = self.passed, False
            for of_this_pass in (self._known, self._made, self._forward_at, self._calls, self._saved):
                of_this_pass.clear()
        if self._updates:
            self._updated = self.passed
            self._updates.clear()
        self._went_back |= backward
        return period

    def _waits(self, layer: int) -> dict[int, tuple[int, int, int]]:
        """What `idle` tells of a layer in this forward and backward, by size of results."""
        if not self._calls[layer]:
            return {}
        passed, period = (self.passed - self._begun) // self._calls[layer], self.period
        return {
            results: (rounded(max(passed - saved, 0)), rounded(saved), period)
            for results, saved in self._saved[layer].items()
        }

    def op(self, flow: Flow) -> list[Use]:
        """What one op reads again, from which distance, and what had to be written out for that.

        The result of whatever ran just before comes as it is made. So does a tensor that no op has made: it is a
        layer's result.
        """
        uses: list[Use] = []
        seen: set[int] = set()
        twice = _read_twice(flow.reads) if flow.whole else 0
        for each in flow.reads:
            known = self._known.get(each.key)
            if known is None:
                known = self._add(each)
            elif each.key in seen:
                if flow.whole:
                    self._read(known, each.words, twice, uses)
            elif each.key not in self._made:
                self._read(known, each.words, each.words + self.passed - known.last, uses)
            seen.add(each.key)
        for each in flow.masks:
            known = self._known.get(each.key)
            if known is not None:
                distance = rounded(each.words + self.passed - known.last)
                uses.append(Use(distance, each.words, each.words if distance > known.mask_for else 0))
                known.mask_for = max(known.mask_for, distance)
        self.passed += sum([use.read for use in uses]) + sum([each.words for each in flow.results])
        for key in seen:
            self._known[key].last = self.passed
        self._made = set()
        self.made(flow.results)
        return uses

    def made(self, results: tuple[Piece, ...]) -> None:
        """Tensors that were made, beside those that were there, since the last layer or op that computes."""
        for each in results:
            self._add(each)
            self._made.add(each.key)

    def summed(self, total: Piece) -> list[Use]:
        """A gradient is added to what is there from before; its own write is its layer's."""
        self.passed += 2 * total.words
        self._made = set()
        return [Use(PERIOD, total.words, 0)]

    def layer(self, layer: int, backward: bool, weights: int, results: int) -> None:
        """A layer's forward, or both steps of its backward, with so many weights; its results, or the errors it got."""
        if backward:
            self._saved[layer][results] = self.passed - self._forward_at.get(layer, self.passed)
        else:
            self._forward_at[layer] = self.passed
            self._calls[layer] += 1
            self._saved[layer].setdefault(results, 0)
        self.passed += (2 if backward else 1) * (weights + results)
        self._made = set()

    def update(self, step: int, words: int) -> None:
        """Part of an optimizer's step."""
        self._updates.add(step)
        self.passed += words
        self._made = set()

    @property
    def period(self) -> int:
        """What passes from one optimizer's step to the next, as if the same were done again and again."""
        return rounded((self.passed - self._updated) // len(self._updates)) if self._updates else NEVER

    def idle(self, layer: int, results: int) -> tuple[int, int, int] | None:
        """What passes from a layer's backward to its next forward, from that to its backward, and between updates.

        None if the layer was not seen.
        """
        found = self._idle[layer] | self._waits(layer)
        if not found:
            return None
        return found.get(results) or max(found.values(), key=lambda each: each[1])

    def _read(self, known: _Known, words: int, distance: int, uses: list[Use]) -> None:
        distance, before = rounded(distance), known.written_for
        if distance > before:
            uses.append(Use(distance, words, words))
            if before:
                uses.append(Use(before, 0, -words))
            known.written_for = distance
        else:
            uses.append(Use(distance, words, 0))

    def _add(self, piece: Piece) -> _Known:
        known = self._known[piece.key] = _Known(self.passed, StorageWeakRef(piece.storage))
        if len(self._known) > self._limit:
            self._known = {key: each for key, each in self._known.items() if not each.alive.expired()}
            self._limit = 2 * len(self._known) + 1000
        return known
