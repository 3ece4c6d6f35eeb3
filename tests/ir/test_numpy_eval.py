"""The NumPy evaluator: fma and conversions against exact rational arithmetic, integers' wrapping, shifts by signedness."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from duo_ir.errors import DTypeError
from duo_ir.scalar.numpy_eval import NumpyScalar, convert, fma
from duo_ir.types import DTYPES, bf16, bool_, f16, f32, f64, i8, i16, i32, i64, u8

s = NumpyScalar()
PRECISION = {"f16": (11, -24, 65520), "bf16": (8, -133, None), "f32": (24, -149, None), "f64": (53, -1074, None)}


def round_exactly(value: Fraction, dtype) -> float:
    """`value` rounded once to nearest even in `dtype`, by integers only."""
    digits, least, _ = PRECISION[dtype.name]
    if value == 0:
        return 0.0
    exponent = 0
    scaled = abs(value)
    exponent = scaled.numerator.bit_length() - scaled.denominator.bit_length()
    if scaled < Fraction(2) ** exponent:
        exponent -= 1
    unit = max(exponent - digits + 1, least)
    rounded = round(scaled / Fraction(2) ** unit) * Fraction(2) ** unit  # Python rounds ties to even
    largest_exponent = {"f16": 16, "bf16": 128, "f32": 128, "f64": 1024}[dtype.name]
    if rounded >= Fraction(2) ** largest_exponent:
        return float("inf") if value > 0 else float("-inf")
    return float(rounded) if value > 0 else -float(rounded)


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))


def fma_exactly(x: float, y: float, z: float, dtype) -> float:
    if not (np.isfinite(x) and np.isfinite(y)):
        return float(np.float64(x) * np.float64(y) + np.float64(z))
    if not np.isfinite(z):
        return z
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact:
        rounded = round_exactly(exact, dtype)
        return float(np.copysign(rounded, 1 if exact > 0 else -1))
    sign = np.copysign(1, x) * np.copysign(1, y)
    return -0.0 if (x == 0 or y == 0) and z == 0 and sign < 0 and np.signbit(z) else 0.0


def adversarial(dtype):
    info = np.finfo(dtype.numpy)
    tiny, least, eps, top = map(float, (info.tiny, info.smallest_subnormal, info.eps, info.max))
    one_side = [
        0.0,
        1.0,
        0.5,
        1.5,
        3.0,
        1 + eps,
        1 - eps / 2,
        tiny,
        least,
        tiny - least,
        3 * least,
        top,
        top / 2,
        np.inf,
    ]
    values = [sign * v for v in one_side for sign in (1, -1)] + [np.nan]
    return np.array(list(itertools.product(values, repeat=3)), dtype.numpy).T


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_fma_is_exact_on_edges(dtype):
    with np.errstate(all="ignore"):
        x, y, z = adversarial(dtype)
        want = [fma_exactly(*map(float, row), dtype) for row in zip(x, y, z)]
        assert same(fma(x, y, z), np.array(want, dtype.numpy)).all()


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_fma_is_exact_on_ties_cancellations_and_underflow(dtype):
    rng = np.random.default_rng(0)
    n, t = 3000, dtype.numpy
    eps, least = np.finfo(t).eps, np.finfo(t).smallest_subnormal
    a, b, c = (rng.standard_normal(n).astype(t) for _ in range(3))
    near_one = 1 + rng.integers(0, 1024, n).astype(t) * eps
    down = (60, 66) if dtype is f32 else (500, 550)
    small_a, small_b = a * t.type(2.0) ** t.type(-down[0]), b * t.type(2.0) ** t.type(-down[1])
    whole = rng.integers(-4096, 4096, n).astype(t)
    bits = [rng.integers(0, 1 << 63, n, dtype=np.uint64).astype(np.uint64) << 1 for _ in range(3)]
    raw = [(w >> np.uint64(64 - dtype.bits)).astype(f"u{dtype.itemsize}").view(t) for w in bits]
    with np.errstate(all="ignore"):
        cases = [
            (a, b, c),
            (a, b, -(a * b)),
            (a, b, -(a * b) * (1 + eps)),
            (near_one, near_one, rng.choice([eps / 2, -eps / 2, eps / 4, least, -least], n).astype(t)),
            (small_a, small_b, (rng.integers(-50, 50, n) * least).astype(t)),
            (whole, whole[::-1] * (eps / 2), rng.integers(-5, 5, n).astype(t)),
            tuple(raw),
        ]
        for x, y, z in cases:
            x, y, z = (v.astype(t) for v in (x, y, z))
            want = np.array([fma_exactly(*map(float, row), dtype) for row in zip(x, y, z)], t)
            assert same(fma(x, y, z), want).all()


def test_fma_broadcasts_and_keeps_shapes():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert fma(x, np.float32(2), np.float32(1)).tolist() == (x * 2 + 1).tolist()
    assert fma(np.float64(2), np.float64(3), np.float64(4)).shape == ()
    assert fma(np.empty((0, 3)), np.ones(3), np.ones(3)).shape == (0, 3)
    with pytest.raises(DTypeError, match="widen"):
        fma(np.float16(1), np.float16(1), np.float16(1))


SOURCES = {
    f32: [0.0, 1 / 3, 65519.0, 65520.0, 1e-40, 1e-45, 3.4e38, 1e-7, 2.0**-25, 1.0009765, 3e-39, 9.2e-41],
    f64: [
        0.0, 1 / 3, 65519.999, 65520.0, 1e-40, 1e-45, 3.39e38, 1e300, 5e-324, 2.0**-25, 2.0**-25 * (1 + 2e-16),
        1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-11 - 2.0**-40, 1 + 2.0**-8 + 2.0**-45, 1 + 2.0**-8, 1 + 3 * 2.0**-8,
        2.0**-134, 2.0**-134 * (1 + 2e-16), 3 * 2.0**-134, 2048 + 1 + 2.0**-30,
    ],
}  # fmt: skip


@pytest.mark.parametrize("target", [f16, bf16, f32, f64], ids=str)
@pytest.mark.parametrize("source", [f32, f64], ids=str)
def test_float_conversions_round_once(source, target):
    with np.errstate(all="ignore"):
        x = np.array([sign * v for v in SOURCES[source] for sign in (1, -1)], source.numpy)
    got = convert(x, target)
    assert got.dtype == target.numpy
    want = [np.copysign(round_exactly(Fraction(float(v)), target), v) for v in x]
    assert same(got.astype(np.float64), np.array(want)).all()
    assert np.isnan(convert(source.numpy.type(np.nan), target).astype(np.float64))
    assert convert(np.array([np.inf], source.numpy), target).astype(np.float64) == np.inf


@pytest.mark.parametrize("target", [f16, bf16, f32, f64], ids=str)
def test_integer_to_float_rounds_once(target):
    rng = np.random.default_rng(1)
    edges = [0, 1, -1, 2047, 2049, 2051, 257, 259, 65519, 65520, 2**24 + 1, 2**53 + 1, 2**60 + 2**52, 2**60 + 2**52 + 1]
    edges += [2**62 + 2**54, 2**62 + 2**54 + 1, 2**62 + 2**54 - 1, 2**63 - 1, -(2**63), -(2**62 + 2**54 + 1)]
    x = np.concatenate([np.array(edges), rng.integers(-(2**63), 2**63 - 1, 500) >> rng.integers(0, 60, 500)])
    want = [round_exactly(Fraction(int(v)), target) for v in x]
    assert same(convert(x, target).astype(np.float64), np.array(want)).all()


def test_integer_conversions_wrap_and_extend():
    x = np.array([300, -1, -129, 2**31], np.int64)
    assert convert(x, u8).tolist() == [44, 255, 127, 0]
    assert convert(x, i8).tolist() == [44, -1, 127, 0]
    assert convert(np.array([255], np.uint8), i16).tolist() == [255]
    assert convert(np.array([-1], np.int8), i64).tolist() == [-1]
    assert convert(np.array([True, False]), f32).tolist() == [1.0, 0.0]
    assert convert(np.array([2.9, -2.9], np.float32), i32).tolist() == [2, -2]


def test_integers_wrap_and_shift_by_signedness():
    low = np.array([-128], np.int8)
    assert s.neg(low) == -128 and s.sub(low, np.int8(1)) == 127 and s.mul(low, np.int8(3)) == -128
    assert s.lshr(low, np.int8(1)) == 64 and s.ashr(low, np.int8(1)) == -64 and s.shl(low, np.int8(1)) == 0
    assert s.lshr(np.array([200], np.uint8), np.uint8(1)) == 100
    x, y = np.array([7, -7, 7, -7], np.int32), np.array([2, 2, -2, -2], np.int32)
    assert s.idiv(x, y).tolist() == [3, -3, -3, 3] and s.irem(x, y).tolist() == [1, -1, 1, -1]
    assert s.idiv(np.array([-(2**63)]), np.array([3])).tolist() == [-((2**63) // 3)]


def test_handles_know_their_dtype_and_constants_round_once():
    for d in DTYPES.values():
        assert s.dtype_of(s.const(1, d)) is d
    assert float(s.const(1 + 2.0**-8 + 2.0**-45, bf16)) == 1 + 2.0**-7
    assert float(s.const(1e300, f32)) == np.inf
    assert s.bitcast(np.float32(-0.0), i32) == -(2**31)
    assert s.not_(np.array([True, False])).tolist() == [False, True] and s.dtype_of(s.const(True, bool_)) is bool_
    picked = s.select(np.array([True, False]), np.array([1, 2], np.float32), np.float32(9))
    assert picked.dtype == np.float32 and picked.tolist() == [1, 9]
