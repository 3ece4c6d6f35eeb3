"""Every scalar recipe under one name: `from duo_ir.scalar import math as recipes`.

A recipe `f(s, x, ...)` builds one function of scalars from the protocol's instructions, by dtype, without branches. Float functions take f32
or f64; narrower floats are widened by the caller (`cast` takes every dtype).
"""

from __future__ import annotations

from duo_ir.scalar.explog import (
    cosh,
    exp,
    exp2,
    expm1,
    log,
    log1p,
    log2,
    pow,
    rsqrt,
    sigmoid,
    sinh,
    tanh,
)
from duo_ir.scalar.integer import (
    bits_to_uniform,
    cast,
    floor_divide,
    fmod,
    integer_pow,
    maximum,
    minimum,
    philox_4x32_10,
    remainder,
    shift_left,
    shift_right_arithmetic,
    shift_right_logical,
    sign,
    trunc_divide,
)
from duo_ir.scalar.special import erf, erfinv, normal_quantile
from duo_ir.scalar.trig import acos, asin, atan, cos, sin, tan

__all__ = [
    "acos", "asin", "atan", "bits_to_uniform", "cast", "cos", "cosh", "erf", "erfinv", "exp", "exp2", "expm1",
    "floor_divide", "fmod", "integer_pow", "log", "log1p", "log2", "maximum", "minimum", "normal_quantile",
    "philox_4x32_10", "pow", "remainder", "rsqrt", "shift_left", "shift_right_arithmetic", "shift_right_logical",
    "sigmoid", "sign", "sin", "sinh", "tan", "tanh", "trunc_divide",
]  # fmt: skip
