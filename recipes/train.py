"""Train an image classifier as the chip would, and see what each epoch costs. Reads from top to bottom.

lnpu train digits_resnet18                                     # 97 % and more on real scans, in about a minute
lnpu train digits_resnet18 precision=float32                   # the same in torch's own layers
lnpu train digits_resnet18 data.kind=npz data.path=images.npz  # your own images
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

import lnpu_torch as lnpu
from lnpu_torch.config import ConfigError, Frozen
from lnpu_torch.recipes import show
from lnpu_torch.recipes.data import Batches, DataConfig, load
from lnpu_torch.recipes.models import ModelConfig, build
from lnpu_torch.recipes.run_folder import RunFolder

Positive = Annotated[int, Field(ge=1)]
Real = Annotated[float, Field(ge=0)]


class TrainConfig(Frozen):
    """Every setting of a run; a recipe's YAML gives them, `key=value` on the command line changes them.

    `precision`: "fgmp", "fp8", "fp16", "float32" (torch's own layers, nothing counted) or a precision YAML.
    `overrides`: another precision, or null for float, by layer name pattern. `limit`: training and test batches per
    epoch at most. `chips`: names or files of the chips to price each epoch on. `threads`: CPU threads (null: torch's
    choice). `out`: the run's folder (null: a new one in runs/). `resume`: the folder of a run to go on with, in place
    of `out`.
    """

    model: ModelConfig
    data: DataConfig
    precision: str = "fgmp"
    overrides: dict[str, str | None] = {}
    epochs: Positive
    batch_size: Annotated[int, Field(ge=2)]
    limit: Positive | None = None
    lr: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "onecycle"] = "onecycle"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Real = 5e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    chips: Annotated[tuple[str, ...], Field(min_length=1)] = ("lnpu", "dense-fp16")
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Positive | None = None
    device: str = "auto"
    out: str | None = None
    resume: str | None = None


class Stopped(Exception):
    """Training ended before its last epoch. The message says where and how to go on; `exit_code` is the process's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train(config: TrainConfig, console: Console) -> list[dict[str, Any]]:
    """Train and test a model epoch by epoch, in a run folder.

    Returns:
        The rows of metrics.csv, one per epoch: loss, accuracies as shares, images/s, energy in pJ by chip.

    Raises:
        ConfigError: a setting, the data or the folder is wrong.
        Stopped: the loss is not finite, or Ctrl-C was pressed.
    """
    run = Run(config)
    console.print(show.start(run.model, run.device, run.images, run.folder.path, run.emulated))
    with Interrupts() as interrupts:
        for epoch in range(run.epoch + 1, config.epochs + 1):
            with lnpu.CostCounter(run.model) if run.emulated else contextlib.nullcontext() as cost:
                row = run.train_epoch(epoch, cost, console, interrupts)
            row["test_accuracy"] = run.test_accuracy()
            reports = [cost.report(chip=chip) for chip in config.chips] if cost else []
            row |= {f"{report.chip}_energy_pj": report.total.energy_pj for report in reports}
            run.save(epoch, row, cost.counts if cost else None)
            console.print(show.epoch(row, config.epochs, reports))
    console.print(show.summary(run.folder.counts(), config.chips))
    return run.metrics


class Run:
    """A run between two epochs: everything that a checkpoint holds, and what it is trained with."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.emulated = config, config.precision != "float32"
        self.device = pick_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        for chip in config.chips:
            lnpu.chip(chip)  # a wrong name is said now, not after the first epoch
        torch.manual_seed(config.seed)
        data = load(config.data)
        self.batches = Batches(data, config.data, config.batch_size, self.device)
        self.images = f"{len(data.train)} + {len(data.test)} images of {data.shape}, {data.classes} classes"
        self.model = build(config.model, data.classes, data.shape).to(self.device)
        if self.emulated:
            lnpu.convert(self.model, config.precision, overrides=config.overrides)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.emulated)  # the chip's errors are FP16
        self.steps = min(len(self.batches), config.limit or len(self.batches))
        self.schedule = make_schedule(self.optimizer, config, self.steps * config.epochs)
        self.epoch, self.metrics = 0, list[dict[str, Any]]()
        self.folder = RunFolder(config.resume or config.out or default_folder(config))
        self._open()

    def _open(self) -> None:
        settings = self.config.model_dump(mode="json")
        if self.config.resume:
            self._restore(self.folder.resume(settings))
        else:
            self.folder.start(settings)

    def train_epoch(
        self, epoch: int, cost: lnpu.CostCounter | None, console: Console, interrupts: Interrupts
    ) -> dict[str, Any]:
        """One pass over the training images; returns its part of the row in metrics.csv."""
        self.model.train()
        seen, right, loss_sum, started = 0, 0, 0.0, time.perf_counter()
        name = f"epoch {epoch}/{self.config.epochs}"
        with show.Progress(console, name, self.steps, cost, self.config.chips[0]) as progress:
            batches = itertools.islice(self.batches.train(self.config.seed, epoch), self.steps)
            for step, (images, labels) in enumerate(batches, start=1):
                where = f"epoch {epoch}, step {step} of {self.steps}"
                if interrupts.asked:
                    raise Stopped(f"Stopped in {where}. {self.folder.how_to_go_on()}", exit_code=130)
                loss, hits = self.step(images, labels, where)
                seen, right, loss_sum = seen + len(labels), right + hits, loss_sum + loss * len(labels)
                rate = seen / (time.perf_counter() - started)
                progress.advance(loss_sum / seen, right / seen, rate)
        return {"epoch": epoch, "loss": loss_sum / seen, "train_accuracy": right / seen, "images_per_s": rate}

    def step(self, images: Tensor, labels: Tensor, where: str) -> tuple[float, int]:
        """One step of SGD; returns the loss and the number of images classified rightly."""
        output = self.model(images)
        loss = F.cross_entropy(output, labels, label_smoothing=self.config.label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            culprit = first_not_finite(self.model, images)
            raise Stopped(f"The loss is {value} in {where}{culprit}. {self.folder.how_to_go_on()}", exit_code=2)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # lower: a gradient overflowed, and this step was left out
            self.schedule.step()
        return value, int((output.argmax(1) == labels).sum())

    @torch.no_grad()
    def test_accuracy(self) -> float:
        """Share of the test images that are classified rightly."""
        self.model.eval()
        right = total = 0
        for images, labels in itertools.islice(self.batches.test(), self.config.limit):
            right += int((self.model(images).argmax(1) == labels).sum())
            total += len(labels)
        return right / total

    def save(self, epoch: int, row: dict[str, Any], counts: lnpu.Counts | None) -> None:
        """Write the run folder's files after an epoch."""
        self.epoch = epoch
        self.metrics.append(row)
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"epoch": epoch, "metrics": self.metrics, "rng": self._rng()}
        state |= {"thresholds": lnpu.thresholds(self.model)} if self.emulated else {}
        self.folder.save(state, self.metrics, counts)

    def _restore(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        if self.emulated:
            lnpu.load_thresholds(self.model, state["thresholds"])
        torch.set_rng_state(state["rng"][0])
        if self.device.type == "cuda" and len(state["rng"]) > 1:
            torch.cuda.set_rng_state(state["rng"][1], self.device)
        self.epoch, self.metrics = state["epoch"], state["metrics"]

    def _rng(self) -> list[Tensor]:
        """The states of torch's generators: the CPU's, then that of a GPU in use."""
        on_gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu]

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, "schedule": self.schedule}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, or plain SGD where momentum is 0."""
    momentum, decay = config.momentum, config.weight_decay
    return torch.optim.SGD(model.parameters(), config.lr, momentum, weight_decay=decay, nesterov=momentum > 0)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """The learning rate over all `steps` of a run: half a cosine down, or up and down once."""
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    return OneCycleLR(optimizer, config.lr, total_steps=steps + 1, cycle_momentum=False)


def pick_device(name: str) -> torch.device:
    """The named device; "auto" is a GPU if there is one. Raises ConfigError if torch cannot use it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # fails on "meta" too, which holds no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: torch cannot use {name!r} here: {reason}") from None
    return torch.device(name)


def default_folder(config: TrainConfig) -> Path:
    """A new folder in runs/, named after the model, the precision and the time."""
    return Path("runs") / f"{config.model.name}-{Path(config.precision).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Tensor) -> str:
    """Words for the first parameter, or else the first layer's output for `images`, that is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"; the first parameter that is not finite: {name}"
    for name, output in layer_outputs(model, images):
        if not output.isfinite().all():
            return f"; the first layer whose output is not finite: {name}"
    return ""


def layer_outputs(model: nn.Module, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Name and output of every innermost layer of a forward pass, in the order in which they ran."""
    outputs: list[tuple[str, Tensor]] = []
    leaves = {name: module for name, module in model.named_modules() if not any(module.children())}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.append((name, output)))
        for name, module in leaves.items()
    ]
    model(images)
    for handle in handles:
        handle.remove()
    yield from outputs


class Interrupts:
    """While entered, notes a first Ctrl-C in `asked`, for the loop to stop between two steps; a second one raises."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self._in_main:
            signal.signal(signal.SIGINT, self._before)
