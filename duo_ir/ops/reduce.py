"""Reductions. Reduced axes are dropped from the shape; `broadcasting.py` has forms that keep them.

The order of every sum and product is fixed by the numerics contract and written out in `reference.py`.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from duo_ir.core import Op, Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.opdef import OpDef, Reduction, compute_dtype
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import reference, shape
from duo_ir.ops.checks import check_axes
from duo_ir.types import Shape, TensorType, bool_, i64, product

Ints: TypeAlias = tuple[int, ...]


def _dropped(dims: Shape, axes: Ints) -> Shape:
    return tuple([d for a, d in enumerate(dims) if a not in axes])


def _number(x: TensorType) -> None:
    if x.dtype.kind == "b":
        raise DTypeError("it takes numbers, not bool; cast it to an integer (to count), or use any or all")


def _arithmetic_type(x: TensorType, *, axes: Ints) -> TensorType:
    _number(x)
    check_axes(axes, x.rank)
    return x.with_shape(_dropped(x.shape, axes))


def _not_empty(x: TensorType, axes: Ints) -> None:
    for a in axes:
        if x.shape[a] == 0:
            raise ShapeError(
                f"axis {a} has no elements, so there is nothing to choose from; pad or concat a value first"
            )


def _extremum_type(x: TensorType, *, axes: Ints) -> TensorType:
    out = _arithmetic_type(x, axes=axes)
    _not_empty(x, axes)
    return out


def _position_type(x: TensorType, *, axes: Ints) -> TensorType:
    _number(x)
    check_axes(axes, x.rank)
    if len(axes) != 1:
        raise ArgumentError(f"it takes one axis, not {axes}; reshape to search several at once")
    _not_empty(x, axes)
    return TensorType(i64, _dropped(x.shape, axes))


def _logical_type(x: TensorType, *, axes: Ints) -> TensorType:
    if x.dtype is not bool_:
        raise DTypeError(f"it takes bool, not {x.dtype.name}; compare with zero first")
    check_axes(axes, x.rank)
    return x.with_shape(_dropped(x.shape, axes))


def _of_one(op: Op) -> Sequence[Value] | None:
    """A reduction of one element is that element. Not for sums of floats, which make +0.0 of -0.0."""
    x = op.operands[0]
    if builtins.any(x.type.shape[a] != 1 for a in op.attrs["axes"]) or (op.definition is sum and x.type.dtype.is_float):
        return None
    return (nd.reshape(x, op.result.type.shape),)


def _reduction(name: str, infer: Callable[..., TensorType], ref: Callable[..., Any], **rules: Any) -> OpDef:
    return OpDef(name, infer, Reduction(name), reference=ref, canonicalize=_of_one, **rules)


def _spread(op: Op, v: Value) -> Value:
    """A value of the result's shape, repeated along the reduced axes to the operand's shape."""
    return nd.expand(v, op.operands[0].type.shape, op.attrs["axes"])


# ----------------------------------------------------------------------------------------------------- sum and prod
def _exclusive_products(x: Value) -> Value:
    """[..., n] -> the product of all *other* elements along the last axis.

    By products alone (no division), so it is right with zeros and so are its derivatives. With a known n: products of all before times
    all after, each by doubling in log2(n) steps; else a masked [..., n, n] product.
    """
    *kept, n = x.type.shape
    if not isinstance(n, int):
        square = (*kept, n, n)
        diagonal = nd.broadcast_to(ew.eq(nd.iota((n, n), 0, i64), nd.iota((n, n), 1, i64)), square)
        others = nd.broadcast_to(nd.expand_dims(x, len(kept)), square)
        return prod(ew.where(diagonal, nd.ones_like(others), others), axes=(len(square) - 1,))

    def before(v: Value) -> Value:
        v = _shifted(v, 1)
        step = 1
        while step < n:
            v = v * _shifted(v, step)
            step *= 2
        return v

    last = (len(kept),)
    return before(x) * shape.flip(before(shape.flip(x, axes=last)), axes=last)


def _shifted(v: Value, by: int) -> Value:
    """Moved `by` places along the last axis, ones coming in."""
    axis = v.type.rank - 1
    rest = nd.slice_axis(v, axis, 0, v.type.shape[axis] - by)
    fill = nd.constant_of(1, v.type.dtype)
    none = (0,) * axis
    return shape.pad(rest, fill, low=(*none, by), high=(*none, 0), interior=(*none, 0))


def _others(op: Op) -> Value:
    """For each element of the operand, the product of the others that it is reduced with."""
    x, axes = op.operands[0], op.attrs["axes"]
    if x.type.size == 0:
        return x
    order = (*[a for a in range(x.type.rank) if a not in axes], *axes)
    moved = nd.transpose(x, order)
    flat = nd.reshape(moved, (*op.result.type.shape, product([x.type.shape[a] for a in axes])))
    back = nd.reshape(_exclusive_products(flat), moved.type.shape)
    return nd.transpose(back, shape.inverse_permutation(order))


sum = _reduction(
    "sum", _arithmetic_type, reference.sum_, vjp=lambda op, g: (_spread(op, g),), linear=(0,),
    doc="In the contract's order; f16 and bf16 accumulate in f32; nothing to add gives +0.0.",
)  # fmt: skip
prod = _reduction(
    "prod", _arithmetic_type, reference.prod,
    vjp=lambda op, g: (_spread(op, g) * _others(op),),
    jvp=lambda op, t: sum(t[0] * _others(op), axes=op.attrs["axes"]),
    doc="As sum, from 1.",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- extrema
def _winners(op: Op) -> tuple[Value, Value]:
    """Where the operand equals the extremum, and how many such there are, in the dtype that gradients are shared out in: f16 cannot
    count far."""
    x = op.operands[0]
    mask = ew.eq(x, _spread(op, op.result))
    return mask, sum(nd.cast_to(mask, compute_dtype(x.type.dtype)), axes=op.attrs["axes"])


def _shared(v: Value, count: Value) -> Value:
    """v / count in v's dtype."""
    return nd.cast_to(nd.cast_to(v, count.type.dtype) / count, v.type.dtype)


def _extremum_vjp(op: Op, g: Value) -> tuple[Value]:
    mask, count = _winners(op)
    share = _spread(op, _shared(g, count))
    return (ew.where(mask, share, nd.zeros_like(share)),)


def _extremum_jvp(op: Op, tangents: Sequence[Value | None]) -> Value:
    mask, count = _winners(op)
    t = tangents[0]
    assert t is not None
    return _shared(sum(ew.where(mask, t, nd.zeros_like(t)), axes=op.attrs["axes"]), count)


max = _reduction(
    "max", _extremum_type, reference.max_, vjp=_extremum_vjp, jvp=_extremum_jvp,
    doc="IEEE 754-2019 maximum: NaN wins, -0 < +0. The gradient is shared evenly among equals.",
)  # fmt: skip
min = _reduction(
    "min", _extremum_type, reference.min_, vjp=_extremum_vjp, jvp=_extremum_jvp,
    doc="IEEE 754-2019 minimum: NaN wins, -0 < +0. The gradient is shared evenly among equals.",
)  # fmt: skip
any = _reduction("any", _logical_type, reference.any_, doc="Whether any is true; of nothing: false.")
all = _reduction("all", _logical_type, reference.all_, doc="Whether all are true; of nothing: true.")
argmax = OpDef(
    "argmax",
    _position_type,
    Reduction("argmax"),
    reference=reference.argmax,
    doc="The first NaN, else the lowest index of the greatest.",
)
argmin = OpDef(
    "argmin",
    _position_type,
    Reduction("argmin"),
    reference=reference.argmin,
    doc="The first NaN, else the lowest index of the least.",
)
