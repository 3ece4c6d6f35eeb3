"""Derivatives: every op of the table to order two against finite differences, both modes against each other, the order in which
cotangents add, control flow, and the forward/backward split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from ir_programs import programs
from op_table import TABLE, Case, cases

import duo_ir.ops as ops
from duo_ir.core import Builder, Function, Loc, function_of
from duo_ir.errors import DuoError, GradientError
from duo_ir.interpret import interpret
from duo_ir.ops import broadcasting as nd
from duo_ir.text import to_text
from duo_ir.transforms.autodiff import forward, reverse
from duo_ir.transforms.derivatives import (
    Residual,
    grad_function,
    jvp_function,
    linearize_split,
    vjp_function,
)
from duo_ir.transforms.simplify import simplify
from duo_ir.types import Dim, TensorType, bf16, bool_, f32, f64, i64
from duo_ir.verify import verify

S, V, M = TensorType(f64), TensorType(f64, (3,)), TensorType(f64, (3, 3))
B = Dim.symbol("b")
STEP = 1e-5


# --------------------------------------------------------------------------------------------------- finite differences
def inner(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return float(sum((x.astype(np.float64) * y.astype(np.float64)).sum() for x, y in zip(a, b, strict=True)))


def floats(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [a for a in arrays if a.dtype.kind == "f"]


def random_like(rng: np.random.Generator, values: list) -> list[np.ndarray]:
    return [np.asarray(rng.normal(size=v.shape)) for v in values]


def check_derivatives(
    function: Function, arrays: list[np.ndarray], wrt: list[int], order: int, tolerance: float = 2e-6
) -> None:
    """<ct, J v> three ways: by central differences, forward mode and reverse mode; then the same of the reverse-mode program."""
    rng = np.random.default_rng(order)
    moved = random_like(rng, [arrays[i] for i in wrt])
    here = floats(interpret(function, *arrays))
    cotangents = random_like(rng, here)

    def at(h: float) -> list[np.ndarray]:
        shifted = list(arrays)
        for i, v in zip(wrt, moved):
            shifted[i] = np.asarray(arrays[i] + h * v)
        return floats(interpret(function, *shifted))

    numeric = inner(cotangents, [(a - b) / (2 * STEP) for a, b in zip(at(STEP), at(-STEP))])
    push = jvp_function(function, wrt)
    pull = vjp_function(function, wrt)
    verify(push)
    verify(pull)
    out = interpret(push, *arrays, *moved)
    assert all((a == b).all() for a, b in zip(floats(out[: len(function.results)]), here))
    by_jvp = inner(cotangents, out[len(function.results) :])
    gradients = interpret(pull, *arrays, *cotangents)
    by_vjp = inner(gradients, moved)
    size = 1.0 + abs(numeric) + inner([abs(g) for g in gradients], [abs(v) for v in moved])
    assert abs(by_jvp - by_vjp) <= 1e-12 * size, (by_jvp, by_vjp, to_text(function))
    assert abs(numeric - by_vjp) <= tolerance * size, (numeric, by_vjp, to_text(pull))
    if order > 1:
        both = [*wrt, *range(len(arrays), len(arrays) + len(cotangents))]
        check_derivatives(pull, [*arrays, *cotangents], both, order - 1, tolerance * 20)


def smooth_cases() -> list[Case]:
    rows = [row for row in TABLE if row.smooth]
    out = []
    for row in rows:
        every = [c for c in cases([row], (f64,)) if c.attrs.get("dtype", f64) is f64 and (1030,) not in c.shapes]
        # An op looks the same at many shapes: the elementwise ones are tried on three.
        out += (
            every
            if row.variants[0][1] or len(every) > 12
            else [c for c in every if c.shapes[0] in ((), (0,), (3, 5))] or every
        )
    return out


@pytest.mark.parametrize("case", smooth_cases(), ids=str)
def test_every_op_to_order_two(case):
    wrt = [i for i in case.row.smooth if i < len(case.shapes)]
    if case.row.name == "concat":
        wrt = list(range(len(case.shapes)))
    check_derivatives(case.function(), case.arrays(), wrt, 2)


def test_the_table_covers_every_rule():
    """Every op with a derivative that is not flat is differentiated above, or below for control flow."""
    with_rule = {r.name for r in TABLE if r.op.derivative or r.op.vjp or r.op.jvp or r.op.linear}
    flat = {"sign", "floor", "ceil", "trunc", "round", "floor_divide", "stop_gradient", "straight_through", "remainder"}
    assert with_rule - flat <= {case.row.name for case in smooth_cases()}


@pytest.mark.parametrize("name", ["sign", "floor", "ceil", "trunc", "round", "floor_divide", "stop_gradient"])
def test_flat_ops_pass_nothing(name):
    op = ops.__dict__[name]
    arity = 2 if name == "floor_divide" else 1
    f = function_of(lambda x: nd.sum(op(*[x] * arity)), V)
    assert (interpret(grad_function(f), np.array([0.3, 1.2, -2.5]))[0] == 0).all()


def test_straight_through_passes_to_its_second_operand():
    f = function_of(lambda x: nd.sum(ops.straight_through(ops.exp(x), x * x)), V)
    assert interpret(grad_function(f), np.array([1.0, -2.0, 3.0]))[0].tolist() == [2, -4, 6]


def test_remainder():
    f = function_of(lambda x, y: ops.remainder(x, y), V, V)
    check_derivatives(f, [np.array([5.3, -2.2, 7.1]), np.array([2.0, 1.5, -3.0])], [0, 1], 2)


# ------------------------------------------------------------------------------------------------------ whole programs
@given(programs(f64, rough=False))
def test_random_programs_to_order_two(case):
    function, arrays = case
    if not all(r.type.dtype.is_float for r in function.results):
        return
    check_derivatives(function, arrays, [0, 1], 2, 1e-4)


@given(programs(f32))
def test_forward_and_backward_split_gives_the_same_bits(case):
    function, arrays = case
    rng = np.random.default_rng(0)
    split = linearize_split(function, [0, 1])
    verify(split.forward)
    verify(split.backward)
    results = interpret(split.forward, *arrays)
    cotangents = [np.asarray(rng.normal(size=r.shape)).astype(r.dtype) for r in results[: len(function.results)]]
    read = [(arrays if r.is_param else results)[r.index] for r in split.residuals]
    found = interpret(split.backward, *read, *[cotangents[k] for k in split.cotangents])
    whole = interpret(vjp_function(function, [0, 1]), *arrays, *cotangents)
    for place, expected in zip(split.gradients, whole, strict=True):
        got = np.zeros_like(expected) if place is None else found[place]
        assert got.tobytes() == expected.tobytes() or np.array_equal(got, expected, equal_nan=True)


@given(programs(f32))
def test_simplified_gradients_have_the_same_bits(case):
    function, arrays = case
    pull = vjp_function(function)
    rng = np.random.default_rng(0)
    cotangents = [np.asarray(rng.normal(size=r.type.shape)).astype(np.float32) for r in function.results]
    for a, b in zip(
        interpret(pull, *arrays, *cotangents), interpret(simplify(pull), *arrays, *cotangents), strict=True
    ):
        assert np.array_equal(a, b, equal_nan=True) and (np.signbit(a) == np.signbit(b))[~np.isnan(a)].all()


def test_fourth_derivative_by_repetition():
    f = function_of(lambda x: ops.sin(x) * ops.exp(x), S)
    for _ in range(4):
        f = simplify(grad_function(f))
        verify(f)
    (value,) = interpret(f, np.float64(0.7))
    assert abs(value - -4 * np.sin(0.7) * np.exp(0.7)) < 1e-13


def test_a_network_to_order_two():
    def loss(x, w, v):
        hidden = nd.maximum(nd.matmul(x, w), 0.0) + ops.tanh(nd.matmul(x, w))
        out = nd.matmul(hidden, v)
        shifted = out - ops.stop_gradient(nd.max(out, -1, keepdims=True))
        return -nd.mean(shifted - ops.log(nd.sum(ops.exp(shifted), -1, keepdims=True)))

    types = [TensorType(f64, s) for s in ((4, 3), (3, 5), (5, 2))]
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=t.shape) for t in types]
    check_derivatives(function_of(loss, *types), arrays, [0, 1, 2], 2)


def test_golden_gradient_of_a_network(golden):
    def loss(x, w, b):
        return nd.sum(nd.maximum(nd.matmul(x, w) + b, 0.0))

    f = function_of(
        loss, TensorType(f32, (B, 4)), TensorType(f32, (4, 2)), TensorType(f32, (2,)), names=("x", "w", "b")
    )
    golden("network_gradient.txt", to_text(simplify(grad_function(f, [1, 2], value=True))))


# --------------------------------------------------------------------------------------------------- order of addition
def emitted(build, wrt=(0,)) -> list[str]:
    """The lines that `reverse` emits for the program that `build` makes of x and y, with the results' names."""
    builder = Builder()
    with builder:
        params = [builder.parameter(V, n) for n in ("x", "y", "ct")]
        out = build(*params[:2])
        count = len(builder.ops)
        found = reverse(builder.ops, {out: params[2]}, [params[i] for i in wrt])
    text = to_text(builder.build([g for g in found if g is not None]))
    return [line.strip().replace("f64[3]", "V") for line in text.split("\n")[1 + count : -2]]


