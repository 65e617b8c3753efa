"""What a layer brings to each of its calls: how its operands are rounded, its T's, its counters. No products."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import prod
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnpu_torch.counts.lane_configs import LANE_CONFIGS, SYNC_INTERVALS
from lnpu_torch.files import ConfigError
from lnpu_torch.nn.gemms import Accumulator
from lnpu_torch.nn.reads import READINGS, READS, STEPS, Read, Use, plan, uses
from lnpu_torch.ops import buffers
from lnpu_torch.ops import dispatch as backends
from lnpu_torch.ops.gemm import half_precision as product_ops
from lnpu_torch.ops.lanes import torch_ops as lane_ops
from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.pair_counts import torch_ops as count_ops
from lnpu_torch.ops.quantize import torch_ops as ops
from lnpu_torch.ops.quantize.reference import UNSET
from lnpu_torch.quant.precision import Precision

Layout = tuple[int, int]
"""How many samples in a row share one count by position, and the number of channel groups."""


def new_thresholds(device: torch.device | str = "cpu") -> Tensor:
    """T's of a layer that has seen nothing: int32 [len(READS), 2], in use and to come."""
    return torch.full((len(READS), 2), UNSET, dtype=torch.int32, device=device)


def new_counters(device: torch.device | str = "cpu") -> Tensor:
    """Counters of a layer that has done nothing: int64 [len(STEPS), counting.ROWS, counting.WIDTH]."""
    return torch.zeros(len(STEPS), counting.ROWS, counting.WIDTH, dtype=torch.int64, device=device)


def new_lanes(device: torch.device | str = "cpu") -> Tensor:
    """Lane profiles of a layer that has done nothing, by step and operand: int64 [len(STEPS), 2, len(LANE_CONFIGS)]."""
    return torch.zeros(len(STEPS), 2, len(LANE_CONFIGS), dtype=torch.int64, device=device)


def new_call_sizes() -> Tensor:
    """The sizes of call that the rows of new counters stand for, none yet: int64 [len(STEPS), SIZES + 1, 3]."""
    return torch.zeros(len(STEPS), counting.SIZES + 1, 3, dtype=torch.int64, device="cpu")


_LOCK = [threading.Lock()]
if hasattr(os, "register_at_fork"):  # a forked process has its parent's lock, which may be held for ever
    os.register_at_fork(after_in_child=lambda: _LOCK.__setitem__(0, threading.Lock()))


class Operand(NamedTuple):
    """An operand as the steps read it: its values now, what is kept of them for later, and its counts.

    `position` and `sample` are the elements of each group over samples and over channels, as `counting` needs them;
    `lanes` is its lane profile, if it is one that steps stream; `threshold` is the T by which it was rounded, if any.
    """

    values: Tensor
    kept: Tensor
    position: Tensor
    sample: Tensor
    lanes: Tensor | None = None
    threshold: Tensor | None = None


