"""Models for small images: what they take, how wide they are, and what they refuse."""

import pytest
import torch
from torch import nn

from lnpu_torch import ConfigError
from lnpu_torch.recipes.models import SMALL, ModelConfig, build

LAYERS = {"alexnet_cifar": (5, 3), "resnet18_cifar": (20, 1), "vgg16_cifar": (13, 1)}


@pytest.mark.parametrize("name", SMALL)
def test_small_models(name):
    model = build(ModelConfig(name=name, width=4), 7, (1, 32, 32))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    counted = tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in (nn.Conv2d, nn.Linear))
    assert counted == LAYERS[name]
    assert next(model.parameters()).shape[0] == 4


def test_images_too_small_are_refused():
    with pytest.raises(ConfigError, match="vgg16_cifar cannot take images of 3x8x8"):
        build(ModelConfig(name="vgg16_cifar", width=4), 10, (3, 8, 8))
