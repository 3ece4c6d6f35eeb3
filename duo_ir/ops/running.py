"""Running folds along an axis, strictly in ascending order: cumulative sums, products, extrema, log-sum-exp, and linear recurrences.

Each is a step on scalars (`Cumulative`), lowered once per backend. Derivatives of the products and of log-sum-exp are linear recurrences
again, so no division by an element takes place and zeros are as good as any number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duo_ir.core import Op, Value
from duo_ir.errors import DTypeError
from duo_ir.opdef import Cumulative, OpDef, same_type
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import order, shape
from duo_ir.ops.checks import check_axes
from duo_ir.scalar import math
from duo_ir.scalar.common import INT_LIMITS
from duo_ir.types import DType, TensorType, i64

_INF = float("inf")


def _number_type(x: TensorType, *, axis: int) -> TensorType:
    if x.dtype.kind == "b":
        raise DTypeError("it takes numbers, not bool; cast it to an integer first")
    check_axes((axis,), x.rank, "axis")
    return x


def _float_type(x: TensorType, *, axis: int) -> TensorType:
    if not x.dtype.is_float:
        raise DTypeError(f"it takes floats, not {x.dtype.name}; cast it")
    return _number_type(x, axis=axis)


def _extremum_type(x: TensorType, *, axis: int) -> tuple[TensorType, TensorType]:
    return _number_type(x, axis=axis), x.with_dtype(i64)


def _recurrence_type(a: TensorType, b: TensorType, *, axis: int) -> TensorType:
    return _number_type(same_type("linear_scan", a, b), axis=axis)


# ----------------------------------------------------------------------------------------------------------- helpers
def reverse(x: Value, axis: int) -> Value:
    return shape.flip(x, axes=(axis,))


def shifted(x: Value, axis: int, fill: float | int, by: int = 1) -> Value:
    """x moved one place along the axis, ahead (`by` = 1: element i is x[i - 1]) or back (-1), `fill` coming in."""
    n = x.type.shape[axis]
    if n == 0:
        return x
    rest = nd.slice_axis(x, axis, 0, n - 1) if by == 1 else nd.slice_axis(x, axis, 1, n)
    zero = [0] * x.type.rank
    side = [int(a == axis) for a in range(x.type.rank)]
    low, high = (side, zero) if by == 1 else (zero, side)
    return shape.pad(rest, nd.constant_of(fill, x.type.dtype), low=tuple(low), high=tuple(high), interior=tuple(zero))


def linear_scan_back(a: Value, b: Value, axis: int) -> Value:
    """h[i] = a[i] * h[i + 1] + b[i], from the end."""
    return reverse(linear_scan(reverse(a, axis), reverse(b, axis), axis=axis), axis)


# ----------------------------------------------------------------------------------------------------- sums, recurrences
def _cumsum_vjp(op: Op, g: Value) -> tuple[Value]:
    axis = op.attrs["axis"]
    return (reverse(cumsum(reverse(g, axis), axis=axis), axis),)


def _recurrence_vjp(op: Op, g: Value) -> tuple[Value, Value]:
    axis, a, h = op.attrs["axis"], op.operands[0], op.result
    later = linear_scan_back(shifted(a, axis, 0, -1), g, axis)
    return later * shifted(h, axis, 0), later


def _recurrence_jvp(op: Op, tangents: Sequence[Value | None]) -> Value:
    axis, a = op.attrs["axis"], op.operands[0]
    moved_a, moved_b = tangents
    total = nd.zeros_like(a) if moved_b is None else moved_b
    if moved_a is not None:
        total = total + moved_a * shifted(op.result, axis, 0)
    out: Value = linear_scan(a, total, axis=axis)
    return out


cumsum = OpDef(
    "cumsum", _number_type, Cumulative(lambda d: ((d, 0),), lambda s, state, x, i: (s.add(state[0], x[0]),)), vjp=_cumsum_vjp, linear=(0,),
    doc="Sums of all elements up to each, added one after another from +0.0.",
)  # fmt: skip
linear_scan = OpDef(
    "linear_scan", _recurrence_type,
    Cumulative(lambda d: ((d, 0),), lambda s, state, x, i: (s.add(s.mul(x[0], state[0]), x[1]),)),
    vjp=_recurrence_vjp, jvp=_recurrence_jvp,
    doc="linear_scan(a, b): h[i] = a[i] * h[i - 1] + b[i] along the axis, from h = 0; multiply and add round separately.",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- products
def _cumprod_vjp(op: Op, g: Value) -> tuple[Value]:
    """Of element i: the product before it, times what depends on it without it, s[i] = g[i] + x[i + 1] * s[i + 1]."""
    axis, x = op.attrs["axis"], op.operands[0]
    return (shifted(op.result, axis, 1) * linear_scan_back(shifted(x, axis, 0, -1), g, axis),)


def _cumprod_jvp(op: Op, tangents: Sequence[Value | None]) -> Value:
    axis, x = op.attrs["axis"], op.operands[0]
    (t,) = tangents
    assert t is not None
    out: Value = linear_scan(x, shifted(op.result, axis, 1) * t, axis=axis)
    return out


cumprod = OpDef(
    "cumprod", _number_type, Cumulative(lambda d: ((d, 1),), lambda s, state, x, i: (s.mul(state[0], x[0]),)),
    vjp=_cumprod_vjp, jvp=_cumprod_jvp, doc="As cumsum, products from 1.",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- extrema
def _lowest(d: DType) -> tuple[tuple[DType, float | int], ...]:
    return (d, -_INF if d.is_float else INT_LIMITS[d][0]), (i64, 0)


def _highest(d: DType) -> tuple[tuple[DType, float | int], ...]:
    return (d, _INF if d.is_float else INT_LIMITS[d][1]), (i64, 0)


def _extremum_step(wins: str) -> Any:
    def step(s: Any, state: Any, x: Any, i: Any) -> tuple[Any, Any]:
        so_far, where = state
        take = getattr(s, wins)(x[0], so_far)  # not where one is NaN
        if s.dtype_of(so_far).is_float:
            take = s.or_(s.ne(x[0], x[0]), take)
        return s.select(take, x[0], so_far), s.select(take, i, where)

    return step


def _extremum_vjp(op: Op, g: Value, _: Value) -> tuple[Value]:
    return (order.put_back(g, op.results[1], op.operands[0], op.attrs["axis"]),)


def _extremum_jvp(op: Op, tangents: Sequence[Value | None]) -> tuple[Value, None]:
    (t,) = tangents
    assert t is not None
    return order.take(t, op.results[1], op.attrs["axis"]), None


_EXTREMUM = "(values, positions i64): the {} element up to each, the last of equals; from the first NaN on, the latest NaN."
cummax = OpDef(
    "cummax", _extremum_type, Cumulative(_lowest, _extremum_step("ge")), vjp=_extremum_vjp, jvp=_extremum_jvp,
    doc=_EXTREMUM.format("greatest"),
)  # fmt: skip
cummin = OpDef(
    "cummin", _extremum_type, Cumulative(_highest, _extremum_step("le")), vjp=_extremum_vjp, jvp=_extremum_jvp,
    doc=_EXTREMUM.format("least"),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- log-sum-exp
def _add_in_logs(s: Any, state: Any, x: Any, i: Any) -> tuple[Any]:
    """log(exp(a) + exp(b)) = max + log1p(exp(min - max)); where both are the same infinity, that."""
    a, b = state[0], x[0]
    first = s.ge(a, b)
    high, low = s.select(first, a, b), s.select(first, b, a)
    total = s.add(high, math.log1p(s, math.exp(s, s.sub(low, high))))
    total = s.select(s.eq(a, b), s.add(high, s.const(0.6931471805599453, s.dtype_of(a))), total)
    return (s.select(s.or_(s.ne(a, a), s.ne(b, b)), s.add(a, b), total),)


def _decay(y: Value, later: Value) -> Value:
    """exp(y - later), of which later is not less; 0 where both are -inf."""
    gone = ew.eq(y, nd.constant_like(y, -_INF))
    return ew.where(gone, nd.zeros_like(y), ew.exp(y - later))


def _logcumsumexp_vjp(op: Op, g: Value) -> tuple[Value]:
    """exp(x[i] - y[i]) * u[i] with u[i] = g[i] + exp(y[i] - y[i + 1]) * u[i + 1]: no factor exceeds 1."""
    axis, x, y = op.attrs["axis"], op.operands[0], op.result
    passed = linear_scan_back(_decay(y, shifted(y, axis, _INF, -1)), g, axis)
    return (_decay(x, y) * passed,)


def _logcumsumexp_jvp(op: Op, tangents: Sequence[Value | None]) -> Value:
    axis, x, y = op.attrs["axis"], op.operands[0], op.result
    (t,) = tangents
    assert t is not None
    out: Value = linear_scan(_decay(shifted(y, axis, -_INF), y), _decay(x, y) * t, axis=axis)
    return out


logcumsumexp = OpDef(
    "logcumsumexp", _float_type, Cumulative(lambda d: ((d, -_INF),), _add_in_logs), vjp=_logcumsumexp_vjp, jvp=_logcumsumexp_jvp,
    doc="log of the sum of exponentials of all elements up to each: max + log1p(exp(min - max)), one element after another.",
)  # fmt: skip