def test_a_first_contribution_is_taken_as_it_is_and_later_ones_are_added():
    lines = emitted(lambda x, y: ops.add(x, x))
    assert lines == ["%4: V = add %ct, %ct", "return %4"]
    lines = emitted(lambda x, y: x * y - x, (0, 1))
    # Reverse program order: the subtraction's share of x first, then the product's.
    assert lines == [
        "%5: V = neg %ct",
        "%6: V = mul %ct, %y",
        "%7: V = mul %ct, %x",
        "%8: V = add %5, %6",
        "return %8, %7",
    ]


def test_operands_contribute_in_operand_order():
    assert emitted(lambda x, y: x * x) == [
        "%4: V = mul %ct, %x",
        "%5: V = mul %ct, %x",
        "%6: V = add %4, %5",
        "return %6",
    ]
    lines = emitted(lambda x, y: x / x)
    first, second = lines[0].split(":")[0], lines[-3].split(":")[0]
    assert lines[-2].endswith(f"add {first}, {second}")


def test_a_seed_on_an_intermediate_value_comes_first():
    builder = Builder()
    with builder:
        x, g, h = (builder.parameter(V, n) for n in "xgh")
        y = ops.neg(x)
        z = ops.neg(y)
        (found,) = reverse(builder.ops, {z: g, y: h}, [x])
    ops_ = [op for op in builder.ops if op.definition is ops.add]
    assert len(ops_) == 1 and ops_[0].operands[0] is h and found is not None


