"""Watch sees every torch op that runs in a thread, and in its backward, and adds up the operations on elements."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from typing import Any

import torch

from lnpu_torch.element_ops import Other, find, general_kind
from lnpu_torch.elements import SUMS, ElementOp, Elements, Kind, NotCounted, Phase, place
from lnpu_torch.formulas import Call, Formula, tensors
from lnpu_torch.hiding import LayerSteps, LayerWatcher
from lnpu_torch.hiding import unwatched as unwatched

UNREADABLE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a formula raises for arguments that it was not written for; they must not end anyone's training."""

OPTIMIZER_STEP = "Optimizer.step#"
"""How torch begins the name of the range that each optimizer's step is, for profilers to show."""


COMPILED = (
    "torch.compile was used in this process, and what compiled code computes is not seen "
    "(torch._dynamo.reset() discards such code)"
)


class _Ranges(threading.local):
    """Of each thread: the named ranges that are open, and whether each is an optimizer's step.

    Of the step's tensors, by address: those that were fetched for it, those stored by it, and those that it made.
    `closure` says whether the step is at its closure, which computes loss and gradients; None before that is known.
    """

    def __init__(self) -> None:
        self.open: list[bool] = []
        self.begin()

    def begin(self) -> None:
        """Begin a step, which in backward belongs to the running graph."""
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

    def renew(self, made: Any) -> None:
        """Tensors that the step has made without computing, such as copies; one may lie where another lay before."""
        for x in tensors(made):
            self.made.add(x.data_ptr())
            self.fetched.discard(x.data_ptr())

    def moved(self, operands: Any, results: Any) -> tuple[int, int]:
        """Elements that a call of the step is the first to fetch, and the first to change of what stays after it."""
        fetched = stored = 0
        for x in tensors(operands):
            if (address := x.data_ptr()) not in self.fetched and address not in self.made:
                self.fetched.add(address)
                fetched += x.numel()
        for x in tensors(results):
            if (address := x.data_ptr()) not in self.fetched:
                self.made.add(address)
            elif address not in self.stored:
                self.stored.add(address)
                stored += x.numel()
        return fetched, stored


