"""Recipes of the exponential and logarithm families, pow, and what is made of them (tanh, sigmoid, sinh, cosh).

All take f32 or f64 and use selects, never branches. exp and log are within 1 ulp, the others within 2.5. Range
reduction adds 1.5*2^mantissa so that the sum's low bits are the rounded multiple: no conversion that could be undefined.
"""

from __future__ import annotations

from dataclasses import dataclass

from duo_ir.scalar.common import (
    INF,
    INT_OF,
    MANTISSA,
    NAN,
    Builder,
    H,
    at_least,
    at_most,
    float_of,
    horner,
    literals,
)
from duo_ir.types import DType, f32, f64, i64

LN2 = 0.6931471805599453
LN2_LOW = 2.3190468138462996e-17  # ln 2 - LN2
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class _Constants:
    """Per dtype: ln 2 in two parts, exponent bias, bounds of exp and expm1, and the polynomials."""

    ln2: tuple[float, float]
    bias: int
    magic: float  # 1.5 * 2^mantissa
    exp_range: tuple[float, float]  # outside: exp is 0 or infinite
    minus_one: float  # below: expm1 is -1
    tanh_one: float  # above: tanh is 1
    hyperbolic_range: float  # above: sinh and cosh are infinite
    exp: tuple[float, ...]
    expm1: tuple[float, ...]
    exp2: tuple[float, ...]
    exp2_range: tuple[float, float]


