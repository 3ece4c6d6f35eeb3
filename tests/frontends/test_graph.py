"""Graph mode: names, runs, feeds, variables, program order, errors."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import runtime
from duo_ir.errors import DTypeError, DuoError, ShapeError


@pytest.fixture(autouse=True)
def graph():
    tf.reset_default_graph()
    return tf.get_default_graph()


def test_the_script_that_duo_was_conceived_from():
    a = tf.constant(2)
    b = tf.constant(3)
    c = tf.add(a, b)
    with tf.Session() as sess:
        result = sess.run(c)
    assert str(result) == "5" and result.dtype == np.int32


def test_constants_take_tensorflow_dtypes():
    kinds = [
        (1, "i32"),
        (1.5, "f32"),
        (True, "bool"),
        ([1, 2], "i32"),
        (np.arange(2.0), "f64"),
        (2**40, "i64"),
        ([], "f32"),
    ]
    for value, dtype in kinds:
        assert tf.constant(value).dtype.name == dtype
    assert tf.constant(1, tf.float64).dtype is tf.float64
    assert tf.constant(7, shape=[2, 2]).shape.as_list() == [2, 2]
    with pytest.raises(DTypeError):
        tf.constant(1.5, tf.int32)


def test_constants_and_numbers_are_not_part_of_the_text():
    x = tf.placeholder(tf.float32, [None])
    assert tf.lower(x * 2.0 + tf.constant(1.0), [x]).hash == tf.lower(x * 3.0 + tf.constant(-7.0), [x]).hash


def test_lower_names_sizes_and_takes_examples():
    x, y = tf.placeholder(tf.float32, [None, 3]), tf.placeholder(tf.float32, [None, None, 2])
    text = str(tf.lower([x + 1.0, y * y], [x, y]))
    assert "f32[b,3]" in text and "f32[t,d2,2]" in text
    function = tf.lower(x + 1.0, {x: np.zeros((5, 3), np.float32)})
    assert [str(t) for t in function.param_types] == ["f32[5,3]", "f32[]"]


def test_names_scopes_and_lookup(graph):
    x = tf.placeholder(tf.float32, [None, 2], name="x")
    with tf.name_scope("block"):
        y = tf.square(x, name="y")
        z = tf.square(x, name="y")
    assert [t.name for t in (x, y, z)] == ["x:0", "block/y:0", "block/y_1:0"]
    assert y.op.name == "block/y" and y.op.type == "Square" and y.op.inputs[0] is x and y.graph is graph
    assert graph.get_tensor_by_name("block/y:0") is y and graph.get_operation_by_name("x") is x.op
    assert x.shape.as_list() == [None, 2] and x.get_shape()[1] == 2
    with tf.name_scope("block"):
        assert tf.square(x, name="y").name == "block_1/y:0"
    with pytest.raises(tf.errors.NotFoundError, match="did you mean 'block/y'"):
        graph.get_operation_by_name("block/yy")


def test_nests_of_fetches_and_names():
    x = tf.placeholder(tf.float32, [2], name="x")
    y = tf.multiply(x, 2.0, name="y")
    with tf.Session() as sess:
        out = sess.run({"a": y, "b": (x, ["y:0", y.op])}, {"x:0": [1, 2]})
        assert out["a"].tolist() == [2, 4] and out["b"][0].tolist() == [1, 2]
        assert out["b"][1][0].tolist() == [2, 4] and out["b"][1][1] is None
        assert sess.run([], {}) == []
        assert sess.run(y.op, {x: [0, 0]}) is None
        assert y.eval({x: np.ones(2)}).tolist() == [2, 2]
        for n in range(3):
            first, second = sess.run([y, x], {x: np.full(2, n, np.float32)})
            assert first.tolist() == [2 * n, 2 * n] and second.tolist() == [n, n]


def test_a_fetched_feed_is_a_copy():
    x = tf.placeholder(tf.float32, [2])
    v = tf.Variable([0.0, 0.0])
    keep = v.assign(x)
    fed = np.ones(2, np.float32)
    with tf.Session() as sess:
        out, _ = sess.run([x, keep], {x: fed})
        fed[:] = 5
        assert out.tolist() == [1, 1] and sess.run(v).tolist() == [1, 1]
        value = sess.run(v)
        value[:] = 9
        assert sess.run(v).tolist() == [1, 1]


def test_feeding_replaces_any_tensor():
    x = tf.constant([1.0, 2.0])
    h = tf.square(x)
    y = h + 1.0
    (g,) = tf.gradients(tf.reduce_sum(h * h), [x])
    with tf.Session() as sess:
        assert sess.run(y, {h: [10, 20]}).tolist() == [11, 21]
        assert sess.run(y).tolist() == [2, 5]
        assert sess.run(g, {h: [1, 1]}).tolist() == [4, 8]  # 2 h * 2 x, with the h that was fed
        p = tf.placeholder_with_default([3.0], [1])
        assert sess.run(p * 2.0).tolist() == [6] and sess.run(p * 2.0, {p: [1]}).tolist() == [2]


@pytest.mark.parametrize("n", [0, 1, 2, 17])
def test_one_graph_for_every_batch_size(n):
    x = tf.placeholder(tf.float32, [None, 3])
    y = tf.placeholder(tf.float32, [None, 3])
    total = tf.reduce_sum(x * y, axis=0) + tf.reduce_sum(tf.ones([tf.shape(x)[0], 3]), 0)
    flat = tf.reshape(x, [-1])
    again = tf.reshape(flat, [tf.shape(x)[0], 3])
    a = np.arange(3 * n, dtype=np.float32).reshape(n, 3)
    with tf.Session() as sess:
        out, same, size = sess.run([total, again, tf.shape(x)], {x: a, y: a})
    assert out.tolist() == ((a * a).sum(0) + n).tolist() and (same == a).all() and size.tolist() == [n, 3]


def test_sizes_that_meet_become_one():
    x, w = tf.placeholder(tf.float32, [None, None], name="x"), tf.placeholder(tf.float32, [None, None], name="w")
    y = tf.matmul(x, w)
    with tf.Session() as sess:
        assert sess.run(y, {x: np.ones((2, 3)), w: np.ones((3, 4))}).shape == (2, 4)
        with pytest.raises(tf.errors.InvalidArgumentError, match="'x:0' and 'w:0'"):
            sess.run(y, {x: np.ones((2, 3)), w: np.ones((5, 4))})
    p = tf.placeholder(tf.float32, [None], name="p")
    z = p + tf.constant(np.ones(4, np.float32))
    assert p.shape.as_list() == [4]
    with (
        tf.Session() as sess,
        pytest.raises(tf.errors.InvalidArgumentError, match=r"\(3,\) for 'p:0'.*fixed: 4 \(.*test_graph.py"),
    ):
        sess.run(z, {p: np.ones(3)})
    named = tf.placeholder(tf.float32, ["n", "n"])
    assert named.shape[0] == named.shape[1]


# ---------------------------------------------------------------------------------------------------- variables
def test_variable_values_belong_to_the_session():
    v = tf.Variable([1.0, 2.0], name="v")
    one, two = tf.Session(), tf.Session()
    one.run(tf.global_variables_initializer())
    one.run(v.assign([5.0, 6.0]))
    two.run(v.initializer)
    assert one.run(v).tolist() == [5, 6] and two.run(v).tolist() == [1, 2]
    v.load([0, 1], two)
    assert two.run("v:0").tolist() == [0, 1]


def test_program_order():
    v = tf.Variable(1.0)
    before = v * 10.0
    add = tf.assign_add(v, 1.0)
    after = v * 10.0
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        assert sess.run([before, add, after, v]) == [10, 2, 20, 2]
        assert sess.run(after) == 20  # the assignment is no part of this run
        assert sess.run([before, after]) == [20, 20]
        assert sess.run(add + 1.0) == 4  # using the result entails the assignment
        assert sess.run(v) == 3


def test_control_dependencies_and_group():
    v, w = tf.Variable(1.0), tf.Variable(10.0)
    read = tf.identity(v)
    add = tf.assign_add(v, 1.0)
    with tf.control_dependencies([add]):
        seen = tf.identity(v)
        untouched = tf.identity(read)
        with tf.control_dependencies(None):
            free = tf.identity(v)
    both = tf.group(add, tf.assign(w, w * 2.0), name="both")
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        assert sess.run(seen) == 2 and sess.run(free) == 2
        assert sess.run(untouched) == 2 and sess.run(v) == 3  # read before, computed after
        assert sess.run(both) is None and sess.run([v, w]) == [4, 20]
        sess.run("both")
        assert sess.run([v, w]) == [5, 40]


def test_threads_that_share_a_session_lose_no_update():
    v = tf.Variable(0.0)
    add = v.assign_add(1.0)
    sess = tf.Session()
    sess.run(v.initializer)
    threads = [threading.Thread(target=lambda: [sess.run(add) for _ in range(100)]) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sess.run(v) == 400


def test_get_variable_and_scopes():
    with tf.variable_scope("a"):
        k = tf.get_variable("k", [2, 3])
        with tf.variable_scope("b"):
            assert tf.get_variable("k", [2]).name == "a/b/k:0"
        with pytest.raises(tf.errors.InvalidArgumentError, match="'a/k' exists already"):
            tf.get_variable("k", [2, 3])
    with tf.variable_scope("a", reuse=True):
        assert tf.get_variable("k", [2, 3]) is k
        with pytest.raises(tf.errors.InvalidArgumentError, match="does not exist"):
            tf.get_variable("other", [1])
        with pytest.raises(ShapeError):
            tf.get_variable("k", [9])
    with tf.variable_scope("c", reuse=tf.AUTO_REUSE):
        assert tf.get_variable("n", [1]) is tf.get_variable("n", [1])
    frozen = tf.get_variable("frozen", initializer=3, trainable=False)
    assert frozen.dtype is tf.int32
    assert k in tf.trainable_variables() and frozen not in tf.trainable_variables() and frozen in tf.global_variables()
    assert [v.op.name for v in tf.get_collection(tf.GraphKeys.GLOBAL_VARIABLES, scope="a/")] == ["a/k", "a/b/k"]


def test_initializers():
    made = {
        "zeros": (tf.zeros_initializer(), lambda a: (a == 0).all()),
        "ones": (tf.ones_initializer(), lambda a: (a == 1).all()),
        "constant": (tf.constant_initializer(2.5), lambda a: (a == 2.5).all()),
        "normal": (
            tf.random_normal_initializer(3.0, 0.1),
            lambda a: abs(a.mean() - 3) < 0.02 and abs(a.std() - 0.1) < 0.02,
        ),
        "truncated": (tf.truncated_normal_initializer(0.0, 2.0), lambda a: np.abs(a).max() <= 4),
        "uniform": (
            tf.random_uniform_initializer(-1, 2),
            lambda a: a.min() >= -1 and a.max() < 2 and abs(a.mean() - 0.5) < 0.2,
        ),
        "glorot": (tf.glorot_uniform_initializer(), lambda a: 0.3 < np.abs(a).max() <= np.sqrt(6 / 60)),
        "he": (tf.initializers.he_normal(), lambda a: abs(a.std() - np.sqrt(2 / 20)) < 0.05),
        "orthogonal": (tf.orthogonal_initializer(seed=1), lambda a: np.abs(a @ a.T - np.eye(20)).max() < 1e-5),
    }
    variables = {n: tf.get_variable(n, [20, 40], initializer=i) for n, (i, _) in made.items()}
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for name, value in sess.run(variables).items():
            assert made[name][1](value), name


def test_seeds():
    tf.set_random_seed(5)
    a = tf.random_normal([4])
    b = tf.random_uniform([4], seed=1)
    one, two = tf.Session(), tf.Session()
    first = one.run([a, b])
    again = one.run([a, b])
    other = two.run([a, b])
    assert all((x == y).all() for x, y in zip(first, other))
    assert all((x != y).any() for x, y in zip(first, again))


def test_the_default_generator_is_shared_with_eager_mode():
    x = tf.random_normal([3])
    duo.manual_seed(4)
    eager = [duo.randn(3).numpy().copy() for _ in range(3)]
    duo.manual_seed(4)
    with tf.Session() as sess:
        assert (sess.run(x) == eager[0]).all()
        assert (duo.randn(3).numpy() == eager[1]).all()
        assert (sess.run(x) == eager[2]).all()


# ---------------------------------------------------------------------------------------------------- errors
def test_errors_name_the_thing_the_line_and_the_way_out():
    x = tf.placeholder(tf.float32, [None, 3], name="x")
    y = tf.identity(x, name="y")
    v = tf.Variable(1.0, name="counter")
    here = "test_graph.py:"
    other = tf.Graph()
    with other.as_default():
        z = tf.constant(1.0, name="z")
    sess = tf.Session()
    cases = [
        (lambda: sess.run(y), ValueError, ["placeholder 'x'", here, "feed_dict"]),
        (lambda: sess.run(y, {x: np.ones((2, 4))}), ValueError, ["(2, 4)", "'x:0'", here]),
        (lambda: sess.run(y, {x: np.ones(3)}), ValueError, ["(3,)", "'x:0'"]),
        (lambda: sess.run(y, {x: np.ones((1, 3), bool)}), ValueError, ["bool", "'x:0'", "astype"]),
        (lambda: sess.run(y, {"w:0": 1}), KeyError, ["no operation 'w'"]),
        (lambda: sess.run("why:0"), KeyError, ["no operation 'why'"]),
        (lambda: sess.run("y:3"), KeyError, ["1 outputs"]),
        (lambda: sess.run(v), RuntimeError, ["'counter'", here, "global_variables_initializer"]),
        (lambda: sess.run(v + 1.0), RuntimeError, ["'counter'"]),
        (lambda: sess.run(z), ValueError, ["another graph"]),
        (lambda: x + z, ValueError, ["another graph"]),
        (lambda: sess.run(3), ValueError, ["neither a tensor nor an operation"]),
        (lambda: sess.run(y, {v: 1}), ValueError, ["cannot be fed"]),
        (lambda: y.eval({x: np.ones((1, 3))}), ValueError, ["no Session"]),
        (lambda: v.assign([1.0, 2.0]), ValueError, ["'counter:0'"]),
        (lambda: v.assign(tf.constant(1)), TypeError, ["tf.cast"]),
        (lambda: bool(x), ValueError, ["tf.cond"]),
        (lambda: tf.add(tf.constant(1), tf.constant(1.0)), TypeError, ["i32", "f32", "tf.cast"]),
        (lambda: tf.matmul(x, tf.ones([4, 2])), ValueError, ["matmul"]),
        (lambda: tf.gradients(tf.constant(1), [x]), RuntimeError, ["only floats"]),
        (lambda: tf.placeholder(tf.float32), ValueError, ["None for unknown"]),
    ]
    for make, kind, words in cases:
        with pytest.raises(kind) as caught:
            make()
        assert isinstance(caught.value, DuoError)
        for word in words:
            assert word in str(caught.value), (word, str(caught.value))
    sess.close()
    with pytest.raises(RuntimeError, match="closed"):
        sess.run(y, {x: np.ones((1, 3))})


def test_an_index_out_of_range_raises_when_it_runs():
    table, ids = tf.constant(np.eye(3, dtype=np.float32)), tf.placeholder(tf.int32, [None])
    rows = tf.nn.embedding_lookup(table, ids)
    with tf.Session() as sess:
        assert sess.run(rows, {ids: [2, 0]}).tolist() == [[0, 0, 1], [1, 0, 0]]
        with pytest.raises(IndexError):
            sess.run(rows, {ids: [3]})


def test_a_failed_op_leaves_nothing_behind(graph):
    x = tf.placeholder(tf.float32, [2, 3])
    items = len(graph.items)
    with pytest.raises(ShapeError):
        tf.add(x, tf.placeholder(tf.float32, [4, 5]))
    assert len(graph.items) == items


def test_fetching_again_with_fresh_lists_never_confuses_runs():
    x = tf.placeholder(tf.float32, [])
    outs = [x + float(k) for k in range(8)]
    with tf.Session() as sess:
        for k in range(200):
            picked = [outs[(k * 3) % 8], outs[k % 8]]
            assert sess.run(list(picked), {x: 1.0}) == [1 + (k * 3) % 8, 1 + k % 8]
            assert sess.run({"a": [picked[1]]}, {x: 1.0}) == {"a": [1 + k % 8]}
            if k % 50 == 0:
                gc.collect()


def test_ops_made_between_runs_recompile_nothing():
    x = tf.placeholder(tf.float32, [None])
    y = x * 2.0
    with tf.Session() as sess:
        sess.run(y, {x: [1.0]})
        before = runtime.statistics.compiled + runtime.statistics.hits
        for k in range(5):
            tf.add(y, float(k))
            assert sess.run(y, {x: [1.0]}).tolist() == [2]
        assert runtime.statistics.compiled + runtime.statistics.hits == before


def test_fetched_arrays_belong_to_whom_they_are_given():
    """Small and large results, again and again through the quick form: none is written by a later run, and all may be written."""
    x = tf.placeholder(tf.float32, [None])
    y, total = x * 2.0, tf.reduce_sum(x)
    again = tf.identity(y)
    with tf.Session() as sess:
        for n in (0, 1, 5, 3000):
            kept = []
            for k in range(6):
                given = np.full(n, k, "f4")
                kept.append(sess.run([y, total, again], {x: given}))
                assert given.tolist() == [k] * n
                kept[-1][0][:1] += 1
            for k, (a, s, b) in enumerate(kept):
                assert a.flags.writeable and s == k * n and isinstance(s, np.float32)
                assert a.tolist() == [2 * k + 1] * min(n, 1) + [2 * k] * (n - 1) * (n > 0)
                assert b.tolist() == [2 * k] * n


@pytest.mark.parametrize("quick", [True, False])
def test_arrays_of_any_layout_are_fed(quick, monkeypatch):
    if not quick:
        monkeypatch.setattr("duo_backends.cpu.bound.array_data", lambda: None)  # as where arrays look otherwise
    x = tf.placeholder(tf.float32, [3, 4])
    y = tf.matmul(x, tf.Variable(np.eye(4, dtype="f4"))) + 1.0
    base = np.arange(96, dtype="f4").reshape(6, 16)
    read_only = base[:3, :4].copy()
    read_only.flags.writeable = False
    shifted = np.frombuffer(b"_" + base[:3, :4].tobytes(), "u1")[1:].view("f4").reshape(3, 4)
    forms = [base[:3, :4], base[::2, ::4], base[:3, :4].copy("F"), base[2::-1, 3::-1], read_only, shifted]
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for a in forms * 2:
            assert np.array_equal(sess.run(y, {x: a}), a + 1)
