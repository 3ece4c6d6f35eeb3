"""Results take the memory of inputs that nobody else can read: parameters and optimiser state stay where they are from step to step. Every
other owner of a value keeps it, a failing program loses nothing, and an interrupt finds each value whole."""

import gc
import os
import signal
import threading
import weakref

import numpy as np
import pytest

import duo
from duo import nn, runtime
from duo.eager import cells
from tests.frontends.disturbances import TRIALS, interrupts, torn_reads

SIZE = 96  # 96 x 96 floats: large enough for eager mode to overwrite


def pointers(tensors):
    duo.synchronize()
    return [t._val.buf.ptr for t in tensors]


class Training:
    """A layer, its optimiser, and a step in one of the modes."""

    def __init__(self, mode="eager", optimizer=duo.optim.Adam, size=SIZE):
        duo.manual_seed(0)
        self.model = nn.Linear(size, size)
        self.optimizer = optimizer(self.model.parameters(), lr=0.01)
        self.x = duo.randn(4, size)
        self.step = self._step if mode == "eager" else duo.compile(self._step)

    def _step(self):
        self.optimizer.zero_grad()
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss

    @property
    def weight(self):
        return self.model.weight

    def state(self):
        slots = [v for s in self.optimizer.state.values() for v in s.values()]
        return [*self.model.parameters(), *slots]

    def values(self):
        return [t.detach().numpy().copy() for t in self.state()]


MODES = ["eager", "compile"]


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def undisturbed(mode, steps, **options):
    job = Training(mode, **options)
    for _ in range(steps):
        job.step()
    return job.values()


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_state_stays_where_it_is(mode):
    job = Training(mode)
    for _ in range(3):
        job.step()
    large = [t for t in job.state() if t._type.size == SIZE * SIZE]
    assert len(large) == 3
    before = pointers(large)
    counted = runtime.statistics.overwritten
    for _ in range(3):
        job.step()
        assert pointers(large) == before
    assert mode != "eager" or runtime.statistics.overwritten - counted == 9 * SIZE * SIZE * 4


class Embedding(Training):
    """A model with indices, which a program checks while it runs: rows are read in the forward pass and added to in the backward pass."""

    def __init__(self, mode):
        super().__init__(mode)
        self.model = nn.Sequential(nn.Embedding(SIZE, SIZE), nn.Linear(SIZE, SIZE))
        self.optimizer = duo.optim.Adam(self.model.parameters(), lr=0.01)
        self.x, self.y = duo.arange(8), duo.arange(8)

    def _step(self):
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss


def test_the_state_of_an_embedding_stays_where_it_is(mode):
    job = Embedding(mode)
    for _ in range(3):
        job.step()
    large = [t for t in job.state() if t._type.size == SIZE * SIZE]
    assert len(large) == 6
    before = pointers(large)
    for _ in range(3):
        job.step()
        assert pointers(large) == before


class Normed(Training):
    """A block with norms: a norm's weight is read by the gradient of its input, and its own gradient comes before that one in the program."""

    def __init__(self, mode):
        super().__init__(mode)
        self.model = nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE))
        self.optimizer = duo.optim.Adam(self.model.parameters(), lr=0.01)


def test_the_state_of_norms_stays_where_it_is(mode):
    job = Normed(mode)
    for _ in range(6):  # from the fifth on an eager step is one native call, small state in place too
        job.step()
    state = [t for t in job.state() if t._type.shape]
    before = pointers(state)
    for _ in range(3):
        job.step()
        assert pointers(state) == before


class Viewing(Training):
    """A step that takes a view of a tensor from outside, whose storage remembers who has done so."""

    def _step(self):
        self.optimizer.zero_grad()
        loss = self.model(self.x.flatten().view(4, SIZE)).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss


def test_replaced_state_goes_without_a_garbage_collection(mode):
    job = Viewing(mode)
    gc.disable()
    try:
        for _ in range(4):
            duo.synchronize()
            old = weakref.ref(job.weight._val.buf)
            job.step()
            duo.synchronize()
            assert old() is None or old() is job.weight._val.buf
    finally:
        gc.enable()


def test_the_bits_are_those_of_a_run_that_overwrites_nothing(mode):
    expected = undisturbed(mode, 6)
    job, kept = Training(mode), []
    for _ in range(6):
        kept.append([t.detach() for t in job.state()])
        job.step()
    assert same(job.values(), expected)


# ------------------------------------------------------------------------------------------------------- other owners
def hold_clone(job):
    return job.weight.detach().clone()


def hold_result(job):
    return job.weight * 1.0


def hold_pending_view(job):
    return job.weight[1:3] + 0.0


def hold_state_copy(job):
    return {k: v.clone() for k, v in job.model.state_dict().items()}["weight"]


