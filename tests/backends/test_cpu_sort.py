"""Sort kernels of the CPU backend: each of its algorithms, on every kind of machine, against the meaning of the kernel, by `==` on bits."""

from __future__ import annotations

import itertools

import conformance as c
import numpy as np
import pytest
import test_cpu_loops as loops

from duo_backends.cpu import sort
from duo_ir import ops
from duo_ir.kernels import evaluate
from duo_ir.kernels.kernel import Access, Affine, Arg, SortKernel
from duo_ir.types import Dim, bf16, bool_, f16, f32, f64, i8, i16, i32, i64, u8

ALGORITHMS = (sort.LANES, sort.RADIX_ROWS, sort.SHARED, sort.FIRST)
MACHINES = [m for m in loops.MACHINES if m in ("native", "native/16", "x86-64-v3")]
DTYPES = (f32, f64, f16, i32, i64, i8, u8, bool_, bf16, i16)
N = Dim.symbol("n")


def hard(dtype, n, seed=0):
    """Many ties, zeros of both signs, infinities and NaN."""
    rng = np.random.default_rng(seed)
    if dtype is bool_:
        return rng.random(n) < 0.5
    if dtype.is_integer:
        limits = np.iinfo(dtype.numpy)
        wide = rng.integers(limits.min, limits.max, n, dtype.numpy, endpoint=True)
        return np.where(rng.random(n) < 0.4, wide % 5, wide).astype(dtype.numpy)
    x = rng.normal(0, 2, n)
    x = np.where(rng.random(n) < 0.5, np.round(x), x)
    x = np.where(rng.random(n) < 0.2, np.copysign(0, x), x)
    special = rng.choice([np.nan, np.inf, -np.inf, -np.nan], n)
    return np.where(rng.random(n) < 0.1, special, x).astype(dtype.numpy)


def kernel_of(dtype, rows, n, count, descending=False, what="both", transposed=False, dims=()):
    """Rows of n elements; transposed: the rows are columns in memory."""
    source = Affine(0, (1, rows) if transposed else (n, 1))
    target = Affine(0, (1, rows) if transposed else (count, 1))
    args = [Arg(dtype, rows * n)]
    places = {}
    for name, d in (("values", dtype), ("positions", i64)):
        if what in ("both", name):
            places[name] = Access(len(args), target)
            args.append(Arg(d, rows * count, True))
    return SortKernel(
        tuple(args), (rows,), n, count, Access(0, source), places.get("values"), places.get("positions"), descending, dims
    )  # fmt: skip


def check(kernel, x, sizes=None, machines=MACHINES):
    sizes = sizes or {}
    buffers = [x] + [np.zeros(evaluate.size_of(a.size, sizes), a.dtype.numpy) for a in kernel.args[1:]]
    want = [b.copy() for b in buffers]
    evaluate.execute(kernel, want, sizes)
    for name in machines:
        got, _ = loops.run(kernel, buffers, sizes, name, 2, 3)
        for g, w in zip(got, want, strict=True):
            assert loops.same(g, w), (name, kernel, g[:40], w[:40])


@pytest.fixture(params=ALGORITHMS)
def algorithm(request, monkeypatch):
    monkeypatch.setattr(sort._Sort, "costs", lambda self, sizes: {request.param: 1.0})
    loops.compiled.cache_clear()
    yield request.param
    loops.compiled.cache_clear()


def test_each_algorithm(algorithm):
    shapes = [(1, 1, 1), (3, 5, 5), (37, 20, 20), (2, 600, 600), (5, 33, 7)]
    if algorithm == sort.FIRST:  # rows that outgrow its buffer, in the worst order too
        shapes = [(3, 2, 1), (2, 4000, 3), (3, 700, 100), (2, 1, 1)]
    turns = itertools.cycle(["both", "values", "positions"])
    for k, (dtype, what) in enumerate(zip(DTYPES, turns)):
        for m, (rows, n, count) in enumerate(shapes):
            descending, transposed = (k + m) % 2 == 0, (k + m) % 3 == 0
            x = hard(dtype, rows * n, k)
            if algorithm == sort.FIRST and m == 1:
                x = np.sort(x)[:: -1 if descending else 1][:: -1 if not descending else 1].copy()
            check(kernel_of(dtype, rows, n, count, descending, what, transposed), x, machines=[MACHINES[(k + m) % len(MACHINES)]])


def test_zeros_keep_their_places_without_positions(algorithm):
    if algorithm == sort.FIRST:
        return
    for dtype, descending in itertools.product((f32, f64, f16), (False, True)):
        x = np.random.default_rng(1).choice([0.0, -0.0, 1.0, -1.0], 4 * 50).astype(dtype.numpy)
        check(kernel_of(dtype, 4, 50, 50, descending, "values"), x, machines=["native"])
        check(kernel_of(dtype, 4, 50, 30, descending, "values"), x, machines=["native"])


def test_lengths_of_networks():
    """Around powers of two, with lanes that stand for no row."""
    for n in (1, 2, 3, 4, 7, 8, 9, 31, 32, 33, 64, 65, 100, 127, 128, 129):
        check(kernel_of(f32, 3, n, n, what="positions"), hard(f32, 3 * n), machines=["native"])


@pytest.mark.parametrize("dtype,what", [(f32, "both"), (f32, "values"), (i64, "both"), (f16, "positions")])
def test_one_kernel_for_any_length(dtype, what):
    kernel = kernel_of(dtype, 3, N, N, what=what, dims=("n",))
    for n in (0, 1, 2, 40, 1000, 9000, 40000):
        check(kernel, hard(dtype, 3 * n, n), {"n": n}, machines=["native"])


def test_the_algorithm_follows_the_sizes():
    def chosen(rows, n, count):
        made = sort._Sort(kernel_of(f32, rows, n, count), sort.Target(64))
        return made.choose({})

    assert chosen(1000, 100, 100) == sort.LANES
    assert chosen(4, 5000, 5000) == sort.RADIX_ROWS
    assert chosen(1, 1_000_000, 1_000_000) == sort.SHARED
    assert chosen(128, 50_000, 10) == sort.FIRST


def test_programs_around_a_sort():
    """Results that are not read are not made, operands that move or are computed, a sort of a sort."""

    def program(x):
        a, i = ops.sort(ops.transpose(x, permutation=(1, 0)), axis=0, descending=True, count=3)
        b, _ = ops.sort(x * x, axis=1, descending=False, count=7)
        _, j = ops.sort(b, axis=0, descending=False, count=4)
        k, _ = ops.sort(i, axis=1, descending=True, count=2)
        return a, b, j, k

    c.check(program, [hard(f32, 28, 3).reshape(4, 7)])
