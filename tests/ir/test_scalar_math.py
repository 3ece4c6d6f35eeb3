"""The scalar recipes: accuracy in ulps over strided bit patterns, special values, casts, division, shifts, Philox."""

import math as pymath
import statistics

import numpy as np
import pytest

from duo_ir.errors import ArgumentError, DTypeError
from duo_ir.scalar import math
from duo_ir.scalar.numpy_eval import NumpyScalar, convert
from duo_ir.types import DTYPES, bf16, bool_, f16, f32, f64, i8, i16, i32, i64, u8

s = NumpyScalar()
INF, NAN = np.inf, np.nan
RNG = np.random.default_rng(0)


def patterns(n, low=-INF, high=INF):
    """About n f32 of evenly spread bit patterns, and as many uniform ones where the range is finite."""
    step = max((1 << 32) // n, 1)
    bits = np.arange(0, 1 << 32, step, dtype=np.uint64)
    x = (bits + RNG.integers(0, step, len(bits), dtype=np.uint64)).astype(np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        if np.isfinite(high - low):
            return np.concatenate([x[(x >= low) & (x <= high)], RNG.uniform(low, high, n).astype(np.float32)])
        return x


EDGES = np.array(
    [
        0.0,
        -0.0,
        1,
        -1,
        INF,
        -INF,
        NAN,
        3.4028235e38,
        -3.4028235e38,
        1e-45,
        -1e-45,
        1.1754944e-38,
        1.1754942e-38,
        0.5,
        -0.5,
        2,
    ],
    np.float32,
)


def in_chunks(recipe, *arrays):
    """recipe over arrays in pieces that fit the cache."""
    pieces = max(1, len(arrays[0]) // 32768)
    return np.concatenate([np.asarray(recipe(s, *part)) for part in zip(*(np.array_split(a, pieces) for a in arrays))])


def ulps_f32(got, want):
    """|got - want| in ulps of f32 at the f64 value `want`; signs of zeros and non-finite values must agree exactly."""
    with np.errstate(all="ignore"):
        nearest = want.astype(np.float32)
        unit = np.ldexp(1.0, np.maximum(np.frexp(want)[1] - 24, -149))
        error = np.abs(got.astype(np.float64) - want) / unit
        fine = np.where(np.isfinite(nearest) & np.isfinite(got), False, nearest == got)
        error = np.where((np.isnan(want) & np.isnan(got)) | fine, 0.0, error)
        # Half an ulp beyond the largest number both inf and that number are legitimate.
        brink = np.isfinite(want) & (np.abs(want) > 3.402823e38) & np.isinf(got)
        error = np.where(brink, 1.0, error)
    error[np.isnan(error)] = INF
    error[~np.isnan(want) & (np.signbit(got) != np.signbit(want))] = INF
    return error


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1 + e)


erf_f64 = np.vectorize(pymath.erf, otypes=[np.float64])
ACCURACY = [  # recipe, f64 reference, bound in ulps, finite range to sweep densely, number of patterns
    (math.exp, np.exp, 1.0, (-104, 89), 2_000_000),
    (math.exp2, np.exp2, 1.0, (-150, 128), 800_000),
    (math.expm1, np.expm1, 2.5, (-3, 3), 800_000),
    (math.log, np.log, 1.0, (0.3, 3), 2_000_000),
    (math.log2, np.log2, 2.5, (0.3, 3), 800_000),
    (math.log1p, np.log1p, 2.5, (-1, 3), 800_000),
    (math.sin, np.sin, 2.5, (-1e5, 1e5), 800_000),
    (math.cos, np.cos, 2.5, (-1e5, 1e5), 800_000),
    (math.tan, np.tan, 2.5, (-1e5, 1e5), 800_000),
    (math.asin, np.arcsin, 2.5, (-1, 1), 800_000),
    (math.acos, np.arccos, 2.5, (-1, 1), 800_000),
    (math.atan, np.arctan, 2.5, (-9, 9), 800_000),
    (math.sinh, np.sinh, 2.5, (-4, 4), 800_000),
    (math.cosh, np.cosh, 2.5, (-4, 4), 800_000),
    (math.tanh, np.tanh, 2.5, (-4, 4), 2_000_000),
    (math.sigmoid, _sigmoid, 2.5, (-104, 20), 800_000),
    (math.erf, erf_f64, 1.0, (-4, 4), 800_000),
    (math.rsqrt, lambda x: 1 / np.sqrt(x), 2.5, (0, 4), 200_000),
]


@pytest.mark.parametrize(
    ("recipe", "reference", "bound", "dense", "n"), ACCURACY, ids=lambda v: getattr(v, "__name__", "")
)
def test_f32_accuracy(recipe, reference, bound, dense, n):
    x = np.concatenate([patterns(n), patterns(n, *dense), EDGES])
    with np.errstate(all="ignore"):
        want = reference(x.astype(np.float64))
    got = in_chunks(recipe, x)
    error = ulps_f32(got, want)
    worst = int(np.argmax(error))
    assert error[worst] <= bound, f"{recipe.__name__}({x[worst]!r}) = {got[worst]!r}, want {want[worst]!r}"


def test_f32_pow_accuracy():
    base = np.exp(RNG.uniform(-80, 80, 100_000)).astype(np.float32)
    x = np.concatenate([patterns(100_000), base, RNG.uniform(0.5, 2, 50_000).astype(np.float32)])
    exponent = (RNG.uniform(-104, 90, len(base)) / np.log(base.astype(np.float64))).astype(np.float32)
    y = np.concatenate(
        [RNG.permutation(patterns(100_000)), exponent, RNG.uniform(-150, 150, 50_000).astype(np.float32)]
    )
    with np.errstate(all="ignore"):
        want = np.power(x.astype(np.float64), y.astype(np.float64))
    assert ulps_f32(in_chunks(math.pow, x, y), want).max() <= 1.0


def test_f32_inverse_normal_accuracy():
    inverse = statistics.NormalDist().inv_cdf
    p = np.concatenate([np.exp(RNG.uniform(-103, 0, 20_000)), RNG.uniform(0, 1, 20_000)]).astype(np.float32)
    p = p[(p > 0) & (p < 1)]
    want = np.array([inverse(float(v)) for v in p])
    assert ulps_f32(math.normal_quantile(s, p), want).max() <= 2.5
    x = RNG.uniform(0.01, 1, 20_000).astype(np.float32)
    x = np.concatenate([x, -x, 1 - np.exp(RNG.uniform(-16, -1, 20_000)).astype(np.float32)])
    want = np.array([inverse((1 + float(v)) / 2) for v in x]) / 2**0.5
    assert ulps_f32(math.erfinv(s, x), want).max() <= 2.5


# ------------------------------------------------------------------------------------------------------- f64
def _random(low, high, n=250):
    return RNG.uniform(low, high, n)


def _scales(low, high, n=100):
    return np.exp(RNG.uniform(low, high, n))


F64 = [
    ("exp", "exp", 1.0, lambda: np.concatenate([_random(-745, 709), _random(-1, 1)])),
    ("expm1", "expm1", 2.5, lambda: np.concatenate([_random(-40, 709), _random(-1, 1), _scales(-700, 0)])),
    ("exp2", lambda m, x: m.mpf(2) ** x, 1.0, lambda: np.concatenate([_random(-1074, 1023), _random(-1, 1)])),
    ("log", "log", 1.0, lambda: np.concatenate([_scales(-744, 709), _random(0.5, 2), [5e-324, 1.7e308]])),
    ("log2", lambda m, x: m.log(x, 2), 2.5, lambda: np.concatenate([_scales(-744, 709), _random(0.5, 2)])),
    ("log1p", "log1p", 2.5, lambda: np.concatenate([_scales(-744, 709), _random(-1, 2), [2.0**-53 - 1]])),
    (
        "sin",
        "sin",
        2.5,
        lambda: np.concatenate([_random(-10, 10), _random(-(2**45), 2**45), np.arange(99) * np.pi / 2]),
    ),
    (
        "cos",
        "cos",
        2.5,
        lambda: np.concatenate([_random(-10, 10), _random(-(2**45), 2**45), np.arange(99) * np.pi / 2]),
    ),
    (
        "tan",
        "tan",
        2.5,
        lambda: np.concatenate([_random(-10, 10), _random(-(2**45), 2**45), np.arange(99) * np.pi / 2]),
    ),
    ("asin", "asin", 2.5, lambda: np.concatenate([_random(-1, 1), 1 - _scales(-36, 0), _scales(-700, -1)])),
    ("acos", "acos", 2.5, lambda: np.concatenate([_random(-1, 1), 1 - _scales(-36, 0), _scales(-36, 0) - 1])),
    ("atan", "atan", 2.5, lambda: np.concatenate([_random(-10, 10), _scales(-700, 700)])),
    ("sinh", "sinh", 2.5, lambda: np.concatenate([_random(-710, 710), _random(-2, 2), _scales(-700, 0)])),
    ("cosh", "cosh", 2.5, lambda: np.concatenate([_random(-710, 710), _random(-2, 2)])),
    ("tanh", "tanh", 2.5, lambda: np.concatenate([_random(-20, 20), _random(-1, 1), _scales(-700, 0)])),
    ("sigmoid", lambda m, x: 1 / (1 + m.exp(-x)), 2.5, lambda: np.concatenate([_random(-745, 40), _random(-3, 3)])),
    ("erf", "erf", 1.0, lambda: np.concatenate([_random(-6, 6), _random(0.9, 1.2), _scales(-700, 0)])),
    ("rsqrt", lambda m, x: 1 / m.sqrt(x), 2.5, lambda: _scales(-744, 709)),
]


def worst_ulps_f64(got, want, mpmath):
    """Largest error in ulps of f64 at the exact values `want`."""
    worst = 0.0
    for g, w in zip(got, want):
        if w == 0:
            worst = max(worst, 0.0 if g == 0 else INF)
            continue
        unit = max(mpmath.frexp(w)[1] - 53, -1074)
        worst = max(worst, float(abs(mpmath.mpf(float(g)) - w) / mpmath.mpf(2) ** unit))
    return worst


@pytest.mark.parametrize(("name", "reference", "bound", "inputs"), F64, ids=[row[0] for row in F64])
def test_f64_accuracy(name, reference, bound, inputs):
    mpmath = pytest.importorskip("mpmath")
    function = getattr(mpmath, reference) if isinstance(reference, str) else lambda x: reference(mpmath, x)
    x = inputs()
    with mpmath.workprec(200):
        want = [function(mpmath.mpf(float(v))) for v in x]
        assert worst_ulps_f64(getattr(math, name)(s, x), want, mpmath) <= bound


def test_f64_pow_and_inverse_normal_accuracy():
    mpmath = pytest.importorskip("mpmath")
    x = np.concatenate([_scales(-300, 300, 300), 1 + _random(-1e-3, 1e-3, 200), _random(0.5, 2, 200)])
    y = RNG.uniform(-744, 709, len(x)) / np.log(x)
    with mpmath.workprec(200):
        want = [mpmath.mpf(float(a)) ** mpmath.mpf(float(b)) for a, b in zip(x, y)]
        assert worst_ulps_f64(math.pow(s, x, y), want, mpmath) <= 1.0
        z = np.concatenate([_random(-1, 1, 60), 1 - _scales(-36, 0, 20), _scales(-300, 0, 20)])
        want = np.array([float(mpmath.erfinv(mpmath.mpf(float(v)))) for v in z])
    assert np.allclose(math.erfinv(s, z), want, rtol=2e-15, atol=0)
    p = (1 + z[:60]) / 2
    assert np.allclose(math.normal_quantile(s, p), [statistics.NormalDist().inv_cdf(v) for v in p], rtol=2e-15, atol=0)


def test_far_arguments_of_sine_stay_bounded_in_f64():
    x = np.concatenate([_scales(32, 709, 1000), [1.7976931348623157e308]])
    assert (np.abs(math.sin(s, x)) <= 1).all() and (np.abs(math.cos(s, x)) <= 1).all()


# -------------------------------------------------------------------------------------------- special values
SPECIAL = {
    "exp": [(INF, INF), (-INF, 0.0), (NAN, NAN), (0.0, 1.0), (-0.0, 1.0), (1000.0, INF), (-1000.0, 0.0)],
    "exp2": [(INF, INF), (-INF, 0.0), (NAN, NAN), (3.0, 8.0), (-2.0, 0.25), (5000.0, INF), (-5000.0, 0.0)],
    "expm1": [(INF, INF), (-INF, -1.0), (NAN, NAN), (0.0, 0.0), (-0.0, -0.0), (-100.0, -1.0)],
    "log": [(0.0, -INF), (-0.0, -INF), (-1.0, NAN), (-INF, NAN), (INF, INF), (NAN, NAN), (1.0, 0.0)],
    "log2": [(0.0, -INF), (-1.0, NAN), (INF, INF), (NAN, NAN), (1.0, 0.0), (8.0, 3.0), (2.0**-140, -140.0)],
    "log1p": [(-1.0, -INF), (-2.0, NAN), (-INF, NAN), (INF, INF), (NAN, NAN), (0.0, 0.0), (-0.0, -0.0)],
    "sin": [(INF, NAN), (-INF, NAN), (NAN, NAN), (0.0, 0.0), (-0.0, -0.0)],
    "cos": [(INF, NAN), (-INF, NAN), (NAN, NAN), (0.0, 1.0), (-0.0, 1.0)],
    "tan": [(INF, NAN), (-INF, NAN), (NAN, NAN), (0.0, 0.0), (-0.0, -0.0)],
    "asin": [(2.0, NAN), (-2.0, NAN), (INF, NAN), (NAN, NAN), (0.0, 0.0), (-0.0, -0.0)],
    "acos": [(2.0, NAN), (-2.0, NAN), (INF, NAN), (NAN, NAN), (1.0, 0.0)],
    "atan": [(NAN, NAN), (0.0, 0.0), (-0.0, -0.0), (INF, pymath.pi / 2), (-INF, -pymath.pi / 2)],
    "sinh": [(INF, INF), (-INF, -INF), (NAN, NAN), (0.0, 0.0), (-0.0, -0.0), (1000.0, INF)],
    "cosh": [(INF, INF), (-INF, INF), (NAN, NAN), (0.0, 1.0), (-0.0, 1.0), (-1000.0, INF)],
    "tanh": [(INF, 1.0), (-INF, -1.0), (NAN, NAN), (0.0, 0.0), (-0.0, -0.0), (50.0, 1.0)],
    "sigmoid": [(INF, 1.0), (-INF, 0.0), (NAN, NAN), (0.0, 0.5), (-0.0, 0.5)],
    "erf": [(INF, 1.0), (-INF, -1.0), (NAN, NAN), (0.0, 0.0), (-0.0, -0.0)],
    "erfinv": [(1.0, INF), (-1.0, -INF), (2.0, NAN), (-INF, NAN), (NAN, NAN), (0.0, 0.0), (-0.0, -0.0)],
    "normal_quantile": [(0.0, -INF), (-0.0, -INF), (1.0, INF), (0.5, 0.0), (-1.0, NAN), (1.5, NAN), (INF, NAN)],
    "rsqrt": [(0.0, INF), (-0.0, -INF), (INF, 0.0), (-1.0, NAN), (NAN, NAN), (4.0, 0.5)],
    "sign": [(INF, 1.0), (-INF, -1.0), (NAN, NAN), (0.0, 0.0), (-0.0, -0.0), (3.0, 1.0)],
}


def same(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name, dtype):
    for x, want in SPECIAL[name]:
        got = getattr(math, name)(s, dtype.numpy.type(x))
        assert got.dtype == dtype.numpy
        assert same(got, dtype.numpy.type(want)), f"{name}({x}) = {got}, want {want}"


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("name", ["expm1", "log1p", "sin", "tan", "asin", "atan", "sinh", "tanh"])
def test_denormals_pass_through_functions_that_start_as_x(name, dtype):
    least = np.finfo(dtype.numpy).smallest_subnormal
    x = np.array([least, -least, 5 * least, np.finfo(dtype.numpy).tiny], dtype.numpy)
    assert same(getattr(math, name)(s, x), x).all()


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_pow_special_values(dtype):
    values = [0.0, 1.0, 2.0, 0.5, 3.0, 1.5, INF, 1e30, 1e-30, 2.0**60, 101.0]
    values = [*values, *(-v for v in values), NAN]
    x, y = (a.ravel().astype(dtype.numpy) for a in np.meshgrid(values, values))
    got = math.pow(s, x, y)
    with np.errstate(all="ignore"):
        want = np.power(x.astype(np.float64), y.astype(np.float64)).astype(dtype.numpy)
    close = (
        np.isfinite(got)
        & np.isfinite(want)
        & (np.sign(got) == np.sign(want))
        & np.isclose(got, want, rtol=1e-6, atol=0)
    )
    assert (same(got, want) | close).all()
    assert math.pow(s, dtype.numpy.type(2), dtype.numpy.type(10)) == 1024


@pytest.mark.parametrize("recipe", [math.exp, math.tanh, math.pow], ids=lambda r: r.__name__)
def test_narrow_floats_are_the_callers_to_widen(recipe):
    x = convert(np.ones(2, np.float32), bf16)
    with pytest.raises(DTypeError, match="convert the operand first"):
        recipe(s, x, x) if recipe is math.pow else recipe(s, x)


# ------------------------------------------------------------------------------------ order, division, shifts
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_maximum_and_minimum_order_zeros_and_keep_nan(dtype):
    rows = [
        (0.0, -0.0, 0.0, -0.0), (-0.0, 0.0, 0.0, -0.0), (-0.0, -0.0, -0.0, -0.0), (NAN, 1.0, NAN, NAN),
        (1.0, NAN, NAN, NAN), (-INF, INF, INF, -INF), (1.0, 2.0, 2.0, 1.0), (NAN, INF, NAN, NAN), (3.0, 3.0, 3.0, 3.0),
    ]  # fmt: skip
    x, y, top, bottom = np.array(rows, dtype.numpy).T
    assert same(math.maximum(s, x, y), top).all() and same(math.minimum(s, x, y), bottom).all()


def test_order_of_integers_and_bools():
    x, y = np.array([-128, 5], np.int8), np.array([127, -5], np.int8)
    assert math.maximum(s, x, y).tolist() == [127, 5] and math.minimum(s, x, y).tolist() == [-128, -5]
    assert math.maximum(s, np.array([200], np.uint8), np.array([100], np.uint8)).tolist() == [200]
    assert math.sign(s, x).tolist() == [-1, 1] and math.sign(s, np.array([0, 200], np.uint8)).tolist() == [0, 1]
    assert math.maximum(s, np.array([True, False]), np.array([False, False])).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [i8, i16, i32, i64, u8], ids=str)
def test_integer_division(dtype):
    low, high = np.iinfo(dtype.numpy).min, np.iinfo(dtype.numpy).max
    values = sorted({v for v in (low, low + 1, -7, -3, -2, -1, 0, 1, 2, 3, 7, high - 1, high) if low <= v <= high})
    pairs = [(x, y) for x in values for y in values]
    x, y = np.array(pairs, dtype.numpy).T

    def wrapped(v):
        return (v - low) % (high - low + 1) + low

    assert math.floor_divide(s, x, y).tolist() == [wrapped(a // b) if b else 0 for a, b in pairs]
    assert math.remainder(s, x, y).tolist() == [a % b if b else 0 for a, b in pairs]
    toward_zero = [wrapped(abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)) if b else 0 for a, b in pairs]
    assert math.trunc_divide(s, x, y).tolist() == toward_zero
    signed = [abs(a) % abs(b) * (1 if a >= 0 else -1) if b else 0 for a, b in pairs]
    assert math.fmod(s, x, y).tolist() == signed


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_float_division_with_floor(dtype):
    t = dtype.numpy
    edges = (
        EDGES.astype(t) if dtype is f32 else np.array([0.0, -0.0, 1, -1, INF, -INF, NAN, 0.5, -7.5, 5e-324, 1e40, 3], t)
    )
    x, y = (a.ravel() for a in np.meshgrid(edges, edges))
    if dtype is f32:  # every pair, whatever the quotient
        more = [patterns(60_000), RNG.permutation(patterns(60_000))]
    else:
        more = [_scales(-60, 60, 60_000), -_scales(-60, 60, 60_000)]
    x, y = np.concatenate([x, more[0], -more[0]]), np.concatenate([y, more[1], more[1]])
    whole = RNG.integers(-50, 50, (2, 20_000)).astype(t)
    x, y = np.concatenate([x, whole[0]]), np.concatenate([y, whole[1]])
    with np.errstate(all="ignore"):
        assert same(math.fmod(s, x, y), np.fmod(x, y)).all()
        assert same(math.remainder(s, x, y), np.remainder(x, y)).all()
        assert same(math.floor_divide(s, x, y), np.floor_divide(x, y)).all()


def test_shifts_out_of_range():
    x = np.array([-128, 127, -1, 64], np.int8)
    for y, left, logical, arithmetic in [
        (0, [-128, 127, -1, 64], [-128, 127, -1, 64], [-128, 127, -1, 64]),
        (1, [0, -2, -2, -128], [64, 63, 127, 32], [-64, 63, -1, 32]),
        (7, [0, -128, -128, 0], [1, 0, 1, 0], [-1, 0, -1, 0]),
        (8, [0] * 4, [0] * 4, [-1, 0, -1, 0]),
        (-1, [0] * 4, [0] * 4, [-1, 0, -1, 0]),
        (127, [0] * 4, [0] * 4, [-1, 0, -1, 0]),
    ]:
        by = np.full(4, y, np.int8)
        assert math.shift_left(s, x, by).tolist() == left
        assert math.shift_right_logical(s, x, by).tolist() == logical
        assert math.shift_right_arithmetic(s, x, by).tolist() == arithmetic
    top = np.array([200, 200, 200], np.uint8)
    assert math.shift_right_arithmetic(s, top, np.array([1, 8, 255], np.uint8)).tolist() == [100, 0, 0]


def test_integer_pow():
    x = np.array([3.0, -2.0, 0.0, INF], np.float32)
    assert math.integer_pow(s, x, 0).tolist() == [1] * 4 and math.integer_pow(s, x, 1) is x
    assert math.integer_pow(s, x, 5).tolist() == [243, -32, 0, INF]
    assert math.integer_pow(s, x, -2).tolist() == [float(np.float32(1) / np.float32(9)), 0.25, INF, 0]
    y = np.float32(1.1)
    assert math.integer_pow(s, y, 6) == (y * y) * ((y * y) * (y * y))
    assert math.integer_pow(s, np.array([2**31 - 1, 3], np.int32), 3).tolist() == [2**31 - 1, 27]
    with pytest.raises(ArgumentError, match="float"):
        math.integer_pow(s, np.array([2], np.int32), -1)


# ----------------------------------------------------------------------------------------------------- casts
@pytest.mark.parametrize("source", [f16, bf16, f32, f64], ids=str)
@pytest.mark.parametrize("target", [i8, i16, i32, i64, u8], ids=str)
def test_float_to_integer_truncates_and_saturates(source, target):
    low, high = int(np.iinfo(target.numpy).min), int(np.iinfo(target.numpy).max)
    raw = [0.0, -0.0, 0.99, -0.99, 1.5, -1.5, 254.9, 255.5, 256.0, -128.9, -129.0, 127.9, 128.0, 32767.9, 32768.0]
    raw += [-32768.9, -32769.0, 2.0**31, 2.0**31 - 1, -(2.0**31), -(2.0**31) - 1, -(2.0**31) - 0.5, 2.0**63, -(2.0**63)]
    raw += [2.0**63 - 1024, 2.0**31 - 128, 1e30, -1e30, INF, -INF, NAN]
    x = convert(np.array(raw), source)
    exact = x.astype(np.float64)
    want = [
        0 if np.isnan(v) else high if v == INF else low if v == -INF else min(max(int(v), low), high) for v in exact
    ]
    assert math.cast(s, x, target).tolist() == want


@pytest.mark.parametrize("target", DTYPES.values(), ids=str)
@pytest.mark.parametrize("source", DTYPES.values(), ids=str)
def test_casts_agree_with_convert_where_it_is_defined(source, target):
    values = np.array([0, 1, 2, 3, 100, 127])
    if source.is_float or source in (i32, i64):
        values = np.concatenate([values, [2049, 2051, 257, 259]])
    if source is i64:
        values = np.concatenate([values, RNG.integers(-(2**63), 2**63 - 1, 500) >> RNG.integers(0, 60, 500)])
        values = np.concatenate([values, [2**62 + 2**54, 2**62 + 2**54 + 1, -(2**62) - 2**54 - 1, 2**53 + 1]])
    x = convert(values, source) if source is not bool_ else values != 0
    want = x.astype(np.float64) != 0 if target is bool_ else convert(x, target)
    if source.is_float and target.is_integer:
        fits = np.abs(x.astype(np.float64)) <= np.iinfo(target.numpy).max
        x, want = x[fits], want[fits]
    got = math.cast(s, x, target)
    assert got.dtype == target.numpy and (got == want).all()


@pytest.mark.parametrize("target", [f16, bf16], ids=str)
def test_casts_to_narrow_floats_round_once(target):
    x = np.concatenate(
        [RNG.standard_normal(20_000) * _scales(-110, 95, 20_000), [1e300, -1e300, INF, -INF, NAN, 0.0, -0.0]]
    )
    eighth, half = 2.0**-8 if target is bf16 else 2.0**-11, 2.0**-30
    ties = np.array([1 + k * eighth + d * half for k in range(1, 16, 2) for d in (-1, 0, 1)])
    x = np.concatenate([x, ties, ties * 2.0**-130, ties * 2.0**-15, ties * 2.0**-133, [65519.9999999, 65520.0]])
    got, want = math.cast(s, x, target), convert(x, target)
    assert same(got.astype(np.float64), want.astype(np.float64)).all()


def test_casts_to_bool():
    assert math.cast(s, np.array([0.0, -0.0, NAN, 1e-45, -3], np.float32), bool_).tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert math.cast(s, np.array([0, -128], np.int8), bool_).tolist() == [False, True]


# ---------------------------------------------------------------------------------------------------- random
def _words(*unsigned):
    return tuple(np.array([w], np.uint32).view(np.int32) for w in unsigned)


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # Random123's known answers for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, want):
    got = math.philox_4x32_10(s, _words(*counter), _words(*key))
    assert [int(w.view(np.uint32)[0]) for w in got] == list(want)


def test_uniform_from_bits():
    ones = _words(0xFFFFFFFF)[0]
    assert math.bits_to_uniform(s, ones) == np.float32(1 - 2.0**-24)
    assert math.bits_to_uniform(s, _words(0x80000000)[0]) == np.float32(0.5)
    assert math.bits_to_uniform(s, ones, ones) == 1 - 2.0**-53
    assert math.bits_to_uniform(s, *_words(0x80000000, 0x800)) == 0.5 + 2.0**-53
    with pytest.raises(DTypeError, match="i32"):
        math.bits_to_uniform(s, np.array([1.0]))
