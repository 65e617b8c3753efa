"""Recurrent layers and cells as torch defines them, of linear products that a caller gives; gates in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch.nn.attention import Products

State = tuple[Tensor, ...]
Weights = Sequence[Tensor | None]
"""Of the input, of the hidden state, both biases or None, a projection of the hidden state or None."""
Cell = Callable[[Products, Tensor, State, Weights, str], State]
"""One step: what the input gives each gate [N, gates * hidden], the state before, weights -> the state after."""


def _lstm_cell(products: Products, given: Tensor, state: State, weights: Weights, part: str) -> State:
    take, forget, cell, give = (given + _hidden(products, state, weights, part)).chunk(4, -1)
    memory = forget.sigmoid() * state[1] + take.sigmoid() * cell.tanh()
    hidden, projection = give.sigmoid() * memory.tanh(), weights[4]
    if projection is not None:
        hidden = products.linear(hidden, projection, None, f"weight_hr{part}")
    return hidden, memory


def _gru_cell(products: Products, given: Tensor, state: State, weights: Weights, part: str) -> State:
    reset, update, new = given.chunk(3, -1)
    hidden = _hidden(products, state, weights, part).chunk(3, -1)
    update = (update + hidden[1]).sigmoid()
    new = (new + (reset + hidden[0]).sigmoid() * hidden[2]).tanh()
    return ((state[0] - new) * update + new,)


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    def cell(products: Products, given: Tensor, state: State, weights: Weights, part: str) -> State:
        return (activation(given + _hidden(products, state, weights, part)),)

    return cell


def _given(products: Products, x: Tensor, weights: Weights, part: str) -> Tensor:
    """What inputs give each gate."""
    assert weights[0] is not None
    return products.linear(x, weights[0], weights[2], f"weight_ih{part}")


def _hidden(products: Products, state: State, weights: Weights, part: str) -> Tensor:
    """What the hidden state gives each gate."""
    assert weights[1] is not None
    return products.linear(state[0], weights[1], weights[3], f"weight_hh{part}")


CELLS: dict[str, Cell] = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": _rnn_cell(torch.tanh),
    "rnn_relu": _rnn_cell(torch.relu),
}


def single(name: str) -> Callable[..., Any]:
    """`torch.lstm_cell`, `gru_cell`, `rnn_tanh_cell` or `rnn_relu_cell`: input, state, weights, biases."""

    def step(
        products: Products,
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = tuple(hx) if name == "lstm" else (hx,)
        weights = (w_ih, w_hh, b_ih, b_hh, None)
        after = CELLS[name](products, _given(products, input, weights, ""), state, weights, "")
        return after if name == "lstm" else after[0]

    return step


def layers(name: str) -> Callable[..., Any]:
    """`torch.lstm`, `gru`, `rnn_tanh` or `rnn_relu`, of padded or of packed sequences."""

    def run(products: Products, *args: Any) -> tuple[Tensor, ...]:
        packed = isinstance(args[3], list | tuple)  # data, batch_sizes, hx, weights, biases ...; else input, hx ...
        if packed:
            data, sizes, hx, weights, biases, count, dropout, training, bidirectional = args
            steps = list(data.split(sizes.tolist()))
        else:
            data, hx, weights, biases, count, dropout, training, bidirectional, batch_first = args
            steps = list((data.transpose(0, 1) if batch_first else data).unbind(0))
        states = tuple(hx) if name == "lstm" else (hx,)
        directions = 2 if bidirectional else 1
        each = len(weights) // (count * directions)
        last: list[State] = []
        for layer in range(count):
            sides = []
            for direction in range(directions):
                place = layer * directions + direction
                given = _weights(weights[place * each : (place + 1) * each], biases)
                part = f"_l{layer}" + ("_reverse" if direction else "")
                begin = tuple(state[place] for state in states)
                outputs, after = _sequence(CELLS[name], products, steps, begin, given, part, bool(direction))
                sides.append(outputs)
                last.append(after)
            steps = [torch.cat(both, -1) for both in zip(*sides, strict=True)] if bidirectional else sides[0]
            if dropout and training and layer < count - 1:
                steps = list(_dropped(steps, dropout, packed))
        out = torch.cat(steps) if packed else torch.stack(steps, 1 if batch_first else 0)
        return out, *(torch.stack(parts) for parts in zip(*last, strict=True))

    return run


def _weights(given: Sequence[Tensor], biases: bool) -> Weights:
    """One direction's weights in the order of `Cell`."""
    matrices = 4 if biases else 2
    bias = tuple(given[2:4]) if biases else (None, None)
    return *given[:2], *bias, given[matrices] if len(given) > matrices else None


def _sequence(
    cell: Cell,
    products: Products,
    steps: Sequence[Tensor],
    state: State,
    weights: Weights,
    part: str,
    backward: bool,
) -> tuple[list[Tensor], State]:
    """All outputs in the order of time, and the state after the last step of each sequence.

    Steps of a packed sequence have fewer rows the later they are: the longest sequences come first.
    """
    outputs: list[Tensor] = []
    begin, whole = state, state
    if backward:
        state = tuple(each[: len(steps[-1])] for each in begin)
    given = _given(products, torch.cat(list(steps)), weights, part).split([len(step) for step in steps])
    for now in reversed(given) if backward else given:
        rows, known = len(now), len(state[0])
        if rows > known:  # sequences that end here begin, backward
            state = tuple(torch.cat([each, first[known:rows]]) for each, first in zip(state, begin, strict=True))
        elif rows < known:  # those that have ended keep their state
            whole = state if whole is begin else _put(whole, state)
            state = tuple(each[:rows] for each in state)
        state = cell(products, now, state, weights, part)
        outputs.append(state[0])
    after = state if whole is begin else _put(whole, state)
    return outputs[::-1] if backward else outputs, after


def _put(whole: State, state: State) -> State:
    """The first rows of a state replaced."""
    return tuple(torch.cat([new, old[len(new) :]]) for new, old in zip(state, whole, strict=True))


def _dropped(steps: Sequence[Tensor], p: float, packed: bool) -> tuple[Tensor, ...]:
    """Dropout of all steps at once, as torch draws it."""
    lengths = [len(step) for step in steps]
    together = torch.cat(list(steps)) if packed else torch.stack(list(steps))
    dropped: tuple[Tensor, ...] = F.dropout(together, p).flatten(0, -2).split(lengths)
    return dropped
