"""Hoisting: two Functions give the bits of one; what is hoisted, and what is not worth it."""

from __future__ import annotations

import numpy as np
import pytest

import duo_ir.ops as ops
from duo_backends.cpu.backend import CpuBackend
from duo_ir.core import function_of
from duo_ir.interpret import interpret
from duo_ir.opdef import Movement
from duo_ir.ops import broadcasting as nd
from duo_ir.ops.conv import conv
from duo_ir.pipeline import compile
from duo_ir.transforms.hoist import hoist
from duo_ir.transforms.simplify import simplify
from duo_ir.types import Dim, TensorType, bf16, f16, f32, f64, i32, i64
from duo_ir.verify import verify


def F(*shape):
    return TensorType(f32, shape)


def linear(x, w, b):
    """Weights as [out, in]."""
    y = nd.matmul(x, nd.swap_last(w))
    return y + nd.broadcast_to(b, y.type.shape)


def mlp(x, w1, b1, w2, b2):
    """Two layers: the second reads what the first made of its panels."""
    return linear(nd.maximum(linear(x, w1, b1), 0.5), w2, b2)


def summed(x, v, w):
    """A matrix that is computed from two."""
    return ops.matmul(x, nd.swap_last(v + w))


def per_channel(v, like):
    return nd.broadcast_to(nd.reshape(v, (1, v.type.size, 1, 1)), like.type.shape)


def convolved(x, w):
    """Channels first, weights as [out, in, rows, columns]."""
    out = conv(
        nd.transpose(x, (0, 2, 3, 1)), nd.transpose(w, (2, 3, 1, 0)), strides=(1, 1), padding=((1, 1),) * 2,
        x_dilation=(1, 1), w_dilation=(1, 1), groups=1,
    )  # fmt: skip
    return nd.transpose(out, (0, 3, 1, 2))


def normed(x, w, mean, var, gamma, beta):
    """A convolution and a batch norm with given statistics."""
    y = convolved(x, w)
    scale = ops.rsqrt(var + nd.constant_like(var, 1e-5)) * gamma
    return (y - per_channel(mean, y)) * per_channel(scale, y) + per_channel(beta, y)


def shared_batch(x, w):
    """One matrix, read transposed by every sample."""
    wt = nd.swap_last(w)
    return ops.matmul(x, nd.broadcast_to(wt, (x.type.shape[0], *wt.type.shape)))


def both_ways(x, w):
    """A transposition that a product reads and that is also added elementwise to the result."""
    wt = nd.swap_last(w)
    return ops.matmul(x, wt) + wt


def and_itself(x, w):
    """What is hoisted may be a result too."""
    wt = nd.swap_last(w)
    return ops.matmul(x, wt), wt


def after_a_norm(x, w, mean, var, gamma, beta, head):
    """A linear layer after it."""
    y = nd.mean(normed(x, w, mean, var, gamma, beta), (2, 3))
    return ops.matmul(y, nd.swap_last(head))


NORM = [F(1, 8, 5, 6), F(16, 8, 3, 3), *[F(16)] * 4]
CASES = {
    "linear": (linear, [F(3, 40), F(300, 40), F(300)], [1, 2], [(40, 300)]),
    "one row": (linear, [F(1, 40), F(257, 40), F(257)], [1, 2], [(40, 257)]),
    "many rows": (linear, [F(33, 40), F(256, 40), F(256)], [1, 2], [(40, 256)]),
    "panels, long k": (linear, [F(1, 1100), F(256, 1100), F(256)], [1, 2], [(4, 1100, 64)]),
    "panels, rows": (mlp, [F(5, 70), F(128, 70), F(128), F(64, 128), F(64)], [1, 2, 3, 4], [(4, 70, 32), (2, 128, 32)]),
    "panels, batch of one": (shared_batch, [F(1, 3, 520), F(96, 520)], [1], [(3, 520, 32)]),
    "panels, straight": (lambda x, w: ops.matmul(x, w), [F(3, 40), F(40, 320)], [1], [(5, 40, 64)]),
    "panels, a sum": (summed, [F(2, 40), F(64, 40), F(64, 40)], [1, 2], [(2, 40, 32)]),
    "one panel": (linear, [F(1, 700), F(32, 700), F(32)], [1, 2], None),
    "batch norm": (after_a_norm, [*NORM, F(256, 16)], [1, 2, 3, 4, 5, 6], [(4, 16, 64), (16,)]),
    "shared by a batch": (shared_batch, [F(4, 3, 20), F(256, 20)], [1], [(20, 256)]),
    "read twice": (both_ways, [F(256, 256), F(256, 256)], [1], [(256, 256)]),
    "a result": (and_itself, [F(3, 20), F(256, 20)], [1], [(4, 20, 64)]),
    "a result, many rows": (and_itself, [F(40, 20), F(256, 20)], [1], None),
    "one column": (linear, [F(5, 700), F(1, 700), F(1)], [1, 2], None),
    "narrow": (linear, [F(1, 700), F(100, 700), F(100)], [1, 2], None),
    "convolution": (normed, NORM, [1, 2, 3, 4, 5], None),
    "straight": (lambda x, w: ops.matmul(x, w), [F(3, 40), F(40, 300)], [1], None),
    "of the input": (linear, [F(30, 40), F(300, 40), F(300)], [2], None),
    "elementwise": (lambda x, w: x * ops.exp(nd.swap_last(w)), [F(40, 300), F(300, 40)], [1], None),
    "flat": (lambda x, w: ops.matmul(x, nd.reshape(w, (40, 300))), [F(3, 40), F(12000)], [1], None),
    "small": (linear, [F(3, 0), F(300, 0), F(300)], [1, 2], None),
}


