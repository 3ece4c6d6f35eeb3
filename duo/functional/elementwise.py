"""Arithmetic, comparison, logic, rounding and selection, element by element, with broadcasting and type promotion.

Each public function has PyTorch's name, arguments and meaning. Integers and bools become float32 where a function has no integer
result (exp, true division...). The mathematical functions of one argument are in `unary.py`.
"""

from __future__ import annotations

import builtins
import math
from typing import Any

import ml_dtypes

from duo.dispatch import apply
from duo.functional._args import choice, is_tensor, type_of
from duo.functional._ssa import align, floating, stretch, truth, typed
from duo.symbolic import Number
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import reduce as red
from duo_ir.types import DType, bool_, i64
from duo_ir.types import dtype as dtype_of


def _numbers(*xs: Any) -> tuple[Value, ...]:
    """Aligned operands, bools as int64 (which is what they count as)."""
    out = align(*xs)
    return tuple([nd.cast_to(x, i64) for x in out]) if out[0].type.dtype is bool_ else out


def _floats(*xs: Any) -> tuple[Value, ...]:
    return tuple([floating(x) for x in align(*xs)])


# -------------------------------------------------------------------------------------------------------- arithmetic
def _add(x: Any, y: Any) -> Value:
    x, y = align(x, y)
    return ew.or_(x, y) if x.type.dtype is bool_ else ew.add(x, y)


def _sub(x: Any, y: Any) -> Value:
    return ew.sub(*_numbers(x, y))


def _mul(x: Any, y: Any) -> Value:
    x, y = align(x, y)
    return ew.and_(x, y) if x.type.dtype is bool_ else ew.mul(x, y)


def _add_scaled(x: Any, y: Any, alpha: Any) -> Value:
    return _add(x, _mul(y, alpha))


def _sub_scaled(x: Any, y: Any, alpha: Any) -> Value:
    return _sub(x, _mul(y, alpha))


def _div(x: Any, y: Any) -> Value:
    return ew.div(*_floats(x, y))


def _floor_divide(x: Any, y: Any) -> Value:
    return ew.floor_divide(*_numbers(x, y))


def _trunc_divide(x: Any, y: Any) -> Value:
    x, y = _numbers(x, y)
    if x.type.dtype.is_float:
        return ew.trunc(ew.div(x, y))
    quotient = ew.floor_divide(x, y)
    zero = nd.zeros_like(x)
    inexact = ew.and_(ew.ne(y, zero), ew.ne(ew.mul(quotient, y), x))
    below = ew.and_(inexact, ew.xor(ew.lt(x, zero), ew.lt(y, zero)))
    return ew.where(below, ew.add(quotient, nd.ones_like(x)), quotient)


def _remainder(x: Any, y: Any) -> Value:
    return ew.remainder(*_numbers(x, y))


def _fmod(x: Any, y: Any) -> Value:
    x, y = _numbers(x, y)
    if x.type.dtype.is_float:
        rest = ew.remainder(ew.abs(x), ew.abs(y))
        return ew.where(ew.lt(x, nd.zeros_like(x)), ew.neg(rest), rest)
    return ew.sub(x, ew.mul(_trunc_divide(x, y), y))


