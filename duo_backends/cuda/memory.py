"""Device memory: `DeviceBuffer`s from a caching pool, and copies between host and device through page-locked memory.

Free blocks lie on a `Shelf`, one for each stream. What a stream is given runs in order, so a block that a buffer gives back may serve the
stream's next request at once. A buffer that other streams have used as well knows so (`Uses`), and its block waits until they are through. The pool
takes memory when it is asked for some, never beforehand; small blocks are cut from slabs. Of the free blocks that fit, the one of the lowest
address is taken, so that a program that is run again and again finds its buffers where they were, and its CUDA graphs fit. When the device has
none left, free blocks go back to it and the request is tried again.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np

from duo_backends.blocks import MemoryStatistics, OutOfMemory, class_size
from duo_backends.cuda.driver import Driver, OutOfDeviceMemory, Pinned
from duo_ir.errors import ArgumentError

SMALL = 1 << 20  # blocks below this size are cut from slabs
SLAB = 2 << 20
CHUNK = 4 << 20  # bytes of a page-locked block of `Transfers`
_ALIGNMENT = 256  # of cuMemAlloc; a block of a slab starts at a multiple of it as well


class Mark(NamedTuple):
    """A point in a stream's work (any object; None: another library's): its `number`-th, and an event there."""

    stream: Any
    number: int
    event: Any


class Uses:
    """Where a buffer was used: the mark after the last write, and for each stream the mark after its last use."""

    __slots__ = ("last", "written")

    def __init__(self, written: Mark) -> None:
        self.written = written
        self.last: dict[Any, Mark] = {written.stream: written}


class Outcome:
    """Whether indices of a run were out of range: `pending` until the device has said so, then the checks that `failed` and the `error` they make."""

    __slots__ = ("error", "failed", "pending")

    def __init__(self) -> None:
        self.pending = True
        self.failed: frozenset[int] = frozenset()
        self.error: Callable[[], Exception] | None = None


class Fault:
    """What may be wrong with what a run has written: `checks` of its own, and the faults of what it has read."""

    __slots__ = ("checks", "outcome", "read")

    def __init__(self, outcome: Outcome | None, checks: frozenset[int], read: tuple[Fault, ...]) -> None:
        self.outcome, self.checks, self.read = outcome, checks, read

    def found(self) -> Exception | None:
        """The error to raise, as far as the device has told of one."""
        waiting, seen = [self], set()
        while waiting:
            fault = waiting.pop()
            if id(fault) in seen:
                continue
            seen.add(id(fault))
            outcome = fault.outcome
            if outcome is not None and outcome.error is not None and outcome.failed & fault.checks:
                return outcome.error()
            waiting += fault.read
        return None

    def open(self) -> bool:
        """Whether it is one, or may still be. Forgets what has turned out well."""
        self.read = tuple([fault for fault in self.read if fault.open()])
        outcome = self.outcome
        if outcome is not None and not outcome.pending and not outcome.failed & self.checks:
            self.outcome = outcome = None
        return outcome is not None or bool(self.read)


class DeviceBuffer:
    """A block of device memory: `ptr` (address on the device), `nbytes`, and the device's name."""

    __slots__ = ("__weakref__", "_home", "fault", "nbytes", "ptr", "shared", "uses")

    def __init__(self, ptr: int, nbytes: int, home: Any) -> None:
        self.ptr, self.nbytes, self._home = ptr, nbytes, home
        self.shared = False  # whether others see the memory
        self.uses: Uses | None = None  # None: by the stream that it is from, at most
        self.fault: Fault | None = None  # what may be wrong with its contents

    def __del__(self, push: Callable[[list[int], int], None] = heappush) -> None:
        try:
            home, uses = self._home, self.uses
        except AttributeError:  # an interrupt came while it was being made
            return
        if uses is None:
            push(home, self.ptr)
            home.pool.live -= home.size
        else:
            home.retire(self.ptr, uses)

    def __repr__(self) -> str:
        return f"DeviceBuffer({self.nbytes} bytes at {self.ptr:#x})"

    @property
    def device(self) -> str:
        return self._home.device  # type: ignore[no-any-return]

    @property
    def donatable(self) -> bool:
        """Whether its memory belongs to it alone, so that a program may write its result there."""
        return not self.shared


