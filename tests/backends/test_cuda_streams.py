"""Streams on the emulated GPU, which runs a stream's work only when somebody waits for it: no order of work and no missing wait changes a
result, and no block of memory is used again before the streams that read it are through."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from duo_backends.blocks import OutOfMemory
from duo_backends.cuda.backend import CudaBackend
from duo_backends.cuda.memory import Mark
from duo_backends.cuda.streams import Runtime
from duo_ir import ops
from duo_ir.core import function_of
from duo_ir.errors import IndexOutOfRange
from duo_ir.pipeline import lower
from duo_ir.types import TensorType, f32, i64
from tests.cuda_emulator import build
from tests.cuda_emulator.support import driver, needs_emulator

pytestmark = needs_emulator
N = 300
ROW = TensorType(f32, (N,))


def backend(**options) -> CudaBackend:
    return CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), **options)


@pytest.fixture(params=["pool", "exact"])
def gpu(request):
    yield backend(exact=request.param == "exact")
    gc.collect()


def bound(gpu, body, *types):
    return gpu.compile(lower(function_of(body, *types))).bind({})


def double(x):
    return x * 2 + 1


def values(k: int = 0, n: int = N) -> np.ndarray:
    return (np.arange(n) + 7 * k).astype("f4")


def read(gpu, buffer, n: int = N) -> np.ndarray:
    return gpu.to_numpy(buffer, f32, (n,))


def test_one_stream_marks_nothing(gpu):
    x = gpu.from_numpy(values())
    (y,) = bound(gpu, double, ROW).run([x])
    assert not gpu.runtime.tracking and x.uses is None and y.uses is None


def test_what_one_stream_makes_another_reads(gpu):
    step, runtime = bound(gpu, double, ROW), gpu.runtime
    before = gpu.from_numpy(values())
    a, b = runtime.new_stream(), runtime.new_stream()
    with runtime.on(a):
        (x,) = step.run([before])
    with runtime.on(b):
        (y,) = step.run([x])
        (z,) = step.run([before])
    want = values() * 2 + 1
    assert (read(gpu, y) == want * 2 + 1).all() and (read(gpu, x) == want).all() and (read(gpu, z) == want).all()


def test_without_the_waits_it_would_be_wrong(monkeypatch):
    """The emulator tells: what these tests rely on."""
    gpu = backend()
    step, runtime = bound(gpu, double, ROW), gpu.runtime
    x = gpu.from_numpy(values())
    a, b = runtime.new_stream(), runtime.new_stream()
    monkeypatch.setattr(Runtime, "acquire", lambda *rest: None)
    with runtime.on(a):
        (y,) = step.run([x])
    with runtime.on(b):
        (z,) = step.run([y])
        assert not (read(gpu, z) == (values() * 2 + 1) * 2 + 1).all()
    runtime.synchronize()


def test_memory_is_not_used_again_while_another_stream_reads_it(gpu):
    step, runtime = bound(gpu, double, ROW), gpu.runtime
    a, b = runtime.new_stream(), runtime.new_stream()
    with runtime.on(a):
        x = gpu.from_numpy(values())
    with runtime.on(b):
        (y,) = step.run([x])
    address = x.ptr
    del x
    with runtime.on(a):
        other = gpu.from_numpy(values(1))
        assert other.ptr != address
        runtime.synchronize(a)  # the copy to the device has run, the program of `b` has not
        others = [gpu.from_numpy(values(k)) for k in range(2, 6)]  # by asking, the emulator goes on with `b`
        runtime.synchronize(a)
    assert (read(gpu, y) == values() * 2 + 1).all()
    runtime.synchronize()
    runtime.pool.reap()
    with runtime.on(a):
        assert address in [o.ptr for o in (*others, gpu.allocate(4 * N))]


def test_an_input_is_not_overwritten_while_another_stream_reads_it(gpu):
    step, runtime = bound(gpu, double, ROW), gpu.runtime
    a, b = runtime.new_stream(), runtime.new_stream()
    x = gpu.from_numpy(values())
    with runtime.on(a):
        (y,) = step.run([x])
    with runtime.on(b):
        (z,) = step.run([x], (0,))
        assert z is x
        runtime.synchronize(b)
    assert (read(gpu, y) == values() * 2 + 1).all() and (read(gpu, z) == values() * 2 + 1).all()


@pytest.mark.parametrize("seed", range(6))
def test_any_order_on_any_streams_gives_the_same_bits(seed):
    gpu = backend(exact=seed % 3 == 0)
    rng = np.random.default_rng(seed)
    step, runtime = bound(gpu, double, ROW), gpu.runtime
    add = bound(gpu, lambda x, y: x + y, ROW, ROW)
    pair = [(gpu.from_numpy(values(k)), values(k)) for k in range(3)]
    streams = [runtime.default, *[runtime.new_stream() for _ in range(3)]]
    for n in range(120):
        with runtime.on(streams[rng.integers(4)]):
            i, j = rng.integers(len(pair), size=2)
            (x, want), (y, other) = pair[i], pair[j]
            match rng.integers(7):
                case 0:
                    pair.append((step.run([x])[0], want * 2 + 1))
                case 1:
                    pair.append((add.run([x, y])[0], want + other))
                case 2:  # overwrites its input
                    if sum(b is x for b, _ in pair) == 1:
                        pair[i] = (step.run([x], (0,))[0], want * 2 + 1)
                case 3:
                    if len(pair) > 2:
                        pair.pop(i)
                case 4:
                    pair.append((gpu.from_numpy(values(n)), values(n)))
                case 5:
                    pair.append((runtime.duplicate(x), want))
                case 6:
                    runtime.synchronize(streams[rng.integers(4)])
        del x, y
        pair = [(b, w) for b, w in pair if np.abs(w).max() < 1e30][-8:]
        while len(pair) < 2:
            pair.append((gpu.from_numpy(values()), values()))
    for b, w in pair:
        assert (read(gpu, b) == w).all()


def test_a_failed_check_is_heard_of_on_any_stream(gpu):
    take = bound(gpu, lambda x, i: ops.gather(x, i, axes=(0,)), ROW, TensorType(i64, (2,)))
    runtime = gpu.runtime
    a, b = runtime.new_stream(), runtime.new_stream()
    x = gpu.from_numpy(values())
    with runtime.on(a):
        (y,) = take.run([x, gpu.from_numpy(np.array([0, N]))])
    with runtime.on(b):
        runtime.synchronize(b)  # it has nothing to do with it
        with pytest.raises(IndexOutOfRange, match=str(N)):
            read(gpu, y, 2)
    runtime.synchronize()


def test_a_request_waits_for_memory_that_other_streams_read():
    gpu = backend(memory_limit=6 << 20)
    big = TensorType(f32, (1 << 19,))
    step, runtime = bound(gpu, double, big), gpu.runtime
    a, b = runtime.new_stream(), runtime.new_stream()
    with runtime.on(a):
        x = gpu.from_numpy(values(0, 1 << 19))
    with runtime.on(b):
        (y,) = step.run([x])
    del x
    with runtime.on(a):
        z = gpu.from_numpy(values(1, 1 << 19))
        with pytest.raises(OutOfMemory):
            gpu.allocate(4 << 20)
    assert (read(gpu, y, 1 << 19) == values(0, 1 << 19) * 2 + 1).all()
    assert (read(gpu, z, 1 << 19) == values(1, 1 << 19)).all()
    assert runtime.pool.retries > 0 and runtime.pool.failures == 1
    del y, z


def test_borrowed_memory_is_let_go_of_when_the_work_on_it_is_done(gpu):
    class Owner:
        def __init__(self, kept):
            self.kept = kept

    step, runtime = bound(gpu, double, ROW), gpu.runtime
    runtime.track()
    owner = Owner(gpu.from_numpy(values()))
    alive = weakref.ref(owner)
    with runtime.driver:
        event = runtime.driver.foreign_event(runtime.driver.handle(runtime.default.queue))
    x = runtime.pool.borrow(owner.kept.ptr, 4 * N, owner, Mark(None, 0, event))
    del owner
    assert not x.donatable
    (y,) = step.run([x], (0,))
    assert y is not x
    del x
    assert alive() is not None
    assert (read(gpu, y) == values() * 2 + 1).all()
    runtime.pool.reap()
    assert alive() is None


def test_streams_given_back_serve_again(gpu):
    runtime = gpu.runtime
    a = runtime.new_stream()
    runtime.give_back(a)
    assert runtime.new_stream() is a and runtime.new_stream() is not a


def test_counts_of_live_bytes(gpu):
    pool, runtime = gpu.runtime.pool, gpu.runtime
    a = runtime.new_stream()
    x = gpu.allocate(5 << 20)
    with runtime.on(a):
        y = gpu.allocate(2 << 20)
    assert pool.live == pool.allocated == pool.most == 7 << 20
    del y
    assert pool.live == pool.allocated == 5 << 20 and pool.most == 7 << 20
    pool.reset_peaks()
    assert pool.most == 5 << 20
    del x
    assert pool.allocated == 0


@pytest.mark.parametrize("value", [0, 1.5, -1])
def test_filled_and_copied_buffers(gpu, value):
    runtime = gpu.runtime
    a, b = runtime.new_stream(), runtime.new_stream()
    with runtime.on(a):
        x = gpu.filled(value, f32, (N,))
    with runtime.on(b):
        y = runtime.duplicate(x)
        runtime.copy(x, gpu.from_numpy(values()), 4 * N)
    assert (read(gpu, y) == np.float32(value)).all() and (read(gpu, x) == values()).all()
    assert gpu.filled(value, f32, (0,)).nbytes == 0 and x.device == "cuda:0"
