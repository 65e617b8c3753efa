"""Trains networks, or takes trained ones, and counts what their last steps do. Claims and prices are elsewhere.

Zeros and FP8 shares depend on what a network has learnt, so that nothing is counted before it was trained. The same
weights then see the same batches more than once: as FGMP; rounded to binary16 alone, which shows what zeros FP8 adds;
and by other rules, some of which make zeros of small values.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

import lnpu_torch as lnpu
from lnpu_torch.files import CONFIGS, ConfigError, Frozen, is_file, listed
from lnpu_torch.recipes.batching import Division
from lnpu_torch.recipes.checkpoints import read_checkpoint
from lnpu_torch.recipes.data import open_batches
from lnpu_torch.recipes.models import ModelConfig, build
from lnpu_torch.recipes.settings import DataConfig, Few, Positive, Seed

Name = Literal["vgg16", "alexnet", "resnet18"]


class NetworkConfig(Frozen):
    """A network of the papers: the model that stands for it, steps of training, AdamW's learning rate.

    `weights`: those that training begins from, a checkpoint of `lnpu train` or a file of configs/reproduction.
    """

    model: ModelConfig
    weights: str | None = None
    steps: Annotated[Positive, Field(ge=2)]
    lr: Annotated[float, Field(gt=0)]


class CurveConfig(Frozen):
    """A 3x3 convolution: channels in and out, height and width of its result, images."""

    channels: Positive
    size: Positive
    batch: Positive


class Settings(Frozen):
    """What `lnpu reproduce` runs; configs/reproduction has three of them, `key=value` on the command line changes them.

    `size`: images are resized to size x size. `counted`: how many of the last steps are counted. `tested`: test images
    at most. `readings`: rules by which ResNet-18's steps are counted once more. `threads`: CPU threads (null: torch's
    choice).
    """

    networks: dict[Name, NetworkConfig]
    data: DataConfig
    size: Positive
    batch_size: Annotated[Positive, Field(ge=2)]
    counted: Positive
    tested: Positive
    readings: dict[str, lnpu.Rule] = {}
    curve: CurveConfig
    seed: Seed = 0
    threads: Annotated[Few, Field(ge=1)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Trained:
    """How training went in one precision: the mean loss of the counted steps, and the share of right test images."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Probe:
    """One network: `first` is an untrained one's first step, `fgmp` and `fp16` the same last steps in either precision.

    `readings` are these steps, too, by other rules. `prior`: whether training began from trained weights.
    """

    first: lnpu.Counts
    fgmp: lnpu.Counts
    fp16: lnpu.Counts
    trained: Trained
    in_float32: Trained
    tested: int
    readings: dict[str, tuple[lnpu.Counts, Trained]]
    prior: bool


def open_images(settings: Settings) -> Images:
    """The images of the settings.

    Raises:
        ConfigError: the data or the device is wrong, a network is missing, or too few steps are asked for.
    """
    missing = set(get_args(Name)) - settings.networks.keys()
    if missing:
        raise ConfigError(f"networks: the claims are about three; missing: {listed(sorted(missing))}")
    for name, network in settings.networks.items():
        if settings.counted >= network.steps:
            raise ConfigError(
                f"counted: {settings.counted} of {name}'s {network.steps} steps; the first one only trains"
            )
    return Images(settings)


