"""Products that no layer of torch's makes: torch functions called in a module's own forward, emulated where they stand.

A site is a module, a torch function, and which of the module's calls of that function it is. Its state lies with the
module, as a layer's does. While such a module's forward runs, a mode of torch's sees which functions are called.
"""

from __future__ import annotations

import functools
import inspect
import operator
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lnpu_torch.nn import attention, contractions, functional, recurrent
from lnpu_torch.nn.layer_state import LayerState
from lnpu_torch.nn.modules import LISTENERS, EmulatedModule, Emulating, in_float_for_tracers, unparametrized, unwrapped
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


class Sites:
    """The products of one module's own forward: those that it has made so far, and how it emulates them.

    `in_float` are those that were seen and are left in float; `waiting` are thresholds of some that were not seen yet.
    """

    def __init__(self, choices: tuple[Choice, ...]) -> None:
        self.known: dict[str, Site] = {}
        self.in_float: set[str] = set()
        self.choices, self.counting = choices, True
        self.waiting: dict[str, Tensor] = {}

    def precision_of(self, site: str) -> Precision | None:
        """That of the last choice whose pattern matches a site's name."""
        matching = [each.precision for each in self.choices if fnmatchcase(site, each.pattern)]
        return matching[-1] if matching else None

    def state(
        self, name: str, weight: Tensor, channels: tuple[int, int], activations: bool, training: bool
    ) -> LayerState | None:
        """The state of a site, ready for a call; None if it is left in float.

        Args:
            weight: the second operand.
            channels: of the input, and of the error.
            activations: whether neither operand is a weight.
            training: whether the module is in training mode.
        """
        known = self.known.get(name)
        if known is None and name not in self.in_float:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=UNKNOWN_SITE)
            known = self._new_site(name, weight, channels, activations)
        if known is None:
            return None
        if known.channels != channels and not torch.compiler.is_compiling():
            known.channels = None
        if known.emulation.device != weight.device:
            known.emulation.move(weight.device)
        known.emulation.training = training
        return known.emulation

    def _new_site(self, name: str, weight: Tensor, channels: tuple[int, int], activations: bool) -> Site | None:
        chosen = self.precision_of(name)
        if chosen is None:
            self.in_float.add(name)
            return None
        if torch.compiler.is_compiling():  # no graph of dynamo's could break
            raise RuntimeError(UNKNOWN_SITE)
        functional.check_untransformed(weight)
        with torch.inference_mode(False), unset_fake_temporarily():  # the state outlives the call
            state = LayerState(chosen.of_activations() if activations else chosen, weight.device)
        state.counting = self.counting
        if name in self.waiting:
            state.check_thresholds(name, self.waiting[name])
            state.thresholds.copy_(self.waiting.pop(name))
        site = Site(state, name.split(".")[0], 0 if activations else weight.numel(), channels)
        site = self.known.setdefault(name, site)  # another thread may have been faster
        for listen in tuple(LISTENERS):
            listen()
        return site


class InterceptedModule(Emulating):
    """What modules share of which the forward's own products are emulated: their sites, which travel with them."""

    emulation_attributes = ("emulation_sites",)
    emulation_sites: Sites

    def __init_subclass__(cls) -> None:
        """A user's class shall not hear of classes that are derived from it here."""

    @staticmethod
    def emulation_derive(original: type[nn.Module]) -> type[Emulating]:
        return _intercepted_class(original)

    def emulation_states(self) -> Iterable[LayerState]:
        return [site.emulation for site in tuple(self.emulation_sites.known.values())]


class _Products:
    """The products that one call of a function makes, each at its site."""

    def __init__(self, module: InterceptedModule, name: str) -> None:
        self._module, self._name = module, name

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, part: str = "") -> Tensor:
        state = self._state(part, weight, (weight.shape[1], weight.shape[0]))
        return F.linear(x, weight, bias) if state is None else functional.linear(x, weight, bias, state)

    def matmul(self, a: Tensor, b: Tensor, part: str = "") -> Tensor:
        if attention.is_weight(a) and not attention.is_weight(b):  # the weight shall be the second operand
            left, right = (x.mT if x.dim() > 1 else x for x in (b, a))
            out = self.matmul(left, right, part)
            return out.mT.contiguous() if a.dim() > 1 and b.dim() > 1 else out
        if attention.is_weight(b) and b.dim() == 2 and a.dim() > 1:
            return self.linear(a, b.mT, None, part)
        columns = b.shape[-1] if b.dim() > 1 else 1
        state = self._state(part, b, (a.shape[-1], columns), activations=not attention.is_weight(b))
        return torch.matmul(a, b) if state is None else functional.matmul(a, b, state)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, part: str = "", **sizes: Any) -> Tensor:
        """See `functional.convolution`."""
        inputs, outputs = weight.shape[1] * sizes.get("groups", 1), weight.shape[0]
        channels = (outputs, inputs) if sizes.get("transposed") else (inputs, outputs)
        state = self._state(part, weight, channels)
        if state is not None:
            return functional.convolution(x, weight, bias, state, **sizes)
        return _float_convolution(x, weight, bias, **sizes)

    def _state(
        self, part: str, weight: Tensor, channels: tuple[int, int], activations: bool = False
    ) -> LayerState | None:
        name = f"{self._name}.{part}" if part else self._name
        return self._module.emulation_sites.state(name, weight, channels, activations, self._module.training)