def built(name):
    fn, types, constants, shapes = CASES[name]
    return simplify(function_of(fn, *types)), constants, shapes


def arguments(function, seed=0):
    rng = np.random.default_rng(seed)
    return [np.abs(rng.standard_normal(p.type.shape) * 9).astype(p.type.dtype.numpy) for p in function.params]


@pytest.mark.parametrize("name", CASES)
def test_what_is_hoisted(name):
    function, constants, shapes = built(name)
    found = hoist(function, constants)
    if shapes is None:
        assert found is None
        return
    assert found is not None
    assert sorted(t.shape for t in found.prologue.result_types) == sorted(shapes)
    assert set(found.constants) <= set(constants)
    sources = sum(found.main.params[i].type.nbytes for i in found.constants)
    assert all(t.nbytes <= sources for t in found.prologue.result_types)
    for f in found[:2]:
        verify(f)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3]])
def test_equal_bits(name):
    function, constants, _ = built(name)
    found = hoist(function, constants)
    given = arguments(function)
    want = interpret(function, *given)
    kept = interpret(found.prologue, *[given[i] for i in found.constants])
    compiled = run(found.main, *given, *run(found.prologue, *[given[i] for i in found.constants]))
    for got in (interpret(found.main, *given, *kept), compiled, run(function, *given)):
        assert all(np.array_equal(a.view("i4"), b.view("i4")) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("dtype", [f64, f16, bf16, i32], ids=str)
def test_panels_of_other_types(dtype):
    types = [TensorType(dtype, shape) for shape in [(3, 530), (64, 530), (64,)]]
    function = simplify(function_of(linear, *types))
    found = hoist(function, [1, 2])
    assert [t.shape for t in found.prologue.result_types] == [(2, 530, 32)]
    given = arguments(function)
    want = interpret(function, *given)
    got = run(found.main, *given, *run(found.prologue, *[given[i] for i in found.constants]))
    assert [a.tobytes() for a in want] == [a.tobytes() for a in got]


def run(function, *arrays):
    backend = CpuBackend()
    bound = compile(function, backend).bind({})
    out = bound.run([backend.from_numpy(a) for a in arrays])
    return [backend.to_numpy(b, t.dtype, t.static_shape({})) for b, t in zip(out, function.result_types)]


def test_the_product_itself_stays():
    function, constants, _ = built("linear")
    found = hoist(function, constants)
    moved = [op for op in found.main.ops if isinstance(op.definition.kind, Movement)]
    assert len(moved) == 1  # the bias, broadcast
    assert found.main.param_types[: len(function.params)] == function.param_types


def test_of_a_function_of_any_size_what_has_a_known_size_is_hoisted():
    function = simplify(function_of(linear, F(Dim.symbol("b"), 40), F(300, 40), F(300)))
    found = hoist(function, [1, 2])
    assert [str(t) for t in found.prologue.result_types] == ["f32[40,300]"]  # no panels: there may be many rows
    for rows in (2, 5):
        given = [*arguments(simplify(function_of(linear, F(rows, 40), F(300, 40), F(300))))]
        (want,) = interpret(function, *given)
        (got,) = interpret(found.main, *given, *interpret(found.prologue, *[given[i] for i in found.constants]))
        assert want.tobytes() == got.tobytes()


def test_an_index_that_may_be_wrong_is_looked_at_in_every_call():
    def f(x, w, i):
        return ops.matmul(x, ops.gather(nd.swap_last(w), i, axes=(1,)))

    function = simplify(function_of(f, F(3, 30), F(300, 50), TensorType(i64, (30,))))
    found = hoist(function, [1, 2])
    assert found is None or any(op.definition is ops.gather for op in found.main.ops)