def hold_graph(job):
    """A result whose backward pass reads the weight as it was."""
    x = duo.ones(2, SIZE, requires_grad=True)
    y = job.model(x).sum()
    y.item()
    return x, y


OWNERS = [hold_clone, hold_result, hold_pending_view, hold_state_copy]


@pytest.mark.parametrize("hold", OWNERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("looked", [False, True])
def test_copies_keep_their_values(mode, hold, looked):
    job = Training(mode)
    for _ in range(3):
        job.step()
    before = job.weight.detach().numpy().copy()
    held = hold(job)
    if looked:
        held.detach().numpy()
    for _ in range(3):
        job.step()
    want = before[1:3] if hold is hold_pending_view else before
    assert np.array_equal(held.detach().numpy(), want)
    assert same(job.values(), undisturbed(mode, 6))


@pytest.mark.parametrize("alias", ["detach", "data", "view", "numpy", "tied"])
def test_aliases_see_every_update(mode, alias):
    """What shares the parameter's storage shows the new value after each step, as in PyTorch; what NumPy shows lives in the same memory."""
    job = Training(mode)
    for _ in range(2):
        job.step()
    made = {
        "detach": lambda: job.weight.detach(), "data": lambda: job.weight.data, "view": lambda: job.weight.detach().view(-1),
        "numpy": lambda: job.weight.detach().numpy(), "tied": lambda: job.model.weight,
    }[alias]()  # fmt: skip
    for k in range(3, 7):
        job.step()
        seen = made if alias == "numpy" else made.detach().numpy().copy()
        assert np.array_equal(seen.reshape(SIZE, SIZE), undisturbed(mode, k)[0])


def test_an_array_that_was_borrowed_is_written_as_before(mode):
    job = Training(mode)
    array = np.ones((SIZE, SIZE), np.float32)
    job.weight.data = duo.from_numpy(array)
    for _ in range(3):
        job.step()
        assert np.array_equal(array, job.weight.detach().numpy())
    assert not np.array_equal(array, np.ones((SIZE, SIZE)))


def test_a_graph_from_before_keeps_what_it_reads(mode):
    """Backward through a pass that read the old weight fails as PyTorch's does, or uses the old weight; never the new one."""
    job = Training(mode)
    for _ in range(2):
        job.step()
    before = job.weight.detach().numpy().copy()
    x, y = hold_graph(job)
    job.step()
    try:
        y.backward()
    except RuntimeError as error:
        assert "in-place" in str(error) or "overwritten" in str(error)
    else:
        assert np.allclose(x.grad.numpy(), before.sum(0))


def test_saved_checkpoints_keep_their_values(mode, tmp_path):
    job = Training(mode)
    for _ in range(2):
        job.step()
    before = job.values()
    duo.save(job.model.state_dict(), str(tmp_path / "w.safetensors"))
    held = duo.load(str(tmp_path / "w.safetensors"))
    for _ in range(2):
        job.step()
    assert np.array_equal(held["weight"].numpy(), before[0])


def test_hooks_and_gradients_keep_theirs(mode):
    job, seen = Training(mode), []
    if mode == "eager":
        job.weight.register_hook(lambda g: seen.append(g))
    kept, copies = [], []
    for _ in range(4):
        job.step()
        kept.append(job.weight.grad)
        copies.append(job.weight.grad.numpy().copy())
    assert all(np.array_equal(g.numpy(), c) for g, c in zip(kept, copies))
    assert all(np.array_equal(g.numpy(), c) for g, c in zip(seen, copies))


def test_a_dead_input_of_a_program_is_overwritten():
    x = duo.ones(SIZE, SIZE)
    duo.synchronize()
    for k in range(4):
        if k == 1:  # what is new runs entry by entry, and makes new buffers
            counted = runtime.statistics.overwritten
        x = x * 2 + 1
        duo.synchronize()
    assert runtime.statistics.overwritten - counted == 3 * SIZE * SIZE * 4
    assert x[0, 0].item() == 31.0
    keep = x
    y = x * 2
    duo.synchronize()
    assert keep[0, 0].item() == 31.0 and y[0, 0].item() == 62.0


# --------------------------------------------------------------------------------------------------------- failures
def test_a_failing_program_loses_nothing(mode):
    duo.manual_seed(0)
    table, head = nn.Embedding(10, SIZE), nn.Linear(SIZE, SIZE)
    params = [*table.parameters(), *head.parameters()]
    optimizer = duo.optim.Adam(params, lr=0.01)
    index = duo.tensor([1, 2, 3])

    def step(index):
        optimizer.zero_grad()
        loss = head(table(index)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    run = step if mode == "eager" else duo.compile(step)
    for _ in range(3):
        run(index)
    weight = head.weight._val.buf.ptr if mode != "eager" else pointers([head.weight])[0]
    run(index)
    assert pointers([head.weight]) == [weight]  # a program with checks overwrites too, after the last of them
    tensors = [*params, *[v for s in optimizer.state.values() for v in s.values()]]
    before = [t.detach().numpy().copy() for t in tensors]
    with pytest.raises(IndexError):
        run(duo.tensor([1, 99, 3]))
        [t.detach().numpy() for t in tensors]
    if mode == "eager":
        return  # the step's results are poisoned with the error, as is any lazy result
    assert same([t.detach().numpy() for t in tensors], before)
    run(index)
    assert all(np.isfinite(t.detach().numpy()).all() for t in tensors)


# ------------------------------------------------------------------------------------------- interrupts, threads
def test_interrupts_find_every_value_whole(mode):
    """Each parameter and slot is, after an interrupt at any moment, its value of before or of after the step; training goes on."""
    job, twin = Training(mode), Training(mode)
    for _ in range(3):
        job.step()
        twin.step()
    hits = 0
    with interrupts(1e-6, 4e-4) as disturbed:
        for _ in range(TRIALS):
            old = job.values()
            hits += disturbed(job.step)
            duo.set_grad_enabled(True)
            new = job.values()
            for t, v in zip(twin.state(), old, strict=True):
                t.data.copy_(duo.tensor(v))
            twin.step()
            for n, o, s in zip(new, old, twin.values(), strict=True):
                assert np.array_equal(n, o) or np.array_equal(n, s)
    assert hits > 20


def test_other_threads_read_whole_values(mode):
    """A weight whose elements are all equal stays so for every reader while steps overwrite it."""
    w = duo.full((700, 700), 1.0, requires_grad=True)
    optimizer = duo.optim.SGD([w], lr=1.0)

    def step():
        optimizer.zero_grad()
        (w * 1.0).sum().backward()
        optimizer.step()

    run = step if mode == "eager" else duo.compile(step)
    for _ in range(3):
        run()
    if mode == "compile":
        assert next(iter(run._replays.values())).recording.program.runnable.releases  # readers run meanwhile
    assert not torn_reads(lambda: [(w.detach() * 1.0).numpy()], run, 300)
    assert w.detach().numpy()[0, 0] == 1.0 - 303


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_during_a_compiled_step_reads_whole_values():
    job = Training("compile", size=400)
    for _ in range(3):
        job.step()
    stop = threading.Event()

    def train():
        while not stop.is_set():
            job.step()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(8):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    signal.alarm(200)
                    with duo.no_grad():
                        code = 0 if np.isfinite((job.weight.detach() * 1.0).numpy()).all() else 2
                finally:
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


def test_what_is_recorded_and_not_yet_run_reads_the_old_values():
    job = Training("compile")
    for _ in range(3):
        job.step()
    before = job.weight.detach().numpy().copy()
    pending = job.weight + 0.0
    job.step()
    assert np.array_equal(pending.detach().numpy(), before)
    assert not np.array_equal(job.weight.detach().numpy(), before)


def test_gradients_stay_where_they_are_unless_someone_holds_them():
    job = Training("compile")
    for _ in range(3):
        job.step()
    first = job.weight.grad._val.buf.ptr
    job.step()
    assert job.weight.grad._val.buf.ptr == first
    held = job.weight.grad
    copy = held.numpy().copy()
    job.step()
    assert job.weight.grad is not held and np.array_equal(held.numpy(), copy)


def test_layout_is_found_here():
    """Without it compiled steps would overwrite nothing, and say nothing of it."""
    assert cells.layout() is not None


def test_gradients_accumulate_and_feed_a_step_where_they_are():
    """Compiled backward() alone adds to `.grad` in place, and a compiled optimizer.step() reads it there; the bits are eager mode's."""
    rows = []
    for wrap in (lambda f: f, duo.compile):
        job = Training("eager")

        def backward(x, job=job):
            loss = job.model(x).square().mean()
            loss.backward()
            return loss

        accumulate, step = wrap(backward), wrap(job.optimizer.step)
        for k in range(12):
            accumulate(job.x)
            if k == 6:
                job.weight.grad = None
            if k % 3 == 2:
                step()
            rows.append([*job.values(), job.weight.grad.numpy().copy() if job.weight.grad is not None else None])
        if wrap is duo.compile:
            for compiled in (accumulate, step):
                assert next(reversed(compiled._replays.values())).run.__name__ == "quick"
            step(), accumulate(job.x)
            before = [p.grad._val.buf.ptr for p in job.model.parameters()] + pointers(job.state())
            step(), accumulate(job.x)
            assert [p.grad._val.buf.ptr for p in job.model.parameters()] + pointers(job.state()) == before
    for plain, compiled in zip(rows[:12], rows[12:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(plain, compiled, strict=True))
