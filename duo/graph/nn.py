"""`tf.nn`: activations, losses, dropout, lookups, with TensorFlow's names, arguments and formulas."""

from __future__ import annotations

from typing import Any

from duo import functional as F
from duo.functional._ssa import float_dtype, wide
from duo.functional.activation import softplus_of
from duo.functional.reduce import log_softmax_of
from duo.graph import math
from duo.graph.arrays import gather
from duo.graph.convolution import (
    avg_pool,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    conv1d,
    conv2d,
    conv2d_transpose,
    conv3d,
    depthwise_conv2d,
    depthwise_conv2d_native,
    fused_batch_norm,
    max_pool,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    separable_conv2d,
)
from duo.graph.errors import InvalidArgumentError
from duo.graph.math import _unary, log_sigmoid, reduce_logsumexp, sigmoid, softplus, tanh
from duo.graph.random_ops import dropout as _draw_dropout
from duo.graph.sorting import top_k
from duo.graph.tensor import convert_to_tensor, named
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import indexing, stop_gradient
from duo_ir.types import i64

Name = str | None

relu = _unary("Relu", F.relu, "max(x, 0).")
relu6 = _unary("Relu6", F.relu6, "min(max(x, 0), 6).")
elu = _unary("Elu", F.elu, "x where positive, else e^x - 1.")
selu = _unary("Selu", F.selu, "The self-normalising exponential linear unit.")
softsign = _unary("Softsign", F.softsign, "x / (1 + |x|).")
swish = _unary("swish", F.silu, "x * sigmoid(x).")
silu = swish


def leaky_relu(features: Any, alpha: float = 0.2, name: Name = None) -> Any:
    """x where positive, else alpha * x."""
    x = convert_to_tensor(features)
    return named(x.graph, "LeakyRelu", name, lambda: F.leaky_relu(x, alpha), (x,))


def gelu(features: Any, approximate: bool = False, name: Name = None) -> Any:
    """x times the normal distribution function at x, exact or by its tanh approximation."""
    x = convert_to_tensor(features)
    return named(x.graph, "Gelu", name, lambda: F.gelu(x, "tanh" if approximate else "none"), (x,))


def softmax(logits: Any, axis: int | None = None, name: Name = None, dim: int | None = None) -> Any:
    """exp(x) / sum(exp(x)) along `axis` (the last)."""
    x = convert_to_tensor(logits)
    return named(x.graph, "Softmax", name, lambda: F.softmax(x, _last(axis, dim)), (x,))


def log_softmax(logits: Any, axis: int | None = None, name: Name = None, dim: int | None = None) -> Any:
    """log(softmax(x)) along `axis` (the last)."""
    x = convert_to_tensor(logits)
    return named(x.graph, "LogSoftmax", name, lambda: F.log_softmax(x, _last(axis, dim)), (x,))


def _last(axis: int | None, dim: int | None) -> int:
    found = dim if axis is None else axis
    return -1 if found is None else found


# ------------------------------------------------------------------------------------------------ losses
def softmax_cross_entropy_with_logits(
    _sentinel: Any = None,
    labels: Any = None,
    logits: Any = None,
    dim: int = -1,
    name: Name = None,
    axis: int | None = None,
) -> Any:
    """-sum(labels * log_softmax(logits)) along `axis`, without a gradient for the labels."""
    return _soft_cross_entropy(_sentinel, labels, logits, dim if axis is None else axis, name, True)


def softmax_cross_entropy_with_logits_v2(
    _sentinel: Any = None,
    labels: Any = None,
    logits: Any = None,
    axis: int | None = None,
    name: Name = None,
    dim: int | None = None,
) -> Any:
    """-sum(labels * log_softmax(logits)) along `axis` (the last)."""
    return _soft_cross_entropy(_sentinel, labels, logits, _last(axis, dim), name, False)


