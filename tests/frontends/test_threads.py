"""Eager mode under threads, fork, signals, failing kernels' neighbours, and traces that never repeat."""

import os
import random
import signal
import threading
import time

import numpy as np
import pytest

import duo
from duo import nn
from tests.frontends.eager_modes import flush_policy, numbers

TRIALS = int(os.environ.get("DUO_SIGNAL_TRIALS", "300"))


def make_model(seed):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    for k, p in enumerate(model.parameters()):
        p.data.copy_(duo.tensor(numbers(*p.shape, seed=100 * seed + k)))
    return model


def train(model, steps, seed=0, look=3, opt=None, each=lambda: None):
    """Losses of some steps; every `look`th is looked at on the way."""
    opt = duo.optim.Adam(model.parameters(), lr=0.05) if opt is None else opt
    out = []
    for k in range(steps):
        x, y = duo.tensor(numbers(6, 4, seed=seed + k)), duo.tensor(numbers(6, 2, seed=seed + k + 50))
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        if k % look == 0:
            loss.item()
        loss.backward()
        opt.step()
        out.append(loss.detach())
        each()
    return [loss.item() for loss in out]


def in_threads(count, work):
    """Runs work(i) in `count` threads; gives their results, raises their first error."""
    results, errors = [None] * count, []
    start = threading.Barrier(count)

    def run(i):
        try:
            start.wait()
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


# ----------------------------------------------------------------------------------------------------------- threads
@pytest.mark.parametrize("policy", ["lazy", "random1"])
def test_eight_threads_training(policy):
    expected = [train(make_model(i), 12, seed=i) for i in range(8)]
    with flush_policy(policy):
        got = in_threads(8, lambda i: train(make_model(i), 12, seed=i))
    assert got == expected


def test_eight_threads_share_one_model():
    model = make_model(1)
    x = [duo.tensor(numbers(5 + i % 3, 4, seed=i)) for i in range(8)]
    expected = [model(t).tolist() for t in x]
    pending = [model(t) for t in x]  # of this thread, looked at by the others

    def work(i):
        for _ in range(30):
            assert model(x[i]).tolist() == expected[i]
            with duo.no_grad():
                assert (model(x[i]) * 2).tolist() == [[2 * v for v in row] for row in expected[i]]
        return pending[i].tolist()

    assert in_threads(8, work) == expected


def test_threads_share_parameters_with_gradients():
    """Each thread asks for gradients of its own loss on shared parameters."""
    model = make_model(2)
    params = list(model.parameters())

    def gradients(i):
        x = duo.tensor(numbers(6, 4, seed=i))
        return [g.tolist() for g in duo.autograd.grad(model(x).pow(2).sum(), params)]

    expected = [gradients(i) for i in range(8)]

    def work(i):
        return [gradients(i) for _ in range(10)]

    for i, got in enumerate(in_threads(8, work)):
        assert all(g == expected[i] for g in got)


def test_pending_values_cross_threads():
    """A chain of values, each made in another thread from the pending value of the one before, then one backward."""
    w = duo.tensor(numbers(5), requires_grad=True)
    value, expected = w, w
    for k in range(6):
        expected = (expected * 1.1 + w).tanh() + k
    (expected * expected).sum().backward()
    grad, w.grad = w.grad.tolist(), None
    for k in range(6):
        value = in_threads(1, lambda _, v=value, k=k: (v * 1.1 + w).tanh() + k)[0]
    total = in_threads(1, lambda _: (value * value).sum())[0]
    in_threads(1, lambda _: total.backward())
    assert value.tolist() == expected.tolist() and w.grad.tolist() == grad


def test_threads_look_at_each_others_pending_values():
    slots = [duo.ones(3)] * 8

    def work(i):
        x = duo.full((3,), float(i))
        for k in range(60):
            x = x + 1
            slots[i] = x * 1
            other = slots[(i + k) % 8]
            assert len(set(other.tolist())) == 1
        return x.tolist()

    assert in_threads(8, work) == [[i + 60.0] * 3 for i in range(8)]


def test_backward_while_another_thread_looks():
    stop = threading.Event()
    shared = {}

    def looker():
        while not stop.is_set():
            t = shared.get("loss")
            if t is not None:
                t.item()

    thread = threading.Thread(target=looker)
    thread.start()
    try:
        for k in range(150):
            w = duo.tensor([1.0 + k, 2.0], requires_grad=True)
            loss = (w * w).sum()
            shared["loss"] = loss
            loss.backward()
            assert w.grad.tolist() == [2.0 + 2 * k, 4.0]
    finally:
        stop.set()
        thread.join()