def _float_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, **sizes: Any) -> Tensor:
    """Torch's own convolution of any number of dimensions."""
    dims, transposed = weight.dim() - 2, sizes.pop("transposed", False)
    name = f"conv_transpose{dims}d" if transposed else f"conv{dims}d"
    out: Tensor = getattr(F, name)(x, weight, bias, **sizes)
    return out


def _linear(products: _Products, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return products.linear(input, weight, bias) if weight.dim() == 2 else NotImplemented


def _matmul(products: _Products, input: Tensor, other: Tensor) -> Any:
    return products.matmul(input, other) if isinstance(other, Tensor) else NotImplemented


def _reversed_matmul(products: _Products, other: Tensor, input: Tensor) -> Any:
    return _matmul(products, input, other)


CONVOLUTION = ("stride", "padding", "dilation", "groups")
TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
"""The arguments of torch's convolutions after the bias, in their order."""


def _convolution(dims: int, *names: str, **fixed: Any) -> Callable[..., Any]:
    """A convolution whose arguments after the bias have these names."""

    def run(
        products: _Products, input: Tensor, weight: Tensor, bias: Tensor | None = None, *sizes: Any, **named: Any
    ) -> Any:
        if weight.dim() != dims + 2 or len(sizes) > len(names):
            return NotImplemented
        return products.convolution(input, weight, bias, **dict(zip(names, sizes, strict=False)), **named, **fixed)

    return run


def _attention(products: _Products, *args: Any, **kwargs: Any) -> Any:
    return attention.scaled_dot_product_attention(products.matmul, *args, **kwargs)


class Route:
    """How a torch function is emulated: its name, and what runs in its place, which may find that it cannot.

    `renamed`: torch's names of arguments, where those of `run` are others.
    """

    def __init__(self, name: str, run: Callable[..., Any], **renamed: str) -> None:
        self.name, self.run, self.renamed = name, run, renamed
        given = list(inspect.signature(run).parameters.values())[1:]
        anything = any(each.kind is each.VAR_KEYWORD for each in given)
        self.known = None if anything else {each.name for each in given}
        self.most = sum(each.kind is each.POSITIONAL_OR_KEYWORD for each in given)
        self.most = 99 if any(each.kind is each.VAR_POSITIONAL for each in given) else self.most

    def named(self, args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any] | None:
        """Keyword arguments by the names of `run`; None if there are others, such as `out`, or too many of any."""
        given = {self.renamed.get(name, name): value for name, value in given.items()}
        if given.get("out", self) is None:  # as torch's Python functions pass on what was not given
            del given["out"]
        fits = len(args) <= self.most and (self.known is None or all(name in self.known for name in given))
        return given if fits else None


def _routes() -> dict[Any, Route]:
    """All functions that are emulated where a module's forward calls them."""
    routes: dict[Any, Route] = {F.linear: Route("linear", _linear)}
    for owner in (torch, torch.Tensor):
        for name, second in (("matmul", "tensor2"), ("mm", "mat2"), ("bmm", "mat2"), ("mv", "vec")):
            routes[getattr(owner, name)] = Route(name, _matmul, **{second: "other"})
        routes[owner.dot] = Route("dot", _matmul, tensor="other")
        routes[owner.inner] = Route("inner", contractions.inner)
        for name, a, b in (
            *(("addmm", "mat1", "mat2"), ("addmv", "mat", "vec")),
            *(("baddbmm", "batch1", "batch2"), ("addbmm", "batch1", "batch2")),
        ):
            run = contractions.addbmm if name == "addbmm" else contractions.addmm
            routes[getattr(owner, name)] = Route(name, run, **{a: "a", b: "b"})
            routes[getattr(torch.Tensor, f"{name}_")] = Route(
                f"{name}_", contractions.in_place(run), **{a: "a", b: "b"}
            )
    routes[torch.linalg.matmul] = routes[torch.Tensor.__matmul__] = routes[torch.matmul]
    routes[operator.matmul] = routes[torch.matmul]  # as torch.export sees it
    routes[torch.Tensor.__rmatmul__] = Route("matmul", _reversed_matmul)
    for dims in (1, 2, 3):
        name = f"conv{dims}d"
        routes[getattr(torch, name)] = Route(name, _convolution(dims, *CONVOLUTION))
        name = f"conv_transpose{dims}d"
        routes[getattr(torch, name)] = Route(name, _convolution(dims, *TRANSPOSED, transposed=True))
    for name in recurrent.CELLS:
        routes[getattr(torch, name)] = Route(name, recurrent.layers(name))
        routes[getattr(torch, f"{name}_cell")] = Route(f"{name}_cell", recurrent.single(name))
    routes[torch.einsum] = Route("einsum", contractions.einsum)
    routes[torch.tensordot] = Route("tensordot", contractions.tensordot)
    for function in (F.grouped_mm, torch._grouped_mm):
        routes[function] = Route("grouped_mm", contractions.grouped_mm)
    routes[F.bilinear] = Route("bilinear", contractions.bilinear)
    routes[F.scaled_dot_product_attention] = Route("scaled_dot_product_attention", _attention)
    forward = attention.multi_head_attention_forward
    routes[F.multi_head_attention_forward] = Route("multi_head_attention_forward", forward)
    return routes


ROUTES = _routes()
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
STANDING_FOR_PLAIN = (FakeTensor, FunctionalTensor)
"""What compilers pass through a model in the place of plain tensors."""


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
        if route is None:
            return func(*args, **given)
        out = self._emulated(route, args, given)
        if out is not NotImplemented:
            return out
        if torch.compiler.is_compiling() and all(each in PLAIN for each in types):  # not by modules around it either
            with torch._C.DisableTorchFunction():
                return func(*args, **given)
        return func(*args, **given)

    def _emulated(self, route: Route, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """What a function returns, emulated; NotImplemented if it is not."""
        if not self.frames or not self.frames[-1].module.emulation_sites.choices or in_float_for_tracers():
            return NotImplemented
        named = route.named(args, given)
        if named is None or not _taken((*args, *given.values())):
            return NotImplemented
        module, calls = self.frames[-1]
        calls[route.name] += 1
        count = calls[route.name]
        return route.run(_Products(module, route.name if count == 1 else f"{route.name}.{count}"), *args, **named)


def _taken(args: tuple[Any, ...]) -> bool:
    """Whether all tensors among the arguments can be emulated, and whether there are any that are multiplied."""
    tensors = _tensors(args)
    if tensors is None or not any(each.dtype in FLOATING for each in tensors):
        return False
    return all(map(_can_be_emulated, tensors))


def _tensors(args: Iterable[Any]) -> list[Tensor] | None:
    """All tensors among the arguments; None if something else is among them that torch functions may treat as such."""
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            inner = _tensors(arg)
            if inner is None:
                return None
            found += inner
        elif hasattr(type(arg), "__torch_function__"):
            return None
    return found


def _can_be_emulated(x: Tensor) -> bool:
    """Whether a tensor is plain, strided, with values, and of floating-point numbers, a mask or sizes of groups."""
    plain = type(x) in PLAIN or isinstance(x, STANDING_FOR_PLAIN)
    known = x.dtype in FLOATING or x.dtype in (torch.bool, torch.int32, torch.int64)
    return plain and known and x.layout == torch.strided and not x.is_nested and not x.is_meta


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
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, InterceptedModule):  # reverted, while somebody holds this method
            return forward(self, *args, **kwargs)
        with _inside(self):
            return forward(self, *args, **kwargs)

    return wrapped


_DERIVED: weakref.WeakKeyDictionary[type[nn.Module], type[InterceptedModule]] = weakref.WeakKeyDictionary()


def _intercepted_class(cls: type[nn.Module]) -> type[InterceptedModule]:
    """The class that modules of this class get."""
    known = _DERIVED.get(cls)
    if known is None:
        own = {"emulation_original": cls, "forward": _intercepting(cls.forward)}
        own |= {"__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
        known = _DERIVED[cls] = type(cls.__name__, (InterceptedModule, cls), own)
        if _wraps_forwards(cls):
            super(InterceptedModule, known).__init_subclass__()
    return known


def _wraps_forwards(cls: type[nn.Module]) -> bool:
    """Whether a base wraps the forward of each class that is derived from it, as transformers' layers do.

    They checkpoint in the outermost wrapper alone, which ours would be.
    """
    code = getattr(cls.forward, "__code__", None)
    return code is not None and ".__init_subclass__.<locals>." in code.co_qualname


OWN = (nn.MultiheadAttention, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
"""Torch's modules that multiply by torch functions."""
BYPASSING = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Torch's modules that call a fused kernel in the place of their layers, unless somebody sees functions."""


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module may multiply in its own forward: it is somebody's own, or one of torch's that does."""
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)) or "forward" in vars(module):
        return False
    return isinstance(module, (*OWN, *BYPASSING)) or not unparametrized(module).__module__.startswith(
        ("torch.nn.", "torch.ao.")
    )


def emulations(model: nn.Module) -> dict[str, Site]:
    """The model's emulated products by name: of each layer, and of each site, as "module:function"."""
    found: dict[str, Site] = {}
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, EmulatedModule):
            weights = sum(parameter.numel() for parameter in module.parameters())
            found[name] = Site(module.emulation, module.torch_class.__name__, weights, _channels(module))
        elif isinstance(module, InterceptedModule):
            found |= {f"{name}:{site}": each for site, each in tuple(module.emulation_sites.known.items())}
    return found


def is_emulated(model: nn.Module) -> bool:
    """Whether any product of a model may be emulated."""
    return any(isinstance(module, Emulating) for module in model.modules())


def _channels(layer: Any) -> tuple[int, int]:
    """Channels of the operands that are streamed, input and error, each of which is a lane's."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels
