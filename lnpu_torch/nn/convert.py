"""Swaps a model's layers for emulated ones in place, and back; says what stayed in float, and why."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lnpu_torch.files import ConfigError, listed, nearest
from lnpu_torch.nn.coverage import forward_macs
from lnpu_torch.nn.layer_state import check_form
from lnpu_torch.nn.modules import (
    EMULATED_CLASSES,
    LISTENERS,
    EmulatedModule,
    Emulating,
    change,
    restore,
    torch_layer,
    unparametrized,
    unwrapped,
)
from lnpu_torch.nn.sites import OWN, ROUTES, Choice, InterceptedModule, Sites, emulations, has_own_forward, is_emulated
from lnpu_torch.quant.precision import Precision, Rule, precision
from lnpu_torch.text_tables import Rows, add_row, plain_table, si

PrecisionLike = str | Path | Rule | Precision
Model = TypeVar("Model", bound=nn.Module)


_LEFT: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Layers, and modules with products of their own, that a `convert` was told to leave in float."""


def convert(
    model: Model,
    chosen: PrecisionLike | None = "fgmp",
    *,
    overrides: Mapping[str, PrecisionLike | None] | None = None,
    only: tuple[type[nn.Module], ...] | None = None,
    only_new: bool = False,
) -> Model:
    """Emulate every product of a model that can be, in place.

    Modules keep their identity: Parameters, hooks, state_dict keys and sharing are untouched. Torch's own layers get
    another forward. Of any other module the torch functions that its forward calls (linear, matmul, convolutions,
    attention, recurrent layers, einsum ...) are emulated where they are called, each as a site of its own. What is
    emulated already starts anew with its precision.

    Args:
        model: any module.
        chosen: "fgmp", "fp8", "fp16", a YAML file, a `Rule` for all operands, a `Precision`, or None to convert only
            what `overrides` name.
        overrides: precision by name or pattern, of layers and modules ("fc", "layer1.*") and of sites
            ("blocks.0.attn:matmul", "*:scaled_dot_product_attention*"); None leaves them in float. The last pattern
            that matches holds.
        only: emulate layers of these classes, and no sites.
        only_new: leave layers as they are that are emulated already, or were left in float by an earlier `convert`.

    Returns:
        The same model.

    Raises:
        ConfigError: unknown precision, or a pattern that matches nothing.

    Warns:
        UserWarning: nothing can be emulated; `coverage` says why.
    """
    default = None if chosen is None else precision(chosen)
    modules = dict(model.named_modules())
    layers = {name: each for name, each in modules.items() if _convertible(each)}
    hosts = {name: each for name, each in modules.items() if name not in layers and has_own_forward(each)}
    left = {}
    if only:
        left = {name: each for name, each in layers.items() if not isinstance(each, only)} | hosts
        layers, hosts = {name: each for name, each in layers.items() if name not in left}, {}
    choice: dict[str, Precision | None] = dict.fromkeys(layers, default)
    choices = {name: [Choice("*", default)] for name in hosts}
    for pattern, value in (overrides or {}).items():
        wanted = None if value is None else precision(value)
        found = _chosen(pattern, layers, hosts)
        if not found:
            hint = nearest(pattern, layers) or f" (such as {listed(list(layers)[:3])})"
            raise ConfigError(f"override {pattern!r} matches no layer that can be emulated{hint}")
        for name in found & layers.keys():
            choice[name] = wanted
        site = pattern.partition(":")[2] or "*"
        for name in found & hosts.keys():
            choices[name] = [*(choices[name] if site != "*" else ()), Choice(site, wanted)]
    if not layers and not hosts:
        warnings.warn(f"no layer of this model was converted: {why_nothing_is_emulated(model)}", stacklevel=2)
    sites = any(each.precision for some in choices.values() for each in some)
    with _changing_layers():
        for name, module in modules.items():
            if only_new and (isinstance(module, Emulating) or module in _LEFT):
                continue
            _revert(module)
            if choice.get(name):
                change(module, EmulatedModule)
                cast(EmulatedModule, module).set_precision(choice[name])  # type: ignore[arg-type]
            elif sites and (name in hosts or name in layers):
                some = choices.get(name, [])
                change(module, InterceptedModule)
                emulated = tuple(some) if any(each.precision for each in some) else ()
                cast(InterceptedModule, module).emulation_sites = Sites(emulated)
            by_choice = name in hosts and not any(each.precision for each in choices[name])
            if name in left or by_choice or (name in layers and choice[name] is None):
                _LEFT.add(module)
    return model


def _chosen(pattern: str, layers: Mapping[str, nn.Module], hosts: Mapping[str, nn.Module]) -> set[str]:
    """The layers and modules that an override means; of one that names sites, those that may have such."""
    module, colon, site = pattern.partition(":")
    if not colon:
        return {name for name in (*layers, *hosts) if fnmatchcase(name, pattern)}
    known = {route.name for route in ROUTES.values()}
    if not any(fnmatchcase(name, site.partition(".")[0]) for name in known):
        raise ConfigError(f"override {pattern!r} names no torch function that is emulated{nearest(site, known)}")
    return {name for name in hosts if fnmatchcase(name, module)}


def revert(model: Model) -> Model:
    """Undo `convert` in place: torch's own classes again. Returns the same model.

    Raises:
        ConfigError: a layer's class was changed since, as `fully_shard` does.
    """
    with _changing_layers():
        for module in model.modules():
            _revert(module)
            _LEFT.discard(module)
    return model


@contextmanager
def _changing_layers() -> Iterator[None]:
    """Around a change of which layers are emulated: open counters look at the model before and after it."""
    for listen in tuple(LISTENERS):
        listen()
    try:
        yield
    finally:
        for listen in tuple(LISTENERS):
            listen()


def thresholds(model: nn.Module) -> dict[str, Tensor]:
    """The emulation's only state, to be saved beside optimizer and scaler: each product's thresholds, on the CPU."""
    known = {name: site.emulation.thresholds.cpu().clone() for name, site in emulations(model).items()}
    return known | {f"{name}:{site}": state for name, sites in _sites(model) for site, state in sites.waiting.items()}


def _sites(model: nn.Module) -> Iterator[tuple[str, Sites]]:
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, InterceptedModule):
            yield name, module.emulation_sites


def load_thresholds(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore what `thresholds` returned; thresholds of sites that are not known yet wait for those.

    Raises:
        ConfigError: the state belongs to a model with other emulated layers, or holds what can be no thresholds. Then
            nothing is restored.
    """
    known, hosts = emulations(model), dict(_sites(model))
    waiting = {name for name in state.keys() - known.keys() if _may_come(name, hosts)}
    if known.keys() != state.keys() - waiting:
        differ = sorted(known.keys() ^ (state.keys() - waiting))
        raise ConfigError(f"thresholds of another model: {len(differ)} layers differ, such as {differ[0]!r}")
    for name in waiting:
        check_form(name, state[name])
    for name, site in known.items():
        site.emulation.check_thresholds(name, state[name])
    for name, site in known.items():
        site.emulation.thresholds.copy_(state[name])
    for name in waiting:
        module, _, site_name = name.rpartition(":")
        hosts[module].waiting[site_name] = state[name].cpu().clone()


def _may_come(name: str, hosts: Mapping[str, Sites]) -> bool:
    """Whether "module:function" is a site that its module may come to emulate."""
    module, colon, site = name.rpartition(":")
    return bool(colon) and module in hosts and hosts[module].precision_of(site) is not None


UNSEEN = "Functional calls in a module's own forward (matmul, F.linear, attention) are not emulated, nor counted."
NO_PRODUCT = "its own forward makes no product"
NO_PRODUCT_YET = "its own forward made no product yet; coverage(model, batch) runs it"
SEEN = "Functional calls in a module's own forward are emulated where they are called; a batch shows what is left."
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
    """Multiplications outside emulated layers: the module that does them, torch's op, macs in one forward pass.

    `macs` is None for an op that reads weights, and of which nobody knows how it multiplies.
    """

    layer: str
    op: str
    macs: int | None


@dataclass(frozen=True)
class Coverage(Rows):
    """Which layers of a model are emulated, and notes on what passes them by. `str()` gives a table of the rest.

    If a batch was given, `products` are the multiplications of its forward pass that are not emulated, and `macs`
    are those of all of it; else both are None.
    """

    rows: tuple[CoverageRow, ...]
    notes: tuple[str, ...] = (UNSEEN,)
    products: tuple[FloatProduct, ...] | None = None
    macs: int | None = None

    @property
    def emulated(self) -> tuple[CoverageRow, ...]:
        """The layers that are emulated."""
        return tuple(row for row in self.rows if row.emulated)

    @property
    def in_float(self) -> tuple[CoverageRow, ...]:
        """The layers that stayed in float, each with its reason."""
        return tuple(row for row in self.rows if not row.emulated)

    def to_rows(self) -> list[dict[str, Any]]:
        """Every layer, emulated or not."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        held, total = (sum(row.parameters for row in rows) for rows in (self.emulated, self.rows))
        share = f", with {held:,} of {total:,} parameters ({held / total:.1%})" if total else ""
        lines = [f"{len(self.emulated)} of {len(self.rows)} layers emulated{share}. In float:"]
        width = max((len(row.layer) for row in self.in_float), default=0)
        lines += [f"  {row.layer:<{width}}  {row.kind:<16}  {row.reason}" for row in self.in_float] or ["  none"]
        return "\n".join([*lines, *self._product_lines(), *self.notes])

    def _blocks(self) -> list[RenderableType]:
        """What `str()` says, for rich and notebooks."""
        head, *_ = str(self).splitlines()
        layers = plain_table(head, ["layer", "kind", "reason"], ["parameters"])
        for row in self.in_float:
            add_row(layers, row.layer, row.kind, row.reason, f"{row.parameters:,}")
        blocks: list[RenderableType] = [layers if self.in_float else Text(f"{head} none")]
        lines = self._product_lines()
        if lines and not self.products:
            blocks.append(Text(f"{lines[0]} none"))
        elif lines:
            products = plain_table(lines[0], ["module", "op"], ["MACs"])
            for each in self.products or ():
                add_row(products, each.layer or "(model)", each.op, "unknown" if each.macs is None else si(each.macs))
            blocks.append(products)
        return [*blocks, *map(Text, self.notes)]

    def _product_lines(self) -> list[str]:
        if not self.products and not self.macs:
            return []
        assert self.products is not None
        outside = sum(product.macs or 0 for product in self.products)
        unknown = any(product.macs is None for product in self.products)
        share = f"{outside / self.macs:.1%}" if self.macs else "unknown"
        least = "at least " if unknown else ""
        lines = [f"{least}{outside:,} of {self.macs:,} MACs of a forward pass in float ({least}{share}):"]
        width = max((len(product.layer) for product in self.products), default=0)
        rows = [
            f"  {each.layer or '(model)':<{width}}  {each.op}  "
            + ("an unknown number" if each.macs is None else f"{each.macs:,}")
            for each in self.products
        ]
        return lines + (rows or ["  none"])


def coverage(model: nn.Module, *inputs: Any, **named: Any) -> Coverage:
    """Which layers are emulated, and why the others stayed in float. Layers are modules with weights of their own.

    Args:
        inputs, named: a batch, as the model takes it (`coverage(model, images)`, `coverage(model, **batch)`), to see
            which multiplications of a forward pass in training mode are in float too, attention's among them. A copy of
            the model runs it in float. Of a product whose operands both have gradients, backward does twice as many.
    """
    model = unwrapped(model)
    seen = any(isinstance(module, InterceptedModule) and module.emulation_sites.choices for module in model.modules())
    bypassed = not seen and any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())
    hosts = any(has_own_forward(module) for module in model.modules() if not isinstance(module, EmulatedModule))
    notes = (*((SEEN if seen else UNSEEN,) if seen or hosts else ()), *((BYPASSED,) if bypassed else ()))
    if not inputs and not named:
        return Coverage(tuple(_rows(model, model)), notes)
    copied = _copied(model)
    before = _emulated_macs(copied)
    products = [FloatProduct(*place, count) for place, count in forward_macs(copied, inputs, named).items()]
    macs = _emulated_macs(copied) - before + sum(product.macs or 0 for product in products)
    return Coverage(tuple(_rows(model, copied)), notes, tuple(products), macs)


def _emulated_macs(model: nn.Module) -> int:
    """Multiply-accumulates that emulated products have counted in forward."""
    return sum(int(site.emulation.counters[0, :, 1].sum()) for site in emulations(model).values())


def _copied(model: Model) -> Model:
    """A deep copy, of pruned layers too: torch refuses to copy the weights that it computed for them."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


def why_nothing_is_emulated(model: nn.Module) -> str:
    """What to do, for a model without emulated layers, or why nothing can be done."""
    reasons = Counter(
        f"{row.kind}: {row.reason}" for row in _rows(unwrapped(model), unwrapped(model)) if not row.emulated
    )
    if not reasons:
        return "it has no layers with weights"
    if any(_convertible(module) for module in model.modules()):
        return "call lnpu_torch.convert(model, ...) first"
    most = [f"{reason} ({count} x)" if count > 1 else reason for reason, count in reasons.most_common(5)]
    more = f"; and {len(reasons) - 5} reasons more" if len(reasons) > 5 else ""
    return "; ".join(most) + more


def _rows(model: nn.Module, ran: nn.Module) -> Iterator[CoverageRow]:
    """The rows of a model's layers; of sites it is known from `ran`, the model or a copy, which were called."""
    for name, module in model.named_modules():
        if any(isinstance(part, parametrize.ParametrizationList) for part in _ancestors(model, name)):
            continue
        owned = list(module.parameters(recurse=parametrize.is_parametrized(module)))
        if owned or torch_layer(module):
            count = sum(p.numel() for p in owned if not isinstance(p, nn.parameter.UninitializedParameter))
            kind = type(module).__name__.removeprefix("Parametrized")
            reason = _reason(module, name, model, ran)
            yield CoverageRow(name or "(model)", kind, not reason, reason, count)


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    parts = name.split(".") if name else []
    for end in range(len(parts) + 1):
        yield model.get_submodule(".".join(parts[:end]))


def _reason(module: nn.Module, name: str, model: nn.Module, ran: nn.Module) -> str:
    """Why a module is not emulated; nothing for one that is."""
    if isinstance(module, EmulatedModule):
        return ""
    if isinstance(module, InterceptedModule):
        if not module.emulation_sites.choices:
            return "left in float by choice"
        multiplies = isinstance(module, OWN) or cast(InterceptedModule, ran.get_submodule(name)).emulation_sites.known
        if multiplies:
            return ""
        return NO_PRODUCT_YET if ran is model else NO_PRODUCT
    if isinstance(module, torch.fx.GraphModule):
        return "its forward is a graph: convert the model before it is traced"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: its shapes are not known yet; run one batch first"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        owner = model.get_submodule(name.rpartition(".")[0])
        seen = isinstance(owner, InterceptedModule) and bool(owner.emulation_sites.choices)
        return "" if seen else "attention's projections are functional calls"
    if torch_layer(module) and not _has_torchs_weight(module):
        return f"its weight is a {type(module.weight).__name__}, which the emulation cannot read"
    if module in _LEFT and (_convertible(module) or has_own_forward(module)):
        return "left in float by choice"
    if _convertible(module):
        return "added since: call convert again" if is_emulated(model) else "not converted"
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | nn.PReLU):
        return "element operations, not multiply-accumulate"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "looks rows up, no multiply-accumulate"
    if "forward" in vars(module):
        return "its forward was replaced: convert before that"
    if isinstance(module, tuple(EMULATED_CLASSES)):
        base = next(cls for cls in type(module).__mro__ if cls in EMULATED_CLASSES)
        if unparametrized(module).__module__.startswith("torch."):
            return f"derived from {base.__name__} by torch, as fully_shard does: convert before that"
    return "added since: call convert again" if is_emulated(model) else "not converted"


def _convertible(module: nn.Module) -> bool:
    if isinstance(module, EmulatedModule):
        return True
    return torch_layer(module) is not None and _has_torchs_weight(module)


def _has_torchs_weight(module: nn.Module) -> bool:
    """Whether the weight, or what a parametrization computes it from, is no tensor of somebody else's making."""
    known = (Tensor, nn.Parameter, nn.Buffer, nn.UninitializedParameter)
    weight = module._parameters.get("weight", vars(module).get("weight"))
    return weight is None or type(weight) in known or type(weight).__module__.startswith("torch.")


def _revert(module: nn.Module) -> None:
    if isinstance(module, Emulating) and not restore(module):
        name = type(module).__name__
        raise ConfigError(f"a layer has become {name} (fully_shard does so with FSDP...): revert or convert before it")
