"""From the counters on the device to `Counts`: what a model's layers did since a ledger was opened."""

from __future__ import annotations

import itertools
import os
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from lnpu_torch.counts.lane_profile import LaneProfile
from lnpu_torch.counts.schema import OPERANDS, STEPS, Calls, Counts, Operand, Step, StepCounts
from lnpu_torch.files import ConfigError
from lnpu_torch.nn.convert import why_nothing_is_emulated
from lnpu_torch.nn.layer_state import LayerState
from lnpu_torch.nn.modules import LISTENERS, Emulating, unwrapped
from lnpu_torch.nn.observers import pause_op_tracing
from lnpu_torch.nn.sites import InterceptedModule, Site, emulations, is_emulated
from lnpu_torch.profiler.reuse_tracker import ReuseTracker

_PROCESS = uuid.uuid4().hex  # a forked process has its parent's
_SERIALS = itertools.count()
_MODELS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""A number for each model of this process that was counted."""


class Counted(NamedTuple):
    """A layer's counters at one moment, on its device."""

    counters: Tensor
    lanes: Tensor
    call_sizes: Tensor

    @classmethod
    def of(cls, emulation: Any) -> Self:
        """A copy; the host waits for nothing."""
        return cls(emulation.counters.clone(), emulation.lanes.clone(), emulation.call_sizes.clone())


@dataclass
class Life:
    """A layer from one conversion to the next: what names its counts, and its counters when the ledger first saw it."""

    name: str
    site: Site
    wide: dict[tuple[str, str], str]
    before: Counted | None
    after: Counted | None = None

    @property
    def emulation(self) -> LayerState:
        """The layer's state."""
        return self.site.emulation


class LayerLedger:
    """What a model's emulated layers do from `open` to `close`.

    Layers may come, go, be converted again or reverted meanwhile: each life of a layer is accounted for.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises ConfigError if no layer of the model is emulated."""
        if not is_emulated(model):
            raise ConfigError(f"no layer of this model is emulated: {why_nothing_is_emulated(model)}")
        self._model, self._lives = model, dict[int, Life]()
        self._joining: dict[int, tuple[Any, Counted]] = {}  # layers as they were when they were put into a module
        self._closed = False
        self._look(Counted.of)
        self._hook = register_module_module_registration_hook(self._registered)
        LISTENERS.append(self._changed)

    def close(self) -> None:
        """Count no more; the host waits for nothing."""
        if self._closed:
            return
        self._hook.remove()
        LISTENERS.remove(self._changed)
        self._changed()
        for life in self._lives.values():
            life.after = Counted.of(life.emulation)
        self._joining.clear()
        self._closed = True

    def owns(self, emulation: Any) -> bool:
        """Whether an emulation is, or was, one of the model's layers."""
        if id(emulation) not in self._lives and id(emulation) in self._joining:
            self._changed()
        return id(emulation) in self._lives

    def layers(self) -> set[int]:
        """The ids of the emulations of the model's layers."""
        return set(self._lives)

    def facts(self, emulation: Any) -> tuple[str, int]:
        """The name of a layer, and the number of its parameters; of one that is not the model's, "" and 0."""
        life = self._lives.get(id(emulation)) if self.owns(emulation) else None
        return (life.name, life.site.weights) if life else ("", 0)

    def counts(self, reuse: ReuseTracker | None = None) -> Counts:
        """What was done so far, or, once closed, in all; with what `reuse` has seen of the order of it."""
        if not self._closed:
            self._changed()
        places = {name: place for place, name in enumerate(emulations(self._model))}
        lives = sorted(self._lives.values(), key=lambda life: places.get(life.name, len(places)))
        return Counts.merge([_counts(life, self._model, reuse) for life in lives])

    def _changed(self) -> None:
        """Find layers that are new. They began at zero, or as they were when they were put in their place."""
        self._look(lambda emulation: self._joining.pop(id(emulation), (None, None))[1])

    def _look(self, before: Callable[[Any], Counted | None]) -> None:
        for name, site in emulations(self._model).items():
            if id(site.emulation) not in self._lives:
                self._lives[id(site.emulation)] = Life(name, site, _wide(site.emulation), before(site.emulation))

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        """A module becomes part of another one, perhaps of the model."""
        if self._joining:
            self._changed()
        for module in child.modules() if child is not None else ():
            for state in module.emulation_states() if isinstance(module, Emulating) else ():
                if id(state) not in self._lives:
                    self._joining[id(state)] = (state, Counted.of(state))


