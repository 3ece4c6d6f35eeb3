"""What runs the first time a path is seen: entry by entry, without compiling the path, with the bits and the errors of everything else."""

from __future__ import annotations

import random
import resource

import numpy as np
import pytest

import duo
from duo import runtime
from duo.eager import flush as flushing
from duo.eager import stepwise
from duo.eager import trace as tracing
from duo.nn import functional as F
from duo_ir.errors import DuoError
from tests.frontends.eager_modes import numbers, same


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.setattr(flushing, "FUSE_AT_ONCE", False)
    yield
    duo.debug.configure(sync=False)
    runtime.set_backend("cpu")


def ways(monkeypatch):
    """Ways of running a program that was never seen: first sight, then seen again; as a whole at once; op by op; the interpreter."""
    duo.synchronize()
    tracing.forget()
    yield "first"
    yield "again"
    tracing.forget()
    monkeypatch.setattr(flushing, "FUSE_AT_ONCE", True)
    yield "whole"
    monkeypatch.setattr(flushing, "FUSE_AT_ONCE", False)
    tracing.forget()
    duo.debug.configure(sync=True)
    yield "sync"
    duo.debug.configure(sync=False)
    duo.synchronize()
    runtime.set_backend("interpret")
    yield "interpreted"
    runtime.set_backend("cpu")


def agree(monkeypatch, program):
    """What the program gives, which must be the same in all `ways`."""
    first = None
    for way in ways(monkeypatch):
        got = program()
        duo.synchronize()
        first = got if first is None else first
        assert same(first, got), f"{way} differs from first sight:\n{got}\n{first}"
    return first


# ------------------------------------------------------------------------------------------- paths that never repeat
class Training:
    """A loop of a given number of iterations, each of one of two bodies, with gradients and a step of Adam."""

    def __init__(self):
        self.w = duo.tensor(numbers(4, 4) * 0.3, requires_grad=True)
        self.b = duo.tensor(numbers(4), requires_grad=True)
        self.x = duo.tensor(numbers(3, 4, seed=1))
        self.optimizer = duo.optim.Adam([self.w, self.b], lr=1e-3)

    def step(self, kinds):
        h = self.x
        for kind in kinds:
            h = (h @ self.w + self.b).tanh() if kind else h * 0.5 - self.b
        loss = (h * h).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def run(self, paths):
        losses = [self.step(kinds).item() for kinds in paths]
        return losses, self.w.detach().numpy(), self.b.detach().numpy()


def lengths(count):
    return [[1] * n for n in range(1, count + 1)]


def mixtures(count):
    """Paths of up to 40 iterations, no two alike."""
    rng = random.Random(0)
    return [[rng.randrange(2) for _ in range(rng.randrange(12, 40))] for _ in range(count)]


def test_what_the_backward_pass_has_read_goes_at_once(monkeypatch):
    """When the optimiser runs, nothing is left of the forward pass that nobody asks for."""
    left = []
    original = stepwise._Run._alone

    def alone(self, node, numbers, program):
        left.append((dict(self.inner), [n for n, v in enumerate(self.values) if v is not None]))
        original(self, node, numbers, program)

    monkeypatch.setattr(stepwise._Run, "_alone", alone)
    model = duo.nn.Sequential(*[duo.nn.Linear(8, 8) if i % 2 else duo.nn.Tanh() for i in range(12)])
    optimizer = duo.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = duo.ones(4, 8)
    for _ in range(2):  # the second step is one path
        tracing.forget()
        left.clear()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        loss.item()
    ((inner, values),) = left
    count = len(list(model.parameters()))
    assert not inner
    assert len(values) <= 3 * count + 2  # parameters, their momentum, their gradients; the loss and x


