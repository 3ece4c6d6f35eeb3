"""Recipes of sin, cos, tan and their inverses, for f32 and f64; within 2.5 ulp.

Every finite f32 argument is reduced exactly enough (Payne and Hanek 1983: only the bits of 2/pi that matter for the
argument's magnitude are multiplied, here in f64). f64 arguments are reduced by pi/2 in three parts, good for |x| <= 2^45; beyond, the results
of sin and cos stay within [-1, 1] but carry no information about x. Infinities give NaN.
"""

from __future__ import annotations

from duo_ir.scalar.common import INT_OF, Builder, H, at_least, at_most, float_of, horner, literals
from duo_ir.types import DType, f32, f64, i32, i64

# floor(2/pi * 2^256)
_TWO_OVER_PI_256 = 0xA2F9836E4E441529FC2757D1F534DDC0DB6295993C439041FE5163ABDEBBC561
_TWO_OVER_PI = 0.6366197723675814
_PI_2 = (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591833e-33)  # pi/2 in three f64


def _window(drop: int) -> tuple[float, float]:
    """2/pi without its bits of weight >= 2^-drop, as the sum of two f64 (106 bits)."""
    left = _TWO_OVER_PI_256 & ((1 << (256 - drop)) - 1)
    cut = max(left.bit_length() - 53, 0)
    high = left >> cut << cut
    return high / 2**256, (left - high) / 2**256


# |x| from `bound` on is a multiple of 2^(drop + 2), so bits of 2/pi dropped there only add multiples of 4 quarter turns.
_WINDOWS = ((2.0**51, 26), (2.0**78, 53), (2.0**105, 80))

# (sin(x)/x - 1)/x^2, (cos(x) - 1 + x^2/2)/x^4, (tan(x)/x - 1)/x^2 in x^2 on |x| <= pi/4, relative to the function:
# f32 2^-28.0, 2^-33.1, 2^-29.3; f64 2^-63.2, 2^-69.1
_SIN = {
    f32: (-0.16666655242443085, 0.008332191035151482, -0.00019518604676704854),
    f64: (
        -0.16666666666666666, 0.008333333333333038, -0.00019841269840955867, 2.755731906959661e-06,
        -2.5052069600777296e-08, 1.6054126356225364e-10, -7.379660844117183e-13,
    ),
}  # fmt: skip
_COS = {
    f32: (0.04166664555668831, -0.00138873013202101, 2.4430661142105237e-05),
    f64: (
        0.041666666666666664, -0.0013888888888888376, 2.4801587301161617e-05, -2.755731905013004e-07,
        2.0876719267227855e-09, -1.1466521322168643e-11, 4.576386843321983e-14,
    ),
}  # fmt: skip
_TAN_F32 = (
    0.3333335220813751, 0.13332583010196686, 0.05406865105032921, 0.02123861201107502, 0.010945532470941544,
    -4.6164928789949045e-05, 0.004441814962774515,
)  # fmt: skip


def _quadrant(s: Builder, k: H) -> H:
    """An i32 whose two low bits are the integral f64 `k` modulo 4; any bits when k is not finite."""
    c = literals(s, f64)
    rest = s.fma(s.rint(s.mul(k, c(0.25))), c(-4.0), k)
    return s.bitcast(s.add(s.convert(rest, f32), s.const(1.5 * 2.0**23, f32)), i32)


def _reduce_f32(s: Builder, x: H) -> tuple[H, H]:
    """(r, quadrant): x = r + quadrant*pi/2 modulo 2*pi, |r| <= pi/4, r rounded once to f32."""
    c = literals(s, f64)
    ax = s.fabs(x)
    high, low = map(c, _window(0))
    for bound, drop in _WINDOWS:
        beyond = s.ge(ax, s.const(bound, f32))
        h, l = _window(drop)  # noqa: E741
        high, low = s.select(beyond, c(h), high), s.select(beyond, c(l), low)
    wide = s.convert(x, f64)
    product = s.mul(wide, high)
    rest = s.fma(wide, low, s.fma(wide, high, s.neg(product)))
    k = s.rint(product)
    turns = s.add(s.sub(product, k), rest)
    more = s.rint(turns)  # `rest` is up to half a turn where the product has no fraction bits left
    turns = s.sub(turns, more)
    return s.convert(s.mul(turns, c(_PI_2[0])), f32), _quadrant(s, s.add(k, more))


