"""The interpreter as a machine: arguments, symbolic sizes, control flow, errors with the user's line, fresh results."""

from __future__ import annotations

import numpy as np
import pytest

import duo_ir.ops as ops
from duo_ir.core import Builder, Function, Loc, Value, function_of
from duo_ir.errors import DuoError, IndexOutOfRange
from duo_ir.interpret import interpret
from duo_ir.ops import broadcasting as nd
from duo_ir.types import Dim, TensorType, bf16, bool_, f16, f32, i64

b, t = Dim.symbol("b"), Dim.symbol("t")


def test_results_are_fresh_arrays() -> None:
    f = function_of(
        lambda x: (x, x, ops.broadcast(x, shape=(2, 3)), ops.reshape(x, shape=(3, 1))), TensorType(f32, (3,))
    )
    x = np.arange(3, dtype=np.float32)
    out = interpret(f, x)
    for r in out:
        assert r.flags.owndata and r.flags.writeable and r.flags.c_contiguous
        r[...] = 7
    assert x.tolist() == [0, 1, 2]


def test_no_parameters_no_results() -> None:
    assert interpret(Function((), (), ())) == []
    (out,) = interpret(function_of(lambda: (nd.constant_of(3, i64),)))
    assert out.shape == () and out == 3


def test_arguments_are_checked() -> None:
    f = function_of(lambda x, y: (x,), TensorType(f32, (b, 3)), TensorType(f32, (b,)))
    x = np.zeros((4, 3), np.float32)
    with pytest.raises(DuoError, match="takes 2 arrays, got 1"):
        interpret(f, x)
    with pytest.raises(DuoError, match="argument 1 has dtype float64"):
        interpret(f, x, np.zeros(4))
    with pytest.raises(DuoError, match="argument 1 has 5 elements along axis 0"):
        interpret(f, x, np.zeros(5, np.float32))
    with pytest.raises(DuoError, match=r"argument 0 has shape \[4\]"):
        interpret(f, x[:, 0], x[:, 0])


def test_strided_arguments() -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    f = function_of(lambda v: (ops.reshape(v, shape=(6,)),), TensorType(f32, (2, 3)))
    assert interpret(f, x[::-2, ::2])[0].tolist() == x[::-2, ::2].reshape(-1).tolist()


@pytest.mark.parametrize("n, m", [(2, 3), (5, 2)])
def test_symbolic_sizes(n: int, m: int) -> None:
    def fn(x: Value, bias: Value) -> tuple[Value, ...]:
        flat = ops.reshape(x, shape=(b * t,))
        tail = nd.slice_axis(flat, 0, 1, b * t)
        padded = ops.pad(tail, nd.constant_of(-1, f32), low=(b,), high=(0,), interior=(1,))
        count = ops.size(dim=b * t + 1)
        both = ops.concat(padded, ops.flip(flat, axes=(0,)), axis=0)
        numbers = ops.iota(shape=(b, t), axis=1, dtype=i64)
        return both, count, numbers, x + bias, nd.mean(x)

    f = function_of(fn, TensorType(f32, (b, t)), TensorType(f32, (t,)))
    x, bias = np.arange(n * m, dtype=np.float32).reshape(n, m), np.ones(m, np.float32)
    both, count, numbers, shifted, mean = interpret(f, x, bias)
    flat = x.reshape(-1)
    spaced = np.full(2 * len(flat) - 3, -1, np.float32)
    spaced[::2] = flat[1:]
    assert both.tolist() == [*[-1] * n, *spaced, *flat[::-1]]
    assert count == n * m + 1 and (numbers == np.arange(m)).all() and (shifted == x + 1).all() and mean == flat.mean()


def test_narrow_floats_round_after_every_op() -> None:
    for d in (f16, bf16):
        one, small = np.ones((), d.numpy), np.asarray(2.0**-9 if d is bf16 else 2.0**-12, d.numpy)
        f = function_of(lambda x, y: (x + y - x,), TensorType(d), TensorType(d))
        assert interpret(f, one, small)[0] == 0


def test_recipe_that_ignores_its_operand_keeps_the_shape() -> None:
    f = function_of(lambda x: (ops.integer_pow(x, n=0),), TensorType(f32, (2, 3)))
    assert interpret(f, np.full((2, 3), np.nan, np.float32))[0].tolist() == [[1.0] * 3] * 2


