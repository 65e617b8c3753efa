"""Lets the ranks of a process group choose their thresholds together. One all-reduce after each backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lnpu_torch.files import ConfigError
from lnpu_torch.nn.layer_state import LayerState
from lnpu_torch.nn.modules import LISTENERS
from lnpu_torch.nn.reads import READS
from lnpu_torch.nn.sites import emulations, is_emulated
from lnpu_torch.ops.quantize.reference import choose_by_histogram
from lnpu_torch.quant.precision import Rule


class ThresholdSync:
    """Ranks that train one model hold the same thresholds: chosen from what all of them have seen.

        shared = lnpu.ThresholdSync(model)  # on every rank, once the process group is up and the model in its place
        loss.backward()
        shared.all_reduce()  # after every backward: one all-reduce, of 4 bytes x 6 x 165 bins a layer

    Each rank's own choice, with which a tensor begins in its first step, is replaced in `merge`. Counters stay each
    rank's own: gather `CostCounter.counts` and sum them with `Counts.merge`.

    Raises:
        ConfigError: no process group is initialised, or no layer of the model is emulated.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        if not is_emulated(model):
            raise ConfigError("no layer of this model is emulated: call lnpu_torch.convert(model, ...) first")
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                "there are no ranks to share thresholds with: call torch.distributed.init_process_group() first"
            )
        self._model, self._group = model, group
        self._emulations: list[LayerState] = []
        self._places: dict[Rule, Tensor] = {}
        self._look()
        weakref.finalize(self, LISTENERS.remove, _listen(weakref.WeakMethod(self._look)))

    def _look(self) -> None:
        """Let all products be part of it that the model has by now, before they see anything."""
        self._emulations = [site.emulation for site in emulations(self._model).values()]
        self._places = self._rules()
        shape = (len(READS), max(map(_bins, self._places), default=0))
        for each in self._emulations if self._places else ():
            if each.histograms is None or each.histograms.shape != shape:
                each.histograms = torch.zeros(shape, dtype=torch.int32, device=each.thresholds.device)

    def all_reduce(self) -> None:
        """Put into use, on every rank, the thresholds that suit what all ranks have seen since the last call."""
        if not self._places:
            return
        seen = [each.histograms for each in self._emulations if each.histograms is not None]
        counts = torch.stack(seen)  # [layers, reads, bins]
        dist.all_reduce(counts, group=self._group)
        states = torch.stack([each.thresholds for each in self._emulations])  # [layers, reads, 2]
        for rule, (layers, rows) in self._places.items():
            chosen = _choose(counts[layers, rows, : _bins(rule)], rule, states[layers, rows, 0])
            states[layers, rows] = chosen[:, None]
        torch._foreach_copy_([each.thresholds for each in self._emulations], list(states.unbind()))
        torch._foreach_zero_(seen)

    def _rules(self) -> dict[Rule, Tensor]:
        """Where each rule that looks at its tensors is used: [2, n], which layers, and which rows of them."""
        places: dict[Rule, set[tuple[int, int]]] = {}
        for index, each in enumerate(self._emulations):
            for (step, operand), read in each.plan.reads.items():
                rule = each.precision.rule(step, operand)
                if rule is not None and rule.low is not None and rule.threshold is None:
                    places.setdefault(rule, set()).add((index, read.row))
        device = self._emulations[0].thresholds.device if self._emulations else None
        return {rule: torch.tensor(sorted(found), device=device).T for rule, found in places.items()}


def _listen(look: weakref.WeakMethod[Callable[[], None]]) -> Callable[[], None]:
    """Begin to call a method, while its object lives, whenever products come or go. Returns what is called."""

    def listener() -> None:
        method = look()
        if method is not None:
            method()

    LISTENERS.append(listener)
    return listener


def _bins(rule: Rule) -> int:
    """Length of a rule's `reference.histogram`."""
    smallest, largest = rule.threshold_range
    return largest - smallest + 2


def _choose(counts: Tensor, rule: Rule, fallback: Tensor) -> Tensor:
    """The thresholds that suit histograms [n, bins]; `fallback` [n] where one is empty."""
    if rule.adaptive:
        each = partial(choose_by_histogram, rule=rule)
        return torch.vmap(lambda counts, fallback: each(counts, fallback=fallback))(counts.long(), fallback)
    highest = (counts > 0).to(torch.int32).flip(1).argmax(1)
    chosen = rule.threshold_range[1] - highest
    return torch.where(counts.any(1), chosen, fallback).to(torch.int32)
