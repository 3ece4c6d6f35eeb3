"""Simplification and canonical form: bits kept, signature kept, rules applied to the fixed point; and the rewriting beneath."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from ir_programs import programs

import duo_ir.ops as ops
from duo_ir.core import Builder, Function, Loc, function_of
from duo_ir.errors import DuoError
from duo_ir.interpret import interpret
from duo_ir.ops import broadcasting as nd
from duo_ir.text import to_text
from duo_ir.transforms.canonical import canonicalize
from duo_ir.transforms.rewrite import dce, rewrite, with_sizes
from duo_ir.transforms.simplify import simplify
from duo_ir.types import Dim, TensorType, bf16, bool_, f32, f64, i32, i64
from duo_ir.verify import verify

S, V = TensorType(f32), TensorType(f32, (3,))
B = Dim.symbol("b")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit, any NaN equal to any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind not in "fV":
        return bool((a == b).all())
    nan = np.isnan(a.astype(np.float64)), np.isnan(b.astype(np.float64))
    raw = [np.ascontiguousarray(x).reshape(-1).view(f"u{x.itemsize}").reshape(x.shape) for x in (a, b)]
    return bool((np.where(nan[0], 0, raw[0]) == np.where(nan[1], 0, raw[1])).all() and (nan[0] == nan[1]).all())


def names(function: Function) -> list[str]:
    return [op.definition.name for op in function.walk()]


def simplified(fn, *types):
    function = function_of(fn, *types)
    out = simplify(function)
    verify(out)
    return out


# ----------------------------------------------------------------------------------------------------- whole programs
@given(programs(f32))
def test_bits_and_signature_stay(case):
    function, arrays = case
    out = simplify(function)
    verify(out)
    assert out.param_types == function.param_types and out.result_types == function.result_types
    assert len(list(out.walk())) <= len(list(function.walk())) + 1
    for a, b in zip(interpret(function, *arrays), interpret(out, *arrays), strict=True):
        assert same_bits(a, b)


@given(programs(bf16))
def test_bits_stay_in_bf16(case):
    function, arrays = case
    for a, b in zip(interpret(function, *arrays), interpret(simplify(function), *arrays), strict=True):
        assert same_bits(a, b)


@given(programs(f32))
def test_simplifying_again_changes_nothing(case):
    once = simplify(case[0])
    assert simplify(once) is once


# -------------------------------------------------------------------------------------------------------------- rules
def test_dead_code_goes_and_parameters_stay():
    f = simplified(lambda x, y: (ops.exp(y), ops.neg(x))[1], V, V)
    assert names(f) == ["neg"] and len(f.params) == 2


def test_common_subexpressions():
    f = simplified(lambda x, y: ops.sub(ops.add(x, y), ops.add(y, x)), V, V)
    assert names(f) == ["add", "sub"] and f.ops[1].operands[0] is f.ops[1].operands[1]
    assert names(simplified(lambda x, y: ops.add(x - y, y - x), V, V)) == ["sub", "sub", "add"]
    assert names(simplified(lambda x: ops.add(nd.sum(x, 0), nd.sum(x, -1)), V)) == ["sum", "add"]


def test_attributes_that_are_equal_but_not_the_same_are_not_shared():
    def program():
        zero, minus = nd.constant_of(0.0, f32), nd.constant_of(-0.0, f32)
        return zero, minus, nd.constant_of(1, i64), nd.constant_of(True, bool_), nd.constant_of(1.0, f32)

    assert len(simplified(program).ops) == 5


def test_rules_run_to_the_fixed_point():
    f = simplified(lambda x: ops.neg(ops.neg(ops.neg(ops.neg(x)))) * 1.0 / 1.0, V)
    assert f.ops == () and f.results == f.params
    f = simplified(
        lambda x: ops.transpose(ops.transpose(x, permutation=(1, 0)), permutation=(1, 0)), TensorType(f32, (2, B))
    )
    assert f.ops == ()


def test_folding_is_scalar_only_and_exact():
    def program(x):
        third = nd.constant_of(1.0, f32) / nd.constant_of(3.0, f32)
        return x * nd.broadcast_to(third, (3,)), ops.sqrt(nd.constant_of(-1.0, f32)), ops.lt(third, third)

    f = simplified(program, V)
    assert names(f) == ["constant", "broadcast", "mul", "constant", "constant"]
    values = [op.attrs["value"] for op in f.ops if op.definition is ops.constant]
    assert values[0] == float(np.float32(1) / np.float32(3)) and values[1] != values[1] and values[2] is False


def test_no_rewrite_that_rounds():
    """x/3 stays a division, x+0 an addition (-0 + 0 is +0), x-x a subtraction (inf, NaN), x*0 a product."""
    f = simplified(lambda x: (x / 3.0, x + 0.0, x - x, x * 0.0), V)
    assert {"div", "add", "sub", "mul"} <= set(names(f))


def test_nested_functions_are_simplified():
    def branch(x):
        ops.exp(x)
        return ops.neg(ops.neg(x)) + ops.neg(ops.neg(x))

    inner = function_of(branch, V)
    f = simplified(lambda p, x: ops.cond(p, x, then=inner, orelse=inner), TensorType(bool_), V)
    assert names(f) == ["cond", "add", "add"]


def test_a_branch_that_is_known_is_inlined():
    double, keep = function_of(lambda x: x + x, V), function_of(lambda x: x, V)
    yes = simplified(lambda x: ops.cond(nd.constant_of(True, bool_), x, then=double, orelse=keep), V)
    no = simplified(
        lambda x: ops.cond(ops.lt(nd.constant_of(1, i32), 0 * nd.constant_of(1, i32)), x, then=double, orelse=keep), V
    )
    assert names(yes) == ["add"] and no.ops == ()


def test_places_stay():
    builder = Builder()
    with builder:
        x = builder.parameter(V)
        builder.loc = Loc.of("a.py", 7)
        y = ops.exp(ops.neg(ops.neg(x)))
    (op,) = simplify(builder.build([y])).ops
    assert str(op.loc) == "a.py:7"


def test_unchanged_functions_and_ops_are_shared():
    f = function_of(lambda x, y: ops.exp(x) + y, V, V)
    assert simplify(f) is f and dce(f) is f
    g = function_of(lambda x: (ops.exp(x), ops.neg(ops.neg(x))), V)
    assert simplify(g).ops[0] is g.ops[0]


@pytest.mark.parametrize("batch", [(), (2,), (B,)])
def test_a_product_read_transposed_is_computed_transposed(batch):
    x, g, w = (TensorType(f32, (*batch, *dims)) for dims in ((5, 3), (5, 4), (4, 3)))

    def update(x, g, w):
        return w - nd.swap_last(nd.matmul(nd.swap_last(x), g))

    out = simplified(update, x, g, w)
    assert names(out) == ["transpose", "matmul", "sub"]  # g' x
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(t.static_shape({"b": 2})).astype(np.float32) for t in (x, g, w)]
    for a, b in zip(interpret(function_of(update, x, g, w), *arrays), interpret(out, *arrays), strict=True):
        assert same_bits(a, b)


def test_products_turn_up_to_their_roots():
    a, b, c = (TensorType(f32, dims) for dims in ((2, 3), (3, 4), (4, 5)))
    out = simplified(lambda a, b, c: nd.swap_last(nd.matmul(a, nd.matmul(b, c))), a, b, c)
    assert names(out) == ["transpose", "transpose", "matmul", "transpose", "matmul"]
    assert all(not v.op for op in out.ops if op.definition.name == "transpose" for v in op.operands)


def test_other_products_stay_as_they_are():
    a, b = TensorType(f32, (3, 4)), TensorType(f32, (4, 5))
    row, column = TensorType(f32, (1, 4)), TensorType(f32, (4, 1))
    cases = [
        (lambda a, b: nd.swap_last(nd.matmul(a, b)), (row, b)),  # turned, it would be a reduction: another order
        (lambda a, b: nd.swap_last(nd.matmul(a, b)), (a, column)),
        (lambda a, b: ops.exp(nd.swap_last(m := nd.matmul(a, b))) + nd.swap_last(ops.sin(m)), (a, b)),
        (lambda a, b: (m := nd.matmul(a, b), nd.swap_last(m)), (a, b)),
        (lambda a, b: nd.reshape(nd.matmul(a, b), (5, 3)), (a, b)),
    ]
    for fn, types in cases:
        function = function_of(fn, *types)
        assert simplify(function) is function


# ----------------------------------------------------------------------------------------------------------- rewrite
def test_a_rule_that_never_rests_is_reported():
    def around(op):
        other = {ops.add: ops.sub, ops.sub: ops.add}.get(op.definition)
        return None if other is None else (other(*op.operands),)

    with pytest.raises(DuoError, match="never come to rest"):
        rewrite(function_of(lambda x: x + x, V), around)


def test_a_rule_that_changes_a_type_is_reported():
    with pytest.raises(DuoError, match="a replacement keeps the types"):
        rewrite(
            function_of(lambda x: x + x, V),
            lambda op: (ops.sum(op.operands[0], axes=(0,)),) if op.definition is ops.add else None,
        )


def test_what_a_declining_rule_emitted_is_forgotten():
    def look(op):
        ops.exp(op.operands[0])
        return

    f = function_of(lambda x: x + x, V)
    assert rewrite(f, look) is f


# --------------------------------------------------------------------------------------------------------- canonical
def test_canonical_form_ignores_order_and_dead_code():
    def one(x, w, b):
        ops.exp(x)
        bias = ops.neg(b)
        return (x * w) + bias

    def other(x, b, w):
        product = x * w
        return product + ops.neg(b)

    first, second = (canonicalize(function_of(f, V, V, V), 1) for f in (one, other))
    assert first.function.hash == second.function.hash
    assert first.params == (0, 1, 2) and second.params == (0, 2, 1)
    verify(first.function)
    verify(second.function)


def test_states_follow_their_parameters():
    def one(x, m, w):
        m2 = m * 0.9 + x
        return m2, ops.sum(x * w, axes=(0,)), w - m2

    def other(x, w, m, unused):
        loss = ops.sum(x * w, axes=(0,))
        m2 = m * 0.9 + x
        return loss, w - m2, m2, unused

    a = canonicalize(function_of(one, V, V, V), 1, {1: 0, 2: 2})
    b = canonicalize(function_of(other, V, V, V, V), 1, {1: 1, 2: 2, 3: 3})
    assert a.function.hash == b.function.hash, f"{to_text(a.function)}\n{to_text(b.function)}"
    assert a.params == (0, 2, 1) and a.results == (1, 2, 0)
    assert b.params == (0, 1, 2) and b.results == (0, 1, 2)


def test_states_that_no_pinned_result_reaches_are_ordered_by_structure():
    def one(x, a, b):
        return x, a + x, b * x

    def other(x, b, a):
        return b * x, x, a + x

    left = canonicalize(function_of(one, V, V, V), 1, {1: 1, 2: 2})
    right = canonicalize(function_of(other, V, V, V), 1, {1: 0, 2: 2})
    assert left.function.hash == right.function.hash


def test_canonical_form_of_nested_functions():
    def one(x):
        first = ops.exp(x)
        second = ops.neg(x)
        return first - second

    def other(x):
        second = ops.neg(x)
        return ops.exp(x) - second

    def outer(branch):
        return function_of(lambda p, x: ops.cond(p, ops.neg(x), then=branch, orelse=branch), TensorType(bool_), V)

    a, b = (canonicalize(outer(function_of(f, V)), 2).function for f in (one, other))
    assert a.hash == b.hash
    verify(a)


def test_a_parameter_that_only_fixes_a_size_stays():
    f = function_of(lambda a, unused, x: ops.broadcast(a, shape=(B,)), S, V, TensorType(f64, (B,)))
    out = canonicalize(f, 0)
    assert out.params == (0, 2)
    verify(out.function)


@given(programs(f32))
def test_canonical_form_keeps_bits_and_rests(case):
    function, arrays = case
    out = canonicalize(function, 0)
    verify(out.function)
    given_ = [arrays[i] for i in out.params]
    for k, result in zip(out.results, interpret(out.function, *given_), strict=True):
        assert same_bits(interpret(function, *arrays)[k], result)
    again = canonicalize(out.function, 0)
    assert again.function.key() == out.function.key() and again.params == tuple(range(len(out.params)))


def sized(name: str, other: str) -> Function:
    """A program over two named sizes, with one in an attribute and in a nested function."""
    b, t = Dim.symbol(name), Dim.symbol(other)
    kind = TensorType(f32, (b, t))

    def program(x, p):
        branch = function_of(lambda v: ops.reshape(v, shape=(t * b,)), kind, name="branch")
        flat = ops.cond(p, x, then=branch, orelse=branch)
        return ops.concat(flat, ops.iota(shape=(b,), axis=0, dtype=f32), axis=0), ops.size(dim=2 * t + 1)

    return function_of(program, kind, TensorType(bool_))


def test_sizes_may_be_replaced_and_renamed():
    f = sized("batch", "a")
    small = with_sizes(f, {"batch": 3, "a": 2})
    verify(small)
    assert str(small.result_types[0]) == "f32[9]"
    arrays = [np.arange(6, dtype=np.float32).reshape(3, 2), np.asarray(True)]
    for a, b in zip(interpret(f, *arrays), interpret(small, *arrays)):
        assert same_bits(a, b)
    half = with_sizes(f, {"batch": Dim.symbol("a"), "a": Dim.symbol("batch")})  # all at once
    verify(half)
    assert half.key() == sized("a", "batch").key()
    first, second = (canonicalize(sized(*names_), 2, rename_sizes=True).function for names_ in (("n", "a"), ("b", "z")))
    verify(first)
    assert first.hash == second.hash and first.dims == ("s0", "s1")


def test_deep_programs_do_not_recurse():
    def deep(x):
        for _ in range(5000):
            x = x + x
        return x

    f = function_of(deep, V)
    assert len(canonicalize(simplify(f), 1).function.ops) == 5000
