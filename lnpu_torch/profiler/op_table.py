"""Which torch ops are vector operations, of which kind, by which formula."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

from lnpu_torch.counts.vector_ops import Kind
from lnpu_torch.profiler import op_formulas
from lnpu_torch.profiler.op_formulas import Call, Formula, each, each_read, of_error, scatter_add


class Other(Enum):
    """What an op is that has no formula."""

    NOTHING = "computes nothing, and makes nothing new"
    MOVES = "moves or makes data"
    COMPOSITE = "made of ops that have formulas"
    BEGINS = "begins a named range, as an optimizer's step does"
    ENDS = "ends a named range"
    LAYER = "an emulated layer's pass, seen where torch.compile has put it into code of its own"
    UNKNOWN = "not known"


def _all(names: str, formula: Formula) -> dict[str, Formula]:
    return dict.fromkeys(names.split(), formula)


ELEMENTWISE: dict[str, Formula] = {
    **_all("sub rsub add", Formula("other", op_formulas.add)),
    **_all("mul neg abs sign sgn maximum minimum fmax fmin clamp_min clamp_max square", each("other", 1)),
    **_all("where masked_fill eq ne lt le gt ge isnan isinf isfinite heaviside", each("other", 1)),
    **_all("round floor ceil trunc fmod remainder nan_to_num", each("other", 1)),
    **_all("div true_divide", Formula("other", op_formulas.divide)),
    **_all("exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal erf erfc sin cos tan atan2", each("other", 0, 1)),
    "pow": Formula("other", op_formulas.power),
    "addcmul": Formula("other", op_formulas.add_product),
    "addcdiv": Formula("other", op_formulas.add_quotient),
    "clamp": Formula("other", op_formulas.clamp),
    "lerp": each("other", 3),  # x + w (y - x)
    "xlogy": each("other", 1, 1),
    "native_dropout": each("other", 2),  # mask and scale; random bits are not arithmetic
    "native_dropout_backward": each("other", 2),
}
REDUCTIONS: dict[str, Formula] = {
    **_all("sum nansum mean prod cumsum cumprod amax amin max min argmax argmin topk all any", each_read("other", 1)),
    **_all("aminmax count_nonzero", each_read("other", 2)),
    **_all("var var_mean", each_read("other", 3)),  # sum; square and sum
    **_all("std std_mean", each_read("other", 3, root=True)),
    **_all("norm linalg_vector_norm", each_read("other", 2, root=True)),
    "logsumexp": each_read("other", 3, 1, root=True),  # maximum, difference, exp, sum
    "embedding_dense_backward": scatter_add("other"),
    **_all("index_add scatter_add", scatter_add("other", 3)),
    "_unsafe_masked_index_put_accumulate": scatter_add("other", 3),
}
ACTIVATIONS: dict[str, Formula] = {
    **_all("relu threshold", each("activation", 1)),
    "threshold_backward": of_error("activation", 1, bits=1),
    "hardtanh_backward": of_error("activation", 2, bits=1),
    **_all("relu6 hardtanh leaky_relu leaky_relu_backward _prelu_kernel", each("activation", 2)),
    "_prelu_kernel_backward": each("activation", 3),
    **_all("tanh sigmoid", each("activation", 0, 1)),
    **_all("tanh_backward sigmoid_backward", each("activation", 3)),  # dy (1 - y^2), dy y (1 - y)
    "silu": each("activation", 1, 1),
    "silu_backward": each("activation", 5, 1),  # dy s (1 + x (1 - s))
    "gelu": Formula("activation", op_formulas.gelu),
    "gelu_backward": Formula("activation", op_formulas.gelu_backward),
    **_all("elu celu selu", each("activation", 3, 1)),
    "elu_backward": each("activation", 3, 1),
    "hardswish": each("activation", 5),  # x min(max(x + 3, 0), 6) / 6
    "hardswish_backward": each("activation", 5),
    "hardsigmoid": each("activation", 4),
    "hardsigmoid_backward": each("activation", 3),
    "softplus": each("activation", 3, 2),
    "softplus_backward": each("activation", 3, 1),
    "mish": each("activation", 2, 3),  # x tanh(log(1 + exp(x)))
    "mish_backward": each("activation", 8, 4),
    **_all("_softmax _safe_softmax", Formula("activation", op_formulas.softmax)),
    "_softmax_backward_data": each("activation", 4),  # y (dy - sum(dy y))
}
NORMALISATIONS: dict[str, Formula] = {
    **_all(
        "native_batch_norm _native_batch_norm_legit cudnn_batch_norm miopen_batch_norm",
        Formula("normalisation", op_formulas.batch_norm, op_formulas.batch_norm_reads, whole=True),
    ),
    "native_batch_norm_backward": Formula(
        "normalisation", op_formulas.batch_norm_backward, op_formulas.batch_norm_backward_reads, whole=True
    ),
    **_all(
        "cudnn_batch_norm_backward miopen_batch_norm_backward",
        Formula(
            "normalisation", op_formulas.gpu_batch_norm_backward, op_formulas.gpu_batch_norm_backward_reads, whole=True
        ),
    ),
    **_all("native_layer_norm native_group_norm", Formula("normalisation", op_formulas.row_norm, op_formulas.twice(0))),
    "_fused_rms_norm": Formula("normalisation", op_formulas.rms_norm, op_formulas.twice(0)),
    "_fused_rms_norm_backward": Formula("normalisation", op_formulas.rms_norm_backward, op_formulas.twice(0, 1)),
    "batch_norm_stats": each_read("normalisation", 3),  # of batches spread over GPUs
    "batch_norm_elemt": each_read("normalisation", 2),
    **_all("batch_norm_backward_reduce batch_norm_backward_elemt", each_read("normalisation", 4)),
    "batch_norm_gather_stats_with_counts": each_read("normalisation", 4),
    "native_layer_norm_backward": Formula(
        "normalisation", op_formulas.row_norm_backward(3, 5), op_formulas.twice(0, 1)
    ),
    "native_group_norm_backward": Formula(
        "normalisation", op_formulas.row_norm_backward(2, 4), op_formulas.twice(0, 1)
    ),
}
POOLINGS: dict[str, Formula] = {
    **{f"max_pool{d}d_with_indices": op_formulas.max_pool(d) for d in (2, 3)},
    **{f"max_pool{d}d_with_indices_backward": of_error("pooling", 1, bits=4) for d in (2, 3)},
    **{f"avg_pool{d}d": op_formulas.average_pool(d) for d in (1, 2, 3)},
    **{f"avg_pool{d}d_backward": op_formulas.average_pool_backward(d) for d in (2, 3)},
    **{f"_adaptive_avg_pool{d}d": op_formulas.adaptive_pool(d) for d in (2, 3)},
    **{f"_adaptive_avg_pool{d}d_backward": op_formulas.adaptive_pool_backward(d) for d in (2, 3)},
    **{f"adaptive_max_pool{d}d": op_formulas.adaptive_pool(d) for d in (2, 3)},
    **{f"adaptive_max_pool{d}d_backward": scatter_add("pooling") for d in (2, 3)},
    "upsample_bilinear2d": each("other", 7),  # four products, three sums
    "upsample_bilinear2d_backward": Formula("other", lambda call: (8 * op_formulas.elements(call.args[0]), 0)),
    "upsample_nearest2d_backward": scatter_add("other"),
}
LOSSES: dict[str, Formula] = {
    "_log_softmax": Formula("loss", op_formulas.softmax),
    "_log_softmax_backward_data": each("loss", 3, 1),  # dy - exp(y) sum(dy)
    **_all(
        "nll_loss_forward nll_loss2d_forward", Formula("loss", lambda call: (2 * op_formulas.elements(call.args[1]), 0))
    ),
    **_all(
        "nll_loss_backward nll_loss2d_backward", Formula("loss", lambda call: (op_formulas.elements(call.args[2]), 0))
    ),
    "mse_loss": each_read("loss", 3),  # difference, square, sum
    "mse_loss_backward": each("loss", 2),
    "smooth_l1_loss": each_read("loss", 6),
    "smooth_l1_loss_backward": each("loss", 4),
    "huber_loss": each_read("loss", 6),
    "huber_loss_backward": each("loss", 4),
    "binary_cross_entropy": each_read("loss", 6, 2),
    "binary_cross_entropy_backward": each("loss", 4, 1),
    "binary_cross_entropy_with_logits": each_read("loss", 5, 2),  # (1 - t) x + log(1 + exp(-x)), stably
}
OPTIMIZERS: dict[str, Formula] = {
    "_fused_sgd": Formula("optimizer", op_formulas.sgd, written=op_formulas.states),
    "_fused_adam": Formula("optimizer", op_formulas.adam(decay=2), written=op_formulas.states),
    "_fused_adamw": Formula("optimizer", op_formulas.adam(decay=1), written=op_formulas.states),
    "_fused_adagrad": Formula("optimizer", op_formulas.adagrad, written=op_formulas.states),
    # a comparison as gradients leave the accumulators; the scale is folded into the learning rate
    "_amp_foreach_non_finite_check_and_unscale": Formula(
        "optimizer", lambda call: (op_formulas.elements(call.args[0]), 0), on_the_way=True
    ),
}
PRODUCTS: dict[str, Formula] = {
    **_all("mm bmm mv dot vdot", op_formulas.product()),
    **_all("addmm addmv addbmm baddbmm", op_formulas.product(bias=0)),
    "convolution": op_formulas.product(bias=2),
    "convolution_backward": Formula(
        "other", op_formulas.bias_gradient, lambda call: call.args[0], lambda call: call.out[2], True
    ),
}
FORMULAS: dict[str, Formula] = {
    **ELEMENTWISE,
    **REDUCTIONS,
    **ACTIVATIONS,
    **NORMALISATIONS,
    **POOLINGS,
    **LOSSES,
    **OPTIMIZERS,
    **PRODUCTS,
}

MOVES = frozenset(
    {
        *("alias", "clone", "copy", "_to_copy", "lift_fresh", "pin_memory", "positive"),
        *("_unsafe_view", "_reshape_alias", "_reshape_copy", "resize", "set", "cat", "stack", "repeat", "roll"),
        *("index", "index_select", "index_copy", "index_fill", "index_put", "_index_put_impl", "_unsafe_index"),
        *("_unsafe_index_put", "gather", "scatter", "take", "masked_select", "masked_scatter", "nonzero", "embedding"),
        *("flip", "rot90", "tril", "triu", "im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
        *("native_channel_shuffle", "constant_pad_nd", "select_scatter", "slice_scatter"),
        *(f"{way}_pad{d}d" for way in ("reflection", "replication") for d in (1, 2, 3)),
        *(f"upsample_nearest{d}d" for d in (1, 2, 3)),
        *("select_backward", "slice_backward", "diagonal_backward"),
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "zero", "fill"),
        *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
        *("normal", "uniform", "bernoulli", "random", "exponential"),
        *("_local_scalar_dense", "equal", "is_same_size", "promote_types", "result_type", "_amp_update_scale"),
    }
)
"""Ops that move or make data."""

OF_NODE: dict[str, Kind] = {
    "MeanBackward0": "loss",
    "SumBackward0": "loss",
    "BinaryCrossEntropyWithLogitsBackward0": "loss",
}
"""Kinds of what autograd makes of general ops, by the name of its node; additions apart, which sum up gradients."""

SPECIAL: dict[str, Other] = {
    **dict.fromkeys(("profiler::_record_function_enter", "profiler::_record_function_enter_new"), Other.BEGINS),
    "profiler::_record_function_exit": Other.ENDS,
}
SILENT = ("prim", "profiler", "c10d", "_c10d_functional")
"""Namespaces of ops that compute nothing: they ask, mark or communicate."""


def find(func: Any) -> Formula | Other:
    """The formula of an op, by its name: of `aten::_foreach_mul_` that of `mul`, for it is the same for each tensor."""
    if not isinstance(func, torch._ops.OpOverload):
        return Other.UNKNOWN  # higher-order
    full = func._schema.name
    space, _, name = full.partition("::")
    if full in SPECIAL or space in SILENT:
        return SPECIAL.get(full, Other.NOTHING)
    if name.startswith("layer_") and space == "lnpu":
        return Other.LAYER
    if space.startswith("lnpu"):  # the datapath of the multiply-accumulates, or emulation
        return Other.NOTHING
    name = name.rstrip("_").removeprefix("_foreach_")
    if space == "aten" and name in FORMULAS:
        return FORMULAS[name]
    if func.is_view or torch.Tag.inplace_view in func.tags:
        return Other.NOTHING
    if space == "aten" and name in MOVES:
        return Other.MOVES
    return Other.COMPOSITE if func._can_decompose() else Other.UNKNOWN


def general_kind(func: Any, call: Call, node: Any) -> Kind:
    """The kind of a general op in a place that tells: a mean over the image is a pooling, one over everything a loss.

    Args:
        node: the node of autograd's graph that the op belongs to, in backward.
    """
    name = str(func)
    if node is not None:
        if node.name() == "MeanBackward1" and "div" in name and len(node._saved_dim) > 1:
            return "pooling"
        return "other" if ".add" in name else OF_NODE.get(node.name(), "other")
    if name == "aten.mean.dim" and len(call.args[1] or ()) > 1:
        return "pooling"
    return "loss" if name in ("aten.mean.default", "aten.sum.default") else "other"