def _reduce_f64(s: Builder, x: H) -> tuple[H, H, H]:
    """(r, r_low, quadrant): x = r + r_low + quadrant*pi/2 modulo 2*pi, |r| <= pi/4 for |x| <= 2^45."""
    c = literals(s, f64)
    k = s.rint(s.mul(x, c(_TWO_OVER_PI)))
    minus_k = s.neg(k)
    first = s.fma(minus_k, c(_PI_2[0]), x)  # exact: x and the product agree in their leading bits
    second = s.mul(minus_k, c(_PI_2[1]))
    second_low = s.fma(minus_k, c(_PI_2[1]), s.neg(second))
    total = s.add(first, second)
    shadow = s.sub(total, first)
    error = s.add(s.sub(first, s.sub(total, shadow)), s.sub(second, shadow))
    low = s.fma(minus_k, c(_PI_2[2]), s.add(error, second_low))
    r = s.add(total, low)
    r_low = s.add(s.sub(total, r), low)
    far = s.gt(s.fabs(x), c(2.0**45))
    r = s.select(far, at_least(s, at_most(s, r, 0.75), -0.75), r)
    return r, s.select(far, c(0.0), r_low), _quadrant(s, k)


def _sin_cos(s: Builder, x: H, dtype: DType) -> tuple[H, H, H]:
    """(sin r, cos r, quadrant) of the reduced argument."""
    k = literals(s, dtype)
    if dtype is f32:
        r, quadrant = _reduce_f32(s, x)
        z = s.mul(r, r)
        sine = s.fma(s.mul(r, z), horner(s, z, _SIN[f32]), r)
        return sine, horner(s, z, (1.0, -0.5, *_COS[f32])), quadrant
    r, low, quadrant = _reduce_f64(s, x)
    z = s.mul(r, r)
    correction = s.mul(low, s.fma(z, k(-0.5), k(1.0)))
    sine = s.add(r, s.fma(s.mul(r, z), horner(s, z, _SIN[f64]), correction))
    half = s.mul(z, k(0.5))
    near = s.sub(k(1.0), half)
    lost = s.sub(s.sub(k(1.0), near), half)
    tail = s.fma(s.mul(z, z), horner(s, z, _COS[f64]), s.neg(s.mul(r, low)))
    return sine, s.add(near, s.add(lost, tail)), quadrant


def _flip(s: Builder, value: H, quadrant: H, bit: int) -> H:
    """-value where that bit of the quadrant is set."""
    dtype = s.dtype_of(value)
    integer = INT_OF[dtype]
    sign = s.and_(quadrant, s.const(bit, i32))
    if dtype is f64:
        sign = s.convert(sign, i64)
    moved = s.shl(sign, s.const(dtype.bits - bit.bit_length(), integer))
    return s.bitcast(s.xor(s.bitcast(value, integer), moved), dtype)


def _is_odd(s: Builder, quadrant: H) -> H:
    return s.ne(s.and_(quadrant, s.const(1, i32)), s.const(0, i32))


def _odd_near_zero(s: Builder, x: H, value: H) -> H:
    """`value`, or x itself where the function is x to within half an ulp (also keeps -0.0)."""
    dtype = s.dtype_of(x)
    return s.select(s.lt(s.fabs(x), s.const(2.0**-13 if dtype is f32 else 2.0**-27, dtype)), x, value)


def sin(s: Builder, x: H) -> H:
    """Sine of x in radians."""
    sine, cosine, quadrant = _sin_cos(s, x, float_of(s, x, "sin"))
    return _odd_near_zero(s, x, _flip(s, s.select(_is_odd(s, quadrant), cosine, sine), quadrant, 2))


def cos(s: Builder, x: H) -> H:
    """Cosine of x in radians."""
    sine, cosine, quadrant = _sin_cos(s, x, float_of(s, x, "cos"))
    value = s.select(_is_odd(s, quadrant), sine, cosine)
    return _flip(s, value, s.add(quadrant, s.const(1, i32)), 2)


def tan(s: Builder, x: H) -> H:
    """Tangent of x in radians."""
    dtype = float_of(s, x, "tan")
    one = s.const(1.0, dtype)
    if dtype is f32:
        r, quadrant = _reduce_f32(s, x)
        z = s.mul(r, r)
        t = s.fma(s.mul(r, z), horner(s, z, _TAN_F32), r)
        value = s.select(_is_odd(s, quadrant), s.div(s.neg(one), t), t)
        return _odd_near_zero(s, x, value)
    sine, cosine, quadrant = _sin_cos(s, x, dtype)
    odd = _is_odd(s, quadrant)
    value = s.div(s.select(odd, s.neg(cosine), sine), s.select(odd, sine, cosine))
    return _odd_near_zero(s, x, value)


