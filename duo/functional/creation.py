"""Tensors from attributes alone. The bodies take no operands (each frontend runs them through its own recorder); the `*_like`
functions take their shape, and unless told their dtype, from a tensor.
"""

from __future__ import annotations

import math
from typing import Any

from duo.dispatch import apply
from duo.functional._args import maybe_dtype
from duo_ir.core import Value
from duo_ir.errors import ArgumentError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import shape as movement
from duo_ir.types import Dim, DimLike, DType, Shape, bool_, f64, i64

Number = int | float | bool


def _full(shape: Shape, value: Number, dtype: DType) -> Value:
    return nd.full(shape, value, dtype)


def _fill(value: Value, shape: Shape, dtype: DType) -> Value:
    """`_full` of a run-time value."""
    return nd.broadcast_to(nd.cast_to(value, dtype), shape)


def _zeros(shape: Shape, dtype: DType) -> Value:
    return nd.full(shape, 0, dtype)


def _ones(shape: Shape, dtype: DType) -> Value:
    return nd.full(shape, 1, dtype)


def arange_size(start: Number, stop: Number, step: Number) -> int:
    """ceil((stop - start) / step), the number of elements of arange."""
    if step == 0:
        raise ArgumentError("arange: the step is 0")
    if not all(math.isfinite(v) for v in (start, stop, step)):
        raise ArgumentError(f"arange: {start}, {stop}, {step} must be finite")
    if (stop - start) * step < 0:
        raise ArgumentError(f"arange: steps of {step} do not lead from {start} to {stop}")
    if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int):
        return -((start - stop) // step)
    return math.ceil((stop - start) / step)


def _arange(start: Number, stop: Number, step: Number, dtype: DType) -> Value:
    """start + i * step: exact in int64, or in float64 rounded once to a float dtype."""
    n = arange_size(start, stop, step)
    if dtype.is_float:
        return nd.cast_to(nd.iota((n,), 0, f64) * float(step) + float(start), dtype)
    if isinstance(step, float) or isinstance(start, float):
        return nd.cast_to(nd.iota((n,), 0, f64) * float(step) + float(start), dtype)
    return nd.cast_to(nd.iota((n,), 0, i64) * int(step) + int(start), dtype)


def _arange_sized(start: DimLike, n: DimLike, dtype: DType) -> Value:
    """start, start + 1, ...: `n` numbers, known later."""
    return nd.cast_to(nd.iota((n,), 0, i64) + (nd.size_of(start, i64) if isinstance(start, Dim) else start), dtype)


def _linspace(start: Number, end: Number, steps: int, dtype: DType) -> Value:
    """Both ends exact: from the start in the first half and from the end in the second, in float64, rounded once."""
    if steps < 0:
        raise ArgumentError(f"linspace: steps must not be negative, got {steps}")
    if steps < 2:
        return nd.full((steps,), 1, dtype) * nd.cast_to(nd.constant_of(start, f64), dtype)
    step = (end - start) / (steps - 1)
    i = nd.iota((steps,), 0, f64)
    up, down = i * step + float(start), float(end) - (float(steps - 1) - i) * step
    return nd.cast_to(nd.where(nd.lt(i, float(steps // 2)), up, down), dtype)


def _linspace_sized(start: Number, end: Number, steps: DimLike, dtype: DType) -> Value:
    """`_linspace` for a number of steps that is known later."""
    one = nd.constant_of(1.0, f64)
    step = nd.constant_of(end - start, f64) / nd.maximum(nd.size_of(steps - 1, f64), one)
    i, last = nd.iota((steps,), 0, f64), nd.size_of(steps - 1, f64)
    up, down = i * step + float(start), float(end) - (last - i) * step
    half = nd.cast_to(nd.floor_divide(nd.size_of(steps, i64), nd.constant_of(2, i64)), f64)
    sampled = nd.cast_to(nd.where(nd.lt(i, half), up, down), dtype)
    return nd.where(nd.lt(nd.size_of(steps, i64), 2), nd.cast_to(nd.constant_of(start, f64), dtype), sampled)


def _numbers(*arguments: Any) -> Value:
    """0-d values side by side, or a single one as it is."""
    *values, several, dtype = arguments
    parts = [nd.cast_to(v, dtype) for v in values]
    return movement.concat(*[nd.reshape(p, (1,)) for p in parts], axis=0) if several else parts[0]


def _eye(n: DimLike, m: DimLike, dtype: DType) -> Value:
    return nd.cast_to(ew.eq(nd.iota((n, m), 0, i64), nd.iota((n, m), 1, i64)), dtype)


# ------------------------------------------------------------------------------------------------ like another tensor
def _full_like(x: Value, value: Any, dtype: DType | None) -> Value:
    dtype = dtype or x.type.dtype
    if value.__class__ is Value:
        return nd.broadcast_to(nd.cast_to(value, dtype), x.type.shape)
    return nd.full(x.type.shape, value if dtype.is_float or dtype is bool_ else int(value), dtype)


def _zeros_like(x: Value, dtype: DType | None) -> Value:
    return nd.full(x.type.shape, 0, dtype or x.type.dtype)


def _ones_like(x: Value, dtype: DType | None) -> Value:
    return nd.full(x.type.shape, 1, dtype or x.type.dtype)


def _new_full(x: Value, shape: Shape, value: Number, dtype: DType) -> Value:
    return nd.full(shape, value, dtype)


def zeros_like(input: Any, *, dtype: Any = None) -> Any:
    """Zeros in input's shape and dtype."""
    return apply(_zeros_like, (input,), (maybe_dtype(dtype),))


def ones_like(input: Any, *, dtype: Any = None) -> Any:
    """Ones in input's shape and dtype."""
    return apply(_ones_like, (input,), (maybe_dtype(dtype),))


def full_like(input: Any, fill_value: Any, *, dtype: Any = None) -> Any:
    """`fill_value` (a number or a 0-d tensor) in input's shape and dtype."""
    return apply(_full_like, (input, fill_value), (maybe_dtype(dtype),))


empty_like = zeros_like

__all__ = ["empty_like", "full_like", "ones_like", "zeros_like"]
