"""Every setting of a run, and what each may be. It knows no images, no model and no training."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lnpu_torch.files import Frozen, listed
from lnpu_torch.hardware.chip import ChipFile, chip_setting, hold_chip
from lnpu_torch.quant.precision import PrecisionFile, hold_precision
from lnpu_torch.recipes.models import ModelConfig


def _at_home(value: Any) -> Any:
    """A path with the home folder in place of `~`."""
    return os.path.expanduser(value) if isinstance(value, str) else value


Positive = Annotated[int, Field(ge=1, lt=2**31)]
Whole = Annotated[int, Field(ge=0, lt=2**31)]
Few = Annotated[int, Field(ge=0, le=1024)]
"""Processes or threads."""
Real = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
PathText = Annotated[str, AfterValidator(_at_home)]
"""A path; `~` is the home folder."""

NEEDS_PATH = ("npz", "imagefolder")
CIFAR_FOLDER = "data"
"""Where torchvision's CIFAR is, unless data.path says otherwise."""
FLOAT32 = "float32"
"""The precision that leaves a model in torch's own layers."""


class DataConfig(Frozen):
    """Where the images come from, how training images are augmented, and how they are read.

    `kind`: "digits" (scikit-learn's 1,797 scans of handwritten digits, 8x8, shipped with it), "cifar10", "cifar100"
    (torchvision's, in the folder `path`, ./data when null; fetched with `download`), "npz" (the file `path` with
    x_train, x_test: uint8 [N, C, H, W] and y_train, y_test: integers [N]) or "imagefolder" (photographs in
    `path`/train/CLASS/ and `path`/val/CLASS/, such as ImageNet).

    `size`: images are resized to size x size pixels (null: left as they are; an imagefolder's are 224). `crop`: random
    shift by up to this many pixels, zeros moving in; an imagefolder's are cropped as is customary, at random from 8 to
    100 % of the photograph. `flip`: mirrored left to right at random, half of the time. `cutout`: side of a square at a
    random place that is blanked out (DeVries & Taylor 2017).

    `workers`: processes that read an imagefolder. `unreadable`: whether a photograph that cannot be read ends the run,
    or is named and left out. `bench`: measure how fast the images come, and train nothing.
    """

    kind: Literal["digits", "npz", "cifar10", "cifar100", "imagefolder"]
    path: PathText | None = None
    download: bool = False
    size: Positive | None = None
    crop: Whole = 0
    flip: bool = False
    cutout: Whole = 0
    workers: Few = 4
    unreadable: Literal["fatal", "skip"] = "fatal"
    bench: bool = False

    @model_validator(mode="after")
    def _path_and_crop_belong_to_the_kind(self) -> Self:
        if self.kind in NEEDS_PATH and self.path is None:
            raise ValueError(f"data.kind={self.kind} needs data.path")
        if self.kind == "digits" and self.path is not None:
            raise ValueError(f"data.path belongs to data.kind={listed(NEEDS_PATH)}, cifar10 or cifar100, not to digits")
        if self.kind == "imagefolder" and self.crop:
            raise ValueError("data.crop is not for an imagefolder, whose photographs are cropped at random anyway")
        return self


class CountConfig(Frozen):
    """`every`: count every n-th step only, and take those between to be like it (1: count all, exactly)."""

    every: Positive = 1


class CheckpointConfig(Frozen):
    """`every`: steps between checkpoints within an epoch (null: only at its end). `keep`: how many are kept (0: none
    is written, for trials)."""

    every: Positive | None = None
    keep: Whole = 2


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class TrainConfig(Frozen):
    """Every setting of a run; a recipe's YAML gives them, `key=value` on the command line changes them.

    `precision`: "fgmp", "fp8", "fp16", "float32" (torch's own layers, nothing counted) or a precision YAML.
    `overrides`: another precision, or null for float, by layer name pattern. `chip`: names or files of the chips to
    price each epoch on.

    `epochs`: passes over the training images. `lr`: the highest learning rate. `schedule`: "onecycle" raises the rate
    and lowers it again, "cosine" lowers it. `momentum`: SGD's. `weight_decay`: SGD's. `label_smoothing`: the share of a
    label that goes to all classes.

    `batch_size`: images per step of the optimizer, over all ranks. `accumulate`: pieces that each rank's share of a
    batch is computed in, one after the other. `limit`: training and test batches per epoch at most. `ema`: decay of the
    average of weights that is tested instead of the weights themselves (null: none). `amp`: activations between layers
    in FP16 (autocast). `compile`: torch.compile. `channels_last`: memory order of images and weights.

    `tensorboard`: also write the rows of metrics.csv for it. `threads`: CPU threads (null: torch's choice). `out`: the
    run's folder (null: a new one in runs/).

    A run's own settings hold what the files of precisions and chips say, beside their names.
    """

    model: ModelConfig
    data: DataConfig
    precision: Annotated[str | PrecisionFile, AfterValidator(_at_home)] = "fgmp"
    overrides: dict[str, Annotated[str | PrecisionFile | None, AfterValidator(_at_home)]] = {}
    chip: Annotated[
        tuple[Annotated[str | ChipFile, AfterValidator(_at_home)], ...],
        BeforeValidator(_one_or_several),
        Field(min_length=1),
    ] = ("lnpu", "dense-fp16")
    count: CountConfig = CountConfig()
    epochs: Positive
    batch_size: Annotated[Positive, Field(ge=2)]
    accumulate: Positive = 1
    limit: Positive | None = None
    lr: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "onecycle"] = "onecycle"
    momentum: Share = 0.9
    weight_decay: Real = 5e-4
    label_smoothing: Share = 0.1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    amp: bool = False
    compile: bool = False
    channels_last: bool = False
    checkpoint: CheckpointConfig = CheckpointConfig()
    tensorboard: bool = False
    seed: Seed = 0
    threads: Annotated[Few, Field(ge=1)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: PathText | None = None

    @property
    def emulated(self) -> bool:
        return self.precision != FLOAT32

    def holding_files(self, again: bool = False) -> TrainConfig:
        """The same settings with what the files say that they name; `again`: also where that is held already.

        Raises:
            ConfigError: a file is no precision or no chip.
        """
        precision = self.precision if self.precision == FLOAT32 else hold_precision(self.precision, again)
        overrides = {name: value and hold_precision(value, again) for name, value in self.overrides.items()}
        chips = tuple(hold_chip(value, again) for value in self.chip)
        return self.model_copy(update={"precision": precision, "overrides": overrides, "chip": chips})

    def for_any_folder(self) -> dict[str, Any]:
        """Plain data that mean the same in any working folder, for a run's config.yaml."""
        path = self.data.path or (CIFAR_FOLDER if self.data.kind in ("cifar10", "cifar100") else None)
        data = self.data.model_copy(update={"path": path and os.path.abspath(path)})
        return self.model_copy(update={"data": data}).model_dump(mode="json")


FREE = ("out", "threads", "device", "tensorboard", "checkpoint", "data.workers", "data.download", "data.bench")
"""Settings that may change when a run is resumed: they change neither weights nor counts (threads and device: not
beyond the order in which floating-point sums are taken)."""


def under_current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, whatever version wrote them, with today's names in what its chip files said."""
    chips = settings.get("chip")
    return settings | {"chip": [chip_setting(chip) for chip in chips]} if isinstance(chips, list) else settings
