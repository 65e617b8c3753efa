"""Sees every torch op that runs in a thread and its backward; adds up vector operations and float products."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from lnpu_torch.counts.vector_ops import (
    ELSEWHERE,
    SUMS,
    Kind,
    NotCounted,
    Phase,
    Use,
    VectorOp,
    VectorOpCounts,
    place,
    sum_uses,
)
from lnpu_torch.nn.coverage import is_product, macs
from lnpu_torch.nn.observers import LayerObserver, LayerSteps
from lnpu_torch.profiler.op_formulas import Call, Formula, size_of, tensors
from lnpu_torch.profiler.op_table import Other, find, general_kind
from lnpu_torch.profiler.reuse_tracker import PERIOD, Flow, Piece, ReuseTracker, pieces, width

UNREADABLE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a formula raises for arguments that it was not written for; they must not end anyone's training."""

OPTIMIZER_STEP = "Optimizer.step#"
"""How torch begins the name of the range that each optimizer's step is, for profilers to show."""


COMPILED = "code that torch.compile made ran in the block, and what it fuses is not seen"
COMPILED_FUNCTION = (
    "a function that torch.compile made is alive in this process, and what it computes is not seen "
    "(torch._dynamo.reset() discards it)"
)


class Moved(NamedTuple):
    """What an update's call moves: elements that it fetches and stores, and the words of 16 bits that those are."""

    fetched: int
    stored: int
    read: int
    written: int


class Seen(NamedTuple):
    """A call of an op: what it is, its sums as `vector_ops.SUMS` has them, and what it moves.

    `moved` is given for an update, in the step of that number; `total` for a gradient that is added to another one.
    """

    kind: Kind
    phase: Phase
    op: str
    values: tuple[int, ...]
    flow: Flow
    moved: Moved | None = None
    step: int = 0
    total: Piece | None = None


class _Ranges(threading.local):
    """Of each thread: the named ranges that are open, and whether each is an optimizer's step.

    Of the step's tensors, by address: those that were fetched for it, those stored by it, and those that it made.
    `closure` says whether the step is at its closure, which computes loss and gradients; None before that is known.
    `step` is the number of the latest step.
    """

    def __init__(self) -> None:
        self.open: list[bool] = []
        self.step = 0
        self.begin()

    def begin(self) -> None:
        """Begin a step, which in backward belongs to the running graph."""
        self.step += 1
        self.closure: bool | None = None
        self.graph = torch._C._current_graph_task_id()
        self.forget()

    def in_closure(self) -> bool:
        """Whether an op of the step, if it is no emulated layer's, is its closure's; then what was noted is forgotten.

        A closure has gradients on, or runs a backward; an update does neither, unless it is `differentiable`. Its
        tensors do not count as the update's, and where they lay others may come to lie.
        """
        closure = torch.is_grad_enabled() or torch._C._current_graph_task_id() != self.graph
        if closure:
            self.forget()
        return closure

    def forget(self) -> None:
        """Begin to note tensors."""
        self.fetched, self.stored, self.made = set[int](), set[int](), set[int]()

    def renew(self, made: list[Tensor]) -> None:
        """Tensors that the step has made without computing, such as copies; one may lie where another lay before."""
        for x in filter(_is_array, made):
            self.made.add(_address(x))
            self.fetched.discard(_address(x))

    def moved(self, operands: list[Tensor], results: list[Tensor]) -> Moved:
        """What a call of the step is the first to fetch, and the first to change of what stays after it.

        What is fetched and not changed is a gradient, in FP16. What is changed has torch's own width; if that is more,
        its parameter is written in FP16 once more, as layers read it. A gradient that some of torch's loops change on
        the way is none of what stays.
        """
        fetched = stored = read = written = 0
        for x in filter(_is_array, operands):
            if isinstance(x, Parameter) and x.grad is not None and _address(x.grad) in self.stored:
                self.stored.remove(_address(x.grad))
                stored -= x.numel()
                read -= (width(x) - 1) * x.numel()
                written -= (width(x) - min(width(x) - 1, 1)) * x.numel()
            if (address := _address(x)) not in self.fetched and address not in self.made:
                self.fetched.add(address)
                fetched += x.numel()
                read, written = read + x.numel(), written + min(width(x) - 1, 1) * x.numel()
        for x in filter(_is_array, results):
            if (address := _address(x)) not in self.fetched:
                self.made.add(address)
            elif address not in self.stored:
                self.stored.add(address)
                stored += x.numel()
                read += (width(x) - 1) * x.numel()
                written += (width(x) - min(width(x) - 1, 1)) * x.numel()
        return Moved(fetched, stored, read, written)


