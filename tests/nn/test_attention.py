"""Attention, emulated with all operands in float, is torch's; what a mask hides is counted as zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lnpu_torch as lnpu
from helpers.float_twin import Call, check_float_twin
from lnpu_torch.nn.layer_state import LayerState


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


Q, K, V = normal(2, 3, 5, 4), normal(2, 3, 6, 4), normal(2, 3, 6, 7)
HIDDEN = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) > 0.5
HIDDEN[0] = False  # a row of which nothing is seen
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "scale": 0.3},
    "mask": {"attn_mask": HIDDEN},
    "mask spread": {"attn_mask": torch.ones(2, 1, 1, 6, dtype=torch.bool)},
    "added mask": {"attn_mask": normal(5, 6)},
    "dropout": {"dropout_p": 0.5},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_scaled_dot_product_attention_is_torchs(name: str, dims: int) -> None:
    operands = [Q, K, V] if dims == 4 else [each[0] if dims == 3 else each[0, 0] for each in (Q, K, V)]
    if name == "mask spread" and dims < 4:
        pytest.skip("it has four dimensions")
    given = SETTINGS[name]
    names = check_float_twin(Call(F.scaled_dot_product_attention), *operands, **given)
    assert names == [f":scaled_dot_product_attention.{part}" for part in ("scores", "values")]


def test_queries_may_share_keys_and_values() -> None:
    function = Call(lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, enable_gqa=True))
    check_float_twin(function, normal(2, 6, 5, 4), normal(2, 2, 6, 4), normal(2, 2, 6, 7), sites=2)


def test_a_mask_may_be_wider_than_the_operands() -> None:
    model = lnpu.convert(Call(F.scaled_dot_product_attention))
    output = model(*(each.bfloat16() for each in (Q, K, V)), attn_mask=normal(5, 6))
    assert output.dtype == torch.bfloat16


def test_the_public_function_is_the_intercepted_one() -> None:
    states = LayerState(lnpu.Precision(result="fp32")), LayerState(lnpu.Precision(result="fp32"))
    found = lnpu.functional.scaled_dot_product_attention(Q, K, V, states, is_causal=True)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(Q, K, V, is_causal=True))
    product = lnpu.functional.matmul(Q, K.mT, LayerState(lnpu.Precision(result="fp32")))
    torch.testing.assert_close(product, Q @ K.mT)


def test_zeros_of_a_causal_mask_are_skipped() -> None:
    model = lnpu.convert(Call(F.scaled_dot_product_attention), lnpu.Precision(result="fp32"))
    length, width = 6, 4
    operands = [(normal(2, 3, length, width) + 0.01).requires_grad_() for _ in range(3)]
    with lnpu.CostCounter(model) as cost:
        model(*operands, is_causal=True).square().sum().backward()
    executed = {(each.layer, each.step): sum(sum(row[1:]) for row in each.pairs[1:]) for each in cost.counts.steps}
    values, scores = (f":scaled_dot_product_attention.{part}" for part in ("values", "scores"))
    whole, seen = 2 * 3 * length * length * width, 2 * 3 * length * (length + 1) // 2 * width
    assert all(each.macs == whole for each in cost.counts.steps) and len(cost.counts.steps) == 6
    assert executed[scores, "forward"] == whole
    assert executed[values, "forward"] == executed[values, "grad_weight"] == seen
    assert seen - 2 * 3 * width <= executed[scores, "grad_input"] <= seen  # the first row's only score has no gradient
    assert executed[values, "grad_input"] == whole


PAD = torch.zeros(2, 6, dtype=torch.bool)
PAD[1, 4:] = True
CAUSAL = torch.ones(5, 6, dtype=torch.bool).triu(1)
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"need_weights": False}),
    ({}, {"average_attn_weights": False}),
    ({"bias": False}, {}),
    ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    ({"dropout": 0.5}, {}),
    ({"dropout": 0.5}, {"need_weights": False}),
    ({}, {"key_padding_mask": PAD}),
    ({}, {"key_padding_mask": PAD, "need_weights": False}),
    ({}, {"attn_mask": CAUSAL}),
    ({}, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    ({}, {"attn_mask": normal(4, 5, 6), "key_padding_mask": PAD.float()}),
    ({"add_bias_kv": True}, {"key_padding_mask": PAD.float(), "attn_mask": normal(5, 6)}),
]


@pytest.mark.parametrize(("options", "named"), OPTIONS, ids=[f"{list(a)} {list(b)}" for a, b in OPTIONS])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_is_torchs(options: dict[str, Any], named: dict[str, Any], batch_first: bool) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    inputs = [normal(2, 5, 8), normal(2, 6, 8), normal(2, 6, 8)]
    if not batch_first:
        inputs = [each.transpose(0, 1) for each in inputs]
    names = check_float_twin(module, *inputs, **named, sites=6)
    parts = ("query", "key", "value", "scores", "values", "output")
    assert names == [f":multi_head_attention_forward.{part}" for part in parts]


def test_multihead_attention_of_other_widths_and_without_a_batch() -> None:
    check_float_twin(nn.MultiheadAttention(8, 2, kdim=4, vdim=3), normal(5, 8), normal(6, 4), normal(6, 3), sites=6)


class Mode(nn.Module):
    """A module in training mode, or not, whatever is set later."""

    def __init__(self, module: nn.Module, training: bool) -> None:
        super().__init__()
        self.module, self.mode = module, training

    def forward(self, *inputs: Tensor, **named: Any) -> Any:
        return self.module.train(self.mode)(*inputs, **named)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers_are_torchs(training: bool, norm_first: bool) -> None:
    options: dict[str, Any] = {"dropout": 0.1, "batch_first": True, "norm_first": norm_first}
    x, y = normal(2, 5, 8), normal(2, 6, 8)
    encoder, decoder = nn.TransformerEncoderLayer(8, 2, 16, **options), nn.TransformerDecoderLayer(8, 2, 16, **options)
    check_float_twin(Mode(encoder, training), x, sites=6 + 2)
    check_float_twin(Mode(decoder, training), x, y, sites=2 * 6 + 2)


def test_torchs_fast_path_in_eval_mode_passes_nothing_by() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    lnpu.convert(model)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad(), lnpu.CostCounter(model) as cost:
        model(normal(2, 5, 8), src_key_padding_mask=padding)
    assert len(cost.counts.steps) == 2 * (6 + 2) and all(each.macs for each in cost.counts.steps)
