"""Losses, with PyTorch's arguments: reduction 'mean' (default), 'sum' or 'none', class weights, ignore_index, label smoothing.

Class losses pick the label's score by comparing it with positions and summing, not by reading at an index: forward and gradient are
then elementwise work and row reductions. Labels are checked at run time: one outside 0..C-1 (and not ignore_index) raises
IndexOutOfRange. f16 and bf16 compute in float32 and round once.
"""

from __future__ import annotations

import functools
from typing import Any

from duo.dispatch import apply
from duo.functional._args import choice, integer, one_axis, type_of
from duo.functional._ssa import (
    Axes,
    align,
    along,
    float_dtype,
    insert_axis,
    max_kept,
    mean_,
    sum_,
    sum_kept,
    wide,
)
from duo.functional.activation import softplus_of
from duo.functional.reduce import log_softmax_of, norm_kept
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import indexing
from duo_ir.types import DType, TensorType, i64, promote

_REDUCTIONS = ("mean", "sum", "none")


def _every(x: Value) -> Axes:
    return tuple(range(x.type.rank))


def _reduced(each: Value, reduction: str, dtype: DType) -> Value:
    if reduction == "mean":
        each = mean_(each, _every(each))
    elif reduction == "sum":
        each = sum_(each, _every(each))
    return nd.cast_to(each, dtype)


def _pair(x: Value, y: Value) -> tuple[Value, Value, DType]:
    """Both broadcast and in float32 at least, and the dtype of the result."""
    dtype = promote(float_dtype(x), y.type.dtype)
    a, b = align(wide(x), wide(y))
    return a, b, dtype


def _weighted(each: Value, weight: Value) -> Value:
    return each * nd.cast_to(weight, each.type.dtype)


# ---------------------------------------------------------------------------------------------------------- regression
def _mse_loss(x: Value, y: Value, reduction: str) -> Value:
    a, b, dtype = _pair(x, y)
    d = a - b
    return _reduced(d * d, reduction, dtype)


def _l1_loss(x: Value, y: Value, reduction: str) -> Value:
    a, b, dtype = _pair(x, y)
    return _reduced(ew.abs(a - b), reduction, dtype)


def _smooth_l1_loss(x: Value, y: Value, beta: Any, reduction: str) -> Value:
    a, b, dtype = _pair(x, y)
    far, beta = align(ew.abs(a - b), beta)
    near = ew.lt(far, beta)
    divisor = ew.where(near, beta, nd.ones_like(beta))  # beta may be 0, and nothing is near then
    return _reduced(ew.where(near, far * far * 0.5 / divisor, far - beta * 0.5), reduction, dtype)


def _huber_loss(x: Value, y: Value, delta: Any, reduction: str) -> Value:
    a, b, dtype = _pair(x, y)
    far, delta = align(ew.abs(a - b), delta)
    each = ew.where(ew.le(far, delta), far * far * 0.5, delta * (far - delta * 0.5))
    return _reduced(each, reduction, dtype)


def mse_loss(input: Any, target: Any, reduction: str = "mean") -> Any:
    """(input - target)^2."""
    return apply(_mse_loss, (input, target), (choice("mse_loss", "reduction", reduction, _REDUCTIONS),))


def l1_loss(input: Any, target: Any, reduction: str = "mean") -> Any:
    """|input - target|."""
    return apply(_l1_loss, (input, target), (choice("l1_loss", "reduction", reduction, _REDUCTIONS),))


def smooth_l1_loss(input: Any, target: Any, reduction: str = "mean", beta: Any = 1.0) -> Any:
    """d^2 / (2 beta) where d = |input - target| < beta, else d - beta/2."""
    choice("smooth_l1_loss", "reduction", reduction, _REDUCTIONS)
    return apply(_smooth_l1_loss, (input, target, beta), (reduction,))


def huber_loss(input: Any, target: Any, reduction: str = "mean", delta: Any = 1.0) -> Any:
    """d^2 / 2 where d = |input - target| <= delta, else delta * (d - delta/2)."""
    choice("huber_loss", "reduction", reduction, _REDUCTIONS)
    return apply(_huber_loss, (input, target, delta), (reduction,))


# ------------------------------------------------------------------------------------------------------- class labels
def _picked(scores: Value, label: Value, axis: int) -> Value:
    """scores at the label along the class axis, as a sum over the one place where position and label agree."""
    here = nd.eq(along(scores.type.shape[axis], axis, scores.type.rank), insert_axis(label, axis))
    here = nd.broadcast_to(here, scores.type.shape)
    return sum_(ew.where(here, scores, nd.zeros_like(scores)), (axis,))


