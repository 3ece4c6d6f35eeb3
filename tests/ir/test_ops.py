"""Every op by its reference against NumPy; the contract's orders against slow literal transcriptions; views; sugar."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import op_table
import pytest
from op_table import Case, cases

import duo_ir.ops as ops
from duo_ir.core import Function, function_of
from duo_ir.interpret import interpret
from duo_ir.opdef import REGISTRY, Movement
from duo_ir.ops import broadcasting as nd
from duo_ir.scalar.numpy_eval import convert
from duo_ir.types import Dim, DType, TensorType, bf16, bool_, f16, f32, f64, i16, i32, i64
from duo_ir.types import dtype as dtype_of

b = Dim.symbol("b")
EPS = {f16: 2.0**-10, bf16: 2.0**-7, f32: 2.0**-23, f64: 2.0**-52}


def run(fn: Callable[..., Any], *arrays: Any) -> list[np.ndarray]:
    """What `fn`, of Values, gives on these arrays."""
    arrays = tuple(np.asarray(a) for a in arrays)
    return interpret(function_of(fn, *[TensorType(dtype_of(a.dtype), a.shape) for a in arrays], name="f"), *arrays)


def assert_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal dtype, shape and bits, NaN equal to NaN."""
    want = np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if dtype_of(got.dtype).is_float:
        nan = np.isnan(got) & np.isnan(want)
        assert np.array_equal(got[~nan].view(f"u{got.itemsize}"), want[~nan].view(f"u{got.itemsize}")), (got, want)
    else:
        assert np.array_equal(got, want), (got, want)


def assert_ulp(got: np.ndarray, want: np.ndarray, ulp: float) -> None:
    """`got` within so many units of the last place of `want`, which is float64."""
    d = dtype_of(got.dtype)
    assert got.shape == want.shape
    smallest = {f16: 2.0**-24, bf16: 2.0**-133, f32: 2.0**-149, f64: 2.0**-1074}[d]
    unit = np.maximum(EPS[d] * 2.0 ** np.floor(np.log2(np.maximum(np.abs(want), 1e-300))), smallest)
    assert (np.abs(got.astype(np.float64) - want) <= (ulp + 0.5) * unit).all(), (got, want)


# ----------------------------------------------------------------------------------------------------- against NumPy
def test_every_op_has_a_row() -> None:
    assert set(REGISTRY) == {row.name for row in op_table.TABLE}


def test_module_names_are_text_names() -> None:
    for name in ops.__all__:
        if name != "broadcasting":
            assert getattr(ops, name) is REGISTRY[name.rstrip("_")]


def _expected(case: Case, arrays: list[np.ndarray]) -> list[np.ndarray]:
    wide = [a.astype(np.float64) if dtype_of(a.dtype).is_float and case.row.name not in RAW else a for a in arrays]
    assert case.row.numpy is not None
    out = case.row.numpy(*wide, **case.attrs)
    return [np.asarray(r) for r in (out if isinstance(out, tuple) else (out,))]


