"""The vocabulary: every op's definition, by name. `broadcasting` has the NumPy-like functions over them.

An op's derivative rule may use any other op, so these modules refer to each other as modules, at the time a rule runs.
"""

from duo_ir.ops import broadcasting
from duo_ir.ops.activation import gelu, gelu_tanh, silu
from duo_ir.ops.attention import attention, attention_gradient
from duo_ir.ops.control import cond, while_
from duo_ir.ops.conv import conv
from duo_ir.ops.elementwise import (
    abs,
    acos,
    add,
    and_,
    asin,
    atan,
    bitcast,
    cast,
    ceil,
    cos,
    cosh,
    div,
    eq,
    erf,
    exp,
    expm1,
    floor,
    floor_divide,
    ge,
    gt,
    integer_pow,
    is_finite,
    le,
    log,
    log1p,
    lt,
    maximum,
    minimum,
    mul,
    ne,
    neg,
    normal_quantile,
    not_,
    or_,
    pow,
    remainder,
    round,
    rsqrt,
    shift_left,
    shift_right_arithmetic,
    shift_right_logical,
    sigmoid,
    sign,
    sin,
    sinh,
    sqrt,
    stop_gradient,
    straight_through,
    sub,
    tan,
    tanh,
    trunc,
    where,
    xor,
)  # fmt: skip
from duo_ir.ops.generate import constant, iota, size
from duo_ir.ops.indexing import gather, scatter
from duo_ir.ops.linalg import matmul
from duo_ir.ops.order import sort
from duo_ir.ops.random import random_bits, random_word
from duo_ir.ops.reduce import all, any, argmax, argmin, max, min, prod, sum
from duo_ir.ops.running import cummax, cummin, cumprod, cumsum, linear_scan, logcumsumexp
from duo_ir.ops.shape import broadcast, concat, flip, pad, reshape, slice, transpose

__all__ = [
    "abs", "acos", "add", "all", "and_", "any", "argmax", "argmin", "asin", "atan", "attention", "attention_gradient", "bitcast", "broadcast",
    "broadcasting", "cast", "ceil", "concat", "cond", "constant", "conv", "cos", "cosh", "cummax", "cummin", "cumprod", "cumsum", "div", "eq", "erf", "exp", "expm1", "flip",
    "floor", "floor_divide",
    "gather", "ge", "gelu", "gelu_tanh", "gt", "integer_pow", "iota", "is_finite", "le", "linear_scan", "log", "log1p", "logcumsumexp", "lt", "matmul", "max", "maximum", "min", "minimum",
    "mul", "ne", "neg", "normal_quantile", "not_", "or_", "pad", "pow", "prod", "random_bits", "random_word", "remainder", "reshape", "round", "rsqrt",
    "scatter", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sigmoid", "sign", "silu", "sin", "sinh", "size", "slice", "sort", "sqrt",
    "stop_gradient", "straight_through", "sub", "sum", "tan", "tanh", "transpose", "trunc", "where", "while_", "xor",
]  # fmt: skip
