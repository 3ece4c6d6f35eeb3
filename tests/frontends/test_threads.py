"""Eager mode under threads, fork, signals, failing kernels' neighbours, and traces that never repeat."""

import linecache
import os
import random
import resource
import signal
import sys
import threading
import traceback

import numpy as np
import pytest

import duo
from duo import nn, runtime
from duo.eager.trace import forget
from tests.frontends.disturbances import interrupts
from tests.frontends.eager_modes import flush_policy, numbers

TRIALS = int(os.environ.get("DUO_SIGNAL_TRIALS", "1000"))


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
        t.join(200)
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
            signal.alarm(200)  # instead of hanging for ever
            assert train(model, 6, seed=9) == expected
            assert (big @ big).tolist() == product
            assert pending[0].tolist() == (big[0] + 1).tolist()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os.write(write, bytes([code]))
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0 and os.read(read, 1) == b"\0"
    os.close(read)
    os.close(write)
    assert train(model, 6, seed=9) == expected and pending[0].tolist() == (big[0] + 1).tolist()


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


def interrupted_at(event, work):
    """Runs work() with a KeyboardInterrupt at that line or call of the frontends, counted from the start; how many there were. (In the backends a
    tracer would raise inside a `with` of a lock that is about to be released, where no signal arrives. In the frontends it raises a line later:
    the line of the `with` comes again when it is left.)"""
    count = 0

    def tracer(frame, kind, arg):
        nonlocal count
        if frame.f_globals.get("__name__", "").partition(".")[0] != "duo":
            return None
        count += 1
        if 0 < event <= count and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            raise KeyboardInterrupt
        return tracer

    before = sys.gettrace()
    try:
        sys.settrace(tracer)
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count


class Undisturbed:
    """A little of everything, and what it gives."""

    def __init__(self):
        self.model = make_model(4)
        self.params = list(self.model.parameters())
        self.x, self.y = duo.tensor(numbers(6, 4)), duo.tensor(numbers(6, 2, seed=1))
        self.before = [p.tolist() for p in self.params]
        self.kept = []
        self.work()
        self.expected = self.values()
        for _ in range(3):
            self.work()

    def work(self):
        self.kept = []
        for k in range(3):
            loss = nn.functional.mse_loss(self.model(self.x), self.y)
            if k:
                loss.item()
            with duo.no_grad():
                view = (loss * 2).view(1)
                view += 1
            self.kept.append((duo.autograd.grad(loss, self.params), loss, view))

    def values(self):
        return [([g.tolist() for g in grads], loss.item(), view.item()) for grads, loss, view in self.kept]

    def check(self):
        """What was finished before an interrupt is right, and all of it once more."""
        duo.set_grad_enabled(True)
        assert self.values() == self.expected[: len(self.kept)]
        self.work()
        assert self.values() == self.expected
        assert [p.tolist() for p in self.params] == self.before


def test_interrupts_never_corrupt_a_trace():
    job = Undisturbed()
    total = interrupted_at(0, job.work)
    assert total > 500
    rng = random.Random(0)
    for trial in range(TRIALS):
        if trial % 25 == 24:
            forget()  # a fresh trie: interrupts fall into inference and planning too
        interrupted_at(rng.randint(1, total), job.work)
        job.check()


