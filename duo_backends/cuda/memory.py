"""Device memory: `DeviceBuffer`s from a caching pool, and copies between host and device through page-locked memory.

All of duo's work on a device runs in order on one stream. So a block that a buffer gives back may serve the next request at once: whatever
the new owner does comes after all that the old one started. The pool takes memory when it is asked for some, never beforehand; small blocks
are cut from slabs. Of the free blocks that fit, the one of the lowest address is taken, so that a program that is run again and again finds its
buffers where they were, and its CUDA graphs fit. When the device has none left, free blocks go back to it and the request is tried again.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import numpy as np

from duo_backends.blocks import MemoryStatistics, OutOfMemory, class_size
from duo_backends.cuda.driver import Driver, OutOfDeviceMemory, Pinned
from duo_ir.errors import ArgumentError

SMALL = 1 << 20  # blocks below this size are cut from slabs
SLAB = 2 << 20
CHUNK = 4 << 20  # bytes of a page-locked block of `Transfers`
_ALIGNMENT = 256  # of cuMemAlloc; a block of a slab starts at a multiple of it as well


class DeviceBuffer:
    """A block of device memory: `ptr` (address on the device) and `nbytes`."""

    __slots__ = ("__weakref__", "_home", "nbytes", "ptr", "shared")

    def __init__(self, ptr: int, nbytes: int, home: list[int]) -> None:
        self.ptr, self.nbytes, self._home = ptr, nbytes, home
        self.shared = False  # whether others see the memory

    def __del__(self, push: Callable[[list[int], int], None] = heappush) -> None:
        try:
            push(self._home, self.ptr)
        except AttributeError:  # an interrupt came while it was being made
            pass

    def __repr__(self) -> str:
        return f"DeviceBuffer({self.nbytes} bytes at {self.ptr:#x})"

    @property
    def donatable(self) -> bool:
        """Whether its memory belongs to it alone, so that a program may write its result there."""
        return not self.shared


class Pool:
    """Blocks of device memory by size class. `limit`: the most bytes that it takes from the device (None: what there is); `exact`: every
    buffer has an allocation of its own of just its size, so that tools that watch accesses see a buffer's end (slow)."""

    def __init__(self, driver: Driver, limit: int | None = None, exact: bool = False) -> None:
        self.driver, self.limit, self.exact = driver, limit, exact
        self._free: dict[int, list[int]] = {}  # class -> heap of addresses; one push or pop needs no lock
        self._by_nbytes: dict[int, list[int]] = {}  # every size asked for -> its class
        self._lock = threading.RLock()
        self._reserved = self._peak = 0
        self.generation = 0  # how often memory has gone back to the device
        self._slab = (0, 0)  # next free address, end

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """A buffer with undefined contents. Raises OutOfMemory, ArgumentError for a negative size."""
        free = self._by_nbytes.get(nbytes)
        if free is None:
            free = self._class_of(nbytes)
        try:
            return DeviceBuffer(heappop(free), nbytes, free)
        except IndexError:
            return DeviceBuffer(self._fresh(nbytes), nbytes, free)

    def _size(self, nbytes: int) -> int:
        return max(nbytes, 1) if self.exact else class_size(max(nbytes, _ALIGNMENT))

    def _class_of(self, nbytes: int) -> list[int]:
        """The free blocks that serve `nbytes`."""
        if nbytes < 0:
            raise ArgumentError(f"a buffer cannot have {nbytes} bytes")
        with self._lock:
            free = self._free.setdefault(self._size(nbytes), [])
            if len(self._by_nbytes) > 8192:
                self._by_nbytes = {}
            self._by_nbytes[nbytes] = free
        return free

    @property
    def statistics(self) -> MemoryStatistics:
        """Bytes taken from the device, free ones among them, and the most ever taken."""
        with self._lock:
            cached = sum(size * len(free) for size, free in self._free.items())
            return MemoryStatistics(self._reserved, cached, self._peak)

    def trim(self) -> int:
        """Gives free blocks back to the device, except those of slabs; their bytes."""
        given = 0
        with self._lock, self.driver:
            for size, free in self._free.items():
                while size >= SMALL or self.exact:
                    try:
                        ptr = heappop(free)
                    except IndexError:
                        break
                    self.driver.free(ptr)
                    given += size
            self._reserved -= given
            self.generation += given > 0
        return given

    def _fresh(self, nbytes: int) -> int:
        size = self._size(nbytes)
        with self._lock:
            if size >= SMALL or self.exact:
                return self._take(size, nbytes)
            step = -(-size // _ALIGNMENT) * _ALIGNMENT
            start, end = self._slab
            if start + step > end:
                start = self._take(SLAB, nbytes)
                end = start + SLAB
            self._slab = (start + step, end)
            return start

    def _take(self, size: int, nbytes: int) -> int:
        """Memory from the device, if need be after giving it back what is free."""
        if self.limit is not None and self._reserved + size > self.limit:
            self.trim()
        if self.limit is not None and self._reserved + size > self.limit:
            raise OutOfMemory(f"{self._story(nbytes)}; its limit is {self.limit} bytes")
        with self.driver:
            try:
                ptr = self.driver.allocate(size)
            except OutOfDeviceMemory:
                self.trim()
                try:
                    ptr = self.driver.allocate(size)
                except OutOfDeviceMemory:
                    free, total = self.driver.memory()
                    raise OutOfMemory(
                        f"{self._story(nbytes)}; the device has {free} of {total} bytes free; free tensors or use smaller batches"
                    ) from None
        self._reserved += size
        self._peak = max(self._peak, self._reserved)
        return ptr

    def _story(self, nbytes: int) -> str:
        s = self.statistics
        return (
            f"the GPU ({self.driver.properties.name}) has no memory for a buffer of {nbytes} bytes: duo holds {s.reserved} bytes, "
            f"{s.allocated} of them in live buffers"
        )


class Transfers:
    """Copies between NumPy arrays and device memory, through page-locked blocks that are used in turn: the host fills one while the
    device still reads another. Not for several threads at once: the backend's lock is held."""

    def __init__(self, driver: Driver, stream: Any, chunk: int = CHUNK) -> None:
        self._driver, self._stream, self._chunk = driver, stream, chunk
        self._idle: list[Pinned] = []
        self._busy: deque[tuple[Any, Pinned]] = deque()  # (event after which it is idle, block)

    def upload(self, ptr: int, array: np.ndarray) -> None:
        """The bytes of a C-contiguous array to `ptr`. The array may be changed as soon as this returns."""
        source, nbytes = array.ctypes.data, array.nbytes
        for start in range(0, nbytes, self._chunk):
            n = min(self._chunk, nbytes - start)
            block = self._block(n)
            ctypes.memmove(block.ptr, source + start, n)
            self._driver.to_device(ptr + start, block.ptr, n, self._stream)
            self._release(block)

    def download(self, array: np.ndarray, ptr: int) -> None:
        """Fills a C-contiguous array with the bytes at `ptr`, when all that was started before has run."""
        target, nbytes = array.ctypes.data, array.nbytes
        waiting: deque[tuple[Any, Pinned, int, int]] = deque()
        for start in range(0, nbytes, self._chunk):
            n = min(self._chunk, nbytes - start)
            if len(waiting) == 2:
                self._land(target, *waiting.popleft())
            block = self._block(n)
            self._driver.to_host(block.ptr, ptr + start, n, self._stream)
            event = self._driver.event()
            self._driver.record(event, self._stream)
            waiting.append((event, block, start, n))
        while waiting:
            self._land(target, *waiting.popleft())

    def _land(self, target: int, event: Any, block: Pinned, start: int, n: int) -> None:
        self._driver.wait(event)
        ctypes.memmove(target + start, block.ptr, n)
        self._idle.append(block)

    def _block(self, nbytes: int) -> Pinned:
        """An idle block; of two at most in flight to the device the older one is waited for."""
        while self._busy and (len(self._busy) >= 2 or self._driver.ready(self._busy[0][0])):
            event, block = self._busy.popleft()
            self._driver.wait(event)
            self._idle.append(block)
        fitting = next((n for n, block in enumerate(self._idle) if block.nbytes >= nbytes), None)
        if fitting is not None:
            return self._idle.pop(fitting)
        self._idle.clear()  # too small ones
        return self._driver.pinned(
            min(max(class_size(nbytes), 1 << 16), self._chunk) if nbytes <= self._chunk else nbytes
        )

    def _release(self, block: Pinned) -> None:
        event = self._driver.event()
        self._driver.record(event, self._stream)
        self._busy.append((event, block))
