"""Eager tensors on an (emulated) GPU: where they are, what moves them, and that nothing else about them changes."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest

import duo
from duo import runtime
from duo.eager.flush import flush
from duo_ir import errors
from tests.cuda_emulator.support import needs_emulator
from tests.frontends.cuda_support import emulated, gpu  # noqa: F401

pytestmark = [needs_emulator, pytest.mark.usefixtures("gpu")]


def test_where_tensors_are():
    x = duo.tensor([[1.0, 2.0], [3.0, 4.0]], device="cuda")
    y = x * 2 + 1
    assert str(y.device) == "cuda:0" and y.is_cuda and y.get_device() == 0
    assert y.device == duo.device("cuda", 0) == duo.device("cuda:0") == "cuda:0" and hash(y.device) == hash("cuda:0")
    assert not y.cpu().is_cuda and y.cpu().device == "cpu" and y.cuda() is y and y.to("cuda:0") is y
    assert y.tolist() == [[3.0, 5.0], [7.0, 9.0]] and y.sum().item() == 24.0 and bool((y > 0).all())
    assert repr(x) == "tensor([[1., 2.],\n        [3., 4.]], device='cuda:0')"
    for t in (duo.zeros(2, device="cuda"), duo.zeros_like(x), x.new_ones(3), x[0], x.T, x.detach(), x.to(duo.float64)):
        assert t.is_cuda
    assert duo.tensor(x).is_cuda and not duo.tensor(x, device="cpu").is_cuda
    with pytest.raises(TypeError, match=r"\.cpu\(\)\.numpy\(\)"):
        y.numpy()


def test_operands_on_two_devices():
    x, y = duo.ones(2, device="cuda"), duo.ones(2)
    with pytest.raises(
        errors.DeviceError, match=r"(?s)add\(f32\[2\] on cuda:0, f32\[2\]\).*\.to\('cuda:0'\).*test_cuda_eager.py:"
    ):
        x + y
    scale = duo.tensor(3.0, requires_grad=True)
    z = (x * scale + scale).sum()
    z.backward()
    assert z.is_cuda and z.item() == 12.0 and not scale.grad.is_cuda and scale.grad.item() == 4.0
    assert (scale * scale).device == "cpu"


def test_gradients_cross_devices():
    w = duo.tensor([1.0, 2.0, 3.0], device="cuda", requires_grad=True)
    h = w * w
    y = h.cpu()
    ((y * 2).sum() + h.sum().cpu()).backward()
    assert w.grad.is_cuda and w.grad.tolist() == [6.0, 12.0, 18.0]
    (g,) = duo.autograd.grad((w * w).cpu().sum(), w, create_graph=True)
    (second,) = duo.autograd.grad(g.sum(), w)
    assert second.tolist() == [2.0, 2.0, 2.0]


def test_hooks_on_a_copy():
    def program(device: str) -> list:
        w = duo.tensor([1.0, 2.0, 3.0], device=device, requires_grad=True)
        y = (w * 2).to("cpu") if device != "cpu" else (w * 2).clone()
        y.register_hook(lambda g: g * 3)
        y.retain_grad()
        inner = y.exp().sum()
        (first,) = duo.autograd.grad(inner, y, retain_graph=True)
        inner.backward()
        return [first.tolist(), y.grad.tolist(), w.grad.tolist(), str(y.grad.device)]

    assert program("cuda") == program("cpu")


def test_one_stream_of_random_numbers():
    def program(device: str) -> list[float]:
        duo.manual_seed(3)
        out = [duo.rand(3, device=device), duo.randn(2), duo.nn.functional.dropout(duo.ones(8, device=device))]
        out.append(duo.empty(3, device=device).normal_())
        return [v for t in out for v in t.tolist()]

    assert program("cuda") == program("cpu")


def test_views_and_writes():
    def program(device: str) -> list:
        x = duo.arange(12, device=device).reshape(3, 4).float()
        row = x[1]
        row += 10.0
        x[:, 0] = duo.tensor(7.0)
        x[duo.tensor([0, 2]), [1, 1]] = 5.0
        x.T[3].mul_(2)
        return [x.tolist(), row.tolist(), x[[2, 0]].tolist()]

    assert program("cuda") == program("cpu")
    x = duo.zeros(3, device="cuda")
    x.copy_(duo.tensor([1.0, 2.0, 3.0]))
    x[1:] = np.array([5.0, 6.0])
    assert x.is_cuda and x.tolist() == [1.0, 5.0, 6.0]


def test_default_device():
    with duo.device("cuda"):
        assert duo.ones(2).is_cuda and duo.tensor(1.0).is_cuda and duo.nn.Linear(2, 3).weight.is_cuda
        with duo.device("cpu"):
            assert not duo.rand(2).is_cuda
    duo.set_default_device("cuda:0")
    try:
        assert duo.get_default_device() == "cuda:0" and duo.arange(3).is_cuda and not duo.ones(2, device="cpu").is_cuda
    finally:
        duo.set_default_device("cpu")
    assert not duo.ones(2).is_cuda


def test_a_bad_index_is_told_at_its_line_when_somebody_waits():
    table = duo.arange(5.0, device="cuda")

    def picked(*places: int) -> object:
        index = duo.tensor(places, device="cuda")
        return table[index] * 2.0  # the line of the first

    def again(*places: int) -> object:
        index = duo.tensor(places, device="cuda")
        return table[index] * 2.0  # the line of the second

    assert picked(0, 4).tolist() == [0.0, 8.0]
    bad = again(1, 7)
    flush()  # runs it, and nobody waits
    with pytest.raises(IndexError, match=r"index 7 is out of range") as error:
        duo.synchronize()
    line = picked.__code__.co_firstlineno + 6
    assert f"test_cuda_eager.py:{line}" in str(error.value)
    duo.synchronize()  # told once
    assert bad.shape == (2,)
    for _ in range(2):  # and whenever it is used
        with pytest.raises(IndexError, match=r"index 7 is out of range"):
            bad.tolist()
    with pytest.raises(IndexError, match=r"index 7 is out of range"):
        (bad + 1).tolist()
    assert picked(1, 4).tolist() == [2.0, 8.0]


def test_at_once_with_sync(monkeypatch):
    table, index = duo.ones(5, device="cuda"), duo.tensor([1, 9], device="cuda")
    duo.debug.configure(sync=True)
    try:
        with pytest.raises(IndexError, match="index 9 is out of range"):
            table[index]
    finally:
        duo.debug.configure(sync=False)
    assert (table + 1).tolist() == [2.0] * 5


def test_hooks_and_functions():
    seen = []
    w = duo.tensor([1.0, -2.0], device="cuda", requires_grad=True)
    h = w * 3
    h.register_hook(lambda g: seen.append((str(g.device), g.tolist())))
    w.register_hook(lambda g: g * 2)
    h.relu().sum().backward()
    assert seen == [("cuda:0", [1.0, 0.0])] and w.grad.tolist() == [6.0, 0.0] and w.grad.is_cuda
    h = w * 2
    h.register_hook(lambda g: g.cpu())
    with pytest.raises(errors.DeviceError, match="a hook gave a gradient on cpu"):
        h.sum().backward()
    with pytest.raises(errors.DeviceError, match="the gradient given is on cpu"):
        (w * 2).backward(duo.ones(2))
    with pytest.raises(errors.DeviceError, match="a gradient is set on cpu"):
        w.grad = duo.zeros(2)


def test_save_and_load(tmp_path):
    model = duo.nn.Linear(2, 3, device="cuda")
    duo.save(model.state_dict(), tmp_path / "m.safetensors")
    there, here = duo.load(tmp_path / "m.safetensors", map_location="cuda"), duo.load(tmp_path / "m.safetensors")
    assert there["weight"].is_cuda and not here["weight"].is_cuda
    assert there["weight"].tolist() == here["weight"].tolist() == model.weight.tolist()
    other = duo.nn.Linear(2, 3)
    other.load_state_dict(there)
    assert not other.weight.is_cuda and other.bias.tolist() == model.bias.tolist()


def test_threads():
    x = duo.randn(3, 4, device="cuda")
    want = (x * 2).relu().sum(0).tolist()
    got: list = []

    def work() -> None:
        mine = duo.ones(2)
        got.append((x * 2).relu().sum(0).tolist() + (mine + 1).tolist())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == [[*want, 2.0, 2.0]] * 3


def test_two_devices_and_nan_checks(gpu):  # noqa: F811
    runtime.use_backend("cuda:1", emulated(1))
    try:
        x = duo.tensor([1.0, 2.0], device="cuda:1")
        y = (x * 3).to("cuda:0")
        assert str(x.device) == "cuda:1" and str(y.device) == "cuda:0" and y.tolist() == [3.0, 6.0]
        with pytest.raises(errors.DeviceError, match="cuda:0 and cuda:1"):
            x + y
    finally:
        runtime.use_backend("cuda:1", None)
    with duo.debug.check_nan():
        assert (y + 1).tolist() == [4.0, 7.0] and (y + 1).is_cuda
        with pytest.raises(errors.NanError):
            (y * 0 / 0).tolist()


def test_deepcopy_and_data():
    p = duo.nn.Parameter(duo.ones(2, device="cuda"))
    q = copy.deepcopy(p)
    assert q.is_cuda and q.tolist() == [1.0, 1.0] and q is not p
    p.data = duo.zeros(2)
    assert not p.is_cuda and q.is_cuda


def test_segments_and_retained_graphs():
    def program(device: str) -> list:
        w = duo.tensor([1.0, 2.0, -3.0], requires_grad=True, device=device)
        h = (w.exp() * w).sum()
        out = [h.item()]  # runs the forward pass by itself
        h.backward(retain_graph=True)
        h.backward()
        out.append(w.grad.tolist())
        with pytest.raises(errors.GradientError, match="second time"):
            h.backward()
        y = w * 2
        z = y.exp().sum()
        z.item()
        with duo.no_grad():
            w.mul_(2)
        y.add_(1)
        z.backward()
        return [*out, w.grad.tolist(), y.tolist()]

    assert program("cuda") == program("cpu")
    w = duo.ones(2, device="cuda", requires_grad=True)
    y = w * 2
    z = (y * y).sum()
    y.zero_()
    with pytest.raises(errors.GradientError, match="overwritten"):
        z.backward()


def test_functions_of_functions():
    x = duo.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device="cuda")
    out = duo.vmap(lambda row: row[[2, 0]] * 2)(x)
    assert out.is_cuda and out.tolist() == [[6.0, 2.0], [12.0, 8.0]]
    g = duo.func.grad(lambda v: (v * v + duo.zeros(3, device=v.device).to(v)).sum())(x[0])
    assert g.is_cuda and g.tolist() == [2.0, 4.0, 6.0]
    y = duo.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,))
    assert y.is_cuda and y[0].tolist() == [2.0, 3.0, 4.0]


def test_the_interpreter_runs_programs_of_a_gpu():
    x = duo.tensor([1.0, 2.0], device="cuda")
    duo.debug.set_backend("interpret")
    try:
        y = x * 2 + 1
        assert y.is_cuda and y.tolist() == [3.0, 5.0]
    finally:
        duo.debug.set_backend("cpu")


def test_flushes_anywhere_change_nothing():
    def program() -> list:
        x = duo.arange(6.0, device="cuda").reshape(2, 3).requires_grad_()
        y = (x.T @ x).relu()
        y[0] = 0.0
        (y.sum() * 2).backward()
        return [y.tolist(), x.grad.tolist()]

    want = program()
    duo.debug.configure(flush_seed=3)
    try:
        assert program() == want
    finally:
        duo.debug.configure(sync=False)


def test_a_bad_index_in_a_compiled_function():
    @duo.compile
    def rows(table, index):
        return table[index].sum(1)

    table = duo.ones(4, 2, device="cuda")
    assert rows(table, duo.tensor([0, 3], device="cuda")).tolist() == [2.0, 2.0]
    out = rows(table, duo.tensor([0, 4], device="cuda"))
    with pytest.raises(IndexError, match=r"(?s)test_cuda_eager.py:.*index 4 is out of range for axis 0, which has 4"):
        out.tolist()
    assert rows.recordings == 1
