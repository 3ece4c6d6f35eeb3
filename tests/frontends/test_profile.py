"""duo.profile: what it counts, where it puts it, and what it writes."""

import json

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn, runtime
from tests.frontends.eager_modes import numbers


@pytest.fixture
def product():
    a, b = duo.tensor(numbers(24, 40, seed=1)), duo.tensor(numbers(40, 56, seed=2))
    return lambda: a @ b


def test_a_product_is_counted_at_its_line(product):
    for _ in range(2):  # what is seen for the first time runs entry by entry, through programs that all lines share
        product().tolist()
    with duo.profile(show=False) as p:
        for _ in range(3):
            product().tolist()
    (kernel,) = [r for r in p.kernels if r.name.startswith("matmul")]
    assert kernel.calls == 3 and kernel.name == "matmul 24x40x56 f32"
    assert kernel.flops == 3 * 2 * 24 * 40 * 56 and kernel.nbytes == 3 * 4 * (24 * 40 + 40 * 56 + 24 * 56)
    assert list(kernel.lines) == [f"test_profile.py:{product.__code__.co_firstlineno}"]
    assert 0 < kernel.seconds <= kernel.core_seconds and kernel.seconds < p.seconds
    assert kernel.gflops == pytest.approx(kernel.flops / kernel.seconds * 1e-9)
    assert p.kernel_seconds == pytest.approx(sum(r.seconds for r in p.kernels)) == sum(r.seconds for r in p.lines)


def test_work_recorded_before_and_after_is_not_counted(product):
    pending = product()
    with duo.profile(show=False) as p:
        pass
    later = product()
    assert p.kernels == [] and str(p) == "duo.profile: no kernel ran"
    assert pending.tolist() == later.tolist()


def test_all_modes_are_seen():
    model = nn.Linear(8, 4)
    x = duo.tensor(numbers(5, 8))
    compiled = duo.compile(lambda t: model(t).relu().sum())
    graph = tf.Graph()
    with graph.as_default():
        feed = tf.placeholder(tf.float32, [None, 8])
        out = tf.reduce_sum(tf.nn.relu(tf.matmul(feed, tf.constant(numbers(8, 4)))))
    with tf.Session(graph=graph) as session:
        calls = [
            lambda: model(x).relu().sum().item(),
            lambda: compiled(x).item(),
            lambda: session.run(out, {feed: numbers(5, 8)}),
        ]
        for call in calls:
            call()
            call()
            with duo.profile(show=False) as p:
                call()
            assert any(r.name == "matmul 5x8x4 f32" and r.calls == 1 for r in p.kernels), p
            assert all(r.name.startswith("test_profile.py:") for r in p.lines if r.flops)


def test_several_threads_do_not_change_the_count():
    x = duo.full((1 << 21,), 0.5)
    before = duo.get_num_threads()
    try:
        for threads in (1, 2):
            duo.set_num_threads(threads)
            x.exp().sum().item()
            with duo.profile(show=False) as p:
                x.exp().sum().item()
            (row,) = [r for r in p.kernels if "sum over" in r.name]
            assert row.calls == 1 and row.core_seconds == pytest.approx(threads * row.seconds)
    finally:
        duo.set_num_threads(before)


def test_the_printed_tables_and_the_trace(product, capsys, tmp_path):
    path = tmp_path / "trace.json"
    with duo.profile(trace=path, limit=1) as p:
        product().tolist()
        product().exp().tolist()
    printed = capsys.readouterr().out
    assert printed == f"{p}\n" and "GFLOP/s" in printed and "GB/s" in printed
    assert "matmul 24x40x56 f32" in printed or "loop 1344" in printed  # whichever took longer
    assert len(p.kernels) > 1 and f"{len(p.kernels) - 1} more" in printed
    events = json.loads(path.read_text())["traceEvents"]
    assert len(events) == sum(r.calls for r in p.kernels)
    for e in events:
        assert e["ph"] == "X" and e["dur"] >= 0 and 0 <= e["ts"] <= p.seconds * 1e6 and e["args"]["line"]
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)


def test_what_does_not_fit_is_said(product):
    with duo.profile(show=False, capacity=2) as p:
        for _ in range(5):
            product().tolist()
    assert sum(r.calls for r in p.kernels) == 2 and p.lost == 3 and "3 phases more" in str(p)


def test_mistakes(product):
    with duo.profile(show=False), pytest.raises(duo.DuoError, match="one at a time"), duo.profile(show=False):
        pass
    with pytest.raises(ZeroDivisionError), duo.profile(show=False):
        product().tolist()
        1 / 0  # noqa: B018
    with duo.profile(show=False) as p:  # the failed one has ended
        product().tolist()
    assert p.kernels
    with pytest.raises(duo.DuoError, match="at least one"):
        duo.profile(capacity=0)
    runtime.set_backend("interpret")
    try:
        with pytest.raises(duo.DuoError, match="interpreter"):
            duo.profile()
    finally:
        runtime.set_backend("cpu")


def test_peaks_are_those_of_a_machine():
    peaks = runtime.peaks()
    assert peaks.gflops > 0.5 and peaks.gbytes > 0.5 and peaks.threads == duo.get_num_threads()
    assert runtime.peaks() is peaks


def test_values_are_untouched(product):
    expected = product().tolist()
    with duo.profile(show=False):
        inside = product()
    np.testing.assert_array_equal(inside.numpy(), np.asarray(expected, np.float32))
