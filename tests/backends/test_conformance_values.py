"""Elementwise ops on the CPU backend against the interpreter, value by value: every f16 and bf16, any bits of the wider dtypes,
and casts at the values where rounding twice would show."""

from __future__ import annotations

import conformance as c
import ml_dtypes
import numpy as np
import op_table
import pytest

from duo_ir import ops
from duo_ir.core import Value
from duo_ir.opdef import Elementwise
from duo_ir.types import DTYPES, DType, bf16, f16, f32, f64, i64, u8

FLOATS = (f32, f64, f16, bf16)
ELEMENTWISE = [r for r in op_table.TABLE if isinstance(r.op.kind, Elementwise)]
UNARY = [r for r in ELEMENTWISE if len(r.variants[0][0]) == 1 and not r.variants[0][1]]
BINARY = [r for r in ELEMENTWISE if len(r.variants[0][0]) == 2]


def any_bits(dtype: DType, n: int, seed: int) -> np.ndarray:
    """Random bits as numbers of `dtype`, so every exponent comes up; half of the floats have a usual exponent."""
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.random(n) < 0.5
    found = rng.integers(0, 256, n * dtype.itemsize, np.uint8).view(dtype.numpy)
    if dtype.is_float:
        return np.where(rng.random(n) < 0.5, found, rng.normal(0, 4, n).astype(dtype.numpy))
    return found


def every(dtype: DType) -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(dtype.numpy)


@pytest.mark.parametrize("row", UNARY, ids=lambda r: r.name)
def test_unary(row: op_table.Row) -> None:
    """Every value of a 16-bit float, many of the other dtypes, also as a scalar beside the vectors' end."""
    n = 4099
    dtypes = row.dtypes
    runs = [[every(d) if d in (f16, bf16) else any_bits(d, n, seed) for d in dtypes] for seed in (0, 1)]

    def everything(*xs: Value) -> list[Value]:
        out = [row.op(x) for x in xs]
        return [r for o in out for r in (o if isinstance(o, tuple) else (o,))]

    function = c.function_of(everything, *c.types_of(runs[0]))
    each = len(function.results) // len(dtypes)
    labels = [d.name for d in dtypes for _ in range(each)]
    wrong = c.mismatches(function, *runs, labels=labels, fusions=(True,), threads=(2,))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("row", BINARY, ids=lambda r: r.name)
def test_binary(row: op_table.Row) -> None:
    n = 3001
    runs = [[any_bits(d, n, 10 * seed + k) for d in row.dtypes for k in (0, 1)] for seed in (0, 1)]
    for arrays in runs:  # near each other, where differences cancel and quotients are whole
        for x, y in zip(arrays[::2], arrays[1::2]):
            y[::3] = x[::3]

    def everything(*xs: Value) -> list[Value]:
        return [row.op(x, y) for x, y in zip(xs[::2], xs[1::2])]

    labels = [d.name for d in row.dtypes]
    wrong = c.mismatches(
        c.function_of(everything, *c.types_of(runs[0])), *runs, labels=labels, fusions=(True,), threads=(2,)
    )
    assert not wrong, "\n".join(wrong)


@np.errstate(all="ignore")
def rounding_points(source: DType, target: DType) -> np.ndarray:
    """Numbers of `source` at, beside and exactly between neighbouring numbers of the float `target`."""
    rng = np.random.default_rng(1)
    if target.itemsize == 2:
        kept = every(target).astype(np.float64)
    else:
        bits = np.dtype(f"u{target.itemsize}")
        kept = rng.integers(0, np.iinfo(bits).max, 6000, bits).view(target.numpy).astype(np.float64)
    kept = kept[np.isfinite(kept)]
    if source.is_integer:
        kept = kept[np.abs(kept) < 2.0**63]
    with np.errstate(all="ignore"):
        after = np.asarray(np.nextafter(kept.astype(target.numpy), target.numpy.type(np.inf))).astype(np.float64)
        middle = np.where(np.isfinite(after), kept / 2 + after / 2, kept)
        out = np.concatenate([kept, middle])
        if source.is_integer:
            limits = np.iinfo(source.numpy)
            whole = np.concatenate([out, np.asarray(2.0 ** rng.uniform(0, 62, 4000)) * rng.choice([-1, 1], 4000)])
            whole = whole[(whole >= limits.min) & (whole < limits.max)].astype(np.int64)
            near = np.concatenate([whole + d for d in (-1, 0, 1)])
            return near[(near >= limits.min) & (near <= limits.max)].astype(source.numpy)
        near = out.astype(source.numpy)
        inf = source.numpy.type(np.inf)
        return np.concatenate([near, np.nextafter(near, inf), np.nextafter(near, -inf), c.specials(source)])