def _address(x: Tensor) -> int:
    """Where a tensor lies; of one without memory, which tensor it is."""
    return x.untyped_storage()._cdata if isinstance(x, FakeTensor) else x.data_ptr()


class OpTracer:
    """Adds up what a thread runs from `start` to `stop`. It changes nothing, and waits for no device.

    Torch takes it along to the threads of backward, but not to threads that a program starts itself. Into code that
    torch.compile made it sees only where that calls torch's own products. Of emulated layers it is told.

    Vector operations belong to no model. Of tracers that overlap, the one that was started last counts them, and
    those of which a layer is its, too.
    """

    def __init__(
        self,
        owns: Callable[[Any], bool] = lambda emulation: True,
        layers: Callable[[], set[int]] = set,
        facts: Callable[[Any], tuple[str, int]] = lambda emulation: ("", 0),
    ) -> None:
        """Trace beside the layers of one model.

        Args:
            owns: whether an emulation is one of the model's layers.
            layers: the ids of the model's emulations, at the moment.
            facts: the name of an emulation's layer, and the number of its parameters.
        """
        self.owns, self.layers, self.facts = owns, layers, facts
        self.reuse = ReuseTracker()
        self._layer = ""  # the one that ran last
        self._uses: dict[tuple[Kind, Phase, str, str], dict[int, tuple[int, int]]] = {}  # by distance
        self.products: dict[str, list[int]] = {}  # calls and multiply-accumulates in float, by op
        self._layer_calls = 0
        self._compiled_before = compiled_code()
        self._compiled = False
        self._alive = False  # whether there is compiled code
        self._reason: str | None = None  # why what ran may not all have been seen
        self._elsewhere = False
        self._sums: dict[tuple[Kind, Phase, str, str], list[int]] = {}
        self._uncounted: Counter[str] = Counter()
        self._lock = threading.Lock()  # backward has a thread for each device
        self._mode: _OpMode | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to see what this thread runs."""
        self._mode = _thread.mode
        self._mode.add(self)

    def stop(self) -> None:
        """See no more; what was seen remains. Tracers may be stopped in any order."""
        self._look_for_compiled_code()
        if self._mode:
            self._mode.remove(self)
            self._mode = None  # what it has seen stays as it is

    def is_compiled(self, layer_calls: int) -> bool:
        """Whether code that torch.compile made has run, as far as can be told."""
        if self._mode:
            self._look_for_compiled_code()
        return self._compiled or (self._layer_calls < layer_calls and self._alive)

    def sees_products(self, layer_calls: int) -> bool:
        """Whether products were in sight: all that ran in this thread and its backward, compiled or not."""
        return self._layer_calls >= layer_calls or self.is_compiled(layer_calls)

    def result(self, layer_calls: int) -> VectorOpCounts | NotCounted:
        """What was seen, if that is all.

        Args:
            layer_calls: the steps that emulated layers have counted meanwhile; fewer seen means a thread out of sight.
        """
        if self.is_compiled(layer_calls):
            return NotCounted(reason=COMPILED)
        if self._layer_calls < layer_calls:
            return NotCounted(reason=f"only {self._layer_calls} of {layer_calls} steps of layers ran in sight")
        return NotCounted(reason=self._reason) if self._reason else self.vector_ops

    @property
    def vector_ops(self) -> VectorOpCounts:
        """What was seen so far."""
        with self._lock:
            sums, uncounted = dict(self._sums), dict(sorted(self._uncounted.items()))
            period = self.reuse.period
            entries = [
                VectorOp(
                    kind=kind,
                    phase=phase,
                    op=op,
                    layer=layer,
                    uses=self._resolved((kind, phase, op, layer), period),
                    **dict(zip(SUMS, values, strict=True)),
                )
                for (kind, phase, op, layer), values in sums.items()
            ]
        note = (ELSEWHERE,) if self._elsewhere else ()
        return VectorOpCounts(entries=tuple(sorted(entries, key=place)), uncounted=uncounted, notes=note)

    def _resolved(self, key: tuple[Kind, Phase, str, str], period: int) -> tuple[Use, ...]:
        """Uses, with the distance from one update to the next where it was not known yet."""
        return sum_uses(Use(distance or period, *moved) for distance, moved in self._uses.get(key, {}).items())

    def saw(self, call: Seen) -> None:
        """Add a call of an op, and follow what it moves."""
        with self._lock:
            if call.moved:
                self.reuse.update(call.step, call.moved.read + call.moved.written)
                uses = [Use(PERIOD, call.moved.read, call.moved.written)]
            else:
                self._begins(call.phase == "backward")
                uses = self.reuse.summed(call.total) if call.total else self.reuse.op(call.flow)
            layer = "" if call.phase == "update" else self._layer
            self._add_up((call.kind, call.phase, call.op, layer), call.values, uses)

    def _begins(self, backward: bool) -> None:
        """Where an optimizer's step is over: what waits from one to the next has waited so long."""
        period = self.reuse.begins(backward)
        if period is not None:
            for known in self._uses.values():
                if PERIOD in known:
                    moved, before = known.pop(PERIOD), known.get(period, (0, 0))
                    known[period] = (before[0] + moved[0], before[1] + moved[1])

    def made(self, results: tuple[Piece, ...]) -> None:
        """Note what an op has made that computes nothing."""
        with self._lock:
            self.reuse.made(results)

    def _add_up(self, key: tuple[Kind, Phase, str, str], values: tuple[int, ...], uses: Sequence[Use] = ()) -> None:
        sums = self._sums.get(key)
        if sums is None:
            sums = self._sums[key] = [0] * len(SUMS)
        for index, value in enumerate(values):
            sums[index] += value
        for distance, read, written in uses:
            if read or written:
                known = self._uses.setdefault(key, {})
                before = known.get(distance, (0, 0))
                known[distance] = (before[0] + read, before[1] + written)

    def add_product(self, func: Any, number: int) -> None:
        """Add a product that ran outside of emulated layers."""
        with self._lock:
            known = self.products.setdefault(str(func), [0, 0])
            known[0], known[1] = known[0] + 1, known[1] + number

    def miss(self, func: Any) -> None:
        """Note an op that has no formula."""
        with self._lock:
            self._uncounted[str(func)] += 1

    def saw_compiled(self) -> None:
        """Note that code which torch.compile made has run."""
        self._compiled = True

    def leave_to_others(self) -> None:
        """Note that another tracer has counted what this one might have."""
        self._elsewhere = True

    def layer_ran(self, steps: LayerSteps) -> None:
        """Add up a layer's bias, added as results leave the accumulators, or its gradient: the sum of all errors."""
        layer, weights = self.facts(steps.emulation)
        with self._lock:
            self._begins(steps.backward)
            self._layer, self._layer_calls = layer, self._layer_calls + steps.counted
            self.reuse.layer(id(steps.emulation), steps.backward, weights, steps.results)
            if steps.bias and steps.backward:
                values = (1, steps.results, steps.bias, steps.results)
                self._add_up(("other", "backward", "bias", layer), values)
            elif steps.bias:
                self._add_up(("other", "forward", "bias", layer), (1, steps.bias, 0, steps.results))

    def _look_for_compiled_code(self) -> None:
        codes = compiled_code()
        self._alive, self._reason = bool(codes), None
        if codes - self._compiled_before:  # it was compiled to be run
            self._reason = COMPILED
        elif not all(map(_is_models, codes)):
            self._reason = COMPILED_FUNCTION


