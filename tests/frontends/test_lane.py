"""Lanes (duo/eager/lane.py): short paths that come again give what they gave the first time, whatever is different around them."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

import duo
from duo import runtime
from duo.eager import lane, native
from duo.eager.flush import flush
from duo.eager.hooks import RemovableHook
from duo.eager.trace import hooks, state
from tests.frontends.disturbances import TRIALS, interrupts

TIMES = lane.AFTER + 4
A = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)


@pytest.fixture(autouse=True, params=["python", "native"])
def of_its_own(request, monkeypatch):
    """Paths start new, with an empty trace; native code (duo/eager/native.py) takes part from the beginning, or not at all."""
    duo.synchronize()
    runtime.clear_cache()
    monkeypatch.setattr(hooks, "repeated", lambda: None)
    native.install() if request.param == "native" else native.remove()
    yield
    duo.synchronize()
    native.remove()


@pytest.fixture
def taken(monkeypatch):
    """Whether each lane that was tried had its way, in order."""
    found: list[bool] = []
    write = lane.write

    def watched(plan, program):
        made = write(plan, program)

        def tried(trace, entries):
            found.append(False)
            found[-1] = made(trace, entries)
            return found[-1]

        return tried if made is not None else None

    monkeypatch.setattr(lane, "write", watched)
    return found


def plain() -> bool:
    """Whether programs are compiled, flushes come when values are looked at, and lanes are those written in Python."""
    return hooks.flush is flush and not runtime._use_interpreter and hooks.policy is None and os.environ.get("DUO_VERIFY") != "1"


def test_a_path_that_comes_again_takes_its_lane(taken):
    a, b = duo.tensor(A), duo.tensor(A.T.copy())
    first = (a @ b).numpy().copy()
    for _ in range(TIMES):
        assert np.array_equal((a @ b).numpy(), first)
        assert a.sum().item() == a.sum().numpy()
    assert not plain() or taken.count(True) > TIMES


@pytest.mark.parametrize("steps", [lane.MAX_ENTRIES - 4, lane.MAX_ENTRIES + 1])
def test_long_paths(taken, steps):
    a = duo.tensor(A)
    found = []
    for k in range(TIMES):
        y = a
        for _ in range(steps):
            y = y * 0.5 + 0.25 * k if y is a else y * 0.5
        found.append(y.numpy())
    expected = A.copy()
    for j in range(steps):
        expected = expected * np.float32(0.5) + np.float32(0.25 * (TIMES - 1) if j == 0 else 0)
    assert np.array_equal(found[-1], expected) and not np.array_equal(found[0], found[-1])
    if plain():
        assert all(taken) and bool(taken) == (steps < lane.MAX_ENTRIES)


def test_values_alive_in_turns(taken):
    """A value between is kept or not: each has its own program, and a lane for the one refuses the other."""
    x = duo.tensor(A)
    for k in range(4 * TIMES):
        between = x * 2.0
        if k % 3 == 0:
            between, y = None, between + 1.0
        else:
            y = between + 1.0
        assert np.array_equal(y.numpy(), A * np.float32(2) + np.float32(1))
        assert between is None or np.array_equal(between.numpy(), A * np.float32(2))
    assert not plain() or {True, False} <= set(taken)


@pytest.mark.filterwarnings("ignore:overflow")
def test_scalars_are_those_of_the_call(taken):
    x = duo.tensor(A)
    for k in range(2 * TIMES):
        assert np.array_equal((x * float(k) + k).numpy(), A * np.float32(k) + np.float32(k))
    for value, kind in [(1.0, np.float16), (1e9, np.float16)]:
        h = duo.tensor(A.astype(kind))
        for _ in range(TIMES):
            assert np.array_equal((h * value).numpy(), A.astype(kind) * kind(value))


def test_results_are_memory_of_their_own():
    x = duo.tensor(A)
    held = [(x * float(k)).numpy() for k in range(2 * TIMES)]
    for k, array in enumerate(held):
        assert np.array_equal(array, A * np.float32(k))
        array[:] = 7
    assert np.array_equal(x.numpy(), A)


def test_a_dead_input_is_still_overwritten():
    x = duo.ones(128, 128)
    duo.synchronize()
    for _ in range(TIMES):
        (x * 2.0).numpy()
    before, value = runtime.statistics.overwritten, 1.0
    for _ in range(TIMES):
        x = x * 2.0
        duo.synchronize()
        value *= 2
    assert x[0, 0].item() == value
    assert runtime._use_interpreter or hooks.policy is not None or runtime.statistics.overwritten - before == TIMES * 128 * 128 * 4


def test_errors_are_those_of_the_general_way(taken):
    table = duo.tensor(A)
    for _ in range(TIMES):
        assert np.array_equal(table[duo.tensor([1, 2])].numpy(), A[[1, 2]])
    for _ in range(2):
        bad = duo.tensor([1, 99])
        with pytest.raises(IndexError, match="99"):
            table[bad].numpy()
    assert np.array_equal(table[duo.tensor([3, 2])].numpy(), A[[3, 2]])
    assert not plain() or True in taken


def test_gradients_and_hooks_go_the_general_way(taken):
    w = duo.tensor(A).requires_grad_()
    for _ in range(TIMES):
        y = (w * 2.0).sum()
        assert y.item() == pytest.approx(2 * A.sum(dtype=np.float64), rel=1e-4)
        w.grad = None
        y.backward()
        assert np.array_equal(w.grad.numpy(), np.full_like(A, 2))
    called: list[object] = []
    for _ in range(TIMES):
        y = w * 3.0
        assert isinstance(y.register_hook(called.append), RemovableHook)
        y.sum().backward()
        duo.synchronize()
    assert len(called) == TIMES
    with duo.no_grad():
        for _ in range(2 * TIMES):
            assert np.array_equal((w * 2.0).numpy(), A * 2)


def test_threads_and_their_number():
    a, b = duo.tensor(A), duo.tensor(A.T.copy())
    want, count = (a @ b).numpy().copy(), duo.get_num_threads()
    wrong = []

    def work():
        for _ in range(50):
            if not np.array_equal((a @ b).numpy(), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    try:
        for n in (1, 2, 3, 1):
            duo.set_num_threads(n)
            work()
    finally:
        duo.set_num_threads(count)
        for t in threads:
            t.join()
    assert not wrong


def test_interrupts_find_values_whole():
    a, b = duo.tensor(A), duo.tensor(A.T.copy())
    want = (a @ b).numpy().copy()
    made = []

    def work():
        for _ in range(20):
            made.append(a @ b)
            made[-1].numpy()

    hits = 0
    with interrupts(1e-6, 2e-4) as disturbed:
        for _ in range(TRIALS):
            made.clear()
            hits += disturbed(work)
            assert all(np.array_equal(y.numpy(), want) for y in made)
    assert hits > 20
    assert np.array_equal((a @ b).numpy(), want) and len(state.trace.entries) == 1
