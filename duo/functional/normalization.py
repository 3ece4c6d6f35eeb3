"""Layer, RMS, group, instance and batch normalisation. All compute f16 and bf16 in float32 and round once.

The variance is that of the numerics contract: the mean first, then the mean of the squares of (x - mean).
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes

from duo.dispatch import apply
from duo.functional._args import integer, size_args, some_axes, type_of
from duo.functional._ssa import Axes, elements, float_dtype, kept, mean_kept, sum_, wide
from duo.functional.reduce import norm_kept
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.types import TensorType, shape_str


def _normal_over(x: Value, axes: Axes, eps: float) -> Value:
    centred = x - mean_kept(x, axes)
    return centred * ew.rsqrt(mean_kept(centred * centred, axes) + eps)


def _affine(y: Value, tensors: tuple[Value, ...], weighted: bool, biased: bool) -> Value:
    """y * weight + bias, in y's dtype, with those of the two that are there."""
    rest = iter([nd.cast_to(t, y.type.dtype) for t in tensors])
    if weighted:
        y = y * next(rest)
    return y + next(rest) if biased else y


def _last(x: Value, k: int) -> Axes:
    return tuple(range(x.type.rank - k, x.type.rank))


def _per_channel(v: Value, rank: int) -> Value:
    """[channels] as it stands beside [batch, channels, ...] of that rank."""
    return nd.reshape(v, (v.type.size, *([1] * (rank - 2))))


def _present(*tensors: Any) -> tuple[tuple, tuple[bool, ...]]:
    return tuple([t for t in tensors if t is not None]), tuple([t is not None for t in tensors])


# ------------------------------------------------------------------------------------------------------ layer and RMS
def _layer_norm(x: Value, *arguments: Any) -> Value:
    *tensors, k, eps, weighted, biased = arguments
    y = _normal_over(wide(x), _last(x, k), eps)
    return nd.cast_to(_affine(y, tuple(tensors), weighted, biased), float_dtype(x))


def _rms_norm(x: Value, *arguments: Any) -> Value:
    *tensors, k, eps, weighted = arguments
    y = wide(x)
    y = y * ew.rsqrt(mean_kept(y * y, _last(x, k)) + eps)
    return nd.cast_to(_affine(y, tuple(tensors), weighted, False), float_dtype(x))


def _trailing(name: str, input: Any, normalized_shape: Any, *tensors: Any) -> int:
    shape = size_args(name, (normalized_shape,))
    t = type_of(input)
    if not shape or t.shape[-len(shape) :] != shape:
        raise ShapeError(f"{name}: normalized_shape {shape_str(shape)} is not what {t} ends in")
    for v in tensors:
        if v is not None and type_of(v).shape != shape:
            raise ShapeError(f"{name}: weight and bias need shape {shape_str(shape)}, got {type_of(v)}")
    return len(shape)


def layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """(input - mean) / sqrt(var + eps) * weight + bias, over the last dims, whose sizes are normalized_shape."""
    k = _trailing("layer_norm", input, normalized_shape, weight, bias)
    if weight is not None and bias is not None:
        return apply(_layer_norm, (input, weight, bias), (k, float(eps), True, True))
    tensors, flags = _present(weight, bias)
    return apply(_layer_norm, (input, *tensors), (k, float(eps), *flags))


def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """input / sqrt(mean of squares + eps) * weight, over the last dims; eps is the dtype's unless given."""
    k = _trailing("rms_norm", input, normalized_shape, weight)
    if eps is None:
        d = type_of(input).dtype
        eps = float(ml_dtypes.finfo(d.numpy).eps) if d.is_float else 2.0**-23
    tensors, flags = _present(weight)
    return apply(_rms_norm, (input, *tensors), (k, float(eps), *flags))


