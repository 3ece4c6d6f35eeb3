"""The op table: one row per op, with operands to try it on. Every test that goes over all ops goes over this.

A `Case` is a row on one dtype and one set of shapes and attributes: it makes arrays (same seed, same arrays) and the Function
that applies the op to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

import duo_ir.ops as ops
from duo_ir.core import Builder, Function
from duo_ir.opdef import OpDef
from duo_ir.types import DType, TensorType, bf16, bool_, f16, f32, f64, i8, i16, i32, i64, u8
from duo_ir.types import dtype as dtype_of

FLOATS = (f32, f64, f16, bf16)
INTS = (i8, i16, i32, i64, u8)
NUMBERS = FLOATS + INTS
ALL = (*NUMBERS, bool_)
BITS = (*INTS, bool_)
SHAPES = ((), (1,), (7,), (0,), (3, 5), (2, 0, 3), (33,))

Rng = np.random.Generator
Shape = tuple[int, ...]
Variants = tuple[tuple[tuple[Shape, ...], dict[str, Any]], ...]  # (operand shapes, attributes)


# --------------------------------------------------------------------------------------------------------- operands
def real(rng: Rng, dtype: DType, shape: Shape, **_: Any) -> np.ndarray:
    """Numbers of both signs, most of them small; whole for integers, so that tests need not mind overflow."""
    if dtype.is_float:
        return np.asarray(rng.normal(0, 1.5, shape)).astype(dtype.numpy)
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < 0.5)
    return np.asarray(rng.integers(0 if dtype.kind == "u" else -9, 10, shape), dtype.numpy)


def _wide_real(rng: Rng, dtype: DType, shape: Shape, **_: Any) -> np.ndarray:
    """As `real`, of the dtype that narrow floats are computed in."""
    return real(rng, f32 if dtype.is_narrow_float else dtype, shape)


def _wide_sums(rng: Rng, dtype: DType, shape: Shape, **_: Any) -> np.ndarray:
    """As `_wide_real`, but large enough to be logarithms of sums of exponentials."""
    return _wide_real(rng, dtype, shape) + np.asarray(6, f32.numpy if dtype.is_narrow_float else dtype.numpy)


def wild(rng: Rng, dtype: DType, shape: Shape, **_: Any) -> np.ndarray:
    """Any bits of an integer, any magnitude of a float."""
    if not dtype.is_integer:
        return real(rng, dtype, shape) * dtype.numpy.type(1000 if dtype.is_float else 1)
    limits = np.iinfo(dtype.numpy)
    return rng.integers(limits.min, limits.max, shape, dtype.numpy, endpoint=True)


def uniform(low: float, high: float) -> Callable[..., np.ndarray]:
    def make(rng: Rng, dtype: DType, shape: Shape, **_: Any) -> np.ndarray:
        return np.asarray(rng.uniform(low, high, shape)).astype(dtype.numpy)

    return make


def nonzero(rng: Rng, dtype: DType, shape: Shape, **_: Any) -> np.ndarray:
    """Far enough from zero to divide by."""
    x = real(rng, dtype, shape)
    return np.where(np.abs(x.astype(np.float64)) < 0.25, dtype.numpy.type(1), x)


def spread(rng: Rng, dtype: DType, shape: Shape, **_: Any) -> np.ndarray:
    """Distinct numbers in random order, with gaps (so that a finite difference does not change their order)."""
    n = math.prod(shape)
    values = np.asarray(rng.permutation(n) - n // 2)
    return (values * 0.25 if dtype.is_float else values % 100).astype(dtype.numpy).reshape(shape)


def some(dtype: DType, maker: Callable[..., np.ndarray] = real) -> Callable[..., np.ndarray]:
    """An operand of a dtype of its own."""
    return lambda rng, _, shape, **rest: maker(rng, dtype, shape, **rest)


def index(number: int) -> Callable[..., np.ndarray]:
    """Index operand number `number` of gather or scatter, valid for attribute axes."""

    def make(rng: Rng, _: DType, shape: Shape, shapes: tuple[Shape, ...], attrs: dict[str, Any]) -> np.ndarray:
        bound = shapes[0][attrs["axes"][number]]
        return np.asarray(rng.integers(0, max(bound, 1), shape), np.int64)

    return make


# -------------------------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class Row:
    """One op. numpy(*arrays, **attrs): an independent meaning, on arrays whose floats are float64; None: tested elsewhere.
    ulp: how far a float may be from it, in units of the last place; 0 is to the bit; None: a few eps of the largest term.
    smooth: the operands whose gradient can be checked by finite differences. variants: (operand shapes, attributes)."""

    op: OpDef
    numpy: Callable[..., Any] | None
    makers: tuple[Callable[..., np.ndarray], ...]
    dtypes: tuple[DType, ...]
    variants: Variants
    ulp: float | None = 0
    smooth: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.op.name


@dataclass(frozen=True)
class Case:
    row: Row
    dtype: DType
    shapes: tuple[Shape, ...]
    attrs: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        shapes = "x".join(str(list(s)).replace(" ", "") for s in self.shapes)
        attrs = ",".join(f"{k}={v}" for k, v in self.attrs.items() if not isinstance(v, (Function, DType)))
        target = self.attrs.get("dtype", "")
        return f"{self.row.name}-{self.dtype.name}{'-' + target.name if target else ''}-{shapes}{'-' + attrs if attrs else ''}"

    def arrays(self, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        makers = self.row.makers
        if len(makers) < len(self.shapes):
            makers = (*makers, *[makers[-1]] * (len(self.shapes) - len(makers)))
        return [m(rng, self.dtype, s, shapes=self.shapes, attrs=self.attrs) for m, s in zip(makers, self.shapes)]

    def types(self) -> list[TensorType]:
        return [TensorType(dtype_of(a.dtype), a.shape) for a in self.arrays()]

    def function(self) -> Function:
        builder = Builder(self.row.name)
        with builder:
            out = self.row.op(*[builder.parameter(t) for t in self.types()], **self.attrs)
        return builder.build(out if isinstance(out, tuple) else (out,))


def _every_shape(n: int) -> Variants:
    return tuple([((s,) * n, {}) for s in SHAPES])


def _with_attrs(each: list[dict[str, Any]]) -> Variants:
    return tuple([((s,), attrs) for attrs in each for s in SHAPES[1:5]])


def _unary(op: OpDef, fn: Any, maker: Any = real, dtypes: Any = FLOATS, ulp: float = 0, smooth: bool = True) -> Row:
    return Row(op, fn, (maker,), dtypes, _every_shape(1), ulp, (0,) if smooth else ())


def _binary(
    op: OpDef, fn: Any, makers: Any = (real, real), dtypes: Any = NUMBERS, ulp: float = 0, smooth: Any = (0, 1)
) -> Row:
    return Row(op, fn, makers, dtypes, _every_shape(2), ulp, smooth)


def _over_axes(*pairs: tuple[Shape, tuple[int, ...]]) -> Variants:
    return tuple([((shape,), {"axes": axes}) for shape, axes in pairs])


_erf = np.vectorize(math.erf, otypes=[np.float64])
_quantile = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])


def _shift_logical(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    return np.right_shift(x.view(unsigned), y.view(unsigned)).view(x.dtype)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _normal(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + _erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x * p, p + x * p * (1 - p) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def _sign(x: np.ndarray) -> np.ndarray:
    return np.sign(x) if x.dtype.kind != "f" else np.where(x == 0, x, np.sign(x))


def _pad(x: np.ndarray, fill: np.ndarray, low: Shape, high: Shape, interior: Shape) -> np.ndarray:
    for axis, (lo, hi, gap) in enumerate(zip(low, high, interior)):
        filler = lambda n, x=x, axis=axis: np.full((*x.shape[:axis], n, *x.shape[axis + 1 :]), fill, x.dtype)  # noqa: E731
        parts = [filler(lo)]
        for k in range(x.shape[axis]):
            parts += [filler(gap)] * (k > 0) + [np.take(x, [k], axis)]
        x = np.concatenate([*parts, filler(hi)], axis)
    return x


def _gather(x: np.ndarray, *indices: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    rest = [a for a in range(x.ndim) if a not in axes]
    out = np.empty((*indices[0].shape, *[x.shape[a] for a in rest]), x.dtype)
    for place in np.ndindex(indices[0].shape):
        where: list[Any] = [np.s_[:]] * x.ndim
        for axis, i in zip(axes, indices):
            where[axis] = int(i[place])
        out[place] = x[tuple(where)]
    return out


def _weights(q: np.ndarray, k: np.ndarray, mask: Any, causal: bool, scale: float) -> np.ndarray:
    """exp(scores) of [..., T, H, D] and [..., S, H, D] as [..., H, T, S], 0 where a key may not be seen."""
    s = np.einsum("...thd,...shd->...hts", q, k) * scale
    for m in mask:
        s = np.where(m, s, -np.inf) if m.dtype == np.bool_ else s + m
    return np.exp(np.where(np.tri(*s.shape[-2:], dtype=bool), s, -np.inf) if causal else s)


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, *mask: np.ndarray, causal: bool, scale: float) -> tuple[Any, Any]:
    weights = _weights(q, k, mask, causal, scale)
    total = np.swapaxes(weights.sum(-1), -1, -2)
    some = np.where(total == 0, 1, total)
    out = np.einsum("...hts,...she->...the", weights, v) / some[..., None]
    return out, np.where(total == 0, np.inf, np.log(some))


def _attention_gradient(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, lse: np.ndarray, delta: np.ndarray, g: np.ndarray, *mask: np.ndarray, causal: bool,
    scale: float,
) -> tuple[Any, Any, Any]:  # fmt: skip
    p = _weights(q, k, mask, causal, scale) * np.exp(-np.swapaxes(lse, -1, -2)[..., None])
    ds = p * (np.einsum("...the,...she->...hts", g, v) - np.swapaxes(delta, -1, -2)[..., None])
    dq, dk = np.einsum("...hts,...shd->...thd", ds, k) * scale, np.einsum("...hts,...thd->...shd", ds, q) * scale
    return dq, dk, np.einsum("...hts,...the->...she", p, g)


_RUNNING: Variants = tuple(((s,), {"axis": a}) for s, a in (((7,), 0), ((3, 5), 0), ((3, 5), 1), ((0,), 0), ((2, 3, 4), 1)))


def _extremum(x: np.ndarray, axis: int, pick: Any) -> tuple[Any, Any]:
    """Running extrema, and where the last of equals is."""
    if not x.size:
        return x, np.zeros(x.shape, np.int64)
    values = pick.accumulate(x, axis)
    place = np.arange(x.shape[axis]).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return values, np.maximum.accumulate(np.where(x == values, place, 0), axis)


def _recurrence(a: np.ndarray, b: np.ndarray, axis: int) -> Any:
    out, state = np.empty_like(b), np.zeros_like(np.take(b, 0, axis)) if b.size else 0
    for k in range(b.shape[axis]):
        state = np.take(a, k, axis) * state + np.take(b, k, axis)
        np.moveaxis(out, axis, 0)[k] = state
    return out


def _sorted(x: np.ndarray, axis: int, descending: bool, count: int) -> tuple[Any, Any]:
    """A stable descending sort is a stable ascending one of the reversed, reversed."""
    if descending:
        order = x.shape[axis] - 1 - np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
    else:
        order = np.argsort(x, axis, kind="stable")
    places = np.take(order, np.arange(count), axis)
    return np.take_along_axis(x, places, axis), places


_TOGETHER = (  # shapes of query, key, value and perhaps a mask; causal
    ((5, 1, 3), (5, 1, 3), (5, 1, 2), False), ((2, 3, 2, 4), (2, 7, 2, 4), (2, 7, 2, 4), (2, 2, 3, 7), False),
    ((66, 1, 2), (66, 1, 2), (66, 1, 3), True), ((0, 2, 3), (4, 2, 3), (4, 2, 1), True),
)  # fmt: skip


def _attended(backward: bool) -> Variants:
    out: list[tuple[tuple[Shape, ...], dict[str, Any]]] = []
    for q, k, v, *mask, causal in _TOGETHER:
        rows = (q[:-1], q[:-1], (*q[:-1], v[-1])) if backward else ()
        out.append(((q, k, v, *rows, *mask), {"causal": causal, "scale": 0.5}))
    return tuple(out)


def _scatter(x: np.ndarray, updates: np.ndarray, *indices: np.ndarray, axes: tuple[int, ...], mode: str) -> np.ndarray:
    x = x.copy()
    for place in np.ndindex(indices[0].shape):
        where: list[Any] = [np.s_[:]] * x.ndim
        for axis, i in zip(axes, indices):
            where[axis] = int(i[place])
        x[tuple(where)] = updates[place] + (x[tuple(where)] if mode == "add" else 0)
    return x


def _conv(
    x: np.ndarray, w: np.ndarray, strides: Shape, padding: Any, x_dilation: Shape, w_dilation: Shape, groups: int
) -> np.ndarray:
    spatial = tuple(range(1, x.ndim - 1))
    for axis, d in zip(spatial, x_dilation):
        spaced = np.zeros((*x.shape[:axis], max((x.shape[axis] - 1) * d + 1, 0), *x.shape[axis + 1 :]), x.dtype)
        spaced[(slice(None),) * axis + (slice(None, None, d),)] = x
        x = spaced
    x = np.pad(x, [(0, 0), *[(max(lo, 0), max(hi, 0)) for lo, hi in padding], (0, 0)])
    x = x[(slice(None), *[slice(max(-lo, 0), x.shape[a] - max(-hi, 0)) for a, (lo, hi) in zip(spatial, padding)])]
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape, w_dilation)]
    counts = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:], reach, strides)]
    c, o = w.shape[-2], w.shape[-1] // groups
    out = np.zeros((x.shape[0], *counts, w.shape[-1]), x.dtype)
    for place in np.ndindex(*counts):
        window = x[
            (slice(None), *[slice(p * s, p * s + r, d) for p, s, r, d in zip(place, strides, reach, w_dilation)])
        ]
        for g in range(groups):
            part, kernel = window[..., g * c : (g + 1) * c], w[..., g * o : (g + 1) * o]
            out[(slice(None), *place, slice(g * o, (g + 1) * o))] = np.tensordot(part, kernel, x.ndim - 1)
    return out


def _convolved() -> Iterator[tuple[tuple[Shape, ...], dict[str, Any]]]:
    """(x, w, strides, padding, x_dilation, w_dilation, groups)."""
    for x, w, strides, padding, x_dilation, w_dilation, groups in (
        ((2, 5, 3), (3, 3, 4), (1,), ((1, 1),), (1,), (1,), 1),
        ((1, 4, 2), (4, 2, 1), (1,), ((0, 0),), (1,), (1,), 1),
        ((2, 6, 5, 3), (3, 2, 3, 4), (2, 3), ((1, 0), (0, 2)), (1, 1), (1, 1), 1),
        ((1, 5, 4, 4), (3, 2, 2, 6), (1, 1), ((2, 1), (-1, 2)), (1, 1), (2, 1), 2),
        ((2, 4, 3, 3), (2, 3, 1, 3), (1, 2), ((1, 1), (1, 1)), (2, 3), (1, 2), 3),
        ((1, 3, 3, 2), (1, 1, 2, 3), (1, 1), ((0, 0), (0, 0)), (2, 2), (1, 1), 1),
        ((1, 2, 2, 2), (5, 5, 2, 2), (1, 1), ((2, 3), (4, 4)), (1, 1), (1, 1), 1),
        ((0, 3, 3, 2), (2, 2, 2, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1),
        ((1, 3, 3, 0), (2, 2, 0, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1),
        ((1, 2, 3, 2, 2), (2, 2, 1, 2, 3), (1, 1, 2), ((0, 1), (1, 1), (0, 0)), (1, 1, 1), (1, 2, 1), 1),
    ):
        yield (x, w), {
            "strides": strides, "padding": padding, "x_dilation": x_dilation, "w_dilation": w_dilation, "groups": groups,
        }  # fmt: skip


def _step(types: tuple[TensorType, ...], fn: Callable[..., Any], name: str) -> Function:
    builder = Builder(name)
    with builder:
        out = fn(*[builder.parameter(t) for t in types])
    return builder.build(out)


def _loop(n: int) -> dict[str, Any]:
    types = (TensorType(i64), TensorType(f32, (3,)), TensorType(f32, (3,)))
    test = _step(types, lambda i, x, y: (ops.broadcasting.lt(i, n),), "test")
    body = _step(types, lambda i, x, y: (i + 1, x * 0.5 + y), "body")
    return {"test": test, "body": body, "carried": 2}


def _looped(
    i: np.ndarray, x: np.ndarray, y: np.ndarray, test: Function, body: Function, carried: int
) -> tuple[Any, ...]:
    for _ in range(5 - int(i)):
        x = (x * 0.5).astype(np.float32) + y
    return np.int64(5), x


_PAIR = (TensorType(f32, (3,)), TensorType(f32, (3,)))
_BRANCHES = {
    "then": _step(_PAIR, lambda x, y: (x * y, x - y), "then"),
    "orelse": _step(_PAIR, lambda x, y: (x + y, y), "orelse"),
}
_CASTS = [{"dtype": d} for d in ALL]
_REDUCED = _over_axes(
    ((7,), (0,)), ((1,), (0,)), ((3, 5), (0,)), ((3, 5), (1,)), ((3, 5), (0, 1)), ((2, 3, 4), (0, 2)), ((17, 3), (0,)), ((2, 33), (1,)),
    ((0,), (0,)), ((0, 3), (0,)), ((3, 0), (0,)), ((2, 3), ()), ((), ()), ((1030,), (0,)),
)  # fmt: skip
_CHOSEN = tuple(v for v in _REDUCED if all(v[0][0][a] for a in v[1]["axes"]))
_SEARCHED = tuple(v for v in _CHOSEN if len(v[1]["axes"]) == 1)
_INDEXED: Variants = (
    (((5,), (4,)), {"axes": (0,)}),
    (((5, 3), (2, 2)), {"axes": (0,)}),
    (((4, 5, 3), (6,)), {"axes": (1,)}),
    (((4, 5, 3), (6,), (6,)), {"axes": (2, 0)}),
    (((5, 3), ()), {"axes": (0,)}),
    (((5, 3), (0,)), {"axes": (0,)}),
)


def _scattered() -> Iterator[tuple[tuple[Shape, ...], dict[str, Any]]]:
    for (x, *indices), attrs in _INDEXED:
        rest = tuple([d for a, d in enumerate(x) if a not in attrs["axes"]])
        for mode in ("add", "set"):
            yield (x, (*indices[0], *rest), *indices), {**attrs, "mode": mode}


def _table() -> list[Row]:
    o = ops
    half = some(f32)
    return [
        _binary(o.add, np.add),
        _binary(o.sub, np.subtract),
        _binary(o.mul, np.multiply),
        _binary(o.div, np.divide, (real, nonzero), FLOATS),
        _unary(o.neg, np.negative, dtypes=NUMBERS),
        _unary(o.abs, np.abs, nonzero, NUMBERS),
        _unary(o.sign, _sign, nonzero, NUMBERS, smooth=False),
        _binary(o.maximum, np.maximum),
        _binary(o.minimum, np.minimum),
        _binary(o.pow, np.power, (uniform(0.25, 4), real), FLOATS, 1),
        Row(
            o.integer_pow, lambda x, n: np.power(x, n) if n >= 0 else 1 / np.power(x, -n), (nonzero,), FLOATS,
            _with_attrs([{"n": n} for n in (-3, -1, 0, 1, 2, 5)]), 6, (0,),
        ),
        _binary(o.floor_divide, np.floor_divide, (real, nonzero), smooth=()),
        _binary(o.remainder, np.remainder, (real, nonzero), smooth=()),
        _unary(o.exp, np.exp, ulp=1),
        _unary(o.expm1, np.expm1, ulp=2.5),
        _unary(o.log, np.log, uniform(0.1, 4), ulp=1),
        _unary(o.log1p, np.log1p, uniform(-0.9, 4), ulp=2.5),
        _unary(o.sqrt, np.sqrt, uniform(0.1, 4)),
        _unary(o.rsqrt, lambda x: 1 / np.sqrt(x), uniform(0.1, 4), ulp=2.5),
        _unary(o.sin, np.sin, ulp=2.5),
        _unary(o.cos, np.cos, ulp=2.5),
        _unary(o.tan, np.tan, uniform(-1.2, 1.2), ulp=2.5),
        _unary(o.asin, np.arcsin, uniform(-0.9, 0.9), ulp=2.5),
        _unary(o.acos, np.arccos, uniform(-0.9, 0.9), ulp=2.5),
        _unary(o.atan, np.arctan, ulp=2.5),
        _unary(o.sinh, np.sinh, ulp=2.5),
        _unary(o.cosh, np.cosh, ulp=2.5),
        _unary(o.tanh, np.tanh, ulp=2.5),
        _unary(o.sigmoid, _sigmoid, ulp=2.5),
        _unary(o.erf, _erf, ulp=1),
        _unary(o.normal_quantile, _quantile, uniform(0.02, 0.98), ulp=4),
        _unary(o.gelu_tanh, _gelu_tanh, ulp=None),
        _unary(o.gelu, lambda x: (x * _normal(x), _normal(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)), ulp=None),
        _unary(o.silu, lambda x: (x * _sigmoid(x), _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))), ulp=None),
        _unary(o.floor, np.floor, smooth=False),
        _unary(o.ceil, np.ceil, smooth=False),
        _unary(o.trunc, np.trunc, smooth=False),
        _unary(o.round, np.rint, smooth=False),
        *[_binary(op, fn, dtypes=ALL, smooth=()) for op, fn in (
            (o.eq, np.equal), (o.ne, np.not_equal), (o.lt, np.less), (o.le, np.less_equal), (o.gt, np.greater), (o.ge, np.greater_equal),
        )],
        *[_binary(op, fn, (wild, wild), BITS, smooth=()) for op, fn in (
            (o.and_, np.bitwise_and), (o.or_, np.bitwise_or), (o.xor, np.bitwise_xor),
        )],
        _unary(o.not_, np.invert, wild, BITS, smooth=False),
        *[_binary(op, fn, (wild, uniform(0, 7)), INTS, smooth=()) for op, fn in (
            (o.shift_left, np.left_shift), (o.shift_right_logical, _shift_logical), (o.shift_right_arithmetic, np.right_shift),
        )],
        Row(o.where, np.where, (some(bool_), real, real), ALL, _every_shape(3), 0, (1, 2)),
        Row(o.cast, None, (real,), ALL, _with_attrs(_CASTS), 0, (0,)),
        Row(o.bitcast, lambda x, dtype: x.view(dtype.numpy), (wild,), (i32,), _with_attrs([{"dtype": i32}, {"dtype": f32}])),
        _unary(o.is_finite, np.isfinite, smooth=False),
        _unary(o.stop_gradient, lambda x: x, dtypes=ALL, smooth=False),
        _binary(o.straight_through, lambda x, y: x, dtypes=ALL, smooth=()),
        Row(o.constant, lambda value, dtype: np.asarray(value, dtype.numpy), (), (f32,), tuple(
            ((), {"value": v, "dtype": d}) for v, d in ((0.1, f32), (0.1, f64), (0.1, f16), (0.1, bf16), (-0.0, f32), (-3, i8), (True, bool_))
        )),
        Row(o.iota, lambda shape, axis, dtype: np.broadcast_to(
            np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape).astype(dtype.numpy),
            (), (f32,), tuple(((), {"shape": s, "axis": a, "dtype": d})
            for s, a in (((5,), 0), ((3, 4), 0), ((3, 4), 1), ((0,), 0), ((300,), 0)) for d in NUMBERS),
        ),
        Row(o.size, lambda dim: np.int64(dim), (), (f32,), (((), {"dim": 7}),)),
        Row(o.random_bits, None, (some(i64, wild), some(i64, wild)), (i64,), tuple(
            (((), ()), {"shape": s}) for s in ((), (1,), (4,), (7,), (3, 5), (0,))
        )),
        Row(o.random_word, None, (some(i64, wild),) * 3, (i64,), _every_shape(3)),
        Row(o.sum, lambda x, axes: x.sum(axis=axes, dtype=x.dtype), (real,), NUMBERS, _REDUCED, None, (0,)),
        Row(o.prod, lambda x, axes: x.prod(axis=axes, dtype=x.dtype), (real,), NUMBERS, _REDUCED[:-1], None, (0,)),
        Row(o.max, lambda x, axes: x.max(axis=axes), (spread,), NUMBERS, _CHOSEN, 0, (0,)),
        Row(o.min, lambda x, axes: x.min(axis=axes), (spread,), NUMBERS, _CHOSEN, 0, (0,)),
        Row(o.any, lambda x, axes: x.any(axis=axes), (real,), (bool_,), _REDUCED),
        Row(o.all, lambda x, axes: x.all(axis=axes), (real,), (bool_,), _REDUCED),
        Row(o.argmax, lambda x, axes: np.asarray(x.argmax(axis=axes[0])), (real,), NUMBERS, _SEARCHED),
        Row(o.argmin, lambda x, axes: np.asarray(x.argmin(axis=axes[0])), (real,), NUMBERS, _SEARCHED),
        Row(o.cumsum, lambda x, axis: np.cumsum(x, axis, dtype=x.dtype), (real,), NUMBERS, _RUNNING, None, (0,)),
        Row(o.cumprod, lambda x, axis: np.cumprod(x, axis, dtype=x.dtype), (uniform(-2, 2),), NUMBERS, _RUNNING, None, (0,)),
        Row(o.cummax, lambda x, axis: _extremum(x, axis, np.maximum), (spread,), NUMBERS, _RUNNING, 0, (0,)),
        Row(o.cummin, lambda x, axis: _extremum(x, axis, np.minimum), (spread,), NUMBERS, _RUNNING, 0, (0,)),
        Row(o.logcumsumexp, lambda x, axis: np.logaddexp.accumulate(x, axis), (real,), FLOATS, _RUNNING, None, (0,)),
        Row(o.linear_scan, _recurrence, (uniform(-1, 1), real), NUMBERS, tuple(((s[0], s[0]), a) for s, a in _RUNNING), None, (0, 1)),
        Row(o.sort, _sorted, (spread,), ALL, tuple(
            ((s,), {"axis": a, "descending": d, "count": k}) for s, a, d, k in (
                ((7,), 0, False, 7), ((7,), 0, True, 3), ((3, 5), 0, True, 3), ((3, 5), 1, False, 5), ((2, 33), 1, False, 33), ((0,), 0, False, 0),
                ((3, 70), 1, True, 0), ((2, 3, 4), 1, False, 2), ((1,), 0, True, 1), ((2, 300), 1, True, 4), ((2, 0), 0, False, 1),
            )
        ), 0, (0,)),
        Row(o.reshape, lambda x, shape: x.reshape(shape), (real,), ALL, tuple(
            ((s,), {"shape": t}) for s, t in (((6,), (2, 3)), ((2, 3), (3, 2)), ((1,), ()), ((), (1, 1)), ((0,), (2, 0)), ((2, 3, 4), (6, 4)))
        ), 0, (0,)),
        Row(o.transpose, lambda x, permutation: np.transpose(x, permutation), (real,), ALL, tuple(
            ((s,), {"permutation": p}) for s, p in (((2, 3), (1, 0)), ((2, 3, 4), (1, 2, 0)), ((), ()), ((5,), (0,)), ((2, 0, 3), (2, 0, 1)))
        ), 0, (0,)),
        Row(o.broadcast, lambda x, shape: np.broadcast_to(x, shape), (real,), ALL, tuple(
            ((s,), {"shape": t}) for s, t in (((), (2, 3)), ((3,), (2, 3)), ((2, 1), (2, 3)), ((1, 1), (4, 2, 3)), ((1,), (0,)), ((3,), (3,)))
        ), 0, (0,)),
        Row(o.slice, lambda x, start, stop, step: x[tuple(map(slice, start, stop, step))], (real,), ALL, tuple(
            ((s,), {"start": a, "stop": b, "step": c}) for s, a, b, c in (
                ((7,), (1,), (5,), (1,)), ((7,), (0,), (7,), (3,)), ((7,), (2,), (7,), (4,)), ((3, 5), (1, 0), (3, 4), (1, 2)),
                ((5,), (2,), (2,), (1,)), ((), (), (), ()), ((0,), (0,), (0,), (2,)),
            )
        ), 0, (0,)),
        Row(o.pad, _pad, (real, real), ALL, tuple(
            ((s, ()), {"low": a, "high": b, "interior": c}) for s, a, b, c in (
                ((3,), (1,), (2,), (0,)), ((3,), (0,), (0,), (2,)), ((2, 3), (1, 0), (0, 2), (1, 2)), ((0,), (2,), (1,), (3,)),
                ((), (), (), ()), ((1,), (0,), (0,), (5,)), ((4,), (0,), (0,), (0,)),
            )
        ), 0, (0, 1)),
        Row(o.concat, lambda *xs, axis: np.concatenate(xs, axis), (real,), ALL, (
            (((3,), (2,)), {"axis": 0}), (((2, 3), (2, 1), (2, 2)), {"axis": 1}), (((0, 2), (3, 2)), {"axis": 0}), (((4,),), {"axis": 0}),
        ), 0, (0, 1)),
        Row(o.flip, lambda x, axes: np.flip(x, axes), (real,), ALL, _over_axes(
            ((5,), (0,)), ((3, 4), (1,)), ((3, 4), (0, 1)), ((0,), (0,)), ((2,), ()), ((1, 3), (0,))
        ), 0, (0,)),
        Row(o.matmul, np.matmul, (real, real), NUMBERS, tuple(((a, b), {}) for a, b in (
            ((3, 4), (4, 5)), ((1, 1), (1, 1)), ((3, 4), (4, 1)), ((1, 7), (7, 3)), ((2, 3, 4), (2, 4, 2)), ((3, 0), (0, 2)), ((0, 3), (3, 2)),
            ((5, 33), (33, 1)), ((2, 600), (600, 3)), ((2, 2, 3, 5), (2, 2, 5, 1)), ((2, 3), (3, 0)),
        )), None, (0, 1)),
        Row(o.conv, _conv, (real, real), NUMBERS, tuple(_convolved()), None, (0, 1)),
        Row(o.attention, _attention, (real, real, real, _wide_real), FLOATS, _attended(False), None, (0, 1, 2, 3)),
        Row(
            o.attention_gradient, _attention_gradient, (real, real, real, _wide_sums, _wide_real, real, _wide_real), FLOATS,
            _attended(True), None, (0, 1, 2, 3, 4, 5, 6),
        ),
        Row(o.gather, _gather, (real, index(0), index(1)), ALL, _INDEXED, 0, (0,)),
        Row(o.scatter, _scatter, (real, real, index(0), index(1)), NUMBERS, tuple(_scattered()), None, (0, 1)),
        Row(o.cond, lambda p, x, y, then, orelse: (x * y, x - y) if p else (x + y, y), (some(bool_), half, half), (f32,),
            ((((), (3,), (3,)), _BRANCHES),), 0, (1, 2)),
        Row(o.while_, _looped, (some(i64, lambda rng, dtype, shape, **_: np.zeros(shape, dtype.numpy)), half, half), (f32,),
            ((((), (3,), (3,)), _loop(5)),), None),
    ]  # fmt: skip


TABLE = _table()


def cases(rows: list[Row] | None = None, dtypes: tuple[DType, ...] | None = None) -> Iterator[Case]:
    """Every row on every dtype, shape and attributes."""
    for row in TABLE if rows is None else rows:
        for d in row.dtypes:
            if dtypes is not None and d not in dtypes:
                continue
            for shapes, attrs in row.variants:
                yield Case(row, d, shapes, attrs)
