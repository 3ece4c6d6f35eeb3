"""duo.vmap: bit for bit the loop over the samples, in every mode; nesting, gradients, random numbers, errors."""

from __future__ import annotations

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn
from duo.func import functional_call, grad, stack_module_state, vmap
from duo_ir.errors import ArgumentError, DTypeError, ShapeError, TraceError


def equal(a, b) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and a.dtype is b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.fixture
def x():
    duo.manual_seed(0)
    return duo.randn(5, 4, 3)


def body(x):
    return (x.softmax(-1) @ x.T).tanh().sum(0)


FUNCTIONS = {
    "body": body,
    "index": lambda x: x[1:, ::2] + x[0, 1],
    "gather": lambda x: x[x.argmax(0), duo.arange(3)],
    "setitem": lambda x: duo.functional.index_add(x, 0, duo.tensor([0, 2]), x[:2]),
    "cat": lambda x: duo.functional.cat([x, duo.ones(2, 3)], 0).flip(0),
    "norm": lambda x: nn.functional.layer_norm(x, (3,)),
    "cumsum": lambda x: x.cumsum(1),
    "matvec": lambda x: x @ x[0],
    "dot": lambda x: x[0] @ x[1],
    "var": lambda x: x.var(0),
    "outside": lambda x: x * WEIGHT + 1,
    "constant": lambda x: WEIGHT.exp(),
    "conv": lambda x: nn.functional.conv1d(x[None], x[None, :, :2])[0],
    "cond": lambda x: duo.cond(x.sum() > 0, lambda x: x * 2, lambda x: x.exp(), (x,)),
    "while": lambda x: duo.while_loop(lambda v: v.abs().sum() > 1, lambda v: (v * 0.5,), (x,))[0],
}
WEIGHT = duo.tensor([1.5, -2.0, 0.25])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_the_loop(name, x):
    f = FUNCTIONS[name]
    want = duo.functional.stack([f(r) for r in x])
    assert equal(duo.vmap(f)(x), want)
    assert equal(duo.vmap(f, chunk_size=2)(x), want)
    assert equal(duo.vmap(f)(x[:1]), want[:1])
    assert duo.vmap(f)(x[:0]).shape == (0, *want.shape[1:])
    assert equal(duo.vmap(f, in_dims=-1, out_dims=-1)(x.movedim(0, 2)), want.movedim(0, -1))


def test_structures(x):
    y = duo.randn(3, 5)

    def f(pair, scale):
        a, b = pair["a"], pair["b"][0]
        return {"sum": (a + b).sum() * scale, "rest": [a, (b,)]}

    got = vmap(f, in_dims=({"a": 0, "b": (1,)}, None), out_dims={"sum": 0, "rest": [1, (0,)]})({"a": x, "b": (y,)}, 2.0)
    rows = [f({"a": x[i], "b": (y[:, i],)}, 2.0) for i in range(5)]
    assert equal(got["sum"], duo.functional.stack([r["sum"] for r in rows]))
    assert equal(got["rest"][0], x.movedim(0, 1)) and equal(got["rest"][1][0], y.T)
    both = vmap(lambda a, b: (a * b, a.sum()), in_dims=(0, None), out_dims=(2, 0))(x, WEIGHT)
    assert both[0].shape == (4, 3, 5) and both[1].shape == (5,)
    assert equal(vmap(lambda a, *, k: a + k)(x[:, 0], k=WEIGHT), x[:, 0] + WEIGHT)
    shared = vmap(lambda a: WEIGHT * 2, out_dims=None)(x)
    assert shared.shape == (3,)


def test_nested(x):
    f = lambda a, b: (a * b).sum()  # noqa: E731
    table = vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(x[:, 0], x[:, 1])
    for i in range(5):
        for j in range(5):
            assert equal(table[i, j], f(x[i, 0], x[j, 1]))
    inside = vmap(lambda a: vmap(lambda b: (a @ b) * a[0, 0] + WEIGHT[0])(x[:, 0]))(x)
    assert equal(inside[3, 2], (x[3] @ x[2, 0]) * x[3, 0, 0] + WEIGHT[0])


def test_gradients_flow_through():
    x, w = duo.randn(5, 3), duo.randn(3, 3, requires_grad=True)
    duo.vmap(lambda r: (r @ w).tanh())(x).sum().backward()
    got, w.grad = w.grad, None
    (x @ w).tanh().sum().backward()
    assert got.allclose(w.grad, rtol=1e-5)


