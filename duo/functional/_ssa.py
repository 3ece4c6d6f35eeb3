"""Small steps that the bodies in this package share. All work on SSA values inside a Builder."""

from __future__ import annotations

from typing import Any

from duo_ir.core import Value
from duo_ir.errors import DTypeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import generate
from duo_ir.ops import reduce as red
from duo_ir.types import DimLike, DType, Shape, bool_, broadcast_shapes, f32, i64, product, promote, promote_scalar

Axes = tuple[int, ...]


def align(*xs: Any) -> tuple[Value, ...]:
    """Values and Python numbers with one dtype (promoted; numbers are weak) and one shape (broadcast)."""
    dtype: DType | None = None
    for x in xs:
        if x.__class__ is Value:
            dtype = x.type.dtype if dtype is None else promote(dtype, x.type.dtype)
    if dtype is None:
        raise DTypeError("at least one operand must be a tensor")
    for x in xs:
        if x.__class__ is not Value:
            dtype = promote_scalar(dtype, type(x))
    return stretch(*[typed(x, dtype) for x in xs])


def typed(x: Any, dtype: DType) -> Value:
    """A Value or a Python number, as `dtype`."""
    if x.__class__ is Value:
        return nd.cast_to(x, dtype)
    if dtype is bool_:
        return nd.constant_of(bool(x), bool_)
    return nd.constant_of(x, dtype)


def stretch(*xs: Value) -> tuple[Value, ...]:
    """Values broadcast to one shape, dtypes as they are."""
    shape = broadcast_shapes(*[x.type.shape for x in xs])
    return tuple([nd.broadcast_to(x, shape) for x in xs])


def floating(x: Value) -> Value:
    """x as f32 unless it is a float already."""
    return x if x.type.dtype.is_float else nd.cast_to(x, f32)


def wide(x: Value) -> Value:
    """x as f32 if it is f16, bf16 or no float: composites compute in f32 and round once at their end."""
    d = x.type.dtype
    return x if d.is_float and not d.is_narrow_float else nd.cast_to(x, f32)


def float_dtype(x: Value) -> DType:
    return x.type.dtype if x.type.dtype.is_float else f32


def truth(x: Value) -> Value:
    """x as bool: not equal to zero."""
    return x if x.type.dtype is bool_ else nd.cast_to(x, bool_)


def elements(shape: Shape, axes: Axes) -> DimLike:
    """Number of elements along `axes`."""
    return product(shape[a] for a in axes)


def kept(x: Value, shape: Shape, axes: Axes) -> Value:
    """A reduction of something of `shape` over `axes`, with those axes back as size 1."""
    return nd.reshape(x, tuple([1 if a in axes else d for a, d in enumerate(shape)]))


def sum_(x: Value, axes: Axes) -> Value:
    return red.sum(x, axes=axes) if axes else x


def sum_kept(x: Value, axes: Axes) -> Value:
    return kept(sum_(x, axes), x.type.shape, axes)


def mean_(x: Value, axes: Axes) -> Value:
    """sum / n, in x's dtype: widen first for f16 and bf16."""
    return sum_(x, axes) / nd.size_of(elements(x.type.shape, axes), x.type.dtype)


def mean_kept(x: Value, axes: Axes) -> Value:
    return kept(mean_(x, axes), x.type.shape, axes)


def max_kept(x: Value, axes: Axes) -> Value:
    return kept(red.max(x, axes=axes), x.type.shape, axes) if axes else x


def positions(shape: Shape, axis: int, dtype: DType = i64) -> Value:
    """Each element its position along `axis`."""
    return generate.iota(shape=shape, axis=axis, dtype=dtype)


def along(n: DimLike, axis: int, rank: int) -> Value:
    """0..n-1 along `axis` of a tensor whose other axes have size 1."""
    return positions((*([1] * axis), n, *([1] * (rank - axis - 1))), axis)


def insert_axis(x: Value, axis: int) -> Value:
    shape = x.type.shape
    return nd.reshape(x, (*shape[:axis], 1, *shape[axis:]))


def move_axes(x: Value, sources: Axes, targets: Axes) -> Value:
    """x with axes `sources` at positions `targets`, the others in order."""
    rank = x.type.rank
    order: list[int] = [-1] * rank
    for s, t in zip(sources, targets):
        order[t] = s
    rest = iter([a for a in range(rank) if a not in sources])
    return nd.transpose(x, tuple([next(rest) if a < 0 else a for a in order]))


def safe_sqrt(x: Value) -> Value:
    """sqrt, whose derivative at 0 is taken as 0 (a subgradient) rather than infinity."""
    x, zero, one = align(x, 0.0, 1.0)
    flat = ew.eq(x, zero)
    return ew.where(flat, zero, ew.sqrt(ew.where(flat, one, x)))
