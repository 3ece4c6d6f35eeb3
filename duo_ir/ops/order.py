"""Sorting: one op, of which argsort, topk, medians and quantiles are parts.

The order is total up to ties, and ties keep their places (a stable sort), so the result is one whatever the algorithm. NaN counts as
greater than every number and equal to every NaN, as NumPy and PyTorch have it; -0.0 and +0.0 are equal; False is less than True.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duo_ir.core import Op, Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.opdef import OpDef, Sort
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import indexing
from duo_ir.ops.checks import check_axes, check_dims, never_negative
from duo_ir.ops.reference import widen
from duo_ir.types import DimLike, TensorType, i64

Array = np.ndarray
MOST = 1 << 32  # elements of a row: backends keep a position in 32 bits beside a key


def _sort_type(x: TensorType, *, axis: int, descending: bool, count: DimLike) -> tuple[TensorType, TensorType]:
    check_axes((axis,), x.rank, "axis")
    if not isinstance(descending, bool):
        raise ArgumentError(f"descending is True or False, not {descending!r}")
    check_dims("count", (count,))
    size = x.shape[axis]
    if isinstance(size, int) and size > MOST:
        raise ShapeError(f"axis {axis} has {size} elements; positions are told apart up to {MOST}")
    if not never_negative(count) or not never_negative(size - count):
        raise ShapeError(f"count, {count}, is not within 0..{size}, the elements along axis {axis}")
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    return x.with_shape(shape), TensorType(i64, shape)


def ranks(x: Array, descending: bool) -> Array:
    """Integers in the order of x's elements: equal for equal ones, all NaN equal."""
    wide = widen(x)
    rank = np.unique(wide, return_inverse=True)[1].reshape(x.shape)
    return -rank if descending else rank


def _sort_reference(x: Array, *, axis: int, descending: bool, count: int) -> tuple[Array, Array]:
    order = np.argsort(ranks(x, descending), axis=axis, kind="stable").astype(np.int64)
    positions = np.take(order, np.arange(count), axis)
    return np.take_along_axis(x, positions, axis), positions


def along(positions: Value, axis: int) -> list[Value]:
    """Index operands, one for each axis, that name element `positions` along `axis` of the row that each of them lies in."""
    shape = positions.type.shape
    return [positions if a == axis else nd.iota(shape, a, i64) for a in range(len(shape))]


def take(x: Value, positions: Value, axis: int) -> Value:
    """x's elements at `positions` along an axis, row by row."""
    out: Value = indexing.gather(x, *along(positions, axis), axes=tuple(range(x.type.rank)))
    return out


def put_back(g: Value, positions: Value, like: Value, axis: int) -> Value:
    """The transpose of `take`: zeros like `like`, each of g added where it was taken."""
    places = along(positions, axis)
    out: Value = indexing.scatter(nd.zeros_like(like), g, *places, axes=tuple(range(like.type.rank)), mode="add")
    return out


def _sort_vjp(op: Op, g: Value, _: Value) -> tuple[Value]:
    return (put_back(g, op.results[1], op.operands[0], op.attrs["axis"]),)


def _sort_jvp(op: Op, tangents: Sequence[Value | None]) -> tuple[Value, None]:
    (t,) = tangents
    assert t is not None
    return take(t, op.results[1], op.attrs["axis"]), None


sort = OpDef(
    "sort", _sort_type, Sort(), reference=_sort_reference, vjp=_sort_vjp, jvp=_sort_jvp,
    doc="sort(x; axis, descending, count): (values, positions i64) of the first `count` elements in stable order along the axis. NaN is the"
    " greatest; zeros of either sign are equal.",
)  # fmt: skip
