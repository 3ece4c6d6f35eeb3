"""Type rules (results and errors, symbolic sizes) and the local simplifications of every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import op_table
import pytest
from test_ops import assert_bits

import duo_ir.ops as ops
from duo_ir.core import Builder, Value, function_of
from duo_ir.errors import ArgumentError, DTypeError, DuoError, ShapeError
from duo_ir.interpret import interpret
from duo_ir.ops import broadcasting as nd
from duo_ir.types import Dim, DType, TensorType, bf16, bool_, f16, f32, f64, i32, i64, u8

b, t = Dim.symbol("b"), Dim.symbol("t")


# --------------------------------------------------------------------------------------------------------- type rules
def T(d: DType, *shape: Any) -> TensorType:
    return TensorType(d, shape)


def _conv(spatial: int, **attrs: Any) -> dict[str, Any]:
    ones = (1,) * spatial
    return {
        "strides": ones,
        "padding": ((0, 0),) * spatial,
        "x_dilation": ones,
        "w_dilation": ones,
        "groups": 1,
        **attrs,
    }


RESULTS = [
    (ops.add, (T(f32, b, 3), T(f32, b, 3)), {}, T(f32, b, 3)),
    (ops.lt, (T(f32, b), T(f32, b)), {}, T(bool_, b)),
    (ops.reshape, (T(f32, b, t, 4),), {"shape": (b * t, 4)}, T(f32, b * t, 4)),
    (ops.reshape, (T(f32, b * 6),), {"shape": (3, b, 2)}, T(f32, 3, b, 2)),
    (ops.broadcast, (T(f32, 1, 3),), {"shape": (b, t, 3)}, T(f32, b, t, 3)),
    (ops.slice, (T(f32, b),), {"start": (1,), "stop": (b,), "step": (1,)}, T(f32, b - 1)),
    (ops.slice, (T(f32, b * 2),), {"start": (0,), "stop": (b * 2,), "step": (2,)}, T(f32, b)),
    (ops.slice, (T(f32, b * 2),), {"start": (1,), "stop": (b * 2,), "step": (2,)}, T(f32, b)),
    (ops.slice, (T(f32, b * 2 + 1),), {"start": (0,), "stop": (b * 2 + 1,), "step": (2,)}, T(f32, b + 1)),
    (ops.slice, (T(f32, b),), {"start": (0,), "stop": (2,), "step": (1,)}, T(f32, 2)),
    (ops.pad, (T(f32, b), T(f32)), {"low": (1,), "high": (t,), "interior": (2,)}, T(f32, b * 3 + t - 1)),
    (ops.concat, (T(f32, b, 2), T(f32, t, 2), T(f32, 3, 2)), {"axis": 0}, T(f32, b + t + 3, 2)),
    (ops.flip, (T(f32, b, 2),), {"axes": (0,)}, T(f32, b, 2)),
    (ops.sum, (T(f32, b, t, 2),), {"axes": (0, 2)}, T(f32, t)),
    (ops.argmax, (T(f32, b, t),), {"axes": (1,)}, T(i64, b)),
    (ops.matmul, (T(bf16, b, 2, t), T(bf16, b, t, 5)), {}, T(bf16, b, 2, 5)),
    (ops.conv, (T(f32, b, 8, 6, 3), T(f32, 3, 3, 3, 5)), _conv(2, padding=((1, 1), (0, 0))), T(f32, b, 8, 4, 5)),
    (ops.conv, (T(f32, b, t, 4), T(f32, 3, 2, 6)), _conv(1, padding=((1, 1),), groups=2), T(f32, b, t, 6)),
    (ops.conv, (T(f32, 1, t * 2, 4), T(f32, 3, 4, 6)), _conv(1, strides=(2,), padding=((1, 1),)), T(f32, 1, t, 6)),
    (ops.conv, (T(bf16, 1, t, 4), T(bf16, 3, 4, 6)), _conv(1, padding=((1, 2),), x_dilation=(2,)), T(bf16, 1, t * 2, 6)),
    (ops.conv, (T(f32, 1, 0, 4), T(f32, 1, 4, 6)), _conv(1), T(f32, 1, 0, 6)),
    (ops.gather, (T(f32, 9, t), T(i64, b, 2)), {"axes": (0,)}, T(f32, b, 2, t)),
    (ops.gather, (T(f32, 9, t, 3), T(i64, b), T(i64, b)), {"axes": (2, 0)}, T(f32, b, t)),
    (ops.random_bits, (T(i64), T(i64)), {"shape": (b, 3)}, T(i32, b, 3)),
    (ops.size, (), {"dim": b * t}, T(i64)),
    (ops.size, (), {"dim": b * t, "least": 1}, T(i64)),
    (ops.size, (), {"dim": 1, "least": 1}, T(i64)),
    (ops.iota, (), {"shape": (b, 2), "axis": 0, "dtype": u8}, T(u8, b, 2)),
]  # fmt: skip


@pytest.mark.parametrize("op, types, attrs, want", RESULTS, ids=lambda v: getattr(v, "name", ""))
def test_result_type(op: Any, types: Any, attrs: Any, want: TensorType) -> None:
    with Builder() as builder:
        assert op(*[builder.parameter(p) for p in types], **attrs).type == want


_F = function_of(lambda x: (x,), T(f32, 3))
_G = function_of(lambda x: (ops.sum(x, axes=(0,)),), T(f32, 3))
ERRORS = [
    (ops.add, (T(f32, 2), T(f32, 3)), {}, ShapeError, r"add\(f32\[2\], f32\[3\]\): .*one shape.*broadcast one"),
    (ops.add, (T(f32, 2), T(f64, 2)), {}, DTypeError, r"one dtype, got f32 and f64; cast one"),
    (ops.add, (T(bool_), T(bool_)), {}, DTypeError, "floats and integers, not bool"),
    (ops.div, (T(i32), T(i32)), {}, DTypeError, "floats, not i32; cast"),
    (ops.exp, (T(i64),), {}, DTypeError, "floats, not i64"),
    (ops.and_, (T(f32), T(f32)), {}, DTypeError, r"and\(f32\[\], f32\[\]\): it takes integers and bools"),
    (ops.shift_left, (T(bool_), T(bool_)), {}, DTypeError, "integers, not bool"),
    (ops.integer_pow, (T(i32),), {"n": -1}, ArgumentError, "cast i32 to a float"),
    (ops.integer_pow, (T(f32),), {"n": 0.5}, ArgumentError, "pow takes others"),
    (ops.where, (T(f32), T(f32), T(f32)), {}, DTypeError, "the condition is bool, not f32"),
    (ops.where, (T(bool_, 2), T(f32, 3), T(f32, 3)), {}, ShapeError, "one shape"),
    (ops.bitcast, (T(f32),), {"dtype": i64}, DTypeError, "differ in size"),
    (ops.bitcast, (T(bool_),), {"dtype": u8}, DTypeError, "cast instead"),
    (ops.constant, (), {"value": 300, "dtype": u8}, ArgumentError, "300 does not fit u8, which holds 0 to 255"),
    (ops.constant, (), {"value": 0.5, "dtype": i32}, DTypeError, "is an int, not 0.5"),
    (ops.constant, (), {"value": 1, "dtype": bool_}, DTypeError, "True or False"),
    (ops.iota, (), {"shape": (2,), "axis": 1, "dtype": i64}, ArgumentError, "outside shape"),
    (ops.random_bits, (T(i32), T(i64)), {"shape": (2,)}, DTypeError, "the key is i64"),
    (ops.random_bits, (T(i64), T(i64, 2)), {"shape": (2,)}, ShapeError, "the counter is one number"),
    (ops.sum, (T(bool_, 2),), {"axes": (0,)}, DTypeError, "cast it to an integer"),
    (ops.sum, (T(f32, 2),), {"axes": (1,)}, ArgumentError, "outside 0..0"),
    (ops.sum, (T(f32, 2, 2),), {"axes": (1, 0)}, ArgumentError, "distinct and ascending"),
    (ops.sum, (T(f32, 2, 2),), {"axes": (-1,)}, ArgumentError, "outside 0..1"),
    (ops.size, (), {"dim": 0, "least": 1}, ShapeError, "divides by a size that is 0; it needs 1 at least"),
    (ops.max, (T(f32, 3, 0),), {"axes": (1,)}, ShapeError, "axis 1 has no elements"),
    (ops.argmax, (T(f32, 0),), {"axes": (0,)}, ShapeError, "no elements"),
    (ops.argmax, (T(f32, 2, 2),), {"axes": (0, 1)}, ArgumentError, "one axis"),
    (ops.any, (T(f32, 2),), {"axes": (0,)}, DTypeError, "takes bool, not f32"),
    (ops.cumsum, (T(f32, 2),), {"axis": 2}, ArgumentError, "outside"),
    (ops.reshape, (T(f32, 6),), {"shape": (4,)}, ShapeError, r"reshape\(f32\[6\]\): cannot reshape 6 elements to \[4\], which has 4"),
    (ops.reshape, (T(f32, b, 2),), {"shape": (b,)}, ShapeError, r"cannot reshape 2\*b elements"),
    (ops.reshape, (T(f32, 0),), {"shape": (-1, 0)}, ShapeError, "cannot be negative"),
    (ops.transpose, (T(f32, 2, 3),), {"permutation": (0, 0)}, ArgumentError, "each of the 2 axes once"),
    (ops.broadcast, (T(f32, 3),), {"shape": (2,)}, ShapeError, r"shapes \[3\] and \[2\] do not broadcast"),
    (ops.broadcast, (T(f32, 3),), {"shape": (3, 1)}, ShapeError, "only axes of size 1 stretch"),
    (ops.broadcast, (T(f32, 3, 3),), {"shape": (3,)}, ShapeError, "only axes of size 1 stretch"),
    (ops.slice, (T(f32, 5),), {"start": (2,), "stop": (6,), "step": (1,)}, ShapeError, "within its 5 elements"),
    (ops.slice, (T(f32, b),), {"start": (0,), "stop": (5,), "step": (1,)}, ShapeError, "within its b elements"),
    (ops.slice, (T(f32, 5),), {"start": (0,), "stop": (5,), "step": (0,)}, ArgumentError, "at least 1"),
    (ops.slice, (T(f32, b),), {"start": (0,), "stop": (b,), "step": (2,)}, ShapeError, "no polynomial"),
    (ops.slice, (T(f32, 5, 5),), {"start": (0,), "stop": (5,), "step": (1,)}, ArgumentError, "one number per axis"),
    (ops.pad, (T(f32, 5), T(f64)), {"low": (0,), "high": (0,), "interior": (0,)}, DTypeError, r"fill value is f32\[\]"),
    (ops.pad, (T(f32, 5), T(f32)), {"low": (-1,), "high": (0,), "interior": (0,)}, ArgumentError, "slice to remove"),
    (ops.concat, (), {"axis": 0}, ArgumentError, "at least one"),
    (ops.concat, (T(f32, 2, 3), T(f32, 2, 4)), {"axis": 0}, ShapeError, "along axis 0 only"),
    (ops.concat, (T(f32, 2), T(f64, 2)), {"axis": 0}, DTypeError, "cast one"),
    (ops.flip, (T(f32, 2),), {"axes": (1,)}, ArgumentError, "outside"),
    (ops.matmul, (T(f32, 2, 3), T(f32, 4, 5)), {}, ShapeError, r"axis 1 of f32\[2,3\] is 3, axis 0 of f32\[4,5\] is 4"),
    (ops.matmul, (T(f32, 3), T(f32, 3, 5)), {}, ShapeError, "reshape a vector"),
    (ops.matmul, (T(f32, 2, 3, 3), T(f32, 1, 3, 5)), {}, ShapeError, "batch sizes differ"),
    (ops.matmul, (T(bool_, 2, 3), T(bool_, 3, 5)), {}, DTypeError, "not bool"),
    (ops.conv, (T(f32, 1, 5, 3), T(f64, 3, 3, 2)), _conv(1), DTypeError, "cast one"),
    (ops.conv, (T(bool_, 1, 5, 3), T(bool_, 3, 3, 2)), _conv(1), DTypeError, "not bool"),
    (ops.conv, (T(f32, 5, 3), T(f32, 3, 2)), _conv(0), ShapeError, "1 to 3 spatial axes"),
    (ops.conv, (T(f32, 1, 5, 3), T(f32, 3, 3, 3, 2)), _conv(1), ShapeError, r"not f32\[1,5,3\] and f32\[3,3,3,2\]"),
    (ops.conv, (T(f32, 1, 5, 3), T(f32, 3, 4, 2)), _conv(1), ShapeError, "the kernel reads 4 channels, but the input has 3"),
    (ops.conv, (T(f32, 1, 5, 4), T(f32, 3, 4, 2)), _conv(1, groups=2), ShapeError, "4 channels, in 2 groups, but the input has 4"),
    (ops.conv, (T(f32, 1, 5, 4), T(f32, 3, 2, 3)), _conv(1, groups=2), ShapeError, "3 output channels do not divide into 2"),
    (ops.conv, (T(f32, 1, 5, 4), T(f32, 3, 2, 3)), _conv(1, groups=0), ArgumentError, "at least 1, not 0"),
    (ops.conv, (T(f32, 1, 5, 3), T(f32, 3, 3, 2)), _conv(1, strides=(0,)), ArgumentError, "strides holds ints of at least 1, not 0"),
    (ops.conv, (T(f32, 1, 5, 3), T(f32, 3, 3, 2)), _conv(1, w_dilation=(1, 1)), ArgumentError, "a tuple of 1; got"),
    (ops.conv, (T(f32, 1, 5, 3), T(f32, 3, 3, 2)), _conv(1, padding=(1,)), ArgumentError, r"one pair \(low, high\)"),
    (ops.conv, (T(f32, 1, 5, 3), T(f32, 3, 3, 2)), _conv(1, padding=((1, 0.5),)), ArgumentError, "ints or Dims"),
    (ops.conv, (T(f32, 1, 5, 3), T(f32, 0, 3, 2)), _conv(1), ShapeError, "no elements along spatial axis 0"),
    (ops.conv, (T(f32, 1, 5, 3), T(f32, 3, 3, 2)), _conv(1, w_dilation=(3,)), ShapeError, "covers 7 elements, the padded input only 5"),
    (ops.conv, (T(f32, 1, 2, 3), T(f32, 3, 3, 2)), _conv(1), ShapeError, "covers 3 elements, the padded input only 2"),
    (ops.conv, (T(f32, 1, t, 3), T(f32, 5, 3, 2)), _conv(1), ShapeError, "the padded input may be only t"),
    (ops.conv, (T(f32, 1, t, 3), T(f32, 3, 3, 2)), _conv(1, strides=(2,), padding=((1, 1),)), ShapeError, "use a known size"),
    (ops.gather, (T(f32, 2, 3), T(i32, 4)), {"axes": (0,)}, DTypeError, "indices are i64, not i32"),
    (ops.gather, (T(f32, 2, 3), T(i64, 4), T(i64, 5)), {"axes": (0, 1)}, ShapeError, "indices need one shape"),
    (ops.gather, (T(f32, 2, 3), T(i64, 4)), {"axes": (0, 1)}, ArgumentError, "one axis for each"),
    (ops.gather, (T(f32, 2, 3), T(i64, 4)), {"axes": (2,)}, ArgumentError, "within 0..1"),
    (ops.scatter, (T(f32, 2, 3), T(f32, 4, 2), T(i64, 4)), {"axes": (0,), "mode": "add"}, ShapeError, r"ask for \[4,3\]"),
    (ops.scatter, (T(f32, 2), T(f64, 4), T(i64, 4)), {"axes": (0,), "mode": "add"}, DTypeError, "cast"),
    (ops.scatter, (T(f32, 2), T(f32, 4), T(i64, 4)), {"axes": (0,), "mode": "max"}, ArgumentError, "'add' or 'set'"),
    (ops.cond, (T(f32), T(f32, 3)), {"then": _F, "orelse": _F}, DTypeError, "the predicate is bool"),
    (ops.cond, (T(bool_, 3), T(f32, 3)), {"then": _F, "orelse": _F}, ShapeError, "use where"),
    (ops.cond, (T(bool_), T(f32, 4)), {"then": _F, "orelse": _F}, ShapeError, r"then takes \(f32\[3\]\), but is given \(f32\[4\]\)"),
    (ops.cond, (T(bool_), T(f32, 3)), {"then": _F, "orelse": _G}, ShapeError, "both branches give the same types"),
    (ops.while_, (T(f32, 3),), {"test": _F, "body": _F, "carried": 1}, DTypeError, r"test gives one bool\[\]"),
]  # fmt: skip


@pytest.mark.parametrize("op, types, attrs, error, message", ERRORS, ids=lambda v: getattr(v, "name", ""))
def test_type_error(op: Any, types: Any, attrs: Any, error: type[DuoError], message: str) -> None:
    with Builder() as builder:
        operands = [builder.parameter(p) for p in types]
        with pytest.raises(error, match=message) as caught:
            op(*operands, **attrs)
        assert type(caught.value) is error and str(caught.value).startswith(op.name + "(")
        assert not builder.ops


# ------------------------------------------------------------------------------------------------------- simplification
def simplified(fn: Callable[..., Value], *types: TensorType) -> tuple[Value, ...] | None:
    """What the last op's rule replaces it by."""
    with Builder() as builder:
        op = fn(*[builder.parameter(p) for p in types]).op
        assert op is not None and op.definition.canonicalize is not None
        out = op.definition.canonicalize(op)
        return None if out is None else tuple(out)


