"""Recipes on integers and bits, and those that read alike for integers and floats: maximum, minimum, sign, division with floor,
safe shifts, casts, static powers, and the Philox generator.

Integers wrap; x/0 is 0 and MIN/-1 is MIN. No recipe here executes an instruction of the protocol outside its defined range.
"""

from __future__ import annotations

from duo_ir.errors import ArgumentError, DTypeError
from duo_ir.scalar.common import INF, INT_LIMITS, INT_OF, Builder, H, float_of, literals
from duo_ir.types import DType, bool_, f32, f64, i8, i16, i32, i64, u8


# ---------------------------------------------------------------------------------------------- order and sign
def maximum(s: Builder, x: H, y: H) -> H:
    """The larger; for floats IEEE 754-2019 maximum: NaN wins, -0 < +0."""
    return _extremum(s, x, y, largest=True)


def minimum(s: Builder, x: H, y: H) -> H:
    """The smaller; for floats IEEE 754-2019 minimum: NaN wins, -0 < +0."""
    return _extremum(s, x, y, largest=False)


def _extremum(s: Builder, x: H, y: H, largest: bool) -> H:
    dtype = s.dtype_of(x)
    if dtype is bool_:
        return s.or_(x, y) if largest else s.and_(x, y)
    picked = s.select((s.gt if largest else s.lt)(x, y), x, y)
    if not dtype.is_float:
        return picked
    integer = INT_OF[float_of(s, x, "maximum")]
    a, b = s.bitcast(x, integer), s.bitcast(y, integer)
    # Equal operands have equal bits, or are zeros: then `and` keeps -0 only if both are, `or` if either is.
    equal = s.bitcast(s.and_(a, b) if largest else s.or_(a, b), dtype)
    picked = s.select(s.eq(x, y), equal, picked)
    return s.select(s.ne(x, x), x, picked)  # a NaN in y was picked already, as no comparison holds


def sign(s: Builder, x: H) -> H:
    """-1, 0 or 1; a float's zero keeps its sign and NaN stays NaN."""
    dtype = s.dtype_of(x)
    if dtype is bool_:
        return x
    k = literals(s, dtype)
    positive = s.select(s.gt(x, k(0)), k(1), x)
    return positive if dtype is u8 else s.select(s.lt(x, k(0)), k(-1), positive)


# ---------------------------------------------------------------------------------------------------- division
def _safe_divisor(s: Builder, x: H, y: H) -> tuple[H, H]:
    """(y == 0, a divisor for which idiv is defined): 1 instead of 0, and instead of -1 under MIN."""
    dtype = s.dtype_of(x)
    k = literals(s, dtype)
    zero = s.eq(y, k(0))
    bad = zero
    if dtype is not u8:
        bad = s.or_(zero, s.and_(s.eq(x, k(INT_LIMITS[dtype][0])), s.eq(y, k(-1))))
    return zero, s.select(bad, k(1), y)


def trunc_divide(s: Builder, x: H, y: H) -> H:
    """Integer quotient rounded toward zero; x/0 is 0, MIN/-1 is MIN."""
    zero, divisor = _safe_divisor(s, x, y)
    return s.select(zero, s.const(0, s.dtype_of(x)), s.idiv(x, divisor))


def floor_divide(s: Builder, x: H, y: H) -> H:
    """floor(x / y) as Python and NumPy define it: integers exactly (x/0 is 0, MIN/-1 is MIN), floats from the exact remainder
    (x/0 is the plain quotient)."""
    if s.dtype_of(x).is_float:
        return _floor_divide_float(s, x, y)
    k = literals(s, s.dtype_of(x))
    zero, divisor = _safe_divisor(s, x, y)
    q = s.idiv(x, divisor)
    if s.dtype_of(x) is not u8:
        q = s.select(_crosses(s, s.sub(x, s.mul(q, divisor)), divisor), s.sub(q, k(1)), q)
    return s.select(zero, k(0), q)


def _crosses(s: Builder, rest: H, divisor: H) -> H:
    """Whether a truncated remainder is nonzero and of the other sign than the divisor."""
    zero = s.const(0, s.dtype_of(rest))
    return s.and_(s.ne(rest, zero), s.lt(s.xor(rest, divisor), zero))


def remainder(s: Builder, x: H, y: H) -> H:
    """x - floor(x/y)*y, with the divisor's sign, as Python, NumPy and PyTorch define it. Integer x % 0 is 0, float NaN.

    Floats: exact fmod, then one rounded addition of y where the signs differ; see `fmod` for the range.
    """
    dtype = s.dtype_of(x)
    if dtype.is_float:
        zero = s.const(0.0, dtype)
        rest = fmod(s, x, y)
        moved = s.select(s.xor(s.lt(rest, zero), s.lt(y, zero)), s.add(rest, y), rest)
        return s.select(s.eq(rest, zero), s.copysign(zero, y), moved)
    _, divisor = _safe_divisor(s, x, y)
    rest = s.irem(x, divisor)
    if dtype is u8:
        return rest
    return s.select(_crosses(s, rest, divisor), s.add(rest, divisor), rest)


