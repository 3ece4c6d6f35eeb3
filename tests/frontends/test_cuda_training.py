"""Training on an (emulated) GPU gives the CPU's bits, eager and compiled; models and the state of optimizers move."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

import duo
from duo.nn import functional as F
from duo_ir import errors
from tests.cuda_emulator.support import needs_emulator
from tests.frontends.cuda_support import gpu  # noqa: F401

pytestmark = [needs_emulator, pytest.mark.usefixtures("gpu")]


def mlp() -> Any:
    return duo.nn.Sequential(duo.nn.Linear(5, 7), duo.nn.ReLU(), duo.nn.Dropout(0.3), duo.nn.Linear(7, 3))


class Block(duo.nn.Module):
    """An embedding, attention with a causal mask, a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = duo.nn.Embedding(6, 8)
        self.norm = duo.nn.LayerNorm(8)
        self.attend = duo.nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = duo.nn.Linear(8, 6)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        h = self.norm(x)
        x = x + self.attend(h, h, h, need_weights=False, is_causal=True)[0]
        return self.out(F.gelu(x)).reshape(-1, 6)


def batch(model: Callable[[], Any], device: str) -> tuple[Any, Any]:
    if model is mlp:
        return duo.randn(4, 5, device=device), duo.tensor([0, 2, 1, 1], device=device)
    return duo.tensor([[1, 5, 0], [2, 2, 4]], device=device), duo.tensor([5, 0, 2, 2, 4, 1], device=device)


def trained(model: Callable[[], Any], device: str, compiled: bool, steps: int = 4) -> list[Any]:
    """The losses of some steps of AdamW, parameters and slots after them."""
    duo.manual_seed(1)
    net = model().to(device)
    x, y = batch(model, device)
    opt = duo.optim.AdamW(net.parameters(), lr=0.01)

    def step() -> Any:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        return loss.detach()

    run = duo.compile(step) if compiled else step
    losses = []
    for k in range(steps):
        opt.param_groups[0]["lr"] = 0.01 / (k + 1)
        losses.append(run().item())
    slots = [t.tolist() for p in net.parameters() for t in opt.state[p].values()]
    assert {str(t.device) for p in net.parameters() for t in (p, p.grad, *opt.state[p].values())} == {device}
    if compiled:
        assert run.recordings == 2, run.explain()
    return [losses, [p.tolist() for p in net.parameters()], slots, duo.get_rng_state().tolist()]


@pytest.mark.parametrize("model", [mlp, Block])
def test_training_gives_the_bits_of_the_cpu(model):
    want = trained(model, "cpu", False)
    assert trained(model, "cuda:0", False) == want
    assert trained(model, "cuda:0", True) == want


def test_a_step_overwrites_parameters_and_slots_where_they_are():
    net = mlp().cuda()
    opt = duo.optim.Adam(net.parameters(), lr=0.01)
    x = duo.randn(4, 5, device="cuda")

    def step() -> Any:
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        opt.step()
        return loss.detach()

    run = duo.compile(step)

    def places() -> list[int]:
        return [t._val.buf.ptr for p in net.parameters() for t in (p, *opt.state[p].values())]

    for kind in (step, run):
        for _ in range(3):
            kind()
        before = places()
        kind()
        assert places() == before
    assert run.recordings == 1
    w = net[0].weight
    kept = w.detach().clone()
    held = w._val  # somebody else can read it: it is not overwritten
    run()
    assert held.buf is not w._val.buf and duo.tensor(kept).tolist() != w.tolist()


def test_models_and_optimizer_state_move():
    def losses(moves: dict[int, str], compiled: bool) -> list[Any]:
        duo.manual_seed(4)
        net = duo.nn.Sequential(duo.nn.Linear(3, 4), duo.nn.BatchNorm1d(4), duo.nn.Linear(4, 2))
        parameters, buffers = list(net.parameters()), list(net.buffers())
        opt = duo.optim.Adam(net.parameters(), lr=0.1)
        x = duo.randn(4, 3)
        device, out = "cpu", []

        def step(x: Any) -> Any:
            opt.zero_grad()
            loss = net(x).square().sum()
            loss.backward()
            opt.step()
            return loss.detach()

        run = duo.compile(step) if compiled else step
        for k in range(6):
            if k in moves:
                device = moves[k]
                assert net.to(device) is net
                for p in net.parameters():
                    assert p.grad is None or p.grad.device == device
            out.append(run(x.to(device)).item())
        assert list(map(id, net.parameters())) == list(map(id, parameters))
        assert list(map(id, net.buffers())) == list(map(id, buffers))
        assert all(t.device == device for p in net.parameters() for t in opt.state[p].values())
        assert len({id(opt.state[p]["step"]) for p in net.parameters()}) == 1
        return [out, [p.tolist() for p in net.parameters()], [b.tolist() for b in net.buffers()]]

    want = losses({}, False)
    assert losses({2: "cuda:0", 4: "cpu"}, False) == want
    assert losses({0: "cuda:0", 3: "cpu", 5: "cuda:0"}, True) == want


