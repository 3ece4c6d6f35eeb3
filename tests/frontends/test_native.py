"""Recording and looking by native code (duo/eager/native.py): the same bits, errors and references as Python's, and no Python where it counts."""

from __future__ import annotations

import gc
import operator
import os
import sys
import threading

import numpy as np
import pytest

import duo
from duo import nn, runtime
from duo.eager import cells, native
from duo.eager.flush import flush
from duo.eager.tensor import EagerTensor
from duo.eager.trace import END, hooks, state
from duo.eager.trie import Info
from duo_ir.errors import GradientError
from tests.frontends.disturbances import TRIALS, interrupts

TIMES = 8
A = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    duo.synchronize()
    monkeypatch.setattr(hooks, "repeated", lambda: None)
    native.install()
    if cells.layout() is None:
        pytest.skip("objects are not laid out as native code takes for granted")
    yield
    duo.synchronize()
    native.remove()


def with_and_without(program):
    """What the program gives with native code and without, several times each, as lists of arrays."""
    out = []
    for change in (native.remove, native.install, native.remove, native.install):
        change()
        out.append([[np.array(x) for x in program()] for _ in range(TIMES)])
    return out


def chain():
    x, b = duo.tensor(A), duo.tensor(A.T.copy())
    for k in range(40):
        x = (x * b + 0.5) / 2 - (b if k % 2 else 1)
    return [x.numpy(), (x @ b).numpy(), (x > 0).numpy(), (x * True).numpy(), (2 * x).numpy()]


def attributes():
    x = duo.tensor(A)
    kept = [x.sum(0, keepdim=True), x.sum(1), x.sum((0, 1)), x.reshape(4, 9), x.reshape(9, 4), x.softmax(-1), x.clamp(-0.0, 1.0), x.clamp(0.0, 1)]
    return [k.numpy() for k in kept] + [duo.cat([x, x * 2, x], 1).numpy(), duo.where(x > 0, x, 0.0).numpy()]


def branches():
    x = duo.tensor(A)
    out = []
    for k in range(6):
        y = x * 2.0 if k % 2 else x + 1.0
        y = y - 1.0 if k % 3 else y @ x
        out.append(y.numpy())
    return out


def storages():
    array = A.copy()
    x = duo.from_numpy(array)
    y = x * 2.0
    array[:] = 0
    out = [y.numpy().copy()]
    z = x + 1.0
    shown = z.numpy()
    again = np.asarray(z.detach())
    shown[0] = 7
    out += [again.copy(), z.numpy().copy(), (z * 1.0).numpy()]
    view = z[1:3]
    view.mul_(3.0)
    out += [z.detach().numpy().copy(), view.numpy(), np.asarray(z, dtype=np.float64), np.array(z), np.array(z, copy=True)]
    d = z.detach()
    d.add_(1.0)
    return [*out, z.numpy().copy(), d.numpy()]


def gradients():
    w, b = nn.Parameter(duo.tensor(A)), nn.Parameter(duo.ones(6))
    x = duo.tensor(A.T.copy())
    for _ in range(2):
        h = (x @ w + b).tanh() * w
        loss = (h * h).mean() + (w.detach() * w).sum()
        loss.backward()
    with duo.no_grad():
        seen = (w * 2.0).numpy()
    return [loss.detach().numpy(), w.grad.numpy(), b.grad.numpy(), seen]


def training():
    duo.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
    optimizer = duo.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(duo.tensor(A)), duo.tensor(A[:, :1].copy()))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [np.array(losses), *[p.detach().numpy() for p in model.parameters()]]


def shapes():
    out = []
    for shape in ((), (1,), (0, 3), (2, 1, 3), (1, 1, 1, 1, 2)):
        for kind in (np.float32, np.float16, np.int32, np.bool_):
            x = duo.tensor(np.ones(shape, kind)) * 2
            array = x.numpy()
            assert array.shape == shape and array.flags.c_contiguous and array.flags.writeable
            out += [array, np.asarray(duo.tensor(np.ones(shape, kind)).detach())]
    return out


def writes():
    """Programs of a few steps, whose traces are used again, on tensors that views and writes give new versions."""
    x = duo.tensor(A)
    row, block = x[0], x[1:3]
    out = []
    for k in range(6):
        out.append((x * 2.0 + row).numpy().copy())
        out.append((block * row).numpy().copy())
        (block if k % 2 else x).mul_(0.5)
        row.add_(1.0)
    w = nn.Parameter(duo.tensor(A))
    for write in (None, row, x):
        y = (x.tanh() * w + row).sum()
        if write is not None:
            write.add_(1.0)
        try:
            y.backward()
            out.append(w.grad.numpy().copy())
        except GradientError as error:
            out.append(np.array(len(str(error).split(chr(10))[0])))
    return out