@np.errstate(all="ignore")
@pytest.mark.parametrize("source", [d for d in DTYPES.values() if d.is_float or d.is_integer], ids=lambda d: d.name)
def test_casts_round_once(source: DType) -> None:
    pairs = [(t, rounding_points(source, t)) for t in FLOATS]
    if source.is_float:
        edges = np.concatenate(
            [2.0**b + np.array([-2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2]) for b in (0, 7, 8, 15, 31, 32, 63)]
        )
        with np.errstate(all="ignore"):
            values = np.concatenate([edges, -edges, any_bits(source, 3000, 4).astype(np.float64)]).astype(source.numpy)
        beside = [
            values,
            np.nextafter(values, source.numpy.type(np.inf)),
            np.nextafter(values, source.numpy.type(-np.inf)),
        ]
        values = np.concatenate([*beside, c.specials(source)])
    else:
        values = np.concatenate([any_bits(source, 3000, 4), c.specials(source)])
    pairs += [(t, values) for t in DTYPES.values() if not t.is_float]
    arrays = [values for _, values in pairs]

    def everything(*xs: Value) -> list[Value]:
        return [ops.cast(x, dtype=t) for x, (t, _) in zip(xs, pairs)]

    wrong = c.mismatches(
        c.function_of(everything, *c.types_of(arrays)), arrays, labels=[t.name for t, _ in pairs], threads=(2,)
    )
    assert not wrong, "\n".join(wrong)


def test_the_points_are_hard() -> None:
    """Rounding f64 to bf16 by way of f32 fails on some of them."""
    points = rounding_points(f64, bf16)
    with np.errstate(all="ignore"):
        twice = points.astype(np.float32).astype(ml_dtypes.bfloat16)
    (once,) = c.interpret(c.function_of(lambda x: ops.cast(x, dtype=bf16), *c.types_of([points])), points)
    assert c.differing(twice, once).any()


@pytest.mark.parametrize("dtype", [f32, f64, i64, u8], ids=lambda d: d.name)
@pytest.mark.parametrize("n", [2, 3, 5, 8, 9, 16, 31, 32, 63, 64, 65, 127, 129, 257])
def test_every_length(dtype: DType, n: int) -> None:
    """Lengths around every vector width, through straight, strided, flipped and transposed reads."""
    x, y = any_bits(dtype, 2 * n, 1).reshape(2, n), any_bits(dtype, 2 * n, 2).reshape(n, 2)

    def everything(x: Value, y: Value) -> list[Value]:
        turned = ops.transpose(y, permutation=(1, 0))
        row = ops.reshape(ops.slice(x, start=(1, 0), stop=(2, n), step=(1, 1)), shape=(n,))
        halves = [ops.slice(row, start=(s,), stop=(n,), step=(2,)) for s in (0, 1)]
        made = [x + turned, ops.flip(x, axes=(1,)) * turned, *[h + h for h in halves], ops.maximum(turned, x)]
        return [
            *made,
            ops.where(ops.lt(x, turned), x, turned),
            ops.concat(row, *halves, axis=0),
            ops.sum(x, axes=(0,)),
            ops.max(x, axes=(1,)),
        ]

    c.check(everything, [x, y], threads=(2,))