class Blocks(list[int]):
    """Free blocks of one size on one shelf, a heap of addresses; one push or pop needs no lock. `made`: those that there are, free or not."""

    __slots__ = ("device", "made", "pool", "shelf", "size")

    def __init__(self, size: int, shelf: Shelf) -> None:
        super().__init__()
        self.size, self.shelf, self.pool, self.device = size, shelf, shelf.pool, shelf.pool.device
        self.made = 0

    def retire(self, ptr: int, uses: Uses) -> None:
        """The end of a buffer that more than one stream may have used."""
        marks = [mark for stream, mark in uses.last.items() if stream is not self.shelf.stream]
        if marks:
            self.pool.late.append((marks, self, ptr))
        else:
            self.put(ptr)

    def put(self, ptr: int) -> None:
        heappush(self, ptr)
        self.pool.live -= self.size


class Borrowed:
    """The home of a buffer whose memory is somebody else's: `owner` is let go of when duo's work on it is done."""

    def __init__(self, pool: Pool, owner: Any) -> None:
        self._pool, self.owner, self.device = pool, owner, pool.device

    def retire(self, ptr: int, uses: Uses) -> None:
        self._pool.late.append((list(uses.last.values()), self, ptr))

    def put(self, ptr: int) -> None:
        self.owner = None