def mlp():
    duo.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))


def test_per_sample_gradients(x):
    model = mlp()
    x, target = x[:, 0], duo.tensor([0, 1, 1, 0, 1])

    def loss(params, x, t):
        return nn.functional.cross_entropy(functional_call(model, params, (x,)), t)

    params = dict(model.named_parameters())
    each = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, target)
    for i in range(5):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i]), target[i]).backward()
        for name, p in params.items():
            assert equal(each[name][i], p.grad), name
    assert all(p is params[n] for n, p in model.named_parameters())


def test_ensemble(x):
    models = [nn.Linear(3, 2) for _ in range(4)]
    params, buffers = stack_module_state(models)
    out = vmap(lambda p, b, x: functional_call(models[0], (p, b), x), in_dims=(0, 0, None))(params, buffers, x[0])
    for i, m in enumerate(models):
        assert equal(out[i], m(x[0]))
    out.sum().backward()
    models[2](x[0]).sum().backward()
    assert equal(params["weight"].grad[2], models[2].weight.grad)


def test_under_compile_and_flushed_everywhere(x):
    want = duo.vmap(body)(x)
    compiled = duo.compile(lambda x: duo.vmap(body)(x) + 0)
    for _ in range(3):
        assert equal(compiled(x), want)
    again = duo.randn(7, 4, 3)
    assert equal(compiled(again), duo.vmap(body)(again))
    duo.debug.configure(sync=True)
    try:
        assert equal(duo.vmap(body)(x), want)
    finally:
        duo.debug.configure(sync=False)


