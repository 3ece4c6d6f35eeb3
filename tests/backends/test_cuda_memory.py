"""Device memory: the pool's reuse, limits and errors, and copies through page-locked memory."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest

from duo_backends.blocks import OutOfMemory
from duo_backends.cuda.memory import SLAB, SMALL, Pool, Transfers
from duo_ir.errors import ArgumentError
from tests.cuda_emulator.support import driver, needs_emulator

pytestmark = needs_emulator
MIB = 1 << 20


@pytest.fixture
def pool():
    made = Pool(driver())
    yield made
    gc.collect()
    made.trim()


def test_nothing_is_taken_before_it_is_asked_for(pool):
    assert pool.statistics.reserved == 0


def test_blocks_are_reused(pool):
    for nbytes in (0, 1, 255, 256, 257, 5000, SMALL - 1, SMALL, 3 * MIB + 5):
        buffer = pool.allocate(nbytes)
        assert buffer.nbytes == nbytes and buffer.donatable
        ptr = buffer.ptr
        del buffer
        reserved = pool.statistics.reserved
        assert pool.allocate(nbytes).ptr == ptr and pool.statistics.reserved == reserved


def test_live_blocks_do_not_overlap(pool):
    rng = np.random.default_rng(0)
    live = [pool.allocate(int(n)) for n in rng.integers(0, 70_000, 200)]
    spans = sorted((b.ptr, b.ptr + b.nbytes) for b in live)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_statistics_and_trim(pool):
    a, b = pool.allocate(4 * MIB), pool.allocate(8 * MIB)
    small = pool.allocate(10)
    assert pool.statistics.reserved == pool.statistics.allocated == 12 * MIB + SLAB
    del a, small
    assert pool.statistics.cached == 4 * MIB + 256
    assert pool.trim() == 4 * MIB and pool.statistics.reserved == 8 * MIB + SLAB
    assert pool.statistics.peak == 12 * MIB + SLAB
    del b


def test_a_limit_frees_what_is_idle_and_then_names_the_sizes():
    pool = Pool(driver(), limit=8 * MIB)
    a = pool.allocate(4 * MIB)
    del a
    b = pool.allocate(6 * MIB)  # the idle block has to go
    with pytest.raises(
        OutOfMemory, match=rf"{4 * MIB} bytes.*holds {6 * MIB} bytes, {6 * MIB} of them.*limit is {8 * MIB}"
    ):
        pool.allocate(4 * MIB)
    del b
    pool.trim()


def test_a_full_device_is_retried_and_then_reported(monkeypatch):
    free = driver()
    with free:
        room = free.memory()[0]
    monkeypatch.setenv("DUO_EMU_MEMORY_MB", str((4096 * MIB - room) // MIB + 24))
    pool = Pool(free)
    a = pool.allocate(16 * MIB)
    with pytest.raises(OutOfMemory, match=rf"no memory for a buffer of {18 * MIB} bytes.*bytes free"):
        pool.allocate(18 * MIB)
    del a
    b = pool.allocate(18 * MIB)
    del b
    pool.trim()


def test_negative_sizes_are_refused(pool):
    with pytest.raises(ArgumentError, match="-1 bytes"):
        pool.allocate(-1)


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 4096, 4097, 50_000])
def test_copies_through_small_chunks(pool, nbytes):
    """The array may be changed as soon as `upload` returns, though the device has read nothing yet."""
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes).astype("u1")
    want = data.copy()
    buffer = pool.allocate(nbytes)
    with pool.driver:
        transfers = Transfers(pool.driver, pool.driver.stream(), chunk=4096)
        transfers.upload(buffer.ptr, data)
        data[:] = 0
        out = np.empty_like(want)
        transfers.download(out, buffer.ptr)
    assert (out == want).all()
