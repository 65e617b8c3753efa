"""Train an image classifier as the chip would, and see what each epoch costs. Reads from top to bottom.

lnpu train digits_resnet18                                     # 99 % and more on real scans, in less than a minute
lnpu train resnet18_cifar10 data.download=true                 # or any other recipe: lnpu recipes
lnpu train digits_resnet18 precision=float32                   # the same in torch's own layers
lnpu train digits_resnet18 data.kind=npz data.path=images.npz  # your own images
torchrun --nproc-per-node 8 --no-python lnpu train resnet18_imagenet data.path=/data/imagenet
lnpu train --resume runs/...                                   # after a crash, to the bit
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import lnpu_torch as lnpu
from lnpu_torch.files import ConfigError
from lnpu_torch.named_files import content_of
from lnpu_torch.quant.precision import PrecisionFile
from lnpu_torch.recipes import console_output, diagnosis, distributed, state
from lnpu_torch.recipes.batching import Division
from lnpu_torch.recipes.data import Pair, loader_speed, open_batches
from lnpu_torch.recipes.epoch_counter import Tallied, Tally
from lnpu_torch.recipes.interrupts import EXIT_CODES, Interrupts, Stopped
from lnpu_torch.recipes.models import build
from lnpu_torch.recipes.run_folder import RunFolder
from lnpu_torch.recipes.schedule import make_average, make_optimizer, make_schedule
from lnpu_torch.recipes.settings import TrainConfig

Row = dict[str, Any]


def train(config: TrainConfig, console: Console, resume: str | None = None, accept_changes: bool = False) -> list[Row]:
    """Train and test a model epoch by epoch, in a run folder.

    Args:
        resume: the folder of a run to go on with; a new one is begun there if it holds none.
        accept_changes: go on with it even if the settings have changed since.

    Returns:
        The rows of metrics.csv, one per epoch: loss, accuracies as shares, images/s, energy in pJ by chip and step.

    Raises:
        ConfigError: a setting, the data or the folder is wrong.
        Stopped: the loss is not finite, memory is full, or the process was asked to stop.
    """
    try:
        run = Run(config, console)
    except (RuntimeError, MemoryError) as error:
        if not diagnosis.out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(f"out of memory: data.size or model.width is too large, or the data are: {reason}") from error
    if config.data.bench:
        run.bench()
        return []
    run.open(resume, accept_changes)
    run.console.print(console_output.start(run.model, run.where, run.images, run.folder.path, config.emulated))
    with Interrupts() as interrupts:
        while run.epoch <= config.epochs:
            try:
                tallied, images_per_s = run.train_epoch(interrupts)
                run.finish_epoch(tallied, images_per_s)
            except (RuntimeError, MemoryError) as error:
                if not diagnosis.out_of_memory(error):
                    raise
                raise Stopped(run.memory_is_full(), exit_code=2) from error
    run.console.print(console_output.summary(run.folder.counts(), run.chips, run.folder.path))
    return run.metrics


class Run:
    """A run between two steps: everything that a checkpoint holds, and what it is trained with."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        config = config.holding_files()
        self.config, self.accelerator = config, distributed.start(config)
        self.ranks, self.device = self.accelerator.num_processes, self.accelerator.device
        self.console = console if self.accelerator.is_main_process else Console(quiet=True)
        self.chips = [lnpu.chip(content_of(chip)) for chip in config.chip]
        rank = self.accelerator.process_index
        division = Division(config.batch_size, config.accumulate, self.ranks, rank, config.seed)
        with self.accelerator.local_main_process_first() if config.data.download else contextlib.nullcontext():
            self.batches = open_batches(config.data, division, self.device, self.console.print)
        sizes = self.batches.sizes[: config.limit]
        self.steps, self.alike = len(sizes), sizes.count(sizes[0])  # the last batch may be smaller
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        torch.manual_seed(config.seed)
        self._build()
        torch.manual_seed((config.seed + rank) % 2**64)  # dropout is each rank's own
        self.epoch, self.done, self.sums, self.tallied = 1, 0, [0.0] * 3, Tallied()
        self.metrics: list[Row] = []

    def _build(self) -> None:
        """Model and optimizer; `model` is the bare one, `network` what accelerate makes of it."""
        config = self.config
        model = build(config.model, self.batches.classes, self.batches.shape)
        self.model = model.to(self.device, memory_format=self.memory_format)
        if config.emulated:
            overrides = {name: content_of(value) for name, value in config.overrides.items()}
            lnpu.convert(self.model, content_of(config.precision), overrides=overrides)
        self.average = make_average(self.model, config.ema)
        optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(optimizer, config, self.steps * config.epochs)
        self.compiled: nn.Module = self.model
        if config.compile:
            self.compiled = torch.compile(self.model)  # type: ignore[assignment]
        self.network, self.optimizer = self.accelerator.prepare(self.compiled, optimizer)
        distributed.add_gradients(self.network)
        self.shared = lnpu.ThresholdSync(self.model) if config.emulated and self.ranks > 1 else None

    def open(self, resume: str | None, accept_changes: bool) -> None:
        """Make the run's folder, or go on with what is in it."""
        settings = self.config.for_any_folder()
        path = distributed.once(self.accelerator, lambda: resume or self.config.out or new_folder(self.config))
        self.folder = RunFolder(path, self.config.checkpoint.keep)

        def begin() -> dict[str, Any] | None:
            found: dict[str, Any] | None = None
            if resume and self.folder.config.exists():
                found = self.folder.resume(settings, accept_changes, self.console.print)
            else:
                self.folder.start(settings)
            return found

        found = distributed.once(self.accelerator, begin)
        if found is not None:
            state.restore(self, found)

    def train_epoch(self, interrupts: Interrupts) -> tuple[Tallied, float]:
        """The rest of an epoch's steps; returns what this rank did in all of them, and images/s over all ranks."""
        config, started, before = self.config, time.perf_counter(), self.sums[2]
        every = config.count.every if config.emulated else None
        tally = Tally(self.model, self.alike, every, self.chips[0], self.tallied)
        shown = every and self.ranks == 1  # of several, this one knows its own share only
        energy = (lambda: console_output.energy(tally.so_far.counts, self.chips[0])) if shown else None
        name, rate = f"epoch {self.epoch}/{config.epochs}", 0.0
        self.model.train()
        bar = console_output.Progress(self.console, name, self.steps, self.done, energy)
        with contextlib.closing(self.batches.train(self.epoch, self.done)) as batches, bar as progress, tally:
            for pieces in itertools.islice(batches, self.steps - self.done):
                with tally.step(self.done):
                    *sums, asked = self.step(pieces, interrupts.asked)
                self.done += 1
                self.sums = [total + new for total, new in zip(self.sums, sums, strict=True)]
                loss, right, seen = self.sums
                rate = (seen - before) / (time.perf_counter() - started)
                progress.advance(loss / seen, right / seen, rate)
                if asked or (config.checkpoint.every and self.done % config.checkpoint.every == 0):
                    self.tallied = tally.so_far
                    self.save()
                if asked:
                    where = f"epoch {self.epoch}, step {self.done} of {self.steps}"
                    message = f"Stopped after {where}. {self.folder.how_to_go_on()}"
                    raise Stopped(message, EXIT_CODES.get(interrupts.asked, 0))
        return tally.so_far, rate

    def step(self, pieces: Iterator[Pair], asked: int) -> list[float]:
        """One step of SGD.

        Returns:
            Over all ranks: the images' losses, how many were classified rightly, how many there were, and whether any
            rank was asked to stop.
        """
        sums = torch.tensor([0.0, 0.0, 0.0, asked], dtype=torch.float64, device=self.device)
        for images, labels in pieces:
            images = images.to(memory_format=self.memory_format)
            with self.accelerator.accumulate(self.network):
                with torch.autocast(self.device.type, torch.float16, enabled=self.config.amp):
                    output = self.network(images)
                    loss = F.cross_entropy(output, labels, label_smoothing=self.config.label_smoothing)
                self.accelerator.backward(loss / self.ranks)
                with lnpu.pause_op_tracing():  # this is no work of the chip's
                    if self.shared:
                        self.shared.all_reduce()
                    right = (output.argmax(1) == labels).sum()
                    sums[:3] += torch.stack((loss.detach() * len(labels), right, right.new_tensor(len(labels))))
                    if self.accelerator.sync_gradients:
                        sums = self.accelerator.reduce(sums, "sum")
                        self._check(float(sums[0]), images)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:  # else a gradient overflowed
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        numbers: list[float] = sums.tolist()
        return numbers

    def _check(self, loss: float, images: Tensor) -> None:
        """Stop before weights are touched, on all ranks, if any rank's loss is not finite."""
        if not math.isfinite(loss):
            culprit = diagnosis.first_not_finite(self.model, images)
            where = f"epoch {self.epoch}, step {self.done + 1} of {self.steps}"
            raise Stopped(f"The loss is {loss} in {where}{culprit}. {self.folder.how_to_go_on()}", exit_code=2)

    @torch.no_grad()
    def test_accuracy(self) -> float:
        """Share of the test images that are classified rightly; by the average of the weights, if there is one."""
        network = self.compiled if self.average is None else self.average.module
        if self.average is not None and self.config.emulated:
            lnpu.load_thresholds(network, lnpu.thresholds(self.model))
        distributed.share_buffers(network)
        network.eval()
        right = torch.zeros(2, dtype=torch.float64, device=self.device)
        with contextlib.closing(self.batches.test()) as batches:
            for images, labels in itertools.islice(batches, self.config.limit):
                with torch.autocast(self.device.type, torch.float16, enabled=self.config.amp):
                    output = network(images.to(memory_format=self.memory_format))
                right += torch.stack(((output.argmax(1) == labels).sum(), labels.new_tensor(len(labels))))
        hits, total = self.accelerator.reduce(right, "sum").tolist()
        return float(hits / total)

    def finish_epoch(self, tallied: Tallied, images_per_s: float) -> None:
        """Test, price, show and save an epoch."""
        whole, (loss, right, seen) = Tallied.merge(distributed.gather(tallied)), self.sums
        row: Row = {"epoch": self.epoch, "loss": loss / seen, "train_accuracy": right / seen}
        row |= {"test_accuracy": self.test_accuracy(), "images": int(seen), "images_per_s": images_per_s}
        reports = [lnpu.price(whole.counts, chip) for chip in self.chips] if self.config.emulated else []
        for report in reports:
            row |= console_output.columns(report)
        if whole.counts.extrapolated:
            row |= {"counted_steps": len(whole.energies_pj), "energy_error": whole.error(self.alike)}
        self.metrics.append(row)
        self.epoch, self.done, self.sums, self.tallied = self.epoch + 1, 0, [0.0] * 3, Tallied()
        counts, tensorboard = whole.counts if reports else None, self.config.tensorboard
        self.save(lambda: self.folder.save_epoch(self.metrics, counts, tensorboard))
        self.console.print(console_output.epoch(row, self.config.epochs, reports), soft_wrap=True)

    def save(self, and_first: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint, and before it what belongs beside it."""
        captured = state.capture(self)

        def write() -> None:
            and_first()
            self.folder.checkpoints.save(captured, self.epoch, self.done)

        distributed.once(self.accelerator, write)

    def bench(self) -> None:
        """How fast images come when nothing is done with them."""
        speed = torch.tensor(loader_speed(self.batches, self.device, self.steps), dtype=torch.float64)
        images, rate = self.accelerator.reduce(speed.to(self.device), "sum").tolist()
        self.console.print(f"The loader alone: {rate:,.0f} images/s ({images:,.0f} images; on {self.where})")

    @property
    def where(self) -> str:
        """Device and ranks, in words."""
        return f"{self.device.type}{f' x {self.ranks} ranks' if self.ranks > 1 else ''}"

    @property
    def images(self) -> str:
        """The data, in words."""
        (train, test), shape = self.batches.images, self.batches.shape
        return f"{train:,} + {test:,} images of {shape}, {self.batches.classes} classes"

    def memory_is_full(self) -> str:
        """What to lower."""
        at_once = self.config.batch_size // self.config.accumulate // self.ranks
        return (
            f"Out of memory on {self.device}, with {at_once} images at a time. Lower batch_size "
            f"({self.config.batch_size}), or raise accumulate ({self.config.accumulate}), which leaves the batch as it "
            f"is and computes it in more pieces. {self.folder.how_to_go_on()}"
        )


def new_folder(config: TrainConfig) -> Path:
    """Make a folder in runs/, named after the model, the precision and the time, with a number where that is taken."""
    precision = config.precision.file if isinstance(config.precision, PrecisionFile) else config.precision
    folder = Path("runs") / f"{config.model.name}-{Path(precision).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    name, number = folder.name, 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run, begun in the same second
            number += 1
            folder = folder.with_name(f"{name}-{number}")
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
        else:
            return folder