def test_only_ops_on_a_path_are_touched():
    assert emitted(lambda x, y: ops.exp(ops.neg(y)) + x) == ["return %ct"]
    assert emitted(lambda x, y: ops.neg(y)) == ["return"]
    assert emitted(lambda x, y: ops.cast(ops.cast(x, dtype=i64), dtype=f64)) == ["return"]


def test_gradients_of_intermediate_values_are_total():
    builder = Builder()
    with builder:
        x = builder.parameter(V)
        y = ops.neg(x)
        z = ops.mul(y, ops.exp(y))
        found = reverse(builder.ops, {z: nd.ones_like(z)}, [y, x, z])
    f = builder.build(found)
    at = np.array([0.5, -1.0, 2.0])
    dy, dx, dz = interpret(f, at)
    assert np.allclose(dy, np.exp(-at) * (1 - at)) and (dx == -dy).all() and (dz == 1).all()


def test_a_function_that_returns_a_value_twice_adds_both_cotangents():
    f = vjp_function(function_of(lambda x: (x, x, ops.neg(x)), V))
    got = interpret(f, np.zeros(3), np.full(3, 1.0), np.full(3, 10.0), np.full(3, 100.0))
    assert (got[0] == 11 - 100).all()


def test_places_of_emitted_ops_are_those_of_the_forward_ops():
    builder = Builder()
    with builder:
        x = builder.parameter(V)
        builder.loc = Loc.of("a.py", 1)
        y = ops.exp(x)
        builder.loc = Loc.of("a.py", 2)
        z = ops.sin(y)
        builder.loc = Loc.of("a.py", 3)
        reverse(builder.ops, {z: x}, [x])
    assert [op.loc.line for op in builder.ops[2:]] == [2, 2, 1] and builder.loc.line == 3


