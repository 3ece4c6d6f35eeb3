"""Elementwise ops: operands of one shape (and one dtype, unless said), scalar recipes, one-line derivatives.

A recipe says what one element is; the derivative of operand i is given as a function of (op, i, g) and serves reverse
and forward mode alike. The ops broadcast and promote nothing: `broadcasting.py` does that on top.
"""

from __future__ import annotations

import math as pymath
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from duo_ir.core import Op, Value
from duo_ir.errors import ArgumentError, DTypeError
from duo_ir.opdef import Elementwise, OpDef, same_type
from duo_ir.ops import broadcasting as nd
from duo_ir.scalar import math
from duo_ir.types import DType, TensorType, bf16, bool_, f16, f32, f64, i8, i16, i32, i64

Recipe: TypeAlias = Callable[..., Any]
Rule: TypeAlias = Callable[[Op, int, Value], Value | None]
Replacement: TypeAlias = Sequence[Value] | None

_KINDS = {
    "f": ("f", "floats"),
    "n": ("fiu", "floats and integers"),
    "i": ("iu", "integers"),
    "ib": ("iub", "integers and bools"),
    "x": ("fiub", "any dtype"),
}


def _check(t: TensorType, takes: str) -> None:
    kinds, words = _KINDS[takes]
    if t.dtype.kind not in kinds:
        raise DTypeError(f"it takes {words}, not {t.dtype.name}; cast the operand")


def _instruction(name: str) -> Recipe:
    """The recipe that is one instruction of the scalar protocol."""

    def recipe(s: Any, *operands: Any) -> Any:
        return getattr(s, name)(*operands)

    return recipe


def _unary(
    name: str,
    takes: str,
    recipe: Recipe,
    derivative: Rule | None = None,
    *,
    result: DType | None = None,
    cheap: bool = True,
    canonicalize: Callable[[Op], Replacement] | None = None,
    doc: str = "",
) -> OpDef:
    def infer(x: TensorType) -> TensorType:
        _check(x, takes)
        return x if result is None else x.with_dtype(result)

    kind = Elementwise(recipe, cheap=cheap)
    return OpDef(name, infer, kind, derivative=derivative, canonicalize=canonicalize, doc=doc)


def _binary(
    name: str,
    takes: str,
    recipe: Recipe,
    derivative: Rule | None = None,
    *,
    result: DType | None = None,
    cheap: bool = True,
    commutative: bool = False,
    canonicalize: Callable[[Op], Replacement] | None = None,
    doc: str = "",
) -> OpDef:
    def infer(x: TensorType, y: TensorType) -> TensorType:
        same_type(name, x, y)
        _check(x, takes)
        return x if result is None else x.with_dtype(result)

    kind = Elementwise(recipe, cheap=cheap)
    return OpDef(
        name, infer, kind, derivative=derivative, canonicalize=canonicalize, commutative=commutative, doc=doc
    )  # fmt: skip


def _flat(op: Op, i: int, g: Value) -> None:
    """The derivative of a step function: zero wherever it exists."""


def _undoes_itself(op: Op) -> Replacement:
    """f(f(x)) is x."""
    inner = op.operands[0].op
    return (inner.operands[0],) if inner is not None and inner.definition is op.definition else None


# -------------------------------------------------------------------------------------------------------- arithmetic
def _mul_canonical(op: Op) -> Replacement:
    x, y = op.operands
    if nd.literal(y) == 1:
        return (x,)
    return (y,) if nd.literal(x) == 1 else None


def _div_canonical(op: Op) -> Replacement:
    return (op.operands[0],) if nd.literal(op.operands[1]) == 1 else None


def _div_derivative(op: Op, i: int, g: Value) -> Value:
    y = op.operands[1]
    return g / y if i == 0 else -g * (op.result / y)


add = _binary("add", "n", _instruction("add"), lambda op, i, g: g, commutative=True)
sub = _binary("sub", "n", _instruction("sub"), lambda op, i, g: -g if i else g)
mul = _binary(
    "mul", "n", _instruction("mul"), lambda op, i, g: g * op.operands[1 - i],
    commutative=True, canonicalize=_mul_canonical,
)  # fmt: skip
div = _binary("div", "f", _instruction("div"), _div_derivative, canonicalize=_div_canonical)
neg = _unary("neg", "n", _instruction("neg"), lambda op, i, g: -g, canonicalize=_undoes_itself)


def _abs_recipe(s: Any, x: Any) -> Any:
    d = s.dtype_of(x)
    if d.is_float:
        return s.fabs(x)
    return s.select(s.lt(x, s.const(0, d)), s.neg(x), x) if d.kind == "i" else x