def test_a_thousand_paths_that_never_repeat():
    """No path is compiled: a handful of programs, one for each kind of entry, serve them all, and memory is bounded."""
    training = Training()
    training.run([[1, 1], [0, 0, 1], [1, 0]])
    statistics, memory = duo.debug.statistics(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fused, compiled, kernels = statistics.fused, statistics.compiled, runtime.backend().compile_count
    losses = [training.step(kinds).item() for kinds in lengths(253)[3:] + mixtures(750)]
    assert len(losses) == 1000 and np.isfinite(losses).all()
    assert statistics.fused == fused
    assert statistics.compiled - compiled <= 24
    assert runtime.backend().compile_count - kernels <= 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 96 << 10  # KiB


def test_never_repeated_paths_give_the_bits_of_every_mode(monkeypatch):
    def program():
        return Training().run(lengths(12) + mixtures(6))

    agree(monkeypatch, program)


def test_the_trie_is_bounded(monkeypatch):
    """Recording starts the trie anew when it has grown large; what is dropped is given back."""
    duo.synchronize()
    tracing.forget()
    monkeypatch.setattr(tracing, "MAX_NODES", 3000)
    x = duo.ones(3)
    rng = random.Random(1)
    most = 0
    for _ in range(400):
        h = x
        for _ in range(30):
            h = h * 0.5 if rng.randrange(2) else h + x
        h.sum().item()
        most = max(most, tracing.node_count[0])
    assert most <= 3000 + 40


# ---------------------------------------------------------------------------------------------------- random programs
class Random:
    """A program of random ops on leaves, values, views and in-place writes, with looks and backward passes in between. What it does depends on the
    seed alone; errors of gradients are part of its result."""

    def __init__(self, seed, length):
        self.rng = random.Random(seed)
        self.leaves = [duo.tensor(numbers(3, 3, seed=k) * 0.5, requires_grad=k < 2) for k in range(3)]
        self.values = list(self.leaves)
        self.out = []
        self.length = length
        self.hooks = seed % 2 == 1

    def pick(self):
        return self.rng.choice(self.values[-7:] if self.rng.random() < 0.8 else self.values)

    def run(self):
        optimizer = duo.optim.SGD(self.leaves[:2], lr=0.01, momentum=0.9)
        actions = (
            [self.op] * 14
            + [self.mixed] * 5
            + [self.in_place] * 3
            + [self.no_grad, self.look, self.backward, self.backward, self.grads]
        )
        actions += [optimizer.step, optimizer.zero_grad]
        for _ in range(self.length):
            self.note(self.rng.choice(actions))
        self.note(self.backward)
        return [self.out, [t.grad for t in self.leaves], [v.detach() for v in self.values]]

    def note(self, action):
        try:
            action()
        except DuoError as error:
            self.out.append(np.array(type(error).__name__))

    def keep(self, value):
        self.values.append(value)
        if len(self.values) > 12:
            del self.values[self.rng.randrange(3, 8)]

    def op(self):
        a, b, k = self.pick(), self.pick(), self.rng.randrange(9)
        s = self.rng.choice([0.5, 1.5, 2])
        self.keep(
            a @ b * 0.3 if k == 0 else a * b if k == 1 else a * a if k == 2 else (a - b) if k == 3 else a.tanh() if k == 4
            else a * s if k == 5 else s - a if k == 6 else a.exp() * 0.2 if k == 7 else a + a
        )  # fmt: skip

    def mixed(self):
        a, b, k = self.pick(), self.pick(), self.rng.randrange(15)
        if k == 0:
            self.keep(F.softmax(a, 1))
        elif k == 1:
            self.keep(F.layer_norm(a, (3,), self.leaves[0][0], None))
        elif k == 2:
            self.keep(a.transpose(0, 1))
        elif k == 3:
            self.keep(a.sum(0) + b)
        elif k == 4:
            self.keep(duo.where(a > b, a, b * 2))
        elif k == 5:
            self.keep(a.detach() * b)
        elif k == 6:
            self.keep(a.to(duo.float32) + b.sign())
        elif k == 7:
            self.keep(F.dropout(a, 0.5))
        elif k == 8:
            self.keep(duo.cat([a, b, a], 0)[2:5])
        elif k == 9:
            self.keep(a.max(1, keepdim=True).values + b)
        elif k == 10:
            self.keep(a[duo.tensor([2, 0, 2])])
        elif k == 11:
            self.keep(a.reshape(3, 3) + b.expand(3, 3))  # both give back what they are given
        elif k == 12:
            for part in duo.split(a, [1, 2], 0):
                self.keep(part.sum(0, keepdim=True) + b)
        elif k == 13:
            self.keep(duo.cond(a.sum() > b.sum(), lambda x, y: x * y, lambda x, y: x - y, (a, b)))
        else:
            self.keep(a.clone())

    def in_place(self):
        a, b, k = self.pick(), self.pick(), self.rng.randrange(4)
        if k == 0:
            a.mul_(0.5)
        elif k == 1:
            a.add_(b)
        elif k == 2:
            a[1] = b[0] * 2
        else:
            with duo.no_grad():
                a.mul_(0.75)

    def no_grad(self):
        with duo.no_grad():
            self.op()
            self.mixed()

    def look(self):
        self.out.append(self.pick().detach().numpy().copy())

    def backward(self):
        root = self.pick()
        if self.hooks and self.rng.random() < 0.4 and root.requires_grad:
            root.register_hook(lambda g: g * 0.5)
        (root * 0.1).sum().backward(retain_graph=self.rng.random() < 0.5)

    def grads(self):
        root, wanted = self.pick(), self.pick()
        create = self.rng.random() < 0.3
        (found,) = duo.autograd.grad(
            (root * root).sum(), wanted, create_graph=create, retain_graph=True, allow_unused=True
        )
        if found is not None:
            self.keep(found)


@pytest.mark.parametrize("seed", [*range(22), 26, 37])
def test_random_programs(monkeypatch, seed):
    def program():
        duo.manual_seed(seed)
        return Random(seed, 12 + 3 * (seed % 15)).run()

    agree(monkeypatch, program)


def test_a_draw_that_nobody_keeps_compiles_nothing(monkeypatch):
    def program():
        duo.manual_seed(3)
        for shape in ((5, 7), (11,), (3, 3, 3)):
            duo.rand(*shape)
            duo.randn(*shape)
        return duo.get_rng_state()

    agree(monkeypatch, program)
    duo.synchronize()
    tracing.forget()
    runtime.clear_cache()
    before = runtime.statistics.compiled
    state = program()._array()
    assert runtime.statistics.compiled == before and state[1] == 2 * (9 + 3 + 7)
