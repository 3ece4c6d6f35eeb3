"""Types: dtypes, promotion, symbolic sizes, tensor types."""

from __future__ import annotations

import itertools
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo_ir import types
from duo_ir.core import bind_dims
from duo_ir.errors import DTypeError, DuoError, ShapeError
from duo_ir.types import DTYPES, Dim, TensorType, dtype, exact_div, product, promote, promote_scalar, substitute

A, B, T = Dim.symbol("a"), Dim.symbol("b"), Dim.symbol("t")


# ----------------------------------------------------------------------------------------------------------- dtypes
def test_dtype_names_and_numpy_agree():
    for name, d in DTYPES.items():
        assert dtype(name) is d and dtype(d) is d and dtype(d.numpy) is d
        assert dtype(types.LONG_NAMES[name]) is d
        assert d.numpy.itemsize == d.itemsize and d.bits == 8 * d.itemsize
        assert pickle.loads(pickle.dumps(d)) is d
        assert repr(d) == f"duo.{types.LONG_NAMES[name]}"
    assert dtype(float) is types.f32 and dtype(int) is types.i64 and dtype(bool) is types.bool_
    assert dtype(ml_dtypes.bfloat16) is types.bf16 and dtype(np.float16) is types.f16


@pytest.mark.parametrize("bad", ["f8", "<f4", None, "complex64", np.complex64, object(), None.__class__, "uint64", str])
def test_dtype_that_duo_has_not(bad):
    with pytest.raises(DTypeError, match="is not a dtype of duo"):
        dtype(bad)


def test_dtype_kinds():
    assert [d.name for d in DTYPES.values() if d.is_float] == ["f16", "bf16", "f32", "f64"]
    assert [d.name for d in DTYPES.values() if d.is_integer] == ["i8", "i16", "i32", "i64", "u8"]
    assert [d.name for d in DTYPES.values() if d.is_narrow_float] == ["f16", "bf16"]


def test_promotion_is_numpys_within_a_kind():
    """Where the array API defines the join, NumPy's array rules agree with the table; bf16 is NumPy's only stranger."""
    for a, b in itertools.product(DTYPES.values(), repeat=2):
        joined = promote(a, b)
        assert joined is promote(b, a)
        if types.bf16 in (a, b):
            continue
        mixed = {a.is_float, b.is_float} == {True, False} and types.bool_ not in (a, b)
        expected = (a if a.is_float else b) if mixed else dtype(np.promote_types(a.numpy, b.numpy))
        assert joined is expected, (a, b)


def test_promotion_of_narrow_floats():
    assert promote(types.f16, types.bf16) is types.f32
    assert promote(types.bf16, types.f64) is types.f64
    assert promote(types.bf16, types.i64) is types.bf16
    assert promote(types.u8, types.i8) is types.i16
    assert promote(types.u8, types.i32) is types.i32


def test_promotion_keeps_idempotence_and_bounds():
    for a, b in itertools.product(DTYPES.values(), repeat=2):
        joined = promote(a, b)
        assert promote(a, a) is a
        assert promote(joined, a) is joined and promote(joined, b) is joined


def test_scalars_are_weak():
    assert promote_scalar(types.bf16, float) is types.bf16
    assert promote_scalar(types.i8, float) is types.f32
    assert promote_scalar(types.i8, int) is types.i8
    assert promote_scalar(types.bool_, int) is types.i64
    assert promote_scalar(types.bool_, bool) is types.bool_
    with pytest.raises(DTypeError, match="complex"):
        promote_scalar(types.f32, complex)


# ------------------------------------------------------------------------------------------------------------- dims
def test_dim_normal_form():
    assert A + B == B + A and hash(A + B) == hash(B + A)
    assert A * (B + 1) == A * B + A
    assert A - A == 0 and isinstance(A - A, int)
    assert (A + 2) - A == 2
    assert 3 - A == -A + 3
    assert A * 0 == 0
    assert A != 3 and A + 0 == A
    assert str(2 * A * B + A + 1) == "2*a*b+a+1"


@pytest.mark.parametrize("name", ["", "1a", "a b", "a*b"])
def test_dim_names_are_identifiers(name):
    with pytest.raises(ShapeError, match="identifier"):
        Dim.symbol(name)


def polynomials():
    leaves = st.one_of(st.integers(-4, 4), st.sampled_from([A, B, T]))
    return st.recursive(leaves, lambda s: st.tuples(s, s, st.sampled_from(["+", "-", "*"])).map(_combine), max_leaves=6)


