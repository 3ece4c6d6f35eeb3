"""Session.run overwrites the variables that it assigns: they stay where they are, readers see whole values, failures and interrupts lose nothing."""


import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn
from tests.frontends.disturbances import TRIALS, interrupts, torn_reads


class Training:
    """A layer in a graph with its optimiser."""

    def __init__(self, size=96, gather=False):
        self.graph = tf.Graph()
        with self.graph.as_default():
            self.x = tf.placeholder(tf.int32 if gather else tf.float32, [None] if gather else [None, size])
            start = np.linspace(-1, 1, size * size, dtype="f4").reshape(size, size)
            self.w = tf.Variable(start, name="w")
            rows = tf.gather(self.w, self.x) if gather else self.x
            self.loss = tf.reduce_mean(tf.square(tf.matmul(rows, self.w)))
            self.step = tf.train.AdamOptimizer(0.01).minimize(self.loss)
            init = tf.global_variables_initializer()
        self.session = tf.Session(graph=self.graph)
        self.session.run(init)
        self.feed = {self.x: np.array([1, 2, 3], "i4") if gather else np.ones((4, size), "f4")}

    def run(self, feed=None):
        return self.session.run([self.step, self.loss], feed or self.feed)[1]

    def state(self):
        return {s: self.session.get(s) for s in self.session._values}

    def pointers(self):
        return [t._val.buf.ptr for t in self.session._values.values()]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("gather", [False, True])
def test_variables_stay_where_they_are(gather):
    job = Training(gather=gather)
    for _ in range(3):
        job.run()
    before = job.pointers()
    assert len(before) >= 3
    for _ in range(3):
        job.run()
    assert job.pointers() == before


def test_the_bits_are_those_of_the_plain_way(monkeypatch):
    job, plain = Training(), Training()
    monkeypatch.setattr("duo.graph.session.quicken", lambda *a: None)
    expected = [plain.run() for _ in range(6)]
    monkeypatch.undo()
    assert [job.run() for _ in range(6)] == expected and same(job.state(), plain.state())
    assert job.session is not plain.session and len(set(expected)) == 6


def test_fetched_values_and_copies_are_kept():
    job = Training()
    job.run()
    fetched, got = job.session.run(job.w), job.session.get(job.w._state)
    copies = fetched.copy(), got.copy()
    _, both = job.session.run([job.step, job.w], job.feed)
    kept = both.copy()
    for _ in range(3):
        job.run()
    assert np.array_equal(fetched, copies[0]) and np.array_equal(got, copies[1]) and np.array_equal(both, kept)
    assert not np.array_equal(job.session.run(job.w), kept)


def test_an_exposed_variable_and_its_aliases_see_every_step():
    job, twin = Training(), Training()
    job.run()
    tensor = job.session.variable_tensor(job.w)
    alias, clone = tensor.detach(), tensor.detach().clone()
    before = clone.numpy().copy()
    twin.run()
    for _ in range(3):
        job.run()
        twin.run()
        now = twin.session.run(twin.w)
        assert np.array_equal(alias.numpy(), now) and np.array_equal(tensor.detach().numpy(), now)
    assert np.array_equal(clone.numpy(), before)


def test_parameters_of_modules_are_overwritten_where_they_are():
    """A module applied to a placeholder: its parameters are eager tensors, which the run reads and writes."""
    with tf.Graph().as_default() as graph:
        duo.manual_seed(0)
        model = nn.Linear(96, 96)
        x = tf.placeholder(tf.float32, [None, 96])
        step = duo.optim.SGD(model.parameters(), lr=0.1).minimize(tf.reduce_mean(tf.square(model(x))))
        session = tf.Session(graph=graph)
        session.run(tf.global_variables_initializer())
        feed = {x: np.ones((4, 96), "f4")}
        for _ in range(3):
            session.run(step, feed)
        where = model.weight._val.buf.ptr
        session.run(step, feed)
        assert model.weight._val.buf.ptr == where
        pending, before = model.weight * 1.0, model.weight.detach().clone()
        session.run(step, feed)
        assert pending.tolist() == before.tolist() != model.weight.tolist()


def test_a_failing_run_leaves_the_variables():
    job = Training(gather=True)
    for _ in range(3):
        job.run()
    before = job.state()
    with pytest.raises(IndexError):
        job.run({job.x: np.array([1, 9999, 3], "i4")})
    assert same(job.state(), before)
    assert np.isfinite(job.run())


def test_interrupts_find_every_variable_whole():
    job, twin = Training(), Training()
    for _ in range(3):
        job.run()
        twin.run()
    hits = 0
    with interrupts(1e-6, 1.5e-4) as disturbed:
        for _ in range(TRIALS):
            old = job.state()
            hits += disturbed(job.run)
            new = job.state()
            for mine, value in zip(twin.session._values, old.values(), strict=True):
                twin.session.put(mine, value)
            twin.run()
            assert same(new, old) or same(new, twin.state())  # all of them together
    assert hits > 20


def test_other_threads_read_whole_values():
    with tf.Graph().as_default() as graph:
        w = tf.Variable(np.ones((700, 700), "f4"))
        step, value, init = tf.assign_add(w, tf.ones([700, 700])), w * 1.0, tf.global_variables_initializer()
    session = tf.Session(graph=graph)
    session.run(init)
    torn = torn_reads(
        lambda: [session.run(value), session.get(w._state)], lambda: session.run(step.op), 200
    )
    assert not torn and session.run(w)[0, 0] == 201.0