RAW = {"bitcast", "constant", "while"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("row", op_table.TABLE, ids=lambda r: r.name)
def test_against_numpy(row: op_table.Row) -> None:
    if row.numpy is None:
        pytest.skip("tested by itself below")
    for case in cases([row]):
        arrays = case.arrays()
        function = case.function()
        got = interpret(function, *arrays)
        for g, w, type in zip(got, _expected(case, arrays), function.result_types, strict=True):
            assert g.dtype == type.dtype.numpy, str(case)
            if not type.dtype.is_float:
                assert_bits(g, np.asarray(w, g.dtype))
            elif row.ulp is None:
                n = max([a.size for a in arrays], default=1)
                scale = max(
                    [float(np.abs(w).max(initial=1.0)), *[np.abs(a.astype(np.float64)).max(initial=0) for a in arrays]]
                )
                assert (
                    np.abs(g.astype(np.float64) - w).max(initial=0) <= 4 * EPS[type.dtype] * scale * max(n, 4) ** 0.5
                ), str(case)
                assert g.shape == w.shape
            elif row.ulp == 0:
                assert_bits(g, convert(w, type.dtype))
            else:
                assert_ulp(g, w, row.ulp)


FROM = np.array(
    [
        0.0,
        -0.0,
        0.5,
        -0.5,
        1.5,
        2.5,
        -1.5,
        127.5,
        255.9,
        300.0,
        -129.0,
        1e10,
        -1e10,
        1e30,
        -1e30,
        np.inf,
        -np.inf,
        np.nan,
    ]
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("source", op_table.ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("target", op_table.ALL, ids=lambda d: d.name)
def test_cast(source: DType, target: DType) -> None:
    if source.is_float:
        x = FROM.astype(source.numpy)
    elif source is bool_:
        x = np.array([False, True])
    else:
        info = np.iinfo(source.numpy)
        x = np.array([info.min, info.min + 1, 0, 1, 5, info.max - 1, info.max], source.numpy)
    (got,) = run(lambda v: ops.cast(v, dtype=target), x)
    if target is bool_:
        want = x != source.numpy.type(0)
    elif source.is_float and target.is_integer:
        info = np.iinfo(target.numpy)
        rows = [float(v) for v in x]
        clipped = [0 if v != v else info.min if v < info.min else info.max if v > info.max else int(v) for v in rows]
        want = np.array(clipped, target.numpy)
    elif target.is_integer:
        want = x.astype(target.numpy)
    elif source.is_float:
        want = x.astype(np.float64).astype(target.numpy) if source is not f64 else convert(x, target)
    else:
        want = np.array([_nearest(int(v), target) for v in x], target.numpy)
    assert_bits(got, want)


def _nearest(value: int, target: DType) -> Any:
    """The float of `target` nearest to an integer, ties to even: by exact comparison of neighbours."""
    digits = {f16: 11, bf16: 8, f32: 24, f64: 53}[target]
    shift = max(0, abs(value).bit_length() - digits)
    rounded = round(Fraction(abs(value), 1 << shift)) << shift
    if target is f16 and rounded > 65504:
        return np.copysign(np.inf, value)
    return np.float64(math.copysign(rounded, value) if value else 0.0)


# ------------------------------------------------------------------------------------------------ the contract's orders
def literal_sum(x: np.ndarray, start: float = 0.0, combine: Callable[[Any, Any], Any] = lambda a, c: a + c) -> Any:
    """Rule 3 word for word, for one row of numbers."""
    kind = x.dtype.type
    chunks = max(1, -(-len(x) // 1024))
    partial = [[kind(start) for _ in range(16)] for _ in range(chunks)]
    for i, v in enumerate(x):
        partial[i // 1024][i % 16] = combine(partial[i // 1024][i % 16], v)
    return _combined(partial, combine)


def _combined(partial: list[list[Any]], combine: Callable[[Any, Any], Any]) -> Any:
    lanes = [_tree([chunk[lane] for chunk in partial], combine) for lane in range(16)]
    for half in (8, 4, 2, 1):
        lanes = [combine(lanes[k], lanes[k + half]) for k in range(half)]
    return lanes[0]


def _tree(items: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    while len(items) > 1:
        pairs = [combine(items[k], items[k + 1]) for k in range(0, len(items) - 1, 2)]
        items = pairs + ([items[-1]] if len(items) % 2 else [])
    return items[0]


def exact_fma(x: Any, y: Any, z: Any) -> Any:
    """x*y + z rounded once, from exact fractions (finite operands whose result is normal or zero)."""
    kind = type(z)
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    if exact == 0:
        product_sign = math.copysign(1, float(x)) * math.copysign(1, float(y))
        return (
            kind(-0.0)
            if product_sign < 0 and math.copysign(1, float(z)) < 0 and float(x) * float(y) == 0
            else kind(0.0)
        )
    digits = 24 if kind is np.float32 else 53
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length() - digits - 1
    while abs(exact) >= Fraction(2) ** (exponent + digits):
        exponent += 1
    return kind(math.ldexp(round(exact / Fraction(2) ** exponent), exponent))


LENGTHS = (0, 1, 2, 5, 15, 16, 17, 100, 1023, 1024, 1025, 2047, 3073, 5000, 7 * 1024)


@pytest.mark.parametrize("dtype", [f32, f64, f16, bf16], ids=lambda d: d.name)
@pytest.mark.parametrize("n", LENGTHS)
def test_sum_order(n: int, dtype: DType) -> None:
    rng = np.random.default_rng(n)
    x = (rng.normal(size=(2, n)) * 10.0 ** rng.uniform(-3, 3, (2, n))).astype(dtype.numpy)
    wide = x.astype(np.float32) if dtype.is_narrow_float else x
    want = np.array([literal_sum(row) for row in wide]).reshape(2).astype(wide.dtype).astype(dtype.numpy)
    assert_bits(run(lambda v: ops.sum(v, axes=(1,)), x)[0], want)
    assert_bits(run(lambda v: ops.sum(v, axes=(0,)), np.ascontiguousarray(x.T))[0], want)


@pytest.mark.parametrize("n", [0, 1, 15, 17, 1025, 3000])
def test_prod_order(n: int) -> None:
    x = np.exp(np.random.default_rng(n).normal(size=n) * 0.1).astype(np.float32)
    want = np.float32(literal_sum(x, 1.0, lambda a, c: a * c))
    assert_bits(run(lambda v: ops.prod(v, axes=(0,)), x)[0], want)


def test_reduction_over_several_axes_is_row_major() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 70, 4)).astype(np.float32)
    want = np.array([literal_sum(x[:, k].reshape(-1)) for k in range(5)])
    assert_bits(run(lambda v: ops.sum(v, axes=(0, 2, 3)), x)[0], want)


def test_sum_starts_at_positive_zero() -> None:
    for n in (1, 16, 17):
        (got,) = run(lambda v: ops.sum(v, axes=(0,)), np.full(n, -0.0, np.float32))
        assert_bits(got, np.float32(0.0))
    assert_bits(run(lambda v: ops.cumsum(v, axis=0), np.full(2, -0.0, np.float32))[0], np.zeros(2, np.float32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sum_of_infinities_and_nan() -> None:
    x = np.array([[np.inf, 1, 2], [np.inf, -np.inf, 0], [np.nan, 1, 2], [-np.inf, 3e38, 3e38]], np.float32)
    assert_bits(run(lambda v: ops.sum(v, axes=(1,)), x)[0], np.array([np.inf, np.nan, np.nan, -np.inf], np.float32))


def test_narrow_sum_rounds_once() -> None:
    x = np.array([2048.0, *[0.5] * 15], np.float16)  # 0.5 is lost when added to 2048 in f16
    assert run(lambda v: ops.sum(v, axes=(0,)), x)[0] == np.float16(2056)


def literal_matmul(a: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rule 2 word for word."""
    kind, k = a.dtype.type, a.shape[1]
    out = np.zeros((a.shape[0], c.shape[1]), a.dtype)
    for m, n in itertools.product(range(a.shape[0]), range(c.shape[1])):
        x, y = a[m], c[:, n]
        if c.shape[1] == 1:
            partial = [[kind(0) for _ in range(16)] for _ in range(max(1, -(-k // 1024)))]
            for i in range(k):
                partial[i // 1024][i % 16] = exact_fma(x[i], y[i], partial[i // 1024][i % 16])
            out[m, n] = _combined(partial, lambda p, q: p + q)
            continue
        size = k if k <= 16384 else 4096
        parts = [_blocks(x[s : s + size], y[s : s + size], kind) for s in range(0, k, max(size, 1))]
        out[m, n] = _tree(parts, lambda p, q: p + q) if parts else 0
    return out


def _blocks(x: np.ndarray, y: np.ndarray, kind: Any) -> Any:
    total = None
    for start in range(0, len(x), 512):
        acc = kind(0)
        for p, q in zip(x[start : start + 512], y[start : start + 512]):
            acc = exact_fma(p, q, acc)
        total = acc if total is None else total + acc
    return total


@pytest.mark.parametrize("dtype", [f32, f64], ids=lambda d: d.name)
@pytest.mark.parametrize(
    "m, k, n", [(2, 3, 2), (1, 511, 2), (1, 513, 2), (2, 1300, 2), (1, 0, 2), (2, 5, 1), (1, 17, 1), (2, 1025, 1), (1, 3100, 1), (0, 3, 2)]
)  # fmt: skip
def test_matmul_order(m: int, k: int, n: int, dtype: DType) -> None:
    rng = np.random.default_rng(k)
    a, c = rng.normal(size=(m, k)).astype(dtype.numpy), rng.normal(size=(k, n)).astype(dtype.numpy)
    assert_bits(run(ops.matmul, a, c)[0], literal_matmul(a, c))


def test_matmul_order_of_long_k() -> None:
    rng = np.random.default_rng(1)
    k = 16384 + 4096 + 700
    a, c = rng.normal(size=(1, k)).astype(np.float32), rng.normal(size=(k, 2)).astype(np.float32)
    assert_bits(run(ops.matmul, a, c)[0], literal_matmul(a, c))
    a, c = a[:, :16384], c[:16384]
    assert_bits(run(ops.matmul, a, c)[0], literal_matmul(a, c))


@pytest.mark.parametrize("dtype", [f16, bf16], ids=lambda d: d.name)
@pytest.mark.parametrize("n", [1, 3])
def test_matmul_of_narrow_floats_rounds_once(dtype: DType, n: int) -> None:
    rng = np.random.default_rng(2)
    a, c = rng.normal(size=(3, 600)).astype(dtype.numpy), rng.normal(size=(600, n)).astype(dtype.numpy)
    want = literal_matmul(a.astype(np.float32), c.astype(np.float32)).astype(dtype.numpy)
    assert_bits(run(ops.matmul, a, c)[0], want)


def test_matmul_special_values() -> None:
    tiny = np.float32(1e-30)
    two = np.ones((1, 2), np.float32)
    assert_bits(run(ops.matmul, np.array([[-tiny]]), tiny * two)[0], np.array([[-0.0, -0.0]], np.float32))
    assert_bits(run(ops.matmul, np.array([[0.0]], np.float32), np.inf * two)[0], np.full((1, 2), np.nan, np.float32))
    assert_bits(run(ops.matmul, np.array([[-tiny]]), np.array([[tiny]]))[0], np.array([[0.0]], np.float32))


def test_integer_matmul_and_sums_wrap() -> None:
    x = np.full((1, 3), 100, np.int8)
    assert_bits(run(ops.matmul, x, np.full((3, 2), 2, np.int8))[0], np.full((1, 2), np.int64(600)).astype(np.int8))
    assert_bits(run(lambda v: ops.sum(v, axes=(1,)), x)[0], np.array([300]).astype(np.int8))
    assert_bits(run(lambda v: ops.cumsum(v, axis=1), x)[0], np.array([[100, 200, 300]]).astype(np.int8))


def test_scatter_is_sequential() -> None:
    x, one, half = np.zeros(1, np.float16), np.float16(2048), np.float16(1)
    at = np.zeros(3, np.int64)
    add = lambda v, u, i: ops.scatter(v, u, i, axes=(0,), mode="add")  # noqa: E731
    assert run(add, x, np.array([one, half, half]), at)[0] == 2048  # 1 is lost each time
    assert run(add, x, np.array([half, half, one]), at)[0] == 2050
    put = lambda v, u, i: ops.scatter(v, u, i, axes=(0,), mode="set")  # noqa: E731
    assert run(put, x, np.array([1, 2, 3], np.float16), at)[0] == 3


@pytest.mark.parametrize("dtype", [f32, f64, f16, bf16], ids=lambda d: d.name)
def test_extrema_of_special_values(dtype: DType) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0], [nan, 1.0], [1.0, nan], [-inf, inf], [inf, inf]]
    x = np.array(rows).astype(dtype.numpy)
    greatest, least = [0.0, 0.0, -0.0, nan, nan, inf, inf], [-0.0, -0.0, -0.0, nan, nan, -inf, inf]
    for n, want in ((0, greatest), (1, least)):
        reduced = (ops.max, ops.min)[n]
        pairwise = (ops.maximum, ops.minimum)[n]
        assert_bits(run(lambda v, r=reduced: r(v, axes=(1,)), x)[0], np.array(want).astype(dtype.numpy))
        assert_bits(run(pairwise, x[:, 0].copy(), x[:, 1].copy())[0], np.array(want).astype(dtype.numpy))
    assert run(lambda v: ops.argmax(v, axes=(1,)), x)[0].tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert run(lambda v: ops.argmin(v, axes=(1,)), x)[0].tolist() == [0, 0, 0, 0, 1, 0, 0]


def test_integer_division_never_traps() -> None:
    x, y = np.array([7, -7, 7, -7, -128, 5, 0], np.int8), np.array([2, 2, -2, -2, -1, 0, 0], np.int8)
    assert run(ops.floor_divide, x, y)[0].tolist() == [3, -4, -4, 3, -128, 0, 0]
    assert run(ops.remainder, x, y)[0].tolist()[:5] == [1, 1, -1, -1, 0]


def test_bitcast_shows_one_nan() -> None:
    for d, integer, want in ((f16, i16, 0x7E00), (bf16, i16, 0x7FC0), (f32, i32, 0x7FC00000), (f64, i64, 0x7FF8 << 48)):
        x = np.array([-want if d is f64 else -1], integer.numpy).view(d.numpy)
        assert np.isnan(x.astype(np.float64)).all() or d is f64
        x = np.where(True, np.array([np.nan, -0.0]).astype(d.numpy) * np.array([-1, 1], d.numpy), x)
        got = run(lambda v, i=integer: ops.bitcast(v, dtype=i), x)[0]
        assert got.tolist() == [want, -(1 << (integer.bits - 1))]


# ------------------------------------------------------------------------------------------------------------- random
def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 as in Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011)."""
    x, k, mask = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        p, q = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(q >> 32) ^ x[1] ^ k[0], q & mask, (p >> 32) ^ x[3] ^ k[1], p & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return x


@pytest.mark.parametrize(
    "key, counter", [(0, 0), (1, 5), (-1, -1), (0x123456789ABCDEF, (1 << 32) - 1), (7, (1 << 63) - 1)]
)
def test_random_bits(key: int, counter: int) -> None:
    words: list[int] = []
    for block in range(3):
        c = (counter + block) % 2**64
        words += philox([c & 0xFFFFFFFF, c >> 32, 0, 0], [key & 0xFFFFFFFF, (key % 2**64) >> 32])
    want = np.array(words[:10], np.uint32).view(np.int32).reshape(2, 5)
    assert_bits(run(lambda k, c: ops.random_bits(k, c, shape=(2, 5)), np.int64(key), np.int64(counter))[0], want)


# -------------------------------------------------------------------------------------------------------------- views
@pytest.mark.parametrize(
    "case", [c for c in cases(dtypes=(f32,)) if isinstance(c.row.op.kind, Movement)], ids=str
)  # fmt: skip
def test_view_agrees_with_reference(case: Case) -> None:
    """The positions a backend reads are those the reference reads."""
    function, arrays = case.function(), case.arrays()
    kind = case.row.op.kind
    assert isinstance(kind, Movement)
    (want,) = interpret(function, *arrays)
    view = kind.view(arrays[0].shape, want.shape, **case.attrs)
    assert len(view.axes) == arrays[0].ndim and len(view.guards) in (0, arrays[0].ndim)
    got = np.empty_like(want)
    for place in np.ndindex(want.shape):
        source, inside = [], True
        for k, axis in enumerate(view.axes):
            position = axis.offset + sum(c * place[a] for a, c in axis.terms)
            guard = view.guards[k] if view.guards else None
            if guard is not None:
                bound, step = guard
                inside &= 0 <= position < bound * step and position % step == 0
                position //= step
            source.append(position)
        if inside:
            assert all(0 <= p < d for p, d in zip(source, arrays[0].shape))
        got[place] = arrays[0][tuple(source)] if inside else arrays[1]
    assert_bits(got, want)


# --------------------------------------------------------------------------------------------------------------- sugar
def test_operators_broadcast_and_promote() -> None:
    x, y = np.array([[1.5], [2.0]], np.float32), np.array([1, 2, 3], np.int64)
    (got,) = run(lambda a, c: (2 * a + c) / 2 - a**2 // 1 + abs(-a) % 2, x, y)
    want = (2 * x + y.astype(np.float32)) / np.float32(2) - np.floor(x * x) + np.abs(x) % 2
    assert_bits(got, want.astype(np.float32))
    assert_bits(run(lambda a: a / a, y)[0], np.ones(3, np.float32))
    assert_bits(run(lambda a: a + 0.5, y)[0], (y + 0.5).astype(np.float32))
    assert_bits(run(lambda a: (a & 1) | (a ^ 2), y)[0], (y & 1) | (y ^ 2))
    assert_bits(run(lambda a: ~a, y)[0], ~y)
    assert_bits(run(lambda a: 2.0**a, x)[0], np.float32(2) ** x)


@pytest.mark.parametrize(
    "left, right", [((3,), (3,)), ((3,), (3, 2)), ((2, 3), (3,)), ((5, 2, 3), (3, 4)), ((2, 3), (5, 3, 4)), ((5, 1, 2, 3), (4, 3, 2))]
)  # fmt: skip
def test_matmul_broadcasts_like_numpy(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a, c = rng.integers(-4, 5, left).astype(np.float32), rng.integers(-4, 5, right).astype(np.float32)
    assert_bits(run(nd.matmul, a, c)[0], np.asarray(a @ c))


def test_sum_to_undoes_broadcasting() -> None:
    for shape, wide in (((), (2, 3)), ((3,), (2, 3)), ((2, 1), (2, 3)), ((1, 1), (4, 2, 3)), ((1, 3), (0, 3))):
        ones = np.ones(wide, np.float32)
        (got,) = run(lambda v, s=shape: nd.sum_to(v, s), ones)
        assert got.shape == shape and (got == ones.size / max(math.prod(shape), 1)).all()


def test_mean_and_keepdims() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert_bits(run(lambda v: nd.mean(v, -1), x)[0], x.mean(1))
    assert_bits(run(lambda v: nd.mean(v, (0, 1), keepdims=True), x)[0], x.mean(keepdims=True))
    assert_bits(run(lambda v: nd.max(v, 0, keepdims=True), x)[0], x.max(0, keepdims=True))
    function = function_of(lambda v: (nd.mean(v, 0),), TensorType(f32, (b, 4)))
    assert_bits(interpret(function, x)[0], x.mean(0))


def test_function_is_built_from_strict_ops_only() -> None:
    f: Function = function_of(lambda x, y: (x + y,), TensorType(f32, (3,)), TensorType(f32, (2, 3)))
    assert [op.definition.name for op in f.ops] == ["broadcast", "add"]