def test_alarms_never_corrupt_a_trace(alarm):
    job = Undisturbed()
    rng, count = random.Random(0), 0

    def work():
        for _ in range(2000):  # more than the alarm waits for; it may be lost in a callback of the interpreter, though
            job.work()

    for _ in range(TRIALS // 5):
        count += interrupted(alarm, rng.random() * 0.01 + 1e-6, work)
        job.check()
    assert count > TRIALS // 20, f"only {count} interrupts came in time"


def test_interrupted_training_goes_on_from_a_step():
    """Parameters after an interrupt are those of some step of the undisturbed run, and training goes on from there."""
    reference, weights = make_model(5), []
    opt = duo.optim.SGD(reference.parameters(), lr=0.05)
    train(reference, 6, opt=opt, each=lambda: weights.append([p.tolist() for p in reference.parameters()]))
    weights.insert(0, [p.tolist() for p in make_model(5).parameters()])

    def prepare():
        model, done = make_model(5), []
        opt = duo.optim.SGD(model.parameters(), lr=0.05)
        return model, done, opt, lambda: train(model, 6, opt=opt, each=lambda: done.append(1))

    total = interrupted_at(0, prepare()[3])
    rng = random.Random(1)
    for _ in range(TRIALS // 4):
        model, done, opt, work = prepare()
        interrupted_at(rng.randint(1, total), work)
        duo.set_grad_enabled(True)
        now = [p.tolist() for p in model.parameters()]
        possible = weights[len(done) : len(done) + 2]
        if now not in possible:  # it came between two parameters' updates: each is of one of the two steps
            assert all(any(p == step[i] for step in possible) for i, p in enumerate(now))
            continue
        k = len(done) + possible.index(now)
        train(model, 6 - k, seed=k, look=1, opt=opt)
        assert [p.tolist() for p in model.parameters()] == weights[-1]


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
        signal.setitimer(signal.ITIMER_REAL, 0.0005)

    before = signal.signal(signal.SIGALRM, handler)
    handler()
    try:
        expected = None
        for _ in range(300):
            w = duo.tensor(numbers(5), requires_grad=True)
            ((w * 3).tanh() * w + w.exp()).sum().backward()
            got = w.grad.tolist()
            expected = got if expected is None else expected
            assert got == expected
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # first: a handler that runs just now sets the timer again
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen == [3.0 * k for k in range(len(seen))] and len(seen) > 3


# ------------------------------------------------------------------------------------------- traces that never repeat
def test_traces_that_never_repeat():
    """Every length of a Python loop is a path of its own. Each is planned once and none is compiled as a whole; they share their kernels, one
    for each kind of op, so no more machine code is made; time and memory grow with the number of ops alone."""
    w = duo.tensor(numbers(4, 4) * 0.3, requires_grad=True)
    x = duo.tensor(numbers(2, 4))

    def run(length):
        h = x
        for _ in range(length):
            h = (h @ w).tanh()
        loss = h.sum()
        loss.backward()
        w.grad = None
        return loss.item()

    for length in (1, 2, 3):
        run(length)
    statistics = duo.debug.statistics()
    kernels, fused, compiled = runtime.backend().compile_count, statistics.fused, statistics.compiled
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length in random.Random(0).sample(range(4, 44), 40):
        assert np.isfinite(run(length))
    assert statistics.fused == fused and statistics.compiled - compiled <= 40
    assert runtime.backend().compile_count - kernels <= 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 150 << 10  # KiB


def test_interrupted_training_keeps_its_parameters(tmp_path):
    """Interrupts at random moments of steps with large parameters: everything can be read afterwards and is finite."""
    trials = min(TRIALS, 300)
    duo.manual_seed(0)
    model = duo.nn.Linear(150, 150)
    optimizer = duo.optim.Adam(model.parameters(), lr=1e-3)
    x = duo.randn(8, 150)
    def steps():
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    hits = 0
    with interrupts(1e-5, 5e-4) as disturbed:
        for _ in range(trials):
            hits += disturbed(steps)
            tensors = [*model.parameters(), *[v for s in optimizer.state.values() for v in s.values()]]
            assert all(np.isfinite(t.detach().numpy()).all() for t in tensors)
    assert hits > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork_while_another_thread_flushes():
    """The child computes anew what a thread of the parent was computing: that thread does not exist there, and holds nothing up."""
    x = duo.full((640, 640), 1 / 640)
    for _ in range(2):  # as a whole from now on
        value = x
        for _ in range(60):
            value = value @ x
        running = threading.Event()

        def work(value=value, running=running):
            running.set()
            value.tolist()

        thread = threading.Thread(target=work)
        thread.start()
        running.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(200)
            ok = abs(value.sum().item() - 640) < 1
            os._exit(0 if ok else 1)
        _, status = os.waitpid(child, 0)
        thread.join()
        assert status == 0 and abs(value.sum().item() - 640) < 1
