"""One program, one result: Adam steps of each model give the same bits in every way of running them."""

from __future__ import annotations

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import runtime
from tests.frontends.models import (
    MODELS,
    assert_same,
    graph_of,
    loss_of,
    make,
    train_compiled,
    train_eager,
    train_graph,
    weights,
)

STEPS = {"mlp": 50, "transformer": 40, "cnn": 20}


@pytest.fixture(scope="module", params=list(MODELS))
def reference(request):
    """The name of a model, and its training in plain eager mode."""
    return request.param, train_eager(request.param, STEPS[request.param])


@pytest.fixture(autouse=True)
def restore():
    threads = duo.get_num_threads()
    yield
    duo.debug.configure(sync=False)
    duo.set_num_threads(threads)
    runtime.set_fusion(True)
    runtime.set_backend("cpu")


def test_training_learns(reference):
    name, (losses, _, _) = reference
    assert losses[-1] < 0.8 * losses[0], name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(reference, threads):
    name, want = reference
    duo.set_num_threads(threads)
    assert_same(train_eager(name, STEPS[name]), want)


def test_graph_mode(reference):
    name, want = reference
    assert_same(train_graph(name, STEPS[name]), want)


def test_compiled_step(reference):
    name, want = reference
    assert_same(train_compiled(name, STEPS[name]), want)


@pytest.mark.parametrize("run", [train_graph, train_compiled])
def test_other_modes_by_the_interpreter(reference, run):
    name, want = reference
    runtime.set_backend("interpret")
    assert_same(run(name, STEPS[name]), want)


def test_fusion_off(reference):
    name, want = reference
    runtime.set_fusion(False)
    assert_same(train_eager(name, STEPS[name]), want)


def test_interpreter(reference):
    name, want = reference
    runtime.set_backend("interpret")
    assert_same(train_eager(name, STEPS[name]), want)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_flush_points(reference, seed):
    name, want = reference
    duo.debug.configure(flush_seed=seed)
    steps = min(30, STEPS[name] * 3 // 4)
    assert_same(train_eager(name, steps), (want[0][:steps], *train_prefix(name, steps)[1:]))


def train_prefix(name, steps):
    duo.debug.configure(sync=False)
    return train_eager(name, steps)


def test_every_op_at_once(reference):
    name, want = reference
    duo.debug.configure(sync=True)
    assert_same(train_eager(name, STEPS[name]), want)


def test_loss_read_before_backward(reference):
    name, want = reference
    assert_same(train_eager(name, STEPS[name], look=True), want)


@pytest.mark.parametrize("name", list(MODELS))
def test_rows_do_not_depend_on_the_batch(name):
    model, _, _ = make(name)
    model.eval()
    _, data = MODELS[name]
    x = duo.tensor(data(65)[0])
    with duo.no_grad():
        whole = model(x).numpy()
        for k in range(1, 66):
            assert np.array_equal(model(x[:k]).numpy(), whole[:k]), k


@pytest.mark.parametrize("first", ["eager", "graph"])
@pytest.mark.parametrize("second", ["eager", "graph"])
def test_checkpoint_resumes_in_either_mode(reference, tmp_path, first, second):
    name, want = reference
    half = STEPS[name] // 2
    model, optimizer, (x, y) = make(name)
    STEP[first](model, optimizer, x, y, half)
    path = tmp_path / "half.safetensors"
    duo.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": duo.get_rng_state()}, path)
    again, optimizer, _ = make(name)
    duo.manual_seed(123)
    saved = duo.load(path)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    duo.set_rng_state(saved["rng"])
    STEP[second](again, optimizer, x, y, STEPS[name] - half)
    got = weights(again)
    assert all(np.array_equal(got[k], want[2][k]) for k in got)


def _eager_steps(model, optimizer, x, y, count):
    x, y = duo.tensor(x), duo.tensor(y)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def _graph_steps(model, optimizer, x, y, count):
    with tf.Graph().as_default(), tf.Session() as session:
        _, train, (inputs, labels) = graph_of(model, optimizer, x, y)
        for _ in range(count):
            session.run(train, {inputs: x, labels: y})


STEP = {"eager": _eager_steps, "graph": _graph_steps}
