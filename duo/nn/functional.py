"""`torch.nn.functional`'s names: the shared functions, and those that touch a layer's state (running statistics, the generator).

Arguments are PyTorch's, less its long deprecated ones (`size_average`, `reduce`).
"""

from __future__ import annotations

from typing import Any

from duo import functional as F
from duo.dispatch import apply
from duo.functional import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    bilinear,
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    cosine_similarity,
    cross_entropy,
    gelu,
    glu,
    group_norm,
    hardshrink,
    huber_loss,
    interpolate,
    kl_div,
    l1_loss,
    layer_norm,
    linear,
    logsigmoid,
    margin_ranking_loss,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    mse_loss,
    nll_loss,
    normalize,
    one_hot,
    pad,
    prelu,
    rms_norm,
    sigmoid,
    smooth_l1_loss,
    softplus,
    softshrink,
    softsign,
    swish,
    tanh,
    tanhshrink,
    triplet_margin_loss,
)
from duo.functional._args import type_of
from duo.functional._ssa import align
from duo.functional.attention import _attention_weights, attention_arguments
from duo.functional.random import _dropout, _dropout_shared, check_probability
from duo.functional.reduce import norm_kept
from duo.random import draw
from duo_ir.errors import ArgumentError, ShapeError


def _done(input: Any, output: Any, inplace: bool) -> Any:
    return input._assign(output) if inplace and getattr(input, "_mutable", False) else output


# ------------------------------------------------------------------------------------------------------- activations
def relu(input: Any, inplace: bool = False) -> Any:
    """max(input, 0); gradient 0 at 0."""
    return _done(input, F.relu(input), inplace) if inplace else F.relu(input)


def relu6(input: Any, inplace: bool = False) -> Any:
    """min(max(input, 0), 6)."""
    return _done(input, F.relu6(input), inplace)


def leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Any:
    """input where positive, else negative_slope * input."""
    return _done(input, F.leaky_relu(input, negative_slope), inplace)


def elu(input: Any, alpha: Any = 1.0, inplace: bool = False) -> Any:
    """input where positive, else alpha * (exp(input) - 1)."""
    return _done(input, F.elu(input, alpha), inplace)


def celu(input: Any, alpha: Any = 1.0, inplace: bool = False) -> Any:
    """input where positive, else alpha * (exp(input / alpha) - 1)."""
    return _done(input, F.celu(input, alpha), inplace)


def selu(input: Any, inplace: bool = False) -> Any:
    """scale * elu(input, alpha) with the constants of self-normalising networks."""
    return _done(input, F.selu(input), inplace)


def silu(input: Any, inplace: bool = False) -> Any:
    """input * sigmoid(input)."""
    return _done(input, F.silu(input), inplace)


def mish(input: Any, inplace: bool = False) -> Any:
    """input * tanh(softplus(input))."""
    return _done(input, F.mish(input), inplace)