class Emulation:
    """What a layer brings to each of its calls: precision, T's, and the counters that its steps add to."""

    def __init__(self, chosen: Precision, device: torch.device | str = "cpu") -> None:
        self.precision = chosen
        self.reads = plan(chosen)
        self._uses = {reading: uses(self.reads, reading) for reading in READINGS}
        self._emulated = {step for (step, _), read in self.reads.items() if read.rule is not None}
        self._stochastic = any(read.stochastic for read in self.reads.values())
        self.accumulator = Accumulator(chosen.accumulate, chosen.chunk)
        self.accumulators = {
            (step, halves): replace(
                self.accumulator, exact=halves and step in self._emulated, reordered=step in self._emulated
            )
            for step in STEPS
            for halves in (False, True)
        }  # of each step, and whether its operands are in binary16
        self.result_format: str = chosen.result
        self.training = False
        self.counting = True
        self.histograms: Tensor | None = None  # [len(READS), bins], where ranks choose their T's together
        self.thresholds = new_thresholds(device)
        self.counters, self.lanes = new_counters(device), new_lanes(device)
        self.call_sizes = new_call_sizes()  # stays on the host, where sizes are known
        self._lock: Any = None  # where processes share the counters
        buffers.POOL.serve(self)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.counters.device

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        buffers.POOL.serve(self)

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
            return {**self.__dict__, "_lock": None}
        self._share()  # as torch does with all tensors that it sends to a process
        return self.__dict__

    def check_thresholds(self, name: str, state: Tensor) -> None:
        """Raises ConfigError unless these fit this layer's thresholds in shape, dtype and range."""
        if not isinstance(state, Tensor) or state.shape != self.thresholds.shape:
            found = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ConfigError(f"thresholds of {name!r}: expected a tensor {list(self.thresholds.shape)}, got {found}")
        if state.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
            raise ConfigError(f"thresholds of {name!r}: expected whole numbers, got {state.dtype}")
        rows = state.tolist()
        for (step, operand), read in self.reads.items():
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

    def counter(self, step: str) -> tuple[Tensor, Tensor, Tensor, int]:
        """Where a step is counted: counters, the sizes of call that their rows stand for, lane profiles; its place."""
        return self.counters, self.call_sizes, self.lanes, STEPS.index(step)

    def not_run(self, step: str, slots: int) -> None:
        """Count a step that nobody asked for."""
        with counting_lock(self):
            count_ops.count_not_run(self.counters, STEPS.index(step), slots)

    def emulates(self, step: str) -> bool:
        """Whether any operand of the step is rounded; else the step is torch's own, bit for bit."""
        return step in self._emulated

    def seed(self, x: Tensor) -> Tensor | None:
        """The key of one call's random bits, from torch's generator; None if nothing is rounded stochastically."""
        return ops.draw_seed(x) if self._stochastic else None

    def read(
        self,
        operand: str,
        x: Tensor,
        layout: Layout,
        seed: Tensor | None,
        *,
        now: tuple[str, ...],
        later: tuple[str, ...] = (),
        sampled: bool = False,
        halves: bool = False,
        last: bool = False,
        joined: bool = False,
        threshold: Tensor | None = None,
    ) -> dict[str, Operand]:
        """An operand as each of the steps reads it, rounded once for each rule.

        In training the T's to come are chosen from it, too.

        Args:
            x: [N, C, *grid].
            layout: see `ops.round_and_count`.
            now, later: steps that read it at once, and steps that read what is kept of it.
            sampled: whether these need its counts by sample, as grad_weight does anyway.
            halves: whether the steps can compute with binary16 values.
            last: whether values shall lie in channels_last.
            joined: whether runs of lanes go on from sample to sample.
            threshold: a T that it was read by before, to be read so again.
        """
        found = {}
        joined = (
            joined and len(x) > 1 and prod(x.shape[2:]) % SYNC_INTERVALS[-1] != 0
        )  # else they end there in either case
        for use in self._uses[operand, now, later]:
            wanted = (sampled or use.sampled, self.counting and operand != "weight")
            rounded = self._read(x, use, wanted, halves, layout, seed, last, joined, threshold)
            for step in use.steps:
                found[step] = rounded
        return found

    def choose(self, operand: str, x: Tensor, step: str) -> Tensor | None:
        """The T by which a step reads an operand later; in training also chooses the one to come. None in float."""
        read = self.reads[step, operand]
        if read.rule is None:
            return None
        self._note(x, read)
        return ops.next_threshold(x, self.thresholds, read.row, read.rule, self.training)  # type: ignore[no-any-return]

    def _note(self, x: Tensor, read: Read) -> None:
        """Remember, for T's that ranks choose together, what an operand looks like."""
        if self.training and self.histograms is not None:
            ops.add_histogram(x, self.histograms, read.row, read.rule)

    def _read(
        self,
        x: Tensor,
        use: Use,
        counted: tuple[bool, bool],
        halves: bool,
        layout: Layout,
        seed: Tensor | None,
        last: bool,
        joined: bool,
        threshold: Tensor | None,
    ) -> Operand:
        read, (sampled, streamed) = use.read, counted
        if read.rule is None:
            lanes = _lane_profile(x, joined) if streamed else None
            position, sample = ops.count_float(x, layout, sampled)
            return Operand(x, x, position, sample, lanes)
        half = read.half and x.dtype != torch.float64
        now_half, later_half = (use.now and half and halves), (use.later and half)
        single = (use.now and not now_half) or (use.later and not later_half)
        wanted = (single, now_half or later_half, sampled, streamed and not joined)
        random = seed if read.stochastic else None
        if threshold is None:
            self._note(x, read)
            state = (self.thresholds, random, read.rule, read.row)
            threshold, *found = ops.read(x, *state, layout, wanted, last, self.training)
        else:
            found = ops.round_and_count(x, threshold, random, read.rule, read.row, layout, wanted, last)
        in_single, in_half, position, sample, lanes = found
        if streamed and joined:
            lanes = _lane_profile(in_half if now_half or later_half else in_single, joined)
        kept = in_half if later_half else in_single, position, sample, lanes if streamed else None
        return Operand(in_half if now_half else in_single, *kept, threshold)

    def result(self, step: str, x: Tensor, dtype: torch.dtype, turned: bool = False) -> Tensor:
        """A step's fresh result as it leaves the chip, in the dtype that torch would return.

        Args:
            turned: whether it lies in channels_last for the product's sake alone, and shall be contiguous.
        """
        if not self.emulates(step):
            return x.to(dtype)
        done = x.dtype == torch.float16 and self.result_format == "fp16"
        if not turned and (done or self.result_format == "fp32"):
            return x.to(dtype)
        lent = step != "grad_weight"  # which may stay for long
        if backends.on_gpu(x) or torch.compiler.is_compiling():
            return product_ops.rounded_result(x, self.result_format, dtype, turned, lent)  # type: ignore[no-any-return]
        x = x.contiguous(memory_format=torch.channels_last) if turned else x
        out = product_ops.place(x, turned, lent)
        product_ops.round_result(x, out, self.result_format)
        return out if out.dtype == dtype else out.to(dtype)


def counting_lock(emulation: Emulation) -> AbstractContextManager[Any]:
    """What to count a step in. Compiled code takes no locks."""
    return nullcontext() if torch.compiler.is_compiling() else emulation.lock


def _lane_profile(x: Tensor, joined: bool) -> Tensor:
    profile: Tensor = lane_ops.lane_profile((lane_ops.count_joined_runs if joined else lane_ops.count_runs)(x))
    return profile
