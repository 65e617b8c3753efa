"""Products that no layer of torch's makes: torch functions called in a module's own forward, emulated where they stand.

A site is a module, a torch function, and which of the module's calls of that function it is. Its state lies with the
module, as a layer's does. While such a module's forward runs, a mode of torch's sees which functions are called.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _ntuple
from torch.overrides import TorchFunctionMode

from lnpu_torch.nn import attention, contractions, functional, recurrent
from lnpu_torch.nn.layer_state import LayerState
from lnpu_torch.nn.modules import LISTENERS, EmulatedModule, Emulating, unwrapped
from lnpu_torch.quant.precision import Precision

UNKNOWN_SITE = "a product that its module has not made before: run the model on a batch before it is compiled"


class Choice(NamedTuple):
    """A precision for the sites whose name matches a pattern; None leaves them in float."""

    pattern: str
    precision: Precision | None


class Site:
    """One product of a module: its state, the function's name, elements of its weight, channels of what is streamed.

    `channels` are None once they were seen to change from call to call.
    """

    def __init__(self, emulation: LayerState, kind: str, weights: int, channels: tuple[int, int]) -> None:
        self.emulation, self.kind, self.weights = emulation, kind, weights
        self.channels: tuple[int, int] | None = channels


class InterceptedModule(Emulating):
    """What modules share of which the forward's own products are emulated: their sites, which travel with them."""

    sites: dict[str, Site]
    choices: tuple[Choice, ...]
    counting: bool
    waiting: dict[str, Tensor]
    """Thresholds of sites that are not known yet."""
    histogram_bins: int
    """Of `LayerState.share_choices`; 0 where no ranks choose together."""

    def set_choices(self, choices: tuple[Choice, ...]) -> None:
        """Begin to emulate: no site is known yet, and each gets the precision of the last choice that names it."""
        self.sites, self.choices, self.counting, self.waiting, self.histogram_bins = {}, choices, True, {}, 0

    @staticmethod
    def derive(original: type[nn.Module]) -> type[Emulating]:
        return _intercepted_class(original)

    def states(self) -> Iterable[LayerState]:
        return [site.emulation for site in self.sites.values()]

    def forget(self) -> None:
        del self.sites, self.choices, self.counting, self.waiting, self.histogram_bins

    def precision_of(self, site: str) -> Precision | None:
        """That of the last choice whose pattern matches a site's name."""
        matching = [each.precision for each in self.choices if fnmatchcase(site, each.pattern)]
        return matching[-1] if matching else None

    def state(self, name: str, weight: Tensor, channels: tuple[int, int], activations: bool) -> LayerState | None:
        """The state of a site, ready for a call; None if it is left in float.

        Args:
            weight: the second operand.
            channels: of the input, and of the error.
            activations: whether neither operand is a weight.
        """
        known = self.sites.get(name)
        if known is None and torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=UNKNOWN_SITE)
        known = known or self._new_site(name, weight, channels, activations)
        if known is None:
            return None
        if known.channels != channels and not torch.compiler.is_compiling():
            known.channels = None
        if known.emulation.device != weight.device:
            known.emulation.move(weight.device)
        known.emulation.training = self.training
        return known.emulation

    def _new_site(self, name: str, weight: Tensor, channels: tuple[int, int], activations: bool) -> Site | None:
        chosen = self.precision_of(name)
        if chosen is None:
            return None
        state = LayerState(chosen.of_activations() if activations else chosen, weight.device)
        state.counting = self.counting
        if self.histogram_bins:
            state.share_choices(self.histogram_bins)
        if name in self.waiting:
            state.check_thresholds(name, self.waiting[name])
            state.thresholds.copy_(self.waiting.pop(name))
        self.sites[name] = Site(state, name.split(".")[0], 0 if activations else weight.numel(), channels)
        for listen in tuple(LISTENERS):
            listen()
        return self.sites[name]


