"""Graph mode: its functions against NumPy, control flow, gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest

import duo.graph as tf
from duo_ir.errors import DTypeError, DuoError, GradientError, ShapeError

A = np.array([[0.5, -1.25, 2.0], [3.0, 0.25, -0.75]], np.float32)
B = np.array([[1.5, 2.5, -0.5], [0.5, -2.0, 4.0]], np.float32)
I = np.array([[7, -7, 3], [0, 5, -2]], np.int32)  # noqa: E741
J = np.array([[2, 2, -2], [3, -3, 5]], np.int32)


@pytest.fixture(autouse=True)
def fresh():
    tf.reset_default_graph()


def run(fetch, feed=None):
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        return sess.run(fetch, feed)


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


erf = np.vectorize(math.erf)
CASES = {
    "add": (lambda: tf.add(A, B), A + B),
    "subtract": (lambda: tf.subtract(1.0, tf.constant(A)), 1 - A),
    "floordiv": (lambda: tf.floordiv(I, J), I // J),
    "mod": (lambda: tf.mod(I, J), I % J),
    "div of ints": (lambda: tf.div(I, J), I // J),
    "truediv of ints": (lambda: tf.truediv(I, J), (I / J).astype(np.float32)),
    "div_no_nan": (lambda: tf.div_no_nan(A, np.zeros_like(A)), np.zeros_like(A)),
    "pow": (lambda: tf.pow(A, 3), A**3),
    "maximum": (lambda: tf.maximum(A, 0.0), np.maximum(A, 0)),
    "squared_difference": (lambda: tf.squared_difference(A, B), (A - B) ** 2),
    "add_n": (lambda: tf.add_n([A, B, A]), A + B + A),
    "exp": (lambda: tf.exp(A), np.exp(A)),
    "round": (lambda: tf.round(A * 2), np.round(A * 2)),
    "equal": (lambda: tf.equal(I, J), I == J),
    "less": (lambda: tf.less(A, 0.3), A < 0.3),
    "logical": (lambda: tf.logical_or(A < 0, tf.logical_not(B > 0)), (A < 0) | ~(B > 0)),
    "cast": (lambda: tf.cast(A, tf.int32), A.astype(np.int32)),
    "clip_by_value": (lambda: tf.clip_by_value(A, -1, 1), np.clip(A, -1, 1)),
    "clip_by_norm": (lambda: tf.clip_by_norm(A, 2.0), A * 2 / np.linalg.norm(A)),
    "reduce_sum": (lambda: tf.reduce_sum(A, 1, keepdims=True), A.sum(1, keepdims=True)),
    "reduce_sum of ints": (lambda: tf.reduce_sum(I), np.int32(I.sum())),
    "reduce_mean": (lambda: tf.reduce_mean(A, [0, 1]), A.mean()),
    "reduce_mean of ints": (lambda: tf.reduce_mean(tf.constant([1, 2, 4, -9])), np.int32(0)),
    "reduce_max": (lambda: tf.reduce_max(A, axis=-1), A.max(-1)),
    "reduce_prod": (lambda: tf.reduce_prod(A, reduction_indices=0), A.prod(0)),
    "reduce_all": (lambda: tf.reduce_all(tf.constant(A) < 3.5), np.True_),
    "reduce_logsumexp": (lambda: tf.reduce_logsumexp(A, 1), np.log(np.exp(A).sum(1))),
    "variance": (lambda: tf.nn.moments(A, [0])[1], A.var(0)),
    "argmax": (lambda: tf.argmax(A, 1), A.argmax(1)),
    "argmin": (lambda: tf.argmin(A, output_type=tf.int32), A.argmin(0).astype(np.int32)),
    "cumsum": (lambda: tf.cumsum(A, 1, exclusive=True), np.cumsum(A, 1) - A),
    "cumsum reversed": (lambda: tf.cumsum(I, 1, reverse=True), np.cumsum(I[:, ::-1], 1, np.int32)[:, ::-1]),
    "matmul": (lambda: tf.matmul(A, B, transpose_b=True), A @ B.T),
    "matmul both": (lambda: tf.matmul(A, B.T.copy(), transpose_a=True, transpose_b=True), A.T @ B),
    "tensordot": (lambda: tf.tensordot(A, B, [[1], [1]]), A @ B.T),
    "einsum": (lambda: tf.einsum("ij,kj->ik", A, B), A @ B.T),
    "reshape": (lambda: tf.reshape(A, [3, -1]), A.reshape(3, 2)),
    "reshape by shape": (lambda: tf.reshape(A, tf.stack([tf.shape(A)[1], 2])), A.reshape(3, 2)),
    "transpose": (lambda: tf.transpose(A), A.T),
    "transpose perm": (lambda: tf.transpose(np.stack([A, B]), [2, 0, 1]), np.stack([A, B]).transpose(2, 0, 1)),
    "expand_dims": (lambda: tf.expand_dims(A, -1), A[..., None]),
    "squeeze": (lambda: tf.squeeze(A[None, :, None]), A),
    "concat": (lambda: tf.concat([A, B], 1), np.concatenate([A, B], 1)),
    "stack": (lambda: tf.stack([A, B], axis=1), np.stack([A, B], 1)),
    "unstack": (lambda: tf.unstack(A)[1], A[1]),
    "split": (lambda: tf.split(A, 3, axis=1)[2], A[:, 2:]),
    "split sizes": (lambda: tf.split(A, [1, -1], axis=1)[1], A[:, 1:]),
    "tile": (lambda: tf.tile(A, [2, 1]), np.tile(A, (2, 1))),
    "slice": (lambda: tf.slice(A, [0, 1], [-1, 2]), A[:, 1:3]),
    "getitem": (lambda: tf.constant(A)[1, ::2], A[1, ::2]),
    "reverse": (lambda: tf.reverse(A, [1]), A[:, ::-1]),
    "pad": (lambda: tf.pad(A, [[1, 0], [0, 2]], constant_values=9.0), np.pad(A, [(1, 0), (0, 2)], constant_values=9)),
    "gather": (lambda: tf.gather(A, [1, 0, 1]), A[[1, 0, 1]]),
    "gather axis": (lambda: tf.gather(A, [[2, 0]], axis=1), A[:, [[2, 0]]]),
    "gather_nd": (lambda: tf.gather_nd(A, [[0, 2], [1, 1]]), A[[0, 1], [2, 1]]),
    "where": (lambda: tf.where(A > 0, A, B), np.where(A > 0, A, B)),
    "where rows": (lambda: tf.where([True, False], A, B), np.stack([A[0], B[1]])),
    "one_hot": (lambda: tf.one_hot([0, 2, -1], 3), np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0]], np.float32)),
    "one_hot axis": (lambda: tf.one_hot([0, 2], 3, 5, 1, axis=0, dtype=tf.int32), np.array([[5, 1], [1, 1], [1, 5]], np.int32)),
    "fill": (lambda: tf.fill([2, 2], 3), np.full((2, 2), 3, np.int32)),
    "zeros_like": (lambda: tf.zeros_like(A), np.zeros_like(A)),
    "range": (lambda: tf.range(2, 11, 3), np.arange(2, 11, 3, dtype=np.int32)),
    "linspace": (lambda: tf.linspace(0.0, 1.0, 5), np.linspace(0, 1, 5, dtype=np.float32)),
    "eye": (lambda: tf.eye(3), np.eye(3, dtype=np.float32)),
    "shape": (lambda: tf.shape(A), np.array([2, 3], np.int32)),
    "size": (lambda: tf.size(A), np.int32(6)),
    "sequence_mask": (lambda: tf.sequence_mask([1, 3], 3), np.array([[1, 0, 0], [1, 1, 1]], bool)),
    "relu": (lambda: tf.nn.relu(A), np.maximum(A, 0)),
    "leaky_relu": (lambda: tf.nn.leaky_relu(A), np.where(A > 0, A, np.float32(0.2) * A)),
    "elu": (lambda: tf.nn.elu(A), np.where(A > 0, A, np.expm1(A))),
    "sigmoid": (lambda: tf.nn.sigmoid(A), 1 / (1 + np.exp(-A))),
    "softmax": (lambda: tf.nn.softmax(A), softmax(A)),
    "log_softmax": (lambda: tf.nn.log_softmax(A, axis=0), np.log(softmax(A, 0))),
    "gelu": (lambda: tf.nn.gelu(A), A * 0.5 * (1 + erf(A / np.sqrt(2)))),
    "softplus": (lambda: tf.nn.softplus(A), np.log1p(np.exp(A))),
    "bias_add": (lambda: tf.nn.bias_add(A, [1.0, 2.0, 3.0]), A + np.array([1, 2, 3], np.float32)),
    "l2_loss": (lambda: tf.nn.l2_loss(A), (A * A).sum() / 2),
    "l2_normalize": (lambda: tf.nn.l2_normalize(A, 1), A / np.linalg.norm(A, axis=1, keepdims=True)),
    "softmax cross entropy": (
        lambda: tf.nn.softmax_cross_entropy_with_logits_v2(labels=softmax(B), logits=A),
        -(softmax(B) * np.log(softmax(A))).sum(-1),
    ),
    "sparse cross entropy": (
        lambda: tf.nn.sparse_softmax_cross_entropy_with_logits(labels=[2, 0], logits=A),
        -np.log(softmax(A))[[0, 1], [2, 0]],
    ),
    "sigmoid cross entropy": (
        lambda: tf.nn.sigmoid_cross_entropy_with_logits(labels=(B > 0).astype(np.float32), logits=A),
        np.maximum(A, 0) - A * (B > 0) + np.log1p(np.exp(-np.abs(A))),
    ),
    "weighted cross entropy": (
        lambda: tf.nn.weighted_cross_entropy_with_logits(labels=(B > 0).astype(np.float32), logits=A, pos_weight=2.0),
        (1 - (B > 0)) * A + (1 + (B > 0)) * np.log1p(np.exp(-A)),
    ),
    "embedding_lookup": (lambda: tf.nn.embedding_lookup(A, [[1], [0]]), A[[[1], [0]]]),
    "in_top_k": (lambda: tf.nn.in_top_k(A, [0, 0], 1), np.array([False, True])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name):
    make, want = CASES[name]
    got = run(make())
    want = np.asarray(want)
    assert got.dtype == want.dtype or want.dtype == np.float64, (got.dtype, want.dtype)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("lower, upper", [(-1, 0), (0, -1), (0, 0), (1, 2), (-1, -1), (2, 1)])
def test_band_part(lower, upper):
    x = np.arange(1.0, 25.0, dtype="f4").reshape(2, 3, 4)
    rows, columns = np.arange(3)[:, None], np.arange(4)
    kept = ((lower < 0) | (rows - columns <= lower)) & ((upper < 0) | (columns - rows <= upper))
    with tf.Graph().as_default(), tf.Session() as session:
        for value in (x, x > 5):
            got = session.run(tf.linalg.band_part(value, lower, upper))
            assert got.dtype == value.dtype and np.array_equal(got, np.where(kept, value, value.dtype.type(0)))
        assert np.array_equal(session.run(tf.matrix_band_part(x, lower, upper)), np.where(kept, x, 0))


def test_random_ops():
    n = tf.random_normal([2000], 1.0, 0.5, seed=1)
    t = tf.truncated_normal([2000], seed=2)
    u = tf.random_uniform([2000], -1.0, 3.0, seed=3)
    i = tf.random_uniform([500], 0, 7, tf.int32, seed=4)
    s = tf.random_shuffle(tf.range(50), seed=5)
    m = tf.multinomial(tf.log([[0.1, 0.9]]), 500, seed=6)
    n, t, u, i, s, m = run([n, t, u, i, s, m])
    assert abs(n.mean() - 1) < 0.05 and abs(n.std() - 0.5) < 0.05 and np.abs(t).max() <= 2
    assert u.min() >= -1 and u.max() < 3 and abs(u.mean() - 1) < 0.1
    assert set(i.tolist()) == set(range(7)) and i.dtype == np.int32
    assert sorted(s.tolist()) == list(range(50)) and s.tolist() != list(range(50))
    assert abs(m.mean() - 0.9) < 0.05


def test_dropout():
    x = tf.constant(np.ones(4000, np.float32))
    y, z = tf.nn.dropout(x, keep_prob=0.75, seed=1), tf.nn.dropout(x, rate=0.25, seed=1)
    (g,) = tf.gradients(y, [x])
    a, b, grad = run([y, z, g])
    assert np.array_equal(a, b) and np.array_equal(a, grad)
    assert set(np.unique(a)) == {0, np.float32(1) / np.float32(0.75)} and abs((a > 0).mean() - 0.75) < 0.03
    keep = tf.placeholder(tf.float32, [])
    assert run(tf.nn.dropout(x, keep), {keep: 1.0}).tolist() == [1] * 4000


def test_dense_layers():
    x = tf.placeholder(tf.float32, [None, 3])
    h = tf.layers.dense(x, 4, tf.nn.relu, name="first")
    y = tf.layers.dense(h, 2)
    assert [v.op.name for v in tf.trainable_variables()] == ["first/kernel", "first/bias", "dense/kernel", "dense/bias"]
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        a = np.ones((5, 3), np.float32)
        k, b, out = sess.run(["first/kernel:0", "dense/kernel:0", y], {x: a})
        np.testing.assert_allclose(out, np.maximum(a @ k, 0) @ b, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- gradients
def test_gradients():
    x, w = tf.constant(A), tf.Variable(B)
    y = tf.reduce_sum(x * w * w)
    gx, gw, none = tf.gradients(y, [x, w, tf.constant(1.0)])
    (second,) = tf.gradients(gw, [w], grad_ys=[tf.constant(A)])
    assert none is None
    gx, gw, second = run([gx, gw, second])
    assert np.array_equal(gx, B * B) and np.allclose(gw, 2 * A * B) and np.allclose(second, 2 * A * A)
    (stopped,) = tf.gradients(x * tf.stop_gradient(x), [x])
    h = tf.square(x)
    (through,) = tf.gradients(h * x, [x], stop_gradients=[h])
    s, t = run([stopped, through])
    assert np.array_equal(s, A) and np.allclose(t, A * A)


def test_gradients_sum_over_all_reads_of_a_variable():
    v = tf.Variable(3.0)
    first = v * 2.0
    with tf.control_dependencies([first]):
        second = v * v
    (g,) = tf.gradients(first + second, [v])
    assert run(g) == 2 + 6


# ------------------------------------------------------------------------------------- control flow
def test_cond():
    p, x = tf.placeholder(tf.bool, []), tf.placeholder(tf.float32, [None])
    v = tf.Variable(2.0)
    y, pair = tf.cond(p, lambda: (x * v, [x + 1.0]), lambda: (tf.square(x) * 3.0, [x]))
    gx, gv = tf.gradients(y, [x, v])
    a = np.array([1, 2], np.float32)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        got = sess.run([y, pair[0], gx, gv], {p: True, x: a})
        assert [g.tolist() for g in got] == [[2, 4], [2, 3], [2, 2], 3]
        got = sess.run([y, pair[0], gx, gv], {p: False, x: a})
        assert [g.tolist() for g in got] == [[3, 12], [1, 2], [6, 12], 0]
    with pytest.raises(ShapeError, match="same types"):
        tf.cond(p, lambda: x, lambda: tf.constant(1.0))
    with pytest.raises(DTypeError, match="bool"):
        tf.cond(tf.constant(1), lambda: x, lambda: x)


def test_assignments_and_random_numbers_in_branches():
    p = tf.placeholder(tf.bool, [])
    v, w = tf.Variable(1.0), tf.Variable(1.0)
    op = tf.cond(p, lambda: tf.group(v.assign(5.0), w.assign(w + 1.0)), lambda: tf.no_op())
    drawn = tf.cond(p, lambda: tf.random_uniform([2]), lambda: tf.zeros([2]))
    tf.set_random_seed(1)
    seeded = tf.cond(p, lambda: tf.random_uniform([2]), lambda: tf.zeros([2]))
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        sess.run(op, {p: False})
        assert sess.run([v, w]) == [1, 1]
        sess.run(op, {p: True})
        assert sess.run([v, w]) == [5, 2]
        assert (sess.run(drawn, {p: True}) != sess.run(drawn, {p: True})).all()
        first = sess.run(seeded, {p: True})
        sess.run(seeded, {p: False})
        second = sess.run(seeded, {p: True})
        assert (first != second).all()
    with tf.Session() as sess:
        assert np.array_equal(sess.run(seeded, {p: True}), first)
        assert np.array_equal(sess.run(seeded, {p: True}), second)  # the other branch drew nothing


def test_nested_cond_and_case():
    x = tf.placeholder(tf.float32, [])
    y = tf.cond(x > 0, lambda: tf.cond(x > 10, lambda: x * 100.0, lambda: x * 10.0), lambda: -x)
    z = tf.case([(x < 0, lambda: tf.constant(-1)), (x > 5, lambda: tf.constant(1))], default=lambda: tf.constant(0))
    (g,) = tf.gradients(y, [x])
    with tf.Session() as sess:
        for value, want in ((20, (2000, 1, 100)), (2, (20, 0, 10)), (-3, (3, -1, -1))):
            assert tuple(sess.run([y, z, g], {x: value})) == want


def test_while_loop():
    n = tf.placeholder(tf.int32, [])
    v = tf.Variable(2.0)
    i, x = tf.while_loop(lambda i, x: i < n, lambda i, x: (i + 1, x * v + 1.0), [tf.constant(0), tf.zeros([2])])
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        got = sess.run([i, x], {n: 4})
        assert got[0] == 4 and got[1].tolist() == [15, 15]
        assert sess.run(x, {n: 0}).tolist() == [0, 0]
    assert run(tf.while_loop(lambda k: k < 10, lambda k: k * 3, [1])) == 27
    assert run(tf.while_loop(lambda k: True & (k < 1000), lambda k: k + 1, [0], maximum_iterations=5)) == 5
    with pytest.raises(ShapeError, match="keeps its type"):
        tf.while_loop(lambda x: tf.reduce_sum(x) < 3, lambda x: tf.stack([x, x]), [tf.zeros([2])])
    with pytest.raises(GradientError, match="while"):
        tf.gradients(x, [v])


def test_a_loop_that_assigns_and_draws():
    v = tf.Variable(1.0)
    tf.set_random_seed(2)
    body = lambda i, s: (i + 1, s + tf.random_uniform([]) * 0.0 + v.assign_add(1.0))  # noqa: E731
    _, s = tf.while_loop(lambda i, s: i < 3, body, [0, 0.0])
    u = tf.random_uniform([])
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        assert sess.run([s, v]) == [2 + 3 + 4, 4]
        after_three = sess.run(u)
    with tf.Session() as sess:
        assert [sess.run(u) for _ in range(4)][3] == after_three


def test_values_of_a_branch_stay_inside():
    leaked = []
    x = tf.placeholder(tf.float32, [])
    tf.cond(x > 0, lambda: leaked.append(x * 2.0) or x, lambda: x)
    with tf.Session() as sess, pytest.raises(DuoError, match="inside"):
        sess.run(leaked[0] + 1.0, {x: 1})