def add(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """input + alpha * other; of bools, or."""
    if alpha.__class__ is int and alpha == 1:
        return apply(_add, (input, other))
    return apply(_add_scaled, (input, other, alpha))


def sub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """input - alpha * other."""
    if alpha.__class__ is int and alpha == 1:
        return apply(_sub, (input, other))
    return apply(_sub_scaled, (input, other, alpha))


def mul(input: Any, other: Any) -> Any:
    """input * other; of bools, and."""
    return apply(_mul, (input, other))


def div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """input / other, rounded not at all (None), towards zero ('trunc') or down ('floor'). An integer over 0 is 0 when rounded."""
    if rounding_mode is None:
        return apply(_div, (input, other))
    choice("div", "rounding_mode", rounding_mode, (None, "trunc", "floor"))
    return apply(_trunc_divide if rounding_mode == "trunc" else _floor_divide, (input, other))


def true_divide(input: Any, other: Any) -> Any:
    """input / other."""
    return apply(_div, (input, other))


def floor_divide(input: Any, other: Any) -> Any:
    """The largest integer not above input / other, in the promoted dtype."""
    return apply(_floor_divide, (input, other))


def remainder(input: Any, other: Any) -> Any:
    """input - other * floor(input / other): it has the sign of `other`."""
    return apply(_remainder, (input, other))


def fmod(input: Any, other: Any) -> Any:
    """input - other * trunc(input / other): it has the sign of `input`."""
    return apply(_fmod, (input, other))


subtract, multiply, divide = sub, mul, div


def _addcmul(x: Any, a: Any, b: Any, value: Any) -> Value:
    return _add(x, _mul(_mul(value, a), b))


def _addcdiv(x: Any, a: Any, b: Any, value: Any) -> Value:
    return _add(x, _div(_mul(value, a), b))


def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """input + value * tensor1 * tensor2."""
    return apply(_addcmul, (input, tensor1, tensor2, value))


def addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """input + value * tensor1 / tensor2."""
    return apply(_addcdiv, (input, tensor1, tensor2, value))


def _lerp(start: Value, end: Value, weight: Any) -> Value:
    s, e, w, half, one = align(start, end, weight, 0.5, 1.0)
    span = e - s
    return ew.where(ew.lt(w, half), s + w * span, e - span * (one - w))


def lerp(input: Any, end: Any, weight: Any) -> Any:
    """input + weight * (end - input), taken from the nearer end so that weights 0 and 1 give the ends themselves."""
    return apply(_lerp, (input, end, weight))


# ------------------------------------------------------------------------------------------------------------ powers
_STATIC_POWER = 64  # exponents up to here are part of the program (few, and exact by repeated squaring)


def _pow(x: Any, y: Any) -> Value:
    x, y = align(x, y)
    if not x.type.dtype.is_float:
        raise DTypeError(
            f"pow: integer tensors have no elementwise power of a tensor ({x.type}, {y.type}); cast one to a float dtype"
        )
    return ew.pow(x, y)


def _integer_pow(x: Value, n: int) -> Value:
    if x.type.dtype is bool_:
        x = nd.cast_to(x, i64)
    if n < 0 and not x.type.dtype.is_float:
        raise ArgumentError(f"pow: integers have no negative power {n}; cast {x.type} to a float dtype first")
    return nd.ones_like(x) if n == 0 else ew.integer_pow(x, n=n)


def pow(input: Any, exponent: Any) -> Any:
    """input ** exponent. An int exponent is exact repeated multiplication; a float one is a run-time value."""
    if isinstance(exponent, Number) and exponent.kind is int:  # Python's int is part of the program there
        raise ArgumentError(
            f"pow: the exponent {exponent!r} is a free size, and powers of integers are part of the program; multiply it by 1.0"
        )
    if exponent.__class__ is int and is_tensor(input):
        if -_STATIC_POWER <= exponent <= _STATIC_POWER or not type_of(input).dtype.is_float:
            return apply(_integer_pow, (input,), (exponent,))
        exponent = float(exponent)
    return apply(_pow, (input, exponent))


# ----------------------------------------------------------------------------------------------------------- extrema
def _maximum(x: Any, y: Any) -> Value:
    x, y = align(x, y)
    return ew.or_(x, y) if x.type.dtype is bool_ else ew.maximum(x, y)


def _minimum(x: Any, y: Any) -> Value:
    x, y = align(x, y)
    return ew.and_(x, y) if x.type.dtype is bool_ else ew.minimum(x, y)


def maximum(input: Any, other: Any) -> Any:
    """The greater of both; NaN where either is NaN. At equality each gets half of the gradient."""
    return apply(_maximum, (input, other))


def minimum(input: Any, other: Any) -> Any:
    """The lesser of both; NaN where either is NaN. At equality each gets half of the gradient."""
    return apply(_minimum, (input, other))


def _clamp_min(x: Value, low: Any) -> Value:
    x, low = align(x, low)
    return ew.where(ew.lt(x, low), low, x)


def _clamp_max(x: Value, high: Any) -> Value:
    x, high = align(x, high)
    return ew.where(ew.gt(x, high), high, x)


def _clamp(x: Value, low: Any, high: Any) -> Value:
    x, low, high = align(x, low, high)
    return _clamp_max(_clamp_min(x, low), high)


def clamp(input: Any, min: Any = None, max: Any = None) -> Any:
    """input, but not below `min` nor above `max` (numbers or tensors); `max` wins where they cross. NaN stays NaN, a NaN bound does
    not bind, and on a bound the gradient is 1."""
    if min is None and max is None:
        raise ArgumentError("clamp: give min, max or both")
    if max is None:
        return apply(_clamp_min, (input, min))
    if min is None:
        return apply(_clamp_max, (input, max))
    return apply(_clamp, (input, min, max))


clip = clamp


def clamp_min(input: Any, min: Any) -> Any:
    """clamp(input, min=min)."""
    return apply(_clamp_min, (input, min))


def clamp_max(input: Any, max: Any) -> Any:
    """clamp(input, max=max)."""
    return apply(_clamp_max, (input, max))


# -------------------------------------------------------------------------------------------------------- comparison
def _eq(x: Any, y: Any) -> Value:
    return ew.eq(*align(x, y))


def _ne(x: Any, y: Any) -> Value:
    return ew.ne(*align(x, y))


def _lt(x: Any, y: Any) -> Value:
    return ew.lt(*align(x, y))


def _le(x: Any, y: Any) -> Value:
    return ew.le(*align(x, y))


def _gt(x: Any, y: Any) -> Value:
    return ew.gt(*align(x, y))


def _ge(x: Any, y: Any) -> Value:
    return ew.ge(*align(x, y))


def eq(input: Any, other: Any) -> Any:
    """input == other, as bool."""
    return apply(_eq, (input, other))


def ne(input: Any, other: Any) -> Any:
    """input != other, as bool."""
    return apply(_ne, (input, other))


def lt(input: Any, other: Any) -> Any:
    """input < other, as bool."""
    return apply(_lt, (input, other))


def le(input: Any, other: Any) -> Any:
    """input <= other, as bool."""
    return apply(_le, (input, other))


def gt(input: Any, other: Any) -> Any:
    """input > other, as bool."""
    return apply(_gt, (input, other))


def ge(input: Any, other: Any) -> Any:
    """input >= other, as bool."""
    return apply(_ge, (input, other))


greater, greater_equal, less, less_equal, not_equal = gt, ge, lt, le, ne


# ---------------------------------------------------------------------------------------------------- logic and bits
def _logical_and(x: Value, y: Any) -> Value:
    return ew.and_(*[truth(v) for v in align(x, y)])


def _logical_or(x: Value, y: Any) -> Value:
    return ew.or_(*[truth(v) for v in align(x, y)])


def _logical_xor(x: Value, y: Any) -> Value:
    return ew.xor(*[truth(v) for v in align(x, y)])


def _logical_not(x: Value) -> Value:
    return ew.not_(truth(x))


def _bitwise_and(x: Any, y: Any) -> Value:
    return ew.and_(*align(x, y))


def _bitwise_or(x: Any, y: Any) -> Value:
    return ew.or_(*align(x, y))


def _bitwise_xor(x: Any, y: Any) -> Value:
    return ew.xor(*align(x, y))


def _bitwise_not(x: Value) -> Value:
    return ew.not_(x)


def _left_shift(x: Any, y: Any) -> Value:
    return ew.shift_left(*_numbers(x, y))


def _right_shift(x: Any, y: Any) -> Value:
    x, y = _numbers(x, y)
    return (ew.shift_right_logical if x.type.dtype.kind == "u" else ew.shift_right_arithmetic)(x, y)


def logical_and(input: Any, other: Any) -> Any:
    """Whether both are nonzero."""
    return apply(_logical_and, (input, other))


def logical_or(input: Any, other: Any) -> Any:
    """Whether either is nonzero."""
    return apply(_logical_or, (input, other))


def logical_xor(input: Any, other: Any) -> Any:
    """Whether exactly one is nonzero."""
    return apply(_logical_xor, (input, other))


def logical_not(input: Any) -> Any:
    """Whether it is zero."""
    return apply(_logical_not, (input,))


def bitwise_and(input: Any, other: Any) -> Any:
    """input & other, of integers or bools."""
    return apply(_bitwise_and, (input, other))


def bitwise_or(input: Any, other: Any) -> Any:
    """input | other, of integers or bools."""
    return apply(_bitwise_or, (input, other))


def bitwise_xor(input: Any, other: Any) -> Any:
    """input ^ other, of integers or bools."""
    return apply(_bitwise_xor, (input, other))


def bitwise_not(input: Any) -> Any:
    """~input, of integers or bools."""
    return apply(_bitwise_not, (input,))


def bitwise_left_shift(input: Any, other: Any) -> Any:
    """input << other; 0 where `other` is not in 0..bits-1."""
    return apply(_left_shift, (input, other))


def bitwise_right_shift(input: Any, other: Any) -> Any:
    """input >> other, with the sign for signed integers."""
    return apply(_right_shift, (input, other))


# ------------------------------------------------------------------------------------------------- kinds of number
def _isnan(x: Value) -> Value:
    return ew.ne(x, x)


def _isinf(x: Value) -> Value:
    if not x.type.dtype.is_float:
        return ew.ne(x, x)
    return ew.eq(ew.abs(x), nd.full(x.type.shape, math.inf, x.type.dtype))


def _isfinite(x: Value) -> Value:
    return ew.is_finite(x) if x.type.dtype.is_float else ew.eq(x, x)


def isnan(input: Any) -> Any:
    """Whether each element is NaN."""
    return apply(_isnan, (input,))


def isinf(input: Any) -> Any:
    """Whether each element is an infinity."""
    return apply(_isinf, (input,))


def isfinite(input: Any) -> Any:
    """Whether each element is neither NaN nor an infinity."""
    return apply(_isfinite, (input,))


def _nan_to_num(x: Value, nan: Any, high: Any, low: Any) -> Value:
    x, nan, high, low, top, bottom = align(x, nan, high, low, math.inf, -math.inf)
    x = ew.where(ew.eq(x, top), high, ew.where(ew.eq(x, bottom), low, x))
    return ew.where(ew.ne(x, x), nan, x)


def nan_to_num(input: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Any:
    """NaN and infinities replaced: by `nan` (0), `posinf` (the greatest finite number of the dtype), `neginf` (the least)."""
    t = type_of(input)
    if not t.dtype.is_float:
        return input
    greatest = float(ml_dtypes.finfo(t.dtype.numpy).max)
    high = greatest if posinf is None else float(posinf)
    low = -greatest if neginf is None else float(neginf)
    return apply(_nan_to_num, (input, float(nan or 0.0), high, low))


def _isclose(x: Value, y: Value, rtol: float, atol: float, equal_nan: bool) -> Value:
    x, y = align(x, y)
    same = ew.eq(x, y)
    if not x.type.dtype.is_float:
        x, y = floating(x), floating(y)
    near = ew.le(ew.abs(x - y), atol + ew.abs(y) * rtol)
    close = ew.or_(same, ew.and_(near, ew.is_finite(y)))
    return ew.or_(close, ew.and_(_isnan(x), _isnan(y))) if equal_nan else close


def isclose(input: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Any:
    """Whether |input - other| <= atol + rtol * |other|, or they are equal."""
    return apply(_isclose, (input, other), (float(rtol), float(atol), builtins.bool(equal_nan)))


def _all_close(x: Value, y: Value, rtol: float, atol: float, equal_nan: bool) -> Value:
    return _everywhere(_isclose(x, y, rtol, atol, equal_nan))


def _everywhere(x: Value) -> Value:
    return red.all(x, axes=tuple(range(x.type.rank))) if x.type.rank else x


def allclose(input: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    """Whether all elements are close, as a Python bool (it reads the value)."""
    return builtins.bool(apply(_all_close, (input, other), (float(rtol), float(atol), builtins.bool(equal_nan))).item())


def _all_equal(x: Value, y: Value) -> Value:
    return _everywhere(_eq(x, y))


def equal(input: Any, other: Any) -> bool:
    """Whether shapes and all elements are equal, as a Python bool (it reads the value)."""
    if type_of(input).shape != type_of(other).shape:
        return False
    return builtins.bool(apply(_all_equal, (input, other)).item())


# --------------------------------------------------------------------------------------------- selection, conversion
def _where(c: Value, x: Any, y: Any) -> Value:
    if c.type.dtype is not bool_:
        raise DTypeError(f"where: the condition is bool, not {c.type.dtype.name}; compare it, or use .bool()")
    if x.__class__ is not Value and y.__class__ is not Value:
        kinds = (type(x), type(y))
        d = dtype_of(float if float in kinds else int if int in kinds else bool)
        x, y = typed(x, d), typed(y, d)
    x, y = align(x, y)
    return ew.where(*stretch(c, x, y))


def where(condition: Any, input: Any = None, other: Any = None) -> Any:
    """input where the bool `condition`, else other; all three broadcast."""
    if input is None or other is None:
        raise ArgumentError(
            "where: give condition, input and other; the positions where a condition holds have no shape known beforehand"
            " (numpy.nonzero(condition.numpy()) finds them)"
        )
    return apply(_where, (condition, input, other))


def _masked_fill(x: Value, mask: Value, value: Any) -> Value:
    if mask.type.dtype is not bool_:
        raise DTypeError(f"masked_fill: the mask is bool, not {mask.type.dtype.name}; compare it, or use .bool()")
    d = x.type.dtype
    if value.__class__ is not Value and isinstance(value, float) and not d.is_float:
        value = int(value)
    mask, value, x = stretch(mask, typed(value, d), x)
    return ew.where(mask, value, x)


def masked_fill(input: Any, mask: Any, value: Any) -> Any:
    """input with `value` (a number or a 0-d tensor) where the bool `mask`, in input's dtype."""
    return apply(_masked_fill, (input, mask, value))


def _cast(x: Value, dtype: DType) -> Value:
    return nd.cast_to(x, dtype)


def cast(input: Any, dtype: Any) -> Any:
    """input in another dtype, rounded once; float to integer truncates and saturates, NaN gives 0."""
    d = dtype_of(dtype)
    return input if type_of(input).dtype is d else apply(_cast, (input,), (d,))


def _bitcast(x: Value, dtype: DType) -> Value:
    return ew.bitcast(x, dtype=dtype)


def bitcast(input: Any, dtype: Any) -> Any:
    """The same bits as another dtype of the same size."""
    return apply(_bitcast, (input,), (dtype_of(dtype),))


def _stop_gradient(x: Value) -> Value:
    return ew.stop_gradient(x)


def stop_gradient(input: Any) -> Any:
    """input, through which no derivative passes."""
    return apply(_stop_gradient, (input,))


def _clone(x: Value) -> Value:
    return x


def clone(input: Any) -> Any:
    """The same values in storage of their own."""
    return apply(_clone, (input,))