# -------------------------------------------------------------------------------------------------- groups and channels
def _group_norm(x: Value, *arguments: Any) -> Value:
    *tensors, groups, eps, weighted, biased = arguments
    n, c, *rest = x.type.shape
    y = nd.reshape(wide(x), (n, groups, c // groups, *rest))
    y = nd.reshape(_normal_over(y, tuple(range(2, y.type.rank)), eps), x.type.shape)
    shaped = tuple([_per_channel(t, x.type.rank) for t in tensors])
    return nd.cast_to(_affine(y, shaped, weighted, biased), float_dtype(x))


def _channels(name: str, input: Any, least: int, *tensors: Any) -> Any:
    """The size of dim 1 of [batch, channels, ...]; `tensors`, where given, have one number for each."""
    return _checked(name, type_of(input), least, *[None if v is None else type_of(v) for v in tensors])


@functools.lru_cache(4096)
def _checked(name: str, t: TensorType, least: int, *types: TensorType | None) -> Any:
    if t.rank < least:
        raise ShapeError(f"{name}: it takes [batch, channels, ...] of at least {least} dims, got {t}")
    c = t.shape[1]
    for v in types:
        if v is not None and v.shape != (c,):
            raise ShapeError(f"{name}: one number per channel, shape [{c}], is needed, got {v} for {t}")
    return c


def group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """[batch, channels, ...] normalised over each group of neighbouring channels; weight and bias per channel."""
    c, groups = _channels("group_norm", input, 2, weight, bias), integer("group_norm", "num_groups", num_groups)
    if not isinstance(c, int) or groups < 1 or c % groups:
        raise ShapeError(f"group_norm: {c} channels do not make {groups} groups")
    tensors, flags = _present(weight, bias)
    return apply(_group_norm, (input, *tensors), (groups, float(eps), *flags))


def instance_norm(input: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """[batch, channels, ...] normalised over what is behind each channel; weight and bias per channel."""
    c = _channels("instance_norm", input, 3, weight, bias)
    tensors, flags = _present(weight, bias)
    return apply(_group_norm, (input, *tensors), (c, float(eps), *flags))


# ----------------------------------------------------------------------------------------------------------- batch norm
def _batch_axes(x: Value) -> Axes:
    return tuple(a for a in range(x.type.rank) if a != 1)


def _batch_norm_train(x: Value, *arguments: Any) -> Any:
    """(y, then those of the new running mean, variance and count that are tracked). The statistics take part in no gradient."""
    *tensors, eps, tracked, counted, averaged, weighted, biased = arguments
    y, axes = wide(x), _batch_axes(x)
    mean = mean_kept(y, axes)
    centred = y - mean
    squares = sum_(centred * centred, axes)
    n = nd.size_of(elements(x.type.shape, axes), y.type.dtype)
    out = centred * ew.rsqrt(kept(squares / n, x.type.shape, axes) + eps)
    states, rest = (tensors[: 2 + counted], tensors[2 + counted :]) if tracked else ([], tensors)
    momentum = rest.pop(0) if tracked and not averaged else None
    affine = tuple([_per_channel(t, x.type.rank) for t in rest])
    out = nd.cast_to(_affine(out, affine, weighted, biased), float_dtype(x))
    if not tracked:
        return out
    running_mean, running_var, *counts = states
    counts = [c + 1 for c in counts]
    if averaged:
        momentum = 1.0 / nd.cast_to(counts[0], y.type.dtype)
    less = n - 1.0
    less = ew.where(nd.gt(less, 0.0), less, nd.zeros_like(less))
    new_mean = _mixed(running_mean, nd.reshape(mean, (x.type.shape[1],)), momentum)
    return out, new_mean, _mixed(running_var, squares / less, momentum), *counts


def _mixed(old: Value, new: Value, momentum: Any) -> Value:
    new = nd.cast_to(ew.stop_gradient(new), old.type.dtype)
    if momentum.__class__ is Value:
        momentum = nd.cast_to(momentum, old.type.dtype)
    return nd.cast_to(old * (1.0 - momentum) + new * momentum, old.type.dtype)


def _batch_norm_eval(x: Value, mean: Value, var: Value, *arguments: Any) -> Value:
    *tensors, eps, weighted, biased = arguments
    y = wide(x)
    mean, var = (_per_channel(nd.cast_to(v, y.type.dtype), x.type.rank) for v in (mean, var))
    affine = tuple([_per_channel(t, x.type.rank) for t in tensors])
    out = (y - mean) * ew.rsqrt(var + eps)
    return nd.cast_to(_affine(out, affine, weighted, biased), float_dtype(x))


def batch_norm_train(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    count: Any = None,
) -> Any:
    """[batch, channels, ...] normalised by its own statistics over all but the channels.

    With running statistics: (y, new mean, new variance), the new ones (1 - momentum) * old + momentum * batch, the variance
    there divided by n - 1; the caller stores them. With `count`, i64[], also count + 1, and momentum may be None, which is
    1 / (count + 1): the average of all batches. Without: y."""
    _channels("batch_norm", input, 2, running_mean, running_var, weight, bias)
    if (running_mean is None) != (running_var is None):
        raise ArgumentError("batch_norm: give running_mean and running_var, or neither")
    if elements(type_of(input).shape, tuple(a for a in range(type_of(input).rank) if a != 1)) == 1:
        raise ShapeError(f"batch_norm: in training it needs more than one value per channel, got {type_of(input)}")
    tensors, flags = _present(weight, bias)
    if running_mean is None:
        return apply(_batch_norm_train, (input, *tensors), (float(eps), False, False, False, *flags))
    counts, (counted,) = _present(count)
    averaged = momentum is None
    if averaged and not counted:
        raise ArgumentError("batch_norm: momentum None needs the number of batches seen (count)")
    states = (running_mean, running_var, *counts, *(() if averaged else (momentum,)))
    attrs = (float(eps), True, counted, averaged, *flags)
    return apply(_batch_norm_train, (input, *states, *tensors), attrs)


def batch_norm_eval(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """[batch, channels, ...] normalised by the statistics given."""
    _channels("batch_norm", input, 2, running_mean, running_var, weight, bias)
    tensors, flags = _present(weight, bias)
    return apply(_batch_norm_eval, (input, running_mean, running_var, *tensors), (float(eps), *flags))


# ------------------------------------------------------------------------------------------------------------- vectors
def _normalize(x: Value, p: float, axes: Axes, eps: float) -> Value:
    y = wide(x)
    length = norm_kept(y, p, axes)
    return nd.cast_to(y / nd.where(nd.lt(length, eps), eps, length), float_dtype(x))


def normalize(input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Any:
    """input divided by its p-norm along `dim`, or by eps where that is greater."""
    return apply(_normalize, (input,), (float(p), some_axes("normalize", dim, type_of(input).rank), float(eps)))
