"""LNPU as a callback of Hugging Face's Trainer. `CostLog` does the work."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch.files import write
from lnpu_torch.integrations.cost_log import CostLog

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    needs = "lnpu_torch.integrations.transformers needs Transformers: pip install 'lnpu-torch[integrations]'"
    raise ModuleNotFoundError(needs, name=error.name) from error

THRESHOLDS = "lnpu_thresholds.pt"
"""The file of each layer's thresholds, in the Trainer's checkpoints."""


class LnpuCallback(TrainerCallback):
    """Trains the model on the chip's arithmetic, logs each epoch's energy and shares, and writes the run's folder.

    The arguments are those of `CostLog`. The model is converted in place as training begins, and stays so. What runs
    between two optimizer steps, such as evaluation, is not counted. A row per epoch, `CHIP_energy_pj`, `zero_share`
    and `fp8_share`, goes to the Trainer's `state.log_history` (and so into `trainer_state.json`). `costs.finish()`'s
    reports are in `reports` after training.
    """

    def __init__(self, precision: Any = "fgmp", **settings: Any) -> None:
        self.costs = CostLog(precision, **settings)
        self.reports: list[lnpu.Report] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        self.costs.convert(model)
        self.costs.start(resumed=state.global_step > 0)
        if state.global_step:
            _restore(model, _checkpoint(args, state) / THRESHOLDS)

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.costs.begin_epoch()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.costs.go_on()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.costs.step_done()
        self.costs.pause()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        row = self.costs.end_epoch(math.ceil(state.epoch or 0))
        state.log_history.append({**row, "epoch": state.epoch, "step": state.global_step})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            thresholds = lnpu.thresholds(model)
            write(_checkpoint(args, state) / THRESHOLDS, lambda file: torch.save(thresholds, file))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.reports = self.costs.finish()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that the Trainer saves to, and resumes from, at this step."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _restore(model: nn.Module, file: Path) -> None:
    if file.exists():
        lnpu.load_thresholds(model, torch.load(file, weights_only=True))
    else:
        warnings.warn(f"{file} is not there: every threshold is chosen anew, from the first batches", stacklevel=2)
