"""Reductions along dims, softmax and its relatives, and cumulative sums.

`dim` is an int, several, or None for all; `keepdim` leaves reduced dims with size 1. Sums follow the one order of the numerics
contract; f16 and bf16 composites (mean, var, softmax...) compute in float32 and round once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from duo.dispatch import apply
from duo.functional import elementwise as elem
from duo.functional._args import is_tensor, maybe_dtype, one_axis, some_axes, type_of
from duo.functional._ssa import (
    Axes,
    elements,
    float_dtype,
    kept,
    max_kept,
    mean_kept,
    safe_sqrt,
    sum_,
    sum_kept,
    truth,
    wide,
)
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import indexing
from duo_ir.ops import reduce as red
from duo_ir.types import DType, bool_, i64


class ValuesIndices(NamedTuple):
    """What max and min along a dim return."""

    values: Any
    indices: Any


def _finish(x: Value, shape: tuple, axes: Axes, keepdim: bool) -> Value:
    return kept(x, shape, axes) if keepdim else x


def _counting(x: Value, dtype: DType | None) -> Value:
    """x as sums and products take it: in `dtype`, else integers and bools as int64."""
    if dtype is not None:
        return nd.cast_to(x, dtype)
    return x if x.type.dtype.is_float else nd.cast_to(x, i64)


# Attributes of a reduction over all dims with nothing else asked for, by rank: being the same objects each time, they are recorded quickest.
_OVER_ALL = [(tuple(range(rank)), False, None) for rank in range(9)]


def _attrs(name: str, rank: int, dim: Any, keepdim: Any, dtype: Any) -> tuple[Axes, bool, DType | None]:
    if dim is None and keepdim is False and dtype is None and rank < 9:
        return _OVER_ALL[rank]
    return some_axes(name, dim, rank), bool(keepdim), maybe_dtype(dtype)


# ------------------------------------------------------------------------------------------------- sums and products
def _sum(x: Value, axes: Axes, keepdim: bool, dtype: DType | None) -> Value:
    return _finish(sum_(_counting(x, dtype), axes), x.type.shape, axes, keepdim)


def _prod(x: Value, axes: Axes, keepdim: bool, dtype: DType | None) -> Value:
    y = _counting(x, dtype)
    return _finish(red.prod(y, axes=axes) if axes else y, x.type.shape, axes, keepdim)


def _mean(x: Value, axes: Axes, keepdim: bool, dtype: DType | None) -> Value:
    y = x if dtype is None else nd.cast_to(x, dtype)
    if not y.type.dtype.is_float:
        raise DTypeError(f"mean: the mean of {x.type} is no integer; give dtype=, or convert it with .float()")
    total = sum_(wide(y), axes)
    out = total / nd.size_of(elements(x.type.shape, axes), total.type.dtype)
    return _finish(nd.cast_to(out, y.type.dtype), x.type.shape, axes, keepdim)


def _count_nonzero(x: Value, axes: Axes) -> Value:
    return sum_(nd.cast_to(truth(x), i64), axes)


def sum(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The sum. Integers and bools add up as int64 unless `dtype` says otherwise; nothing to add gives 0."""
    return apply(_sum, (input,), _attrs("sum", len(type_of(input).shape), dim, keepdim, dtype))


