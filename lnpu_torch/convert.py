"""Swaps a model's layers for emulated ones in place, and back; says what stayed in float, and why."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lnpu_torch.config import ConfigError, listed, nearest
from lnpu_torch.float_products import forward_slots
from lnpu_torch.nn import LAYERS, Emulated, emulated_layers
from lnpu_torch.precision import Precision, Rule, precision

PrecisionLike = str | Path | Rule | Precision
Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model, chosen: PrecisionLike | None = "fgmp", *, overrides: Mapping[str, PrecisionLike | None] | None = None
) -> Model:
    """Emulate every layer of a model that can be, in place.

    Modules keep their identity: Parameters, hooks, state_dict keys and sharing are untouched. A layer that is
    emulated already starts anew with its precision. Other modules are left alone.

    Args:
        model: any module; torch's own Linear, Conv and ConvTranspose layers in it are converted, not subclasses.
        chosen: "fgmp", "fp8", "fp16", a YAML file, a `Rule` for all operands, a `Precision`, or None to convert only
            what `overrides` name.
        overrides: precision by layer name or pattern ("fc", "layer1.*"); None leaves a layer in float. The last
            pattern that matches a layer holds.

    Returns:
        The same model.

    Raises:
        ConfigError: unknown precision, or a pattern that matches no layer.
    """
    default = None if chosen is None else precision(chosen)
    layers = {name: module for name, module in model.named_modules() if _convertible(module)}
    choice = dict.fromkeys(layers, default)
    for pattern, value in (overrides or {}).items():
        matches = [name for name in layers if fnmatchcase(name, pattern)]
        if not matches:
            hint = nearest(pattern, layers) or f" (such as {listed(list(layers)[:3])})"
            raise ConfigError(f"override {pattern!r} matches no layer that can be emulated{hint}")
        choice |= dict.fromkeys(matches, None if value is None else precision(value))
    for name, module in layers.items():
        _revert(module)
        wanted = choice[name]
        if wanted is not None:
            _convert(module, wanted)
    return model


def revert(model: Model) -> Model:
    """Undo `convert` in place: torch's own classes again. Returns the same model.

    Raises:
        ConfigError: a layer's class was changed since, as `fully_shard` does.
    """
    for module in model.modules():
        _revert(module)
    return model


def thresholds(model: nn.Module) -> dict[str, Tensor]:
    """The emulation's only state, to be saved beside optimizer and scaler: each layer's T's, on the CPU."""
    return {name: layer.emulation.thresholds.cpu().clone() for name, layer in emulated_layers(model).items()}


