"""Emulated layers. Each is torch's own class with another forward; Parameters and state_dict stay as they are."""

from __future__ import annotations

import copy
import copyreg
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lnpu_torch.nn import functional
from lnpu_torch.nn.layer_state import LayerState
from lnpu_torch.quant.precision import Precision, Rule, precision

PICKLED = (
    "an emulated model is pickled whole: it loads only where lnpu_torch is installed, and not by "
    "torch.load(weights_only=True). Save its state_dict() (and lnpu_torch.thresholds), or lnpu_torch.revert it first"
)


class Emulating(nn.Module):
    """What modules share whose class `convert` has changed: states, which travel with them, not in their state_dict."""

    emulation_original: ClassVar[type[nn.Module]]
    emulation_attributes: ClassVar[tuple[str, ...]]
    """Those that the emulation adds. All names here begin alike, as users' modules have names of their own."""

    @staticmethod
    def emulation_derive(original: type[nn.Module]) -> type[Emulating]:
        """The class that a module of an original class gets."""
        raise NotImplementedError

    def emulation_states(self) -> Iterable[LayerState]:
        """The states of all products that this module makes itself."""
        raise NotImplementedError

    def emulation_forget(self) -> None:
        """Keep nothing of the emulation."""
        for name in self.emulation_attributes:
            delattr(self, name)

    def __prepare_scriptable__(self) -> nn.Module:
        """Raises RuntimeError: torch.jit.script asks for what it shall compile in this layer's place."""
        raise RuntimeError("torch.jit.script cannot compile an emulated model: lnpu_torch.revert it first")

    def _replicate_for_data_parallel(self) -> Self:
        """Raises RuntimeError: `nn.DataParallel` asks for the layers of its threads."""
        raise RuntimeError(
            "the threads of nn.DataParallel would share thresholds and counters: use DistributedDataParallel"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = getattr(super(), "__deepcopy__", None)
        if copied is not None:  # the original class has a way of its own
            twin: Self = copied(memo)
            if isinstance(twin, type(self)):
                twin.__dict__ |= copy.deepcopy(self._emulation(), memo)
            return twin
        if parametrize.is_parametrized(self):  # as torch copies such modules, which it refuses to pickle
            twin = memo[id(self)] = type(self).__new__(type(self))
            twin.__dict__ = copy.deepcopy(self.__dict__, memo)
            return twin
        make, args, state = self._emulation_reduce(4)[:3]
        twin = memo[id(self)] = make(*copy.deepcopy(args, memo))
        twin.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = self._emulation_reduce(protocol)
        if get_spawning_popen() is None:  # else it goes to a process that computes with it
            warnings.warn(PICKLED, stacklevel=2)
        return reduced

    def _emulation(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self.emulation_attributes}

    def _emulation_reduce(self, protocol: Any) -> tuple[Any, ...]:
        """As the original class is pickled, but emulated."""
        reduced: Any = super().__reduce_ex__(protocol)  # torch refuses it for a parametrized layer
        make, args, *state = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _unpickled, (self.emulation_derive, self.emulation_original), *state
        return _remade, (make, args, self.emulation_derive, self._emulation()), *state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for state in self.emulation_states():
            state.apply(fn)
        return self


class EmulatedModule(Emulating):
    """What all emulated layers share: an `emulation`."""

    torch_class: ClassVar[type[nn.Module]]
    emulation_attributes = ("emulation",)
    emulation: LayerState
    weight: Tensor

    def __init_subclass__(cls) -> None:
        if "emulation_original" not in vars(cls) and "torch_class" in vars(cls):
            cls.emulation_original = cls.torch_class

    def __init__(self, *args: Any, precision: str | Path | Rule | Precision = "fgmp", **kwargs: Any) -> None:
        """As torch's class, and `precision`: a preset's name, a YAML file, a `Rule` or a `Precision`."""
        super().__init__(*args, **kwargs)
        self.set_precision(precision)

    @staticmethod
    def emulation_derive(original: type[nn.Module]) -> type[Emulating]:
        return _emulated_class(original)

    def emulation_states(self) -> Iterable[LayerState]:
        return [self.emulation]

    def set_precision(self, chosen: str | Path | Rule | Precision) -> None:
        """Begin to emulate with this precision: counters at zero, every threshold still to be chosen."""
        own = next(itertools.chain(self.parameters(), self.buffers()), None)  # a parametrized weight is left alone
        self.emulation = LayerState(precision(chosen), (self.weight if own is None else own).device)

    def _prepare(self, weight: Tensor) -> LayerState:
        """The emulation for a call, where the weight is and in the module's mode."""
        if self.emulation.device != weight.device:
            self.emulation.move(weight.device)
        self.emulation.training = self.training
        return self.emulation


class Linear(EmulatedModule, nn.Linear):
    """`torch.nn.Linear`, emulated."""

    torch_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """As torch's: [..., in_features] -> [..., out_features], in the dtype that it would return."""
        weight = self.weight
        if _in_float(input, weight):
            return F.linear(input, weight, self.bias)
        return functional.linear(input, weight, self.bias, self._prepare(weight))


class _Conv(EmulatedModule, nn.modules.conv._ConvNd):
    """A convolution of any number of dimensions; its padding mode is torch's own, and only zeros are padding."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _in_float(input, weight):
            return super()._conv_forward(input, weight, bias)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.convolution(
            input,
            weight,
            bias,
            self._prepare(weight),
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


class _ConvTranspose(EmulatedModule, nn.modules.conv._ConvTransposeNd):
    """A transposed convolution of any number of dimensions."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims, weight = len(self.kernel_size), self.weight
        if _in_float(input, weight):
            output: Tensor = super().forward(input, output_size)
            return output
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
            weight,
            self.bias,
            self._prepare(weight),
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


EMULATED_CLASSES: dict[type[nn.Module], type[EmulatedModule]] = {
    layer.torch_class: layer
    for layer in (Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
}
"""The emulated class of each torch class."""

FORWARD = ("forward", "_conv_forward", "_output_padding", "__call__", "_call_impl", "__torch_function__")
"""What a subclass of torch's must have left alone, if the emulation is to do what it does."""


def torch_layer(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch's whose forward a module has, if there is an emulated one of it.

    What torch itself derives from its layers (lazy ones, fully_shard's, attention's projections) is none of these.
    """
    cls = unparametrized(module)
    cls = cls.emulation_original if issubclass(cls, Emulating) else cls
    base = next((each for each in cls.__mro__ if each in EMULATED_CLASSES), None)
    if base is None or "forward" in vars(module):
        return None
    between = cls.__mro__[: cls.__mro__.index(base)]
    own = any(name in vars(each) for each in between for name in FORWARD)
    return None if own or any(each.__module__.startswith("torch.") for each in between) else base


def change(module: nn.Module, kind: type[Emulating]) -> None:
    """Make an emulated layer, or a module of another kind, of one that is neither."""
    _change(module, kind.emulation_derive(unparametrized(module)))


def restore(module: Emulating) -> bool:
    """Make it what it was. Returns whether that could be done: not if somebody else has changed its class since."""
    cls = unparametrized(module)
    if cls is not module.emulation_derive(module.emulation_original):
        return False
    module.emulation_forget()
    _change(module, module.emulation_original)
    return True


def unparametrized(module: nn.Module) -> type[nn.Module]:
    """A module's class, without what `torch.nn.utils.parametrize` derives from it for this module alone."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _change(module: nn.Module, cls: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        derived = type(module)
        own = {name: value for name, value in vars(derived).items() if name not in ("__dict__", "__weakref__")}
        cls = type(derived.__name__, (cls,), own)
    module.__class__ = cls


_DERIVED: weakref.WeakKeyDictionary[type[nn.Module], type[EmulatedModule]] = weakref.WeakKeyDictionary()


def _emulated_class(cls: type[nn.Module]) -> type[EmulatedModule]:
    """The emulated class of a layer's: of torch's own, or of a subclass that keeps its forward."""
    known = EMULATED_CLASSES.get(cls) or _DERIVED.get(cls)
    if known is None:
        base = next(each for each in cls.__mro__ if each in EMULATED_CLASSES)
        own = {"emulation_original": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
        known = _DERIVED[cls] = type(cls.__name__, (EMULATED_CLASSES[base], cls), own)
    return known


def _unpickled(derive: Callable[[type[nn.Module]], type[Emulating]], original: type[nn.Module]) -> nn.Module:
    """A module that pickle fills."""
    cls = derive(original)
    return cls.__new__(cls)


def _remade(
    make: Callable[..., nn.Module],
    args: tuple[Any, ...],
    derive: Callable[[type[nn.Module]], type[Emulating]],
    added: dict[str, Any],
) -> nn.Module:
    """A module that its class makes in a way of its own, as it was emulated."""
    module = make(*args)
    module.__class__ = derive(type(module))
    module.__dict__ |= added
    return module


def _in_float(input: Tensor, weight: Tensor) -> bool:
    """Whether torch's own forward is taken: for shapes alone, and by those who trace or draw the model."""
    if in_float_for_tracers():
        return True
    return not torch.compiler.is_compiling() and input.is_meta and weight.is_meta


def in_float_for_tracers() -> bool:
    """Whether somebody traces or draws the model, who shall see torch's own functions."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return torch._C._is_tracing()


LISTENERS: list[Callable[[], None]] = []
"""Called before and after layers are converted or reverted."""


WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers that are none of its parts: DDP's, DataParallel's, torch.compile's."""
    while isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.get_submodule("_orig_mod" if hasattr(model, "_orig_mod") else "module")
    return model