def fmod(s: Builder, x: H, y: H) -> H:
    """The remainder of the truncated quotient, with the sign of x. Integer: x % 0 is 0. Float: exact, NaN for y = 0 or x infinite;
    in f64 quotients beyond 2^150 give a zero.

    Each step r <- r - rint(r/y)*y is one exact fma and takes about 51 bits off the quotient, so six steps in f64 reach
    any pair of f32; f64 has three.
    """
    dtype = s.dtype_of(x)
    if not dtype.is_float:
        return s.irem(x, _safe_divisor(s, x, y)[1])
    float_of(s, x, "fmod")
    k = literals(s, dtype)
    if dtype is f32:
        rest, wide_y = s.convert(x, f64), s.convert(y, f64)
        inverse = s.div(s.const(1.0, f64), wide_y)
        for _ in range(6):
            rest = s.fma(s.neg(s.rint(s.mul(rest, inverse))), wide_y, rest)
        rest = s.convert(rest, f32)
    else:
        rest = x
        for _ in range(4):
            rest = s.fma(s.neg(s.rint(s.div(rest, y))), y, rest)
        reached = s.and_(s.lt(s.fabs(rest), s.fabs(y)), s.lt(s.fabs(x), k(INF)))
        defined = s.and_(s.lt(s.fabs(x), k(INF)), s.ne(y, k(0.0)))
        rest = s.select(s.and_(defined, s.not_(reached)), k(0.0), rest)
    # The nearest quotient leaves |r| <= |y|/2 of either sign; truncation wants the sign of x.
    crossed = s.and_(s.ne(rest, k(0.0)), s.xor(s.lt(rest, k(0.0)), s.lt(x, k(0.0))))
    rest = s.copysign(s.select(crossed, s.add(rest, s.copysign(y, x)), rest), x)
    ay = s.fabs(y)
    rest = s.select(s.lt(s.fabs(x), ay), x, rest)  # also where y is infinite and the steps made NaN
    return s.select(s.ne(y, y), y, rest)


def _floor_divide_float(s: Builder, x: H, y: H) -> H:
    k = literals(s, float_of(s, x, "floor_divide"))
    zero, one = k(0.0), k(1.0)
    rest = fmod(s, x, y)
    plain = s.div(x, y)
    q = s.div(s.sub(x, rest), y)
    crossed = s.and_(s.ne(rest, zero), s.xor(s.lt(rest, zero), s.lt(y, zero)))
    q = s.select(crossed, s.sub(q, one), q)
    down = s.floor(q)  # q is integral up to its own rounding
    down = s.select(s.gt(s.sub(q, down), k(0.5)), s.add(down, one), down)
    down = s.select(s.eq(q, zero), s.copysign(zero, plain), down)
    return s.select(s.eq(y, zero), plain, down)


def integer_pow(s: Builder, x: H, n: int) -> H:
    """x^n for a static n by repeated squaring, from the lowest bit of n up; negative n is 1 / x^|n| (floats only)."""
    dtype = s.dtype_of(x)
    if n < 0 and not dtype.is_float:
        raise ArgumentError(f"integer_pow of {dtype.name} with exponent {n}: convert to a float first")
    one = s.const(1, dtype) if not dtype.is_float else s.const(1.0, dtype)
    result, square, left = None, x, abs(n)
    while left:
        if left & 1:
            result = square if result is None else s.mul(result, square)
        left >>= 1
        if left:
            square = s.mul(square, square)
    if result is None:
        # 1 of x's shape: an instruction that depends on x, so that NumPy's evaluator broadcasts.
        return s.select(s.eq(x, x), one, one)
    return s.div(one, result) if n < 0 else result


# ------------------------------------------------------------------------------------------------------ shifts
def _in_range(s: Builder, y: H) -> H:
    dtype = s.dtype_of(y)
    inside = s.lt(y, s.const(dtype.bits, dtype))
    return inside if dtype is u8 else s.and_(inside, s.ge(y, s.const(0, dtype)))


def shift_left(s: Builder, x: H, y: H) -> H:
    """x << y; 0 when y is negative or at least the width."""
    zero = s.const(0, s.dtype_of(x))
    inside = _in_range(s, y)
    return s.select(inside, s.shl(x, s.select(inside, y, zero)), zero)


def shift_right_logical(s: Builder, x: H, y: H) -> H:
    """x >> y with zeros shifted in; 0 when y is negative or at least the width."""
    zero = s.const(0, s.dtype_of(x))
    inside = _in_range(s, y)
    return s.select(inside, s.lshr(x, s.select(inside, y, zero)), zero)


def shift_right_arithmetic(s: Builder, x: H, y: H) -> H:
    """x >> y filled by x's signedness; when y is negative or at least the width: the sign's fill, 0 for u8."""
    dtype = s.dtype_of(x)
    if dtype is u8:
        return shift_right_logical(s, x, y)
    return s.ashr(x, s.select(_in_range(s, y), y, s.const(dtype.bits - 1, dtype)))