SAME = [
    lambda x: ops.neg(ops.neg(x)),
    lambda x: ops.transpose(x, permutation=(0, 1)),
    lambda x: ops.transpose(ops.transpose(x, permutation=(1, 0)), permutation=(1, 0)),
    lambda x: ops.reshape(x, shape=(2, 3)),
    lambda x: ops.reshape(ops.reshape(x, shape=(6,)), shape=(2, 3)),
    lambda x: ops.broadcast(x, shape=(2, 3)),
    lambda x: ops.cast(x, dtype=f32),
    lambda x: ops.cast(ops.cast(x, dtype=f64), dtype=f32),
    lambda x: ops.slice(x, start=(0, 0), stop=(2, 3), step=(1, 1)),
    lambda x: ops.pad(x, nd.constant_of(0, f32), low=(0, 0), high=(0, 0), interior=(0, 0)),
    lambda x: ops.flip(ops.flip(x, axes=(0, 1)), axes=(0, 1)),
    lambda x: ops.flip(x, axes=()),
    lambda x: ops.stop_gradient(x),
    lambda x: ops.where(nd.full((2, 3), False, bool_), nd.zeros_like(x), x),
    lambda x: ops.where(ops.lt(x, nd.zeros_like(x)), x, x),
    lambda x: nd.mul(x, 1),
    lambda x: nd.mul(1.0, x),
    lambda x: nd.div(x, 1.0),
    lambda x: ops.integer_pow(x, n=1),
    lambda x: ops.concat(x, axis=0),
    lambda x: ops.bitcast(x, dtype=f32),
    lambda x: ops.max(x, axes=()),
    lambda x: ops.prod(x, axes=()),
]  # fmt: skip