def load_thresholds(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore what `thresholds` returned.

    Raises:
        ConfigError: the state belongs to a model with other emulated layers.
    """
    layers = emulated_layers(model)
    if layers.keys() != state.keys():
        differ = sorted(layers.keys() ^ state.keys())
        raise ConfigError(f"thresholds of another model: {len(differ)} layers differ, such as {differ[0]!r}")
    for name, layer in layers.items():
        layer.emulation.thresholds.copy_(state[name])


UNSEEN = "Functional calls in a model's own forward (matmul, F.linear, attention) are not emulated, nor counted."
BYPASSED = (
    "nn.TransformerEncoderLayer bypasses its layers in eval mode without gradients, emulated ones too: "
    "call torch.backends.mha.set_fastpath_enabled(False)."
)


@dataclass(frozen=True)
class CoverageRow:
    """One layer: whether it is emulated, and if not, why."""

    layer: str
    kind: str
    emulated: bool
    reason: str
    parameters: int


@dataclass(frozen=True)
class FloatProduct:
    """Multiplications outside emulated layers: the module that does them, torch's op, slots in one forward pass."""

    layer: str
    op: str
    slots: int


@dataclass(frozen=True)
class Coverage:
    """Which layers of a model are emulated, and notes on what passes them by. `str()` gives a table of the rest.

    If a batch was given, `products` are the multiplications of its forward pass that are not emulated, and `slots`
    are those of all of it; else both are None.
    """

    rows: tuple[CoverageRow, ...]
    notes: tuple[str, ...] = (UNSEEN,)
    products: tuple[FloatProduct, ...] | None = None
    slots: int | None = None

    @property
    def emulated(self) -> tuple[CoverageRow, ...]:
        """The layers that are emulated."""
        return tuple(row for row in self.rows if row.emulated)

    @property
    def in_float(self) -> tuple[CoverageRow, ...]:
        """The layers that stayed in float, each with its reason."""
        return tuple(row for row in self.rows if not row.emulated)

    def __str__(self) -> str:
        held, total = (sum(row.parameters for row in rows) for rows in (self.emulated, self.rows))
        share = f", with {held:,} of {total:,} parameters ({held / total:.1%})" if total else ""
        lines = [f"{len(self.emulated)} of {len(self.rows)} layers emulated{share}. In float:"]
        width = max((len(row.layer) for row in self.in_float), default=0)
        lines += [f"  {row.layer:<{width}}  {row.kind:<16}  {row.reason}" for row in self.in_float] or ["  none"]
        return "\n".join([*lines, *self._product_lines(), *self.notes])

    def _product_lines(self) -> list[str]:
        if self.products is None or not self.slots:
            return []
        outside = sum(product.slots for product in self.products)
        lines = [f"{outside:,} of {self.slots:,} slots of a forward pass in float ({outside / self.slots:.1%}):"]
        width = max((len(product.layer) for product in self.products), default=0)
        rows = [f"  {each.layer or '(model)':<{width}}  {each.op}  {each.slots:,}" for each in self.products]
        return lines + (rows or ["  none"])


def coverage(model: nn.Module, *inputs: Any) -> Coverage:
    """Which layers are emulated, and why the others stayed in float. Layers are modules with weights of their own.

    Args:
        inputs: a batch, to see which multiplications of a forward pass in training mode are in float too, attention's
            among them. A copy of the model runs it in float. Of a product whose operands both have gradients, backward
            does twice as many. Not seen are products of a matrix and a vector, and ops that are others' own.
    """
    bypassed = any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())
    rows, notes = tuple(_rows(model)), ((UNSEEN, BYPASSED) if bypassed else (UNSEEN,))
    if not inputs:
        return Coverage(rows, notes)
    slots = forward_slots(revert(copy.deepcopy(model)), inputs)
    emulated = emulated_layers(model)
    products = [FloatProduct(*place, count) for place, count in slots.items() if place[0] not in emulated]
    return Coverage(rows, notes, tuple(products), sum(slots.values()))


def _rows(model: nn.Module) -> Iterator[CoverageRow]:
    for name, module in model.named_modules():
        if any(isinstance(part, parametrize.ParametrizationList) for part in _ancestors(model, name)):
            continue
        owned = list(module.parameters(recurse=parametrize.is_parametrized(module)))
        if owned or type(module) in LAYERS:
            count = sum(p.numel() for p in owned if not isinstance(p, nn.parameter.UninitializedParameter))
            kind = type(module).__name__.removeprefix("Parametrized")
            yield CoverageRow(name or "(model)", kind, isinstance(module, Emulated), _reason(module), count)


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    parts = name.split(".") if name else []
    for end in range(len(parts) + 1):
        yield model.get_submodule(".".join(parts[:end]))


def _reason(module: nn.Module) -> str:
    """Why a module is not emulated; nothing for one that is."""
    if isinstance(module, Emulated):
        return ""
    if parametrize.is_parametrized(module):
        return "parametrized: its class is made on the fly; remove the parametrization first"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: its shapes are not known yet; run one batch first"
    if isinstance(module, nn.MultiheadAttention | nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "attention's projections are functional calls"
    if type(module) in LAYERS:
        return "left in float by choice"
    if isinstance(module, tuple(LAYERS)):
        return f"a subclass of {_torch_class(module).__name__}, whose own forward would be lost"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.Bilinear):
        return "no emulated layer of this kind"
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | nn.PReLU | nn.Embedding):
        return "element operations, not multiply-accumulate"
    return "not a layer of torch's; what it computes with its parameters is not seen"


def _torch_class(module: nn.Module) -> type:
    return next(cls for cls in type(module).__mro__ if cls in LAYERS)


def _convertible(module: nn.Module) -> bool:
    return isinstance(module, Emulated) or type(module) in LAYERS


def _convert(module: nn.Module, chosen: Precision) -> None:
    module.__class__ = LAYERS[type(module)]
    cast(Emulated, module).start(chosen)


def _revert(module: nn.Module) -> None:
    if isinstance(module, Emulated):
        if type(module) is not LAYERS[module.torch_class]:
            name = type(module).__name__
            raise ConfigError(
                f"a layer has become {name} (fully_shard does so with FSDP...): revert or convert before it"
            )
        del module.emulation
        module.__class__ = module.torch_class  # type: ignore[assignment]
