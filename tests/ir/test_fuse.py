"""Fusion and lowering: kernels evaluated by NumPy give the interpreter's bits, fused or not; known patterns make few kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import op_table
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_programs import programs

import duo_ir.ops as ops
from duo_ir.core import Builder, Function, Value, function_of
from duo_ir.errors import IndexOutOfRange
from duo_ir.interpret import interpret
from duo_ir.kernels.assemble import Built
from duo_ir.kernels.evaluate import evaluate
from duo_ir.kernels.fuse import fuse
from duo_ir.kernels.kernel import ContractKernel, LoopKernel
from duo_ir.kernels.plan import plan
from duo_ir.kernels.text import print_program
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import lower
from duo_ir.transforms.derivatives import grad_function
from duo_ir.transforms.simplify import simplify
from duo_ir.types import Dim, DType, TensorType, bf16, f16, f32, f64, i32, i64, u8

B, T = Dim.symbol("b"), Dim.symbol("t")
SIZES = {"b": 3, "t": 5}


def F(*shape: Any, dtype: DType = f32) -> TensorType:
    return TensorType(dtype, shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    if a.dtype.kind in "iub":
        assert np.array_equal(a, b)
        return
    x, y = a.astype(np.float64), b.astype(np.float64)
    equal = ((x == y) & (np.signbit(x) == np.signbit(y))) | (np.isnan(x) & np.isnan(y))
    assert equal.all(), (a, b)


def arrays_for(types: tuple[TensorType, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    out = []
    for t in types:
        shape = t.static_shape(SIZES)
        values = rng.integers(0, 4, shape) if t.dtype.kind != "f" else rng.normal(size=shape)
        out.append(np.asarray(values).astype(t.dtype.numpy))
    return out


def check(function: Function, *arrays: np.ndarray) -> None:
    """interpret == evaluate of the kernels, with fusion on and off."""
    want = interpret(function, *arrays)
    for fusion in (True, False):
        program = lower(function, fusion)
        try:
            for w, g in zip(want, evaluate(program, *arrays), strict=True):
                same_bits(w, g)
        except Exception as error:
            error.add_note(f"fusion={fusion}\n{function}\n{print_program(program)}")
            raise


def kernels(fn: Callable[..., Any] | Function, *types: TensorType) -> list[Any]:
    function = fn if isinstance(fn, Function) else function_of(fn, *types)
    return [item.kernel for item in fuse(simplify(function)).items if isinstance(item, Built)]


# ------------------------------------------------------------------------------------------------------ all ops, random
@pytest.mark.parametrize("row", op_table.TABLE, ids=lambda r: r.name)
def test_every_op(row: op_table.Row) -> None:
    for case in op_table.cases([row]):
        check(case.function(), *case.arrays())


@given(programs(f32))
def test_random_programs(case: tuple[Function, list[np.ndarray]]) -> None:
    check(case[0], *case[1])


@given(programs(bf16))
@settings(max_examples=30)
def test_random_programs_bf16(case: tuple[Function, list[np.ndarray]]) -> None:
    check(case[0], *case[1])


def _step(x: Value, draw: st.DrawFn, pool: list[Value]) -> Value | None:
    """One op that moves, reduces or combines, with every attribute drawn."""
    rank, shape = x.type.rank, x.type.shape
    name = draw(
        st.sampled_from(
            [
                "transpose",
                "merge",
                "split",
                "slice",
                "pad",
                "flip",
                "concat",
                "keep_sum",
                "keep_max",
                "add",
                "exp",
                "gather",
                "row",
                "dot",
            ]
        )
    )
    if name == "add":
        y = draw(st.sampled_from([v for v in pool if v.type is x.type]))
        return x * y + 0.5
    if name == "exp":
        return ops.tanh(x)
    if rank == 0:
        return nd.broadcast_to(x, (2, 3))
    axis = draw(st.integers(0, rank - 1))
    n = shape[axis]
    if name == "transpose":
        return nd.transpose(x, draw(st.permutations(range(rank))))
    if name == "merge":
        return (
            nd.reshape(x, (*shape[:axis], n * shape[axis + 1], *shape[axis + 2 :]))
            if axis + 1 < rank
            else nd.expand_dims(x, axis)
        )
    if name == "split":
        divisors = [d for d in range(1, n + 1) if n % d == 0] or [1]
        d = draw(st.sampled_from(divisors))
        return nd.reshape(x, (*shape[:axis], d, n // d, *shape[axis + 1 :])) if rank < 5 else None
    if name == "slice":
        lo = draw(st.integers(0, n))
        return nd.slice_axis(x, axis, lo, draw(st.integers(lo, n)), draw(st.integers(1, 3)))
    if name == "pad":
        each = [tuple(draw(st.integers(0, 2)) if a == axis else 0 for a in range(rank)) for _ in range(3)]
        return ops.pad(x, nd.constant_of(-1.5, x.type.dtype), low=each[0], high=each[1], interior=each[2])
    if name == "flip":
        return ops.flip(x, axes=tuple(a for a in range(rank) if draw(st.booleans())))
    if name == "concat":
        return ops.concat(x, ops.sin(x), x, axis=axis)
    if name in ("keep_sum", "keep_max"):
        if name == "keep_max" and n == 0:
            return None
        return x - getattr(nd, name[5:])(x, axis, True)
    if name == "gather":
        return ops.gather(x, nd.iota((3,), 0) * 2 % n, axes=(axis,)) if n else None
    if name == "row":
        return nd.sum(x, tuple(range(axis, rank)))
    return (
        nd.matmul(nd.reshape(x, (x.type.size // n, n)), nd.iota((n, 2), 0, x.type.dtype))
        if n and axis == rank - 1
        else None
    )


@st.composite
def moving_programs(draw: st.DrawFn) -> tuple[Function, list[np.ndarray]]:
    builder = Builder("moving")
    shape = draw(st.sampled_from([(6,), (4, 6), (2, 3, 4), (1, 5), (5, 1, 2), (0, 3), (12, 2)]))
    with builder:
        pool = [builder.parameter(F(*shape)), builder.parameter(F(*shape))]
        for _ in range(draw(st.integers(1, 10))):
            x = pool[-1] if draw(st.booleans()) else draw(st.sampled_from(pool))
            made = _step(x, draw, pool) if x.type.size < 300 else nd.sum(x)
            if made is not None:
                pool.append(made)
        results = [pool[-1], *[v for v in pool if draw(st.integers(0, 4)) == 0]]
    function = builder.build(results)
    return function, arrays_for(function.param_types, draw(st.integers(0, 99)))


@given(moving_programs())
@settings(max_examples=150)
def test_random_movement(case: tuple[Function, list[np.ndarray]]) -> None:
    check(case[0], *case[1])


# ---------------------------------------------------------------------------------------------------------- models
def softmax(x: Value) -> Value:
    e = ops.exp(x - nd.max(x, -1, True))
    return e / nd.sum(e, -1, True)


def layer_norm(x: Value, scale: Value, shift: Value) -> Value:
    d = x - nd.mean(x, -1, True)
    return d * ops.rsqrt(nd.mean(d * d, -1, True) + 1e-5) * scale + shift


def add_layer_norm(x: Value, y: Value, scale: Value, shift: Value) -> tuple[Value, Value]:
    h = x + y
    return h, layer_norm(h, scale, shift)


def linear(x: Value, w: Value, b: Value) -> Value:
    return nd.matmul(x, w) + b


def linear_relu(x: Value, w: Value, b: Value) -> Value:
    return nd.maximum(linear(x, w, b), 0.0)


def gelu(x: Value) -> Value:
    return x * 0.5 * (ops.erf(x * 0.7071067811865476) + 1.0)


def mlp(x: Value, w1: Value, b1: Value, w2: Value, b2: Value) -> Value:
    return x + linear(gelu(linear(x, w1, b1)), w2, b2)


def attention(x: Value, wq: Value, wk: Value, wv: Value, wo: Value) -> Value:
    b, s, d = x.type.shape

    def heads(v: Value) -> Value:
        return nd.transpose(nd.reshape(v, (b, s, 2, d // 2)), (0, 2, 1, 3))

    q, k, v = (heads(nd.matmul(x, w)) for w in (wq, wk, wv))
    scores = nd.matmul(q, nd.swap_last(k)) / 2.0
    causal = nd.ge(nd.iota((s, s), 0), nd.iota((s, s), 1))
    out = nd.matmul(softmax(nd.where(causal, scores, -1e9)), v)
    return nd.matmul(nd.reshape(nd.transpose(out, (0, 2, 1, 3)), (b, s, d)), wo)


def cross_entropy(x: Value, y: Value) -> Value:
    z = x - nd.max(x, -1, True)
    log_p = z - ops.log(nd.sum(ops.exp(z), -1, True))
    chosen = nd.eq(nd.expand_dims(y, 1), nd.iota(x.type.shape, 1))
    return -nd.mean(nd.sum(nd.where(chosen, log_p, 0.0), -1))


def cross_entropy_gather(x: Value, y: Value) -> Value:
    z = x - nd.max(x, -1, True)
    log_p = z - ops.log(nd.sum(ops.exp(z), -1, True))
    return -nd.mean(ops.gather(log_p, nd.iota(y.type.shape, 0), y, axes=(0, 1)))


def adam(p: Value, m: Value, v: Value, g: Value, lr: Value, c1: Value, c2: Value) -> tuple[Value, Value, Value]:
    m = m * 0.9 + g * 0.1
    v = v * 0.999 + g * g * 0.001
    return p - lr * (m / c1) / (ops.sqrt(v / c2) + 1e-8), m, v


def batch_norm(x: Value, scale: Value) -> Value:
    d = x - nd.mean(x, (0, 1), True)
    return d * ops.rsqrt(nd.mean(d * d, (0, 1), True) + 1e-5) * scale


def rope(x: Value) -> Value:
    half = x.type.shape[-1] // 2
    low, high = nd.slice_axis(x, x.type.rank - 1, 0, half), nd.slice_axis(x, x.type.rank - 1, half, 2 * half)
    turned = ops.concat(-high, low, axis=x.type.rank - 1)
    angle = nd.iota(x.type.shape, 0, f32) * 0.1
    return x * ops.cos(angle) + turned * ops.sin(angle)


def embed(table: Value, tokens: Value) -> Value:
    return ops.gather(table, tokens, axes=(0,)) * 2.0


MODELS: dict[str, tuple[Callable[..., Any], list[TensorType]]] = {
    "softmax": (softmax, [F(4, 8)]),
    "softmax_symbolic": (softmax, [F(B, 2, 8)]),
    "softmax_rows_symbolic": (softmax, [F(2, T)]),
    "softmax_bf16": (softmax, [F(4, 8, dtype=bf16)]),
    "layer_norm": (layer_norm, [F(B, 8), F(8), F(8)]),
    "layer_norm_f16": (layer_norm, [F(B, T, 8, dtype=f16), F(8, dtype=f16), F(8, dtype=f16)]),
    "add_layer_norm": (add_layer_norm, [F(B, T, 8), F(B, T, 8), F(8), F(8)]),
    "linear_relu": (linear_relu, [F(B, 8), F(8, 6), F(6)]),
    "linear_relu_batched": (linear_relu, [F(B, T, 8), F(8, 6), F(6)]),
    "linear_relu_bf16": (linear_relu, [F(5, 8, dtype=bf16), F(8, 6, dtype=bf16), F(6, dtype=bf16)]),
    "linear_one_column": (linear_relu, [F(B, 8), F(8, 1), F(1)]),
    "vector_matrix": (nd.matmul, [F(8), F(8, 3)]),
    "dot": (nd.matmul, [F(700), F(700)]),
    "integer_matmul": (nd.matmul, [F(2, 3, dtype=i32), F(3, 2, dtype=i32)]),
    "integer_dot": (nd.matmul, [F(9, dtype=u8), F(9, dtype=u8)]),
    "mlp": (mlp, [F(B, 8), F(8, 16), F(16), F(16, 8), F(8)]),
    "attention": (attention, [F(2, 3, 4), *[F(4, 4)] * 4]),
    "attention_symbolic": (attention, [F(B, T, 4), *[F(4, 4)] * 4]),
    "cross_entropy": (cross_entropy, [F(5, 7), F(5, dtype=i64)]),
    "cross_entropy_symbolic": (cross_entropy, [F(B, 7), F(B, dtype=i64)]),
    "cross_entropy_gather": (cross_entropy_gather, [F(B, 7), F(B, dtype=i64)]),
    "batch_norm": (batch_norm, [F(4, 6, 3), F(3)]),
    "rope": (rope, [F(3, 8)]),
    "rope_symbolic": (rope, [F(T, B, 6)]),
    "embed": (embed, [F(7, 3), F(B, T, dtype=i64)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    fn, types = MODELS[name]
    function = function_of(fn, *types)
    check(function, *arrays_for(function.param_types))


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith("integer") and n != "add_layer_norm"])
def test_gradient(name: str) -> None:
    fn, types = MODELS[name]
    function = grad_function(function_of(lambda *a: nd.sum(fn(*a) * 1.5), *types), value=True)
    check(function, *arrays_for(function.param_types))


def test_what_many_kernels_repeat_is_stored_small() -> None:
    """Ten independent updates share an expression of a scalar; it is stored as a scalar, not as the array that it is repeated to."""

    def fn(lr: Value, *params: Value) -> tuple[Value, ...]:
        rate = nd.broadcast_to(ops.tanh(1.0 - lr), (50,))
        return tuple([ops.sqrt(p) * rate for p in params])

    function = function_of(fn, F(), *[F(50)] * 10)
    check(function, *arrays_for(function.param_types))
    assert all(temp.nbytes == 4 for temp in lower(function).temps)


def test_adam_is_one_kernel_in_place() -> None:
    types = [*[F(3, 4)] * 4, F(), F(), F()]
    function = function_of(adam, *types)
    check(function, *arrays_for(function.param_types))
    program = lower(function)
    assert len(program.items) == 1 and {(0, 0), (1, 1), (2, 2)} <= set(program.donations)
    assert program.items[0].kernel.axes == (12,)


# ------------------------------------------------------------------------------------------------------ kernel counts
@pytest.mark.parametrize(
    "name, most",
    [
        ("softmax", 1), ("softmax_symbolic", 1), ("layer_norm", 1), ("add_layer_norm", 1), ("linear_relu", 1),
        ("linear_relu_batched", 1), ("linear_one_column", 1), ("mlp", 2), ("cross_entropy", 2), ("attention", 7),
        ("attention_symbolic", 7), ("rope", 1), ("embed", 1),
    ],
)  # fmt: skip
def test_number_of_kernels(name: str, most: int) -> None:
    fn, types = MODELS[name]
    assert len(kernels(fn, *types)) == most


def test_cross_entropy_gradient_is_two_kernels() -> None:
    fn, types = MODELS["cross_entropy"]
    assert len(kernels(grad_function(function_of(fn, *types), value=True))) == 2


def test_views_of_matrices_are_read_in_place() -> None:
    def fn(x: Value, w: Value) -> Value:
        return nd.matmul(nd.swap_last(ops.flip(x, axes=(0,))), nd.slice_axis(w, 1, 1, 5, 2))

    (kernel,) = kernels(fn, F(8, 3), F(8, 6))
    assert isinstance(kernel, ContractKernel)
    assert kernel.a.at.strides == (1, -3) and kernel.a.at.offset == 21 and kernel.b.at.strides == (6, 2)


def test_an_update_is_done_on_the_tiles_of_the_weight_gradient() -> None:
    """The weight lies [out, in], its gradient is asked for as well; or it lies [in, out]."""

    def update(x: Value, g: Value, w: Value, v: Value, lr: Value) -> tuple[Value, ...]:
        gw, gv = nd.swap_last(nd.matmul(nd.swap_last(x), g)), nd.matmul(nd.swap_last(x), g)
        return w - nd.mul(lr, gw), gw, v - nd.mul(lr, gv)

    types = (F(9, 6), F(9, 5), F(5, 6), F(6, 5), F())
    function = function_of(update, *types)
    check(function, *arrays_for(types))
    check(Function(function.params, function.ops, function.results[:2]), *arrays_for(types))
    for results, stores in ((function.results[:2], 2), (function.results[2:], 1)):
        (kernel,) = kernels(Function(function.params, function.ops, results))
        assert isinstance(kernel, ContractKernel)
        assert len(kernel.stores) == stores


def test_loops_are_merged() -> None:
    (kernel,) = kernels(lambda x, y: ops.tanh(nd.transpose(x, (0, 2, 1)) + y), F(2, 3, 4), F(2, 4, 3))
    assert isinstance(kernel, LoopKernel) and kernel.axes == (2, 4, 3)
    (kernel,) = kernels(lambda x, y: x * y, F(2, B, 4), F(2, B, 4))
    assert kernel.axes == (8 * B,)


def test_dear_values_are_stored_when_several_kernels_need_them() -> None:
    def fn(x: Value, w: Value) -> tuple[Value, Value]:
        e = ops.tanh(x)
        return nd.sum(e, 0), nd.sum(e * w, 1)

    stored = [a for k in kernels(fn, F(40, 50), F(40, 50)) for a in k.args if a.output and a.size == 2000]
    assert len(stored) == 1


def test_long_chains_stay_linear() -> None:
    def fn(x: Value) -> Value:
        for _ in range(300):
            x = x * 1.5 + x
            x = nd.slice_axis(x, 0, 0, x.type.shape[0] - 1) + nd.slice_axis(x, 0, 1, x.type.shape[0])
        return x

    function = function_of(fn, F(400))
    assert sum(len(s.body) for k in kernels(function) for s in k.stages) < 6000


def test_deep_expressions() -> None:
    def fn(x: Value) -> Value:
        for _ in range(3000):
            x = ops.sin(x) + 1.0
        return x

    function = simplify(function_of(fn, F(2)))
    program = plan(fuse(function))
    arrays = arrays_for(function.param_types)
    same_bits(interpret(function, *arrays)[0], evaluate(program, *arrays)[0])


# --------------------------------------------------------------------------------------------------- kernels as values
def test_equal_work_gives_equal_kernels() -> None:
    def first(a: Value, b: Value, c: Value) -> Value:
        return b * c + 1.0

    def second(p: Value, q: Value) -> tuple[Value, Value]:
        r = p * q + 1.0
        return p, r

    assert kernels(first, F(6), F(2, 3), F(2, 3)) == kernels(second, F(2, 3), F(2, 3))
    assert kernels(lambda x: x + 0.0, F(3)) != kernels(lambda x: x + nd.constant_of(-0.0, f32), F(3))
    assert kernels(lambda x: x + float("nan"), F(3)) == kernels(lambda x: x + (float("inf") - float("inf")), F(3))
    assert hash(kernels(softmax, F(4, 8))[0]) == hash(kernels(softmax, F(4, 8))[0])


def test_merging_never_makes_a_cycle() -> None:
    def fn(x: Value, w: Value) -> tuple[Value, ...]:
        a = x * 2.0
        b = nd.matmul(a, w)  # between the two, another kernel
        c = a + nd.matmul(ops.tanh(b), w)
        return a, b, c, b + c

    check(function_of(fn, F(4, 4), F(4, 4)), *arrays_for((F(4, 4), F(4, 4))))


def test_fusion_across_row_and_column_reductions() -> None:
    def fn(x: Value) -> tuple[Value, ...]:
        r, c = nd.sum(x, 1, True), nd.sum(x, 0, True)
        return x / r + c, r, nd.sum(x / r), nd.max(x - c), nd.sum(x * r, 0)

    check(function_of(fn, F(7, 9)), *arrays_for((F(7, 9),)))
    check(function_of(fn, F(B, T)), *arrays_for((F(B, T),)))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (1, 1, 1), (1, 7, 1)])
@pytest.mark.parametrize("dtype", [f32, bf16, f64])
def test_small_and_empty_shapes(shape: tuple[int, ...], dtype: DType) -> None:
    def fn(x: Value) -> tuple[Value, ...]:
        y = ops.tanh(x) - nd.sum(x)
        flat = nd.reshape(y, (y.type.size,))
        padded = ops.pad(flat, nd.constant_of(2, dtype), low=(1,), high=(0,), interior=(1,))
        return y, flat, padded, nd.sum(padded), ops.concat(flat, padded, flat, axis=0), nd.prod(flat)

    function = function_of(fn, TensorType(dtype, shape))
    check(function, *arrays_for(function.param_types))


def test_indices_are_checked_fused_or_not() -> None:
    def fn(x: Value, i: Value) -> Value:
        return nd.sum(ops.exp(ops.gather(x, i, axes=(0,))), 0)

    function = function_of(fn, F(4, 3), TensorType(i64, (2,)))
    x = np.ones((4, 3), np.float32)
    check(function, x, np.array([0, 3]))
    for fusion in (True, False):
        with pytest.raises(IndexOutOfRange, match="index 4 is out of range for axis 0, which has 4 elements"):
            evaluate(lower(function, fusion), x, np.array([0, 4]))
        with pytest.raises(IndexOutOfRange, match="index -1"):
            evaluate(lower(function, fusion), x, np.array([-1, 0]))


def test_indices_known_to_be_in_range_are_not_checked() -> None:
    def fn(x: Value, y: Value) -> Value:
        return ops.gather(x, nd.iota(y.type.shape, 0), y, axes=(0, 1))

    (kernel,) = kernels(fn, F(B, 7), F(B, dtype=i64))
    checks = [i for i in kernel.stages[0].body if i.op == "check"]
    assert len(checks) == 1 and kernel.stages[0].body[-1].attr.at.strides == (7,)
    check(function_of(fn, F(B, 7), F(B, dtype=i64)), *arrays_for((F(B, 7), F(B, dtype=i64))))

    def beyond(x: Value) -> Value:
        return ops.gather(x, nd.iota((4,), 0) + 1, axes=(0,))

    for fusion in (True, False):
        with pytest.raises(IndexOutOfRange):
            evaluate(lower(function_of(beyond, F(4)), fusion), np.ones(4, np.float32))


def test_a_sliced_gather_checks_what_is_sliced_away() -> None:
    def fn(x: Value, i: Value) -> Value:
        return nd.slice_axis(ops.gather(x, i, axes=(0,)) * 2.0, 0, 0, 1)

    function = function_of(fn, F(4), TensorType(i64, (2,)))
    for fusion in (True, False):
        with pytest.raises(IndexOutOfRange):
            evaluate(lower(function, fusion), np.ones(4, np.float32), np.array([0, 9]))


def test_parts_put_together_have_loops_of_their_own() -> None:
    """The gradient of a projection that is cut into equal parts: no element asks which part it is in."""

    def parts(x: Value) -> Value:
        a, b, c = (nd.slice_axis(x, 1, 64 * n, 64 * (n + 1)) for n in range(3))
        return nd.sum(a * b + ops.tanh(c))

    function = grad_function(function_of(parts, F(5, 192)))
    check(function, *arrays_for((F(5, 192),)))
    guards = [
        (kernel.axes, g)
        for kernel in kernels(function)
        for stage in kernel.stages
        for i in stage.body
        if i.op == "load"
        for g in i.attr.guards
    ]
    assert guards and all(axes[-1] == 64 and g.position.strides[-1] == 0 and g.bound == 1 for axes, g in guards)


def test_a_slope_is_stored_where_its_value_is_computed() -> None:
    """An activation between two products: the forward kernel leaves value and slope, the backward one multiplies by the slope."""

    def network(x: Value, w: Value, v: Value) -> Value:
        return nd.sum(ops.matmul(ops.gelu_tanh(ops.matmul(x, w))[0], v))

    types = (F(6, 5), F(5, 7), F(7, 4))
    function = grad_function(function_of(network, *types), (0, 1, 2))
    check(function, *arrays_for(types))
    products = [k for k in kernels(function) if isinstance(k, ContractKernel)]
    forward = [k for k in products if any(i.op == "div" for i in k.body)]
    assert len(forward) == 1 and len(forward[0].stores) == 2


def test_what_is_cheap_to_make_of_stored_values_is_not_stored() -> None:
    """t and t + 1 are read by two kernels; t alone is stored."""

    def fn(x: Value) -> tuple[Value, Value]:
        t = ops.tanh(x)
        return nd.sum((t + 1.0) * x, 0), nd.sum((t + 1.0) * t, 1)

    made = kernels(fn, F(40, 50))
    written = [a for k in made for a in k.args if a.output and a.size == 2000]
    assert len(written) <= 1