def test_narrow_floats_keep_their_dtype():
    f = function_of(lambda x: nd.sum(ops.cast(x, dtype=f32) * 3.0), TensorType(bf16, (4,)))
    assert grad_function(f).result_types == (TensorType(bf16, (4,)),)


# -------------------------------------------------------------------------------------------------------- control flow
def branchy() -> Function:
    then = function_of(lambda x, y: (x * y, ops.sin(x)), V, V, name="then")
    orelse = function_of(lambda x, y: (ops.exp(y), y), V, V, name="orelse")
    return function_of(
        lambda p, x, y: nd.add(*ops.cond(p, ops.neg(x), y, then=then, orelse=orelse)) * x, TensorType(bool_), V, V
    )


@pytest.mark.parametrize("flag", [True, False])
def test_cond_to_order_two(flag):
    rng = np.random.default_rng(3)
    check_derivatives(branchy(), [np.asarray(flag), rng.normal(size=3), rng.normal(size=3)], [1, 2], 2)


def test_cond_with_one_operand_twice_and_integers():
    then = function_of(lambda x, y, n: (x * y, n + 1), V, V, TensorType(i64), name="then")
    orelse = function_of(lambda x, y, n: (x, n), V, V, TensorType(i64), name="orelse")
    f = function_of(
        lambda p, x, n: ops.cond(p, x, x, n, then=then, orelse=orelse)[0], TensorType(bool_), V, TensorType(i64)
    )
    for flag in (True, False):
        check_derivatives(f, [np.asarray(flag), np.array([1.0, 2.0, 3.0]), np.asarray(2)], [1], 2)


def power_loop(n: int) -> Function:
    """(x, c) -> n times x = sin(x) * c, with a counter and a value that has no derivative beside it."""
    types = (TensorType(i64), V, V, V)
    test = function_of(lambda i, x, still, c: nd.lt(i, n), *types, name="test")
    body = function_of(lambda i, x, still, c: (i + 1, ops.sin(x) * c, still), *types, name="body")

    def program(x, c):
        start = nd.constant_of(0, i64)
        out = ops.while_(start, x, nd.zeros_like(x), c, test=test, body=body, carried=3)
        return out[1] + out[2]

    return function_of(program, V, V)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_forward_mode_goes_through_loops(n):
    f = power_loop(n)
    rng = np.random.default_rng(5)
    x, c, dx, dc = (rng.uniform(0.5, 1.5, 3) for _ in range(4))
    for wrt, moved in (([0, 1], [dx, dc]), ([0], [dx]), ([1], [dc])):
        push = jvp_function(f, wrt)
        verify(push)
        shift = lambda h, w=wrt: [a + h * d if i in w else a for i, (a, d) in enumerate(((x, dx), (c, dc)))]  # noqa: E731
        numeric = (interpret(f, *shift(STEP))[0] - interpret(f, *shift(-STEP))[0]) / (2 * STEP)
        assert np.allclose(interpret(push, x, c, *moved)[1], numeric, atol=1e-8)
    twice = jvp_function(push, [1])
    verify(twice)
    interpret(twice, x, c, dc, dc)


def test_reverse_mode_through_a_loop_says_what_to_do():
    builder = Builder()
    with builder:
        x, c = builder.parameter(V), builder.parameter(V)
        builder.loc = Loc.of("/home/someone/train.py", 12)
        (y,) = builder.inline(power_loop(2), [x, c])
    with pytest.raises(GradientError, match=r"while \(at /home/someone/train.py:12\).*unrolled in Python"):
        vjp_function(builder.build([y]))


# --------------------------------------------------------------------------------------------------------------- errors
def test_an_op_without_a_rule_is_named_with_its_line():
    builder = Builder()
    with builder:
        x = builder.parameter(TensorType(f32, (3,)))
        builder.loc = Loc.of("model.py", 4)
        y = nd.sum(ops.bitcast(ops.bitcast(x, dtype=f32), dtype=f32))
    f = builder.build([y])
    for attempt in (grad_function, jvp_function):
        with pytest.raises(GradientError, match=r"bitcast\(f32\[3\]\) \(at model.py:4\) has no .* rule"):
            attempt(f)


def test_gradients_need_a_scalar_float():
    for program in (lambda x: x, lambda x: ops.any(ops.lt(x, x), axes=(0,)), lambda x: ()):
        with pytest.raises(GradientError, match="0-d float"):
            grad_function(function_of(program, V))


