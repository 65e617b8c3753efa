"""The operations on a CPU, by loops that Numba compiles: what they do not take is left to plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lnpu_torch.ops.lanes.cpu import lane_profile
from lnpu_torch.ops.memory_format import is_dense
from lnpu_torch.ops.pair_counts import cpu as pair_counts
from lnpu_torch.ops.quantize import cpu as loops
from lnpu_torch.ops.quantize.reference import UNSET, Request, Rounded, Threshold, sample_step
from lnpu_torch.ops.reference import Backend


class CpuBackend(Backend):
    """See `Backend`."""

    count_weight_step = staticmethod(pair_counts.count_weight_step)
    count_grid_step = staticmethod(pair_counts.count_grid_step)

    def quantize(
        self, x: Tensor, threshold: Threshold, seed: Tensor | None, rule: str, stream: int, want_classes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = loops.taken(self.within_window(x.detach(), rule, threshold), seed)
        if values is None:
            return super().quantize(x, threshold, seed, rule, stream, want_classes)
        return loops.quantize(values, rule, int(threshold), want_classes)

    def round_and_count(self, x: Tensor, threshold: Threshold, seed: Tensor | None, request: Request) -> Rounded:
        values = loops.taken(self.within_window(x, request.rule, threshold), seed)
        if values is None:
            return super().round_and_count(x, threshold, seed, request)
        return loops.quantize_operand(values, int(threshold), request)[0]

    def quantize_operand(
        self, x: Tensor, states: Tensor, seed: Tensor | None, request: Request, training: bool
    ) -> Rounded:
        values, state = loops.taken(x, seed), states.numpy()[request.row]
        current = int(state[0])
        by = loops.compiled_rule(request.rule)
        chooses = training and by.choice == 0  # by another way than a histogram
        if values is None or current == UNSET or chooses or by.rule.window is not None:
            return super().quantize_operand(x, states, seed, request, training)
        rounded, chosen = loops.quantize_operand(values, current, request, training)
        if training:
            state[1] = chosen
        return rounded

    def next_threshold(self, x: Tensor, states: Tensor, row: int, rule: str, training: bool) -> Threshold:
        compiled, state = loops.compiled_rule(rule), states.numpy()[row]
        now = int(state[0])
        if now == UNSET or training:
            values = loops.taken(x) if compiled.choice else None
            chosen = (
                compiled.choose(x, now)
                if values is None
                else loops.choose_threshold(values, compiled, now, sample_step(x.numel()))
            )
            now = chosen if now == UNSET else now
            if training:
                state[:] = now, chosen
        return compiled.first if now == UNSET else now

    def histogram(self, x: Tensor, rule: str) -> Tensor | None:
        compiled = loops.compiled_rule(rule)
        values = loops.taken(x) if compiled.choice else None
        return super().histogram(x, rule) if values is None else loops.histogram(values, compiled)

    def lane_profile(self, values: Tensor, joined: bool = False) -> Tensor:
        return lane_profile(values, joined) if values.numel() else super().lane_profile(values, joined)

    def round_result(self, x: Tensor, form: str, dtype: torch.dtype) -> Tensor:
        if not (form == "fp16" and x.dtype == torch.float32 and x.numel() and is_dense(x)):
            return super().round_result(x, form, dtype)
        loops.round_half(x)
        return x if x.dtype == dtype else x.to(dtype)


BACKEND = CpuBackend()
