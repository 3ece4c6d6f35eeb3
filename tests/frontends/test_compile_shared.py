"""Compiled functions that read memory which NumPy shares: replayed, without a copy, with the values of the moment of the call."""

import gc
import threading

import numpy as np
import pytest

import duo
import duo.nn.functional as F
from duo import nn


def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_values_are_those_of_the_call():
    a = array(3000)
    x = duo.from_numpy(a)
    f = duo.compile(lambda v: (v * 2).sum())
    for k in range(5):
        a[:] = k
        y = f(x)
        a[:] = -1
        assert y.item() == 6000 * k
    assert f.recordings == 1, f.explain()


def test_an_array_made_of_a_tensor():
    x = duo.zeros(100)
    a = x.numpy()
    f = duo.compile(lambda v: v + 1)
    for k in range(4):
        a[:] = k
        assert f(x).tolist() == [k + 1] * 100
    x += 10
    assert f(x).tolist() == [14] * 100
    del a
    gc.collect()
    assert f(x).tolist() == [14] * 100
    x += 1
    assert f(x).tolist() == [15] * 100 and f.recordings == 1, f.explain()
    a = x.numpy()
    a[0] = 0
    assert f(x).tolist() == [1] + [15] * 99 and f.recordings == 1, f.explain()


def test_tensors_from_outside():
    a = array(200, 8)
    x = duo.from_numpy(a)
    f = duo.compile(lambda k: (x[20:30] * k).sum() + x.max())
    for k in (1.0, 2.0, 3.0):
        a += 1
        want = (duo.tensor(a)[20:30] * k).sum() + duo.tensor(a).max()
        assert f(duo.tensor(k)).item() == want.item()
    assert f.recordings == 1, f.explain()


def test_views_as_arguments():
    a = array(64, 5)
    x = duo.from_numpy(a)
    f = duo.compile(lambda v, w: (v[:] * w[::1]).sum(1))
    for k in range(0, 64, 8):
        got = f(x[k : k + 8], x[:, 1:][k : k + 8, :1])
        assert np.array_equal(got.numpy(), (duo.tensor(a[k : k + 8]) * duo.tensor(a[k : k + 8, 1:2])).sum(1).numpy())
        view = x[:8]
        a *= 2
        assert np.array_equal(f(view, view[:, :1]).numpy(), f(duo.tensor(a[:8]), duo.tensor(a[:8, :1])).numpy())
    # and a plain tensor of the same type
    assert f.recordings == 1, f.explain()


@pytest.mark.parametrize(
    "function", [lambda v: v, lambda v: v.reshape(-1), lambda v: v.detach(), lambda v: v.clone(), lambda v: (v.t().t(), v * 1)[0], lambda v: v[2:]]
)  # fmt: skip
def test_results_that_are_the_argument(function):
    """What comes back is what the plain call gives: a view that follows the array, or a copy that does not."""
    g = duo.compile(function)
    rows = []
    for f in (function, g):
        a = array(6, 4)
        x = duo.from_numpy(a)
        for k in range(3):
            y = f(x)
            rows.append(y.clone().tolist())
            a[:] = k
            rows.append(y.clone().tolist())
            with duo.no_grad():
                y += 1
            rows.append(a.tolist())
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]


def test_what_is_saved_for_a_later_backward():
    a = array(50)
    x = duo.from_numpy(a)
    w = duo.tensor(array(50, seed=1), requires_grad=True)
    f = duo.compile(lambda v: (v * w * w).sum())
    for _ in range(3):
        w.grad = None
        before = a.copy()
        y = f(x)
        a += 1
        y.backward()
        assert np.array_equal(w.grad.numpy(), (duo.tensor(before) * w.detach() + duo.tensor(before) * w.detach()).numpy())
    assert f.recordings == 1, f.explain()


def test_writes_inside_are_seen_by_numpy():
    a = np.zeros(4, np.float32)
    x = duo.from_numpy(a)

    def write(v):
        before = v * 1
        v += 1
        return before, v * 10

    f = duo.compile(write)
    for k in range(3):
        before, after = f(x)
        assert a.tolist() == [k + 1] * 4 and before.tolist() == [k] * 4 and after.tolist() == [10 * (k + 1)] * 4


def test_an_array_written_by_the_function():
    a = np.zeros(4, np.float32)
    x = duo.from_numpy(a)

    def write(v):
        before = v * 1
        a[:] += 1
        return before, v * 10

    f = duo.compile(write)
    for k in range(3):
        before, after = f(x)
        assert before.tolist() == [k] * 4 and after.tolist() == [10 * (k + 1)] * 4


@pytest.mark.parametrize("slices", [False, True], ids=["whole", "slices"])
def test_training_steps(slices):
    """Inputs and labels of arrays: equal to those of plain tensors, to the bit, and replayed."""
    X, Y = array(96, 12), np.random.default_rng(3).integers(0, 5, 96)
    out = []
    for shared in (False, True):
        duo.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
        opt = duo.optim.Adam(net.parameters(), lr=0.01)

        def step(x, y, net=net, opt=opt):
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            return loss

        f = duo.compile(step)
        a, b = X.copy(), Y.copy()
        losses = []
        x, y = duo.from_numpy(a), duo.from_numpy(b)
        for k in range(6):
            if not shared:
                losses.append(f(duo.tensor(a[16 * k : 16 * k + 16]), duo.tensor(b[16 * k : 16 * k + 16])).item())
            elif slices:
                losses.append(f(x[16 * k : 16 * k + 16], y[16 * k : 16 * k + 16]).item())
            else:
                batch = a[16 * k : 16 * k + 16].copy(), b[16 * k : 16 * k + 16].copy()
                losses.append(f(*map(duo.from_numpy, batch)).item())
        assert f.recordings <= 2, f.explain()
        out.append((losses, [p.detach().numpy().tobytes() for p in net.parameters()]))
    assert out[0] == out[1]


def test_indices_that_another_thread_writes():
    """They are copied where other threads may run meanwhile: a step either fails with every parameter as it was, or uses what it has checked."""
    table = nn.Parameter(duo.tensor(array(1000, 64)))
    opt = duo.optim.SGD([table], lr=1.0)
    a = np.full(20000, 3)
    x = duo.from_numpy(a)

    def step(i):
        opt.zero_grad()
        table[i].sum().backward()
        opt.step()

    f = duo.compile(step)
    for _ in range(3):
        f(x)
    done = threading.Event()

    def write():
        while not done.is_set():
            a[-1000:] = 10**9
            a[:] = 3

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(40):
            before = table.detach().numpy().copy()
            change = 20000
            try:
                f(x)
            except IndexError:
                change = 0
            before[3] -= change
            assert np.array_equal(table.detach().numpy(), before)
    finally:
        done.set()
        writer.join()
    assert f.recordings <= 3, f.explain()