def _soft_cross_entropy(sentinel: Any, labels: Any, logits: Any, axis: int, name: Name, stop: bool) -> Any:
    x, t = _named_arguments("softmax_cross_entropy_with_logits", sentinel, labels, logits)
    t = convert_to_tensor(t, like=x)
    if t.dtype is not x.dtype:
        raise DTypeError(
            f"softmax_cross_entropy_with_logits: labels are {t.dtype.name}, logits {x.dtype.name}; use tf.cast"
        )
    inputs = (t, x)
    return named(
        x.graph,
        "softmax_cross_entropy_with_logits",
        name,
        lambda: x.graph.apply(_soft_loss, inputs, (axis, stop)),
        inputs,
    )


def _soft_loss(labels: Value, logits: Value, axis: int, stop: bool) -> Value:
    if labels.type.shape != logits.type.shape:
        raise ShapeError(
            f"softmax_cross_entropy_with_logits: labels {labels.type} and logits {logits.type} need one shape"
        )
    at = axis % logits.type.rank
    target = wide(stop_gradient(labels) if stop else labels)
    terms = target * log_softmax_of(wide(logits), at)
    return nd.cast_to(ew.neg(nd.sum(terms, at)), float_dtype(logits))


def sparse_softmax_cross_entropy_with_logits(labels: Any = None, logits: Any = None, name: Name = None) -> Any:
    """-log_softmax(logits)[label]: labels [...] of integers, logits [..., classes]. A label out of range raises when it runs. By name, or in
    this order: their dtypes tell them apart."""
    x, t = _named_arguments("sparse_softmax_cross_entropy_with_logits", None, labels, logits)
    t = convert_to_tensor(t)
    if not t.dtype.is_integer:
        raise DTypeError(
            f"sparse_softmax_cross_entropy_with_logits: labels are integers, not {t.dtype.name}; the order is (labels, logits)"
        )
    inputs = (t, x)
    return named(
        x.graph, "sparse_softmax_cross_entropy_with_logits", name, lambda: x.graph.apply(_sparse_loss, inputs), inputs
    )


def _sparse_loss(labels: Value, logits: Value) -> Value:
    if labels.type.shape != logits.type.shape[:-1]:
        raise ShapeError(
            f"sparse_softmax_cross_entropy_with_logits: logits {logits.type} take labels of shape "
            f"{list(logits.type.shape[:-1])}, got {labels.type}"
        )
    axis = logits.type.rank - 1
    classes = logits.type.shape[-1]
    logp = log_softmax_of(wide(logits), axis)
    # Reading the label's own position checks that it is one.
    label = indexing.gather(nd.iota((classes,), 0, i64), nd.cast_to(labels, i64), axes=(0,))
    here = nd.eq(nd.expand_dims(label, axis), nd.iota((classes,), 0, i64))
    picked = nd.sum(nd.where(here, logp, nd.zeros_like(logp)), axis)
    return nd.cast_to(ew.neg(picked), float_dtype(logits))


def sigmoid_cross_entropy_with_logits(
    _sentinel: Any = None, labels: Any = None, logits: Any = None, name: Name = None
) -> Any:
    """max(x, 0) - x*z + log(1 + e^-|x|) for logits x and labels z."""
    x, t = _named_arguments("sigmoid_cross_entropy_with_logits", _sentinel, labels, logits)
    t = convert_to_tensor(t, like=x)
    inputs = (t, x)
    return named(x.graph, "logistic_loss", name, lambda: x.graph.apply(_logistic_loss, inputs), inputs)


def _logistic_loss(labels: Value, logits: Value) -> Value:
    if labels.type != logits.type:
        raise ShapeError(
            f"sigmoid_cross_entropy_with_logits: labels {labels.type} and logits {logits.type} need one type"
        )
    x, z = wide(logits), wide(labels)
    return nd.cast_to(softplus_of(x) - x * z, float_dtype(logits))


