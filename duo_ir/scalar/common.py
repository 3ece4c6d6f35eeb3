"""What the recipes share: literals, Horner's scheme, clamps, bits.

`H` is whatever handle the builder uses. Polynomial coefficients of the recipes are minimax fits made for duo (Remez exchange in
50-digit arithmetic, coefficients then rounded one after another), given in ascending order with interval and error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from duo_ir.errors import DTypeError
from duo_ir.scalar.protocol import ScalarBuilder
from duo_ir.types import DType, f32, f64, i8, i16, i32, i64, u8

Builder = ScalarBuilder[Any]
H = Any

INF = float("inf")
NAN = float("nan")
INT_OF = {f32: i32, f64: i64}
MANTISSA = {f32: 23, f64: 52}
BIAS = {f32: 127, f64: 1023}
INT_LIMITS = {d: (-(1 << (d.bits - 1)), (1 << (d.bits - 1)) - 1) for d in (i8, i16, i32, i64)} | {u8: (0, 255)}


def float_of(s: Builder, x: H, op: str) -> DType:
    """The dtype of `x`, which must be f32 or f64."""
    dtype = s.dtype_of(x)
    if dtype is not f32 and dtype is not f64:
        raise DTypeError(f"{op} takes f32 or f64 here, not {dtype.name}: convert the operand first")
    return dtype


def literals(s: Builder, dtype: DType) -> Callable[[float | int], H]:
    """A short name for constants of one dtype."""
    return lambda value: s.const(value, dtype)


def horner(s: Builder, x: H, coefficients: Sequence[float]) -> H:
    """sum of coefficients[k] * x^k, one fma per degree."""
    dtype = s.dtype_of(x)
    total = s.const(coefficients[-1], dtype)
    for c in reversed(coefficients[:-1]):
        total = s.fma(total, x, s.const(c, dtype))
    return total


def ldexp_by_powers(s: Builder, x: H, y: H) -> H:
    """What the instruction ldexp is, by others: (x * 2^(y>>1)) * 2^(y - (y>>1)), two normal powers, of which the first product is exact."""
    dtype = s.dtype_of(x)
    i, width = INT_OF[dtype], MANTISSA[dtype]
    # the low bits of the sum are y + 2 * bias
    twice = s.bitcast(s.add(y, s.const(1.5 * 2.0**width + 2 * BIAS[dtype], dtype)), i)
    half = s.lshr(twice, s.const(1, i))
    for biased in (half, s.sub(twice, half)):
        x = s.mul(x, s.bitcast(s.shl(biased, s.const(width, i)), dtype))
    return x


def at_most(s: Builder, x: H, bound: float) -> H:
    """min(x, bound); NaN stays."""
    limit = s.const(bound, s.dtype_of(x))
    return s.select(s.gt(x, limit), limit, x)


def at_least(s: Builder, x: H, bound: float) -> H:
    """max(x, bound); NaN stays."""
    limit = s.const(bound, s.dtype_of(x))
    return s.select(s.lt(x, limit), limit, x)