def prod(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The product. Integers and bools multiply as int64 unless `dtype` says otherwise; nothing to multiply gives 1."""
    return apply(_prod, (input,), _attrs("prod", len(type_of(input).shape), dim, keepdim, dtype))


def mean(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The sum divided by the number of elements, of a float tensor."""
    return apply(_mean, (input,), _attrs("mean", len(type_of(input).shape), dim, keepdim, dtype))


def count_nonzero(input: Any, dim: Any = None) -> Any:
    """How many elements are not zero, as int64."""
    return apply(_count_nonzero, (input,), (some_axes("count_nonzero", dim, type_of(input).rank),))


# ------------------------------------------------------------------------------------------------ variance and norms
def _moments(x: Value, axes: Axes, correction: float) -> tuple[Value, Value]:
    """Mean and variance with `axes` kept: the mean first, then the sum of squares of (x - mean)."""
    mean = mean_kept(x, axes)
    centred = x - mean
    squares = sum_kept(centred * centred, axes)
    n = nd.size_of(elements(x.type.shape, axes), x.type.dtype)
    if correction:
        n = n - correction
        n = ew.where(ew.gt(n, nd.zeros_like(n)), n, nd.zeros_like(n))
    return mean, squares / n


def _need_float(name: str, x: Value) -> None:
    if not x.type.dtype.is_float:
        raise DTypeError(f"{name}: it takes a float tensor, not {x.type}; convert it with .float()")


def _dropped(x: Value, shape: tuple, axes: Axes, keepdim: bool, dtype: DType) -> Value:
    """The inverse of `kept`, unless keepdim."""
    out = x if keepdim else nd.reshape(x, tuple([d for a, d in enumerate(shape) if a not in axes]))
    return nd.cast_to(out, dtype)


def _var(x: Value, axes: Axes, correction: float, keepdim: bool) -> Value:
    _need_float("var", x)
    return _dropped(_moments(wide(x), axes, correction)[1], x.type.shape, axes, keepdim, x.type.dtype)


def _std(x: Value, axes: Axes, correction: float, keepdim: bool) -> Value:
    _need_float("std", x)
    out = safe_sqrt(_moments(wide(x), axes, correction)[1])
    return _dropped(out, x.type.shape, axes, keepdim, x.type.dtype)


def _var_mean(x: Value, axes: Axes, correction: float, keepdim: bool) -> tuple[Value, Value]:
    _need_float("var_mean", x)
    mean, var = _moments(wide(x), axes, correction)
    shape, d = x.type.shape, x.type.dtype
    return _dropped(var, shape, axes, keepdim, d), _dropped(mean, shape, axes, keepdim, d)


def _std_mean(x: Value, axes: Axes, correction: float, keepdim: bool) -> tuple[Value, Value]:
    _need_float("std_mean", x)
    mean, var = _moments(wide(x), axes, correction)
    shape, d = x.type.shape, x.type.dtype
    return _dropped(safe_sqrt(var), shape, axes, keepdim, d), _dropped(mean, shape, axes, keepdim, d)


def _spread_arguments(
    name: str, input: Any, dim: Any, unbiased: Any, correction: Any, keepdim: bool
) -> tuple[Axes, float, bool]:
    if isinstance(dim, bool):  # var(x, False): torch's older form
        dim, unbiased = None, dim
    if unbiased is not None:
        if correction is not None:
            raise ArgumentError(f"{name}: give unbiased or correction, not both")
        correction = 1 if unbiased else 0
    return some_axes(name, dim, type_of(input).rank), float(1 if correction is None else correction), bool(keepdim)


def var(
    input: Any, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: float | None = None
) -> Any:
    """The sum of squared distances from the mean, divided by n - correction (1 unless given)."""
    return apply(_var, (input,), _spread_arguments("var", input, dim, unbiased, correction, keepdim))


def std(
    input: Any, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: float | None = None
) -> Any:
    """The square root of `var`; where it is 0 its gradient is taken as 0."""
    return apply(_std, (input,), _spread_arguments("std", input, dim, unbiased, correction, keepdim))


def var_mean(
    input: Any, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: float | None = None
) -> Any:
    """(var, mean)."""
    return apply(_var_mean, (input,), _spread_arguments("var_mean", input, dim, unbiased, correction, keepdim))


def std_mean(
    input: Any, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: float | None = None
) -> Any:
    """(std, mean)."""
    return apply(_std_mean, (input,), _spread_arguments("std_mean", input, dim, unbiased, correction, keepdim))


def norm_kept(x: Value, p: float, axes: Axes) -> Value:
    """The p-norm along `axes`, kept, of an f32 or f64 value."""
    if p == 2:
        return safe_sqrt(sum_kept(x * x, axes))
    if p == math.inf:
        return max_kept(ew.abs(x), axes)
    if p == -math.inf:
        return kept(red.min(ew.abs(x), axes=axes), x.type.shape, axes) if axes else ew.abs(x)
    if p == 0:
        return sum_kept(nd.cast_to(truth(x), x.type.dtype), axes)
    if p == 1:
        return sum_kept(ew.abs(x), axes)
    zero, one = nd.zeros_like(x), nd.ones_like(x)
    at_zero = ew.eq(x, zero)  # kept away from pow, whose derivative there may be infinite
    powers = ew.where(at_zero, zero, nd.pow(ew.abs(ew.where(at_zero, one, x)), p))
    total = sum_kept(powers, axes)
    none = ew.eq(total, nd.zeros_like(total))
    return ew.where(none, nd.zeros_like(total), nd.pow(ew.where(none, nd.ones_like(total), total), 1.0 / p))


def _norm(x: Value, p: float, axes: Axes, keepdim: bool) -> Value:
    _need_float("norm", x)
    return _dropped(norm_kept(wide(x), p, axes), x.type.shape, axes, keepdim, x.type.dtype)


def norm(input: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """The vector norm (sum |x|^p)^(1/p) over the dims; p may be 0 (count), 1, 2 or 'fro', inf, -inf or any positive number."""
    if p == "fro":
        p = 2
    if isinstance(p, str) or not (p in (0, math.inf, -math.inf) or p > 0):
        raise ArgumentError(f"norm: p is 'fro', 0, inf, -inf or positive, not {p!r}")
    if dtype is not None:
        input = elem.cast(input, dtype)
    return apply(_norm, (input,), (float(p), some_axes("norm", dim, type_of(input).rank), bool(keepdim)))


# ----------------------------------------------------------------------------------------------------------- extrema
def _orderable(x: Value) -> Value:
    return nd.cast_to(x, i64) if x.type.dtype is bool_ else x


def _amax(x: Value, axes: Axes, keepdim: bool) -> Value:
    out = red.max(_orderable(x), axes=axes) if axes else x
    return nd.cast_to(_finish(out, x.type.shape, axes, keepdim), x.type.dtype)


def _amin(x: Value, axes: Axes, keepdim: bool) -> Value:
    out = red.min(_orderable(x), axes=axes) if axes else x
    return nd.cast_to(_finish(out, x.type.shape, axes, keepdim), x.type.dtype)


def _position(op: Any, x: Value, axis: int | None, keepdim: bool) -> Value:
    shape = x.type.shape
    flat = _orderable(x if axis is not None and shape else nd.reshape(x, (x.type.size,)))
    out = op(flat, axes=(axis or 0,))
    if not keepdim:
        return out
    return nd.reshape(out, tuple([1 if axis is None or a == axis else d for a, d in enumerate(shape)]))


def _argmax(x: Value, axis: int | None, keepdim: bool) -> Value:
    return _position(red.argmax, x, axis, keepdim)


def _argmin(x: Value, axis: int | None, keepdim: bool) -> Value:
    return _position(red.argmin, x, axis, keepdim)


def pick_along(x: Value, position: Value, axis: int) -> Value:
    """x at one position along `axis` for each of its other places: position has x's shape without `axis`."""
    others = [a for a in range(x.type.rank) if a != axis]
    indices = [nd.iota(position.type.shape, n, i64) for n in range(len(others))]
    return indexing.gather(x, *indices, position, axes=(*others, axis))


def _with_position(op: Any, x: Value, axis: int, keepdim: bool) -> tuple[Value, Value]:
    if not x.type.shape:
        return x, nd.constant_of(0, i64)
    position = op(_orderable(x), axes=(axis,))
    shape = x.type.shape
    values = pick_along(x, position, axis)
    return _finish(values, shape, (axis,), keepdim), _finish(position, shape, (axis,), keepdim)


def _max_along(x: Value, axis: int, keepdim: bool) -> tuple[Value, Value]:
    return _with_position(red.argmax, x, axis, keepdim)


def _min_along(x: Value, axis: int, keepdim: bool) -> tuple[Value, Value]:
    return _with_position(red.argmin, x, axis, keepdim)


def amax(input: Any, dim: Any = (), keepdim: bool = False) -> Any:
    """The greatest element; NaN wins. Equal ones share the gradient."""
    return apply(_amax, (input,), (some_axes("amax", dim, type_of(input).rank), bool(keepdim)))


def amin(input: Any, dim: Any = (), keepdim: bool = False) -> Any:
    """The least element; NaN wins. Equal ones share the gradient."""
    return apply(_amin, (input,), (some_axes("amin", dim, type_of(input).rank), bool(keepdim)))


def aminmax(input: Any, *, dim: Any = None, keepdim: bool = False) -> Any:
    """(amin, amax)."""
    return amin(input, dim, keepdim), amax(input, dim, keepdim)


def max(input: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
    """Without dim, the greatest element; with one, (values, indices) along it, the gradient going to the element picked;
    with a tensor in its place, `maximum`."""
    other = dim if is_tensor(dim) else other
    if other is not None:
        return elem.maximum(input, other)
    if dim is None:
        return amax(input)
    return ValuesIndices(*apply(_max_along, (input,), (one_axis("max", dim, type_of(input).rank), bool(keepdim))))


def min(input: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
    """Without dim, the least element; with one, (values, indices) along it, the gradient going to the element picked;
    with a tensor in its place, `minimum`."""
    other = dim if is_tensor(dim) else other
    if other is not None:
        return elem.minimum(input, other)
    if dim is None:
        return amin(input)
    return ValuesIndices(*apply(_min_along, (input,), (one_axis("min", dim, type_of(input).rank), bool(keepdim))))


def argmax(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The position of the greatest element (the first NaN, else the first of equals); without dim, in row-major order."""
    axis = None if dim is None else one_axis("argmax", dim, type_of(input).rank)
    return apply(_argmax, (input,), (axis, bool(keepdim)))


def argmin(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The position of the least element (the first NaN, else the first of equals); without dim, in row-major order."""
    axis = None if dim is None else one_axis("argmin", dim, type_of(input).rank)
    return apply(_argmin, (input,), (axis, bool(keepdim)))


# ------------------------------------------------------------------------------------------------------------- logic
def _any(x: Value, axes: Axes, keepdim: bool) -> Value:
    out = red.any(truth(x), axes=axes) if axes else truth(x)
    return _finish(out, x.type.shape, axes, keepdim)


def _all(x: Value, axes: Axes, keepdim: bool) -> Value:
    out = red.all(truth(x), axes=axes) if axes else truth(x)
    return _finish(out, x.type.shape, axes, keepdim)


def any(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Whether any element is nonzero."""
    return apply(_any, (input,), (some_axes("any", dim, type_of(input).rank), bool(keepdim)))


def all(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Whether all elements are nonzero."""
    return apply(_all, (input,), (some_axes("all", dim, type_of(input).rank), bool(keepdim)))


# ------------------------------------------------------------------------------------------- softmax and cumulative
def softmax_of(x: Value, axis: int) -> Value:
    """softmax of an f32 or f64 value. The shift by the maximum cancels, so no derivative passes through it."""
    axes = (axis,) if x.type.shape else ()
    e = ew.exp(x - ew.stop_gradient(max_kept(x, axes)))
    return e / sum_kept(e, axes)


def log_softmax_of(x: Value, axis: int) -> Value:
    """log(softmax), without the overflow and loss of that form."""
    axes = (axis,) if x.type.shape else ()
    shifted = x - ew.stop_gradient(max_kept(x, axes))
    return shifted - ew.log(sum_kept(ew.exp(shifted), axes))


def logsumexp_kept(x: Value, axes: Axes) -> Value:
    top = ew.stop_gradient(max_kept(x, axes))
    top = ew.where(ew.is_finite(top), top, nd.zeros_like(top))
    return ew.log(sum_kept(ew.exp(x - top), axes)) + top


def _softmax(x: Value, axis: int, dtype: DType | None) -> Value:
    x = x if dtype is None else nd.cast_to(x, dtype)
    return nd.cast_to(softmax_of(wide(x), axis), float_dtype(x))


def _log_softmax(x: Value, axis: int, dtype: DType | None) -> Value:
    x = x if dtype is None else nd.cast_to(x, dtype)
    return nd.cast_to(log_softmax_of(wide(x), axis), float_dtype(x))


def _logsumexp(x: Value, axes: Axes, keepdim: bool) -> Value:
    return _dropped(logsumexp_kept(wide(x), axes), x.type.shape, axes, keepdim, float_dtype(x))


def softmax(input: Any, dim: int = -1, dtype: Any = None) -> Any:
    """exp(input) / sum(exp(input)) along `dim`."""
    return apply(_softmax, (input,), (one_axis("softmax", dim, type_of(input).rank), maybe_dtype(dtype)))


def softmin(input: Any, dim: int = -1, dtype: Any = None) -> Any:
    """softmax(-input)."""
    return softmax(-input, dim, dtype)


def log_softmax(input: Any, dim: int = -1, dtype: Any = None) -> Any:
    """log(softmax(input)) along `dim`."""
    return apply(_log_softmax, (input,), (one_axis("log_softmax", dim, type_of(input).rank), maybe_dtype(dtype)))


def logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Any:
    """log(sum(exp(input))) along the dims."""
    return apply(_logsumexp, (input,), (some_axes("logsumexp", dim, type_of(input).rank), bool(keepdim)))
