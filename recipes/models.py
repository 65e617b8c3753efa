"""Image classifiers by name: a ResNet-18 for small images, and torchvision's. It knows no data and no precisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lnpu_torch.files import ConfigError, Frozen, listed, nearest
from lnpu_torch.recipes.torchvision_compat import import_torchvision

TORCHVISION = ("alexnet", "mobilenet_v2", "resnet18", "vgg16")
SMALL = ("alexnet_cifar", "resnet18_cifar", "vgg16_cifar")
NAMES = (*SMALL, *TORCHVISION)


class ModelConfig(Frozen):
    """Which model.

    `width`: channels of the first stage of a model for small images, "..._cifar" (64 when null). `batch_norm`: for
    VGG16 only, whether its convolutions are followed by batch norm (null: as is customary, so for small images and not
    for torchvision's). Without it, errors are sparse: ReLU sets them to zero, and nothing spreads them. `classes`:
    outputs (null: as many as the data has).
    """

    name: str
    width: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    batch_norm: bool | None = None
    classes: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.downsample(x)
        out: Tensor = self.relu(y)
        return out


class ResNet18(nn.Sequential):
    """ResNet-18 as is customary for small images: a 3x3 first convolution and no first pooling."""

    def __init__(self, classes: int, channels: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        for stage in range(4):
            outputs, stride = width << stage, 1 if stage == 0 else 2
            inputs = outputs if stage == 0 else outputs // 2
            blocks = nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))
            self.add_module(f"layer{stage + 1}", blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width << 3, classes)


def vgg16(classes: int, channels: int, width: int = 64, batch_norm: bool = True) -> nn.Sequential:
    """VGG16 as is customary for small images: one linear layer, after the last pooling."""
    layers: list[nn.Module] = []
    for multiple, repeats in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(repeats):
            convolution = nn.Conv2d(channels, multiple * width, 3, padding=1)
            # as torchvision begins, for without batch norm torch's own beginning shrinks what comes out of 13 layers
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            convolution.bias.data.zero_()  # type: ignore[union-attr]
            channels = multiple * width
            layers += [convolution, *([nn.BatchNorm2d(channels)] if batch_norm else []), nn.ReLU(True)]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def alexnet(classes: int, channels: int, width: int = 64) -> nn.Sequential:
    """AlexNet's five convolutions and three linear layers, with the kernels and poolings that fit small images."""
    layers: list[nn.Module] = []
    for multiple, pooled in ((1, True), (3, True), (6, False), (4, False), (4, True)):
        layers += [nn.Conv2d(channels, multiple * width, 3, padding=1), nn.ReLU(True)]
        layers += [nn.MaxPool2d(2)] if pooled else []
        channels = multiple * width
    hidden = 16 * width
    head = [nn.Dropout(), nn.Linear(channels * 16, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, hidden)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), *head, nn.ReLU(True), nn.Linear(hidden, classes)
    )


def build(config: ModelConfig, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A new model for images of `shape` (channels, height, width), randomly initialised from torch's global generator.

    Raises:
        ConfigError: the name is unknown, torchvision is missing, an option is not this model's, the model cannot take
            such images, or `config.classes` is not the data's number of classes.
    """
    if config.classes not in (None, classes):
        message = f"model.classes: {config.classes} outputs, but the data has {classes} classes"
        raise ConfigError(f"{message}: leave it out, and there are as many")
    if config.batch_norm is not None and "vgg16" not in config.name:
        raise ConfigError(f"model.batch_norm: {config.name} comes in one form only; leave it out")
    if config.name in SMALL:
        return _checked(_small(config, classes, shape[0]), config.name, shape)
    if config.name not in TORCHVISION:
        hint = nearest(config.name, NAMES)
        raise ConfigError(f"model.name: unknown model {config.name!r}{hint}; known: {listed(NAMES)}")
    if config.width is not None:
        raise ConfigError(f"model.width: {config.name} has a fixed width; leave it out")
    name = f"{config.name}_bn" if config.batch_norm else config.name
    constructor: Callable[..., nn.Module] = getattr(import_torchvision().models, name)
    return _checked(constructor(num_classes=classes), config.name, shape)


def _small(config: ModelConfig, classes: int, channels: int) -> nn.Module:
    width = config.width or 64
    if config.name == "vgg16_cifar":
        return vgg16(classes, channels, width, config.batch_norm is not False)
    return {"alexnet_cifar": alexnet, "resnet18_cifar": ResNet18}[config.name](classes, channels, width)


def _checked(model: nn.Module, name: str, shape: tuple[int, int, int]) -> nn.Module:
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *shape))
    except RuntimeError as error:
        size = "x".join(map(str, shape))
        raise ConfigError(f"model.name: {name} cannot take images of {size} (data.size may help): {error}") from None
    return model.train(was_training)
