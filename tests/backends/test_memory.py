"""The CPU allocator: reuse, alignment, limits, NumPy views, threads, fork."""

from __future__ import annotations

import gc
import itertools
import os
import threading

import numpy as np
import pytest

from duo_backends.blocks import ALIGNMENT, OutOfMemory, class_size
from duo_backends.cpu import memory
from duo_backends.cpu.memory import BIG, Allocator, Buffer
from duo_ir.errors import ArgumentError
from duo_ir.types import DTYPES, bf16, f32

SIZES = [0, 1, 63, 64, 65, 512, 513, 4096, 65537, BIG - 1, BIG, BIG + 1, 5 * BIG + 3]


@pytest.mark.parametrize("nbytes", SIZES)
def test_blocks_are_aligned_and_reused(nbytes):
    allocator = Allocator()
    buffer = allocator.allocate(nbytes)
    assert buffer.nbytes == nbytes and buffer.ptr and buffer.ptr % ALIGNMENT == 0
    buffer.numpy(DTYPES["u8"], (nbytes,))[:] = 7
    address = buffer.ptr
    del buffer
    reserved = allocator.statistics.reserved
    again = allocator.allocate(nbytes)
    assert again.ptr == address and allocator.statistics.reserved == reserved


def test_classes_waste_little():
    for n in [*range(0, 70_000, 13), *(2**k + d for k in range(16, 40) for d in (-1, 0, 1))]:
        size = class_size(n)
        assert size >= max(n, 64) and size % 64 == 0 and (n < 512 or size <= n * 1.126)
        assert n < BIG or size % 4096 == 0


def test_live_blocks_do_not_overlap():
    allocator = Allocator()
    rng = np.random.default_rng(0)
    live: list[Buffer] = []
    for _ in range(3000):
        if live and rng.random() < 0.45:
            live.pop(int(rng.integers(len(live))))
        else:
            live.append(allocator.allocate(int(rng.choice([1, 64, 100, 1000, 5000, 300_000, 1_500_000]))))
        if len(live) > 60:
            del live[:30]
    spans = sorted((b.ptr, b.ptr + b.nbytes) for b in live)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_statistics_and_trim():
    allocator = Allocator()
    a, b = allocator.allocate(4 * BIG), allocator.allocate(8 * BIG)
    assert allocator.statistics.allocated == 12 * BIG and allocator.statistics.cached == 0
    del a
    assert allocator.statistics.cached == 4 * BIG
    allocator.trim()
    assert allocator.statistics.cached == 0 and allocator.statistics.reserved == 8 * BIG
    assert allocator.statistics.peak == 12 * BIG
    del b


def test_the_cache_is_limited():
    allocator = Allocator(limit=16 * BIG)
    for k in range(1, 40):
        allocator.allocate(k * BIG)
        assert allocator.statistics.cached <= 16 * BIG + 2 * BIG + k * BIG
    live = [allocator.allocate(BIG) for _ in range(100)]
    del live
    assert allocator.statistics.cached <= 18 * BIG


def test_a_new_size_takes_the_place_of_what_is_free():
    allocator = Allocator()
    step = [allocator.allocate(n * BIG) for n in (1, 2, 3, 4)]
    del step
    later = allocator.allocate(9 * BIG)
    assert allocator.statistics.peak == 10 * BIG and allocator.statistics.reserved <= 11 * BIG
    del later


def test_sizes_that_take_turns_are_all_kept_in_the_end(monkeypatch):
    allocator = Allocator()
    mapped = []
    original = memory.system.map_block
    monkeypatch.setattr(memory.system, "map_block", lambda n: mapped.append(n) or original(n))
    sizes = [n * BIG for n in (1, 5, 2, 7, 3)]
    for _ in range(20):
        mapped.clear()
        for n in sizes:
            allocator.allocate(n)
    assert not mapped
    assert allocator.statistics.reserved == sum(sizes)


def test_no_memory_is_reported(monkeypatch):
    allocator = Allocator()
    kept = allocator.allocate(2 * BIG)
    allocator.allocate(BIG)
    monkeypatch.setattr(memory.system, "map_block", lambda n: 0)
    with pytest.raises(OutOfMemory, match=f"{3 * BIG} bytes"):
        allocator.allocate(3 * BIG)
    assert allocator.statistics.cached == 0  # it gave back what it could first
    with pytest.raises(ArgumentError):
        allocator.allocate(-1)
    del kept


def test_a_refused_huge_block():
    with pytest.raises(MemoryError):
        memory.allocate(1 << 60)


@pytest.mark.parametrize("d", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 5)])
def test_numpy_views(d, shape):
    buffer = memory.allocate(int(np.prod(shape)) * d.itemsize)
    view = buffer.numpy(d, shape)
    assert view.dtype == d.numpy and view.shape == shape and view.flags.c_contiguous and view.flags.writeable
    view[...] = 1
    assert np.array_equal(buffer.read(d, shape), np.ones(shape, d.numpy))


def test_a_view_keeps_the_memory():
    buffer = memory.allocate(4096)
    view = buffer.numpy(bf16, (2048,))[5:9]
    view[:] = 3
    address = buffer.ptr
    assert not buffer.donatable
    del buffer
    gc.collect()
    others = [memory.allocate(4096) for _ in range(50)]
    assert all(o.ptr != address for o in others)
    assert np.array_equal(view.astype(np.float32), np.full(4, 3))
    del view
    gc.collect()
    assert memory.allocate(4096).ptr == address


def test_a_view_must_fit():
    with pytest.raises(ArgumentError, match="do not hold"):
        memory.allocate(15).numpy(f32, (4,))


def test_borrowing_from_numpy():
    array = np.arange(6, dtype=np.float32)
    buffer = Buffer.from_numpy(array)
    assert not buffer.donatable and buffer.nbytes == 24
    array[2] = 50
    del array
    gc.collect()
    assert np.array_equal(buffer.numpy(f32, (2, 3)), np.array([[0, 1, 50], [3, 4, 5]], np.float32))
    with pytest.raises(ArgumentError, match="contiguous"):
        Buffer.from_numpy(np.zeros((4, 4))[:, 1])
    with pytest.raises(ArgumentError, match="aligned"):
        Buffer.from_numpy(np.frombuffer(bytes(9), np.uint8)[1:].view(np.float64))


def test_threads():
    allocator = Allocator()
    problems = []

    def work(number):
        rng = np.random.default_rng(number)
        live = []
        for _ in range(1500):
            b = allocator.allocate(int(rng.choice([8, 200, 3000, BIG])))
            b.numpy(DTYPES["u8"], (8,))[:] = number
            live.append(b)
            if len(live) > 6:
                old = live.pop(0)
                if not np.all(old.read(DTYPES["u8"], (8,)) == number):
                    problems.append(number)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    gc.collect()
    assert not problems
    assert allocator.statistics.reserved < 100 * BIG


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_while_another_thread_allocates():
    allocator = memory.allocator
    stop = threading.Event()

    def work():
        while not stop.is_set():
            allocator.trim()
            allocator.allocate(BIG)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    allocator.trim()
                    allocator.allocate(3 * BIG).numpy(f32, (4,))[:] = 1
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        worker.join()