@pytest.mark.parametrize("program", [chain, attributes, branches, storages, gradients, training, shapes, writes])
def test_the_same_bits_as_python(program):
    first, *others = with_and_without(program)
    for other in others:
        for a, b in zip(first, other):
            assert len(a) == len(b)
            for x, y in zip(a, b):
                assert x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")


def plain() -> bool:
    """Whether programs are compiled and flushes come when values are looked at."""
    return not runtime._use_interpreter and hooks.policy is None and os.environ.get("DUO_VERIFY") != "1"


def calls(program):
    """Names of the functions of duo that the program runs in Python."""
    seen = []

    def profile(frame, event, _):
        if event == "call" and frame.f_globals.get("__name__", "").startswith(("duo.", "duo_")):
            seen.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        program()
    finally:
        sys.setprofile(None)
    return seen


def test_what_comes_again_takes_no_python():
    if not plain():
        pytest.skip("flushes go another way")
    a, b = duo.tensor(A), duo.tensor(A.T.copy())
    for _ in range(TIMES):
        np.asarray(duo.matmul(a, b).detach())
    assert calls(lambda: np.asarray(duo.matmul(a, b).detach())) == ["matmul", "apply"]
    assert calls(lambda: np.asarray((a @ b).detach())) == []
    w = nn.Parameter(duo.tensor(A))

    def tracked():
        return w * a

    for _ in range(TIMES):
        tracked()
        duo.synchronize()
    assert calls(tracked) == []


def written_after(tensor):
    """The array of a tensor that nobody but this function holds, after a write to the tensor."""
    array = tensor.numpy()
    tensor.add_(1.0)
    duo.synchronize()
    return array


def test_arrays_know_of_writes_to_whatever_tensor_is_left():
    x = duo.tensor(A)
    want = A * np.float32(2) + np.float32(1)

    class Holder:
        pass

    for _ in range(TIMES):
        assert np.array_equal(written_after(x * 2.0), want)
        for look in (lambda held: held[0].numpy(), lambda held: next(map(EagerTensor.numpy, held)), lambda held: operator.methodcaller("numpy")(held[0])):
            held = [x * 2.0]
            array = look(held)
            held[0].add_(1.0)
            duo.synchronize()
            assert np.array_equal(array, want)
        owner = Holder()
        owner.tensor = x * 2.0
        array = owner.tensor.numpy()
        owner.tensor.add_(1.0)
        duo.synchronize()
        assert np.array_equal(array, want)


def test_arrays_of_tensors_that_have_gone():
    x = duo.tensor(A)
    for _ in range(TIMES):
        view = x * 2.0
        part = view[1:]
        del view
        arrays = [(x * float(k)).numpy() for k in range(TIMES)] + [part.numpy()]
        for k in range(TIMES):
            assert np.array_equal(arrays[k], A * np.float32(k))
            arrays[k][:] = -1
        part.mul_(0.5)
        assert np.array_equal(part.numpy(), A[1:])
        assert arrays[0].flags.writeable
        assert np.array_equal((x * 3.0).numpy(), A * np.float32(3))
    assert np.array_equal(x.numpy(), A)


def test_installed_when_programs_come_again(monkeypatch):
    if not plain():
        pytest.skip("flushes go another way")
    native.remove()
    monkeypatch.setattr(hooks, "repeated", native.install)
    runtime.clear_cache()
    x = duo.tensor(A)
    for _ in range(3 * TIMES):
        (x * 3.0).numpy()
    assert hooks.flush is not flush
    assert type(EagerTensor.__dict__["__mul__"]).__name__ == "method_descriptor"


def test_a_trace_that_nobody_holds_is_used_again():
    if not plain():
        pytest.skip("flushes go another way")
    x, shared = duo.tensor(A), duo.from_numpy(A.copy())
    view = shared[0]

    def program():
        return np.asarray((x @ shared + view * 1.0).detach())

    for _ in range(2 * TIMES):
        first = program()
    trace, held = state.trace, []
    assert trace.done and not trace.leaves and not trace.links
    for _ in range(3):  # while it is held it stays as it is, for whoever holds it
        held.append(state.trace)
        assert np.array_equal(program(), first)
        assert all(t is not state.trace and t.done and t.entries[-1] is END and len(t.entries) == 1 for t in held)
    del trace
    held.clear()
    program()
    for _ in range(8):
        lock = state.trace.lock
        assert np.array_equal(program(), first)
        assert state.trace.lock is lock
    for k in range(8):
        assert np.array_equal(program(), first)
        with duo.no_grad() if k % 2 else duo.enable_grad():
            assert (x * 2.0).requires_grad is False
    w = nn.Parameter(duo.tensor(A))
    for _ in range(TIMES):
        with duo.no_grad():
            (x * w).numpy()
        assert (x * w).requires_grad  # the mode is that of the next trace, not the last
        duo.synchronize()


