"""What a layer brings to each of its calls: how its operands are rounded, its thresholds, its counters. No products."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS
from lnpu_torch.files import ConfigError
from lnpu_torch.nn.reads import READS, STEPS, OperandPlan, precision_plan
from lnpu_torch.ops.dispatch import backend_of
from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.quantize.reference import UNSET, Rounded, Threshold
from lnpu_torch.ops.quantize.torch_ops import draw_seed
from lnpu_torch.ops.reference import Backend
from lnpu_torch.quant.precision import Precision


def new_thresholds(device: torch.device | str = "cpu") -> Tensor:
    """Thresholds of a layer that has seen nothing: int32 [len(READS), 2], in use and to come."""
    return torch.full((len(READS), 2), UNSET, dtype=torch.int32, device=device)


def check_form(name: str, state: Any) -> None:
    """Raises ConfigError unless these may be some layer's thresholds."""
    expected = [len(READS), 2]
    if not isinstance(state, Tensor) or list(state.shape) != expected:
        found = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ConfigError(f"thresholds of {name!r}: expected a tensor {expected}, got {found}")
    if state.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise ConfigError(f"thresholds of {name!r}: expected whole numbers, got {state.dtype}")


def new_counters(device: torch.device | str = "cpu") -> Tensor:
    """Counters of a layer that has done nothing: int64 [len(STEPS), counting.ROWS, counting.WIDTH]."""
    return torch.zeros(len(STEPS), counting.ROWS, counting.WIDTH, dtype=torch.int64, device=device)


def new_lanes(device: torch.device | str = "cpu") -> Tensor:
    """Lane profiles of a layer that has done nothing, by step and operand: int64 [len(STEPS), 2, len(LANE_CONFIGS)]."""
    return torch.zeros(len(STEPS), 2, len(LANE_CONFIGS), dtype=torch.int64, device=device)


def new_call_sizes() -> Tensor:
    """The sizes of call that the rows of new counters stand for, none yet: int64 [len(STEPS), SIZES + 1, CALL]."""
    return torch.zeros(len(STEPS), counting.SIZES + 1, counting.CALL, dtype=torch.int64, device="cpu")


_LOCK = [threading.Lock()]
if hasattr(os, "register_at_fork"):  # a forked process has its parent's lock, which may be held for ever
    os.register_at_fork(after_in_child=lambda: _LOCK.__setitem__(0, threading.Lock()))