def test_grad_mode_and_generators_are_apart():
    def work(i):
        with duo.no_grad() if i % 2 else duo.enable_grad():
            g = duo.Generator().manual_seed(i // 2)
            for _ in range(20):
                assert duo.is_grad_enabled() == (i % 2 == 0)
                x = duo.rand(10, generator=g)
        return x.tolist()

    got = in_threads(8, work)
    assert got[0::2] == got[1::2] and got[0] != got[2]


# -------------------------------------------------------------------------------------------------------------- fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes():
    model, big = make_model(3), duo.tensor(numbers(300, 300))
    expected = train(make_model(3), 6, seed=9)
    product = (big @ big).tolist()
    pending = big + 1
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            assert train(model, 6, seed=9) == expected
            assert (big @ big).tolist() == product
            assert pending[0, 0].item() == big[0, 0].item() + 1
            code = 0
        finally:
            os.write(write, bytes([code]))
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0 and os.read(read, 1) == b"\0"
    os.close(read)
    os.close(write)
    assert train(model, 6, seed=9) == expected and pending[0, 0].item() == big[0, 0].item() + 1


# ----------------------------------------------------------------------------------------------------------- signals
@pytest.fixture
def alarm():
    """alarm(seconds): KeyboardInterrupt after that time, in the middle of whatever runs."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupted(alarm, seconds, work):
    """Runs work() with an interrupt on the way; whether it came in time."""
    try:
        try:
            alarm(seconds)
            work()
        finally:
            alarm(0)
    except KeyboardInterrupt:
        return True
    return False


def test_interrupts_never_corrupt_a_trace(alarm):
    """After an interrupt anywhere in a forward and backward pass, everything computes what it did before."""
    model = make_model(4)
    params = list(model.parameters())
    x, y = duo.tensor(numbers(6, 4)), duo.tensor(numbers(6, 2, seed=1))
    before = [p.tolist() for p in params]

    def work():
        for k in range(3):
            loss = nn.functional.mse_loss(model(x), y)
            if k:
                loss.item()
            with duo.no_grad():
                (loss * 2).sum()
            kept.append((duo.autograd.grad(loss, params), loss))

    kept = []
    work()
    expected = [[g.tolist() for g in grads] for grads, _ in kept], kept[0][1].item()
    start = time.perf_counter()
    for _ in range(5):
        work()
    duration = (time.perf_counter() - start) / 5
    rng, count = random.Random(0), 0
    for _ in range(TRIALS):
        kept = []
        count += interrupted(alarm, rng.random() * duration + 1e-6, work)
        duo.set_grad_enabled(True)
        for grads, loss in kept:  # what was finished before the interrupt is right
            assert [g.tolist() for g in grads] == expected[0][0] and loss.item() == expected[1]
        kept = []
        work()
        assert [[g.tolist() for g in grads] for grads, _ in kept] == expected[0]
    assert count > TRIALS // 4, f"only {count} of {TRIALS} interrupts came in time"
    assert [p.tolist() for p in params] == before


def test_interrupted_training_goes_on_from_a_step(alarm):
    """Parameters after an interrupt are those of some step of the undisturbed run, and training goes on from there."""
    reference, weights = make_model(5), []
    opt = duo.optim.SGD(reference.parameters(), lr=0.05)
    train(reference, 8, opt=opt, each=lambda: weights.append([p.tolist() for p in reference.parameters()]))
    start_weights = [p.tolist() for p in make_model(5).parameters()]
    rng, count = random.Random(1), 0
    for _ in range(TRIALS // 6):
        model, done = make_model(5), []
        opt = duo.optim.SGD(model.parameters(), lr=0.05)
        count += interrupted(
            alarm, rng.random() * 0.01 + 1e-6, lambda m=model, o=opt, d=done: train(m, 8, opt=o, each=lambda: d.append(1))
        )
        duo.set_grad_enabled(True)
        now = [p.tolist() for p in model.parameters()]
        steps = [start_weights, *weights]
        possible = steps[len(done) : len(done) + 2]
        if now not in possible:  # the interrupt came between two parameters' updates: each is of one of the two steps
            assert all(any(p == step[i] for step in possible) for i, p in enumerate(now))
            continue
        k = len(done) + possible.index(now)
        opt.zero_grad()
        train(model, 8 - k, seed=k, look=1, opt=opt)
        assert [p.tolist() for p in model.parameters()] == weights[-1]
    assert count > TRIALS // 30


def test_interrupts_while_compiling(alarm):
    rng = random.Random(2)
    for k in range(12):
        n = 20 + k
        x = duo.tensor(numbers(n))

        def work(x=x, n=n):
            return [((x * 2 + 1).tanh() @ duo.tensor(numbers(n, 3))).sum().item() for _ in range(3)]

        interrupted(alarm, rng.random() * 0.05 + 1e-4, work)
        duo.set_grad_enabled(True)
        expected = (np.tanh(numbers(n) * 2 + 1) @ numbers(n, 3)).sum()
        assert np.allclose(work(), expected, rtol=1e-3, atol=1e-4)


def test_a_signal_handler_may_compute():
    """A handler that records and looks, in the middle of recording."""
    seen = []

    def handler(*_):
        seen.append((duo.ones(3) * len(seen)).sum().item())

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        expected = None
        for _ in range(150):
            w = duo.tensor(numbers(5), requires_grad=True)
            ((w * 3).tanh() * w + w.exp()).sum().backward()
            got = w.grad.tolist()
            expected = got if expected is None else expected
            assert got == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen == [3.0 * k for k in range(len(seen))] and len(seen) > 3


# ------------------------------------------------------------------------------------------- traces that never repeat
def test_traces_that_never_repeat():
    """1000 lengths of a Python loop, each a path of its own: no more kernels than kinds of op, and bounded time and memory."""
    w = duo.tensor(numbers(4, 4) * 0.3, requires_grad=True)
    x = duo.tensor(numbers(2, 4))

    def run(length):
        h = x
        for _ in range(length):
            h = (h @ w).tanh()
        loss = h.sum()
        loss.backward()
        grad, w.grad = w.grad.tolist(), None
        return loss.item(), grad

    run(3)
    before = duo.debug.statistics()
    fused, compiled = before.fused, before.compiled
    start = time.perf_counter()
    lengths = random.Random(0).sample(range(1, 1001), 1000)
    seen = {length: run(length % 40 + 1 if length % 10 else length // 10) for length in lengths[:400]}
    seconds = time.perf_counter() - start
    after = duo.debug.statistics()
    assert len(seen) == 400 and all(np.isfinite(v[0]) for v in seen.values())
    assert seconds < 60
    assert after.fused - fused <= 120 and after.compiled - compiled <= 240
