"""How long a run takes: layer by layer, whichever of multipliers, SIMD core and DRAM takes longest there.

Within a layer's forward, or its backward, the three work side by side; vector operations go with the layer that they
follow. Layers, and the update, come one after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from lnpu_torch.cost.cost_row import Bound, CostRow
from lnpu_torch.cost.energy_table import EnergyTable

WORKERS: dict[Bound, str] = {"multipliers": "cycles", "SIMD": "simd_cycles", "DRAM": "dram_cycles"}


class Pass(NamedTuple):
    """A layer's forward or backward with the vector operations that follow it, or the update."""

    layer: str
    phase: str


def passes(parts: Sequence[CostRow]) -> Mapping[Pass, list[int]]:
    """The places of the parts of each pass."""
    found: dict[Pass, list[int]] = {}
    for place, part in enumerate(parts):
        layer = part.layer if part.operations is None else part.after
        phase = part.step if part.step in ("forward", "update") else "backward"
        found.setdefault(Pass(layer, phase), []).append(place)
    return found


def timed(parts: Sequence[CostRow], energies: EnergyTable) -> tuple[CostRow, ...]:
    """The same parts, each with its share of the run's time and with the energy that flows in that time.

    A part's share is what it takes of the worker that takes longest in its pass. Multipliers wait in what of a pass's
    time they would not take with all of them busy.
    """
    done = list(parts)
    for places in passes(parts).values():
        mine = [parts[place] for place in places]
        taken = {worker: _cycles(mine, worker) for worker in WORKERS}
        longest = max(WORKERS, key=taken.__getitem__)
        busy = math.fsum(part.lanes.ideal if part.lanes else part.cycles for part in mine)
        waiting = max(1 - busy / taken[longest], 0.0) if taken[longest] else 0.0
        for place in places:
            cycles, known = _cycles([parts[place]], longest), parts[place].energy_zj
            energy = known | energies.of_time(cycles, cycles * waiting, known)
            done[place] = replace(parts[place], time_by={longest: cycles}, energy_zj=energy)
    return tuple(done)


def power_w(parts: Iterable[CostRow], clock_hz: float) -> float | None:
    """The power of the chip while it runs these parts; None if they take no time."""
    parts = list(parts)
    cycles = math.fsum(part.time_cycles for part in parts)
    return sum(part.chip_zj for part in parts) * 1e-21 / (cycles / clock_hz) if cycles else None


def _cycles(parts: Iterable[CostRow], worker: Bound) -> float:
    return math.fsum(getattr(part, WORKERS[worker]) or 0.0 for part in parts)
