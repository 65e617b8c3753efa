"""Recurrent layers and cells, emulated with all operands in float, are torch's, from any state and packed too."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lnpu_torch as lnpu
from helpers.float_twin import Call, check_float_twin


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "dropout": 0.5},
    {"bias": False, "batch_first": True},
]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_layers_are_torchs(kind: str, settings: dict[str, Any]) -> None:
    layer = LAYERS[kind](4, 3, **settings)
    matrices = 2 * settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    names = check_float_twin(layer, normal(5, 2, 4), sites=matrices)
    function = "rnn_tanh" if kind == "RNN" else kind.lower()
    assert names[:2] == [f":{function}.weight_ih_l0", f":{function}.weight_hh_l0"]


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projected_state_is_torchs(settings: dict[str, Any]) -> None:
    check_float_twin(nn.LSTM(4, 3, proj_size=2, **settings), normal(5, 2, 4))


def test_relu_and_no_batch() -> None:
    check_float_twin(nn.RNN(4, 3, nonlinearity="relu"), normal(5, 2, 4), sites=2)
    check_float_twin(nn.LSTM(4, 3), normal(5, 4), sites=2)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("lengths", [[5, 3, 3, 1], [2, 5, 1, 4]], ids=["sorted", "not sorted"])
def test_packed_sequences_are_torchs(kind: str, dropout: float, lengths: list[int]) -> None:
    """The state of each sequence is that after its own last step."""

    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = LAYERS[kind](4, 3, num_layers=2, bidirectional=True, dropout=dropout)

        def forward(self, x: Tensor, *state: Tensor) -> Any:
            packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
            output, last = self.layer(packed, state if len(state) > 1 else state[0])
            return output.data, last

    check_float_twin(Packing(), normal(5, 4, 4), *[normal(4, 4, 3)] * (2 if kind == "LSTM" else 1), sites=8)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_torchs(cell: type[nn.Module], bias: bool) -> None:
    check_float_twin(cell(4, 3, bias=bias), normal(2, 4), sites=2)
    check_float_twin(cell(4, 3, bias=bias), normal(4), sites=2)


def test_functions_are_torchs() -> None:
    weights = [normal(12, 4), normal(12, 3), normal(12), normal(12)]
    function = Call(lambda x, h, *w: torch.lstm(x, (h, h), w, True, 1, 0.0, False, False, False))
    function.weights.extend(map(nn.Parameter, weights))
    check_float_twin(function, normal(5, 2, 4), normal(1, 2, 3), sites=2)


def test_every_step_is_counted() -> None:
    layer, steps, batch = nn.LSTM(4, 3), 5, 2
    lnpu.convert(layer)
    with lnpu.CostCounter(layer) as cost:
        layer(normal(steps, batch, 4))[0].sum().backward()
    forward = {each.layer: (each.calls, each.macs) for each in cost.counts.steps if each.step == "forward"}
    assert forward == {
        ":lstm.weight_ih_l0": (1, steps * batch * 4 * 12),
        ":lstm.weight_hh_l0": (steps, steps * batch * 3 * 12),
    }
    found = lnpu.coverage(layer, normal(steps, batch, 4))
    assert found.products == () and found.macs == sum(macs for _, macs in forward.values())


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_have_weights_of_their_own(kind: str) -> None:
    """Torch's recurrent layers hold their weights twice, and in weak references."""
    layer = lnpu.convert(LAYERS[kind](4, 3))
    layer(normal(5, 2, 4))
    with pytest.warns(UserWarning, match="pickled whole"):
        again = pickle.loads(pickle.dumps(layer))
    for weight, own in zip(again._flat_weights, again.parameters(), strict=True):
        assert weight is own
    assert torch.equal(again(normal(5, 2, 4))[0], layer(normal(5, 2, 4))[0])
    assert again.double()(normal(5, 2, 4).double())[0].dtype == torch.float64