def _nll(
    scores: Value, shift: Value | None, target: Value, weight: Value | None, smoothing: Any, ignore: int, reduction: str
) -> Value:  # fmt: skip
    """The loss of log-probabilities `scores - shift` for labels [N, ...], in scores' dtype.

    scores: [N, C, ...] (or [C]); shift: the same with one class, or None. The label's score is picked before the shift, which is then
    applied once for each label, not for each class."""
    axis, d = 1 if scores.type.rank > 1 else 0, scores.type.dtype
    classes = scores.type.shape[axis]
    target = nd.cast_to(target, i64)
    valid = nd.ne(target, ignore)
    label = ew.where(valid, target, nd.zeros_like(target))
    label = indexing.gather(
        nd.iota((classes,), 0, i64), label, axes=(0,)
    )  # the label itself, once it is known to be one
    none = nd.constant_of(0, d)
    picked = _picked(scores, label, axis)
    each = ew.neg(picked if shift is None else picked - nd.reshape(shift, picked.type.shape))
    if weight is not None:
        weight = nd.cast_to(weight, d)
        own = indexing.gather(weight, label, axes=(0,))
        each = each * own
    if smoothing is not None:
        logp = scores if shift is None else scores - shift
        spread = logp if weight is None else logp * nd.reshape(weight, (classes, *([1] * (logp.type.rank - axis - 1))))
        rest = ew.neg(sum_(spread, (axis,))) / nd.size_of(classes, d)
        smoothing = nd.cast_to(smoothing, d) if smoothing.__class__ is Value else smoothing
        each = each * (1.0 - smoothing) + rest * smoothing
    each = nd.where(valid, each, none)
    if reduction == "none":
        return each
    total = sum_(each, _every(each))
    if reduction == "sum":
        return total
    if weight is None:
        return total / nd.cast_to(sum_(nd.cast_to(valid, i64), _every(valid)), d)
    return total / sum_(nd.where(valid, own, none), _every(valid))


def _class_loss(scores: Value, shift: Value | None, arguments: tuple, dtype: DType) -> Value:
    target, *more, weighted, smoothed, ignore, reduction = arguments
    weight = more.pop(0) if weighted else None
    smoothing = more.pop(0) if smoothed else None
    return nd.cast_to(_nll(scores, shift, target, weight, smoothing, ignore, reduction), dtype)


def _nll_loss(x: Value, *arguments: Any) -> Value:
    return _class_loss(wide(x), None, arguments, float_dtype(x))


def _cross_entropy(x: Value, *arguments: Any) -> Value:
    y, axes = wide(x), (1 if x.type.rank > 1 else 0,)
    shifted = y - ew.stop_gradient(max_kept(y, axes))
    return _class_loss(shifted, ew.log(sum_kept(ew.exp(shifted), axes)), arguments, float_dtype(x))


def _cross_entropy_of_probabilities(x: Value, *arguments: Any) -> Value:
    target, *more, weighted, smoothed, reduction = arguments
    axis = 1 if x.type.rank > 1 else 0
    logp = log_softmax_of(wide(x), axis)
    d, classes = logp.type.dtype, x.type.shape[axis]
    target = nd.cast_to(target, d)
    weight = nd.cast_to(more.pop(0), d) if weighted else None
    if smoothed:
        s = more.pop(0)
        s = nd.cast_to(s, d) if s.__class__ is Value else nd.constant_of(s, d)
        target = target * (1.0 - s) + s / nd.size_of(classes, d)
    terms = logp * target
    if weight is not None:
        terms = terms * nd.reshape(weight, (classes, *([1] * (x.type.rank - axis - 1))))
    return _reduced(ew.neg(sum_(terms, (axis,))), reduction, float_dtype(x))


def _check_labels(name: str, x: TensorType, t: TensorType, weight: TensorType | None) -> None:
    if x.rank == 0:
        raise ShapeError(f"{name}: the input needs a class dim, got {x}")
    want = (x.shape[0], *x.shape[2:]) if x.rank > 1 else ()
    if not _may_agree(t.shape, want):
        raise ShapeError(f"{name}: input {x} takes labels of shape {list(want)}, got {t}")
    if not t.dtype.is_integer:
        raise DTypeError(f"{name}: labels are integers, not {t.dtype.name}")
    _check_weight(name, x, weight)


def _may_agree(a: tuple, b: tuple) -> bool:
    """Whether the shapes are equal, or can be once sizes that a graph does not know yet are known."""
    return len(a) == len(b) and all(d == e or not (isinstance(d, int) and isinstance(e, int)) for d, e in zip(a, b))