class LayerState:
    """What a layer brings to each of its calls: precision, thresholds, and the counters that its steps add to."""

    def __init__(self, chosen: Precision, device: torch.device | str = "cpu") -> None:
        self.precision = chosen
        self.text = chosen.model_dump_json()
        self.plan = precision_plan(self.text)
        self.training = False
        self.counting = True
        self.histograms: Tensor | None = None  # [len(READS), bins], where ranks choose their thresholds together
        self.thresholds = new_thresholds(device)
        self.counters, self.lanes = new_counters(device), new_lanes(device)
        self.call_sizes = new_call_sizes()  # stays on the host, where sizes are known
        self._lock: Any = None  # where processes share the counters

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.counters.device

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.plan = precision_plan(self.text)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Go where `nn.Module._apply` sends a module's tensors, with all values, which `to_empty` takes from those."""
        probe = fn(torch.zeros(1, dtype=torch.int32, device=self.device))
        self.move(probe.device)
        if probe.is_cpu and probe.is_shared():
            self._share()

    def move(self, device: torch.device) -> None:
        """Move the tensors. Those on the meta device, which have no values, begin anew."""
        if self.device.type == "meta" != device.type:
            self.thresholds, self.counters, self.lanes = new_thresholds(device), new_counters(device), new_lanes(device)
            self.histograms = (
                None
                if self.histograms is None
                else torch.zeros(self.histograms.shape, dtype=torch.int32, device=device)
            )
        self.thresholds, self.counters, self.lanes = (
            each.to(device) for each in (self.thresholds, self.counters, self.lanes)
        )
        self.histograms = None if self.histograms is None else self.histograms.to(device)

    def _share(self) -> None:
        """Let other processes see, and add to, what is counted here."""
        for tensor in (self.thresholds, self.counters, self.lanes, self.call_sizes):
            tensor.share_memory_()
        self._lock = self._lock or multiprocessing.get_context("spawn").Lock()

    @property
    def lock(self) -> Any:
        """What whoever counts must hold: other threads, and processes that share the counters, do so too."""
        return self._lock or _LOCK[0]

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            return {**self.__dict__, "_lock": None, "plan": None}
        self._share()  # as torch does with all tensors that it sends to a process
        return {**self.__dict__, "plan": None}

    def check_thresholds(self, name: str, state: Tensor) -> None:
        """Raises ConfigError unless these fit this layer's thresholds in shape, dtype and range."""
        check_form(name, state)
        rows = state.tolist()
        for (step, operand), read in self.plan.reads.items():
            rule = self.precision.rule(step, operand)
            if rule is None:
                continue
            smallest, largest = rule.threshold_range
            for threshold in rows[read.row]:
                if threshold != UNSET and not smallest <= threshold <= largest:
                    reading = f"{operand} in {step}"
                    raise ConfigError(
                        f"thresholds of {name!r}: {threshold} for {reading} is outside {smallest} ... {largest}"
                    )

    def counter(self, step: str) -> counting.StepCounters:
        """Where a step is counted."""
        return counting.StepCounters(self.counters, self.call_sizes, self.lanes, STEPS.index(step))

    def not_run(self, step: str, macs: int) -> None:
        """Count a step that nobody asked for."""
        row = self.counters[STEPS.index(step), counting.NOT_RUN]
        with self.lock:
            row[:1] += 1  # by numbers, for which a GPU need not be waited for
            row[1:4:2] += macs

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What calls change, in the order that `of` takes them in."""
        return self.thresholds, self.counters, self.call_sizes, self.lanes, self.histograms

    @classmethod
    def of(
        cls,
        precision: str,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
        training: bool,
        counting: bool,
    ) -> LayerState:
        """The state of a layer of which only a precision's JSON and tensors are at hand, as within an op."""
        state = cls.__new__(cls)
        state.text, state.plan = precision, precision_plan(precision)
        state.thresholds, state.counters, state.call_sizes, state.lanes, state.histograms = tensors
        state.training, state.counting, state._lock = training, counting, None
        return state

    def seed(self, x: Tensor) -> Tensor | None:
        """The key of one call's random bits, from torch's generator; None if nothing is rounded stochastically."""
        return draw_seed(x) if self.plan.stochastic else None

    def quantize(
        self,
        x: Tensor,
        plan: OperandPlan,
        seed: Tensor | None,
        backend: Backend,
        threshold: Threshold | None = None,
    ) -> Rounded:
        """An operand [N, C, *grid] as the plan's steps read it; in training also chooses the threshold to come.

        Args:
            threshold: one that it was read by before, to be read so again.
        """
        request = plan.request
        if plan.rule is None:
            return backend.count_float(x, request)
        if x.dtype == torch.float64:
            request = request._replace(wanted=(True, False, *request.wanted[2:]))
        random = seed if plan.stochastic else None
        if threshold is not None:
            return backend.round_and_count(x, threshold, random, request)
        if self.histograms is not None:
            self._note(x, plan)
        return backend.quantize_operand(x, self.thresholds, random, request, self.training)

    def choose(self, x: Tensor, plan: OperandPlan) -> Threshold | None:
        """The threshold by which an operand is read later; in training also chooses the one to come. None in float."""
        if plan.rule is None:
            return None
        self._note(x, plan)
        return backend_of(x).next_threshold(x, self.thresholds, plan.request.row, plan.rule, self.training)

    def _note(self, x: Tensor, plan: OperandPlan) -> None:
        """Add what the choice of an operand's threshold rests on to its histogram, where ranks sum theirs."""
        if self.training and self.histograms is not None and plan.rule is not None:
            counts = backend_of(x).histogram(x, plan.rule)
            if counts is not None:
                self.histograms[plan.request.row, : len(counts)] += counts.to(self.histograms.dtype)

    def result(self, step: str, x: Tensor, dtype: torch.dtype, backend: Backend) -> Tensor:
        """A step's fresh result as it leaves the chip, in the dtype that torch would return."""
        form = self.plan.result
        exact = form == "fp32" or (x.dtype == torch.float16 and form == "fp16")
        if exact or step not in self.plan.emulated:
            return x if x.dtype == dtype else x.to(dtype)
        return backend.round_result(x, form, dtype)
