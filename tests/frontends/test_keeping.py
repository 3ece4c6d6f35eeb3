"""Eager programs that only read the state of modules keep what they make of it, and never use it once a value has changed: each row is equal to what
programs give that keep nothing."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import numpy as np
import pytest

import duo
from duo import nn, runtime
from duo.eager import keeping, lane, native
from duo.eager.trace import hooks
from tests.frontends.test_hoisting import CHANGES, World, in_one_go, same
from tests.frontends.test_lane import plain

CALLS = lane.AFTER + 6


@pytest.fixture(autouse=True, params=["python", "native"])
def of_its_own(request, monkeypatch):
    """Paths start new; native code takes part from the beginning, or not at all."""
    duo.synchronize()
    runtime.clear_cache()
    monkeypatch.setattr(hooks, "repeated", lambda: None)
    native.install() if request.param == "native" else native.remove()
    threads = duo.get_num_threads()
    yield
    duo.set_num_threads(threads)
    duo.synchronize()
    native.remove()


def eager(function):
    return function


def world(monkeypatch, on=True):
    """An eager world whose programs keep something, or never do."""
    monkeypatch.setenv("DUO_HOIST", "1" if on else "0")
    duo.synchronize()
    runtime.clear_cache()
    return World(eager)


def kept_of(net):
    """What programs keep of the values that a module's state has now."""
    found = []
    for tensor in [*net.parameters(), *net.buffers()]:
        found += [mark.kept for mark in getattr(tensor._val, "kept", {}).values() if mark.kept is not None]
    return found


def keeps(net):
    return bool(kept_of(net)) or not plain()


@pytest.mark.parametrize("name", CHANGES)
def test_never_stale(name, monkeypatch):
    rows = []
    for on in (False, True):
        w, mine = world(monkeypatch, on), []
        mine += w.call(CALLS)
        assert not on or keeps(w.net)
        for _ in range(2):
            CHANGES[name](w)
            mine += w.call(CALLS)
        w.array = None
        mine += w.call(CALLS)
        assert bool(kept_of(w.net)) == on or not plain()
        rows.append(mine)
    assert same(*rows)


def test_training_and_inference_by_turns(monkeypatch):
    rows = []
    for on in (False, True):
        w, mine = world(monkeypatch, on), []
        for calls in (1, 1, 1, 1, 1, 2, 3, 4, 8, 12, 1, 1, 9):
            w.train()
            mine += w.call(calls)
        rows.append(mine)
    assert same(*rows)


def test_kept_only_when_the_values_have_stayed(monkeypatch):
    w = world(monkeypatch)
    seen = []
    for _ in range(12):
        w.call()
        seen.append(bool(kept_of(w.net)))
    assert not any(seen[:3])
    assert seen == sorted(seen)
    assert keeps(w.net)
    with duo.no_grad():
        w.net.fc1.weight.mul_(2.0)
    w.call(CALLS)
    assert keeps(w.net)


def test_what_was_kept_goes_with_the_values(monkeypatch):
    if not plain():
        pytest.skip("programs are of single ops, of which some do not read the weight, or keep nothing")
    w = world(monkeypatch)
    w.call(CALLS)
    made = [weakref.ref(b) for k in kept_of(w.net) for b in k.made]
    old = weakref.ref(w.net.fc1.weight._val.buf)
    assert len(made) >= 2
    gc.disable()
    try:
        with duo.no_grad():
            w.net.fc1.weight.mul_(2.0)
        w.call()
        assert all(r() is None for r in made)
        assert old() is None
    finally:
        gc.enable()


def test_what_was_kept_goes_with_the_module(monkeypatch):
    w = world(monkeypatch)
    w.call(CALLS)
    made = [weakref.ref(b) for k in kept_of(w.net) for b in k.made]
    assert made or not plain()
    w.net = w.opt = None
    gc.collect()
    assert all(r() is None for r in made)


