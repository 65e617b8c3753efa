"""Emulated layers. Each is torch's own class with another forward; Parameters and state_dict stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lnpu_torch import functional
from lnpu_torch.emulation import Emulation
from lnpu_torch.precision import Precision, Rule, precision


class Emulated(nn.Module):
    """What all emulated layers share: an `emulation`, which travels with the module but is not in its state_dict."""

    torch_class: ClassVar[type[nn.Module]]
    emulation: Emulation
    weight: Tensor

    def __init__(self, *args: Any, precision: str | Path | Rule | Precision = "fgmp", **kwargs: Any) -> None:
        """As torch's class, and `precision`: a preset's name, a YAML file, a `Rule` or a `Precision`."""
        super().__init__(*args, **kwargs)
        self.start(precision)

    def start(self, chosen: str | Path | Rule | Precision) -> None:
        """Begin to emulate with this precision: counters at zero, every T still to be chosen."""
        self.emulation = Emulation(precision(chosen), next(self.parameters()).device)

    def ready(self) -> Emulation:
        """The emulation for a call, where the weight is and in the module's mode."""
        device = self.weight.device
        if self.emulation.device != device:
            self.emulation.apply(lambda tensor: tensor.to(device))
        self.emulation.training = self.training
        return self.emulation

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.emulation.apply(fn)
        return self


class Linear(Emulated, nn.Linear):
    """`torch.nn.Linear`, emulated."""

    torch_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """As torch's: [..., in_features] -> [..., out_features], in the dtype that it would return."""
        return functional.linear(input, self.weight, self.bias, self.ready())


class _Conv(Emulated, nn.modules.conv._ConvNd):
    """A convolution of any number of dimensions; its padding mode is torch's own, and only zeros are padding."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.convolution(
            input,
            weight,
            bias,
            self.ready(),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d`, emulated."""

    torch_class = nn.Conv1d


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d`, emulated."""

    torch_class = nn.Conv2d


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d`, emulated."""

    torch_class = nn.Conv3d


class _ConvTranspose(Emulated, nn.modules.conv._ConvTransposeNd):
    """A transposed convolution of any number of dimensions."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            dims,
            self.dilation,  # type: ignore[arg-type]
        )
        return functional.convolution(
            input,
            self.weight,
            self.bias,
            self.ready(),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            transposed=True,
            output_padding=output_padding,
        )


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d`, emulated."""

    torch_class = nn.ConvTranspose1d


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`, emulated."""

    torch_class = nn.ConvTranspose2d


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`, emulated."""

    torch_class = nn.ConvTranspose3d


LAYERS: dict[type[nn.Module], type[Emulated]] = {
    layer.torch_class: layer
    for layer in (Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
}
"""The emulated class of each torch class."""


def emulated_layers(model: nn.Module) -> dict[str, Emulated]:
    """The model's emulated layers by name, a shared one once. Wrappers (DDP, torch.compile) add nothing to names."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.get_submodule("_orig_mod" if hasattr(model, "_orig_mod") else "module")
    return {name: module for name, module in model.named_modules() if isinstance(module, Emulated)}
