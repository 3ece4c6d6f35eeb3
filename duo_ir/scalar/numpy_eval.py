"""The scalar protocol on NumPy arrays: the reference meaning of every recipe.

A handle is an array (or NumPy scalar) whose dtype is the DType's; instructions broadcast. NumPy lacks three of them and
they are made here: `fma`, correctly rounded in every case, conversions that round once where NumPy would round
twice, and shifts by the protocol's signedness. Nothing warns: overflow, NaN and the like are ordinary results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from duo_ir.errors import DTypeError
from duo_ir.scalar.common import ldexp_by_powers
from duo_ir.types import DTYPES, DType

Array = Any  # numpy.ndarray or numpy scalar: the operations used here take both

_BY_NUMPY = {d.numpy: d for d in DTYPES.values()}
_SIGNED = {1: np.dtype(np.int8), 2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
_UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}

F = TypeVar("F", bound=Callable[..., Any])


def _quiet(function: F) -> F:
    """Runs `function` with NumPy's floating-point warnings off."""
    return np.errstate(all="ignore")(function)


# ----------------------------------------------------------------------------------------------------------- fma
@_quiet
def fma(x: Array, y: Array, z: Array) -> Array:
    """x*y + z with one rounding to nearest even, for float32 or float64 arrays of one dtype; broadcasts."""
    dtype = np.result_type(x, y, z)
    if dtype == np.float32:
        return _fma_f32(x, y, z)
    if dtype == np.float64:
        return _fma_f64(x, y, z)
    raise DTypeError(f"fma takes f32 or f64, not {dtype}: widen f16 and bf16 first")


def _fma_f32(x: Array, y: Array, z: Array) -> Array:
    # The product of two f32 is exact in f64. Rounding the f64 sum again to f32 is wrong only where that sum fell on a tie of
    # f32 (or became denormal there, which has other ties); those few elements take the sum rounded to odd instead.
    product = np.multiply(x, y, dtype=np.float64)
    total = np.asarray(product + z)
    bits = total.view(np.int64)
    doubtful = (bits & 0x1FFFFFFF) == 0x10000000
    doubtful |= np.abs(total) < 2.0**-125
    if not doubtful.any():
        return total.astype(np.float32)
    at = np.asarray(doubtful)
    addend = np.broadcast_to(z, total.shape)[at].astype(np.float64)
    factor = np.broadcast_to(product, total.shape)[at]
    total[at] = _to_odd(total[at], _sum_error(factor, addend, total[at]))
    return total.astype(np.float32)


def _sum_error(a: Array, b: Array, total: Array) -> Array:
    """a + b - total exactly, where total = fl(a + b) (Knuth's TwoSum)."""
    shadow = total - a
    return (a - (total - shadow)) + (b - shadow)


def _to_odd(value: Array, error: Array) -> Array:
    """`value` + `error` rounded to odd, when `value` is that sum rounded to nearest: the neighbour on the error's side wherever the
    sum is inexact and the last bit even (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008)."""
    bits = np.asarray(value).view(np.int64)
    adjust = (error != 0) & ((bits & 1) == 0) & np.isfinite(error)
    step = np.where((error > 0) == (value > 0), 1, -1)
    return (bits + np.where(adjust, step, 0)).view(np.float64)


def _fma_f64(x: Array, y: Array, z: Array) -> Array:
    x, y, z = np.broadcast_arrays(x, y, z)
    product = x * y
    plain = np.asarray(product + z)
    # Dekker's product and the sums below are free of underflow and overflow in this range.
    ax, ay, ap, az = np.abs(x), np.abs(y), np.abs(product), np.abs(z)
    safe = (ax < 2.0**990) & (ay < 2.0**990) & (ap > 2.0**-900) & (ap < 2.0**1000) & (az < 2.0**1000)
    safe &= (az > 2.0**-900) | (az == 0)
    # Where the plain formula is exact or special: a factor is zero, or something is infinite or NaN.
    special = (ax == 0) | (ay == 0) | ~(np.isfinite(x) & np.isfinite(y) & np.isfinite(z))
    high, low = _two_product(x, y, product)
    t = z + low
    t_error = _sum_error(z, low, t)
    v = high + t
    v_error = _sum_error(high, t, v)
    tail = t_error + v_error
    result = np.asarray(v + _to_odd(tail, _sum_error(t_error, v_error, tail)))
    plain = np.where(np.isinf(z) & np.isfinite(x) & np.isfinite(y), z, plain)  # where the product alone overflowed
    result = np.where(special, plain, result)
    hard = ~(safe | special)
    if hard.any():
        result[hard] = [_fma_exact(*map(float, xyz)) for xyz in zip(x[hard], y[hard], z[hard])]
    return result


def _two_product(x: Array, y: Array, product: Array) -> tuple[Array, Array]:
    """(fl(x*y), x*y - fl(x*y)), by Veltkamp's splitting and Dekker's product."""

    def split(a: Array) -> tuple[Array, Array]:
        c = a * 134217729.0  # 2^27 + 1
        high = c - (c - a)
        return high, a - high

    x1, x2 = split(x)
    y1, y2 = split(y)
    return product, ((x1 * y1 - product) + x1 * y2 + x2 * y1) + x2 * y2


def _fma_exact(x: float, y: float, z: float) -> float:
    """One finite element by rational arithmetic: Python's int / int rounds once to nearest even, denormals too."""
    (p, q), (r, t), (u, v) = x.as_integer_ratio(), y.as_integer_ratio(), z.as_integer_ratio()
    numerator, denominator = p * r * v + u * q * t, q * t * v
    if numerator == 0:
        return 0.0  # cancellation: factors are not zero here, so +0.0 by IEEE 754
    try:
        return numerator / denominator
    except OverflowError:
        return float("inf") if numerator > 0 else float("-inf")


# -------------------------------------------------------------------------------------------------------- convert
def _f64_to_f32_odd(x: Array) -> Array:
    """float64 to float32, rounded to odd, so that a further rounding to f16 or bf16 is the only one."""
    near = np.asarray(x, np.float64).astype(np.float32)
    back = near.astype(np.float64)
    bits = np.asarray(near).view(np.int32)
    adjust = (back != x) & ((bits & 1) == 0) & ~np.isnan(back)
    step = np.where(np.abs(back) > np.abs(x), -1, 1).astype(np.int32)
    return (bits + np.where(adjust, step, 0).astype(np.int32)).view(np.float32)


def _i64_to_f64_sticky(x: Array) -> Array:
    """int64 to float64 so that a further rounding to at most 40 bits is the only one."""
    x = np.asarray(x, np.int64)
    sticky = (x & ~np.int64(0xFFF)) | np.where((x & 0xFFF) != 0, np.int64(0x800), np.int64(0))
    big = (x > 2**53) | (x < -(2**53))
    return np.where(big, sticky, x).astype(np.float64)


@_quiet
def convert(x: Array, dtype: DType) -> Array:
    """The protocol's `convert`; every pair of dtypes rounds at most once."""
    x = np.asarray(x)
    target = dtype.numpy
    if x.dtype == target:
        return x
    if not (dtype.is_narrow_float and x.dtype != np.float32):
        return x.astype(target)
    if x.dtype.kind in "iub":
        x = _i64_to_f64_sticky(x)
    return _f64_to_f32_odd(x.astype(np.float64)).astype(target)


class NumpyScalar:
    """The ScalarBuilder whose handles are NumPy arrays. Stateless."""

    def dtype_of(self, x: Array) -> DType:
        return _BY_NUMPY[x.dtype]

    @_quiet
    def const(self, value: float | int | bool, dtype: DType) -> Array:
        if dtype.is_narrow_float:
            return convert(np.float64(value), dtype)
        return np.asarray(value, dtype=dtype.numpy)

    neg = staticmethod(_quiet(np.negative))
    fabs = staticmethod(_quiet(np.abs))
    sqrt = staticmethod(_quiet(np.sqrt))
    floor = staticmethod(_quiet(np.floor))
    ceil = staticmethod(_quiet(np.ceil))
    trunc = staticmethod(_quiet(np.trunc))
    rint = staticmethod(_quiet(np.rint))
    not_ = staticmethod(np.invert)
    add = staticmethod(_quiet(np.add))
    mul = staticmethod(_quiet(np.multiply))
    div = staticmethod(_quiet(np.divide))
    copysign = staticmethod(_quiet(np.copysign))
    irem = staticmethod(_quiet(np.fmod))
    and_ = staticmethod(np.bitwise_and)
    or_ = staticmethod(np.bitwise_or)
    xor = staticmethod(np.bitwise_xor)
    shl = staticmethod(np.left_shift)
    eq = staticmethod(_quiet(np.equal))
    ne = staticmethod(_quiet(np.not_equal))
    lt = staticmethod(_quiet(np.less))
    le = staticmethod(_quiet(np.less_equal))
    gt = staticmethod(_quiet(np.greater))
    ge = staticmethod(_quiet(np.greater_equal))
    fma = staticmethod(fma)
    select = staticmethod(np.where)
    convert = staticmethod(convert)

    @_quiet
    def sub(self, x: Array, y: Array) -> Array:
        return x - y

    @_quiet
    def ldexp(self, x: Array, y: Array) -> Array:
        return np.asarray(ldexp_by_powers(self, x, y))

    @_quiet
    def idiv(self, x: Array, y: Array) -> Array:
        return (x - np.fmod(x, y)) // y

    def lshr(self, x: Array, y: Array) -> Array:
        x, y = np.asarray(x), np.asarray(y)
        unsigned = _UNSIGNED[x.dtype.itemsize]
        return np.asarray(np.right_shift(x.view(unsigned), y.view(unsigned))).view(x.dtype)

    def ashr(self, x: Array, y: Array) -> Array:
        x, y = np.asarray(x), np.asarray(y)
        signed = _SIGNED[x.dtype.itemsize]
        return np.asarray(np.right_shift(x.view(signed), y.view(signed))).view(x.dtype)

    def bitcast(self, x: Array, dtype: DType) -> Array:
        return np.asarray(x).view(dtype.numpy)