def _check_weight(name: str, x: TensorType, weight: TensorType | None) -> None:
    classes = x.shape[1 if x.rank > 1 else 0]
    if weight is not None and weight.shape != (classes,):
        raise ShapeError(f"{name}: the weight needs one number per class, shape [{classes}], got {weight}")


def nll_loss(
    input: Any, target: Any, weight: Any = None, ignore_index: int = -100, reduction: str = "mean"
) -> Any:  # fmt: skip
    """-input[n, target[n], ...] * weight[target[n]] of log-probabilities [N, C, ...] and labels [N, ...] ([C] and a 0-d label).

    'mean' divides by the sum of the weights of the labels that count."""
    choice("nll_loss", "reduction", reduction, _REDUCTIONS)
    _check_labels("nll_loss", type_of(input), type_of(target), None if weight is None else type_of(weight))
    tensors = (input, target) if weight is None else (input, target, weight)
    ignore = integer("nll_loss", "ignore_index", ignore_index)
    return apply(_nll_loss, tensors, (weight is not None, False, ignore, reduction))


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """nll_loss of log_softmax over the classes, of logits [N, C, ...] (or [C]).

    target: labels [N, ...] (integers), or probabilities in input's shape. Label smoothing mixes the target with the uniform
    distribution. With labels 'mean' divides by the sum of the weights of those that count, with probabilities by their number."""
    given = None if weight is None else type_of(weight)
    body, attrs = _cross_entropy_form(
        type_of(input), type_of(target), given, ignore_index, reduction, label_smoothing
    )  # fmt: skip
    tensors = (input, target) if weight is None else (input, target, weight)
    return apply(body, (*tensors, float(label_smoothing)) if attrs[1] else tensors, attrs)


@functools.lru_cache(1024, typed=True)
def _cross_entropy_form(
    x: TensorType, t: TensorType, w: TensorType | None, ignore_index: Any, reduction: Any, smoothing: Any
) -> tuple[Any, tuple]:  # fmt: skip
    """The body for operands of these types, and its attributes. Raises for arguments that do not fit."""
    choice("cross_entropy", "reduction", reduction, _REDUCTIONS)
    if not 0.0 <= smoothing <= 1.0:
        raise ArgumentError(f"cross_entropy: label_smoothing lies between 0 and 1, not {smoothing}")
    smoothed = smoothing != 0.0
    if t.dtype.is_float:
        if not _may_agree(t.shape, x.shape):
            raise ShapeError(f"cross_entropy: target probabilities need input's shape, {x}, got {t}")
        _check_weight("cross_entropy", x, w)
        return _cross_entropy_of_probabilities, (w is not None, smoothed, reduction)
    _check_labels("cross_entropy", x, t, w)
    return _cross_entropy, (w is not None, smoothed, integer("cross_entropy", "ignore_index", ignore_index), reduction)


# -------------------------------------------------------------------------------------------------------- yes or no
def _clamped_log(x: Value) -> Value:
    """max(log(x), -100), whose derivative at 0 is taken as 0."""
    zero, one, least = nd.zeros_like(x), nd.ones_like(x), nd.constant_like(x, -100.0)
    positive = ew.gt(x, zero)
    value = ew.log(ew.where(positive, x, one))
    value = ew.where(ew.lt(value, least), least, value)
    return ew.where(ew.le(x, zero), least, ew.where(positive, value, x))


def _binary_cross_entropy(x: Value, y: Value, *arguments: Any) -> Value:
    *weight, reduction = arguments
    p, t, dtype = _pair(x, y)
    each = ew.neg(t * _clamped_log(p) + (1.0 - t) * _clamped_log(1.0 - p))
    return _reduced(_weighted(each, weight[0]) if weight else each, reduction, dtype)


def _binary_cross_entropy_with_logits(x: Value, y: Value, *arguments: Any) -> Value:
    *tensors, weighted, positive_weighted, reduction = arguments
    a, t, dtype = _pair(x, y)
    rest = iter([nd.cast_to(v, a.type.dtype) for v in tensors])
    weight = next(rest) if weighted else None
    loss = softplus_of(ew.neg(a))
    if positive_weighted:
        loss = loss * (1.0 + (next(rest) - 1.0) * t)
    each = (1.0 - t) * a + loss
    return _reduced(each if weight is None else each * weight, reduction, dtype)


def _same_shape(name: str, input: Any, target: Any) -> None:
    if type_of(input).shape != type_of(target).shape:
        raise ShapeError(f"{name}: input {type_of(input)} and target {type_of(target)} need one shape")


