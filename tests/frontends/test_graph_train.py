"""Graph mode: optimisers against their formulas, equal bits with eager mode, checkpoints, graph functions as layers."""

from __future__ import annotations

import numpy as np
import pytest

import duo
import duo.graph as tf
import duo.nn as nn
from duo import runtime
from tests.frontends.models import assert_same, loss_of, make, train_eager, weights


@pytest.fixture(autouse=True)
def fresh():
    tf.reset_default_graph()
    yield
    runtime.set_backend("cpu")
    runtime.set_fusion(True)


# ------------------------------------------------------------------------------------- tf.train against its formulas
def _momentum(nesterov):
    def step(p, g, s, t):
        s["a"] = 0.9 * s.get("a", 0) + g
        return p - 0.1 * (g + 0.9 * s["a"] if nesterov else s["a"])

    return step


def _adam(p, g, s, t):
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    s["v"] = 0.999 * s.get("v", 0) + 0.001 * g * g
    return p - 0.1 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * s["m"] / (np.sqrt(s["v"]) + 1e-8)


def _rmsprop(centered):
    def step(p, g, s, t):
        s["s"] = 0.9 * s.get("s", 1) + 0.1 * g * g
        s["mg"] = 0.9 * s.get("mg", 0) + 0.1 * g if centered else 0
        s["b"] = 0.5 * s.get("b", 0) + 0.1 * g / np.sqrt(s["s"] - s["mg"] ** 2 + 1e-10)
        return p - s["b"]

    return step


def _adamw(p, g, s, t):
    return _adam(p - 0.01 * p, g, s, t)


def _adagrad(p, g, s, t):
    s["a"] = s.get("a", 0.1) + g * g
    return p - 0.1 * g / np.sqrt(s["a"])