def test_training_overwrites_in_place_again_after_one_step(monkeypatch):
    if not plain():
        pytest.skip("the interpreter overwrites nothing")
    w = world(monkeypatch)
    w.train = duo.compile(w._train)
    for _ in range(3):
        w.train()
    w.call(CALLS)
    assert keeps(w.net)
    w.train()
    w.train()
    at = w.net.fc1.weight._val.buf.ptr
    for _ in range(3):
        w.train()
        assert w.net.fc1.weight._val.buf.ptr == at


def test_programs_share_what_they_make_alike(monkeypatch):
    w = world(monkeypatch)
    other = duo.randn(1, 3, 6, 5)
    w.call(CALLS)
    for _ in range(CALLS):
        with duo.inference_mode():
            w.net(w.x).numpy()  # ends inside of the mode: another path
        with duo.inference_mode():
            out = w.net(other)
        out.numpy()
    found = kept_of(w.net)
    if plain():
        assert len(found) > 1
        assert len({id(k.made) for k in found}) < len(found)


def test_tensors_that_are_no_state_are_read_anew(monkeypatch):
    """A product of two tensors that stay the same prepares neither."""
    monkeypatch.setenv("DUO_HOIST", "1")
    a, b = duo.randn(64, 64), duo.randn(64, 64)
    for _ in range(CALLS):
        (a @ b.mT).numpy()
    assert not hasattr(a._val, "kept")
    assert not hasattr(b._val, "kept")


def test_only_what_stays_of_a_partly_frozen_model(monkeypatch):
    rows = []
    for on in (False, True):
        w, mine = world(monkeypatch, on), []
        for _ in range(2 * CALLS):
            mine += w.call(2)
            with duo.no_grad():
                w.net.fc2.bias.add_(0.25)
        assert bool(kept_of(w.net)) == on or not plain()
        rows.append(mine)
    assert same(*rows)


def test_copies_of_modules_are_state_too(monkeypatch):
    w = world(monkeypatch)
    net = copy.deepcopy(w.net)
    assert all(keeping.is_state(t) for t in [*net.parameters(), *net.buffers()])
    plain_tensor = nn.Module()
    plain_tensor.register_buffer("table", duo.ones(3))
    assert keeping.is_state(plain_tensor.table)
    plain_tensor.table = duo.zeros(3)
    assert keeping.is_state(plain_tensor.table)
    assert not keeping.is_state(duo.ones(3))


def test_results_are_memory_of_their_own(monkeypatch):
    w = world(monkeypatch)
    w.call(CALLS)
    with duo.inference_mode():
        arrays = [w.net(w.x).numpy() for _ in range(4)]
    want = arrays[0].copy()
    arrays[0][:] = 7
    arrays.append(w.call()[0])
    assert same(arrays[1:], [want] * 4)


def test_gradients_are_recorded_as_before(monkeypatch):
    rows = []
    for on in (False, True):
        w = world(monkeypatch, on)
        w.call(CALLS)
        for _ in range(3):
            w.net(w.x).sum().backward()
        rows.append([p.grad.numpy().copy() for p in w.net.parameters()])
    assert same(*rows)


def test_another_thread_trains(monkeypatch):
    """Every result is one of a model between two steps."""
    reference = world(monkeypatch, False)
    steps = 25
    allowed = set()
    for _ in range(steps):
        allowed.add(reference.call()[0].tobytes())
        in_one_go(reference)
    allowed.add(reference.call()[0].tobytes())
    w = world(monkeypatch)
    w.call(CALLS)
    assert keeps(w.net)

    def train():
        for _ in range(steps):
            in_one_go(w)
            duo.synchronize()

    thread = threading.Thread(target=train)
    thread.start()
    seen = [w.call()[0].tobytes()]
    while thread.is_alive():
        seen.append(w.call()[0].tobytes())
    thread.join()
    seen += [r.tobytes() for r in w.call(CALLS)]
    assert set(seen) <= allowed
    assert seen[-1] == reference.call()[0].tobytes()


def test_threads_share_a_model(monkeypatch):
    w = world(monkeypatch)
    want = w.call()[0].tobytes()
    bad: list[bytes] = []

    def work():
        for _ in range(40):
            got = w.call()[0].tobytes()
            if got != want:
                bad.append(got)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not bad
    assert np.isfinite(np.frombuffer(want, np.float32)).all()