@contextmanager
def no_count(model: nn.Module) -> Iterator[None]:
    """Within the block a model's emulated layers compute as ever, but count nothing, which is faster.

    Nor does a `CostCounter` around it count this thread's vector operations.

    A step's forward and backward belong into the same block. Under torch.compile each way is compiled once.
    """
    counting: list[Any] = [site.emulation for site in emulations(model).values()]
    hosts = [module for module in model.modules() if isinstance(module, InterceptedModule)]
    counting += [module.emulation_sites for module in hosts]  # for sites to come
    before = [each.counting for each in counting]
    try:
        for each in counting:
            each.counting = False
        with pause_op_tracing():
            yield
    finally:
        for each, was in zip(counting, before, strict=True):
            each.counting = was
        for module in hosts:
            for state in module.emulation_states() if module.emulation_sites.counting else ():
                state.counting = True


def _counts(life: Life, model: nn.Module, reuse: ReuseTracker | None) -> Counts:
    """What was done in one life of a layer."""
    after = life.after or Counted.of(life.emulation)
    counters, lanes, sizes = _values(after.counters), _values(after.lanes), after.call_sizes.clone()
    if life.before:
        counters, lanes = counters - _values(life.before.counters), lanes - _values(life.before.lanes)
        sizes[:, -1] -= life.before.call_sizes[:, -1]
    steps = [
        _entry(life, step, counters[index], sizes[index], lanes[index].tolist(), reuse)
        for index, step in enumerate(STEPS)
        if counters[index].any()
    ]
    serial = _MODELS.setdefault(unwrapped(model), next(_SERIALS))
    return Counts(steps=tuple(steps)).of_model((_PROCESS, os.getpid(), serial))


def _values(counters: Tensor) -> Tensor:
    """Counters on the host; on the meta device nothing can have been counted."""
    return torch.zeros(counters.shape, dtype=counters.dtype, device="cpu") if counters.is_meta else counters.cpu()


def _entry(
    life: Life, step: Step, rows: Tensor, sizes: Tensor, lanes: list[list[int]], reuse: ReuseTracker | None
) -> StepCounts:
    values = rows.sum(0).tolist()
    calls, macs, padding, not_run = values[:4]
    table, elements = values[4:13], (values[13:16], values[16:19])
    first, second = (
        _operand(life, step, name, *each) for name, *each in zip(OPERANDS[step], elements, lanes, strict=True)
    )
    return StepCounts.model_validate(
        {
            "layer": life.name,
            "kind": life.site.kind,
            "step": step,
            "calls": calls,
            "macs": macs,
            "padding": padding,
            "not_run": not_run,
            "pairs": _table(table),
            "first": first,
            "second": second,
            "by_size": _by_size(life, step, rows.tolist(), sizes.tolist(), reuse),
        }
    )


def _operand(life: Life, step: Step, name: str, elements: list[int], lanes: list[int]) -> Operand:
    channels = dict(zip(("input", "grad_output"), life.site.channels or (), strict=False))
    profile = LaneProfile(channels=channels[name], cycles_by_config=tuple(lanes)) if name in channels else None
    return Operand(wide=life.wide[step, name], elements=tuple(elements), lanes=profile)  # type: ignore[arg-type]


def _table(values: list[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(values[i : i + 3]) for i in (0, 3, 6))


def _passed(life: Life, step: Step, sizes: list[int], reuse: ReuseTracker) -> tuple[int, int, int] | None:
    """What passes while a call's operands, and its result, wait: `Calls.passed`."""
    outputs = {"forward": sizes[2], "grad_input": sizes[0], "grad_weight": sizes[1]}[step]
    idle = reuse.idle(id(life.emulation), outputs)
    if idle is None:
        return None
    weights, saved, period = idle
    return {"forward": (0, weights, 0), "grad_input": (0, saved, 0), "grad_weight": (saved, 0, period)}[step]


def _by_size(
    life: Life, step: Step, rows: list[list[int]], sizes: list[list[int]], reuse: ReuseTracker | None
) -> tuple[Calls, ...]:
    """A step's calls by their size; those of further sizes as if all were of their mean size."""
    calls = []
    for row, (values, size) in enumerate(zip(rows, sizes, strict=False)):
        count, mixed = values[0], row == len(sizes) - 1
        if count:
            size = [-(-total // count) for total in size] if mixed else size
            whole, used = tuple(size[:3]), tuple(size[3:6])
            groups = {"first": tuple(values[13:16]), "second": tuple(values[16:19]), "pairs": _table(values[4:13])}
            passed = _passed(life, step, size, reuse) if reuse else None
            plan = {"sizes": whole, "used": None if used == whole else used, "groups": size[6]}
            rest = {"count": count, "macs": values[1], "passed": passed, **plan}
            calls.append(Calls.model_validate({**rest, **groups}))
    return tuple(sorted(calls, key=lambda each: each.size))


def _wide(emulation: LayerState) -> dict[tuple[str, str], str]:
    """What each step's elements above FP8 are: FP16, or float32 where the operand is not rounded."""
    rule = emulation.precision.rule
    return {
        (step, operand): "fp32" if rule(step, operand) is None else "fp16"
        for step in STEPS
        for operand in OPERANDS[step]
    }
