"""Mathematical functions of one tensor: powers, exponentials, trigonometry, rounding. Integers and bools become float32.

Accuracy and special values are those of the scalar recipes (`duo_ir/scalar/math.py`).
"""

from __future__ import annotations

import math
from typing import Any

from duo.dispatch import apply
from duo.functional._args import integer
from duo.functional._ssa import float_dtype, floating
from duo_ir.core import Value
from duo_ir.errors import DTypeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.types import bool_, f64, i64


# --------------------------------------------------------------------------------------- functions that are primitives
def _exp(x: Value) -> Value:
    return ew.exp(floating(x))


def exp(input: Any) -> Any:
    """e to the power of input."""
    return apply(_exp, (input,))


def _expm1(x: Value) -> Value:
    return ew.expm1(floating(x))


def expm1(input: Any) -> Any:
    """exp(input) - 1, exact near 0."""
    return apply(_expm1, (input,))


def _log(x: Value) -> Value:
    return ew.log(floating(x))


def log(input: Any) -> Any:
    """The natural logarithm."""
    return apply(_log, (input,))


def _log1p(x: Value) -> Value:
    return ew.log1p(floating(x))


def log1p(input: Any) -> Any:
    """log(1 + input), exact near 0."""
    return apply(_log1p, (input,))


def _sqrt(x: Value) -> Value:
    return ew.sqrt(floating(x))


def sqrt(input: Any) -> Any:
    """The square root."""
    return apply(_sqrt, (input,))


def _rsqrt(x: Value) -> Value:
    return ew.rsqrt(floating(x))


def rsqrt(input: Any) -> Any:
    """1 / sqrt(input)."""
    return apply(_rsqrt, (input,))


def _sin(x: Value) -> Value:
    return ew.sin(floating(x))


def sin(input: Any) -> Any:
    """The sine of an angle in radians."""
    return apply(_sin, (input,))


def _cos(x: Value) -> Value:
    return ew.cos(floating(x))


def cos(input: Any) -> Any:
    """The cosine of an angle in radians."""
    return apply(_cos, (input,))


def _tan(x: Value) -> Value:
    return ew.tan(floating(x))


def tan(input: Any) -> Any:
    """The tangent of an angle in radians."""
    return apply(_tan, (input,))


def _asin(x: Value) -> Value:
    return ew.asin(floating(x))


def asin(input: Any) -> Any:
    """The angle in [-pi/2, pi/2] whose sine it is."""
    return apply(_asin, (input,))


def _acos(x: Value) -> Value:
    return ew.acos(floating(x))


def acos(input: Any) -> Any:
    """The angle in [0, pi] whose cosine it is."""
    return apply(_acos, (input,))


def _atan(x: Value) -> Value:
    return ew.atan(floating(x))


def atan(input: Any) -> Any:
    """The angle in (-pi/2, pi/2) whose tangent it is."""
    return apply(_atan, (input,))


def _sinh(x: Value) -> Value:
    return ew.sinh(floating(x))


def sinh(input: Any) -> Any:
    """The hyperbolic sine."""
    return apply(_sinh, (input,))


def _cosh(x: Value) -> Value:
    return ew.cosh(floating(x))


def cosh(input: Any) -> Any:
    """The hyperbolic cosine."""
    return apply(_cosh, (input,))


def _tanh(x: Value) -> Value:
    return ew.tanh(floating(x))


def tanh(input: Any) -> Any:
    """The hyperbolic tangent."""
    return apply(_tanh, (input,))


def _sigmoid(x: Value) -> Value:
    return ew.sigmoid(floating(x))


def sigmoid(input: Any) -> Any:
    """1 / (1 + exp(-input))."""
    return apply(_sigmoid, (input,))


def _erf(x: Value) -> Value:
    return ew.erf(floating(x))


def erf(input: Any) -> Any:
    """The error function."""
    return apply(_erf, (input,))


arcsin, arccos, arctan = asin, acos, atan


