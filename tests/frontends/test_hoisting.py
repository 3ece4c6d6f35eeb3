"""Replays that only read parameters keep what they make of them, and never use it once a value has changed: each row is equal to plain eager."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn, optim, runtime


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(16, 256)
        self.fc2 = nn.Linear(256, 20)

    def forward(self, x):
        h = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.fc2(self.fc1(h).relu())


class World:
    """A model, plain or compiled; `train` is compiled where the model is."""

    def __init__(self, wrap):
        duo.manual_seed(3)
        self.net = Net().eval()
        self.opt = optim.Adam(self.net.parameters(), lr=0.05)
        self.x, self.many = duo.randn(1, 3, 6, 5), duo.randn(4, 3, 6, 5)
        self.wrap, self.infer, self.train = wrap, wrap(lambda x: self.net(x)), wrap(self._train)

    def _train(self):
        self.opt.zero_grad()
        loss = self.net(self.many).square().mean()
        loss.backward()
        self.opt.step()
        return loss

    def call(self, times=1):
        rows = []
        for _ in range(times):
            with duo.inference_mode():
                rows.append(self.infer(self.x).numpy().copy())
        return rows

    @property
    def hoisted(self):
        return "hoisted" in self.infer.explain()


def same(a, b):
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b))


CHANGES = {}


def change(function):
    CHANGES[function.__name__] = function
    return function


@change
def an_eager_step(w):
    w._train()


@change
def a_compiled_step(w):
    w.train()


@change
def many_compiled_steps(w):
    for _ in range(6):
        w.train()


@change
def data_copied(w):
    w.net.fc1.weight.data.copy_(w.net.fc1.weight.detach() * 2)


@change
def data_assigned(w):
    w.net.fc1.weight.data = duo.ones(256, 16)


@change
def data_shared(w):
    w.array = duo.ones(256, 16)
    w.net.fc1.weight.data = w.array
    w.call(6)
    w.array.mul_(3.0)


@change
def data_tied(w):
    """One parameter has the other's memory, until that is written."""
    w.net.fc1.weight.data = w.net.fc2.weight.data.view(-1)[:4096].view(256, 16)
    w.call(6)
    with duo.no_grad():
        w.net.fc2.weight.mul_(1.5)
    w.call()
    w.net.fc1.weight.data = duo.ones(256, 16)


@change
def a_state_dict_loaded(w):
    w.net.load_state_dict({k: v * 2 for k, v in w.net.state_dict().items()})


@change
def in_place(w):
    with duo.no_grad():
        w.net.fc1.weight.mul_(2.0)


@change
def in_place_on_a_copy_that_shares(w):
    w.net.fc1.weight.detach().add_(1.0)


@change
def a_row_written(w):
    with duo.no_grad():
        w.net.fc1.weight[3] = 7.0


@change
def a_numpy_view_written(w):
    w.array = w.net.fc1.weight.detach().numpy()
    w.array *= 2


@change
def a_numpy_view_written_and_dropped(w):
    array = w.net.fc1.weight.detach().numpy()
    array[2] = 5
    del array


@change
def an_array_lent(w):
    w.array = np.ones((256, 16), np.float32)
    w.net.fc1.weight.data = duo.from_numpy(w.array)
    w.call()
    w.array[3] = 2


@change
def statistics(w):
    w.net.train()
    w.net(w.many)
    w.net.eval()


@change
def statistics_in_place(w):
    w.net.norm.running_var.mul_(3.0)


@change
def a_parameter_replaced(w):
    w.net.fc1.weight = nn.Parameter(duo.ones(256, 16))


@change
def a_bias(w):
    w.net.fc1.bias.data.add_(1.0)


@change
def a_frozen_parameter(w):
    w.net.fc1.weight.requires_grad_(False)
    w.net.fc1.weight.mul_(2.0)


@change
def a_graph_trains(w):
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, [None, 3, 6, 5])
        step = optim.SGD(w.net.parameters(), lr=0.5).minimize(tf.reduce_mean(tf.square(w.net(x))))
        with tf.Session() as session:
            session.run(tf.global_variables_initializer())
            session.run(step, {x: w.many.numpy()})


