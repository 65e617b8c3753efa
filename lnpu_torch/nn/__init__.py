"""Emulated layers, and the conversion of models to them."""

from lnpu_torch.nn import functional
from lnpu_torch.nn.modules import (
    LAYERS,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Emulated,
    Linear,
)

__all__ = [
    "LAYERS",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Emulated",
    "Linear",
    "functional",
]