def test_seeds_and_tangents_have_their_values_types():
    with Builder() as b:
        x, g = b.parameter(V), b.parameter(S)
        y = ops.exp(x)
        with pytest.raises(DuoError, match=r"seed has type f64\[\]"):
            reverse(b.ops, {y: g}, [x])
        with pytest.raises(DuoError, match=r"tangent has type f64\[\]"):
            forward(b.ops, {x: g}, [y])


# ---------------------------------------------------------------------------------------------------------------- split
def residual_types(function: Function, wrt: list[int]) -> list[str]:
    """Where backward reads from: `0` is parameter 0, otherwise the type of the saved value."""
    split = linearize_split(function, wrt)
    verify(split.forward)
    verify(split.backward)
    return [str(r.index) if r.is_param else str(split.forward.results[r.index].type) for r in split.residuals]


def test_residuals_are_what_backward_reads():
    matrix = TensorType(f32, (8, 8))
    assert residual_types(function_of(lambda x, y: x + y, V, V), [0, 1]) == []
    assert residual_types(function_of(lambda x, y: x * y, V, V), [0]) == ["1"]
    assert residual_types(function_of(lambda x, y: x * y, V, V), [0, 1]) == ["1", "0"]
    assert residual_types(function_of(lambda x: ops.exp(ops.neg(x)), V), [0]) == ["f64[3]"]
    # A movement of a parameter is made again; so are constants, and what is broadcast from something smaller.
    assert residual_types(function_of(lambda x, w: nd.matmul(x, nd.swap_last(w)), matrix, matrix), [0]) == ["1"]
    assert residual_types(function_of(lambda x: x / 3.0, V), [0]) == []
    assert residual_types(function_of(lambda x, s: x * nd.broadcast_to(ops.exp(s), (3,)), V, S), [0]) == ["f64[]"]
    # A part of a value is saved in place of the whole.
    part = function_of(lambda x, w: nd.slice_axis(ops.exp(w), 0, 0, 3) * x, V, TensorType(f64, (1000,)))
    assert residual_types(part, [0]) == ["f64[3]"]


def test_a_residual_that_is_a_result_is_not_saved_again():
    split = linearize_split(function_of(lambda x: ops.exp(x), V), [0])
    assert split.residuals == (Residual(False, 0),) and len(split.forward.results) == 1


def test_named_sizes_that_backward_needs_come_in_an_empty_value():
    f = function_of(lambda x: nd.sum(x), TensorType(f64, (B, 2)))
    assert residual_types(f, [0]) == ["bool[b,0]"]
    split = linearize_split(f, [0])
    saved = interpret(split.forward, np.ones((5, 2)))
    assert saved[1].shape == (5, 0)
    (gradient,) = interpret(split.backward, saved[1], np.float64(2))
    assert gradient.shape == (5, 2) and (gradient == 2).all()


def test_what_does_not_flow_is_left_out():
    split = linearize_split(function_of(lambda x, y, n: (ops.exp(x), y, n), V, V, TensorType(i64)), [1, 0, 1, 2], [0])
    assert split.gradients == (None, 0, None, None) and split.cotangents == (0,)
    nothing = linearize_split(function_of(lambda x: ops.sign(x), V), [0])
    assert nothing.gradients == (None,) and nothing.cotangents == () and nothing.residuals == ()
    same = linearize_split(function_of(lambda x, y: x + y, V, V), [0, 1])
    assert same.gradients == (0, 0) and len(same.backward.results) == 1


def test_a_running_gradient_is_the_first_contribution():
    """f(x) = neg(x) with x handed on: backward adds its own share to what came in, in that order."""
    split = linearize_split(function_of(lambda x: (ops.neg(x), x), V), [0])
    (last,) = split.backward.ops[-1:]
    assert split.cotangents == (0, 1) and last.definition is ops.add
    assert last.operands[0] is split.backward.params[1]


def test_backward_of_a_backward():
    f = function_of(lambda x, y: ops.exp(x * y), V, V)
    first = linearize_split(f, [0, 1])
    count = len(first.backward.params)
    second = linearize_split(first.backward, list(range(count)))
    verify(second.forward)
    verify(second.backward)