def _extremum_derivative(op: Op, i: int, g: Value) -> Value:
    # At equality each operand gets half; an unordered pair (NaN) hands the whole cotangent to both.
    x, y = op.operands[i], op.operands[1 - i]
    loses = lt(x, y) if op.definition is maximum else gt(x, y)
    return where(eq(x, y), g * 0.5, where(loses, nd.zeros_like(g), g))


abs = _unary("abs", "n", _abs_recipe, lambda op, i, g: g * sign(op.operands[0]), doc="|x|; the least integer wraps.")
sign: OpDef = _unary("sign", "n", math.sign, _flat, doc="-1, 0 or 1; keeps NaN and the sign of zero.")
maximum = _binary("maximum", "n", math.maximum, _extremum_derivative, commutative=True, doc="IEEE 754-2019 maximum.")
minimum = _binary("minimum", "n", math.minimum, _extremum_derivative, commutative=True, doc="IEEE 754-2019 minimum.")
floor_divide = _binary("floor_divide", "n", math.floor_divide, _flat, doc="Largest integer <= x/y; integers: x/0 = 0.")
remainder = _binary(
    "remainder", "n", math.remainder,
    lambda op, i, g: -g * floor_divide(*op.operands) if i else g,
    doc="x - y*floor(x/y): the sign of y.",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ powers
def _pow_derivative(op: Op, i: int, g: Value) -> Value:
    # The inner `where`s keep what is not chosen finite, so that higher derivatives do not meet 0*inf.
    x, y = op.operands
    zero, one = nd.zeros_like(x), nd.ones_like(x)
    if i == 0:
        flat = eq(y, zero)
        return where(flat, zero, g * (y * pow(x, where(flat, one, y - one))))
    still = and_(eq(x, zero), ge(y, zero))
    return g * (op.result * log(where(still, one, x)))


def _integer_pow_type(x: TensorType, *, n: int) -> TensorType:
    _check(x, "n")
    if isinstance(n, bool) or not isinstance(n, int):
        raise ArgumentError(f"the exponent n is an int, not {n!r}; pow takes others")
    if n < 0 and not x.dtype.is_float:
        raise ArgumentError(f"integers have no power {n}; cast {x.dtype.name} to a float first")
    return x


def _integer_pow_derivative(op: Op, i: int, g: Value) -> Value | None:
    x, n = op.operands[0], op.attrs["n"]
    if n == 0:
        return None
    return g if n == 1 else g * (integer_pow(x, n=n - 1) * float(n))


pow = _binary("pow", "f", math.pow, _pow_derivative, cheap=False)
integer_pow = OpDef(
    "integer_pow", _integer_pow_type, Elementwise(math.integer_pow), derivative=_integer_pow_derivative,
    canonicalize=lambda op: op.operands if op.attrs["n"] == 1 else None,
    doc="x**n for a static n, by repeated squaring.",
)  # fmt: skip
sqrt = _unary("sqrt", "f", _instruction("sqrt"), lambda op, i, g: g / (op.result + op.result))
rsqrt = _unary("rsqrt", "f", math.rsqrt, lambda op, i, g: g * -0.5 * integer_pow(op.result, n=3), doc="1/sqrt(x).")


# --------------------------------------------------------------------------------------------------------- functions
def _arc_slope(op: Op) -> Value:
    """1 / sqrt(1 - x*x), without the cancellation near 1."""
    x = op.operands[0]
    return rsqrt((1.0 - x) * (1.0 + x))


exp = _unary("exp", "f", math.exp, lambda op, i, g: g * op.result, cheap=False)
expm1 = _unary("expm1", "f", math.expm1, lambda op, i, g: g * (op.result + 1.0), cheap=False, doc="exp(x) - 1.")
log = _unary("log", "f", math.log, lambda op, i, g: g / op.operands[0], cheap=False)
log1p = _unary("log1p", "f", math.log1p, lambda op, i, g: g / (op.operands[0] + 1.0), cheap=False, doc="log(1 + x).")
sin = _unary("sin", "f", math.sin, lambda op, i, g: g * cos(op.operands[0]), cheap=False)
cos: OpDef = _unary("cos", "f", math.cos, lambda op, i, g: -g * sin(op.operands[0]), cheap=False)
tan = _unary("tan", "f", math.tan, lambda op, i, g: g * (op.result * op.result + 1.0), cheap=False)
asin = _unary("asin", "f", math.asin, lambda op, i, g: g * _arc_slope(op), cheap=False)
acos = _unary("acos", "f", math.acos, lambda op, i, g: -g * _arc_slope(op), cheap=False)
atan = _unary("atan", "f", math.atan, lambda op, i, g: g / (op.operands[0] * op.operands[0] + 1.0), cheap=False)
sinh = _unary("sinh", "f", math.sinh, lambda op, i, g: g * cosh(op.operands[0]), cheap=False)
cosh: OpDef = _unary("cosh", "f", math.cosh, lambda op, i, g: g * sinh(op.operands[0]), cheap=False)
tanh = _unary("tanh", "f", math.tanh, lambda op, i, g: g * (1.0 - op.result * op.result), cheap=False)
sigmoid = _unary("sigmoid", "f", math.sigmoid, lambda op, i, g: g * (op.result * (1.0 - op.result)), cheap=False)
erf = _unary(
    "erf", "f", math.erf,
    lambda op, i, g: g * (exp(-(op.operands[0] * op.operands[0])) * (2.0 / pymath.sqrt(pymath.pi))),
    cheap=False,
)  # fmt: skip
normal_quantile = _unary(
    "normal_quantile", "f", math.normal_quantile,
    lambda op, i, g: g * (exp(op.result * op.result * 0.5) * pymath.sqrt(2.0 * pymath.pi)),
    cheap=False, doc="The x at which the standard normal distribution function is p.",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- rounding
floor = _unary("floor", "f", _instruction("floor"), _flat)
ceil = _unary("ceil", "f", _instruction("ceil"), _flat)
trunc = _unary("trunc", "f", _instruction("trunc"), _flat)
round = _unary("round", "f", _instruction("rint"), _flat, doc="To the nearest integer, ties to even.")


# -------------------------------------------------------------------------------------------------------- comparison
def _compare(name: str, on_bools: Recipe, commutative: bool = False) -> OpDef:
    """A comparison: false with NaN (ne: true). `on_bools` is its truth table, False < True."""

    def recipe(s: Any, x: Any, y: Any) -> Any:
        return on_bools(s, x, y) if s.dtype_of(x) is bool_ else getattr(s, name)(x, y)

    return _binary(name, "x", recipe, result=bool_, commutative=commutative)


eq = _compare("eq", lambda s, x, y: s.not_(s.xor(x, y)), commutative=True)
ne = _compare("ne", lambda s, x, y: s.xor(x, y), commutative=True)
lt = _compare("lt", lambda s, x, y: s.and_(s.not_(x), y))
le = _compare("le", lambda s, x, y: s.or_(s.not_(x), y))
gt = _compare("gt", lambda s, x, y: s.and_(x, s.not_(y)))
ge = _compare("ge", lambda s, x, y: s.or_(x, s.not_(y)))


def _is_finite_recipe(s: Any, x: Any) -> Any:
    return s.lt(s.fabs(x), s.const(pymath.inf, s.dtype_of(x)))


is_finite = _unary("is_finite", "f", _is_finite_recipe, result=bool_)

# -------------------------------------------------------------------------------------------------------------- bits
and_ = _binary("and", "ib", _instruction("and_"), commutative=True)
or_ = _binary("or", "ib", _instruction("or_"), commutative=True)
xor = _binary("xor", "ib", _instruction("xor"), commutative=True)
not_ = _unary("not", "ib", _instruction("not_"), canonicalize=_undoes_itself)
shift_left = _binary(
    "shift_left", "i", math.shift_left, doc="Bits beyond the end are lost; y outside 0..bits-1 gives 0."
)
shift_right_logical = _binary(
    "shift_right_logical", "i", math.shift_right_logical, doc="Fills with 0; y outside 0..bits-1 gives 0."
)
shift_right_arithmetic = _binary(
    "shift_right_arithmetic", "i", math.shift_right_arithmetic,
    doc="Fills with the sign bit (u8: with 0); y outside 0..bits-1 leaves that fill alone.",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- selection
def _where_type(c: TensorType, x: TensorType, y: TensorType) -> TensorType:
    if c.dtype is not bool_:
        raise DTypeError(f"the condition is bool, not {c.dtype.name}; compare it with zero")
    same_type("where", x, y)
    same_type("where", c, x.with_dtype(bool_))
    return x


def _where_derivative(op: Op, i: int, g: Value) -> Value | None:
    if i == 0:
        return None
    zero = nd.zeros_like(g)
    return where(op.operands[0], g, zero) if i == 1 else where(op.operands[0], zero, g)


def _where_canonical(op: Op) -> Replacement:
    c, x, y = op.operands
    if x is y:
        return (x,)
    known = nd.literal(c)
    return None if known is None else ((x,) if known else (y,))


where = OpDef(
    "where", _where_type, Elementwise(_instruction("select"), widen=False),
    derivative=_where_derivative, canonicalize=_where_canonical, doc="x where the bool c, else y.",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- conversion
def _cast_derivative(op: Op, i: int, g: Value) -> Value | None:
    # Reverse mode hands a cotangent of the result's dtype, forward mode a tangent of the operand's: each goes to the other.
    source, target = op.operands[0].type.dtype, op.result.type.dtype
    if not (source.is_float and target.is_float):
        return None
    return nd.cast_to(g, source if g.type.dtype is target else target)


def _is_exact(narrow: DType, wide: DType) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if narrow is wide or narrow is bool_:
        return True
    if narrow.is_float:
        return wide is f64 or (wide is f32 and narrow.is_narrow_float)
    if wide.is_float:
        bits = {f16: 11, bf16: 8, f32: 24, f64: 53}[wide]
        return narrow.bits - (narrow.kind == "i") <= bits
    if narrow.kind == "i":
        return wide.kind == "i" and narrow.bits <= wide.bits
    return wide.bits > narrow.bits if wide.kind == "i" else wide is narrow


def _cast_canonical(op: Op) -> Replacement:
    x = op.operands[0]
    if x.type.dtype is op.attrs["dtype"]:
        return (x,)
    if x.op is None or x.op.definition is not cast:
        return None
    (y,) = x.op.operands
    first, middle, last = y.type.dtype, x.type.dtype, op.attrs["dtype"]
    if not _is_exact(first, middle):
        return None
    if first.is_integer and middle.is_float and last.is_integer and not _is_exact(first, last):
        return None  # an integer would wrap where the float saturates
    return (nd.cast_to(y, last),)


def _bitcast_type(x: TensorType, *, dtype: DType) -> TensorType:
    if x.dtype.kind == "b" or dtype.kind == "b":
        raise DTypeError("bool has no bits to share; cast instead")
    if x.dtype.itemsize != dtype.itemsize:
        raise DTypeError(f"{x.dtype.name} and {dtype.name} differ in size; bitcast keeps every bit")
    return x.with_dtype(dtype)


_INTEGER_OF = {1: i8, 2: i16, 4: i32, 8: i64}
_INFINITY_BITS = {f16: 0x7C00, bf16: 0x7F80, f32: 0x7F800000, f64: 0x7FF0000000000000}
_NAN_BITS = {f16: 0x7E00, bf16: 0x7FC0, f32: 0x7FC00000, f64: 0x7FF8000000000000}


def _bitcast_recipe(s: Any, x: Any, *, dtype: DType) -> Any:
    # A NaN's sign and payload are not part of the contract, so every NaN shows as the positive quiet one.
    d = s.dtype_of(x)
    if d is dtype:
        return x
    if not d.is_float:
        return s.bitcast(x, dtype)
    integer = _INTEGER_OF[d.itemsize]
    bits = s.bitcast(x, integer)
    magnitude = s.and_(bits, s.const(2 ** (integer.bits - 1) - 1, integer))
    is_nan = s.gt(magnitude, s.const(_INFINITY_BITS[d], integer))
    bits = s.select(is_nan, s.const(_NAN_BITS[d], integer), bits)
    return bits if dtype is integer else s.bitcast(bits, dtype)


cast = OpDef(
    "cast", lambda x, dtype: x.with_dtype(dtype), Elementwise(math.cast, widen=False),
    derivative=_cast_derivative, canonicalize=_cast_canonical,
    doc="Rounds once; float to integer truncates and saturates, NaN to 0; to bool: not equal to zero.",
)  # fmt: skip
bitcast = OpDef(
    "bitcast", _bitcast_type, Elementwise(_bitcast_recipe, widen=False),
    canonicalize=lambda op: op.operands if op.operands[0].type is op.result.type else None,
    doc="The same bits as another dtype of the same size; every NaN as the positive quiet one.",
)  # fmt: skip
stop_gradient = OpDef(
    "stop_gradient", lambda x: x, Elementwise(lambda s, x: x, widen=False), derivative=_flat,
    canonicalize=lambda op: op.operands, stops=True,
    doc="x, through which no derivative passes.",
)  # fmt: skip
straight_through = OpDef(
    "straight_through", lambda x, y: same_type("straight_through", x, y), Elementwise(lambda s, x, y: x, widen=False),
    derivative=lambda op, i, g: g if i == 1 else None, canonicalize=lambda op: op.operands[:1],
    doc="x, through which derivatives pass as if it were y.",
)  # fmt: skip