def hardtanh(input: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Any:
    """input, but not below min_val nor above max_val."""
    return _done(input, F.hardtanh(input, min_val, max_val), inplace)


def hardsigmoid(input: Any, inplace: bool = False) -> Any:
    """relu6(input + 3) / 6."""
    return _done(input, F.hardsigmoid(input), inplace)


def hardswish(input: Any, inplace: bool = False) -> Any:
    """input * relu6(input + 3) / 6."""
    return _done(input, F.hardswish(input), inplace)


def threshold(input: Any, threshold: Any, value: Any, inplace: bool = False) -> Any:
    """input where it is above the threshold, else value."""
    return _done(input, F.threshold(input, threshold, value), inplace)


def _implied_dim(input: Any, dim: int | None) -> int:
    """PyTorch's choice where no dim is given: the first of 0-, 1- and 3-d tensors, else the second."""
    return (0 if type_of(input).rank in (0, 1, 3) else 1) if dim is None else dim


def softmax(input: Any, dim: int | None = None, dtype: Any = None) -> Any:
    """exp(input) / sum(exp(input)) along `dim`."""
    return F.softmax(input, _implied_dim(input, dim), dtype)


def softmin(input: Any, dim: int | None = None, dtype: Any = None) -> Any:
    """softmax(-input)."""
    return F.softmin(input, _implied_dim(input, dim), dtype)


def log_softmax(input: Any, dim: int | None = None, dtype: Any = None) -> Any:
    """log(softmax(input)) along `dim`."""
    return F.log_softmax(input, _implied_dim(input, dim), dtype)


# ----------------------------------------------------------------------------------------------------------- dropout
def dropout(
    input: Any, p: Any = 0.5, training: bool = True, inplace: bool = False, *, generator: Any = None
) -> Any:  # fmt: skip
    """In training, each element is 0 with probability p and the others are divided by 1 - p; else the input."""
    p = check_probability("dropout", p)
    if not training or (p.__class__ is float and p == 0.0):
        return input
    return _done(input, draw(_dropout, (input, p), (), generator), inplace)


def _channel_dropout(name: str, rank: int, input: Any, p: Any, training: bool, inplace: bool, generator: Any) -> Any:
    p = check_probability(name, p)
    found = type_of(input).rank
    if found not in (rank - 1, rank):
        raise ShapeError(f"{name}: it takes {rank - 1} or {rank} dims, got {type_of(input)}")
    if not training or (p.__class__ is float and p == 0.0):
        return input
    shared = tuple(range(found - rank + 2, found))
    return _done(input, draw(_dropout_shared, (input, p), (shared,), generator), inplace)


def dropout1d(
    input: Any, p: Any = 0.5, training: bool = True, inplace: bool = False, *, generator: Any = None
) -> Any:  # fmt: skip
    """Dropout of whole channels of [batch, channels, length]."""
    return _channel_dropout("dropout1d", 3, input, p, training, inplace, generator)


def dropout2d(
    input: Any, p: Any = 0.5, training: bool = True, inplace: bool = False, *, generator: Any = None
) -> Any:  # fmt: skip
    """Dropout of whole channels of [batch, channels, height, width]."""
    return _channel_dropout("dropout2d", 4, input, p, training, inplace, generator)


def dropout3d(
    input: Any, p: Any = 0.5, training: bool = True, inplace: bool = False, *, generator: Any = None
) -> Any:  # fmt: skip
    """Dropout of whole channels of [batch, channels, depth, height, width]."""
    return _channel_dropout("dropout3d", 5, input, p, training, inplace, generator)


# ----------------------------------------------------------------------------------------------------- normalisation
def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Any:
    """[batch, channels, ...] normalised by its own statistics (training), which also move the running ones, or by the running ones."""
    if not training:
        if running_mean is None or running_var is None:
            raise ArgumentError("batch_norm: without training it needs running_mean and running_var")
        return F.batch_norm_eval(input, running_mean, running_var, weight, bias, eps)
    return batch_norm_tracked(input, running_mean, running_var, None, weight, bias, momentum, eps)


def batch_norm_tracked(
    input: Any, running_mean: Any, running_var: Any, count: Any, weight: Any, bias: Any, momentum: Any, eps: float
) -> Any:
    """`batch_norm` in training, which also counts the batches (i64[]); momentum None is 1 / count. States that are None are not kept."""
    if running_mean is None:
        return F.batch_norm_train(input, None, None, weight, bias, momentum, eps)
    y, *new = F.batch_norm_train(input, running_mean, running_var, weight, bias, momentum, eps, count)
    for state, value in zip((running_mean, running_var, count), new):
        value._update(state, value)
    return y


def instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Any:
    """[batch, channels, ...] normalised over what is behind each channel, or by running statistics (use_input_stats=False)."""
    if not use_input_stats:
        return F.batch_norm_eval(input, running_mean, running_var, weight, bias, eps)
    if running_mean is not None or running_var is not None:
        raise ArgumentError("instance_norm: it keeps no running statistics; pass None for them")
    return F.instance_norm(input, weight, bias, eps)


# -------------------------------------------------------------------------------------------------------- the others
def embedding(input: Any, weight: Any, padding_idx: int | None = None) -> Any:
    """Row input[i] of `weight` for each i; row padding_idx takes no gradient."""
    return F.embedding(input, weight, padding_idx)


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query @ key' * scale + mask) @ value, with dropout of the weights. See duo.functional."""
    if dropout_p.__class__ in (int, float) and dropout_p == 0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    query, key, value, more, attrs = attention_arguments(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    weights = apply(_attention_weights, (query, key, *more), attrs)
    return F.matmul(dropout(weights, dropout_p), value)


def _pairwise_distance(x: Any, y: Any, p: float, eps: float, keepdim: bool) -> Any:
    x, y = align(x, y)
    d = norm_kept(x - y + eps, p, (x.type.rank - 1,))
    return d if keepdim else F.squeeze(d, -1)


def pairwise_distance(x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    """The p-norm of x1 - x2 + eps along the last dim."""
    return apply(_pairwise_distance, (x1, x2), (float(p), float(eps), bool(keepdim)))


__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "batch_norm_tracked",
    "bilinear",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "celu",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cosine_similarity",
    "cross_entropy",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "elu",
    "embedding",
    "gelu",
    "glu",
    "group_norm",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "huber_loss",
    "instance_norm",
    "interpolate",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "logsigmoid",
    "margin_ranking_loss",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "mish",
    "mse_loss",
    "nll_loss",
    "normalize",
    "one_hot",
    "pad",
    "pairwise_distance",
    "prelu",
    "relu",
    "relu6",
    "rms_norm",
    "scaled_dot_product_attention",
    "selu",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "softmax",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "swish",
    "tanh",
    "tanhshrink",
    "threshold",
    "triplet_margin_loss",
]
