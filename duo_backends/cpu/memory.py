"""CPU memory: `Buffer`s, aligned to 64 bytes, from a caching allocator.

A freed block goes to the free list of its size class and serves the next request of that class; blocks of 1 MiB and more
come from the system with huge pages, in exchange for free ones of other sizes that have not been asked for again so far. `allocate` and a Buffer's end touch only a dict and a list (atomic under the
interpreter's lock, safe when a garbage collection interrupts, at the interpreter's end and after fork); only the way to
the system takes a lock. Classes: multiples of 64 bytes up to 512, then eight to each power of two.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from duo_backends.blocks import MemoryStatistics, OutOfMemory, class_size
from duo_backends.cpu.system import system
from duo_ir.errors import ArgumentError
from duo_ir.types import DType

BIG = 1 << 20
_SLAB = 4 << 20  # smaller blocks are cut from slabs of this size, which are kept


class BlockClass:
    """The free blocks of one size. `append` and `pop` are a list's, for big blocks with a look at the limit. `used`: the allocator's clock
    when a block was freed last; `exchanged`: blocks that went back to the system for one of another size."""

    __slots__ = ("append", "exchanged", "free", "pop", "size", "used")

    def __init__(self, size: int, allocator: Allocator) -> None:
        self.size = size
        self.used = self.exchanged = 0
        self.free: list[int] = []
        self.pop = self.free.pop
        self.append = self.free.append
        if size >= BIG:
            self.append = self._append_big(allocator)

    def _append_big(self, allocator: Allocator) -> Any:
        append, size = self.free.append, self.size

        def append_big(address: int) -> None:
            append(address)
            self.used = allocator.clock
            # Counting the cache takes microseconds: only after much has been freed (a lost count does no harm).
            allocator.freed += size
            if allocator.freed > allocator.limit >> 3:
                allocator.freed = 0
                allocator.trim_to_limit()

        return append_big


class Buffer:
    """A block of memory: `ptr` (address) and `nbytes`. It owns a block of an allocator, or borrows memory of an array."""

    # _home has append(address), called at the end; None: borrowed. _shared is set when others see the memory: the array
    # it was borrowed from, or True once a NumPy view was made (left unset otherwise, which makes Buffers cheaper).
    __slots__ = ("__weakref__", "_home", "_shared", "nbytes", "ptr")

    _shared: object
    device = "cpu"

    def __init__(self, ptr: int, nbytes: int, home: Any) -> None:
        self.ptr = ptr
        self.nbytes = nbytes
        self._home = home

    def __del__(self) -> None:
        try:
            home = self._home
        except AttributeError:  # an interrupt came while it was being made
            return
        if home is not None:
            home.append(self.ptr)

    def __repr__(self) -> str:
        return f"Buffer({self.nbytes} bytes at {self.ptr:#x})"

    @property
    def donatable(self) -> bool:
        """Whether its memory belongs to it alone, so that a program may write its result there."""
        return self._home is not None and not hasattr(self, "_shared")

    @staticmethod
    def from_numpy(array: np.ndarray) -> Buffer:
        """Borrows the memory of a C-contiguous, aligned array, which stays referenced. Raises ArgumentError otherwise."""
        flags = array.flags
        if not flags.c_contiguous or not flags.aligned:
            raise ArgumentError(
                f"a Buffer borrows C-contiguous aligned arrays; this one of shape {array.shape} has strides "
                f"{array.strides}: pass np.ascontiguousarray(x)"
            )
        buffer = Buffer(array.ctypes.data, array.nbytes, None)
        buffer._shared = array
        return buffer

    def numpy(self, dtype: DType, shape: Sequence[int]) -> np.ndarray:
        """A NumPy view of the memory, which it keeps alive. Raises ArgumentError when the view is larger than the buffer."""
        if self._home is not None:
            self._shared = True
        return self._view(dtype, shape)

    def read(self, dtype: DType, shape: Sequence[int]) -> np.ndarray:
        """A NumPy copy of the contents."""
        return self._view(dtype, shape).copy()

    def fill(self, value: Any, dtype: DType, shape: Sequence[int]) -> None:
        """Makes every element of the array that this is `value`, cast as NumPy does."""
        np.copyto(self._view(dtype, shape), value, casting="unsafe")

    def _view(self, dtype: DType, shape: Sequence[int]) -> np.ndarray:
        memory = _memory(self.nbytes)(self.ptr)
        memory.buffer = self  # the array's base keeps it alive
        try:
            return _ndarray(shape, dtype.numpy, memory)
        except TypeError:
            raise ArgumentError(f"{self.nbytes} bytes do not hold {dtype} of shape {tuple(shape)}") from None


_ndarray = np.ndarray


@functools.lru_cache(4096)
def _memory(count: int) -> Any:
    """What makes an object of `count` bytes of memory at an address, which NumPy makes arrays of."""
    slots = {"__slots__": ("buffer",)}  # half the time of an object with a dict
    return type("Memory", (ctypes.c_char * count,), slots).from_address  # type: ignore[attr-defined]


class Allocator:
    """Blocks by size class. `limit`: bytes kept in free lists before big blocks go back to the system. `wanted`: bytes of big free blocks that
    are kept when another size is asked for, as much as turned out to be asked for again. `clock` counts big blocks from the system."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = system.physical_memory() // 4 if limit is None else limit
        self._by_nbytes: dict[int, BlockClass] = {}  # every size asked for -> its class
        self._classes: dict[int, BlockClass] = {}
        self._lock = threading.RLock()
        self._reserved = 0
        self._peak = 0
        self.clock = self.wanted = 0
        self.freed = 0  # bytes of big blocks freed since the cache was last counted
        self._slab = (0, 0)  # next free address, end
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_lock)

    def allocate(self, nbytes: int) -> Buffer:
        """A Buffer with undefined contents, aligned to 64 bytes. Raises OutOfMemory."""
        home = self._by_nbytes.get(nbytes)
        if home is None:
            home = self.class_of(nbytes)
        try:
            return Buffer(home.pop(), nbytes, home)
        except IndexError:
            return Buffer(self._fresh(home), nbytes, home)

    def class_of(self, nbytes: int) -> Any:
        """The size class that serves `nbytes`."""
        if nbytes < 0:
            raise ArgumentError(f"a buffer cannot have {nbytes} bytes")
        with self._lock:
            size = class_size(nbytes)
            home = self._classes.setdefault(size, BlockClass(size, self))
            if len(self._by_nbytes) > 8192:
                self._by_nbytes = {}
            self._by_nbytes[nbytes] = home
        return home

    @property
    def statistics(self) -> MemoryStatistics:
        with self._lock:
            return MemoryStatistics(self._reserved, self._cached(), self._peak)

    def trim(self, keep: int = 0) -> None:
        """Gives free big blocks back to the system, longest unused first, until at most `keep` bytes are cached."""
        with self._lock:
            self._trim(keep)

    def trim_to_limit(self) -> None:
        """After a big block was freed: keeps the cache within its limit."""
        with self._lock:  # not acquire() and then try: a signal in between would leave it locked for good
            if self._cached() > self.limit:
                self._trim(self.limit // 2)

    def _cached(self) -> int:
        return sum(len(c.free) * c.size for c in list(self._classes.values()))

    def _trim(self, keep: int) -> None:
        self._release(self._cached() - keep)

    def _release(self, excess: int) -> list[BlockClass]:
        """Gives at least `excess` bytes of free big blocks back, as far as there are any, longest unused first; the class of each."""
        released = []
        for home in sorted(self._classes.values(), key=lambda c: (c.used, -c.size)):
            while excess > 0 and home.size >= BIG:
                try:
                    address = home.pop()
                except IndexError:
                    break
                system.unmap_block(address, home.size)
                self._reserved -= home.size
                excess -= home.size
                released.append(home)
        return released

    def _fresh(self, home: BlockClass) -> int:
        with self._lock:
            if home.size < BIG:
                return self._cut(home.size)
            self._exchange(home)
            return self._map(home.size)

    def _exchange(self, home: BlockClass) -> None:
        """Makes room for a block of `home`: programs that ran before may never ask again for what they left. If they do, `wanted` grows by
        as much, so that programs that take turns soon find all their blocks."""
        self.clock += 1
        if home.exchanged:
            home.exchanged -= 1
            self.wanted += home.size
        free = sum(len(c.free) * c.size for c in list(self._classes.values()) if c.size >= BIG)
        for other in self._release(min(free - self.wanted, home.size)):
            other.exchanged += 1

    def _cut(self, size: int) -> int:
        """The next block of the current slab."""
        start, end = self._slab
        if start + size > end:
            start = self._map(_SLAB)
            end = start + _SLAB
        self._slab = (start + size, end)
        return start

    def _map(self, nbytes: int) -> int:
        address = system.map_block(nbytes)
        if address == 0:
            self._trim(0)
            address = system.map_block(nbytes)
        if address == 0:
            statistics = MemoryStatistics(self._reserved, self._cached(), self._peak)
            raise OutOfMemory(
                f"the system has no memory for a buffer of {nbytes} bytes (duo holds {statistics.reserved} bytes, "
                f"{statistics.allocated} of them in live buffers); free tensors or use smaller batches"
            )
        self._reserved += nbytes
        self._peak = max(self._peak, self._reserved)
        return address

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()  # the parent's other threads may have held it


def fill_zero(buffer: Buffer) -> None:
    """Sets every byte to zero."""
    ctypes.memset(buffer.ptr, 0, buffer.nbytes)


allocator = Allocator()
allocate = allocator.allocate