@pytest.mark.parametrize("fn", SAME)
def test_simplifies_to_its_operand(fn: Callable[..., Value]) -> None:
    out = simplified(fn, T(f32, 2, 3))
    assert out is not None and len(out) == 1 and out[0].op is None


KEPT = [
    lambda x: nd.add(x, 0.0),  # -0.0 + 0.0 is 0.0
    lambda x: nd.mul(x, 0.0),  # NaN, infinities, -0.0
    lambda x: nd.mul(x, 2.0),
    lambda x: nd.div(x, 2.0),
    lambda x: ops.cast(ops.cast(x, dtype=f16), dtype=f32),
    lambda x: ops.cast(ops.cast(x, dtype=i32), dtype=f32),
    lambda x: ops.flip(x, axes=(0,)),
    lambda x: ops.sum(x, axes=()),  # -0.0 becomes 0.0
]  # fmt: skip


@pytest.mark.parametrize("fn", KEPT)
def test_keeps_what_would_change_bits(fn: Callable[..., Value]) -> None:
    with Builder() as builder:
        op = fn(builder.parameter(T(f32, 2, 3))).op
        assert op is not None
        rule = op.definition.canonicalize
        assert rule is None or rule(op) is None


@pytest.mark.parametrize("middle", op_table.ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("source", op_table.ALL, ids=lambda d: d.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_cast_of_cast_keeps_bits(source: DType, middle: DType) -> None:
    x = op_table.wild(np.random.default_rng(0), source, (64,))
    for target in op_table.ALL:
        twice = function_of(lambda v, d=target: ops.cast(ops.cast(v, dtype=middle), dtype=d), T(source, 64))
        with Builder() as builder:
            (p,) = [builder.parameter(T(source, 64))]
            op = ops.cast(ops.cast(p, dtype=middle), dtype=target).op
            out = op.definition.canonicalize(op)
        if out is not None:
            assert_bits(interpret(builder.build(out), x)[0], interpret(twice, x)[0])


def test_cond_with_a_known_predicate_is_inlined() -> None:
    def fn(x: Value) -> Value:
        (out,) = [ops.cond(nd.constant_of(True, bool_), x, then=_G, orelse=_G)]
        return out

    out = simplified(fn, T(f32, 3))
    assert out is not None and out[0].op is not None and out[0].op.definition is ops.sum