class _Op(NamedTuple):
    """An op: what is known of it, whether it `is_product`, its name without namespace, whether it is one on lists."""

    found: Formula | Other
    product: bool
    name: str
    on_lists: bool

    @classmethod
    def of(cls, func: Any) -> Self:
        """Of an overload, or of an op of higher order."""
        found, name = find(func), func._schema.name if isinstance(func, torch._ops.OpOverload) else str(func)
        product = found is not Other.LAYER and is_product(func)
        return cls(found, product, name.removeprefix("aten::").rstrip("_"), "::_foreach_" in name)


class _OpMode(LayerObserver):
    """The one mode of a thread, which passes what it sees to the tracers that were started there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracers: list[OpTracer] = []
        self._ops: dict[Any, _Op] = {}
        self._ranges = _Ranges()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Code is compiled, and compiled code runs, as if nobody watched."""
        return True

    def add(self, tracer: OpTracer) -> None:
        """Tell a tracer of what runs from now on."""
        self.tracers.append(tracer)
        if self not in _get_current_dispatch_mode_stack():
            self.__enter__()  # type: ignore[no-untyped-call]

    def remove(self, tracer: OpTracer) -> None:
        """Tell it no more. With the last one the mode leaves the stack, from wherever it is in it."""
        self.tracers = [each for each in self.tracers if each is not tracer]
        if self.tracers or self not in _get_current_dispatch_mode_stack():  # perhaps it is another thread's
            return
        above = []
        while _get_current_dispatch_mode_stack()[-1] is not self:
            above.append(_pop_mode())
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for mode in reversed(above):
            _push_mode(mode)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = self._ops.get(func) or self._ops.setdefault(func, _Op.of(func))
        if op.found is Other.NOTHING:  # four in five, so they come first
            return func(*args, **kwargs) if kwargs else func(*args)
        if self.blind:
            return func(*args, **kwargs or {})
        if op.found is Other.COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs or {})
        call = Call(args, kwargs or {}, func(*args, **kwargs or {}))
        if op.product:
            self._add_product(func, call)
        if isinstance(op.found, Formula):
            self._add(func, op, op.found, call)
        else:
            self._note(func, op, call)
        return call.out

    def _tell(self, what: Callable[..., None], *args: Any) -> None:
        """Tell the tracer started last, and those that share a layer with it; the others, that they are not told."""
        if not self.tracers:  # this is another thread's mode by now
            return
        *others, last = self.tracers
        what(last, *args)
        for tracer in others:
            what(tracer, *args) if tracer.layers() & last.layers() else tracer.leave_to_others()

    def layer_ran(self, steps: LayerSteps) -> None:
        """Tell those whose layer it was."""
        for tracer in self.tracers:
            if tracer.owns(steps.emulation):
                tracer.layer_ran(steps)

    def _add_product(self, func: Any, call: Call) -> None:
        try:
            self._tell(OpTracer.add_product, func, macs(func, call.args, call.kwargs, call.out))
        except UNREADABLE:
            self._tell(OpTracer.miss, func)
        node = torch._C._current_autograd_node()
        if node is not None and node.name() == "CompiledFunctionBackward":
            self._tell(OpTracer.saw_compiled)

    def _add(self, func: Any, op: _Op, formula: Formula, call: Call) -> None:
        try:
            reads = tensors(formula.reads(call))
            read = size_of(reads)
            counted = formula.count(call) if read else None
            if counted is None:  # no vector operation: a product without bias, or of integers
                return
            results = tensors(formula.results(call))
            kind, phase = self._place(func, op, formula, call)
            moved, flow, total = None, Flow((), ()), None
            if phase == "update":
                moved = self._moved(formula, call, results)
            else:
                flow = Flow(pieces(reads), pieces(results), formula.whole, _masks(formula, call))
            if phase == "backward" and flow.results and op.name == "add" and _sums_gradients():
                total = flow.results[0]
        except UNREADABLE:
            self._note(func, op._replace(found=Other.UNKNOWN), call)
            return
        values = (1, read, size_of(results), *counted, *(moved or ())[:2])
        self._tell(OpTracer.saw, Seen(kind, phase, op.name, values, flow, moved, self._ranges.step, total))

    def _place(self, func: Any, op: _Op, formula: Formula, call: Call) -> tuple[Kind, Phase]:
        """An op's kind and phase."""
        updates = op.on_lists or formula.kind == "optimizer"
        if any(self._ranges.open):
            self._ranges.closure = self._ranges.in_closure()
            updates |= not self._ranges.closure
        if updates:
            return "optimizer", "update"
        backward = _in_backward()
        kind = formula.kind
        if kind == "other":
            kind = general_kind(func, call, torch._C._current_autograd_node() if backward else None)
        return kind, "backward" if backward else "forward"

    def _moved(self, formula: Formula, call: Call, results: list[Tensor]) -> Moved:
        """What an update's call fetches and stores; one that is in no optimizer's step is a step of its own."""
        if formula.on_the_way:
            return Moved(0, 0, 0, 0)
        if not any(self._ranges.open):
            self._ranges.forget()
        return self._ranges.moved(tensors([call.args, *call.kwargs.values()]), results)

    def _note(self, func: Any, op: _Op, call: Call) -> None:
        """What ops without a formula tell."""
        if op.found is Other.MOVES:
            updates = any(self._ranges.open) and not self._ranges.in_closure()
            made = tensors(call.out)
            if not updates:
                self._tell(OpTracer.made, pieces(made))
            elif not call.args or call.out is not call.args[0]:
                self._ranges.renew(made)
        elif op.found is Other.BEGINS:
            self._ranges.open.append(str(call.args[0]).startswith(OPTIMIZER_STEP))
            if self._ranges.open[-1]:
                self._ranges.begin()
        elif op.found is Other.ENDS and self._ranges.open:
            self._ranges.open.pop()
        elif op.found is Other.LAYER:
            self._tell(OpTracer.saw_compiled)
        elif op.found is Other.UNKNOWN and not op.product and size_of(tensors(call.operands)):
            self._tell(OpTracer.miss, func)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mode = _OpMode()