class Shelf:
    """The free blocks of one stream, by size class."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.stream: Any = None  # set by whoever makes the stream
        self.free: dict[int, Blocks] = {}
        self._by_nbytes: dict[int, Blocks] = {}  # every size asked for -> its class

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """A buffer with undefined contents. Raises OutOfMemory, ArgumentError for a negative size."""
        free = self._by_nbytes.get(nbytes)
        if free is None:
            free = self._class_of(nbytes)
        try:
            buffer = DeviceBuffer(heappop(free), nbytes, free)
        except IndexError:
            buffer = DeviceBuffer(self.pool.fresh(nbytes, free), nbytes, free)
        pool = free.pool
        live = pool.live = pool.live + free.size
        if live > pool.most:
            pool.most = live
        return buffer

    def _class_of(self, nbytes: int) -> Blocks:
        if nbytes < 0:
            raise ArgumentError(f"a buffer cannot have {nbytes} bytes")
        pool = self.pool
        with pool.lock:
            size = pool.size_of(nbytes)
            free = self.free.get(size)
            if free is None:
                free = self.free[size] = Blocks(size, self)
            if len(self._by_nbytes) > 8192:
                self._by_nbytes = {}
            self._by_nbytes[nbytes] = free
        return free


class Pool:
    """The memory of one device. `limit`: the most bytes that it takes from the device (None: what there is); `exact`: every buffer has an
    allocation of its own of just its size, so that tools that watch accesses see a buffer's end (slow). `late`: blocks that other streams
    still use, (marks, home, address); `shown`: buffers that another library has let go of, and the stream where it may still use them;
    `aside`: those whose stream cannot be asked; `device`: its name; `live`, `most`: bytes in live buffers, and the most at any time, counted without a lock."""

    def __init__(self, driver: Driver, limit: int | None = None, exact: bool = False, device: str = "cuda:0") -> None:
        self.driver, self.limit, self.exact, self.device = driver, limit, exact, sys.intern(device)
        self.lock = threading.RLock()
        self.late: deque[tuple[Sequence[Mark], Blocks | Borrowed, int]] = deque()
        self.shown: deque[tuple[DeviceBuffer, int]] = deque()
        self.aside: list[DeviceBuffer] = []
        self.live = self.most = 0
        self.retries = self.failures = 0  # requests that were tried again, and that were refused
        self.main = Shelf(self)
        self._shelves = [self.main]
        self._reserved = self._peak = 0
        self.generation = 0  # how often memory has gone back to the device
        self._slab = (0, 0)  # next free address, end

    def shelf(self) -> Shelf:
        """Free memory for one more stream."""
        made = Shelf(self)
        with self.lock:
            self._shelves.append(made)
        return made

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """A buffer of the main shelf."""
        return self.main.allocate(nbytes)

    def size_of(self, nbytes: int) -> int:
        """Bytes of the block that serves a request."""
        return max(nbytes, 1) if self.exact else class_size(max(nbytes, _ALIGNMENT))

    def borrow(self, ptr: int, nbytes: int, owner: Any, mark: Mark) -> DeviceBuffer:
        """Memory of somebody else, which `owner` keeps alive and which may be used after `mark`."""
        buffer = DeviceBuffer(ptr, nbytes, Borrowed(self, owner))
        buffer.uses, buffer.shared = Uses(mark), True
        return buffer

    @property
    def statistics(self) -> MemoryStatistics:
        """Bytes taken from the device, free ones among them, and the most ever taken."""
        with self.lock:
            self.reap()
            cached = sum(size * len(free) for shelf in self._shelves for size, free in shelf.free.items())
            return MemoryStatistics(self._reserved, cached, self._peak)

    @property
    def allocated(self) -> int:
        """Bytes of the blocks of live buffers."""
        with self.lock:
            self.reap()
            blocks = [free for shelf in self._shelves for free in shelf.free.values()]
            self.live = sum(free.size * (free.made - len(free)) for free in blocks)
            return self.live

    def reset_peaks(self) -> None:
        """From now on the most taken and the most live are counted anew."""
        with self.lock:
            self.most, self._peak = self.allocated, self._reserved

    def reap(self, wait: bool = False) -> None:
        """Frees what other streams were using, where they are through; with `wait`, all of it."""
        if not self.late and not self.shown and not self.aside:
            return
        with self.lock, self.driver:
            for _ in range(len(self.shown)):
                self._take_back(*self.shown.popleft())
            if wait and self.aside:
                self.driver.synchronize_all()
                self.aside.clear()
            for _ in range(len(self.late)):
                entry = self.late.popleft()
                marks, home, ptr = entry
                if wait:
                    for mark in marks:
                        self.driver.wait(mark.event)
                elif not all(self.driver.ready(mark.event) for mark in marks):
                    self.late.append(entry)
                    continue
                home.put(ptr)

    def _take_back(self, buffer: DeviceBuffer, handle: int) -> None:
        """Another library has let go of a buffer, which work that it gave to that stream may still use. Only the default stream is sure to be there
        still, so only that is asked; for any other, the buffer waits until the whole device is waited for."""
        if handle in (0, 1) and buffer.uses is not None:
            buffer.uses.last["others", handle] = Mark(None, 0, self.driver.foreign_event(handle))
        else:
            self.aside.append(buffer)

    def trim(self) -> int:
        """Gives free blocks back to the device, except those of slabs; their bytes."""
        given = 0
        with self.lock, self.driver:
            self.reap()
            for free in [free for shelf in self._shelves for free in shelf.free.values()]:
                while free.size >= SMALL or self.exact:
                    try:
                        ptr = heappop(free)
                    except IndexError:
                        break
                    free.made -= 1
                    self.driver.free(ptr)
                    given += free.size
            self._reserved -= given
            self.generation += given > 0
        return given

    def fresh(self, nbytes: int, free: Blocks) -> int:
        """A new block of a class, or one that has become free meanwhile."""
        size = free.size
        with self.lock:
            self.reap()
            if free:
                return heappop(free)
            if size >= SMALL or self.exact:
                ptr = self._take(size, nbytes)
            else:
                step = -(-size // _ALIGNMENT) * _ALIGNMENT
                ptr, end = self._slab
                if ptr + step > end:
                    ptr = self._take(SLAB, nbytes)
                    end = ptr + SLAB
                self._slab = (ptr + step, end)
            free.made += 1
            return ptr

    def _take(self, size: int, nbytes: int) -> int:
        """Memory from the device, if need be after giving it back what is free."""
        if self._beyond(size):
            self._make_room()
        if self._beyond(size):
            self.failures += 1
            raise OutOfMemory(f"{self._story(nbytes)}; its limit is {self.limit} bytes")
        with self.driver:
            try:
                ptr = self.driver.allocate(size)
            except OutOfDeviceMemory:
                self._make_room()
                try:
                    ptr = self.driver.allocate(size)
                except OutOfDeviceMemory:
                    self.failures += 1
                    free, total = self.driver.memory()
                    raise OutOfMemory(
                        f"{self._story(nbytes)}; the device has {free} of {total} bytes free; free tensors or use smaller batches"
                    ) from None
        self._reserved += size
        self._peak = max(self._peak, self._reserved)
        return ptr

    def _beyond(self, size: int) -> bool:
        return self.limit is not None and self._reserved + size > self.limit

    def _make_room(self) -> None:
        self.retries += 1
        self.reap(wait=True)
        self.trim()

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
