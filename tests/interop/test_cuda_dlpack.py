"""Memory of the (emulated) GPU shared by DLPack and `__cuda_array_interface__` with another library, which works on streams of its own. The
emulator runs a stream only when somebody waits for it, so whoever reads too early, or frees too early, is found out."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest

import duo
from duo_backends import dlpack
from duo_ir.errors import ArgumentError, DTypeError, GradientError
from duo_ir.types import f32
from tests.cuda_emulator.support import driver_name, needs_emulator
from tests.frontends.cuda_support import gpu  # noqa: F401

pytestmark = needs_emulator
DEFAULT = 1  # CUDA's default stream


class Library:
    """Another library: a stream, and copies between the host and memory that it is given."""

    def __init__(self, driver):
        self.driver = driver
        with driver:
            self.stream = driver.stream()
        self.default = None if driver_name() == "PyCUDA" else ctypes.c_void_p(DEFAULT)
        self.kept = []

    @property
    def handle(self) -> int:
        return self.driver.handle(self.stream)

    def write(self, ptr: int, values: np.ndarray, default: bool = False) -> None:
        """Starts a copy to the device, on its own stream or the default one."""
        with self.driver:
            block = self.driver.pinned(values.nbytes)
            ctypes.memmove(block.ptr, values.ctypes.data, values.nbytes)
            self.driver.to_device(ptr, block.ptr, values.nbytes, self.default if default else self.stream)
        self.kept.append(block)

    def start_read(self, ptr: int, n: int):
        with self.driver:
            block = self.driver.pinned(4 * n)
            self.driver.to_host(block.ptr, ptr, 4 * n, self.stream)
        return block, n

    def end_read(self, started) -> list[float]:
        block, n = started
        with self.driver:
            self.driver.synchronize(self.stream)
        return list((ctypes.c_float * n).from_address(block.ptr))

    def read(self, ptr: int, n: int) -> list[float]:
        return self.end_read(self.start_read(ptr, n))


class Array:
    """An array of that library, still being written when it is handed over."""

    def __init__(self, library: Library, values: np.ndarray, strides=None, shape=None, offset=0, read_only=False):
        self.library, self.values = library, np.ascontiguousarray(values, "f4")
        self.shape = self.values.shape if shape is None else shape
        self.strides = dlpack.contiguous(self.shape) if strides is None else strides
        self.offset, self.read_only, self.freed = offset, read_only, []
        with library.driver:
            self.ptr = library.driver.allocate(self.values.nbytes)
        library.write(self.ptr, self.values)

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream=None):
        assert stream not in (None, 0)
        with self.library.driver:
            self.library.driver.foreign_wait(stream, self.library.stream)
        return dlpack.export(self.ptr + 4 * self.offset, f32, self.shape, self.strides, (2, 0), Tail(self), False)

    @property
    def __cuda_array_interface__(self):
        strides = None if self.strides == dlpack.contiguous(self.shape) else tuple(4 * s for s in self.strides)
        data = (self.ptr + 4 * self.offset, self.read_only)
        stream = self.library.handle
        return {"shape": self.shape, "typestr": "<f4", "data": data, "strides": strides, "stream": stream, "version": 3}


class Interface:
    """What has the one protocol only."""

    def __init__(self, array: Array):
        self.array = array

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__


class Tail:
    """Says when memory was let go of."""

    def __init__(self, array):
        self.freed = array.freed

    def __del__(self):
        self.freed.append(True)


@pytest.fixture
def library(gpu):  # noqa: F811
    return Library(gpu.driver)


VALUES = np.arange(24, dtype="f4").reshape(4, 6)


@pytest.mark.parametrize("wrap", [lambda a: a, Interface])
def test_taken_memory_is_read_where_it_is_when_it_has_been_written(library, wrap):
    array = Array(library, VALUES)
    x = duo.as_tensor(wrap(array))
    assert x._val.buf.ptr == array.ptr and x.is_cuda and not x._val.buf.donatable
    y = x * 2
    assert (y.cpu().numpy() == VALUES * 2).all()
    x += 1
    duo.synchronize()
    assert library.read(array.ptr, 24) == (VALUES + 1).ravel().tolist()


def test_without_the_wait_it_would_be_wrong(library, monkeypatch):
    monkeypatch.setattr(type(library.driver), "foreign_wait", lambda *rest: None)
    x = duo.from_dlpack(Array(library, VALUES))
    assert not (x.cpu().numpy() == VALUES).all()


def test_it_is_let_go_of_when_the_work_on_it_is_done(library):
    array = Array(library, VALUES)
    x = duo.from_dlpack(array)
    y = x.sum()
    duo.cuda.Event().record()  # it is given to the stream, and not run
    del x
    gc.collect()
    assert array.freed == []
    assert y.item() == VALUES.sum()
    duo.cuda.synchronize()
    assert array.freed == [True]


def test_others_write_and_what_was_asked_for_before_stays(library):
    array = Array(library, VALUES)
    x = duo.from_dlpack(array)
    y, z = x * 2, x[1] + 0
    library.write(array.ptr, -VALUES, default=True)  # duo's streams and the default one wait for each other
    assert (x.cpu().numpy() == -VALUES).all()
    assert (z.cpu().numpy() == VALUES[1]).all() and (y.cpu().numpy() == VALUES * 2).all()


@pytest.mark.parametrize(
    "shape, strides, offset",
    [
        ((6, 4), (1, 6), 0),
        ((2, 3), (12, 2), 0),
        ((4, 6), (-6, -1), 23),
        ((4, 5), (6, 1), 1),
        ((3,), (0,), 5),
        ((23,), (1,), 1),
        ((1, 6), (99, 1), 6),
    ],
)
def test_strides_and_offsets(library, shape, strides, offset):
    want = np.lib.stride_tricks.as_strided(VALUES.ravel()[offset:], shape, [4 * s for s in strides])
    array = Array(library, VALUES, strides, shape, offset)
    assert duo.from_dlpack(array).tolist() == want.tolist() == duo.as_tensor(Interface(array)).tolist()
    assert duo.tensor(array).tolist() == want.tolist()


def test_what_must_not_be_written_is_copied(library):
    array = Array(library, VALUES, read_only=True)
    x = duo.as_tensor(Interface(array))
    assert x._val.buf.ptr != array.ptr and (x.cpu().numpy() == VALUES).all()


@pytest.mark.parametrize("stream", ["own", "default"])
def test_given_memory_is_ready_on_the_others_stream(library, stream):
    x = duo.arange(8.0, device="cuda") * 3  # recorded, not run
    capsule = x.__dlpack__(stream=library.handle if stream == "own" else None)
    taken = dlpack.take(capsule)
    assert taken.device == (2, 0) == x.__dlpack_device__() and taken.ptr == x._val.buf.ptr
    assert library.read(taken.ptr, 8) == [3.0 * k for k in range(8)]


def test_given_memory_is_not_used_again_while_the_other_reads_it(library):
    x = duo.arange(300.0, device="cuda") + 1
    taken = dlpack.take(x.__dlpack__(stream=library.handle))
    ptr = taken.ptr
    started = library.start_read(ptr, 300)
    del x, taken  # both have let go of it; the other's read is still to come
    gc.collect()
    others = [duo.full((300,), float(k), device="cuda") + duo.arange(300.0, device="cuda") for k in range(6)]
    assert [o[0].item() for o in others] == [0, 1, 2, 3, 4, 5]
    assert library.end_read(started) == [k + 1.0 for k in range(300)]
    duo.cuda.synchronize()
    del others


def test_writes_reach_memory_that_others_have(library):
    x = duo.zeros(4, device="cuda")
    taken = dlpack.take(x.__dlpack__(stream=library.handle))
    x += 5
    x[1] = 7
    duo.synchronize()
    assert library.read(taken.ptr, 4) == [5, 7, 5, 5]
    y = x + 0
    duo.synchronize()
    library.write(taken.ptr, np.full(4, 9, "f4"))
    with library.driver:
        library.driver.synchronize(library.stream)
    assert x.tolist() == [9] * 4 and y.tolist() == [5, 7, 5, 5]
    view = dlpack.take(x[1:].__dlpack__(stream=-1))
    assert view.ptr != taken.ptr + 4


def test_compiled_functions_read_and_write_shared_memory(library):
    array = Array(library, VALUES)
    x = duo.from_dlpack(array)
    total = duo.compile(lambda t: (t * 2).sum())
    for k in range(4):
        assert total(x).item() == 2 * (VALUES + k).sum()
        library.write(array.ptr, VALUES + k + 1, default=True)
    step = duo.compile(lambda t: t.add_(1).sum())
    for k in range(3):
        assert step(x).item() == (VALUES + 5 + k).sum()
        duo.synchronize()
        assert library.read(array.ptr, 24) == (VALUES + 5 + k).ravel().tolist()


def test_array_interface_of_a_tensor(library):
    x = duo.arange(6.0, device="cuda").reshape(2, 3) * 2
    found = x.__cuda_array_interface__
    ptr, read_only = found["data"]
    assert found["version"] == 3 and found["shape"] == (2, 3) and found["typestr"] == "<f4" and found["strides"] is None
    assert not read_only
    with library.driver:
        library.driver.stream_wait(library.stream, library.driver.foreign_event(found["stream"]))
    assert library.read(ptr, 6) == [0, 2, 4, 6, 8, 10]
    x += 1  # it stays where it is, for whoever has the address
    duo.synchronize()
    assert library.read(ptr, 6) == [1, 3, 5, 7, 9, 11]
    assert not hasattr(x.cpu(), "__cuda_array_interface__")
    with pytest.raises(DTypeError, match="bf16; use DLPack"):
        _ = x.to(duo.bfloat16).__cuda_array_interface__
    with pytest.raises(GradientError):
        _ = x.clone().requires_grad_().__cuda_array_interface__
    with pytest.raises(ArgumentError, match="1 is the default stream"):
        x.__dlpack__(stream=0)


def test_to_the_cpu(library):
    x = duo.arange(3.0, device="cuda")
    taken = dlpack.take(x.__dlpack__(dl_device=(1, 0)))
    assert taken.device == (1, 0)
    with pytest.raises(BufferError):
        x.__dlpack__(dl_device=(1, 0), copy=False)
    assert duo.from_dlpack(x, device="cpu").tolist() == [0, 1, 2]
    own = duo.from_dlpack(x, copy=True)
    x += 1
    assert own.is_cuda and own.tolist() == [0, 1, 2]