_OF = {
    f32: _Constants(
        ln2=(0.693147182464599609375, -1.9046542121259336e-09),
        bias=127,
        magic=1.5 * 2.0**23,
        exp_range=(-104.0, 89.0),
        minus_one=-20.0,
        tanh_one=10.0,
        hyperbolic_range=89.5,
        # (expm1(x) - x) / x^2 on |x| <= ln(2)/2: relative to exp 2^-28.1, and relative to expm1 2^-28.2
        exp=(0.4999999403953552, 0.16666516661643982, 0.041668251156806946, 0.008369087241590023, 0.0013822203036397696),
        expm1=(
            0.5, 0.16666635870933533, 0.041666511446237564, 0.008341604843735695, 0.0013930548448115587,
            0.00014932914928067476,
        ),
        # (2^x - 1) / x on |x| <= 1/2, relative to 2^x: 2^-26.3
        exp2=(
            0.6931471824645996, 0.24022594094276428, 0.055503662675619125, 0.009625446982681751,
            0.0013387928484007716, 0.0001333146938122809,
        ),
        exp2_range=(-151.0, 129.0),
    ),
    f64: _Constants(
        ln2=(LN2, LN2_LOW),
        bias=1023,
        magic=1.5 * 2.0**52,
        exp_range=(-746.0, 710.0),
        minus_one=-40.0,
        tanh_one=20.0,
        hyperbolic_range=710.6,
        # as above, both relative to expm1: 2^-54.7 and 2^-60.0
        exp=(
            0.5000000000000006, 0.16666666666666588, 0.04166666666657648, 0.008333333333389694,
            0.0013888888931666888, 0.00019841269718950388, 2.4801505141227806e-05, 2.7557407371498037e-06,
            2.762609379596316e-07, 2.505389853776108e-08,
        ),
        expm1=(
            0.5, 0.16666666666666677, 0.04166666666666651, 0.008333333333321655, 0.0013888888888962318,
            0.00019841269886070403, 2.4801587172760207e-05, 2.755724425679661e-06, 2.75574023441269e-07,
            2.5109023733296256e-08, 2.087545723994738e-09,
        ),
        # as above: 2^-55.6
        exp2=(
            0.6931471805599453, 0.24022650695910072, 0.05550410866482169, 0.00961812910762833,
            0.0013333558146392688, 0.00015403530393640695, 1.525273385431989e-05, 1.3215486594935445e-06,
            1.0178051941144333e-07, 7.054974468356794e-09, 4.4565706526831143e-10, 2.5625435891486326e-11,
        ),
        exp2_range=(-1076.0, 1025.0),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- exponentials
def _reduce(s: Builder, x: H, offset: int) -> tuple[H, H, H]:
    """r = x - n*ln2 with |r| <= ln(2)/2, n, and an integer whose low bits are n + offset."""
    c = _OF[s.dtype_of(x)]
    k = literals(s, s.dtype_of(x))
    magic = k(c.magic + offset)
    shifted = s.fma(x, k(LOG2E), magic)
    n = s.sub(shifted, magic)
    r = s.fma(n, k(-c.ln2[0]), x)
    return s.fma(n, k(-c.ln2[1]), r), n, s.bitcast(shifted, INT_OF[s.dtype_of(x)])


def _power_of_two(s: Builder, biased: H, dtype: DType) -> H:
    """2^n from an integer whose low bits are n + bias (a normal exponent)."""
    return s.bitcast(s.shl(biased, s.const(MANTISSA[dtype], INT_OF[dtype])), dtype)


def _expm1_reduced(s: Builder, r: H) -> H:
    """expm1 on |r| <= ln(2)/2."""
    q = horner(s, r, _OF[s.dtype_of(r)].expm1)
    return s.fma(s.mul(r, r), q, r)


def _exp_reduced(s: Builder, r: H) -> H:
    """exp on |r| <= ln(2)/2: one fma chain down to 1 + r*(1 + ...)."""
    return horner(s, r, (1.0, 1.0, *_OF[s.dtype_of(r)].exp))


def exp(s: Builder, x: H) -> H:
    """e^x within 1 ulp; overflow gives inf, underflow is gradual."""
    low, high = _OF[float_of(s, x, "exp")].exp_range
    return _exp_in_range(s, at_least(s, at_most(s, x, high), low))


def _exp_in_range(s: Builder, x: H) -> H:
    r, n, _ = _reduce(s, x, 0)
    return s.ldexp(_exp_reduced(s, r), n)


def exp_parts(s: Builder, x: H, x_low: H) -> tuple[H, H]:
    """e^(x + x_low) = p * power, p in [0.7, 1.42], power a normal power of two (so |x| < 87 for f32, 708 for f64)."""
    r, _, biased = _reduce(s, x, _OF[s.dtype_of(x)].bias)
    return _exp_reduced(s, s.add(r, x_low)), _power_of_two(s, biased, s.dtype_of(x))


def exp2(s: Builder, x: H) -> H:
    """2^x; exact at integers."""
    dtype = float_of(s, x, "exp2")
    c, k = _OF[dtype], literals(s, dtype)
    x = at_least(s, at_most(s, x, c.exp2_range[1]), c.exp2_range[0])
    n = s.sub(s.add(x, k(c.magic)), k(c.magic))
    return s.ldexp(horner(s, s.sub(x, n), (1.0, *c.exp2)), n)


def _expm1_scaled(s: Builder, x: H, down: int) -> H:
    """expm1(x) / 2^down = q * 2^(n-down) + (2^(n-down) - 2^-down), where 2^(n-down) must be a normal number."""
    dtype = s.dtype_of(x)
    k = literals(s, dtype)
    r, _, biased = _reduce(s, x, _OF[dtype].bias - down)
    power = _power_of_two(s, biased, dtype)
    return s.fma(_expm1_reduced(s, r), power, s.sub(power, k(2.0**-down)))


def _tiny(s: Builder, x: H) -> H:
    """Where f(x) = x + O(x^2) rounds to within half an ulp of x (also keeps -0.0 and denormals)."""
    dtype = s.dtype_of(x)
    return s.lt(s.fabs(x), s.const(2.0 ** -(MANTISSA[dtype] + 1), dtype))


def expm1(s: Builder, x: H) -> H:
    """e^x - 1 without cancellation near 0."""
    dtype = float_of(s, x, "expm1")
    c = _OF[dtype]
    inside = at_least(s, at_most(s, x, c.exp_range[1]), c.minus_one)
    return s.select(_tiny(s, x), x, s.mul(_expm1_scaled(s, inside, 1), s.const(2.0, dtype)))


def sinh(s: Builder, x: H) -> H:
    """(e^x - e^-x) / 2 = g + g / (2g + 1) with g = expm1(|x|) / 2, carried at half scale against early overflow."""
    dtype = float_of(s, x, "sinh")
    k = literals(s, dtype)
    g = _expm1_scaled(s, at_most(s, s.fabs(x), _OF[dtype].hyperbolic_range), 2)
    half = s.add(g, s.div(g, s.fma(g, k(4.0), k(1.0))))
    return s.select(_tiny(s, x), x, s.copysign(s.add(half, half), x))


def cosh(s: Builder, x: H) -> H:
    """(e^x + e^-x) / 2, from a quarter of e^|x| against early overflow."""
    dtype = float_of(s, x, "cosh")
    k = literals(s, dtype)
    r, _, biased = _reduce(s, at_most(s, s.fabs(x), _OF[dtype].hyperbolic_range), _OF[dtype].bias - 2)
    quarter = s.mul(_exp_reduced(s, r), _power_of_two(s, biased, dtype))
    half = s.add(quarter, s.div(k(0.0625), quarter))
    return s.add(half, half)


def tanh(s: Builder, x: H) -> H:
    """e / (e + 2) with e = expm1(2|x|), and the sign of x."""
    dtype = float_of(s, x, "tanh")
    y = at_most(s, s.fabs(x), _OF[dtype].tanh_one)
    e = _expm1_scaled(s, s.add(y, y), 0)
    return s.copysign(s.div(e, s.add(e, s.const(2.0, dtype))), x)


def sigmoid(s: Builder, x: H) -> H:
    """1 / (1 + e^-x), from e^-|x| so that neither tail overflows nor flushes."""
    dtype = float_of(s, x, "sigmoid")
    one = s.const(1.0, dtype)
    e = _exp_in_range(s, at_least(s, s.neg(s.fabs(x)), _OF[dtype].exp_range[0]))
    return s.div(s.select(s.lt(x, s.const(0.0, dtype)), e, one), s.add(one, e))


# --------------------------------------------------------------------------------------------------- logarithms
# Bits of the lower end of the mantissa's interval: 2/3 for f32 (symmetric about 1), sqrt(1/2) for f64 (symmetric in
# (m-1)/(m+1), which f64 divides for).
_LOWER = {f32: 0x3F2AAAAB, f64: 0x3FE6A09E667F3BCD}
# (log1p(x) - x + x^2/2) / x^3 on |x| <= 1/3, relative to log1p: 2^-27.4
_LOG1P_F32 = (
    0.3333321511745453, -0.24999797344207764, 0.20010408759117126, -0.16680482029914856, 0.14005835354328156,
    -0.1218433603644371, 0.13984589278697968, -0.12891387939453125,
)  # fmt: skip
# (2*atanh(u) - 2*u) / u^3 in u^2, |u| <= 0.1716, relative to the logarithm: 2^-59.5
_ATANH_F64 = (
    0.6666666666666734, 0.3999999999941628, 0.2857142874216253, 0.22222198586962136, 0.18183563978743858,
    0.15314051810577425, 0.14796001480910814,
)  # fmt: skip


def _log1p_reduced(s: Builder, f: H, e: H) -> H:
    """log(1 + f) + e*ln2 for f in the reduced interval and an integral e; accurate relative to the result when e = 0."""
    dtype = s.dtype_of(f)
    k = literals(s, dtype)
    c = _OF[dtype]
    if dtype is f32:
        q = s.fma(horner(s, f, _LOG1P_F32), f, k(-0.5))
        return s.fma(e, k(c.ln2[0]), s.fma(s.mul(f, f), q, f))
    # With u = f/(2+f) and h = f^2/2: log(1+f) = f - (h - u*(h + R)), fdlibm's arrangement, which rounds f only once.
    u = s.div(f, s.add(f, k(2.0)))
    z = s.mul(u, u)
    h = s.mul(s.mul(f, k(0.5)), f)
    small = s.mul(u, s.fma(horner(s, z, _ATANH_F64), z, h))
    small = s.fma(e, k(c.ln2[1]), small)
    return s.fma(e, k(c.ln2[0]), s.sub(f, s.sub(h, small)))


def _decompose(s: Builder, x: H) -> tuple[H, H]:
    """(m - 1, e) with x = m * 2^e, m from `_LOWER` up to twice that; x positive and finite, denormals included."""
    dtype = s.dtype_of(x)
    k, i = literals(s, dtype), literals(s, INT_OF[dtype])
    small = s.lt(x, k(2.0 ** (1 - _OF[dtype].bias)))
    lift = MANTISSA[dtype]
    bits = s.bitcast(s.select(small, s.mul(x, k(2.0**lift)), x), INT_OF[dtype])
    exponent = s.ashr(s.sub(bits, i(_LOWER[dtype])), i(MANTISSA[dtype]))
    m = s.bitcast(s.sub(bits, s.shl(exponent, i(MANTISSA[dtype]))), dtype)
    e = s.convert(exponent, dtype)
    return s.sub(m, k(1.0)), s.select(small, s.sub(e, k(float(lift))), e)


def _log_specials(s: Builder, x: H, value: H, zero: float) -> H:
    """`value` for finite x > zero; -inf at zero, inf at inf, NaN below zero and for NaN."""
    k = literals(s, s.dtype_of(x))
    value = s.select(s.eq(x, k(INF)), x, value)
    return s.select(s.gt(x, k(zero)), value, s.select(s.eq(x, k(zero)), k(-INF), k(NAN)))


def log(s: Builder, x: H) -> H:
    """Natural logarithm within 1 ulp."""
    float_of(s, x, "log")
    return _log_specials(s, x, _log1p_reduced(s, *_decompose(s, x)), 0.0)


def log2(s: Builder, x: H) -> H:
    """Base-2 logarithm; exact at powers of two."""
    k = literals(s, float_of(s, x, "log2"))
    f, e = _decompose(s, x)
    return _log_specials(s, x, s.fma(_log1p_reduced(s, f, k(0.0)), k(LOG2E), e), 0.0)


def log1p(s: Builder, x: H) -> H:
    """log(1 + x) without cancellation near 0: 1 + x picks the exponent e only; the reduced argument is
    x*2^-e + (2^-e - 1), rounded once (after N. Juffa's public posts on log1pf)."""
    dtype = float_of(s, x, "log1p")
    k, i = literals(s, dtype), literals(s, INT_OF[dtype])
    u = s.add(x, k(1.0))
    width = i(MANTISSA[dtype])
    exponent = s.ashr(s.sub(s.bitcast(u, INT_OF[dtype]), i(_LOWER[dtype])), width)
    shift = s.shl(exponent, width)
    scaled = s.bitcast(s.sub(s.bitcast(x, INT_OF[dtype]), shift), dtype)
    # 4 * 2^-e stays a normal number for every e that 1 + x can have; 2^-e may not.
    power = s.bitcast(s.sub(i((_OF[dtype].bias + 2) << MANTISSA[dtype]), shift), dtype)
    f = s.add(scaled, s.fma(power, k(0.25), k(-1.0)))
    value = _log1p_reduced(s, f, s.convert(exponent, dtype))
    return s.select(s.eq(u, k(1.0)), x, _log_specials(s, x, value, -1.0))


def rsqrt(s: Builder, x: H) -> H:
    """1 / sqrt(x), two roundings."""
    return s.div(s.const(1.0, float_of(s, x, "rsqrt")), s.sqrt(x))


# ---------------------------------------------------------------------------------------------------------- pow
# (2/ln2)*atanh(u)/u = c0 + u^2 * c(u^2) on |u| <= 0.1716, relative: 2^-44.4 (f64 arithmetic of an f32 pow)
_LOG2_F32 = (0.9617966940579484, 0.5770779531216137, 0.4122084101143843, 0.319934399196533, 0.28254543881560207)
# (2^x - 1) / x on |x| <= 1/2, relative to 2^x: 2^-34.3
_EXP2_POW = (
    0.6931471807044675, 0.24022651066550763, 0.05550410366218353, 0.009618038133387241, 0.001333393487646956,
    0.00015466755993142803, 1.5196196295082312e-05,
)  # fmt: skip
# (2*atanh(u) - 2*u - (2/3)*u^3) / u^5 in u^2, |u| <= 0.1716, relative to the logarithm: 2^-66.3
_POW_F64 = (
    0.3999999999999998, 0.2857142857144514, 0.2222222221753004, 0.1818181887110393, 0.1538455681715984,
    0.13336319489295212, 0.11674776496807424, 0.11989363022188956,
)  # fmt: skip
_TWO_THIRDS = (0.6666666666666666, 3.700743415417188e-17)


def _pow_f32(s: Builder, x: H, y: H) -> H:
    """x^y for x >= 0 as 2^(y * log2 x) in f64, whose 53 bits and range need no second part and no gradual underflow:
    the only rounding to f32 is the last."""
    k, i = literals(s, f64), literals(s, i64)
    bits = s.bitcast(s.convert(x, f64), i64)
    exponent = s.ashr(s.sub(bits, i(_LOWER[f64])), i(52))
    m = s.bitcast(s.sub(bits, s.shl(exponent, i(52))), f64)
    u = s.div(s.sub(m, k(1.0)), s.add(m, k(1.0)))
    z = s.mul(u, u)
    # e from the low bits of a sum: cheaper than a 64-bit conversion where there is no such instruction.
    e = s.sub(s.bitcast(s.add(exponent, i(0x4338000000000000)), f64), k(1.5 * 2.0**52))
    log2x = s.fma(u, s.fma(z, horner(s, z, _LOG2_F32), k(2.0 * LOG2E)), e)
    t = at_least(s, at_most(s, s.mul(s.convert(y, f64), log2x), 140.0), -160.0)
    magic = k(1.5 * 2.0**52 + 1023)
    shifted = s.add(t, magic)
    p = horner(s, s.sub(t, s.sub(shifted, magic)), (1.0, *_EXP2_POW))
    return s.convert(s.mul(p, _power_of_two(s, s.bitcast(shifted, i64), f64)), f32)


def _log_extended(s: Builder, x: H) -> tuple[H, H]:
    """log x as an unevaluated sum of two f64, about 65 bits; x positive and finite.

    u = (m-1)/(m+1), then 2u + u^3*(2/3 + u^2*P(u^2)) with u, u^2, the bracket and the sums carried in two parts.
    """
    k = literals(s, f64)
    f, e = _decompose(s, x)
    m = s.add(f, k(1.0))
    g = s.add(f, k(2.0))
    g_low = s.sub(m, s.sub(g, k(1.0)))
    inverse = s.div(k(1.0), g)
    u = s.mul(f, inverse)
    u_low = s.mul(s.fma(s.neg(u), g_low, s.fma(s.neg(u), g, f)), inverse)
    z = s.mul(u, u)
    z_low = s.fma(s.add(u, u), u_low, s.fma(u, u, s.neg(z)))
    tail = s.mul(z, horner(s, z, _POW_F64))
    q = s.add(tail, k(_TWO_THIRDS[0]))
    q_low = s.add(s.add(s.sub(k(_TWO_THIRDS[0]), q), tail), k(_TWO_THIRDS[1]))
    v, v_low = _product(s, z, z_low, q, q_low)
    w, w_low = _product(s, u, u_low, v, v_low)
    two_u = s.add(u, u)
    a = s.add(two_u, w)
    a_low = s.add(s.add(s.sub(two_u, a), w), s.fma(u_low, k(2.0), w_low))
    b = s.mul(e, k(LN2))
    b_low = s.fma(e, k(LN2_LOW), s.fma(e, k(LN2), s.neg(b)))
    high = s.add(b, a)
    low = s.add(s.add(s.sub(b, high), a), s.add(b_low, a_low))
    total = s.add(high, low)
    return total, s.add(s.sub(high, total), low)


def _product(s: Builder, a: H, a_low: H, b: H, b_low: H) -> tuple[H, H]:
    """(a + a_low) * (b + b_low) in two parts."""
    high = s.mul(a, b)
    return high, s.fma(a_low, b, s.fma(a, b_low, s.fma(a, b, s.neg(high))))


def _pow_f64(s: Builder, x: H, y: H) -> H:
    """x^y for x >= 0, x not 0 or inf (which the caller selects), by the logarithm in two parts."""
    k = literals(s, f64)
    log_high, log_low = _log_extended(s, x)
    y = at_least(s, at_most(s, y, 2.0**64), -(2.0**64))  # beyond, x^y is 0, 1 or inf already
    t = s.mul(y, log_high)
    t_low = s.fma(y, log_low, s.fma(y, log_high, s.neg(t)))
    t_low = s.select(s.gt(s.fabs(t), k(800.0)), k(0.0), t_low)
    low, high = _OF[f64].exp_range
    r, n, _ = _reduce(s, at_least(s, at_most(s, t, high + 1.0), low - 1.0), 0)
    return s.ldexp(_exp_reduced(s, s.add(r, t_low)), n)


def pow(s: Builder, x: H, y: H) -> H:
    """x^y with IEEE 754-2019's special cases: x^0 = 1^y = 1 also for NaN, (-1)^(+-inf) = 1, a negative base needs an integral y."""
    dtype = float_of(s, x, "pow")
    k, integer = literals(s, dtype), INT_OF[dtype]
    zero, one = k(0.0), k(1.0)
    ax = s.fabs(x)
    value = _pow_f32(s, ax, y) if dtype is f32 else _pow_f64(s, ax, y)
    edge = s.or_(s.eq(ax, zero), s.eq(ax, k(INF)))
    value = s.select(edge, s.select(s.xor(s.eq(ax, zero), s.lt(y, zero)), zero, k(INF)), value)
    half = s.mul(y, k(0.5))
    whole = s.eq(y, s.trunc(y))
    odd = s.and_(whole, s.ne(half, s.trunc(half)))
    negative = s.lt(s.bitcast(x, integer), s.const(0, integer))
    value = s.select(s.and_(negative, odd), s.neg(value), value)
    undefined = s.and_(s.and_(s.lt(x, zero), s.gt(x, k(-INF))), s.not_(whole))
    undefined = s.or_(undefined, s.or_(s.ne(x, x), s.ne(y, y)))
    value = s.select(undefined, k(NAN), value)
    is_one = s.or_(s.eq(y, zero), s.eq(x, one))
    is_one = s.or_(is_one, s.and_(s.eq(x, k(-1.0)), s.eq(s.fabs(y), k(INF))))
    return s.select(is_one, one, value)