class Watch(LayerWatcher):
    """Adds up what runs while it is entered. It changes nothing, and waits for no device.

    Torch takes it along to the threads of backward, but not to threads that a program starts itself; nor does it see
    into code that torch.compile made. Of emulated layers it is told.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layer_calls = 0
        self._compiled: bool | None = None  # known once it was stopped
        self._sums: dict[tuple[Kind, Phase, str], list[int]] = {}
        self._uncounted: Counter[str] = Counter()
        self._found: dict[Any, Formula | Other] = {}
        self._ranges = _Ranges()
        self._lock = threading.Lock()  # backward has a thread for each device

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Code is compiled, and compiled code runs, as if nobody watched."""
        return True

    def start(self) -> None:
        """Begin to see what this thread runs."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """See no more; what was seen remains. Watches are stopped in the reverse order of their start."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._compiled = compiled_code()

    def verdict(self, layer_calls: int) -> Elements | NotCounted:
        """What was seen, if that is all.

        Args:
            layer_calls: the steps that emulated layers have counted meanwhile; fewer seen means a thread out of sight.
        """
        if compiled_code() if self._compiled is None else self._compiled:
            return NotCounted(reason=COMPILED)
        if self._layer_calls < layer_calls:
            return NotCounted(reason=f"only {self._layer_calls} of {layer_calls} steps of layers ran in sight")
        return self.elements

    @property
    def elements(self) -> Elements:
        """What was seen so far."""
        with self._lock:
            sums, uncounted = dict(self._sums), dict(sorted(self._uncounted.items()))
            entries = [
                ElementOp(kind=kind, phase=phase, op=op, **dict(zip(SUMS, values, strict=True)))
                for (kind, phase, op), values in sums.items()
            ]
        return Elements(entries=tuple(sorted(entries, key=place)), uncounted=uncounted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self._found.get(func) or self._found.setdefault(func, find(func))
        if found is Other.NOTHING:  # four in five, so they come first
            return func(*args, **kwargs) if kwargs else func(*args)
        if found is Other.COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs or {})
        call = Call(args, kwargs or {}, func(*args, **kwargs or {}))
        if isinstance(found, Formula):
            self._add(func, found, call)
        else:
            self._note(func, found, call)
        return call.out

    def _add(self, func: Any, formula: Formula, call: Call) -> None:
        if self.paused:
            return
        try:
            if formula.product:  # none of an emulated layer's: those are hidden
                self._miss(func)
            work = formula.work(call)
            if work is None:
                return
            kind, phase = self._place(func, formula, call)
            moved = self._moved(formula, call) if phase == "update" else (0, 0)
        except UNREADABLE:
            self._note(func, Other.UNKNOWN, call)
            return
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        self._add_up(kind, phase, name, (1, work.read, work.written, work.operations, work.special, *moved))

    def _add_up(self, kind: Kind, phase: Phase, op: str, values: tuple[int, ...]) -> None:
        with self._lock:
            sums = self._sums.setdefault((kind, phase, op), [0] * len(SUMS))
            for index, value in enumerate(values):
                sums[index] += value

    def layer_ran(self, steps: LayerSteps) -> None:
        """Add up a layer's bias, added as results leave the accumulators, or its gradient: the sum of all errors."""
        with self._lock:
            self._layer_calls += steps.counted
        if steps.bias and steps.backward:
            self._add_up("other", "backward", "bias", (1, steps.results, steps.bias, steps.results))
        elif steps.bias:
            self._add_up("other", "forward", "bias", (1, steps.bias, 0, steps.results))

    def _place(self, func: Any, formula: Formula, call: Call) -> tuple[Kind, Phase]:
        """An op's kind and phase."""
        ours = func.namespace == "lnpu"  # of an autograd function, in which gradients are off in either case
        if any(self._ranges.open) and not ours:
            self._ranges.closure = self._ranges.in_closure()
        updates = any(self._ranges.open) and self._ranges.closure is False
        if formula.kind == "optimizer" or updates or "::_foreach_" in func._schema.name:
            return "optimizer", "update"
        backward = _in_backward(func)
        node = torch._C._current_autograd_node() if backward else None
        kind = formula.kind if formula.kind != "other" else general_kind(func, call, node)
        return kind, "backward" if backward else "forward"

    def _moved(self, formula: Formula, call: Call) -> tuple[int, int]:
        """What an update's call fetches and stores; one that is in no optimizer's step is a step of its own."""
        if not any(self._ranges.open):
            self._ranges.forget()
        return self._ranges.moved([call.args, *call.kwargs.values()], formula.results(call))

    def _note(self, func: Any, found: Other, call: Call) -> None:
        """What ops without a formula tell."""
        if self.paused:
            return
        if found is Other.MOVES:
            updates = any(self._ranges.open) and not self._ranges.in_closure()
            if updates and (not call.args or call.out is not call.args[0]):
                self._ranges.renew(call.out)
        elif found is Other.BEGINS:
            self._ranges.open.append(str(call.args[0]).startswith(OPTIMIZER_STEP))
            if self._ranges.open[-1]:
                self._ranges.begin()
        elif found is Other.ENDS and self._ranges.open:
            self._ranges.open.pop()
        elif found is Other.UNKNOWN and call.read:
            self._miss(func)

    def _miss(self, func: Any) -> None:
        with self._lock:
            self._uncounted[str(func)] += 1


def _in_backward(func: Any) -> bool:
    """Whether an op belongs to backward. A checkpoint's forward, run again there, does not.

    It has gradients on; inside our own autograd functions they are off, and there the op's name tells.
    """
    if func.namespace == "lnpu":
        return "backward" in func._schema.name
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def compiled_code() -> bool:
    """Whether code that torch.compile made is alive in this process, and so may run."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    return dynamo is not None and bool(dynamo.output_codes.seen_ids)
