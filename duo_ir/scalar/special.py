"""Recipes of erf, its inverse, and the normal quantile, for f32 and f64.

erf is within 1 ulp. The inverses are within 2.5 ulp in f32; in f64 they are Wichura's algorithm AS 241 (PPND16, Applied Statistics 37,
1988), good to about one part in 10^15.
"""

from __future__ import annotations

from duo_ir.scalar.common import INF, NAN, Builder, H, at_most, float_of, horner, literals
from duo_ir.scalar.explog import exp_parts, log
from duo_ir.types import f32, f64

# Where the two formulas of erf meet, and where erf rounds to 1.
_ERF_SPLIT = {f32: 0.926, f64: 1.0}
_ERF_ONE = {f32: 3.93, f64: 5.95}
# erf(x)/x - 1 in x^2 below the split, relative to erf: f32 2^-30.0, f64 2^-56.3
_ERF_SMALL = {
    f32: (
        0.12837916612625122, -0.3761262893676758, 0.11283625662326813, -0.026855729520320892, 0.005192393437027931,
        -0.0008049544412642717, 7.995278429007158e-05,
    ),
    f64: (
        0.1283791670955126, -0.3761263890318375, 0.11283791670954857, -0.02686617064507279, 0.005223977624779737,
        -0.0008548326978672757, 0.00012055331034229889, -1.4925593439892311e-05, 1.6460971701782468e-06,
        -1.6350013011524396e-07, 1.465779532035481e-08, -1.136533072827378e-09, 5.944681248910724e-11,
    ),
}  # fmt: skip
# log(erfc(x))/-x in x between split and one; effect on erf: f32 2^-30.4, f64 2^-58.8
_ERF_BIG = {
    f32: (
        1.1286512613296509, 0.635140061378479, 0.10625549405813217, -0.023778099566698074, 0.0036500408314168453,
        -0.00032466783886775374, 1.1417362657084595e-05,
    ),
    f64: (
        1.12837919105423, 0.6366194637192344, 0.10277444387411495, -0.019135228220731205, -0.0001918369949261939,
        0.00166333520372764, -0.0005422915188893729, -2.8891245153052947e-05, 0.00011452369061786494,
        -6.63785711645317e-05, 2.483485645054079e-05, -6.933445959926304e-06, 1.500703855762128e-06,
        -2.5295519520921375e-07, 3.2725334613770454e-08, -3.145238991624283e-09, 2.116639731281571e-10,
        -8.898794664667904e-12, 1.7577852757975314e-13,
    ),
}  # fmt: skip


def erf(s: Builder, x: H) -> H:
    """Error function: x + x*P(x^2) near zero, else 1 - exp(-|x|*Q(|x|)) (the split of N. Juffa's public posts)."""
    dtype = float_of(s, x, "erf")
    ax = at_most(s, s.fabs(x), _ERF_ONE[dtype])
    small = s.fma(ax, horner(s, s.mul(ax, ax), _ERF_SMALL[dtype]), ax)
    slope = s.neg(horner(s, ax, _ERF_BIG[dtype]))
    exponent = s.mul(ax, slope)
    p, power = exp_parts(s, exponent, s.fma(ax, slope, s.neg(exponent)))
    one = s.const(1.0, dtype)
    big = s.fma(s.neg(p), power, one)
    return s.copysign(s.select(s.gt(ax, s.const(_ERF_SPLIT[dtype], dtype)), big, small), x)


# Wichura's PPND16: (numerator, denominator) near the middle, in the tail, and in the far tail.
_PPND16 = (
    (
        (
            3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
            45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727,
        ),
        (
            1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077, 21213.794301586595867,
            39307.895800092710610, 28729.085735721942674, 5226.4952788528545610,
        ),
    ),
    (
        (
            1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
            1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833,
            7.74545014278341407640e-4,
        ),
        (
            1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
            0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4,
            1.05075007164441684324e-9,
        ),
    ),
    (
        (
            6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 0.296560571828504891230,
            0.0265321895265761230930, 1.24266094738807843860e-3, 2.71155556874348757815e-5,
            2.01033439929228813265e-7,
        ),
        (
            1.0, 0.599832206555887937690, 0.136929880922735805310, 0.0148753612908506148525,
            7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
            2.04426310338993978564e-15,
        ),
    ),
)  # fmt: skip
# f32, with w = -log(1 - x^2) and v = sqrt(w): f(x)/x - 1 in w up to 6, then f(x) in v - shift up to v = 5 (where erfinv has
# ended), then up to v = 10.3; f is erfinv (2^-27.1, 2^-24.1) or sqrt(2)*erfinv (2^-26.8, 2^-25.5, 2^-25.6). Those shifts are
# taken where f is an f32 to within 2^-30. The choice of w is M. Giles's (GPU Computing Gems 2, 2011, chapter 10).
_ERFINV_F32 = (
    3.5,
    (
        -0.11377307027578354, 0.23201343417167664, 0.01155126839876175, -0.0023412066511809826,
        -0.00011820538929896429, 3.743123306776397e-05, 7.310720775421942e-06, -2.9331649784580804e-06,
        3.8662074075546116e-07, -2.4604707604680698e-08, 6.399387686428781e-10,
    ),
    (
        3.335477828979492, 1.007421851158142, 0.003104014787822962, -0.0017184758326038718, 0.0006158100441098213,
        -0.0001754975237417966, 2.5697356250020675e-05, 4.416016054165084e-06, -1.605125930836948e-06,
    ),
)  # fmt: skip
_QUANTILE_F32 = (
    3.5000126361846924,
    (
        0.25331413745880127, 0.32811665534973145, 0.016335424035787582, -0.0033098626881837845,
        -0.00016834927373565733, 5.3674684750149027e-05, 1.00527595350286e-05, -4.078344773006393e-06,
        5.363236823541229e-07, -3.39209726973877e-08, 8.735643319823794e-10,
    ),
    (
        4.717095851898193, 1.4247101545333862, 0.004392803646624088, -0.0024301258381456137, 0.0008582887821830809,
        -0.000249023170908913, 5.263090497464873e-05, 3.883737008436583e-06, -9.103754564421251e-06,
        2.381485501246061e-06,
    ),
)  # fmt: skip
_QUANTILE_FAR_SHIFT = 5.000001907348633
_QUANTILE_FAR_F32 = (
    6.858806133270264, 1.4287828207015991, -0.0002090363559545949, -0.0002785908873192966, 8.266249642474577e-05,
    -1.3891627531847917e-05, 1.3376734386838507e-06, -5.616464449076375e-08,
)  # fmt: skip


