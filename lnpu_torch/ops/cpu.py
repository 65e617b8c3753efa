"""The operations on a CPU, by loops that Numba compiles: what they do not take is left to plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lnpu_torch.ops.lanes.cpu import lane_profile
from lnpu_torch.ops.memory_format import dense, is_dense
from lnpu_torch.ops.pair_counts import cpu as pair_counts
from lnpu_torch.ops.quantize import cpu as loops
from lnpu_torch.ops.quantize.reference import UNSET, Rounded, Threshold
from lnpu_torch.ops.reference import ReferenceBackend


class CpuBackend(ReferenceBackend):
    """See `dispatch.Backend`."""

    def quantize(
        self, x: Tensor, threshold: Threshold, seed: Tensor | None, rule: str, stream: int, want_groups: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not loops.supports(x, seed):
            return super().quantize(x, threshold, seed, rule, stream, want_groups)
        return loops.quantize(dense(x.detach()).float(), loops.compiled_rule(rule), int(threshold), want_groups)

    def round_and_count(
        self,
        x: Tensor,
        threshold: Threshold,
        seed: Tensor | None,
        rule: str,
        stream: int,
        layout: Sequence[int],
        wanted: Sequence[bool],
        joined: bool = False,
    ) -> Rounded:
        if not loops.supports(x, seed):
            return super().round_and_count(x, threshold, seed, rule, stream, layout, wanted, joined)
        compiled = loops.compiled_rule(rule)
        return loops.quantize_operand(dense(x).float(), compiled, int(threshold), layout, wanted, joined)[0]

    def quantize_operand(
        self,
        x: Tensor,
        states: Tensor,
        seed: Tensor | None,
        rule: str,
        row: int,
        layout: Sequence[int],
        wanted: Sequence[bool],
        joined: bool,
        training: bool,
    ) -> Rounded:
        compiled, state = loops.compiled_rule(rule), states.numpy()[row]
        current = int(state[0])
        chooses = training and compiled.choice == 0  # by another way than a histogram
        if current == UNSET or chooses or not loops.supports(x, seed):
            return super().quantize_operand(x, states, seed, rule, row, layout, wanted, joined, training)
        rounded, chosen = loops.quantize_operand(dense(x).float(), compiled, current, layout, wanted, joined, training)
        if training:
            state[1] = chosen
        return rounded

    def next_threshold(self, x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Threshold:
        compiled, state = loops.compiled_rule(rule), states.numpy()[row]
        now = int(state[0])
        if now == UNSET or training:
            if compiled.choice and loops.supports(x):
                chosen = loops.choose_threshold(dense(x).float(), compiled, now)
            else:
                chosen = compiled.choose(x, now)
            now = chosen if now == UNSET else now
            if training:
                state[:] = now, chosen
        return compiled.first if now == UNSET else now

    def histogram(self, x: Tensor, rule: str) -> Tensor | None:
        compiled = loops.compiled_rule(rule)
        if compiled.choice and loops.supports(x):
            return loops.histogram(dense(x).float(), compiled)
        return super().histogram(x, rule)

    def lane_profile(self, values: Tensor, joined: bool = False) -> Tensor:
        return lane_profile(dense(values), joined) if values.numel() else super().lane_profile(values, joined)

    def count_weight_step(
        self,
        counters: Tensor,
        sizes: Tensor,
        lanes: Tensor,
        step: int,
        position: Tensor,
        weight: Tensor,
        profile: Tensor | None,
        geometry: Sequence[int],
        side: str,
    ) -> None:
        if not position.numel():
            return super().count_weight_step(counters, sizes, lanes, step, position, weight, profile, geometry, side)
        state = pair_counts.Counters(counters, sizes, lanes, step)
        return pair_counts.count_weight_step(state, position, weight, profile, tuple(geometry), side)

    def count_grid_step(
        self,
        counters: Tensor,
        sizes: Tensor,
        lanes: Tensor,
        step: int,
        big: Sequence[Tensor],
        small: Sequence[Tensor],
        profiles: Sequence[Tensor | None],
        geometry: Sequence[int],
        first: str,
    ) -> None:
        if not big[0].numel():
            return super().count_grid_step(counters, sizes, lanes, step, big, small, profiles, geometry, first)
        state = pair_counts.Counters(counters, sizes, lanes, step)
        return pair_counts.count_grid_step(state, big, small, profiles, tuple(geometry), first)

    def round_result(self, x: Tensor, form: str, dtype: torch.dtype) -> Tensor:
        if not (form == "fp16" and x.dtype == torch.float32 and x.numel() and is_dense(x)):
            return super().round_result(x, form, dtype)
        loops.round_half(x)
        return x if x.dtype == dtype else x.to(dtype)


BACKEND = CpuBackend()