def _combine(parts):
    x, y, operator = parts
    return x + y if operator == "+" else x - y if operator == "-" else x * y


SIZES = {"a": 5, "b": 7, "t": 11}


@given(polynomials(), polynomials())
def test_dim_arithmetic_is_integer_arithmetic(x, y):
    ev = lambda d: types.evaluate(d, SIZES)  # noqa: E731
    assert ev(x + y) == ev(x) + ev(y)
    assert ev(x - y) == ev(x) - ev(y)
    assert ev(x * y) == ev(x) * ev(y)
    assert x * y == y * x and (x + y) - y == x


@given(polynomials(), polynomials())
def test_exact_div_undoes_mul(x, y):
    q = exact_div(x, y)
    if q is not None:
        assert q * y == x
    if isinstance(y, int) and y != 0:
        assert exact_div(x * y, y) == x


@given(polynomials())
def test_substitute_then_evaluate(x):
    assert types.evaluate(substitute(x, {"a": B + 1}), SIZES) == types.evaluate(x, {**SIZES, "a": 8})
    assert substitute(x, {}) == x
    assert substitute(x, SIZES) == types.evaluate(x, SIZES)


def test_exact_div_refuses():
    assert exact_div(A, 0) is None
    assert exact_div(A + 1, A) is None
    assert exact_div(A, B) is None
    assert exact_div(A * B, B) == A
    assert exact_div(6 * A, 4) is None
    assert exact_div(A + 1, A + 1) == 1


# ---------------------------------------------------------------------------------------------------- tensor types
def test_tensor_types_are_interned():
    t = TensorType(types.f32, (A, 3))
    assert t is TensorType(types.f32, (Dim.symbol("a"), 3))
    assert pickle.loads(pickle.dumps(TensorType(types.f32, (2, 3)))) is TensorType(types.f32, (2, 3))
    assert str(t) == "f32[a,3]" and t.rank == 2 and t.names == ("a",)
    assert t.size == 3 * A and t.nbytes == 12 * A
    assert not t.is_static and t.static_shape({"a": 4}) == (4, 3)
    assert t.with_dtype(types.i8).dtype is types.i8 and t.with_shape(()).shape == ()
    assert TensorType(types.f32).size == 1


def test_sizes_are_ints_whatever_came_first():
    t = TensorType(types.f32, (np.int64(977), 1))
    assert [type(d) for d in t.shape] == [int, int] and t is TensorType(types.f32, (977, 1))
    for bad in ((991.0,), (True, 983), ("b",)):
        with pytest.raises(ShapeError, match="a size is an int or a Dim"):
            TensorType(types.f32, bad)


def test_the_dtype_is_a_dtype():
    for bad in (3, "f32", np.float32, None):
        with pytest.raises(DTypeError, match="a TensorType has a DType"):
            TensorType(bad, (2,))


def test_broadcast_shapes():
    assert types.broadcast_shapes((A, 1), (3,)) == (A, 3)
    assert types.broadcast_shapes((), ()) == ()
    assert types.broadcast_shapes((0,), (1,)) == (0,)
    assert types.broadcast_shapes((1, 4), (A, 1, 1)) == (A, 1, 4)
    for bad in ([(2,), (3,)], [(A,), (B,)], [(A,), (2,)], [(0,), (2,)]):
        with pytest.raises(ShapeError, match="do not broadcast"):
            types.broadcast_shapes(*bad)


@given(st.lists(st.lists(st.sampled_from([1, 1, 2, 3]), max_size=4), min_size=1, max_size=3))
def test_broadcast_shapes_is_numpys(shapes):
    shapes = [tuple(s) for s in shapes]
    try:
        expected = np.broadcast_shapes(*shapes)
    except ValueError:
        with pytest.raises(ShapeError):
            types.broadcast_shapes(*shapes)
        return
    assert types.broadcast_shapes(*shapes) == expected


def test_row_major():
    assert types.row_major((2, A, 3)) == (3 * A, 3, 1)
    assert types.row_major(()) == ()
    assert product((2, A, 3)) == 6 * A


def test_bind_dims():
    f32 = types.f32
    kinds = [TensorType(f32, (A, A * B)), TensorType(f32, (B,))]
    assert bind_dims(kinds, [(2, 6), (3,)]) == {"a": 2, "b": 3}
    with pytest.raises(DuoError, match="axis 1"):
        bind_dims(kinds, [(2, 7), (3,)])
    with pytest.raises(DuoError, match="shape"):
        bind_dims(kinds, [(2,), (3,)])