# ----------------------------------------------------------------------------------------------------- compositions
def _exp2(x: Value) -> Value:
    return ew.exp(floating(x) * math.log(2.0))


def _log2(x: Value) -> Value:
    return ew.log(floating(x)) / math.log(2.0)


def _log10(x: Value) -> Value:
    return ew.log(floating(x)) / math.log(10.0)


def _square(x: Value) -> Value:
    return ew.integer_pow(nd.cast_to(x, i64) if x.type.dtype is bool_ else x, n=2)


def _reciprocal(x: Value) -> Value:
    x = floating(x)
    return nd.ones_like(x) / x


def _erfinv(x: Value) -> Value:
    # (x + 1)/2 loses the low bits of small x, so it is formed in float64.
    p = nd.cast_to(x, f64) * 0.5 + 0.5
    return nd.cast_to(ew.normal_quantile(p) / math.sqrt(2.0), float_dtype(x))


def _erfc(x: Value) -> Value:
    return 1.0 - ew.erf(floating(x))


def exp2(input: Any) -> Any:
    """2 to the power of input."""
    return apply(_exp2, (input,))


def log2(input: Any) -> Any:
    """The logarithm to base 2."""
    return apply(_log2, (input,))


def log10(input: Any) -> Any:
    """The logarithm to base 10."""
    return apply(_log10, (input,))


def square(input: Any) -> Any:
    """input * input."""
    return apply(_square, (input,))


def reciprocal(input: Any) -> Any:
    """1 / input."""
    return apply(_reciprocal, (input,))


def erfinv(input: Any) -> Any:
    """The y at which erf(y) is input: Phi^-1((input + 1)/2) / sqrt(2), with Phi the normal distribution function."""
    return apply(_erfinv, (input,))


def erfc(input: Any) -> Any:
    """1 - erf(input), formed so: relative accuracy is lost where it is small."""
    return apply(_erfc, (input,))


# ------------------------------------------------------------------------------------------------- sign and rounding
def _neg(x: Value) -> Value:
    if x.type.dtype is bool_:
        raise DTypeError("neg: a bool has no negative; use ~ or logical_not")
    return ew.neg(x)


def _abs(x: Value) -> Value:
    return x if x.type.dtype is bool_ else ew.abs(x)


def _sign(x: Value) -> Value:
    return x if x.type.dtype is bool_ else ew.sign(x)


def _floor(x: Value) -> Value:
    return ew.floor(x) if x.type.dtype.is_float else x


def _ceil(x: Value) -> Value:
    return ew.ceil(x) if x.type.dtype.is_float else x


def _trunc(x: Value) -> Value:
    return ew.trunc(x) if x.type.dtype.is_float else x


def _round(x: Value, decimals: int) -> Value:
    if not x.type.dtype.is_float:
        return x
    if decimals == 0:
        return ew.round(x)
    scale = 10.0 ** abs(decimals)
    return ew.round(x * scale) / scale if decimals > 0 else ew.round(x / scale) * scale


def _frac(x: Value) -> Value:
    return x - ew.trunc(x)


def neg(input: Any) -> Any:
    """-input."""
    return apply(_neg, (input,))


def absolute(input: Any) -> Any:
    """|input|."""
    return apply(_abs, (input,))


def sign(input: Any) -> Any:
    """-1, 0 or 1; NaN and the sign of zero stay."""
    return apply(_sign, (input,))


def floor(input: Any) -> Any:
    """Rounded down."""
    return apply(_floor, (input,))


def ceil(input: Any) -> Any:
    """Rounded up."""
    return apply(_ceil, (input,))


def trunc(input: Any) -> Any:
    """Rounded towards zero."""
    return apply(_trunc, (input,))


def round(input: Any, *, decimals: int = 0) -> Any:
    """Rounded to the nearest, ties to even; with `decimals`, at that power of ten."""
    return apply(_round, (input,), (integer("round", "decimals", decimals),))


def frac(input: Any) -> Any:
    """input - trunc(input)."""
    return apply(_frac, (input,))


negative, fix = neg, trunc
