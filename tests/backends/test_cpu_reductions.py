"""Reductions, alone and in stages, of the CPU backend against a plain NumPy reading of the kernel IR (`loop_kernels.py`)."""

from __future__ import annotations

import ctypes
import itertools
import math

import numpy as np
import pytest
from loop_kernels import (
    MACHINES,
    SIZES,
    body,
    check,
    compiled,
    contiguous,
    data,
    reference,
    run,
    same,
    softmax_like,
    total,
)

from duo_backends.cpu import nest, row_waves, stream
from duo_backends.cpu.emit import compile_kernel
from duo_backends.cpu.jit import machine
from duo_ir.kernels.body import BodyBuilder
from duo_ir.kernels.kernel import (
    Access,
    Affine,
    Arg,
    Instr,
    LoopKernel,
    Reduce,
    Stage,
    Store,
)
from duo_ir.scalar import math as recipes
from duo_ir.types import DTYPES, Dim, bf16, bool_, f16, f32, f64, i8, i32, i64, row_major, u8


def reduce_kernel(outer, inner, kind, dtype, source, size, dims=()):
    loads = [("load", (), dtype, Access(0, source))]
    args = (0,)
    value = dtype
    if dtype in (f16, bf16):
        loads.append(("convert", (0,), f32))
        args, value = (1,), f32
    if kind == "dot":
        loads.append(("fabs", args, value) if value.kind == "f" else ("neg", args, value))
        args = (*args, len(loads) - 1)
    result = i64 if kind.startswith("arg") else value
    last = body(("reduced", (), result, (0, 0)))
    out = Store(Access(1, contiguous(outer)), 0)
    stages = (Stage(tuple(inner), body(*loads), (), (Reduce(kind, args, result),)), Stage((), last, (out,)))
    return LoopKernel((Arg(dtype, size), Arg(result, total(outer), True)), tuple(outer), stages, dims), result


def kinds_of(dtype):
    if dtype is bool_:
        return ["any", "all"]
    return ["sum", "prod", "dot", "max", "min", "argmax", "argmin"]


def check_reduce(outer, inner, kind, dtype, strides, special=0.0, **options):
    size = math.prod(outer) * math.prod(inner)
    kernel, result = reduce_kernel(outer, inner, kind, dtype, Affine(0, strides), max(size, 1))
    x = data(dtype, max(size, 1), len(inner), special)
    if kind == "prod" and dtype.kind == "f":
        x = (1 + x.astype(np.float32) / 64).astype(dtype.numpy)
    check(kernel, [x, np.zeros(math.prod(outer), result.numpy)], **options)


@pytest.mark.parametrize("n", SIZES)
def test_rows_sums(n):
    for kind in ("sum", "dot", "prod"):
        check_reduce((3,), (n,), kind, f32, (n, 1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_reduction(dtype):
    for kind in kinds_of(dtype):
        for special in (0.0, 0.02):
            check_reduce((3,), (1100,), kind, dtype, (1100, 1), special)
            check_reduce((5,), (37,), kind, dtype, (37, 1), special, machines=MACHINES[:2])
            check_reduce((40,), (33,), kind, dtype, (1, 40), special, machines=MACHINES[-2:])


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 1023, 1024, 1025, 3100, 7 * 1024 + 5])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 40, 130])
def test_column_sums(n, columns):
    check_reduce((columns,), (n,), "sum", f32, (1, columns), machines=MACHINES[:1] + MACHINES[-1:])


def test_wide_columns():
    check_reduce((5000,), (40,), "sum", f64, (1, 5000))
    check_reduce((3, 700), (20,), "argmax", f32, (20 * 700, 1, 700), 0.1)


@pytest.mark.parametrize("n", [32, 127, 128, 161, 1024 + 171])
def test_rows_of_columns_taken_together(n):
    for kind, dtype in (("sum", bf16), ("dot", f32), ("prod", f64), ("argmax", f32), ("max", f32), ("any", bool_)):
        check_reduce((37,), (n,), kind, dtype, (1, 37), 0.02, machines=MACHINES[:1])


@pytest.mark.parametrize("inner", [(3, 7), (5, 16), (4, 49), (40, 33), (7, 3, 50), (2, 1024), (3, 1000), (1, 1)])
def test_several_reduced_axes(inner):
    """x[N, C, *]: reduces the first and last axes for each channel."""
    channels = 3
    first, rest = inner[0], inner[1:]
    n = math.prod(rest)
    strides = (n, channels * n, *row_major(rest))
    for kind, dtype in (("sum", f32), ("dot", f64), ("argmax", f32), ("max", i32)):
        check_reduce((channels,), (first, *rest), kind, dtype, strides, 0.02)