def weighted_cross_entropy_with_logits(
    labels: Any = None, logits: Any = None, pos_weight: Any = 1.0, name: Name = None
) -> Any:
    """(1 - z)*x + (1 + (w - 1)*z) * log(1 + e^-x) for logits x, labels z and the weight w of positive ones."""
    x, t = _named_arguments("weighted_cross_entropy_with_logits", None, labels, logits)
    inputs = (convert_to_tensor(t, like=x), x, pos_weight)
    return named(x.graph, "logistic_loss", name, lambda: x.graph.apply(_weighted_logistic_loss, inputs), inputs[:2])


def _weighted_logistic_loss(z: Value, x: Value, w: Any) -> Value:
    return (1.0 - z) * x + ((w - 1.0) * z + 1.0) * softplus_of(-x)


def _named_arguments(of: str, sentinel: Any, labels: Any, logits: Any) -> tuple[Any, Any]:
    """(logits, labels). Two given by position are TensorFlow 2's: labels, logits."""
    if sentinel is not None and logits is None:
        sentinel, labels, logits = None, sentinel, labels
    if sentinel is not None or labels is None or logits is None:
        raise InvalidArgumentError(f"{of} takes labels=... and logits=..., or the two in that order")
    return convert_to_tensor(logits), labels


def l2_loss(t: Any, name: Name = None) -> Any:
    """sum(t^2) / 2."""
    x = convert_to_tensor(t)
    return named(x.graph, "L2Loss", name, lambda: x.graph.apply(_l2_loss, (x,)), (x,))


def _l2_loss(x: Value) -> Value:
    return nd.sum(x * x) * 0.5


def l2_normalize(x: Any, axis: Any = None, epsilon: float = 1e-12, name: Name = None, dim: Any = None) -> Any:
    """x / sqrt(max(sum(x^2), epsilon)) over `axis`."""
    t = convert_to_tensor(x)
    along = dim if axis is None else axis
    over = nd.axes_of(t.graph.value_of(t), tuple(along) if isinstance(along, list) else along)
    return named(t.graph, "l2_normalize", name, lambda: t.graph.apply(_l2_normalize, (t, epsilon), (over,)), (t,))


def _l2_normalize(x: Value, epsilon: Any, axes: tuple[int, ...]) -> Value:
    total = nd.sum(x * x, axes, keepdims=True)
    return x * ew.rsqrt(nd.maximum(total, epsilon))


# ------------------------------------------------------------------------------------------------ layers' parts
def bias_add(value: Any, bias: Any, data_format: str | None = None, name: Name = None) -> Any:
    """value + bias along the last dim (`NCHW`: along dim 1)."""
    x = convert_to_tensor(value)
    b = convert_to_tensor(bias, like=x)
    if b.ndim != 1:
        raise ShapeError(f"bias_add: the bias has one dim, got {b._type}")
    at = 1 if data_format is not None and data_format.startswith("NC") else x.ndim - 1
    return named(x.graph, "BiasAdd", name, lambda: x.graph.apply(_bias_add, (x, b), (at,)), (x, b))


def _bias_add(x: Value, b: Value, axis: int) -> Value:
    if b.type.shape != (x.type.shape[axis],):
        raise ShapeError(f"bias_add: a bias {b.type} does not fit axis {axis} of {x.type}")
    return x + nd.reshape(b, (*b.type.shape, *([1] * (x.type.rank - 1 - axis))))


def xw_plus_b(x: Any, weights: Any, biases: Any, name: Name = None) -> Any:
    """matmul(x, weights) + biases."""
    graph = convert_to_tensor(x).graph
    return named(graph, "xw_plus_b", name, lambda: bias_add(math.matmul(x, weights), biases))


def embedding_lookup(
    params: Any,
    ids: Any,
    partition_strategy: str = "mod",
    name: Name = None,
    validate_indices: bool = True,
    max_norm: Any = None,
) -> Any:
    """The rows of `params` that `ids` names."""
    if isinstance(params, (list, tuple)):
        if len(params) != 1:
            raise ArgumentError("embedding_lookup: params in several shards are not supported; concat them")
        params = params[0]
    if max_norm is not None:
        raise ArgumentError("embedding_lookup: max_norm is not supported; use tf.clip_by_norm on the result")
    return gather(params, ids, name=name or "embedding_lookup")