# ------------------------------------------------------------------------------------------------------- control flow
def _factorial() -> Function:
    types = (TensorType(i64), TensorType(i64), TensorType(i64))
    test = function_of(lambda i, total, n: (ops.le(i, n),), *types)
    body = function_of(lambda i, total, n: (i + 1, total * i), *types)

    def fn(n: Value) -> tuple[Value, ...]:
        one = nd.constant_of(1, i64)
        return (ops.while_(one, one, n, test=test, body=body, carried=2)[1],)

    return function_of(fn, TensorType(i64))


def test_while() -> None:
    for n, want in ((0, 1), (1, 1), (5, 120), (10, 3628800)):
        assert interpret(_factorial(), np.int64(n))[0] == want


def test_nested_control_flow_with_symbolic_sizes() -> None:
    x_type = TensorType(f32, (b,))
    halve = function_of(lambda x: (x * 0.5,), x_type)
    keep = function_of(lambda x: (ops.flip(x, axes=(0,)),), x_type)
    top = lambda x: ops.max(x, axes=(0,))  # noqa: E731
    test = function_of(lambda x: (ops.gt(top(x), nd.constant_of(1, f32)),), x_type)
    body = function_of(lambda x: (ops.cond(ops.gt(top(x), nd.constant_of(2, f32)), x, then=halve, orelse=function_of(
        lambda v: (ops.sub(keep_(v), nd.constant_like(v, 1)),), x_type)),), x_type)  # fmt: skip
    f = function_of(lambda x: (ops.while_(x, test=test, body=body, carried=1),), x_type)
    x = np.array([8.0, 3.0, 1.0], np.float32)
    assert interpret(f, x)[0].tolist() == [-0.75, -0.25, 1.0]
    assert (
        interpret(
            function_of(lambda x: (ops.cond(nd.constant_of(False, bool_), x, then=halve, orelse=keep),), x_type), x
        )[0][0]
        == 1
    )


def keep_(v: Value) -> Value:
    return ops.flip(v, axes=(0,))


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("bad", [3, -1])
def test_index_out_of_range_names_index_bound_and_line(bad: int) -> None:
    builder = Builder()
    with builder:
        x, i = builder.parameter(TensorType(f32, (3, 2))), builder.parameter(TensorType(i64, (2,)))
        builder.loc = Loc.of("/home/me/train.py", 14)
        read = ops.gather(x, i, axes=(0,))
        builder.loc = Loc.of("/home/me/train.py", 15)
        wrote = ops.scatter(x, ops.slice(x, start=(0, 0), stop=(2, 2), step=(1, 1)), i, axes=(0,), mode="add")
    arrays = np.zeros((3, 2), np.float32), np.array([0, bad])
    with pytest.raises(
        IndexOutOfRange, match=rf"gather: index {bad} is out of range for axis 0, which has 3 elements\n.*train.py:14"
    ):
        interpret(builder.build([read]), *arrays)
    last = Function(builder.params, builder.ops[1:], [wrote])
    with pytest.raises(IndexError, match=rf"scatter: index {bad} .*\n.*train.py:15"):
        interpret(last, *arrays)


def test_the_innermost_line_is_named_once() -> None:
    inner = Builder("body")
    with inner:
        x, i = inner.parameter(TensorType(f32, (3,))), inner.parameter(TensorType(i64))
        inner.loc = Loc.of("model.py", 3)
        out = ops.gather(x, i, axes=(0,))
    branch = inner.build([out])
    outer = Builder()
    with outer:
        p = [
            outer.parameter(TensorType(bool_)),
            outer.parameter(TensorType(f32, (3,))),
            outer.parameter(TensorType(i64)),
        ]
        outer.loc = Loc.of("main.py", 9)
        result = ops.cond(*p, then=branch, orelse=branch)
    with pytest.raises(IndexOutOfRange) as caught:
        interpret(outer.build([result]), np.bool_(True), np.zeros(3, np.float32), np.int64(5))
    assert str(caught.value).count("at ") == 1 and str(caught.value).endswith("model.py:3")