_thread = _Thread()


def _masks(formula: Formula, call: Call) -> tuple[Piece, ...]:
    """What a call reads of which bits were kept."""
    if formula.mask is None:
        return ()
    of, bits = formula.mask(call)
    return pieces(tensors(of), -(-bits // 16))


def _is_array(x: Tensor) -> bool:
    """Whether a tensor is neither empty nor a single number."""
    return x.dim() > 0 and x.numel() > 0


def _sums_gradients() -> bool:
    """Whether autograd is adding a gradient to the one that a parameter has already."""
    node = torch._C._current_autograd_node()
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


def _in_backward() -> bool:
    """Whether an op belongs to backward. A checkpoint's forward, run again there with gradients on, does not."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def compiled_code() -> set[CodeType]:
    """The functions of which code that torch.compile made is alive in this process, and so may run."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    if dynamo is None or not dynamo.output_codes.seen_ids:
        return set()
    return {code for code in (reference() for reference in dynamo.input_codes.seen) if code is not None}


def _is_models(code: CodeType) -> bool:
    """Whether a compiled function is a module's forward, or of torch's compiler itself.

    Its layers, and the products that it calls, show whether it has run. A function of another kind could run unseen.
    """
    torchs = Path(torch.__file__).parent
    wrappers = (torchs / "_dynamo", torchs / "_compile.py", torchs / "nn/modules/module.py")
    if any(Path(code.co_filename).is_relative_to(wrapper) for wrapper in wrappers):
        return True
    return code.co_name == "forward" or code.co_name.startswith("torch_dynamo_resume_in_forward_")