class _Products:
    """The products that one call of a function makes, each at its site."""

    def __init__(self, module: InterceptedModule, name: str) -> None:
        self._module, self._name = module, name

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, part: str = "") -> Tensor:
        state = self._state(part, weight, (weight.shape[1], weight.shape[0]))
        return F.linear(x, weight, bias) if state is None else functional.linear(x, weight, bias, state)

    def matmul(self, a: Tensor, b: Tensor, part: str = "") -> Tensor:
        if isinstance(b, nn.Parameter) and b.dim() == 2 and a.dim() > 1:
            return self.linear(a, b.mT, None, part)
        if isinstance(a, nn.Parameter) and a.dim() == 2 and b.dim() > 1:
            return self.linear(b.mT, a, None, part).mT
        columns = b.shape[-1] if b.dim() > 1 else 1
        state = self._state(part, b, (a.shape[-1], columns), activations=True)
        return torch.matmul(a, b) if state is None else functional.matmul(a, b, state)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, part: str = "", **sizes: Any) -> Tensor:
        """See `functional.convolution`."""
        inputs, outputs = weight.shape[1] * sizes["groups"], weight.shape[0]
        channels = (outputs, inputs) if sizes.get("transposed") else (inputs, outputs)
        state = self._state(part, weight, channels)
        if state is not None:
            return functional.convolution(x, weight, bias, state, **sizes)
        return _float_convolution(x, weight, bias, **sizes)

    def _state(
        self, part: str, weight: Tensor, channels: tuple[int, int], activations: bool = False
    ) -> LayerState | None:
        return self._module.state(f"{self._name}.{part}" if part else self._name, weight, channels, activations)


def _float_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, **sizes: Any) -> Tensor:
    """Torch's own convolution of any number of dimensions."""
    dims, transposed = weight.dim() - 2, sizes.pop("transposed", False)
    name = f"conv_transpose{dims}d" if transposed else f"conv{dims}d"
    out: Tensor = getattr(F, name)(x, weight, bias, **sizes)
    return out


def _linear(products: _Products, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return products.linear(input, weight, bias) if weight.dim() == 2 else NotImplemented


def _matmul(products: _Products, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Any:
    return products.matmul(input, other) if out is None else NotImplemented


def _reversed_matmul(products: _Products, other: Tensor, input: Tensor) -> Any:
    return products.matmul(input, other)


def _convolution(dims: int) -> Callable[..., Any]:
    sizes = _ntuple(dims)

    def run(
        products: _Products,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        padding = padding if isinstance(padding, str) else sizes(padding)
        given = {"stride": sizes(stride), "padding": padding, "dilation": sizes(dilation), "groups": groups}
        return products.convolution(input, weight, bias, **given)

    return run


def _transposed_convolution(dims: int) -> Callable[..., Any]:
    sizes = _ntuple(dims)

    def run(
        products: _Products,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        given = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
        of_dims = {name: sizes(size) for name, size in given.items()}
        return products.convolution(input, weight, bias, groups=groups, transposed=True, **of_dims)

    return run


def _attention(products: _Products, *args: Any, **kwargs: Any) -> Any:
    return attention.scaled_dot_product_attention(products.matmul, *args, **kwargs)


class Route(NamedTuple):
    """How a torch function is emulated: its name, and what runs in its place, which may find that it cannot."""

    name: str
    run: Callable[..., Any]


def _routes() -> dict[Any, Route]:
    """All functions that are emulated where a module's forward calls them."""
    routes: dict[Any, Route] = {F.linear: Route("linear", _linear)}
    for owner in (torch, torch.Tensor):
        for name in ("matmul", "mm", "bmm", "mv"):
            routes[getattr(owner, name)] = Route(name, _matmul)
        for name in ("addmm", "baddbmm", "addmv"):
            routes[getattr(owner, name)] = Route(name, contractions.addmm)
    routes[torch.linalg.matmul] = routes[torch.Tensor.__matmul__] = routes[torch.matmul]
    routes[torch.Tensor.__rmatmul__] = Route("matmul", _reversed_matmul)
    for dims in (1, 2, 3):
        routes[getattr(torch, f"conv{dims}d")] = Route(f"conv{dims}d", _convolution(dims))
        name = f"conv_transpose{dims}d"
        routes[getattr(torch, name)] = Route(name, _transposed_convolution(dims))
    for name in recurrent.CELLS:
        routes[getattr(torch, name)] = Route(name, recurrent.layers(name))
        routes[getattr(torch, f"{name}_cell")] = Route(f"{name}_cell", recurrent.single(name))
    routes[torch.einsum] = Route("einsum", contractions.einsum)
    routes[torch.tensordot] = Route("tensordot", contractions.tensordot)
    routes[F.bilinear] = Route("bilinear", contractions.bilinear)
    routes[F.scaled_dot_product_attention] = Route("scaled_dot_product_attention", _attention)
    forward = attention.multi_head_attention_forward
    routes[F.multi_head_attention_forward] = Route("multi_head_attention_forward", forward)
    return routes


ROUTES = _routes()
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class _Frame(NamedTuple):
    """A module whose forward runs, and how often it has called each function. Without choices nothing is emulated."""

    module: InterceptedModule
    calls: Counter[str]


class _Mode(TorchFunctionMode):
    """Sees the torch functions that the innermost intercepted module calls."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[_Frame] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        route, given = ROUTES.get(func), kwargs or {}
        if route is None or not self.frames or not self.frames[-1].module.choices:
            return func(*args, **given)
        if not (_taken(args) and _taken(tuple(given.values()))):
            return func(*args, **given)
        module, calls = self.frames[-1]
        calls[route.name] += 1
        count = calls[route.name]
        out = route.run(_Products(module, route.name if count == 1 else f"{route.name}.{count}"), *args, **given)
        return func(*args, **given) if out is NotImplemented else out


def _taken(args: tuple[Any, ...]) -> bool:
    """Whether all tensors among the arguments are such as can be emulated: plain, floating-point, with values."""
    for arg in args:
        if isinstance(arg, (list, tuple)):
            if not _taken(tuple(arg)):
                return False
        elif isinstance(arg, Tensor):
            floating = arg.dtype in FLOATING or arg.dtype in (torch.bool, torch.int64)  # masks, sizes of batches
            if type(arg) not in PLAIN or not floating or arg.layout != torch.strided or arg.is_meta:
                return False
    return True


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mode = _Mode()


_thread = _Thread()


@contextmanager
def _inside(module: InterceptedModule) -> Iterator[None]:
    """While a module's forward runs, its calls are seen; those of modules within it are theirs."""
    if torch.compiler.is_compiling():  # dynamo knows modes as blocks
        mode = _Mode()
        mode.frames.append(_Frame(module, Counter()))
        with mode:
            yield
        return
    mode = _thread.mode
    mode.frames.append(_Frame(module, Counter()))
    try:
        if len(mode.frames) > 1:
            yield
        else:
            with mode:
                yield
    finally:
        mode.frames.pop()


def _intercepting(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(self: InterceptedModule, *args: Any, **kwargs: Any) -> Any:
        with _inside(self):
            return forward(self, *args, **kwargs)

    return wrapped


_DERIVED: weakref.WeakKeyDictionary[type[nn.Module], type[InterceptedModule]] = weakref.WeakKeyDictionary()


def _intercepted_class(cls: type[nn.Module]) -> type[InterceptedModule]:
    """The class that modules of this class get."""
    known = _DERIVED.get(cls)
    if known is None:
        own = {"original_class": cls, "forward": _intercepting(cls.forward)}
        own |= {"__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
        known = _DERIVED[cls] = type(cls.__name__, (InterceptedModule, cls), own)
    return known


OWN = (nn.MultiheadAttention, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
"""Torch's modules that multiply by torch functions."""
BYPASSING = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Torch's modules that call a fused kernel in the place of their layers, unless somebody sees functions."""


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module may multiply in its own forward: it is somebody's own, or one of torch's that does."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        return False
    return isinstance(module, (*OWN, *BYPASSING)) or not type(module).__module__.startswith(("torch.nn.", "torch.ao."))


def emulations(model: nn.Module) -> dict[str, Site]:
    """The model's emulated products by name: of each layer, and of each site, as "module:function"."""
    found: dict[str, Site] = {}
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, EmulatedModule):
            weights = sum(parameter.numel() for parameter in module.parameters())
            found[name] = Site(module.emulation, module.torch_class.__name__, weights, _channels(module))
        elif isinstance(module, InterceptedModule):
            found |= {f"{name}:{site}": each for site, each in module.sites.items()}
    return found


def is_emulated(model: nn.Module) -> bool:
    """Whether any product of a model may be emulated."""
    return any(isinstance(module, Emulating) for module in model.modules())


def _channels(layer: Any) -> tuple[int, int]:
    """Channels of the operands that are streamed, input and error, each of which is a lane's."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels
