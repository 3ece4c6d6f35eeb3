"""NumPy-like functions over the strict ops: broadcasting, promotion, Python scalars, and the operators of Value.

Derivative rules and composites are written with these; each emits only the strict ops it needs. A Python scalar is weak: it
takes the other operand's dtype (a float beside integers makes f32) and becomes a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.opdef import OpDef, compute_dtype
from duo_ir.ops import elementwise as ew
from duo_ir.ops import generate, linalg, reduce
from duo_ir.ops import shape as movement
from duo_ir.types import (
    DimLike,
    DType,
    Shape,
    broadcast_shapes,
    f32,
    i64,
    product,
    promote,
    promote_scalar,
)  # fmt: skip

Operand: TypeAlias = Value | float | int | bool
Axes: TypeAlias = int | Sequence[int] | None


# --------------------------------------------------------------------------------------------------------- constants
def constant_of(value: float | int | bool, dtype: DType) -> Value:
    """`value` as a 0-d constant of `dtype` (an int becomes a float there, and so on, so equal constants are equal ops)."""
    if dtype.is_float:
        value = float(value)
    elif dtype.kind == "b":
        value = bool(value)
    elif isinstance(value, float):
        raise DTypeError(f"{value!r} is not a number of {dtype.name}; convert it to int or cast the tensor")
    else:
        value = int(value)
    return generate.constant(value=value, dtype=dtype)


def full(shape: Shape, value: float | int | bool, dtype: DType) -> Value:
    return broadcast_to(constant_of(value, dtype), shape)


def constant_like(x: Value, value: float | int | bool) -> Value:
    """`value` in x's dtype and shape."""
    return full(x.type.shape, value, x.type.dtype)


def zeros_like(x: Value) -> Value:
    return constant_like(x, 0)


def ones_like(x: Value) -> Value:
    return constant_like(x, 1)


def iota(shape: Shape, axis: int, dtype: DType = i64) -> Value:
    return generate.iota(shape=shape, axis=axis, dtype=dtype)


def size_of(dims: DimLike, dtype: DType, least: int | None = None) -> Value:
    """A size as a 0-d number: a constant where it is known, else read at run time. `least`: programs are for no smaller ones."""
    if isinstance(dims, int) and (least is None or dims >= least):
        return constant_of(dims, dtype)
    return cast_to(generate.size(dim=dims) if least is None else generate.size(dim=dims, least=least), dtype)


def literal(x: Value) -> float | int | bool | None:
    """The number that every element of x is known to be, else None. Looks through broadcast and reshape."""
    op = x.op
    while op is not None and (op.definition is movement.broadcast or op.definition is movement.reshape):
        op = op.operands[0].op
    if op is None or op.definition is not generate.constant:
        return None
    value: float | int | bool = op.attrs["value"]
    return value


def as_value(x: Operand, like: Value) -> Value:
    """x itself, or a Python scalar as a 0-d constant in the dtype that it and `like` promote to."""
    if isinstance(x, Value):
        return x
    return constant_of(x, promote_scalar(like.type.dtype, type(x)))


def cast_to(x: Value, dtype: DType) -> Value:
    return x if x.type.dtype is dtype else ew.cast(x, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------ shapes
def broadcast_to(x: Value, shape: Shape) -> Value:
    return x if x.type.shape == shape else movement.broadcast(x, shape=shape)


def reshape(x: Value, shape: Shape) -> Value:
    return x if x.type.shape == shape else movement.reshape(x, shape=shape)


def transpose(x: Value, permutation: Sequence[int]) -> Value:
    order = tuple(permutation)
    return x if order == tuple(range(x.type.rank)) else movement.transpose(x, permutation=order)


def swap_last(x: Value) -> Value:
    """The last two axes exchanged."""
    n = x.type.rank
    return transpose(x, (*range(n - 2), n - 1, n - 2))


def expand_dims(x: Value, axis: int) -> Value:
    """An axis of size 1 put in at `axis` of the result (negative counts from its end)."""
    rank = x.type.rank + 1
    if not -rank <= axis < rank:
        raise ArgumentError(f"expand_dims: axis {axis} is outside the result's {rank} axes")
    axis %= rank
    return reshape(x, (*x.type.shape[:axis], 1, *x.type.shape[axis:]))


def slice_axis(x: Value, axis: int, start: DimLike, stop: DimLike, step: int = 1) -> Value:
    """x[start:stop:step] along one axis."""
    rank, dims = x.type.rank, x.type.shape
    if start == 0 and stop == dims[axis] and step == 1:
        return x
    return movement.slice(
        x,
        start=tuple(start if a == axis else 0 for a in range(rank)),
        stop=tuple(stop if a == axis else d for a, d in enumerate(dims)),
        step=tuple(step if a == axis else 1 for a in range(rank)),
    )


def expand(x: Value, shape: Shape, axes: Sequence[int]) -> Value:
    """Undoes a reduction's drop: x, of `shape` without `axes`, repeated along them."""
    return broadcast_to(reshape(x, tuple(1 if a in axes else d for a, d in enumerate(shape))), shape)


def sum_to(x: Value, shape: Shape) -> Value:
    """Undoes broadcasting of `shape` to x's shape: sums what was repeated."""
    if x.type.shape == shape:
        return x
    lead = x.type.rank - len(shape)
    if lead < 0 or broadcast_shapes(shape, x.type.shape) != x.type.shape:
        raise ShapeError(f"sum_to: {x.type} was not broadcast from shape {list(shape)}")
    stretched = [a for a in range(lead, x.type.rank) if shape[a - lead] == 1 and x.type.shape[a] != 1]
    axes = (*range(lead), *stretched)
    return reshape(reduce.sum(x, axes=axes), shape)


# ------------------------------------------------------------------------------------------------------- elementwise
def _promoted(x: Operand, y: Operand) -> tuple[Value, Value]:
    if not isinstance(x, Value):
        if not isinstance(y, Value):
            raise DTypeError(f"neither {x!r} nor {y!r} is an SSA value; compute it in Python")
        x = as_value(x, y)
    y = as_value(y, x)
    dtype = promote(x.type.dtype, y.type.dtype)
    return cast_to(x, dtype), cast_to(y, dtype)


def _aligned(*xs: Value) -> list[Value]:
    shape = broadcast_shapes(*[x.type.shape for x in xs])
    return [broadcast_to(x, shape) for x in xs]


def _binary(op: OpDef, x: Operand, y: Operand) -> Value:
    out: Value = op(*_aligned(*_promoted(x, y)))
    return out


def add(x: Operand, y: Operand) -> Value:
    return _binary(ew.add, x, y)


def sub(x: Operand, y: Operand) -> Value:
    return _binary(ew.sub, x, y)


def mul(x: Operand, y: Operand) -> Value:
    return _binary(ew.mul, x, y)


def div(x: Operand, y: Operand) -> Value:
    """True division: integers and bools divide as f32."""
    a, b = _promoted(x, y)
    dtype = a.type.dtype if a.type.dtype.is_float else f32
    out: Value = ew.div(*_aligned(cast_to(a, dtype), cast_to(b, dtype)))
    return out


def floor_divide(x: Operand, y: Operand) -> Value:
    return _binary(ew.floor_divide, x, y)


def remainder(x: Operand, y: Operand) -> Value:
    return _binary(ew.remainder, x, y)


def maximum(x: Operand, y: Operand) -> Value:
    return _binary(ew.maximum, x, y)


def minimum(x: Operand, y: Operand) -> Value:
    return _binary(ew.minimum, x, y)


def pow(x: Operand, y: Operand) -> Value:
    """x**y; a Python int as exponent makes the static integer power."""
    if isinstance(x, Value) and isinstance(y, int) and not isinstance(y, bool):
        out: Value = ew.integer_pow(x, n=y)
        return out
    a, b = _promoted(x, y)
    dtype = a.type.dtype if a.type.dtype.is_float else f32
    return ew.pow(*_aligned(cast_to(a, dtype), cast_to(b, dtype)))


def eq(x: Operand, y: Operand) -> Value:
    return _binary(ew.eq, x, y)


def ne(x: Operand, y: Operand) -> Value:
    return _binary(ew.ne, x, y)


def lt(x: Operand, y: Operand) -> Value:
    return _binary(ew.lt, x, y)


def le(x: Operand, y: Operand) -> Value:
    return _binary(ew.le, x, y)


def gt(x: Operand, y: Operand) -> Value:
    return _binary(ew.gt, x, y)


def ge(x: Operand, y: Operand) -> Value:
    return _binary(ew.ge, x, y)


def and_(x: Operand, y: Operand) -> Value:
    return _binary(ew.and_, x, y)


def or_(x: Operand, y: Operand) -> Value:
    return _binary(ew.or_, x, y)


def xor(x: Operand, y: Operand) -> Value:
    return _binary(ew.xor, x, y)


def where(c: Value, x: Operand, y: Operand) -> Value:
    """x where c, else y, all three broadcast."""
    out: Value = ew.where(*_aligned(c, *_promoted(x, y)))
    return out


# -------------------------------------------------------------------------------------------------------- reductions
def axes_of(x: Value, axes: Axes) -> tuple[int, ...]:
    """`axes` as the ops take them: sorted, counted from the front; None is all."""
    rank = x.type.rank
    if axes is None:
        return tuple(range(rank))
    listed = [axes] if isinstance(axes, int) else list(axes)
    for a in listed:
        if not -rank <= a < rank:
            raise ArgumentError(f"axis {a} is outside the {rank} axes of {x.type}")
    positive = tuple(sorted(a % rank for a in listed))
    if len(set(positive)) != len(positive):
        raise ArgumentError(f"axes {tuple(listed)} of {x.type} name an axis twice")
    return positive


def _reduced(op: OpDef, x: Value, axes: Axes, keepdims: bool) -> Value:
    over = axes_of(x, axes)
    out: Value = op(x, axes=over)
    return reshape(out, tuple(1 if a in over else d for a, d in enumerate(x.type.shape))) if keepdims else out


def sum(x: Value, axes: Axes = None, keepdims: bool = False) -> Value:
    return _reduced(reduce.sum, x, axes, keepdims)


def prod(x: Value, axes: Axes = None, keepdims: bool = False) -> Value:
    return _reduced(reduce.prod, x, axes, keepdims)


def max(x: Value, axes: Axes = None, keepdims: bool = False) -> Value:
    return _reduced(reduce.max, x, axes, keepdims)


def min(x: Value, axes: Axes = None, keepdims: bool = False) -> Value:
    return _reduced(reduce.min, x, axes, keepdims)


def any(x: Value, axes: Axes = None, keepdims: bool = False) -> Value:
    return _reduced(reduce.any, x, axes, keepdims)


def all(x: Value, axes: Axes = None, keepdims: bool = False) -> Value:
    return _reduced(reduce.all, x, axes, keepdims)


def mean(x: Value, axes: Axes = None, keepdims: bool = False) -> Value:
    """sum / n, floats only. f16 and bf16 are summed and divided in f32 (f16 could not even hold a large n) and rounded once."""
    over = axes_of(x, axes)
    total = sum(cast_to(x, compute_dtype(x.type.dtype)), over, keepdims)
    n = size_of(product([x.type.shape[a] for a in over]), total.type.dtype)
    return cast_to(ew.div(total, broadcast_to(n, total.type.shape)), x.type.dtype)


# ------------------------------------------------------------------------------------------------------------ matmul
def matmul(a: Value, b: Value) -> Value:
    """NumPy's matmul: batch axes broadcast, a 1-d operand is a row (left) or a column (right) whose axis is dropped."""
    if a.type.rank == 0 or b.type.rank == 0:
        raise ShapeError(f"matmul: operands need at least one axis, got {a.type} and {b.type}; multiply with *")
    dtype = promote(a.type.dtype, b.type.dtype)
    a, b = cast_to(a, dtype), cast_to(b, dtype)
    drop_row, drop_column = a.type.rank == 1, b.type.rank == 1
    a = expand_dims(a, 0) if drop_row else a
    b = expand_dims(b, 1) if drop_column else b
    batch = broadcast_shapes(a.type.shape[:-2], b.type.shape[:-2])
    out: Value = linalg.matmul(
        broadcast_to(a, (*batch, *a.type.shape[-2:])), broadcast_to(b, (*batch, *b.type.shape[-2:]))
    )
    row = () if drop_row else out.type.shape[-2:-1]
    column = () if drop_column else out.type.shape[-1:]
    return reshape(out, (*batch, *row, *column))


# --------------------------------------------------------------------------------------------------------- operators
def _hang_operators() -> None:
    both = {"add": add, "sub": sub, "mul": mul, "truediv": div, "floordiv": floor_divide, "mod": remainder, "pow": pow,
            "and": and_, "or": or_, "xor": xor}  # fmt: skip
    for name, function in both.items():
        setattr(Value, f"__{name}__", function)
        setattr(Value, f"__r{name}__", lambda self, other, function=function: function(other, self))
    Value.__matmul__ = matmul  # type: ignore[method-assign]
    Value.__neg__ = lambda self: ew.neg(self)  # type: ignore[method-assign]
    Value.__abs__ = lambda self: ew.abs(self)  # type: ignore[method-assign]
    Value.__invert__ = lambda self: ew.not_(self)  # type: ignore[method-assign]


_hang_operators()

__all__ = [
    "add", "all", "and_", "any", "as_value", "axes_of", "broadcast_to", "cast_to", "constant_like",
    "constant_of", "div", "eq", "expand", "expand_dims", "floor_divide", "full", "ge", "gt", "iota", "le", "literal", "lt",
    "matmul", "max", "maximum", "mean", "min", "minimum", "mul", "ne", "ones_like", "or_", "pow", "prod", "remainder", "reshape",
    "size_of", "slice_axis", "sub", "sum", "sum_to", "swap_last", "transpose", "where", "xor", "zeros_like",
]  # fmt: skip