@change
def training_mode_and_back(w):
    w.net.train()
    w.call(5)
    w.net.eval()


@change
def another_input(w):
    w.x = w.many


@change
def threads(w):
    duo.set_num_threads(1 if duo.get_num_threads() > 1 else 2)


@pytest.fixture(autouse=True)
def _threads():
    before = duo.get_num_threads()
    yield
    duo.set_num_threads(before)


@pytest.mark.parametrize("name", CHANGES)
def test_never_stale(name):
    plain, compiled = World(lambda f: f), World(duo.compile)
    assert same(plain.call(6), compiled.call(6))
    assert compiled.hoisted
    for _ in range(2):
        for w in (plain, compiled):
            CHANGES[name](w)
        assert same(plain.call(6), compiled.call(6))
    plain.array = compiled.array = None
    assert same(plain.call(6), compiled.call(6))
    assert compiled.hoisted


def test_training_and_inference_by_turns():
    plain, compiled = World(lambda f: f), World(duo.compile)
    for calls in (1, 1, 1, 1, 1, 2, 3, 4, 8, 1, 1):
        for w in (plain, compiled):
            w.train()
        assert same(plain.call(calls), compiled.call(calls))


def test_hoisted_only_when_the_values_have_stayed():
    w = World(duo.compile)
    seen = []
    for _ in range(5):
        w.call()
        seen.append(w.hoisted)
    assert seen == [False, False, False, True, True]
    w.net.fc1.weight.data.mul_(2.0)
    w.call()
    assert not w.hoisted
    w.call(3)
    assert w.hoisted


def test_another_thread_trains():
    """Every result is one of a model between two steps."""
    plain, compiled = World(lambda f: f), World(duo.compile)
    steps = 25
    allowed = set()
    for _ in range(steps):
        allowed.add(plain.call()[0].tobytes())
        in_one_go(plain)
    allowed.add(plain.call()[0].tobytes())
    compiled.call(6)
    assert compiled.hoisted

    def train():
        for _ in range(steps):
            in_one_go(compiled)

    thread = threading.Thread(target=train)
    thread.start()
    seen = [compiled.call()[0].tobytes()]
    while thread.is_alive():
        seen.append(compiled.call()[0].tobytes())
    thread.join()
    seen += [r.tobytes() for r in compiled.call(6)]
    assert set(seen) <= allowed
    assert seen[-1] == plain.call()[0].tobytes()
    assert compiled.hoisted


def in_one_go(w):
    """A change of one value, which no other thread sees half done."""
    with duo.no_grad():
        w.net.fc1.weight.mul_(1.125)


def kept_values(w):
    """What a hoisted replay has made of its parameters."""
    (replay,) = [r for r in w.infer._replays.values() if r.hoisted]
    return [x for x in replay.run.__globals__.values() if isinstance(x, runtime.Buffer)]


def test_what_was_kept_goes_with_the_values():
    w = World(duo.compile)
    w.call(6)
    made = [weakref.ref(b) for b in kept_values(w)]
    old = weakref.ref(w.net.fc1.weight._val.buf)
    assert len(made) >= 2
    assert all(r() is not None for r in made)
    gc.disable()
    try:
        with duo.no_grad():
            w.net.fc1.weight.mul_(2.0)
        w.call()
        assert all(r() is None for r in made)
        assert old() is None
    finally:
        gc.enable()


def test_what_was_kept_goes_with_the_function():
    w = World(duo.compile)
    w.call(6)
    made = [weakref.ref(b) for b in kept_values(w)]
    w.infer = None
    gc.collect()
    assert all(r() is None for r in made)


def test_training_overwrites_in_place_again_after_one_step():
    w = World(duo.compile)
    for _ in range(3):
        w.train()
    w.call(6)
    assert w.hoisted
    w.train()
    w.train()
    at = w.net.fc1.weight._val.buf.ptr
    for _ in range(3):
        w.train()
        assert w.net.fc1.weight._val.buf.ptr == at


def test_switched_off(monkeypatch):
    monkeypatch.setenv("DUO_HOIST", "0")
    plain, w = World(lambda f: f), World(duo.compile)
    assert same(plain.call(6), w.call(6))
    assert not w.hoisted


def test_interpreted_programs_are_not_hoisted_and_equal():
    want = World(duo.compile).call(6)
    runtime.set_backend("interpret")
    try:
        w = World(duo.compile)
        assert same(w.call(6), want)
        assert not w.hoisted
    finally:
        runtime.set_backend("cpu")


def test_little_in_front_of_products_is_left_alone():
    net = nn.Linear(8, 4)
    f = duo.compile(net)
    for _ in range(8):
        with duo.inference_mode():
            assert same([f(duo.ones(1, 8)).numpy()], [net(duo.ones(1, 8)).numpy()])
    assert "hoisted" not in f.explain()


def test_gradients_are_recorded_as_before():
    plain, w = World(lambda f: f), World(duo.compile)
    for world in (plain, w):
        for _ in range(6):
            world.infer(world.x).sum().backward()
    assert same(*[[p.grad.numpy() for p in world.net.parameters()] for world in (plain, w)])
    assert not w.hoisted


# ------------------------------------------------------------------------------------------------------------ sessions
class GraphWorld:
    """A graph of variables of a session and of a module's parameters, and a session."""

    def __init__(self):
        rng = np.random.default_rng(5)
        duo.manual_seed(4)
        self.net = nn.Linear(64, 8)
        with tf.Graph().as_default() as self.graph:
            self.x = tf.placeholder(tf.float32, [None, 40])
            self.w = tf.get_variable("w", initializer=rng.standard_normal((40, 64)).astype("f4"))
            self.b = tf.get_variable("b", initializer=rng.standard_normal(64).astype("f4"))
            self.y = self.net(tf.nn.relu(tf.matmul(self.x, self.w) + self.b))
            self.double = tf.assign(self.w, self.w * 2.0)
            self.step = tf.train.AdamOptimizer(0.1).minimize(tf.reduce_mean(tf.square(self.y)))
            self.session = tf.Session()
            self.session.run(tf.global_variables_initializer())
        self.data = rng.standard_normal((2, 40)).astype("f4")

    def call(self, times=1):
        return [self.session.run(self.y, {self.x: self.data}) for _ in range(times)]

    @property
    def hoisted(self):
        programs = [p for c in self.session._calls.values() for p in c.programs.values()]
        forms = [getattr(p.quick, "__globals__", {}) for p in programs]
        return any(isinstance(x, runtime.Buffer) for names in forms for x in names.values())


GRAPH_CHANGES = {
    "nothing": lambda w: None,
    "assigned": lambda w: w.session.run(w.double),
    "assigned and read": lambda w: w.session.run([w.double, w.y], {w.x: w.data}),
    "trained": lambda w: [w.session.run(w.step, {w.x: w.data}) for _ in range(3)],
    "loaded": lambda w: w.w.load(np.ones((40, 64), "f4"), w.session),
    "a bias": lambda w: w.b.load(np.ones(64, "f4"), w.session),
    "a parameter": lambda w: w.net.weight.data.mul_(3.0),
    "seen by eager mode": lambda w: w.session.variable_tensor(w.w).data.add_(1.0),
    "other rows": lambda w: setattr(w, "data", np.concatenate([w.data, w.data])),
    "many rows": lambda w: setattr(w, "data", np.repeat(w.data, 20, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPH_CHANGES)
def test_sessions_are_never_stale(name, monkeypatch):
    worlds = []
    for on in (False, True):
        with monkeypatch.context() as m:
            m.setattr("duo.graph.in_place.is_on", lambda on=on: on)
            w, rows = GraphWorld(), []
            rows += w.call(6)
            for _ in range(2):
                GRAPH_CHANGES[name](w)
                rows += w.call(6)
            worlds.append((w, rows))
    (off, plain), (on, rows) = worlds
    assert same(plain, rows)
    assert on.hoisted and not off.hoisted


def test_a_run_that_assigns_keeps_nothing():
    w = GraphWorld()
    for _ in range(6):
        w.session.run([w.double, w.y], {w.x: w.data})
    assert not w.hoisted