def dropout(
    x: Any, keep_prob: Any = None, noise_shape: Any = None, seed: int | None = None, name: Name = None, rate: Any = None
) -> Any:
    """x / keep_prob with probability keep_prob (1 - rate), else 0; drawn anew at each run. Either may be a tensor."""
    t = convert_to_tensor(x)
    if noise_shape is not None:
        raise ArgumentError("dropout: noise_shape is not supported")
    if (keep_prob is None) == (rate is None):
        raise InvalidArgumentError("dropout takes keep_prob or rate, one of them")
    if rate is None:
        rate = 1.0 - keep_prob
    if isinstance(rate, (int, float)):
        if not 0.0 <= rate <= 1.0:
            raise InvalidArgumentError(f"dropout: the rate lies between 0 and 1, not {rate}")
        rate = float(rate)
    return named(t.graph, "dropout", name, lambda: _draw_dropout(t, rate, seed), (t,))


def moments(
    x: Any, axes: Any, shift: Any = None, name: Name = None, keep_dims: bool = False, keepdims: bool | None = None
) -> Any:
    """(mean, variance) over `axes`."""
    keep = keep_dims if keepdims is None else keepdims
    return math.reduce_mean(x, axes, keep), math.reduce_variance(x, axes, keep)


def batch_normalization(
    x: Any, mean: Any, variance: Any, offset: Any, scale: Any, variance_epsilon: float, name: Name = None
) -> Any:
    """(x - mean) / sqrt(variance + epsilon) * scale + offset."""
    t = convert_to_tensor(x)

    def make() -> Any:
        inverse = math.rsqrt(variance + variance_epsilon)
        inverse = inverse if scale is None else inverse * scale
        out = t * inverse
        rest = -mean * inverse
        return out + (rest if offset is None else rest + offset)

    return named(t.graph, "batchnorm", name, make, (t,))


def in_top_k(predictions: Any, targets: Any, k: int, name: Name = None) -> Any:
    """Whether fewer than k predictions of the row are larger than the target's (ties count as in)."""
    x, t = convert_to_tensor(predictions), convert_to_tensor(targets)
    return named(x.graph, "InTopK", name, lambda: x.graph.apply(_in_top_k, (x, t), (k,)), (x, t))


def _in_top_k(x: Value, t: Value, k: int) -> Value:
    rows = x.type.shape[0]
    label = nd.cast_to(t, i64)
    own = indexing.gather(x, nd.iota((rows,), 0, i64), label, axes=(0, 1))
    larger = nd.gt(x, nd.reshape(own, (rows, 1)))
    return nd.lt(nd.sum(nd.cast_to(larger, i64), 1), k)


__all__ = [
    "avg_pool", "avg_pool1d", "avg_pool2d", "avg_pool3d", "batch_normalization", "bias_add", "conv1d", "conv2d", "conv2d_transpose",
    "conv3d", "depthwise_conv2d", "depthwise_conv2d_native", "dropout", "elu", "embedding_lookup", "fused_batch_norm", "gelu", "in_top_k",
    "l2_loss", "l2_normalize", "leaky_relu", "log_sigmoid", "log_softmax", "max_pool", "max_pool1d", "max_pool2d", "max_pool3d", "moments",
    "reduce_logsumexp", "relu", "relu6", "selu", "separable_conv2d", "sigmoid", "sigmoid_cross_entropy_with_logits", "silu", "softmax",
    "softmax_cross_entropy_with_logits", "softmax_cross_entropy_with_logits_v2", "softplus", "softsign",
    "sparse_softmax_cross_entropy_with_logits", "swish", "tanh", "top_k", "weighted_cross_entropy_with_logits", "xw_plus_b",
]  # fmt: skip