@pytest.mark.parametrize("n", [65536, 65537, 200000])
@pytest.mark.parametrize("kind", ["sum", "dot", "max", "argmax", "argmin"])
def test_split_full_reduction(n, kind):
    check_reduce((), (n,), kind, f32, (1,), splits=((1, None), (2, 5)), machines=MACHINES[:2])
    check_reduce((2,), (n,), kind, f32, (n, 1), machines=MACHINES[:1])
    if kind not in ("sum", "dot"):
        check_reduce((), (n,), kind, f64, (1,), 1e-4, splits=((1, None), (2, 5)), machines=MACHINES[:1])
        check_reduce((2,), (n,), kind, i8, (n, 1), machines=MACHINES[:1])


@pytest.mark.parametrize("n", [16384, 20001, 8192 * 7 + 1])
def test_split_column_reduction(n):
    for kind in ("sum", "max", "dot"):
        check_reduce((5,), (n,), kind, f32, (1, 5), splits=((1, None), (2, 5)), machines=MACHINES[:2])
    check_reduce((2, 17), (n,), "sum", f64, (17 * n, 1, 17), splits=((2, 5),), machines=MACHINES[:1])


def test_reducing_stage_that_stores_and_reduction_of_nothing():
    """exp-like numerators stored while they are summed; a reduction over no axes is its one element."""
    for rows, columns, along in ((3, 37, 1), (37, 3, 0), (1100, 20, 0), (4, 1100, 1)):
        outer, inner = (rows, columns) if along else (columns, rows)
        strides = (columns, 1) if along else (1, columns)
        b = body(("load", (), f32, Access(0, Affine(0, strides))), ("mul", (0, 0), f32))
        stages = (
            Stage((inner,), b, (Store(Access(1, Affine(0, strides)), 1),), (Reduce("sum", (1,), f32),)),
            Stage((), body(("reduced", (), f32, (0, 0)), ("neg", (0,), f32)), (), (Reduce("max", (1,), f32),)),
            Stage((), body(("reduced", (), f32, (1, 0))), (Store(Access(2, Affine(0, (1,))), 0),)),
        )
        n = rows * columns
        kernel = LoopKernel((Arg(f32, n), Arg(f32, n, True), Arg(f32, outer, True)), (outer,), stages)
        check(kernel, [data(f32, n, 0, 0.1), np.zeros(n, np.float32), np.zeros(outer, np.float32)])