def _by_log_f32(
    s: Builder, x: H, one_minus_square: H, table: tuple[float, tuple[float, ...], tuple[float, ...]]
) -> tuple[H, H]:
    """(value, v) of one of the two functions from x and 1 - x^2, which the caller has without cancellation; v <= 5."""
    shift, middle, outer = table
    k = literals(s, f32)
    w = s.neg(log(s, one_minus_square))
    v = s.sqrt(w)
    near = s.fma(x, horner(s, w, middle), x)
    tail = horner(s, s.sub(v, k(shift)), outer)
    return s.copysign(s.select(s.gt(w, k(6.0)), tail, near), x), v


def _quantile_f32(s: Builder, p: H, q: H, rest: H) -> H:
    """The normal quantile at p = q + 1/2 = 1 - rest, that is sqrt(2)*erfinv(2q) with 1 - (2q)^2 = 4p(1 - p)."""
    k = literals(s, f32)
    square = s.mul(s.mul(s.mul(p, k(2.0)), rest), k(2.0))
    value, v = _by_log_f32(s, s.add(q, q), square, _QUANTILE_F32)
    far = s.copysign(horner(s, s.sub(v, k(_QUANTILE_FAR_SHIFT)), _QUANTILE_FAR_F32), q)
    return s.select(s.gt(v, k(5.0)), far, value)


def _quantile_f64(s: Builder, q: H, tail: H) -> H:
    """The normal quantile at p = q + 1/2, where tail = min(p, 1 - p) > 0, with the sign of q."""
    k = literals(s, f64)
    middle, near, far = _PPND16
    r = s.sqrt(s.neg(log(s, tail)))
    central, distant = s.le(s.fabs(q), k(0.425)), s.gt(r, k(5.0))
    rc = s.fma(s.neg(q), q, k(0.180625))
    rt = s.sub(r, s.select(distant, k(5.0), k(1.6)))
    top, bottom = (
        s.select(central, horner(s, rc, m), s.select(distant, horner(s, rt, f), horner(s, rt, n)))
        for m, n, f in zip(middle, near, far)
    )
    value = s.div(top, bottom)
    return s.select(central, s.mul(q, value), s.copysign(value, q))


def normal_quantile(s: Builder, p: H) -> H:
    """Inverse of the standard normal distribution function; -inf at 0, inf at 1, NaN outside."""
    dtype = float_of(s, p, "normal_quantile")
    k = literals(s, dtype)
    half, one = k(0.5), k(1.0)
    q, rest = s.sub(p, half), s.sub(one, p)
    if dtype is f32:
        value = _quantile_f32(s, p, q, rest)
    else:
        value = _quantile_f64(s, q, s.select(s.gt(p, half), rest, p))
    edge = s.select(s.eq(p, k(0.0)), k(-INF), s.select(s.eq(p, one), k(INF), k(NAN)))
    return s.select(s.and_(s.gt(p, k(0.0)), s.lt(p, one)), value, edge)


def erfinv(s: Builder, x: H) -> H:
    """Inverse error function; infinite at -1 and 1, NaN outside."""
    dtype = float_of(s, x, "erfinv")
    k = literals(s, dtype)
    one, ax = k(1.0), s.fabs(x)
    rest = s.sub(one, ax)
    if dtype is f32:
        value, _ = _by_log_f32(s, x, s.mul(rest, s.add(one, ax)), _ERFINV_F32)
    else:
        # normal_quantile((x + 1)/2) / sqrt(2), both forms of the argument exact
        value = s.mul(_quantile_f64(s, s.mul(x, k(0.5)), s.mul(rest, k(0.5))), k(0.7071067811865476))
    edge = s.select(s.eq(ax, one), s.copysign(k(INF), x), k(NAN))
    return s.select(s.lt(ax, one), value, edge)
