"""From the counters on the device to `Counts`: snapshots, and what lies between two of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lnpu_torch.config import ConfigError
from lnpu_torch.counts import OPERANDS, STEPS, Calls, Counts, Operand, Step, StepCounts
from lnpu_torch.lane_profile import LaneProfile
from lnpu_torch.nn import Emulated, emulated_layers
from lnpu_torch.watch import unwatched


@dataclass(frozen=True)
class Layer:
    """One layer's counters at one moment, and what is needed to name them."""

    kind: str
    wide: dict[tuple[str, str], str]
    counters: Tensor
    call_sizes: Tensor
    channels: dict[str, int]
    lanes: Tensor


Snapshot = dict[str, Layer]


def snapshot(model: nn.Module) -> Snapshot:
    """The counters of a model's emulated layers, copied on their devices; the host waits for nothing.

    Raises:
        ConfigError: no layer of the model is emulated.
    """
    layers = emulated_layers(model)
    if not layers:
        raise ConfigError("no layer of this model is emulated: call lnpu_torch.convert(model, ...) first")
    return {
        name: Layer(
            layer.torch_class.__name__,
            _wide(layer),
            layer.emulation.counters.clone(),
            layer.emulation.call_sizes.clone(),
            _channels(layer),
            layer.emulation.lanes.clone(),
        )
        for name, layer in layers.items()
    }


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Within the block a model's emulated layers compute as ever, but count nothing, which is faster.

    Nor does a `CostCounter` around it count this thread's operations on elements.

    A step's forward and backward belong into the same block. Under torch.compile each way is compiled once.
    """
    emulations = [layer.emulation for layer in emulated_layers(model).values()]
    before = [each.counting for each in emulations]
    try:
        for each in emulations:
            each.counting = False
        with unwatched():
            yield
    finally:
        for each, was in zip(emulations, before, strict=True):
            each.counting = was


def difference(before: Snapshot, after: Snapshot) -> Counts:
    """What was done between two snapshots. A layer that is not in the first began at zero."""
    entries = []
    for name, layer in after.items():
        counters, lanes, sizes = layer.counters.cpu(), layer.lanes.cpu(), layer.call_sizes.clone()
        if name in before:
            counters, lanes = counters - before[name].counters.cpu(), lanes - before[name].lanes.cpu()
            sizes[:, -1] -= before[name].call_sizes[:, -1]
        for index, step in enumerate(STEPS):
            if counters[index].any():
                entries.append(_entry(name, layer, step, counters[index], sizes[index], lanes[index].tolist()))
    return Counts(steps=tuple(entries))


def _entry(name: str, layer: Layer, step: Step, rows: Tensor, sizes: Tensor, lanes: list[list[int]]) -> StepCounts:
    values = rows.sum(0).tolist()
    calls, slots, padding, not_run = values[:4]
    table, elements = values[4:13], (values[13:16], values[16:19])
    first, second = (
        _operand(layer, step, name, *each) for name, *each in zip(OPERANDS[step], elements, lanes, strict=True)
    )
    return StepCounts.model_validate(
        {
            "layer": name,
            "kind": layer.kind,
            "step": step,
            "calls": calls,
            "slots": slots,
            "padding": padding,
            "not_run": not_run,
            "pairs": tuple(tuple(table[i : i + 3]) for i in (0, 3, 6)),
            "first": first,
            "second": second,
            "by_size": _by_size(rows.tolist(), sizes.tolist()),
        }
    )


def _operand(layer: Layer, step: Step, name: str, elements: list[int], lanes: list[int]) -> Operand:
    profile = None
    if name in layer.channels:
        profile = LaneProfile(channels=layer.channels[name], lane_cycles=tuple(lanes))
    return Operand(wide=layer.wide[step, name], elements=tuple(elements), lanes=profile)  # type: ignore[arg-type]


def _by_size(rows: list[list[int]], sizes: list[list[int]]) -> tuple[Calls, ...]:
    """A step's calls by their size; those of further sizes as if all were of their mean size."""
    calls = []
    for row, (values, size) in enumerate(zip(rows, sizes, strict=False)):
        count, mixed = values[0], row == len(sizes) - 1
        if count:
            size = [-(-total // count) for total in size] if mixed else size
            parts = {"sizes": tuple(size), "first": tuple(values[13:16]), "second": tuple(values[16:19])}
            calls.append(Calls.model_validate({"count": count, **parts}))
    return tuple(sorted(calls, key=lambda each: each.sizes))


def _channels(layer: Any) -> dict[str, int]:
    """Channels of the operands that are streamed, each of which is a lane's."""
    if isinstance(layer, nn.Linear):
        return {"input": layer.in_features, "grad_output": layer.out_features}
    return {"input": layer.in_channels, "grad_output": layer.out_channels}


def _wide(layer: Emulated) -> dict[tuple[str, str], str]:
    """What each step's elements above FP8 are: FP16, or float32 where the operand is not rounded."""
    rule = layer.emulation.precision.rule
    return {
        (step, operand): "fp32" if rule(step, operand) is None else "fp16"
        for step in STEPS
        for operand in OPERANDS[step]
    }
