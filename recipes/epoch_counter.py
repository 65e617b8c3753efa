"""What the steps of an epoch did, counted in full or at every n-th step. It knows counts, and no training."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import lnpu_torch as lnpu

NOTHING = lnpu.Counts.merge([])


@dataclass(frozen=True)
class Tallied:
    """Counts of an epoch so far; and the energy of each step that stood for others, in pJ."""

    counts: lnpu.Counts = NOTHING
    energies_pj: tuple[float, ...] = ()

    @classmethod
    def merge(cls, ranks: Sequence[Tallied]) -> Tallied:
        """What all ranks did in the same steps."""
        steps = zip(*(rank.energies_pj for rank in ranks), strict=True)
        return cls(lnpu.Counts.merge(rank.counts for rank in ranks), tuple(sum(step) for step in steps))

    def error(self, steps: int) -> float | None:
        """Standard error of the energy of `steps` like ones, as a share of it, from how much the counted ones differ.

        None if all steps were counted, or so few that nothing is known.
        """
        counted = len(self.energies_pj)
        if counted < 2 or not any(self.energies_pj):
            return None
        spread = statistics.stdev(self.energies_pj) / statistics.mean(self.energies_pj)
        return float(spread * ((1 - counted / steps) / counted) ** 0.5)  # drawn without replacement

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain data."""
        return {"counts": self.counts.model_dump_json(), "energies_pj": list(self.energies_pj)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Tallied:
        """From what `state` gave."""
        return cls(lnpu.Counts.model_validate_json(state["counts"]), tuple(state["energies_pj"]))


class Tally:
    """Counts an epoch: each `every`-th step is counted, and stands for those up to the next as well.

    All steps are taken inside its own `with` block.

    Args:
        model: with emulated layers.
        alike: that many steps, from the first on, do equally much; one after them is always counted, for itself.
        every: None counts nothing; then layers need not be emulated.
        chip: what counted steps are priced on.
        before: what of the epoch was done before the process began.
    """

    def __init__(self, model: nn.Module, alike: int, every: int | None, chip: lnpu.Chip, before: Tallied) -> None:
        self._model, self._alike, self._every, self._chip = model, alike, every, chip
        self._done, self._now = before, lnpu.CostCounter(model) if every == 1 else None

    def __enter__(self) -> Tally:
        if self._now:
            self._now.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._now:
            self._now.__exit__(*error)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of that number, the first being 0."""
        if self._every is None or self._now:
            yield
        elif number % self._every and number < self._alike:
            with lnpu.no_count(self._model):
                yield
        else:
            with lnpu.CostCounter(self._model) as cost:
                yield
            self._add(cost.counts, number)

    @property
    def so_far(self) -> Tallied:
        """What was done of the epoch."""
        counts = self._done.counts + self._now.counts if self._now else self._done.counts
        return Tallied(counts.model_copy(update={"extrapolated": self._every not in (None, 1)}), self._done.energies_pj)

    def _add(self, counts: lnpu.Counts, number: int) -> None:
        energies, times = self._done.energies_pj, 1
        if number < self._alike:
            energies = (*energies, lnpu.price(counts, self._chip).total.energy_pj or 0.0)
            times = min(self._every or 1, self._alike - number)
        self._done = Tallied(self._done.counts + counts * times, energies)
