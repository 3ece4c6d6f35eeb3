"""optimizer.step() of a program that ran before is one native call. It is taken when it can be, the bits are those of recorded steps whatever
comes in between, and interrupts, other owners and errors find it as careful as those."""

import contextlib
import gc
import random
import sys
import weakref

import numpy as np
import pytest

import duo
from duo import nn, runtime
from duo.eager.trace import hooks
from duo.optim.known import KnownStep, Memory
from duo_ir.errors import GradientError

pytestmark = pytest.mark.skipif(hooks.busy, reason="flushes between ops: every step is recorded")


class Counted:
    """How often steps were known, or would have been but had to be recorded."""

    def __init__(self, monkeypatch):
        self.taken, self.refused = 0, 0
        run = KnownStep.run

        def counting(known, *args):
            took = run(known, *args)
            self.taken += took
            self.refused += not took
            return took

        monkeypatch.setattr(KnownStep, "run", counting)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


@pytest.fixture
def recorded(monkeypatch):
    """A context in which no step is known."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(Memory, "watch", lambda *_: False)
            yield

    return context


def two_groups(params):
    first, *rest = params
    return duo.optim.AdamW([{"params": [first], "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01)


OPTIMIZERS = {
    "sgd": lambda p: duo.optim.SGD(p, lr=0.05),
    "momentum": lambda p: duo.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: duo.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: duo.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw, two groups": two_groups,
    "rmsprop": lambda p: duo.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


class Job:
    """A small model, its optimiser, and a step."""

    def __init__(self, make=OPTIMIZERS["adam"]):
        duo.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
        self.optimizer = make(list(self.model.parameters()))
        self.x, self.y = duo.randn(7, 6), duo.randn(7, 3)
        self.losses = []

    def forward(self):
        return nn.functional.mse_loss(self.model(self.x), self.y)

    def step(self, before=None):
        self.optimizer.zero_grad()
        loss = self.forward()
        loss.backward()
        if before is not None:
            before(self)
        self.optimizer.step()
        self.losses.append(loss)

    def state(self):
        return [*self.model.parameters(), *[v for s in self.optimizer.state.values() for v in s.values()]]

    def values(self):
        rows = [t.detach().numpy().copy() for t in self.state()]
        grads = [p.grad.numpy().copy() for p in self.model.parameters() if p.grad is not None]
        return rows + grads + [np.array([loss.item() for loss in self.losses])]


def assert_same(a, b):
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_known_from_the_fourth_or_fifth_on(recorded, monkeypatch, name):
    with recorded():
        plain = Job(OPTIMIZERS[name])
        for _ in range(12):
            plain.step()
        expected = plain.values()
    counted = Counted(monkeypatch)
    job = Job(OPTIMIZERS[name])
    for _ in range(12):
        job.step()
    assert counted.taken >= 7
    assert_same(job.values(), expected)


def every_other_loss_is_looked_at(job):
    if len(job.losses) % 2:
        job.model(job.x).sum().item()


def gradients_are_clipped(job):
    nn.utils.clip_grad_norm_(job.model.parameters(), 0.1)


def a_gradient_is_missing_now_and_then(job):
    if len(job.losses) % 4 == 3:
        next(job.model.parameters()).grad = None


def a_gradient_is_replaced(job):
    p = next(job.model.parameters())
    p.grad = p.grad * 2 if len(job.losses) % 3 else duo.ones_like(p)


def the_rate_changes(job):
    for group in job.optimizer.param_groups:
        group["lr"] = 0.01 / (1 + len(job.losses))


def options_change(job):
    for group in job.optimizer.param_groups:
        group["maximize"] = len(job.losses) > 6


def a_copy_is_held(job):
    job.kept = [*getattr(job, "kept", []), [p.detach() for p in job.model.parameters()]]


def a_parameter_is_written(job):
    if len(job.losses) % 5 == 4:
        with duo.no_grad():
            next(job.model.parameters()).mul_(0.5)


def a_slot_is_written(job):
    if len(job.losses) == 8:
        for slots in job.optimizer.state.values():
            slots["exp_avg"].zero_()


def state_is_loaded(job):
    if len(job.losses) == 7:
        job.optimizer.load_state_dict(job.optimizer.state_dict())


def a_parameter_stops_training(job):
    if len(job.losses) == 7:
        p = list(job.model.parameters())[-1]
        p.grad = None
        p.requires_grad_(False)


def a_graph_from_before_is_kept(job):
    job.old = job.forward()


def a_counter_of_the_model_moves(job):
    job.model.steps = len(job.losses)


def the_step_counter_is_shown(job):
    job.counter = [s["step"].detach() for s in job.optimizer.state.values()]


BETWEEN = [
    every_other_loss_is_looked_at, gradients_are_clipped, a_gradient_is_missing_now_and_then, a_gradient_is_replaced, the_rate_changes,
    options_change, a_copy_is_held, a_parameter_is_written, a_slot_is_written, state_is_loaded, a_parameter_stops_training,
    a_graph_from_before_is_kept, a_counter_of_the_model_moves, the_step_counter_is_shown,
]  # fmt: skip


@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_the_bits_are_those_of_recorded_steps(recorded, between):
    with recorded():
        plain = Job()
        for _ in range(14):
            plain.step(between)
        expected = plain.values()
    job = Job()
    for _ in range(14):
        job.step(between)
    assert_same(job.values(), expected)
    if hasattr(job, "kept"):
        for mine, theirs in zip(job.kept, plain.kept, strict=True):
            assert_same([t.numpy() for t in mine], [t.numpy() for t in theirs])


def test_what_changes_for_good_is_known_again(counted):
    job = Job()
    for between in (None, state_is_loaded, options_change):
        for _ in range(8):
            job.step(between)
        assert counted.taken > 0
        counted.taken = 0


def test_values_stay_where_they_are(counted):
    job = Job()
    for _ in range(6):
        job.step()
    counted.taken = 0
    tensors = [t for t in job.state() if t._type.shape]
    before = [(id(t._val), t._val.buf.ptr) for t in tensors]
    job.step()
    assert counted.taken == 1
    assert [(id(t._val), t._val.buf.ptr) for t in tensors] == before


def test_what_is_updated_beside_the_step_is_overwritten_as_before(recorded):
    """A moving average of activations: where its old value can be read by nobody, the step leaves it its memory or is recorded."""

    def overwritten():
        duo.manual_seed(0)
        weight = duo.randn(96, 96).requires_grad_()
        optimizer, average, x, out = duo.optim.SGD([weight], lr=0.1), duo.zeros(96, 96), duo.randn(96, 96), []
        for _ in range(9):
            optimizer.zero_grad()
            y = (x @ weight).tanh()
            y.square().mean().backward()
            with duo.no_grad():
                average.mul_(0.9).add_(y.detach())
            del y
            before = runtime.statistics.overwritten
            optimizer.step()
            out.append(runtime.statistics.overwritten - before)
        return out[3:]

    with recorded():
        expected = overwritten()
    assert overwritten() == expected


def test_a_graph_from_before_says_that_it_was_overwritten():
    job = Job()
    for _ in range(6):
        job.step()
    loss = job.forward()
    job.step()
    with pytest.raises(GradientError, match=r"in.place"):
        loss.backward()


def test_an_index_out_of_range_is_raised_and_loses_no_parameter(counted):
    duo.manual_seed(0)
    table, head = nn.Embedding(5, 4), nn.Linear(4, 3)
    optimizer = duo.optim.SGD([*table.parameters(), *head.parameters()], lr=0.1)

    def run(index):
        optimizer.zero_grad()
        loss = head(table(index)).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    good = duo.tensor([0, 2, 4])
    for _ in range(6):
        run(good).item()
    assert counted.taken
    with pytest.raises(IndexError, match="99"):
        run(duo.tensor([1, 99, 3])).item()


def test_interrupts_at_every_line_of_a_known_step(counted):
    """After an interrupt at any line parameters, slots and the counter are all of before the step or all of after it, and training goes on."""
    twin = Job()
    rows = [twin.values()[: len(twin.state())]]
    for _ in range(60):
        twin.step()
        rows.append([t.detach().numpy().copy() for t in twin.state()])
    job = Job()
    for _ in range(8):
        job.step()
    events, at, count = [0], [-1], 0

    def tracer(frame, kind, arg):
        # Not in the runtime: a tracer can raise where no signal does, between the end of a `with` block and the release of its lock, and that
        # of the allocator is shared.
        if not frame.f_globals.get("__name__", "").startswith("duo."):
            return None
        events[0] += 1
        if events[0] == at[0]:
            raise KeyboardInterrupt
        return tracer

    def step(event):
        events[0], at[0] = 0, event
        job.optimizer.zero_grad()
        loss = job.forward()
        loss.backward()
        before = sys.gettrace()
        try:
            sys.settrace(tracer)
            job.optimizer.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        return loss

    step(-1)
    total, rng = events[0], random.Random(0)
    assert total > 30
    done = next(k for k, row in enumerate(rows) if row and len(row) == len(job.state()) and _equal(job, row))
    assert done == 9
    for event in rng.sample(range(1, total + 1), min(total, 45)):
        loss = step(event)
        assert np.isfinite(loss.item())
        here = [k for k in (done, done + 1) if _equal(job, rows[k])]
        assert here, event
        count += here[0] == done
        done = here[0]
    assert count > 5


def _equal(job, row):
    return all(np.array_equal(t.detach().numpy(), r) for t, r in zip(job.state(), row))


def test_the_optimizer_and_its_parameters_can_be_freed():
    job = Job()
    for _ in range(8):
        job.step()
    seen = [weakref.ref(p) for p in job.model.parameters()]
    del job
    gc.collect()
    assert all(r() is None for r in seen)
