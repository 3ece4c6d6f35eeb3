"""Derivative rules where finite differences say nothing: zeros, ties, duplicates, corners, narrow floats, symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import duo_ir.ops as ops
from duo_ir.core import Value, function_of
from duo_ir.interpret import interpret
from duo_ir.ops import broadcasting as nd
from duo_ir.transforms.derivatives import jvp_function, vjp_function
from duo_ir.types import Dim, TensorType, f16, f32, f64
from duo_ir.types import dtype as dtype_of

b = Dim.symbol("b")


def function(fn: Callable[..., Any], arrays: tuple[np.ndarray, ...]) -> Any:
    return function_of(fn, *[TensorType(dtype_of(a.dtype), a.shape) for a in arrays], name="f")


def gradient(fn: Callable[..., Any], *arrays: Any, order: int = 1) -> list[np.ndarray]:
    """Gradients of the sum of fn's result (order 2: of the sum of the first operand's gradient), for every float operand."""
    given = tuple(np.asarray(a) for a in arrays)
    f = vjp_function(function(fn, given))
    ones = np.ones(function(fn, given).results[0].type.shape, function(fn, given).results[0].type.dtype.numpy)
    if order == 1:
        return interpret(f, *given, ones)
    second = vjp_function(f)
    seeds = [np.zeros(r.type.shape, r.type.dtype.numpy) for r in f.results]
    seeds[0] = np.ones_like(seeds[0])
    return interpret(second, *given, ones, *seeds)


def product(x: Value) -> Value:
    return ops.prod(x, axes=(0,))


PRODUCTS = [[2.0, 3.0, 4.0], [2.0, 0.0, 4.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0], [5.0], [2.0, -1.0, 0.5, 4.0, 3.0]]


@pytest.mark.parametrize("row", PRODUCTS, ids=str)
def test_prod_with_zeros(row: list[float]) -> None:
    x = np.array(row)
    n = len(x)
    want = np.array([np.delete(x, i).prod() for i in range(n)])
    assert gradient(product, x)[0].tolist() == want.tolist()
    second = np.array([sum(np.delete(x, [i, j]).prod() for i in range(n) if i != j) for j in range(n)])
    np.testing.assert_allclose(gradient(product, x, order=2)[0], second, rtol=1e-15)
    out, tangent = interpret(jvp_function(function(product, (x,))), x, np.ones(n))
    assert out == x.prod() and tangent == want.sum()


def test_prod_over_several_axes_and_of_nothing() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 2))
    x[0, 1, 0] = 0
    (got,) = gradient(lambda v: ops.prod(v, axes=(0, 2)), x)
    want = np.array(
        [[[np.delete(x[:, j].reshape(-1), 2 * i + k).prod() for k in range(2)] for j in range(3)] for i in range(2)]
    )
    np.testing.assert_allclose(got, want, rtol=1e-14)
    assert gradient(product, np.zeros((0, 3)))[0].shape == (0, 3)


@pytest.mark.parametrize("row", PRODUCTS[:4] + PRODUCTS[5:], ids=str)
def test_prod_of_a_symbolic_number(row: list[float]) -> None:
    x = np.array(row)
    f = vjp_function(function_of(lambda v: (product(v),), TensorType(f64, (b,))))
    assert interpret(f, x, np.array(1.0))[0].tolist() == [np.delete(x, i).prod() for i in range(len(x))]


def test_extrema_share_ties() -> None:
    x = np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert gradient(lambda v: ops.max(v, axes=(1,)), x)[0].tolist() == [[0, 0.5, 0.5], [1 / 3] * 3]
    assert gradient(lambda v: ops.min(v, axes=(0, 1)), x)[0].tolist() == [[1, 0, 0], [0, 0, 0]]
    y = np.array([[1.0, 0.0, 5.0], [2.0, 2.0, 1.0]])
    dx, dy = gradient(ops.maximum, x, y)
    assert dx.tolist() == [[0.5, 1, 0], [0.5, 0.5, 1]] and dy.tolist() == [[0.5, 0, 1], [0.5, 0.5, 0]]
    dx, dy = gradient(ops.minimum, x, y)
    assert dx.tolist() == [[0.5, 0, 1], [0.5, 0.5, 0]] and dy.tolist() == [[0.5, 1, 0], [0.5, 0.5, 1]]


def test_many_ties_in_f16() -> None:
    n = 70000
    (got,) = gradient(lambda v: ops.max(v, axes=(0,)), np.ones(n, np.float16))
    assert (got == np.float16(1 / n)).all() and got[0] > 0
    mean = function_of(lambda v: (nd.mean(v),), TensorType(f16, (n,)))
    assert interpret(mean, np.ones(n, np.float16))[0] == 1


def test_corners_of_elementwise_rules() -> None:
    assert gradient(ops.abs, np.array([-2.0, 0.0, 3.0]))[0].tolist() == [-1, 0, 1]
    assert gradient(lambda x: ops.integer_pow(x, n=2), np.array([0.0, 3.0]))[0].tolist() == [0, 6]
    assert gradient(lambda x: ops.integer_pow(x, n=1), np.array([0.0]))[0].tolist() == [1]
    assert gradient(lambda x: ops.integer_pow(x, n=0), np.array([0.0]))[0].tolist() == [0]
    assert gradient(lambda x: ops.floor(x) + ops.sign(x), np.array([0.5]))[0].tolist() == [0]
    assert gradient(lambda x: ops.stop_gradient(x) * x, np.array([3.0]))[0].tolist() == [3]
    for edge in (-1.0, 1.0):
        assert gradient(ops.asin, np.array(edge))[0] == np.inf


def test_pow_at_zero() -> None:
    base, exponent = np.array([0.0, 0.0, 0.0, 0.0, -2.0]), np.array([0.0, 1.0, 2.0, 0.5, 2.0])
    dx, dy = gradient(ops.pow, base, exponent)
    assert dx.tolist() == [0, 1, 0, np.inf, -4]
    assert dy.tolist()[:4] == [0, 0, 0, 0] and np.isnan(dy[4])
    second = gradient(ops.pow, base[:3], exponent[:3], order=2)[0]
    assert second.tolist() == [0, 0, 2]


def test_where_hides_the_branch_not_taken() -> None:
    x = np.array([0.0, 4.0])
    safe = lambda v: nd.where(ops.gt(v, nd.zeros_like(v)), ops.sqrt(nd.where(ops.gt(v, nd.zeros_like(v)), v, 1.0)), 0.0)  # noqa: E731
    assert gradient(safe, x)[0].tolist() == [0, 0.25]


def test_scatter_set_gives_gradient_to_the_last_writer() -> None:
    x, updates, at = np.zeros((4, 2)), np.ones((3, 2)), np.array([1, 3, 1])
    weights = np.arange(8.0).reshape(4, 2)
    put = lambda v, u, i, w: ops.scatter(v, u, i, axes=(0,), mode="set") * w  # noqa: E731
    dx, du, _ = gradient(put, x, updates, at, weights)
    assert dx.tolist() == [[0, 1], [0, 0], [4, 5], [0, 0]]
    assert du.tolist() == [[0, 0], [6, 7], [2, 3]]
    add = lambda v, u, i, w: ops.scatter(v, u, i, axes=(0,), mode="add") * w  # noqa: E731
    dx, du, _ = gradient(add, x, updates, at, weights)
    assert dx.tolist() == weights.tolist() and du.tolist() == weights[at].tolist()
    (table, _) = [*gradient(lambda v, i: ops.gather(v, i, axes=(0,)), x, at), None]
    assert table.tolist() == [[0, 0], [2, 2], [0, 0], [1, 1]]


def test_pad_and_slice_move_gradients_only() -> None:
    inf = np.inf
    x, fill, w = np.ones(3), np.array(1.0), np.array([inf, 1.0, 2.0, 3.0, 4.0, 5.0, inf])
    spread = lambda v, f, w: ops.pad(v, f, low=(1,), high=(1,), interior=(1,)) * w  # noqa: E731
    dx, dfill, _ = gradient(spread, x, fill, w)
    assert dx.tolist() == [1, 3, 5] and dfill == inf
    dx = gradient(lambda v: ops.slice(v, start=(1,), stop=(7,), step=(3,)), np.ones(8))[0]
    assert dx.tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
    assert gradient(lambda v: ops.slice(v, start=(2,), stop=(2,), step=(2,)), np.ones(4))[0].tolist() == [0] * 4


def test_cast_gradients_keep_dtypes() -> None:
    x = np.array([1.0, 2.0], np.float32)
    (g,) = gradient(lambda v: ops.cast(v, dtype=f64), x)
    assert g.dtype == np.float32 and g.tolist() == [1, 1]
    out, tangent = interpret(jvp_function(function(lambda v: ops.cast(v, dtype=f16), (x,))), x, x)
    assert tangent.dtype == np.float16 and out.tolist() == tangent.tolist()
    through_integers = lambda v: ops.cast(ops.cast(v, dtype=dtype_of("i32")), dtype=f32)  # noqa: E731
    assert gradient(through_integers, x)[0].tolist() == [0, 0]


def test_rules_with_symbolic_sizes() -> None:
    def fn(x: Value, w: Value) -> tuple[Value, ...]:
        tail = nd.slice_axis(x, 0, 1, b)
        both = ops.concat(tail, ops.flip(x, axes=(0,)), axis=0)
        padded = ops.pad(both, nd.constant_of(0, f64), low=(b, 0), high=(1, 0), interior=(1, 0))
        return (nd.mean(nd.matmul(padded, w)) + nd.max(ops.cumsum(x, axis=0)),)

    f = vjp_function(function_of(fn, TensorType(f64, (b, 2)), TensorType(f64, (2, 3))))
    rng = np.random.default_rng(0)
    x, w, one = rng.normal(size=(4, 2)), rng.normal(size=(2, 3)), np.array(1.0)
    dx, dw = interpret(f, x, w, one)
    value = function_of(fn, TensorType(f64, (b, 2)), TensorType(f64, (2, 3)))
    for array, got in ((x, dx), (w, dw)):
        for place in np.ndindex(array.shape):
            array[place] += 1e-6
            up = interpret(value, x, w)[0]
            array[place] -= 2e-6
            down = interpret(value, x, w)[0]
            array[place] += 1e-6
            assert abs((up - down) / 2e-6 - got[place]) < 1e-7