def test_nothing_is_leaked():
    w, x = nn.Parameter(duo.tensor(A)), duo.tensor(A)

    def program():
        loss = ((w * x).tanh() @ x).sum()
        loss.backward()
        w.grad = None
        y = x.sum(0, keepdim=True) * 2.0
        z = y.numpy()
        y.numpy()
        with pytest.raises(duo.DuoError):
            x @ duo.ones(3, 3)
        return loss.item(), z, (x + x).detach()

    watched = [None, True, (), 0, float, EagerTensor, type(x._val), type(state.trace), Info, x._val, x._val.info]
    for _ in range(2 * TIMES):
        program()
    duo.synchronize()
    gc.collect()
    before, blocks = [sys.getrefcount(o) for o in watched], sys.getallocatedblocks()
    for _ in range(500):
        program()
    duo.synchronize()
    gc.collect()
    assert [sys.getrefcount(o) - n for o, n in zip(watched, before) if sys.getrefcount(o) - n > 400] == []
    assert sys.getallocatedblocks() - blocks < 400


def test_errors_name_the_line_that_recorded():
    table = duo.tensor(A)
    at = duo.tensor([0, 1])
    for _ in range(TIMES):
        table[at].numpy()
    bad = duo.tensor([0, 99])
    here = sys._getframe().f_lineno + 1
    found = table[bad]
    with pytest.raises(IndexError, match=f"test_native.py:{here}"):
        found.numpy()
    w = nn.Parameter(duo.tensor(A))
    for _ in range(TIMES):
        (w.exp() * 2.0).sum().backward()
    here = sys._getframe().f_lineno + 1
    y = w.exp()
    z = (y * 2.0).sum()
    with duo.no_grad():
        y.add_(1.0)
    with pytest.raises(GradientError, match=f"test_native.py:{here}"):
        z.backward()


def test_wrong_calls_are_refused():
    x = duo.tensor(A)
    with pytest.raises(TypeError):
        x.__mul__()
    with pytest.raises(TypeError):
        x.detach(1)
    with pytest.raises(TypeError):
        x.numpy(what=1)
    with pytest.raises(TypeError):
        EagerTensor.__mul__(1.0, x)
    with pytest.raises(TypeError):
        x * "a"
    with pytest.raises(GradientError):
        nn.Parameter(x).numpy()


def test_threads_share_tensors():
    a, b = duo.tensor(A), duo.tensor(A.T.copy())
    want = ((a @ b) * 2.0).numpy().copy()
    wrong = []

    def work():
        for _ in range(200):
            y = (a @ b) * 2.0
            if not np.array_equal(np.asarray(y.detach()), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    assert not wrong


def test_finalisers_that_record():
    """What a garbage collection runs while something is allocated may record, flush and look itself."""
    a, b = duo.tensor(A), duo.tensor(A.T.copy())
    want = (a @ b * 2.0).numpy().copy()
    seen = []

    class Late:
        def __init__(self):
            self.me = self  # only a collection ends it

        def __del__(self):
            seen.append((a @ b * 2.0).numpy().copy())

    before = gc.get_threshold()
    gc.set_threshold(3, 2, 2)
    try:
        for _ in range(300):
            Late()
            assert np.array_equal(np.asarray((a @ b * 2.0).detach()), want)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert len(seen) == 300 and all(np.array_equal(s, want) for s in seen)


def test_interrupts_leave_traces_whole():
    a, b = duo.tensor(A), duo.tensor(A.T.copy())
    want = (a @ b * 2.0).numpy().copy()
    made = []

    def work():
        for _ in range(40):
            y = a @ b
            made.append(y * 2.0)
            made[-1].detach().numpy()

    hits = 0
    with interrupts(1e-6, 2e-4) as disturbed:
        for _ in range(TRIALS):
            made.clear()
            hits += disturbed(work)
            assert all(np.array_equal(y.numpy(), want) for y in made)
    assert hits > 20