# ----------------------------------------------------------------------------------------------------- inverses
# (asin(x)/x - 1)/x^2 in x^2 on |x| <= 1/2: f32 2^-27.6, f64 2^-59.1
_ASIN = {
    f32: (0.16666753590106964, 0.07495249062776566, 0.04547666385769844, 0.024148087948560715, 0.04221990332007408),
    f64: (
        0.16666666666666763, 0.07499999999970097, 0.044642857175288604, 0.030381942675109318, 0.022372215911526584,
        0.017351595388693946, 0.013981019969948027, 0.011397280613318916, 0.010789394404232332, 0.00367189597442981,
        0.021791378528908053, -0.021117790698724076, 0.03270285280570852,
    ),
}  # fmt: skip
# (atan(x)/x - 1)/x^2 in x^2: f32 on |x| <= 1, 2^-28.7; f64 on |x| <= sqrt(2) - 1, 2^-58.4
_ATAN = {
    f32: (
        -0.33333301544189453, 0.1999862641096115, -0.14265091717243195, 0.1095665693283081, -0.08416454493999481,
        0.05817786976695061, -0.03139415755867958, 0.011028744280338287, -0.0018186505185440183,
    ),
    f64: (
        -0.333333333333332, 0.19999999999954052, -0.14285714280244938, 0.11111110785940057, -0.09090897830277268,
        0.07692061519622115, -0.0666311896973758, 0.05847998113873573, -0.05039794765499011, 0.038076984308428874,
        -0.017920768703621425,
    ),
}  # fmt: skip
_HALF_PI = {f32: (1.5707963705062866, -4.371138828673793e-08), f64: _PI_2[:2]}


def _odd_polynomial(s: Builder, x: H, coefficients: tuple[float, ...]) -> H:
    """x + x^3 * P(x^2)."""
    z = s.mul(x, x)
    return s.fma(s.mul(x, z), horner(s, z, coefficients), x)


def _minus_from(s: Builder, constant: tuple[float, float], x: H) -> H:
    """constant - x, the constant in two parts."""
    k = literals(s, s.dtype_of(x))
    return s.sub(k(constant[0]), s.sub(x, k(constant[1])))


def _asin_halves(s: Builder, x: H) -> tuple[H, H]:
    """(|x| > 1/2, t) with t = asin|x| when |x| <= 1/2, else asin sqrt((1 - |x|)/2), which is acos(|x|)/2; NaN for |x| > 1."""
    dtype = s.dtype_of(x)
    k = literals(s, dtype)
    ax = s.fabs(x)
    big = s.gt(ax, k(0.5))
    z = s.select(big, s.mul(s.sub(k(1.0), ax), k(0.5)), s.mul(ax, ax))
    base = s.select(big, s.sqrt(z), ax)
    return big, s.fma(s.mul(base, z), horner(s, z, _ASIN[dtype]), base)


def asin(s: Builder, x: H) -> H:
    """Arc sine in radians; NaN outside [-1, 1]."""
    dtype = float_of(s, x, "asin")
    big, t = _asin_halves(s, x)
    return s.copysign(s.select(big, _minus_from(s, _HALF_PI[dtype], s.add(t, t)), t), x)


def acos(s: Builder, x: H) -> H:
    """Arc cosine in radians, in [0, pi]; NaN outside [-1, 1]."""
    dtype = float_of(s, x, "acos")
    high, low = _HALF_PI[dtype]
    big, t = _asin_halves(s, x)
    twice = s.add(t, t)
    far = s.select(s.lt(x, s.const(0.0, dtype)), _minus_from(s, (2 * high, 2 * low), twice), twice)
    return s.select(big, far, _minus_from(s, (high, low), s.copysign(t, x)))


def atan(s: Builder, x: H) -> H:
    """Arc tangent in radians, in [-pi/2, pi/2]."""
    dtype = float_of(s, x, "atan")
    k = literals(s, dtype)
    one, ax = k(1.0), s.fabs(x)
    high, low = _HALF_PI[dtype]
    if dtype is f32:
        big = s.gt(ax, one)
        t = _odd_polynomial(s, s.select(big, s.div(one, ax), ax), _ATAN[f32])
        return s.copysign(s.select(big, _minus_from(s, (high, low), t), t), x)
    # Above tan(3*pi/8): pi/2 + atan(-1/x); above tan(pi/8): pi/4 + atan((x-1)/(x+1)).
    middle, big = s.gt(ax, k(0.41421356237309503)), s.gt(ax, k(2.414213562373095))
    top = s.select(big, k(-1.0), s.select(middle, s.sub(ax, one), ax))
    bottom = s.select(big, ax, s.select(middle, s.add(ax, one), one))
    t = s.div(top, bottom)
    z = s.mul(t, t)
    base = s.select(big, k(high), s.select(middle, k(high / 2), k(0.0)))
    base_low = s.select(big, k(low), s.select(middle, k(low / 2), k(0.0)))
    tail = s.fma(s.mul(t, z), horner(s, z, _ATAN[f64]), base_low)
    return s.copysign(s.add(base, s.add(t, tail)), x)
