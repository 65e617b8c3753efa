"""Emulated layers, and the conversion of models to them."""

from lnpu_torch.nn import functional
from lnpu_torch.nn.modules import (
    EMULATED_CLASSES,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    EmulatedModule,
    Linear,
)

__all__ = [
    "EMULATED_CLASSES",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "EmulatedModule",
    "Linear",
    "functional",
]
