"""Attention as torch defines it, of products that a caller gives: two of activations, with a softmax in float between.

No fused kernel is called. Random numbers are torch's own: dropout draws what torch's would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MatMul = Callable[[Tensor, Tensor, str], Tensor]
"""a by b as `torch.matmul` multiplies them, and the name of this product's part in what calls it."""


def is_weight(x: Tensor) -> bool:
    """Whether a tensor is a Parameter, or a view of one."""
    return isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)


class Products(Protocol):
    """The products that functions are made of; `part` tells one from the others of the same function."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, part: str = "") -> Tensor:
        """`torch.nn.functional.linear`."""

    def matmul(self, a: Tensor, b: Tensor, part: str = "") -> Tensor:
        """`torch.matmul`."""


def scaled_dot_product_attention(
    matmul: MatMul,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: query [..., L, E], key [..., S, E], value [..., S, Ev].

    Args:
        matmul: multiplies the parts "scores" and "values".

    Raises:
        RuntimeError: both a mask and `is_causal` are given.
    """
    scores = _scores(matmul, query, key, attn_mask, is_causal, scale, enable_gqa)
    probabilities = torch.ops.aten._safe_softmax(scores, -1)  # zeros where a mask leaves nothing
    if dropout_p:
        probabilities = F.dropout(probabilities, dropout_p)
    probabilities = probabilities.to(value.dtype)  # a mask may be of a wider one
    return matmul(probabilities, _repeated(value, query) if enable_gqa else value, "values")


def _scores(
    matmul: MatMul,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Tensor:
    if causal and mask is not None:
        raise RuntimeError("give either attn_mask or is_causal")
    key = _repeated(key, query) if grouped else key
    scores = matmul(query, key.mT, "scores") * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values that several heads of the query share."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)


def multi_head_attention_forward(
    products: Products,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`: query [L, N, E], key and value [S, N, E], or without N.

    The parts of the product are the projections "query", "key" and "value", then "scores", "values" and "output".

    Returns:
        The output [L, N, E]; and if `need_weights` the probabilities [N, L, S], or [N, heads, L, S].

    Raises:
        ValueError: the embedding is not of `embed_dim_to_check`, or no multiple of the heads.
        RuntimeError: `is_causal` without a mask.
    """
    batched = query.dim() == 3
    if not batched:
        query, key, value = (each.unsqueeze(1) for each in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    _, batch, width = query.shape
    if width != embed_dim_to_check or width % num_heads:
        raise ValueError(f"an embedding of {width} is not one of {embed_dim_to_check}, in {num_heads} heads")
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask, which is needed, too")
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases: Any = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    parts = zip((query, key, value), weights, biases, ("query", "key", "value"), strict=True)
    query, key, value = (products.linear(*each) for each in parts)

    extra = 0  # keys that no mask tells of
    if bias_k is not None and bias_v is not None:
        key, value = (torch.cat([x, b.expand(1, batch, -1)]) for x, b in ((key, bias_k), (value, bias_v)))
        extra += 1
    heads = [each.reshape(*each.shape[:2], num_heads, -1).permute(1, 2, 0, 3) for each in (query, key, value)]
    for place, static in ((1, static_k), (2, static_v)):
        if static is not None:
            heads[place] = static.reshape(batch, num_heads, *static.shape[1:])
    if add_zero_attn:
        heads[1:] = [torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in heads[1:]]
        extra += 1
    mask = _masks(attn_mask, key_padding_mask, (batch, num_heads), extra, query)
    scores = _scores(products.matmul, heads[0], heads[1], mask, False, None, False)
    softmax = torch.softmax if need_weights else torch.ops.aten._safe_softmax
    probabilities = softmax(scores, -1)
    if training and dropout_p:
        probabilities = F.dropout(probabilities, dropout_p)
    output = products.matmul(probabilities, heads[2], "values").permute(2, 0, 1, 3).flatten(2)
    output = products.linear(output, out_proj_weight, out_proj_bias, "output")
    if average_attn_weights:
        probabilities = probabilities.mean(1)
    if not batched:
        output, probabilities = output.squeeze(1), probabilities.squeeze(0)
    return output, probabilities if need_weights else None


def _masks(
    mask: Tensor | None, padding: Tensor | None, sizes: tuple[int, int], extra: int, like: Tensor
) -> Tensor | None:
    """What is added to the scores [N, heads, L, S], of torch's masks; `extra` further keys are seen by all."""
    seen = [_added(each, like) for each in (mask, padding) if each is not None]
    if mask is not None and mask.dim() == 3:
        seen[0] = seen[0].reshape(*sizes, *seen[0].shape[1:])
    if padding is not None:
        seen[-1] = seen[-1][:, None, None]
    return sum(F.pad(each, (0, extra)) for each in seen) if seen else None  # type: ignore[return-value]


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to be added; where a boolean one is set, nothing is seen."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask, -math.inf)
