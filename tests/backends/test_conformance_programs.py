"""Whole programs on the CPU backend against the interpreter, to the bit: networks with their gradients, optimiser updates,
control flow, random numbers, symbolic sizes, other vector widths, and batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import conformance as c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_programs import programs

import duo.functional as F
from duo.functional import random as draws
from duo.optim import rules
from duo_ir import ops
from duo_ir.core import Builder, Function, Value, function_of
from duo_ir.errors import DeviceError, IndexOutOfRange
from duo_ir.interpret import interpret
from duo_ir.kernels.evaluate import evaluate
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import lower
from duo_ir.transforms.derivatives import grad_function
from duo_ir.types import Dim, DType, TensorType, bf16, f16, f32, f64, i64

FLOATS = (f32, f64, f16, bf16)


def numbers(*shapes: tuple[int, ...], dtype: DType = f32, seed: int = 0, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.asarray(scale * rng.normal(size=s)).astype(dtype.numpy) for s in shapes]


def labels(n: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, n)


def with_gradients(fn: Callable[..., Value], *arrays: np.ndarray) -> Function:
    """fn and its gradients for all float parameters."""
    return grad_function(function_of(fn, *c.types_of(arrays)), value=True)


def scalar(x: Value) -> Value:
    """A 0-d number that depends on every element of x, each differently."""
    n = math.prod(int(d) for d in x.type.shape)
    weight = nd.reshape(nd.cast_to(nd.iota((n,), 0), x.type.dtype), x.type.shape) * 0.01 + 0.5
    return nd.sum(x * weight)


# ------------------------------------------------------------------------------------------------------------ networks
def mlp(x: Value, w1: Value, b1: Value, w2: Value, b2: Value) -> Value:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def classifier(x: Value, target: Value, w1: Value, b1: Value, w2: Value, b2: Value) -> Value:
    return F.cross_entropy(F.linear(F.relu(F.linear(x, w1, b1)), w2, b2), target)


def block(x: Value, g: Value, b: Value, wq: Value, wk: Value, wv: Value, wo: Value) -> Value:
    """A pre-norm causal self-attention block: [batch, time, width] with 2 heads."""
    n, t, d = x.type.shape
    h = F.layer_norm(x, (d,), g, b)
    q, k, v = (F.permute(F.reshape(F.linear(h, w), (n, t, 2, d // 2)), (0, 2, 1, 3)) for w in (wq, wk, wv))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + F.linear(F.reshape(F.permute(out, (0, 2, 1, 3)), (n, t, d)), wo)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (3, 5, 7, 4), (17, 33, 65, 10), (64, 20, 48, 16)], ids=str)
def test_classifier(sizes: tuple[int, ...], dtype: DType) -> None:
    n, d, h, k = sizes
    x, *weights = numbers((n, d), (h, d), (h,), (k, h), (k,), dtype=dtype)
    arrays = [x, labels(n, k), *weights]
    c.check(with_gradients(classifier, *arrays), arrays)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_attention_block(dtype: DType) -> None:
    arrays = numbers((2, 9, 12), (12,), (12,), *[(12, 12)] * 4, dtype=dtype)
    c.check(with_gradients(lambda *a: scalar(block(*a)), *arrays), arrays)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 33), (40, 130), (2, 1029), (3, 4100)], ids=str)
def test_rows(shape: tuple[int, ...], dtype: DType) -> None:
    """softmax, log_softmax, layer norm, RMS norm, variance, logsumexp and their gradients."""
    x, g, b = numbers(shape, shape[-1:], shape[-1:], dtype=dtype)

    def everything(x: Value, g: Value, b: Value) -> Value:
        d = x.type.shape[-1:]
        made = [
            F.softmax(x, -1),
            F.log_softmax(x, 0),
            F.layer_norm(x, d, g, b),
            F.rms_norm(x, d, g),
            F.logsumexp(x, -1),
        ]
        made += [F.var(x, 0, correction=0), F.softmax(x, 0), F.std(x, -1, correction=0, keepdim=True)]
        total = scalar(made[0])
        for v in made[1:]:
            total = total + scalar(v)
        return total

    rng = np.random.default_rng(5)
    runs = [[x, g, b], [c.salted(x, rng, 0.05), g, b]]
    c.check(with_gradients(everything, x, g, b), *runs)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_reductions_along_every_axis(dtype: DType) -> None:
    (x,) = numbers((3, 37, 21), dtype=dtype)

    def everything(x: Value) -> list[Value]:
        axes = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
        made = [getattr(nd, name)(x * 2.0 - 0.5, a) for a in axes for name in ("sum", "prod", "max", "min")]
        made += [op(x, axes=(a,)) for a in (0, 1, 2) for op in (ops.argmax, ops.argmin)]
        return [*made, nd.sum(ops.transpose(x, permutation=(2, 0, 1)), (0,)), nd.sum(ops.flip(x, axes=(0, 2)), (1,))]

    rng = np.random.default_rng(6)
    c.check(everything, [x], [c.salted(x, rng, 0.02)], [np.zeros_like(x)], [-np.zeros_like(x)])


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1023, 1024, 1025, 2048, 5000, 16385, 70001])
def test_long_reductions(n: int) -> None:
    x, y = numbers((n,), (n,))
    wide = numbers((2, n), (n, 3), seed=1)

    def everything(x: Value, y: Value, a: Value, b: Value) -> list[Value]:
        column = nd.reshape(y, (n, 1))
        made = [nd.sum(x), nd.sum(ops.exp(x) * y), nd.matmul(nd.reshape(x, (1, n)), column), nd.matmul(a, column)]
        return [
            *made,
            nd.max(x),
            nd.sum(b, (0,)),
            nd.sum(a, (0,)),
            nd.sum(a, (1,)),
            nd.sum(a),
            nd.prod(x),
            ops.argmax(x, axes=(0,)),
        ]

    c.check(everything, [x, y, *wide])


@pytest.mark.parametrize("k", [1, 2, 511, 512, 513, 1024, 4097, 16384, 16385, 20481])
def test_long_contractions(k: int) -> None:
    a, b, bias = numbers((3, k), (k, 5), (5,))
    c.check(lambda a, b, bias: (nd.matmul(a, b), F.relu(nd.matmul(a, b) + bias), nd.matmul(nd.swap_last(b), nd.swap_last(a))), [a, b, bias])  # fmt: skip


@pytest.mark.parametrize("dtype", [*FLOATS, i64], ids=lambda d: d.name)
@pytest.mark.parametrize("m,n", [(1, 2), (2, 16), (13, 31), (14, 32), (15, 33), (29, 97), (57, 64)])
def test_contraction_tiles(m: int, n: int, dtype: DType) -> None:
    """Operands as they are, transposed, sliced and flipped, with special values, and with an epilogue."""
    k = 19
    a, b, bias = numbers((m, k), (k, n), (n,), dtype=dtype, scale=3)
    rng = np.random.default_rng(8)

    def everything(a: Value, b: Value, bias: Value) -> list[Value]:
        plain = nd.matmul(a, b)
        left = nd.slice_axis(ops.flip(a, axes=(1,)), 1, 1, k, 2)
        right = nd.slice_axis(b, 0, 0, k - 2, 2)
        turned = ops.transpose(nd.matmul(nd.swap_last(b), nd.swap_last(a)), permutation=(1, 0))
        biased = nd.maximum(plain + bias, 0)
        return [
            plain,
            nd.matmul(left, right),
            turned,
            biased,
            nd.sum(biased, (0,)),
            nd.matmul(a + 1, b * 2) * a.type.shape[0],
        ]

    c.check(everything, [a, b, bias], [c.salted(a, rng, 0.03), c.salted(b, rng, 0.03), bias])


# ------------------------------------------------------------------------------------------- updates, indexing, joining
@pytest.mark.parametrize("rule", [rules.SGD, rules.ADAM, rules.RMSPROP, rules.TF_MOMENTUM, rules.TF_ADAM, rules.TF_RMSPROP], ids=lambda r: r.name)  # fmt: skip
def test_optimisers(rule: rules.Rule) -> None:
    flags = {"sgd": {"momentum", "nesterov", "weight_decay"}, "adam": {"decoupled", "weight_decay", "amsgrad"}}
    options = frozenset(flags.get(rule.name, {"centered", "momentum", "nesterov"}))
    shapes = [(33,), (5, 7), (), (1100,)]
    slots = len(rule.slots(options))
    arrays = [np.abs(a) for s in shapes for a in numbers(*[s] * (2 + slots))]
    hyper = [np.asarray(v) for v in (1e-3, 0.9, 0.999, 1e-8, 0.01)[: len(rule.hyper)]]
    width = 2 + slots

    def update(step: Value, *given: Value) -> list[Value]:
        h, rest = given[: len(hyper)], given[len(hyper) :]
        rows = [rest[k * width : (k + 1) * width] for k in range(len(shapes))]
        return [v for row in rules.apply_rule(rule, options, step, h, rows) for v in row]

    steps = [[np.asarray(t, np.int64), *hyper, *arrays] for t in (1, 2, 1000)]
    c.check(update, *steps)


def test_training_step() -> None:
    """Forward, backward and Adam in one program."""
    x, *weights = numbers((21, 13), (34, 13), (34,), (6, 34), (6,))
    target = labels(21, 6)
    moments = [np.abs(a) * 0.01 for w in weights for a in (w, w)]

    def step(x: Value, target: Value, *given: Value) -> list[Value]:
        w, slots = given[:4], given[4:]
        types = [v.type for v in (x, target, *w)]
        from_loss = grad_function(function_of(classifier, *types), value=True)
        loss, _, *gradients = c.inline(from_loss, [x, target, *w])
        hyper = [nd.constant_of(v, f64) for v in (1e-3, 0.9, 0.999, 1e-8, 0.0)]
        rows = [[p, g, *slots[2 * k : 2 * k + 2]] for k, (p, g) in enumerate(zip(w, gradients))]
        new = rules.apply_rule(rules.ADAM, frozenset(), nd.constant_of(3, i64), hyper, rows)
        return [loss, *[v for row in new for v in row]]

    c.check(step, [x, target, *weights, *moments])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_embedding(dtype: DType) -> None:
    """The gradient is a scatter in which indices repeat."""
    table, mix = numbers((11, 9), (9, 5), dtype=dtype)
    index = labels(3 * 14, 11).reshape(3, 14)
    c.check(
        with_gradients(lambda i, t, w: scalar(nd.matmul(F.embedding(i, t), w)), index, table, mix), [index, table, mix]
    )
    c.check(with_gradients(lambda i, t: scalar(F.embedding(i, t, padding_idx=2)), index, table), [index, table])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_joins_and_cuts(dtype: DType) -> None:
    x, y = numbers((6, 10), (6, 3), dtype=dtype)

    def everything(x: Value, y: Value) -> Value:
        joined = F.cat([x, y, x * 2.0], 1)
        a, b, rest = F.split(joined, [4, 9, 10], 1)
        padded = F.pad(b, (1, 2, 0, 3), value=0.5)
        strided = nd.slice_axis(nd.slice_axis(padded, 1, 1, 12, 3), 0, 0, 9, 2)
        made = [
            F.softmax(a, -1),
            strided,
            F.cumsum(rest, 1),
            F.roll(joined, 5, 1),
            F.flip(x, 0),
            F.tril(x),
            F.stack([y, y * y], 1),
        ]
        made += [
            ops.pad(y, nd.sum(y), low=(1, 0), high=(0, 2), interior=(1, 3)),
            F.cumsum(x, 0),
            F.diagonal(x, 2),
            F.tile(y, (2, 3)),
        ]
        total = scalar(made[0])
        for v in made[1:]:
            total = total + scalar(v)
        return total

    c.check(with_gradients(everything, x, y), [x, y])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_activations(dtype: DType) -> None:
    rng = np.random.default_rng(2)
    x = numbers((7, 31), dtype=dtype, scale=3)[0]
    names = ["relu", "relu6", "gelu", "silu", "mish", "softplus", "elu", "selu", "celu", "hardswish", "hardsigmoid", "leaky_relu", "logsigmoid", "tanhshrink", "softsign", "softshrink"]  # fmt: skip

    def everything(x: Value) -> Value:
        total = scalar(F.gelu(x, approximate="tanh"))
        for name in names:
            total = total + scalar(getattr(F, name)(x))
        return total

    c.check(with_gradients(everything, x), [x], [c.salted(x, rng, 0.1)])


# ---------------------------------------------------------------------------------------------------------- random, loops
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_random(dtype: DType) -> None:
    states = [[np.array([seed, counter], np.int64), *numbers((5, 13), dtype=dtype)] for seed, counter in ((0, 0), (-1, 2**62), (77, 2**32 - 2))]  # fmt: skip

    def everything(state: Value, x: Value) -> list[Value]:
        made = []
        for body, attrs in ((draws._uniform, ()), (draws._normal, ()), (draws._exponential, ())):
            sample, state = body(state, (3, 7), dtype, *attrs)
            made.append(sample)
        for shape in ((), (1,), (6,), (0,), (259,)):
            sample, state = draws._uniform(state, shape, dtype)
            made.append(sample)
        dropped, state = draws.dropout_with(x, state, 0.3)
        whole, state = draws._randint(state, -5, 9, (17,), i64)
        chosen, state = draws._categorical(state, x)
        return [*made, dropped, whole, chosen, state]

    c.check(everything, *states)


def test_control_flow() -> None:
    """A conditional inside a loop, its gradient, and a loop whose length depends on the data."""
    x, y = numbers((3, 5), (3, 5))
    flag = TensorType(c.dtype_of(np.dtype(bool)))

    def inner(x: Value, y: Value) -> tuple[Value, Value]:
        then = function_of(lambda a, b: (ops.tanh(a) * b, a), x.type, y.type)
        orelse = function_of(lambda a, b: (a - b, ops.exp(b)), x.type, y.type)
        return ops.cond(nd.gt(nd.sum(x), 0.0), x, y, then=then, orelse=orelse)

    def looped(n: Value, x: Value, y: Value) -> tuple[Value, ...]:
        types = [n.type, n.type, x.type, y.type]
        test = function_of(lambda i, n, x, y: nd.lt(i, n), *types)
        body = function_of(lambda i, n, x, y: (i + 1, n, *inner(x, y)), *types)
        return ops.while_(nd.constant_of(0, i64), n, x, y, test=test, body=body, carried=4)[2:]

    c.check(looped, *[[np.asarray(n, np.int64), x, y] for n in (0, 1, 2, 7)])

    def halved(x: Value, y: Value) -> tuple[Value, ...]:
        test = function_of(lambda x, k, y: nd.gt(nd.max(ops.abs(x)), 0.01), x.type, TensorType(i64), y.type)
        body = function_of(lambda x, k, y: (x * 0.5 + y * 0.001, k + 1), x.type, TensorType(i64), y.type)
        return ops.while_(x, nd.constant_of(0, i64), y, test=test, body=body, carried=2)

    c.check(halved, [x, y], [x * 0, y], [x * 1e30, y])

    then = function_of(lambda a, b: nd.matmul(a, nd.swap_last(b)), *c.types_of([x, y]))
    orelse = function_of(lambda a, b: nd.matmul(a * b, nd.swap_last(a)), *c.types_of([x, y]))
    chosen = function_of(lambda p, a, b: scalar(ops.cond(p, a, b, then=then, orelse=orelse)), flag, *c.types_of([x, y]))
    c.check(grad_function(chosen, value=True), [np.asarray(True), x, y], [np.asarray(False), x, y])


# -------------------------------------------------------------------------------------------------------- random programs
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@given(data=st.data())
@settings(max_examples=25)
def test_random_programs(dtype: DType, data: st.DataObject) -> None:
    function, arrays = data.draw(programs(dtype))
    want = interpret(function, *arrays)
    for fusion in (True, False):
        for got, expected in zip(evaluate(lower(function, fusion), *arrays), want, strict=True):
            assert c.same(got, expected), (
                f"kernels by NumPy, fusion {fusion}: {c.difference(got, expected)}\n{function}"
            )
    c.check(function, arrays)


@given(data=st.data())
@settings(max_examples=25)
def test_gradients_of_random_programs(data: st.DataObject) -> None:
    function, arrays = data.draw(programs(f32, rough=False))
    if not function.result_types[0].dtype.is_float:
        return
    builder = Builder("total")
    with builder:
        params = [builder.parameter(t) for t in function.param_types]
        total = nd.sum(builder.inline(function, params)[0])
    c.check(grad_function(builder.build([total]), value=True), arrays)


# ------------------------------------------------------------------------------------------------------- symbolic sizes
@pytest.mark.parametrize("dtype", [f32, bf16], ids=lambda d: d.name)
def test_symbolic_batch(dtype: DType) -> None:
    """Compiled once, bound to several sizes: equal to the interpreter and to the program compiled for that very size."""
    n = Dim.symbol("n")
    d, h, k = 13, 37, 6
    types = [TensorType(dtype, s) for s in ((n, d), (h, d), (h,), (k, h), (k,))]
    types.insert(1, TensorType(i64, (n,)))
    symbolic = grad_function(function_of(classifier, *types), value=True)
    _, *weights = numbers((1, d), (h, d), (h,), (k, h), (k,), dtype=dtype)
    runs = [[numbers((m, d), dtype=dtype, seed=m)[0], labels(m, k, m), *weights] for m in (2, 3, 16, 33, 130)]
    c.check(symbolic, *runs)
    fixed = with_gradients(classifier, *runs[2])
    for got, want in zip(interpret(symbolic, *runs[2]), interpret(fixed, *runs[2])):
        assert c.same(got, want)


def test_a_matrix_read_backwards_in_the_other_shape() -> None:
    """Rows of one length walked from the end as rows of another, where the lengths are not known: loops never run a negative number of times."""
    b, t = Dim.symbol("b"), Dim.symbol("t")

    def turned(x: Value, y: Value) -> Value:
        lower = nd.mul(ops.tanh(x) + y, nd.cast_to(ops.le(nd.iota((b, t), 1), nd.iota((b, t), 0)), f32))
        back = nd.reshape(ops.flip(nd.reshape(lower, (b * t,)), axes=(0,)), (t, b))
        return ops.concat(back, ops.slice(back, start=(0, b - 1), stop=(t, b), step=(1, 1)), axis=1)

    symbolic = function_of(turned, TensorType(f32, (b, t)), TensorType(f32))
    runs = [[*numbers((n, m), (), seed=n)] for n, m in ((3, 5), (5, 3), (2, 2), (17, 33))]
    c.check(symbolic, *runs)


def test_symbolic_everything() -> None:
    """Two named sizes through reductions of both axes, joins, reshapes and gathers."""
    b, t = Dim.symbol("b"), Dim.symbol("t")

    def everything(x: Value, y: Value) -> list[Value]:
        flat = nd.reshape(x, (b * t,))
        both = ops.concat(x, y, axis=1)
        rows = F.softmax(both, -1)
        made = [
            nd.sum(x, (0,)),
            nd.sum(x, (1,)),
            nd.sum(flat),
            F.cumsum(x, 1),
            rows,
            nd.mean(x, (0, 1)),
            ops.flip(both, axes=(1,)),
        ]
        made += [
            nd.matmul(x, nd.swap_last(y)),
            ops.argmax(flat, axes=(0,)),
            ops.gather(flat, nd.iota((t,), 0), axes=(0,)),
        ]
        return [*made, ops.pad(x, nd.constant_of(1, f32), low=(1, 0), high=(0, 2), interior=(0, 1)), nd.max(both, (0,))]

    function = function_of(everything, TensorType(f32, (b, t)), TensorType(f32, (b, t)))
    runs = [numbers((m, n), (m, n), seed=m) for m, n in ((2, 2), (3, 17), (16, 5), (33, 65), (2, 1030), (1100, 3))]
    c.check(function, *runs)


# -------------------------------------------------------------------------------------------- what must not change a bit
@pytest.mark.parametrize("dtype", [f32, bf16], ids=lambda d: d.name)
def test_batch_invariance(dtype: DType) -> None:
    """Row i of f(x[:k]) is row i of f(x), for the whole program compiled for k rows and for any number of rows."""
    d, h, classes, most = 24, 49, 7, 65
    weights = numbers((h, d), (h,), (classes, h), (classes,), (d,), (d,), dtype=dtype)

    def network(x: Value, w1: Value, b1: Value, w2: Value, b2: Value, g: Value, b: Value) -> tuple[Value, Value]:
        return mlp(x, w1, b1, w2, b2), F.softmax(F.layer_norm(x, (d,), g, b), -1)

    (x,) = numbers((most, d), dtype=dtype, seed=3)
    want = interpret(function_of(network, *c.types_of([x, *weights])), x, *weights)
    n = Dim.symbol("n")
    symbolic = function_of(network, TensorType(dtype, (n, d)), *c.types_of(weights))
    runs = [[x[:k], *weights] for k in range(2, most + 1)]
    for how, k, results in c.outcomes(symbolic, *runs, fusions=(True,)):
        for got, whole in zip(results, want):
            assert c.same(got, whole[: k + 2]), f"{k + 2} rows, {how}"
    for k in (1, 2, 13, 14, 15, 33):
        for how, _, results in c.outcomes(function_of(network, *c.types_of([x[:k], *weights])), [x[:k], *weights]):
            for got, whole in zip(results, want):
                assert c.same(got, whole[:k]), f"{k} rows, {how}"


@pytest.mark.parametrize("cpu", ["x86-64-v3", "native/16", "native/32", "x86-64-v2"])
def test_other_machines(cpu: str) -> None:
    """Narrower vectors and older instruction sets give the same bits."""
    try:
        c.backend(cpu).target  # noqa: B018
    except DeviceError as error:
        pytest.skip(str(error))
    x, *weights = numbers((17, 33), (65, 33), (65,), (10, 65), (10,))
    arrays = [x, labels(17, 10), *weights]
    c.check(with_gradients(classifier, *arrays), arrays, cpu=cpu)
    for dtype in (f32, f64, f16, bf16):
        rng = np.random.default_rng(4)
        (values,) = numbers((3, 1030), dtype=dtype, scale=4)

        def functions(x: Value) -> list[Value]:
            names = ["exp", "log", "tanh", "erf", "sin", "sqrt", "expm1", "atan", "round", "sigmoid", "normal_quantile"]
            made = [getattr(ops, name)(x) for name in names] + [
                ops.cast(x, dtype=d) for d in (i64, f32, f16, bf16, f64)
            ]
            made += [
                F.softmax(x, -1),
                nd.sum(x, (0,)),
                nd.sum(x),
                nd.max(x, (1,)),
                F.cumsum(x, 1),
                ops.pow(ops.abs(x), x),
            ]
            return [*made, ops.floor_divide(x, ops.flip(x, axes=(1,))), nd.matmul(x, nd.swap_last(x))]

        c.check(functions, [values], [c.salted(values, rng)], cpu=cpu, threads=(1,))


# ------------------------------------------------------------------------------------------------------------ bad indices
@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**63)])
@pytest.mark.parametrize("name", ["gather", "scatter", "embedding", "fused", "nested"])
def test_index_out_of_range(name: str, bad: int) -> None:
    """The error names the op, the index and the bound, whatever the fusion and the number of threads; a later call is good."""
    x, updates = numbers((5, 40), (70, 40))
    index = labels(70, 5)
    wrong = index.copy()
    wrong[[13, 50]] = bad

    def program(x: Value, u: Value, i: Value) -> Value:
        if name == "scatter":
            return ops.scatter(x, u, i, axes=(0,), mode="add")
        if name == "embedding":
            return F.embedding(i, x) + u
        if name == "fused":
            return F.softmax(ops.exp(ops.gather(x, i, axes=(0,))) * u, -1)
        if name == "nested":
            then = function_of(lambda x, u, i: ops.gather(x, i, axes=(0,)), x.type, u.type, i.type)
            orelse = function_of(lambda x, u, i: u, x.type, u.type, i.type)
            return ops.cond(nd.gt(nd.sum(ops.abs(u)), 0.0), x, u, i, then=then, orelse=orelse)
        return ops.gather(x, i, axes=(0,))

    function = function_of(program, *c.types_of([x, updates, index]))
    op = "scatter" if name == "scatter" else "gather"
    with pytest.raises(IndexOutOfRange, match=rf"{op}.*{bad}"):
        interpret(function, x, updates, wrong)
    for fusion in (True, False):
        for threads in (1, 2):
            with pytest.raises(IndexOutOfRange, match=rf"{op}.*{bad}\b.*\b5\b"):
                list(c.outcomes(function, [x, updates, wrong], fusions=(fusion,), threads=(threads,)))
    c.check(function, [x, updates, index])


def test_index_into_nothing() -> None:
    x, index = np.zeros((0, 3), np.float32), np.zeros(2, np.int64)
    function = function_of(lambda x, i: ops.gather(x, i, axes=(0,)), *c.types_of([x, index]))
    with pytest.raises(IndexOutOfRange, match="gather"):
        list(c.outcomes(function, [x, index]))