def test_optimizer_state_dict_goes_where_the_parameters_are():
    def trained_on(device: str) -> tuple[Any, Any]:
        duo.manual_seed(2)
        net = duo.nn.Linear(2, 2, device=device)
        opt = duo.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            opt.zero_grad()
            net(duo.ones(1, 2, device=device)).sum().backward()
            opt.step()
        return net, opt

    (a, first), (b, second) = trained_on("cpu"), trained_on("cuda:0")
    assert a.weight.tolist() == b.weight.tolist()
    second.load_state_dict(first.state_dict())
    first.step()
    second.step()
    assert a.weight.tolist() == b.weight.tolist() and b.weight.is_cuda


def test_parameters_on_two_devices():
    duo.manual_seed(5)
    front, back = duo.nn.Linear(2, 3), duo.nn.Linear(3, 1).cuda()
    opt = duo.optim.Adam([*front.parameters(), *back.parameters()], lr=0.05)
    twin = [duo.nn.Linear(2, 3), duo.nn.Linear(3, 1)]
    for mine, theirs in zip((front, back), twin):
        theirs.load_state_dict(mine.state_dict())
    other = duo.optim.Adam([p for m in twin for p in m.parameters()], lr=0.05)
    for _ in range(3):
        for optimizer, (one, two), device in ((opt, (front, back), "cuda"), (other, twin, "cpu")):
            optimizer.zero_grad()
            two(one(duo.ones(4, 2)).relu().to(device)).square().sum().backward()
            duo.nn.utils.clip_grad_norm_([*one.parameters(), *two.parameters()], 0.5)
            optimizer.step()
    assert [p.tolist() for p in (*front.parameters(), *back.parameters())] == [
        p.tolist() for m in twin for p in m.parameters()
    ]
    assert not front.weight.is_cuda and back.weight.is_cuda


def test_a_generator_that_was_drawn_from_on_the_cpu_comes_back():
    def drawn(device: str, compiled: bool) -> list[Any]:
        duo.manual_seed(6)
        x = duo.ones(6, device=device)
        f = duo.compile(lambda x: F.dropout(x, 0.5)) if compiled else lambda x: F.dropout(x, 0.5)
        out = []
        for _ in range(3):
            out += [f(x).tolist(), f(x).tolist(), duo.randperm(5).tolist()]
        if compiled:
            assert f.recordings == 1, f.explain()
        return out

    assert drawn("cuda", True) == drawn("cuda", False) == drawn("cpu", False)


def test_recording_again_gives_the_program_that_is_replayed(monkeypatch):
    monkeypatch.setattr(importlib.import_module("duo.jit.compile"), "_VERIFY", [True])
    x = duo.ones(4, device="cuda")
    f = duo.compile(lambda x: F.dropout(x, 0.5) * 2)
    duo.rand(2)  # the state is on the CPU when it is recorded first
    for _ in range(3):
        f(x)
    assert f.recordings == 3


def test_compiled_functions_know_where_they_run():
    def f(x: Any) -> Any:
        return (x * 2 + duo.ones(2, device=x.device)).relu()

    def g() -> Any:
        return duo.full((2,), 3.0) * 2

    run, made = duo.compile(f), duo.compile(g)
    for device in ("cpu", "cuda:0", "cpu", "cuda:0"):
        out = run(duo.tensor([1.0, -4.0], device=device))
        assert str(out.device) == device and out.tolist() == [3.0, 0.0]
    assert run.recordings == 2, run.explain()
    assert not made().is_cuda
    with duo.device("cuda"):
        assert made().is_cuda and made().is_cuda
    assert not made().is_cuda and made.recordings == 2
    mixed = duo.compile(lambda x, y: (x * 2).sum() + (y * 2).sum().to(x.device))
    with pytest.raises(errors.DeviceError, match="one program on one device"):
        mixed(duo.ones(2, device="cuda"), duo.ones(2))
    assert duo.compile(lambda x, s: x * s)(duo.ones(2, device="cuda"), duo.tensor(3.0)).tolist() == [3.0, 3.0]