OPTIMIZERS = {
    "sgd": (lambda: tf.train.GradientDescentOptimizer(0.1), lambda p, g, s, t: p - 0.1 * g),
    "momentum": (lambda: tf.train.MomentumOptimizer(0.1, 0.9), _momentum(False)),
    "nesterov": (lambda: tf.train.MomentumOptimizer(0.1, 0.9, use_nesterov=True), _momentum(True)),
    "adam": (lambda: tf.train.AdamOptimizer(0.1), _adam),
    "adamw": (lambda: tf.train.AdamWOptimizer(0.01, 0.1), _adamw),
    "adagrad": (lambda: tf.train.AdagradOptimizer(0.1), _adagrad),
    "rmsprop": (lambda: tf.train.RMSPropOptimizer(0.1, momentum=0.5), _rmsprop(False)),
    "centered": (lambda: tf.train.RMSPropOptimizer(0.1, momentum=0.5, centered=True), _rmsprop(True)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_follow_tensorflow(name):
    make_optimizer, formula = OPTIMIZERS[name]
    start, target = np.array([[1.0, -2.0], [3.0, 0.5]]), np.array([[0.3, 0.1], [-0.2, 0.7]])
    w = tf.Variable(start, name="w")
    step = make_optimizer().minimize(tf.reduce_sum(tf.square(w - tf.constant(target))))
    p, slots = start.copy(), {}
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for t in range(1, 8):
            sess.run(step)
            p = formula(p, 2 * (p - target), slots, t)
            np.testing.assert_allclose(sess.run(w), p, rtol=1e-12)


def test_minimize_counts_the_global_step_and_takes_live_rates():
    w = tf.Variable(1.0)
    rate, lr = tf.placeholder(tf.float32, []), [0.5]
    step = tf.train.get_or_create_global_step()
    by_feed = tf.train.GradientDescentOptimizer(rate).minimize(w * w, global_step=step, name="train")
    by_call = tf.train.GradientDescentOptimizer(lambda: lr[0]).minimize(w * w)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        sess.run("train", {rate: 0.25})
        assert sess.run([w, step]) == [0.5, 1] and by_feed.name == "train"
        sess.run(by_call)
        assert sess.run(w) == 0
        lr[0] = 0.0
        sess.run(w.assign(3.0))
        sess.run(by_call)
        assert sess.run(w) == 3 and tf.train.global_step(sess, step) == 1


def test_compute_and_apply_gradients_and_slots():
    v, w = tf.Variable(2.0, name="v"), tf.Variable(3.0, name="w")
    unused = tf.Variable(1.0, name="unused")
    opt = tf.train.MomentumOptimizer(0.1, 0.9)
    pairs = opt.compute_gradients(v * v * w)
    assert [None if g is None else 1 for g, _ in pairs] == [1, 1, None] and pairs[2][1] is unused
    clipped, norm = tf.clip_by_global_norm([g for g, _ in pairs], 1.0)
    step = opt.apply_gradients(zip(clipped, [v, w, unused]))
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        g, n, _ = sess.run([clipped[:2], norm, step])
        np.testing.assert_allclose(n, np.sqrt(12**2 + 4**2), rtol=1e-6)
        np.testing.assert_allclose(g, np.array([12, 4]) / n, rtol=1e-6)
        np.testing.assert_allclose(sess.run(v), 2 - 0.1 * 12 / n, rtol=1e-6)
        slot = opt.get_slot(v, "Momentum")
        assert slot.op.name == "v/Momentum" and sess.run(slot) == g[0]
    with pytest.raises(RuntimeError, match="depends on no variable"):
        opt.minimize(tf.constant(1.0))


def test_train_optimizers_train_module_parameters():
    layer = nn.Linear(3, 1)
    before = layer.weight.detach().numpy().copy()
    x = tf.placeholder(tf.float32, [None, 3])
    scale = tf.Variable(2.0)
    step = tf.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(layer(x) * scale))
    a = np.ones((4, 3), np.float32)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        assert (layer.weight.detach().numpy() == before).all()
        sess.run(step, {x: a})
    np.testing.assert_allclose(layer.weight.detach().numpy(), before - 0.1 * 2 * 4, rtol=1e-5)


# ------------------------------------------------------------------------------------- duo.optim, equal bits with eager
def train_graph(name: str, steps: int, resume=None):
    """What models.train_eager does, written for a graph."""
    model, optimizer, (xs, ys) = make(name)
    with tf.Graph().as_default():
        x = tf.placeholder(tf.as_dtype(xs.dtype), [None, *xs.shape[1:]])
        y = tf.placeholder(tf.as_dtype(ys.dtype), [None, *ys.shape[1:]])
        loss = loss_of(model, x, y)
        params = dict(model.named_parameters())
        grads = dict(zip(params, tf.gradients(loss, list(params.values()))))
        step = optimizer.minimize(loss)
        losses, last = [], {}
        with tf.Session() as sess:
            for _ in range(steps):
                value, last, _ = sess.run([loss, grads, step], {x: xs, y: ys})
                losses.append(value)
    return np.array(losses, np.float32), last, weights(model)


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_same_bits_as_eager(name):
    want = train_eager(name, 100)
    assert_same(train_graph(name, 100), want)
    runtime.set_fusion(False)
    assert_same(train_graph(name, 100), want)


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_same_bits_on_the_interpreter(name):
    runtime.set_backend("interpret")
    got = train_graph(name, 20)
    runtime.set_backend("cpu")
    assert_same(got, train_eager(name, 20))


OPTIM = {
    "sgd": lambda p: duo.optim.SGD(p, lr=0.1),
    "momentum": lambda p: duo.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda p: duo.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: duo.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: duo.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: duo.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: duo.optim.Adagrad(p, lr=0.01, lr_decay=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda p: duo.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("name", OPTIM)
def test_a_run_may_change_modes_half_way(name):
    """Eager, graph and eager again, with one optimizer: slots and step counts are the same cells."""
    xs = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)

    def start():
        duo.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        return model, OPTIM[name](model.parameters())

    def eager(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (model(duo.tensor(xs)) ** 2).mean().backward()
            optimizer.step()

    def graph(model, optimizer, steps):
        with tf.Graph().as_default(), tf.Session() as sess:
            x = tf.placeholder(tf.float32, [8, 6])
            step = optimizer.minimize((model(x) ** 2).mean())
            for _ in range(steps):
                sess.run(step, {x: xs})

    model, optimizer = start()
    eager(model, optimizer, 9)
    want = weights(model)
    for plan in ((graph, graph, graph), (eager, graph, eager), (graph, eager, graph)):
        model, optimizer = start()
        for run in plan:
            run(model, optimizer, 3)
            saved = optimizer.state_dict()
            again = OPTIM[name](model.parameters())
            again.load_state_dict(saved)
            optimizer = again
        got = weights(model)
        assert all(np.array_equal(want[k], got[k]) for k in want), plan


def test_hyperparameters_are_read_at_each_run():
    p = nn.Parameter(duo.tensor([1.0, 2.0]))
    opt = duo.optim.SGD([p], lr=1.0)
    loss = (tf.convert_to_tensor(p) * 1.0).sum()
    step = opt.minimize(loss)
    compiled = 0
    with tf.Session() as sess:
        for k in range(4):
            opt.param_groups[0]["lr"] = float(k)
            sess.run(step)
            compiled = compiled if k else runtime.statistics.compiled
        assert runtime.statistics.compiled == compiled
    assert p.detach().numpy().tolist() == [-5.0, -4.0]
    with pytest.raises(ValueError, match="backward"):
        opt.minimize(p.sum())


def test_state_made_for_a_run_that_failed_is_dropped():
    table = nn.Embedding(4, 2)
    opt = duo.optim.SGD(table.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    i = tf.placeholder(tf.int64, [1])
    step = opt.minimize(table(i).sum())
    with tf.Session() as sess:
        with pytest.raises(IndexError):
            sess.run(step, {i: [7]})
        before = table.weight.detach().numpy().copy()
        sess.run(step, {i: [1]})
    before[1] -= np.float32(0.1)  # the first step takes the gradient as it is, undamped
    assert np.array_equal(table.weight.detach().numpy(), before)


def test_eager_mode_sees_what_a_run_writes_and_backward_notices():
    p = nn.Parameter(duo.tensor([2.0]))
    step = duo.optim.SGD([p], lr=0.5).minimize((tf.convert_to_tensor(p) * 1.0).sum())
    out = p * p
    with tf.Session() as sess:
        sess.run(step)
        assert p.item() == 1.5 and p.requires_grad
        with pytest.raises(duo.DuoError):
            out.backward()
        (p * p).backward()
        assert p.grad.item() == 3.0


# ------------------------------------------------------------------------------------- checkpoints
def test_saver(tmp_path):
    v = tf.Variable([1.0, 2.0], name="v")
    with tf.variable_scope("net"):
        w = tf.get_variable("w", [3], tf.float64)
    saver = tf.train.Saver(max_to_keep=2)
    one, two = tf.Session(), tf.Session()
    with pytest.raises(RuntimeError, match="'v'"):
        saver.save(one, tmp_path / "model")
    one.run(tf.global_variables_initializer())
    paths = [saver.save(one, str(tmp_path / "model"), global_step=n) for n in range(3)]
    assert tf.train.latest_checkpoint(tmp_path) == paths[-1] and not tf.train.checkpoint_exists(paths[0])
    saver.restore(two, paths[-1])
    for x in (v, w):
        assert (one.run(x) == two.run(x)).all()
    eager = duo.load(paths[-1] + ".safetensors")
    assert eager["v"].tolist() == [1, 2] and eager["net/w"].dtype is duo.float64
    tf.Variable(0.0, name="extra")
    with pytest.raises(tf.errors.NotFoundError, match="'extra'"):
        tf.train.Saver().restore(two, paths[-1])
    with pytest.raises(tf.errors.NotFoundError):
        saver.restore(two, str(tmp_path / "nothing"))


def test_a_module_moves_between_modes_through_files(tmp_path):
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    with tf.Session() as sess:
        path = tf.train.Saver(one).save(sess, tmp_path / "module")
        two.load_state_dict(duo.load(path + ".safetensors"))
        assert np.array_equal(one.weight.detach().numpy(), two.weight.detach().numpy())
        duo.save({k: v * 2 for k, v in one.state_dict().items()}, tmp_path / "eager.safetensors")
        tf.train.Saver(two).restore(sess, str(tmp_path / "eager.safetensors"))
        assert np.array_equal(two.weight.detach().numpy(), 2 * one.weight.detach().numpy())


# ------------------------------------------------------------------------------------- a graph function as a layer
def test_graph_function_in_an_eager_model():
    x = tf.placeholder(tf.float32, [None, 4])
    w = tf.get_variable("w", [4, 3])
    inner = nn.Linear(3, 2)
    y = inner(tf.tanh(tf.matmul(x, w) * 0.5))
    sess = tf.Session()
    sess.run(tf.global_variables_initializer())
    layer = tf.function_layer(sess, [x], y)
    head = nn.Linear(2, 1)
    leaf = sess.variable_tensor(w)
    assert {id(p) for p in layer.parameters} == {id(leaf), id(inner.weight), id(inner.bias)}
    opt = duo.optim.SGD([leaf, *inner.parameters(), *head.parameters()], lr=0.1)
    for n in (5, 2, 1):
        a = duo.randn(n, 4, requires_grad=True)
        opt.zero_grad()
        out = (head(layer(a)) ** 2).sum()
        out.backward()
        ref = duo.tensor(leaf.detach().numpy(), requires_grad=True)
        b = duo.tensor(a.detach().numpy(), requires_grad=True)
        same = (head(inner(((b @ ref) * 0.5).tanh())) ** 2).sum()
        ga, gw = duo.autograd.grad(same, [b, ref])
        assert out.item() == same.item()
        assert np.array_equal(a.grad.numpy(), ga.numpy()) and np.array_equal(leaf.grad.numpy(), gw.numpy())
        opt.step()
        assert np.array_equal(sess.run(w), leaf.detach().numpy())
    step = tf.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(y))
    before = sess.run(w)
    sess.run(step, {x: np.ones((2, 4))})
    assert (leaf.detach().numpy() != before).any() and leaf.requires_grad


def test_graph_function_draws_random_numbers_as_the_graph_does():
    tf.set_random_seed(3)
    x = tf.placeholder(tf.float32, [None])
    y = tf.nn.dropout(x, rate=0.5)
    ones = np.ones(16, np.float32)
    one, two = tf.Session(), tf.Session()
    layer = one.as_function([x], y)
    for _ in range(3):
        assert np.array_equal(layer(ones).numpy(), two.run(y, {x: ones}))
