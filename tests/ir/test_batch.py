"""Batching: row i of the batched Function has the bits of the Function on slice i, for every op, derivative and control flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from batch_cases import batches, dtype_for
from hypothesis import given
from ir_programs import programs
from op_table import TABLE, Row

import duo_ir.ops as ops
from duo_ir.core import Function, Value, current_builder, function_of
from duo_ir.errors import IndexOutOfRange, ShapeError
from duo_ir.interpret import interpret
from duo_ir.ops import broadcasting as nd
from duo_ir.ops.random import random_bits
from duo_ir.transforms.batch import batch
from duo_ir.transforms.derivatives import grad_function, jvp_function, vjp_function
from duo_ir.transforms.simplify import simplify
from duo_ir.types import Dim, TensorType, bf16, bool_, f32, i64
from duo_ir.verify import verify

S, V, M = TensorType(f32), TensorType(f32, (3,)), TensorType(f32, (2, 3))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind in "iub":
        return bool((a == b).all())
    a, b = a.astype(np.float64), b.astype(np.float64)
    return bool((((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))).all())


def check(function: Function, arguments: Sequence[np.ndarray], batched: Sequence[bool], what: str = "") -> Function:
    """Compares with a Python loop over the samples; gives the batched Function."""
    size = next(a.shape[0] for a, b in zip(arguments, batched) if b)
    made, results = batch(function, batched, size)
    verify(made)
    got = interpret(made, *arguments)
    rows = [interpret(function, *[a[i] if b else a for a, b in zip(arguments, batched)]) for i in range(size)]
    for k, (out, b) in enumerate(zip(got, results)):
        assert out.shape == ((size,) if b else ()) + function.results[k].type.static_shape(), what
        for i in range(size):
            assert same(out[i] if b else out, rows[i][k]), f"{what}: result {k} of sample {i}\n{made}"
    for out, once in zip(interpret(simplify(made), *arguments), got):
        assert same(out, once), what
    return made


@pytest.mark.parametrize("row", TABLE, ids=lambda r: r.name)
def test_every_op(row: Row) -> None:
    for what, case in batches(row, dtype_for(row)):
        verify(case.function)
        got = interpret(case.function, *case.arguments)
        for out, b, result in zip(got, case.results, case.single.results):
            assert out.shape == ((case.size,) if b else ()) + result.type.static_shape(), what
        for i in range(case.size):
            for k, want in enumerate(interpret(case.single, *case.sample(i))):
                assert same(got[k][i] if case.results[k] else got[k], want), f"{what}: sample {i}\n{case.function}"


@pytest.mark.parametrize("row", [r for r in TABLE if bf16 in r.dtypes and r.ulp is None], ids=lambda r: r.name)
def test_narrow_floats(row: Row) -> None:
    for what, case in batches(row, bf16, (2,)):
        got = interpret(case.function, *case.arguments)
        for i in range(case.size):
            for k, want in enumerate(interpret(case.single, *case.sample(i))):
                assert same(got[k][i] if case.results[k] else got[k], want), what


@given(programs(f32))
def test_programs(program: tuple[Function, list[np.ndarray]]) -> None:
    function, first = program
    second = [a[::-1].copy() if a.ndim else ~a if a.dtype == bool else a + 1 for a in first]
    for batched in ((True, True, True), (True, False, False), (False, True, True), (False, False, True)):
        check(function, [np.stack(pair) if b else pair[0] for b, pair in zip(batched, zip(first, second))], batched)


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


# ----------------------------------------------------------------------------------------------- what is not repeated
def test_what_no_sample_changes_is_computed_once() -> None:
    f = function_of(lambda x, w: (nd.matmul(x, ops.exp(w)), ops.sum(w, axes=(0, 1))), M, TensorType(f32, (3, 4)))
    made, results = batch(f, (True, False), 5)
    assert results == (True, False)
    (exp,) = [op for op in made.ops if op.definition is ops.exp]
    assert exp.result.type == TensorType(f32, (3, 4))
    (product,) = [op for op in made.ops if op.definition is ops.matmul]
    assert product.result.type == TensorType(
        f32, (10, 4)
    )  # samples that share the right matrix are rows of one product


def test_a_single_output_column_stays_single() -> None:
    f = function_of(lambda x, w: (nd.matmul(x, w),), TensorType(f32, (1, 700)), TensorType(f32, (700, 1)))
    x, w = arrays(0, (1, 700), (4, 700, 1))
    check(f, (x, w), (False, True))
    x, w = arrays(1, (4, 1, 700), (4, 700, 1))
    check(f, (x, w), (True, True))
    check(f, (x, w[0]), (True, False))


def test_a_named_batch_size() -> None:
    n = Dim.symbol("n")
    f = function_of(lambda x, w: (ops.tanh(nd.matmul(x, w)), ops.sum(x, axes=(0,))), M, TensorType(f32, (3, 4)))
    made, _ = batch(f, (True, False), n)
    assert made.result_types == (TensorType(f32, (n, 2, 4)), TensorType(f32, (n, 3)))
    x, w = arrays(0, (6, 2, 3), (3, 4))
    for i, row in enumerate(interpret(made, x, w)[0]):
        assert same(row, interpret(f, x[i], w)[0])


def test_a_convolution_of_both_needs_a_number() -> None:
    types = TensorType(f32, (1, 4, 2)), TensorType(f32, (2, 2, 3))
    attrs = {"strides": (1,), "padding": ((0, 0),), "x_dilation": (1,), "w_dilation": (1,), "groups": 1}
    f = function_of(lambda x, w: (ops.conv(x, w, **attrs),), *types)
    with pytest.raises(ShapeError, match="known batch size"):
        batch(f, (True, True), Dim.symbol("n"))


def test_nested() -> None:
    f = function_of(lambda x, y: (ops.sum(x * y, axes=(0,)),), V, V)
    inner = batch(f, (True, False), 4).function
    outer = batch(inner, (False, True), 2).function
    x, y = arrays(0, (4, 3), (2, 3))
    (got,) = interpret(outer, x, y)
    for i in range(2):
        for j in range(4):
            assert same(got[i, j], interpret(f, x[j], y[i])[0])


# -------------------------------------------------------------------------------------------------------- derivatives
def loss(x: Value, w: Value) -> tuple[Value, ...]:
    h = ops.tanh(nd.matmul(x, w))
    return (nd.mean(ops.max(h, axes=(1,)) * nd.sum(h * h, 1)),)


def test_batch_of_a_gradient_and_gradient_of_a_batch() -> None:
    f = function_of(loss, M, TensorType(f32, (3, 4)))
    x, w = arrays(0, (5, 2, 3), (3, 4))
    check(grad_function(f), (x, w), (True, False))
    check(grad_function(grad_function(function_of(lambda v: (nd.sum(v * v * v, None),), S))), (x[:, 0, 0],), (True,))
    pull = vjp_function(batch(f, (True, False), 5).function)
    dx, dw = interpret(pull, x, w, np.ones(5, np.float32))
    each = [interpret(grad_function(f), s, w) for s in x]
    for i in range(5):
        assert same(dx[i], each[i][0])
    assert np.allclose(dw, sum(g[1].astype(np.float64) for g in each), rtol=1e-5, atol=1e-6)


def test_batch_of_forward_mode() -> None:
    f = function_of(loss, M, TensorType(f32, (3, 4)))
    x, w, t, s = arrays(0, (5, 2, 3), (3, 4), (5, 2, 3), (3, 4))
    check(jvp_function(f), (x, w, t, s), (True, False, True, False))
    check(jvp_function(f), (x, w, t[0], s), (True, False, False, False))
    check(vjp_function(jvp_function(f)), (x, w, t, s, *arrays(1, (5,), (5,))), (True, False, True, False, True, True))


# ------------------------------------------------------------------------------------------------------- control flow
def region(fn: Callable[..., Any], *types: TensorType) -> Function:
    return function_of(fn, *types, name="region")


CHOOSE = function_of(
    lambda p, x, y: ops.cond(
        p, x, y, then=region(lambda x, y: (x * y, ops.exp(x)), V, V), orelse=region(lambda x, y: (x - y, x), V, V)
    ),
    TensorType(bool_), V, V,
)  # fmt: skip


def test_cond() -> None:
    p = np.array([True, False, True])
    x, y = arrays(0, (3, 3), (3, 3))
    check(CHOOSE, (p, x, y), (True, True, True))
    check(CHOOSE, (p, x[0], y[0]), (True, False, False))
    made = check(CHOOSE, (p[1], x, y[0]), (False, True, False))
    assert any(op.definition is ops.cond for op in made.ops)  # one branch runs where all samples agree


def test_gradient_of_cond() -> None:
    def chosen(x: Value) -> tuple[Value, ...]:
        out = current_builder().inline(CHOOSE, (nd.gt(ops.sum(x, axes=(0,)), 0.0), x, x))
        return (ops.sum(out[0] + out[1], axes=(0,)),)

    (x,) = arrays(0, (6, 3))
    check(grad_function(function_of(chosen, V)), (x,), (True,))


def counted(limit: Value, x: Value) -> tuple[Value, ...]:
    """x halved and added to until `limit` steps are done."""
    types = (TensorType(i64), V, TensorType(i64))
    return ops.while_(
        nd.constant_of(0, i64), x, limit, carried=2,
        test=region(lambda i, x, n: (nd.lt(i, n),), *types), body=region(lambda i, x, n: (i + 1, x * 0.5 + nd.cast_to(i, f32)), *types),
    )  # fmt: skip


def test_while() -> None:
    f = function_of(counted, TensorType(i64), V)
    (x,) = arrays(0, (4, 3))
    limits = np.array([3, 0, 7, 1])
    check(f, (limits, x), (True, True))
    check(f, (limits, x[0]), (True, False))
    made = check(f, (limits[2], x), (False, True))
    assert [op.results[0].type for op in made.ops if op.definition is ops.while_] == [TensorType(i64)]
    check(jvp_function(f), (limits, x, x[::-1].copy()), (True, True, True))


def test_while_in_which_a_value_becomes_batched_late() -> None:
    types = (TensorType(i64), V, V, V)  # i, a, b, c: a takes b's value, b takes c's
    f = function_of(
        lambda a, b, c: ops.while_(
            nd.constant_of(0, i64), a, b, c, carried=3, test=region(lambda i, a, b, c: (nd.lt(i, 3),), *types),
            body=region(lambda i, a, b, c: (i + 1, b, c * 1.0), *types),
        ), V, V, V,
    )  # fmt: skip
    check(f, arrays(0, (3,), (3,), (2, 3)), (False, False, True))


def test_places_of_samples_that_take_no_part() -> None:
    """x[i] where i is in range, else 0: the branch not taken must not complain of its places."""
    types = (TensorType(f32, (4,)), TensorType(i64))
    read = region(lambda x, i: (ops.gather(x, i, axes=(0,)),), *types)
    zero = region(lambda x, i: (nd.constant_of(0, f32),), *types)
    guarded = function_of(lambda x, i: (ops.cond(nd.lt(i, 4), x, i, then=read, orelse=zero),), *types)
    (x,) = arrays(0, (5, 4))
    places = np.array([0, 9, 3, 4, 2])
    check(guarded, (x, places), (True, True))
    check(guarded, (x[0], places), (False, True))
    fixed = function_of(lambda p, x, i: (ops.cond(p, x, i, then=read, orelse=zero),), TensorType(bool_), *types)
    check(fixed, (np.zeros(3, bool), x[0], np.int64(9)), (True, False, False))
    with pytest.raises(IndexOutOfRange):
        interpret(batch(fixed, (True, False, False), 3).function, np.array([False, True, False]), x[0], np.int64(9))
    looped = function_of(
        lambda x, i: ops.while_(
            i, nd.constant_of(0.0, f32), x, carried=2, test=region(lambda i, s, x: (nd.lt(i, 4),), TensorType(i64), S, types[0]),
            body=region(lambda i, s, x: (i + 1, s + ops.gather(x, i, axes=(0,))), TensorType(i64), S, types[0]),
        ), *types,
    )  # fmt: skip
    check(looped, (x, places), (True, True))


def test_control_flow_inside_a_branch_not_taken() -> None:
    """The inner loop ends for the samples that reach it only; an inner cond reads out of range for the others."""
    types = (TensorType(i64), TensorType(f32, (4,)))
    loop = region(
        lambda i, x: ops.while_(
            i, x, carried=1, test=region(lambda i, x: (ops.ne(i, nd.constant_of(3, i64)),), *types),
            body=region(lambda i, x: (i + 1,), *types),
        ), *types,
    )  # fmt: skip
    stay = region(lambda i, x: (i,), *types)
    f = function_of(lambda p, i, x: (ops.cond(p, i, x, then=loop, orelse=stay),), TensorType(bool_), *types)
    (x,) = arrays(0, (4, 4))
    p = np.array([True, False, True, False])
    check(f, (p, np.array([1, 9, 3, 5]), x), (True, True, True))
    check(f, (np.zeros(2, bool), np.int64(9), x[0]), (True, False, False))
    read = region(lambda i, x: (ops.gather(x, i, axes=(0,)),), *types)
    zero = region(lambda i, x: (nd.constant_of(0.0, f32),), *types)
    inner = region(lambda i, x: (ops.cond(nd.gt(i, 0), i, x, then=read, orelse=zero),), *types)
    g = function_of(lambda p, i, x: (ops.cond(p, i, x, then=inner, orelse=zero),), TensorType(bool_), *types)
    check(g, (p, np.array([1, 9, 3, 5]), x), (True, True, True))
    check(g, (np.zeros(2, bool), np.int64(9), x[0]), (True, False, False))


def test_random_bits_of_own_counters() -> None:
    f = function_of(lambda k, c: (random_bits(k, c, shape=(2, 3)),), TensorType(i64), TensorType(i64))
    keys, counters = np.array([5, -7, 5]), np.array([2**40, 1, 0])
    check(f, (keys, counters), (True, True))
    check(f, (keys[0], counters), (False, True))