def test_training_step_under_compile(x):
    results = []
    for wrap in (lambda f: f, duo.compile):
        model = mlp()
        optimizer = duo.optim.SGD(model.parameters(), lr=0.1)

        def step(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = vmap(lambda r: model(r).square().sum())(x).mean()
            loss.backward()
            optimizer.step()
            return loss

        run = wrap(step)
        results.append([run(x[:, 0]).item() for _ in range(4)])
    assert results[0] == results[1] and results[0][3] < results[0][0]


def test_graph_mode(x):
    graph = tf.Graph()
    with graph.as_default():
        p = tf.placeholder(tf.float32, [None, 4, 3])
        out = duo.vmap(body)(p)
        slope = tf.gradients(out, p)[0]
        with tf.Session() as session:
            for n in (5, 1, 3):
                got = session.run([out, slope], {p: x[:n].numpy()})
                assert got[0].tobytes() == duo.vmap(body)(x[:n]).numpy().tobytes()
                assert got[1].shape == (n, 4, 3)


def test_module_on_a_placeholder(x):
    model = mlp()
    with tf.Graph().as_default():
        p = tf.placeholder(tf.float32, [None, 3])
        scale = tf.placeholder(tf.float32, [])
        out = vmap(lambda r: model(r) * (scale + model[0].bias.detach()[0]))(p)
        with tf.Session() as session:
            got = session.run(out, {p: x[:, 0].numpy(), scale: 0.5})
    want = vmap(lambda r: model(r) * (0.5 + model[0].bias.detach()[0]))(x[:, 0])
    assert got.tobytes() == want.detach().numpy().tobytes()


# ------------------------------------------------------------------------------------------------------------- random
def noisy(r):
    return nn.functional.dropout(r, 0.3) + duo.rand(3) + duo.randint(0, 9, (3,))


def test_different_draws_what_the_loop_draws(x):
    duo.manual_seed(3)
    want, after = duo.functional.stack([noisy(r) for r in x[:, 0]]), duo.rand(4)
    for options in ({}, {"chunk_size": 2}):
        duo.manual_seed(3)
        assert equal(vmap(noisy, randomness="different", **options)(x[:, 0]), want)
        assert equal(duo.rand(4), after)
    nested = lambda m: vmap(noisy, randomness="different")(m)  # noqa: E731
    duo.manual_seed(3)
    rows = duo.functional.stack([nested(m) for m in x])
    duo.manual_seed(3)
    assert equal(vmap(nested, randomness="different")(x), rows)


def test_same_draws_once(x):
    ones = duo.ones(5, 3)
    duo.manual_seed(3)
    got, after = vmap(noisy, randomness="same")(ones), duo.rand(2)
    duo.manual_seed(3)
    want = noisy(ones[0])
    assert all(equal(row, want) for row in got) and equal(after, duo.rand(2))


def test_generator_of_ones_own():
    one, two = duo.Generator().manual_seed(1), duo.Generator().manual_seed(1)
    got = vmap(lambda x: x + duo.rand(2, generator=one), randomness="different")(duo.zeros(3))
    assert equal(got, duo.functional.stack([duo.rand(2, generator=two) for _ in range(3)]))
    assert equal(one.get_state(), two.get_state())


def test_random_compiled():
    f = duo.compile(lambda x: vmap(noisy, randomness="different")(x))
    for wanted in (vmap(noisy, randomness="different"), f, f):
        duo.manual_seed(9)
        got = [wanted(duo.ones(4, 3)) for _ in range(3)]
        first = got if wanted is not f else first  # noqa: F821
        assert all(equal(a, b) for a, b in zip(first, got))


# ------------------------------------------------------------------------------------------------------------- errors
def test_errors(x):
    with pytest.raises(ShapeError, match=r"different numbers of samples: 5 \(dim 0 of f32\[5,4,3\]\), 2"):
        vmap(lambda a, b: a)(x, x[:2])
    with pytest.raises(ShapeError, match="dim 3 to an argument"):
        vmap(body, in_dims=3)(x)
    with pytest.raises(DTypeError, match="give it None"):
        vmap(lambda a, b: a)(x, 2.0)
    with pytest.raises(ArgumentError, match="at least one tensor"):
        vmap(body, in_dims=None)(x)
    with pytest.raises(ArgumentError, match="structure"):
        vmap(body, in_dims=(0, 0))(x)
    with pytest.raises(ArgumentError, match="structure"):
        vmap(body, in_dims=((0, 0),))(x)
    with pytest.raises(ArgumentError, match="in_dims is an int"):
        vmap(body, in_dims="0")(x)
    with pytest.raises(ArgumentError, match="structure"):
        vmap(lambda a: (a, a), out_dims=(0, 0, 0))(x)
    with pytest.raises(ArgumentError, match="differs between samples"):
        vmap(body, out_dims=None)(x)
    with pytest.raises(ShapeError, match="out_dims gives dim 2"):
        vmap(body, out_dims=2)(x)
    with pytest.raises(ArgumentError, match="returns tensors"):
        vmap(lambda a: 1.0)(x)
    with pytest.raises(ArgumentError, match="randomness is"):
        vmap(body, randomness="some")
    with pytest.raises(ArgumentError, match="chunk_size"):
        vmap(body, chunk_size=0)
    with pytest.raises(TraceError, match=r"duo\.where or duo\.cond"):
        vmap(lambda a: a if a.sum() > 0 else -a)(x)
    with pytest.raises(TraceError, match="not known inside vmap"):
        vmap(lambda a: a * a.sum().item())(x)
    with pytest.raises(TraceError, match="randomness='different'"):
        vmap(lambda a: a + duo.rand(3))(x)
    with pytest.raises(TraceError, match="in place"):
        vmap(lambda a: a.add_(1))(x)
    with pytest.raises(TraceError, match=r"duo\.func\.grad"):
        vmap(lambda a: a.sum().backward())(x)
    with pytest.raises(ShapeError, match=r"f32\[4,3\]"):
        vmap(lambda a: a @ a)(x)


def test_shared_tensors_are_not_written_inside(x):
    total = duo.zeros(4, 3)
    with pytest.raises(TraceError, match="return"):
        vmap(lambda a: total.add_(a))(x)
    assert total.tolist() == duo.zeros(4, 3).tolist()
    norm = nn.BatchNorm1d(3) if hasattr(nn, "BatchNorm1d") else None
    if norm is not None:
        with pytest.raises(TraceError, match="return the new value"):
            vmap(norm)(x)


def test_a_tensor_that_leaks_is_refused(x):
    kept = []
    vmap(lambda a: kept.append(a) or a * 2)(x)
    for use in (lambda: kept[0] + 1, lambda: vmap(lambda a: a + kept[0])(x)):
        with pytest.raises(TraceError, match="after that ended"):
            use()


def test_an_error_inside_leaves_nothing_behind(x):
    with pytest.raises(ZeroDivisionError):
        vmap(lambda a: 1 / 0)(x)
    assert duo.rand(2).shape == (2,)
    assert np.array_equal(vmap(lambda a: a + 1)(x).numpy(), (x + 1).numpy())