@pytest.mark.parametrize("dtype", [f16, bf16, f32, f64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 15, 17, 33, 300])
def test_extremes_of_few_values(dtype, n):
    """Rows of one, two or three of the values that an order of floats by their bits must tell apart."""
    tiny, large = (1e-40, 3e38) if dtype in (f32, bf16) else (6e-8, 6e4) if dtype is f16 else (5e-324, 1e308)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1.0, -1.0, tiny, -tiny, large, -large]
    some = [c for k in (1, 2, 3) for c in itertools.combinations(range(len(values)), k)]
    numbers = np.array(values).astype(dtype.numpy)
    if dtype is f32:
        numbers = np.append(
            numbers, np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], np.uint32).view(np.float32)
        )
        some += [(k, *c) for k in range(12, 16) for c in ((), (2,), (3,), (7,))]
    rng = np.random.default_rng(n)
    x = np.stack([numbers[rng.choice(c, n)] for c in some]).reshape(-1)
    for kind in ("max", "min"):
        kernel, result = reduce_kernel((len(some),), (n,), kind, dtype, Affine(0, (n, 1)), x.size)
        check(kernel, [x, np.zeros(len(some), result.numpy)])
        for start in (0, 40 * n, 70 * n):  # one row: lanes without elements
            kernel, result = reduce_kernel((), (n,), kind, dtype, Affine(start, (1,)), x.size)
            check(kernel, [x, np.zeros(1, result.numpy)], machines=MACHINES[:1])
        outer, inner = 7, (n, len(some) // 7)
        kernel, result = reduce_kernel((outer,), inner, kind, dtype, Affine(0, (1, 7 * inner[1], 7)), x.size)
        check(kernel, [x, np.zeros(outer, result.numpy)], machines=MACHINES[:2])


def test_arg_of_equal_elements():
    """All elements equal to the worst value: the first is meant."""
    for d, kind, worst in (
        (f32, "argmax", -np.inf),
        (f32, "argmin", np.inf),
        (i8, "argmax", -128),
        (u8, "argmin", 255),
    ):
        for outer, n, strides in ((3, 40, (40, 1)), (40, 5, (1, 40))):
            kernel, _ = reduce_kernel((outer,), (n,), kind, d, Affine(0, strides), outer * n)
            x = np.full(outer * n, worst, d.numpy)
            check(kernel, [x, np.ones(outer, np.int64)])
            x[7::9] = 3
            check(kernel, [x, np.ones(outer, np.int64)])


@pytest.mark.parametrize("n", [0, 1, 1000, 5000, 70000])
def test_symbolic_reductions(n):
    t = Dim.symbol("t")
    for outer, strides in (((), (1,)), ((3,), (t, 1)), ((33,), (1, 33))):
        kernel, _ = reduce_kernel(outer, (t,), "sum", f32, Affine(0, strides), t * math.prod(outer), ("t",))
        x = data(f32, n * math.prod(outer))
        check(kernel, [x, np.zeros(math.prod(outer), np.float32)], {"t": n}, machines=MACHINES[:1])


def test_sum_of_negative_zeros():
    kernel, _ = reduce_kernel((2,), (40,), "sum", f32, Affine(0, (40, 1)), 80)
    got, _ = run(kernel, [np.full(80, -0.0, np.float32), np.ones(2, np.float32)], {}, MACHINES[0])
    assert not np.signbit(got[1]).any()


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("rows,columns", [(1, 1), (4, 33), (33, 16), (3, 1500), (1500, 20), (130, 7)])
def test_stages(rows, columns, along):
    outer = rows if along == 1 else columns
    blank = [np.zeros(rows * columns, np.float32), np.zeros(outer, np.int64)]
    check(softmax_like(rows, columns, along), [data(f32, rows * columns), *blank])
    r, c = Dim.symbol("r"), Dim.symbol("c")
    kernel = softmax_like(r, c, along, ("r", "c"))
    check(kernel, [data(f32, rows * columns), *blank], {"r": rows, "c": columns}, machines=MACHINES[:2])


def softmax_of(r, c, dims=(), d=f32):
    """softmax along c as it is fused: exp(x - max) in the sum and again in the quotient."""
    at = Access(0, Affine(0, (c, 1)))
    builders = []
    for last in (False, True):
        b = BodyBuilder()
        top = recipes.exp(b, b.sub(b.load(at, d), b.reduced(0, 0, d)))
        builders.append((b, b.div(top, b.reduced(1, 0, d)) if last else top))
    (b1, top), (b2, quotient) = builders
    stages = (
        Stage((c,), body(("load", (), d, at)), (), (Reduce("max", (0,), d),)),
        Stage((c,), tuple(Instr(*row) for row in b1.rows), (), (Reduce("sum", (top,), d),)),
        Stage((c,), tuple(Instr(*row) for row in b2.rows), (Store(Access(1, Affine(0, (c, 1))), quotient),)),
    )
    return LoopKernel((Arg(d, r * c), Arg(d, r * c, True)), (r,), stages, dims)


@pytest.mark.parametrize("many", [None, 0])
@pytest.mark.parametrize("rows,columns", [(3, 1), (2, 16), (5, 37), (3, 129), (3, 1029), (2, 3000)])
def test_softmax_keeps_the_exponentials(rows, columns, many, monkeypatch):
    """exp(x - max) of the sum and of the quotient is one expression: computed once, same bits, also where vectors are taken together."""
    if many is not None:
        monkeypatch.setattr(nest, "_MANY", many)
    compiled.cache_clear()

    buffers = [data(f32, rows * columns, 0, 0.001), np.zeros(rows * columns, np.float32)]
    kernel = softmax_of(rows, columns)
    check(kernel, buffers)
    if columns > 1:
        assert compile_kernel(kernel, machine().target).scratch({}, 1) > 0
    r, c = Dim.symbol("r"), Dim.symbol("c")
    check(softmax_of(r, c, ("r", "c")), buffers, {"r": rows, "c": columns}, machines=MACHINES[:2])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "rows,columns,d", [(1, 512, f32), (2, 1024, f32), (3, 960, f32), (9, 4096, f32), (7, 2048, f64)]
)
def test_softmax_in_waves(rows, columns, d, streamed, monkeypatch):
    """Stages of consecutive rows side by side: whatever rows a thread gets, the bits of one stage after the other; also in place."""
    monkeypatch.setattr(row_waves, "_MANY", 0)
    monkeypatch.setattr(row_waves, "_MANY_ROWS", 0)
    if streamed:
        monkeypatch.setattr(stream, "_BEYOND", 0)
    compiled.cache_clear()
    kernel = softmax_of(rows, columns, (), d)
    assert row_waves.runs_in_waves(kernel, None)
    buffers = [data(d, rows * columns, 0, 0.001), np.zeros(rows * columns, d.numpy)]
    check(kernel, buffers)
    plain = softmax_of(rows, columns - 1, (), d)  # not whole vectors
    assert not row_waves.runs_in_waves(plain, None)

    code, library = compiled(kernel, MACHINES[0])
    x = buffers[0].copy()
    (expected, _), scratch = reference(kernel, buffers, {}), np.zeros(code.scratch({}, 1) + 64, np.uint8)
    args = (ctypes.c_void_p * 2)(x.ctypes.data, x.ctypes.data)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 2)(
        library.addresses[code.phases[0].symbol]
    )
    function(args, None, 0, rows, 0, scratch.ctypes.data, None)
    assert same(x, expected[1])
    compiled.cache_clear()