# ------------------------------------------------------------------------------------------------------- casts
def cast(s: Builder, x: H, dtype: DType) -> H:
    """x as another dtype, one rounding at most. Float to integer truncates and saturates, NaN gives 0; to bool is x != 0;
    integer to integer wraps.

    Only the conversions every target has in hardware are used: what goes to f16 or bf16 from a wider type than f32
    passes through an f32 that was rounded to odd, which makes the last rounding the only one that counts.
    """
    source = s.dtype_of(x)
    if source is dtype:
        return x
    if source.is_narrow_float:
        return cast(s, s.convert(x, f32), dtype)
    if dtype is bool_:
        return s.ne(x, s.const(0.0 if source.is_float else 0, source))
    if dtype.is_narrow_float:
        return s.convert(_to_f32_for_narrowing(s, x), dtype)
    if source.is_float and dtype.is_integer:
        return _float_to_integer(s, x, dtype)
    return s.convert(x, dtype)


def _float_to_integer(s: Builder, x: H, dtype: DType) -> H:
    k, i = literals(s, s.dtype_of(x)), literals(s, dtype)
    low, high = INT_LIMITS[dtype]
    whole = s.trunc(x)
    bottom, beyond = k(float(low)), k(float(high + 1))  # both exact: zero or powers of two
    inside = s.and_(s.ge(whole, bottom), s.lt(whole, beyond))
    value = s.convert(s.select(inside, whole, k(0.0)), dtype)
    value = s.select(s.lt(whole, bottom), i(low), value)
    return s.select(s.ge(whole, beyond), i(high), value)


def _to_f32_for_narrowing(s: Builder, x: H) -> H:
    source = s.dtype_of(x)
    if source is f32 or source in (i8, i16, u8, bool_):
        return s.convert(x, f32) if source is not f32 else x
    if source is i64:
        # Beyond 2^53 f64 would round: there the low 12 bits become one sticky bit.
        k = literals(s, i64)
        sticky = s.select(s.ne(s.and_(x, k(0xFFF)), k(0)), k(0x800), k(0))
        coarse = s.or_(s.and_(x, k(~0xFFF)), sticky)
        x = s.select(s.or_(s.gt(x, k(1 << 53)), s.lt(x, k(-(1 << 53)))), coarse, x)
    wide = x if source is f64 else s.convert(x, f64)
    near = s.convert(wide, f32)
    back = s.convert(near, f64)
    bits, k32 = s.bitcast(near, i32), literals(s, i32)
    even = s.eq(s.and_(bits, k32(1)), k32(0))
    odd_bits = s.add(bits, s.select(s.gt(s.fabs(back), s.fabs(wide)), k32(-1), k32(1)))
    inexact = s.and_(s.ne(back, wide), s.eq(wide, wide))
    return s.bitcast(s.select(s.and_(inexact, even), odd_bits, bits), f32)


# ------------------------------------------------------------------------------------------------------ random
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_WORD = 0xFFFFFFFF


def _as_i32(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def philox_4x32_10(s: Builder, counter: tuple[H, H, H, H], key: tuple[H, H]) -> tuple[H, H, H, H]:
    """Four random i32 words from a counter of four words and a key of two (Philox-4x32-10: Salmon et al., Parallel random
    numbers: as easy as 1, 2, 3, SC 2011). All words are i32, their bits read as unsigned; lowest word first."""
    c0, c1, c2, c3 = counter
    key0, key1 = key

    def product(word: H, multiplier: int) -> tuple[H, H]:
        unsigned = s.and_(s.convert(word, i64), s.const(_LOW_WORD, i64))
        full = s.mul(unsigned, s.const(multiplier, i64))
        return s.convert(s.lshr(full, s.const(32, i64)), i32), s.convert(full, i32)

    for step in range(10):
        if step:
            key0 = s.add(key0, s.const(_as_i32(_PHILOX_WEYL[0]), i32))
            key1 = s.add(key1, s.const(_as_i32(_PHILOX_WEYL[1]), i32))
        high0, low0 = product(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = product(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = s.xor(s.xor(high1, c1), key0), low1, s.xor(s.xor(high0, c3), key1), low0
    return c0, c1, c2, c3


def bits_to_uniform(s: Builder, *words: H) -> H:
    """Uniform in [0, 1) from i32 words: one word gives f32 with 24 bits (the word's upper ones), two give f64 with 53 (all of
    the first, the upper 21 of the second)."""
    if len(words) not in (1, 2) or any(s.dtype_of(w) is not i32 for w in words):
        raise DTypeError("bits_to_uniform takes one i32 word (f32) or two (f64)")
    if len(words) == 1:
        return s.mul(s.convert(s.lshr(words[0], s.const(8, i32)), f32), s.const(2.0**-24, f32))
    k = literals(s, i64)
    high, low = (s.and_(s.convert(w, i64), k(_LOW_WORD)) for w in words)
    bits = s.or_(s.shl(high, k(21)), s.lshr(low, k(11)))
    return s.mul(s.convert(bits, f64), s.const(2.0**-53, f64))