def binary_cross_entropy(input: Any, target: Any, weight: Any = None, reduction: str = "mean") -> Any:
    """-(target * log(input) + (1 - target) * log(1 - input)) * weight, logarithms not below -100. The input is a probability."""
    choice("binary_cross_entropy", "reduction", reduction, _REDUCTIONS)
    _same_shape("binary_cross_entropy", input, target)
    tensors = (input, target) if weight is None else (input, target, weight)
    return apply(_binary_cross_entropy, tensors, (reduction,))


def binary_cross_entropy_with_logits(
    input: Any, target: Any, weight: Any = None, reduction: str = "mean", pos_weight: Any = None
) -> Any:
    """binary_cross_entropy of sigmoid(input), without its overflow; pos_weight multiplies the term of positive targets."""
    choice("binary_cross_entropy_with_logits", "reduction", reduction, _REDUCTIONS)
    _same_shape("binary_cross_entropy_with_logits", input, target)
    tensors = [input, target, *[v for v in (weight, pos_weight) if v is not None]]
    attrs = (weight is not None, pos_weight is not None, reduction)
    return apply(_binary_cross_entropy_with_logits, tuple(tensors), attrs)


# ------------------------------------------------------------------------------------------- distributions and vectors
def _kl_div(x: Value, y: Value, log_target: bool, reduction: str) -> Value:
    a, t, dtype = _pair(x, y)
    if log_target:
        each = ew.exp(t) * (t - a)
    else:
        zero = nd.zeros_like(t)
        positive = ew.gt(t, zero)
        entropy = ew.where(positive, t * ew.log(ew.where(positive, t, nd.ones_like(t))), t * 0.0)
        each = entropy - t * a
    if reduction == "batchmean":
        return nd.cast_to(sum_(each, _every(each)) / nd.size_of(each.type.shape[0], each.type.dtype), dtype)
    return _reduced(each, reduction, dtype)


def kl_div(input: Any, target: Any, reduction: str = "mean", log_target: bool = False) -> Any:
    """target * (log(target) - input) of log-probabilities `input`; 'batchmean' divides the sum by the first dim's size."""
    choice("kl_div", "reduction", reduction, (*_REDUCTIONS, "batchmean"))
    return apply(_kl_div, (input, target), (bool(log_target), reduction))


def _cosine_similarity(x: Value, y: Value, axis: int, eps: float) -> Value:
    a, b, dtype = _pair(x, y)
    axes = (axis,) if a.type.rank else ()
    lengths = [norm_kept(v, 2, axes) for v in (a, b)]
    a, b = (v / nd.where(nd.lt(n, eps), eps, n) for v, n in zip((a, b), lengths))
    return nd.cast_to(sum_(a * b, axes), dtype)


def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    """x1 . x2 / (max(|x1|, eps) * max(|x2|, eps)) along `dim`."""
    rank = max(type_of(x1).rank, type_of(x2).rank)
    return apply(_cosine_similarity, (x1, x2), (one_axis("cosine_similarity", dim, rank), float(eps)))


def _margin_ranking_loss(x: Value, y: Value, sign: Value, margin: Any, reduction: str) -> Value:
    a, b, dtype = _pair(x, y)
    each = ew.neg(nd.cast_to(sign, a.type.dtype)) * (a - b) + margin
    return _reduced(_hinge(each), reduction, dtype)


def _hinge(x: Value) -> Value:
    zero = nd.zeros_like(x)
    return ew.where(ew.le(x, zero), zero, x)


def margin_ranking_loss(input1: Any, input2: Any, target: Any, margin: Any = 0.0, reduction: str = "mean") -> Any:
    """max(0, -target * (input1 - input2) + margin)."""
    choice("margin_ranking_loss", "reduction", reduction, _REDUCTIONS)
    return apply(_margin_ranking_loss, (input1, input2, target, margin), (reduction,))


def _triplet_margin_loss(
    x: Value, y: Value, z: Value, margin: Any, p: float, eps: float, reduction: str
) -> Value:  # fmt: skip
    anchor, positive, negative = align(wide(x), wide(y), wide(z))
    last = (anchor.type.rank - 1,)
    near, far = (norm_kept(anchor - v + eps, p, last) for v in (positive, negative))
    each = nd.reshape(near - far, anchor.type.shape[:-1]) + margin
    return _reduced(_hinge(each), reduction, float_dtype(x))


def triplet_margin_loss(
    anchor: Any, positive: Any, negative: Any, margin: Any = 1.0, p: float = 2.0, eps: float = 1e-6, reduction: str = "mean"
) -> Any:  # fmt: skip
    """max(0, |anchor - positive| - |anchor - negative| + margin), p-norms along the last dim with eps added to each difference."""
    choice("triplet_margin_loss", "reduction", reduction, _REDUCTIONS)
    return apply(_triplet_margin_loss, (anchor, positive, negative, margin), (float(p), float(eps), reduction))