def probe_all(settings: Settings, images: Images, say: Callable[[str], None]) -> dict[str, Probe]:
    """Train and count every network of the settings; `say` is told what runs. Raises ConfigError for a wrong model."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return {name: _probe(name, network, images, settings, say) for name, network in settings.networks.items()}


def pick_device(name: str) -> torch.device:
    """A GPU if there is one and it is not "cpu" that is asked for. Raises ConfigError if there is none for "cuda"."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: torch sees no CUDA GPU here; device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Images:
    """Batches of a data set on a device, resized, the same at every call."""

    def __init__(self, settings: Settings) -> None:
        self.device, division = pick_device(settings.device), Division(settings.batch_size, seed=settings.seed)
        self._batches = open_batches(settings.data, division, self.device)
        self.classes, self.shape = self._batches.classes, (3, settings.size, settings.size)
        self.tested = min(settings.tested, self._batches.images[1])
        self._name = Path(settings.data.path).name if settings.data.path else "scikit-learn's digits"

    def __str__(self) -> str:
        """What they are, in words."""
        train, test = self._batches.images
        kept = f"{self.tested:,} of {test:,}" if self.tested < test else f"{test:,}"
        return f"{self._name}: {train:,} images of {self.classes} classes to train on, {kept} to test"

    def train(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of these steps, made anew: at 224 x 224 pixels they would fill a memory."""
        while start < stop:
            epoch, first = divmod(start, len(self._batches.sizes))
            with contextlib.closing(self._batches.train(epoch + 1, first)) as batches:
                for images, labels in itertools.chain.from_iterable(itertools.islice(batches, stop - start)):
                    yield self._resized(images), labels
                    start += 1

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `tested` test images."""
        left = self.tested
        with contextlib.closing(self._batches.test()) as batches:
            for images, labels in batches:
                yield self._resized(images[:left]), labels[:left]
                left -= len(labels)
                if left <= 0:
                    return

    def _resized(self, images: Tensor) -> Tensor:
        images = F.interpolate(images, self.shape[1:], mode="bilinear", antialias=True)
        return images.expand(-1, 3, -1, -1)  # grey ones too are shown as colours, as the networks want them


def _probe(name: str, network: NetworkConfig, images: Images, settings: Settings, say: Callable[[str], None]) -> Probe:
    torch.manual_seed(settings.seed)
    model = build(network.model, images.classes, images.shape).to(images.device)
    ahead, end = network.steps - settings.counted, network.steps

    def training(of: nn.Module, precision: str | lnpu.Rule | None) -> Training:
        of = copy.deepcopy(of)
        return Training(of if precision is None else lnpu.convert(of, precision), network.lr, settings.seed)

    def last_steps(of: Training) -> tuple[lnpu.Counts, Trained]:
        counts, loss = of.counted(images.train(ahead, end))
        return counts, Trained(loss, of.accuracy(images))

    first, _ = training(model, "fgmp").counted(images.train(0, 1))
    if network.weights is not None:
        load_weights(model, network.weights)
    say(f"{name}: {network.steps} steps in float32")
    plain = training(model, None)
    plain.steps(images.train(0, ahead))
    in_float32 = Trained(plain.steps(images.train(ahead, end)), plain.accuracy(images))
    say(f"{name}: {network.steps} steps with FGMP")
    fgmp = training(model, "fgmp")
    with lnpu.no_count(fgmp.model):
        fgmp.steps(images.train(0, ahead))
    fp16, _ = training(fgmp.model, "fp16").counted(images.train(ahead, end))
    readings = {}
    for reading, rule in settings.readings.items() if name == "resnet18" else ():
        say(f"{name}: {settings.counted} steps with {reading}")
        readings[reading] = last_steps(training(fgmp.model, rule))
    counts, trained = last_steps(fgmp)
    return Probe(first, counts, fp16, trained, in_float32, images.tested, readings, network.weights is not None)


def load_weights(model: nn.Module, name: str) -> None:
    """Give a model the weights of a file, `{"model": state_dict}` as `lnpu train` writes it.

    Args:
        name: a path, or a file of configs/reproduction.

    Raises:
        ConfigError: there is no such file, or it holds no weights, or another model's.
    """
    path = Path(name) if is_file(Path(name)) else CONFIGS / "reproduction" / name
    if not is_file(path):
        raise ConfigError(f"weights: {name} is no file")
    state = read_checkpoint(path)
    try:
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"weights: {name} does not hold this model's: {error}") from None


class Training:
    """A model with its optimizer, and a loss scale where it is emulated, as the chip's errors are FP16."""

    def __init__(self, model: nn.Module, lr: float, seed: int) -> None:
        self.model, self._seed = model.train(), seed
        self._optimizer = torch.optim.AdamW(model.parameters(), lr)
        device, emulated = next(model.parameters()).device.type, bool(lnpu.coverage(model).emulated)
        self._scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=emulated)

    def steps(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Steps on these batches; returns their mean loss. Dropout drops the same whatever the precision."""
        torch.manual_seed(self._seed)
        losses = [self.step(*batch) for batch in batches]
        return sum(losses) / max(len(losses), 1)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One step; returns the loss."""
        loss = F.cross_entropy(self.model(images), labels)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.item()

    def counted(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[lnpu.Counts, float]:
        """What steps on these batches do, and their mean loss."""
        with lnpu.CostCounter(self.model) as cost:
            loss = self.steps(batches)
        return cost.counts, loss

    def accuracy(self, images: Images) -> float:
        """Share of the test images that are classified rightly."""
        self.model.eval()
        with torch.no_grad(), lnpu.no_count(self.model):
            right = [int((self.model(batch).argmax(1) == labels).sum()) for batch, labels in images.test()]
        self.model.train()
        share: float = sum(right) / images.tested
        return share
