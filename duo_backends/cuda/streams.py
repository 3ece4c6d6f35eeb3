"""What the programs of one device share: `Runtime`, its streams, its memory, and the checks that nobody has looked at.

A thread's work goes to its current stream (`Runtime.stream`), which is the same for all until somebody makes another. From then on every
piece of work leaves a `Mark` with the buffers that it reads and writes, and whoever uses a buffer on another stream makes that stream wait for
the mark. So which stream work goes to never changes a result, and a wait that a program forgot costs nothing but time.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from duo_backends.calls import index_error
from duo_backends.cuda.driver import Driver, Pinned
from duo_backends.cuda.memory import DeviceBuffer, Mark, Outcome, Pool, Shelf, Transfers, Uses
from duo_backends.cuda.work import STATUS_STRIDE, Table
from duo_ir.errors import IndexOutOfRange

WAITING = 64  # runs of a stream whose checks nobody has looked at yet
SCALARS = 16  # numbers that one launch brings to the device
SCALARS_NAME = "duo_scalars"
SCALARS_TEXT = (
    f'extern "C" __global__ void {SCALARS_NAME}(long long *to, {", ".join(f"long long v{k}" for k in range(SCALARS))}) {{\n'
    + "".join(f"  to[{k}] = v{k};\n" for k in range(SCALARS))
    + "}\n"
)


Explain = Callable[[IndexOutOfRange], Exception]


@dataclass(frozen=True)
class _Check:
    """The status words of a run, on their way to the host. `explain`: what makes the error to raise, if they tell of one; `outcome`: what they tell."""

    event: Any
    words: Pinned
    table: Table
    explain: Explain | None
    outcome: Outcome


class Stream:
    """A queue of work on the device, run in order: `queue` is the driver's. `allocate` gives memory whose blocks come back to it. `marks`: how
    many points of it have a number; `heard`: of other streams, the last mark that it has waited for."""

    def __init__(self, driver: Driver, shelf: Shelf) -> None:
        self.queue = driver.stream()
        self.allocate = shelf.allocate
        self.transfers = Transfers(driver, self.queue)
        self.checks: deque[_Check] = deque()
        self.marks = 0
        self.heard: dict[Any, int] = {}
        shelf.stream = self


class _Current(threading.local):
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.explain: Explain | None = None


class Runtime:
    """`lock` is held while work is handed to a stream. `tracking`: whether buffers are marked, from the second stream on; `launches`: of
    functions by themselves, `replays`: of graphs; `recording`: of a profile (profile.py)."""

    def __init__(self, driver: Driver, pool: Pool, scalars: Callable[[], Any]) -> None:
        self.driver, self.pool = driver, pool
        self.lock = threading.RLock()
        self.launches = self.replays = 0
        self.tracking = False
        self.recording: Any = None
        self._scalars = scalars  # loads the function of SCALARS_TEXT
        self._failed: Outcome | None = None
        self._idle: list[Pinned] = []
        with driver:
            self.default = Stream(driver, pool.main)
        self._streams = [self.default]
        self._unused: list[Stream] = []
        self._current = _Current(self.default)
        self._first: Mark | None = None  # what unmarked buffers were used before

    # -------------------------------------------------------------------------------------------------------- streams
    @property
    def stream(self) -> Stream:
        """Where this thread's work goes."""
        return self._current.stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[Stream]:
        """This thread's work goes to `stream` inside."""
        before = self._current.stream
        self._current.stream = stream
        try:
            yield stream
        finally:
            self._current.stream = before

    @contextmanager
    def explained(self, explain: Explain) -> Iterator[None]:
        """What this thread runs inside, and fails later, raises what `explain` makes of the error, which names the line of the program that its
        executable was compiled for first."""
        before = self._current.explain
        self._current.explain = explain
        try:
            yield
        finally:
            self._current.explain = before

    def set_stream(self, stream: Stream) -> None:
        """This thread's work goes to `stream` from now on."""
        self._current.stream = stream

    def new_stream(self) -> Stream:
        """One more stream, or one that was given back."""
        with self.lock, self.driver:
            if self._unused:
                return self._unused.pop()
            self.track()
            made = Stream(self.driver, self.pool.shelf())
            self._streams.append(made)
            return made

    def give_back(self, stream: Stream) -> None:
        """Nobody will use the stream until it is asked for again."""
        self._unused.append(stream)

    def track(self) -> None:
        """Marks buffers from now on."""
        with self.lock, self.driver:
            if not self.tracking:
                self._first = self.mark(self.default)
                self.tracking = True

    def mark(self, stream: Stream) -> Mark:
        """A point after all that `stream` has been given."""
        event = self.driver.event()
        self.driver.record(event, stream.queue)
        stream.marks += 1
        return Mark(stream, stream.marks, event)

    def wait_for(self, stream: Stream, mark: Mark) -> None:
        """What `stream` is given from now on comes after the mark."""
        if mark.stream is stream or stream.heard.get(mark.stream, 0) >= mark.number > 0:
            return
        self.driver.stream_wait(stream.queue, mark.event)
        if mark.number:
            stream.heard[mark.stream] = mark.number

    def acquire(self, stream: Stream, read: Iterable[Any], written: Iterable[DeviceBuffer] = ()) -> None:
        """Before work on `stream` that reads and overwrites these buffers (other things among them are passed over)."""
        for x in read:
            if x.__class__ is DeviceBuffer:
                self.wait_for(stream, self._uses(x).written)
        for x in written:
            for mark in list(self._uses(x).last.values()):
                self.wait_for(stream, mark)

    def release(self, stream: Stream, read: Iterable[Any], written: Iterable[DeviceBuffer] = ()) -> None:
        """After it."""
        mark = self.mark(stream)
        for x in read:
            if x.__class__ is DeviceBuffer:
                self._uses(x).last[stream] = mark
        for x in written:
            x.uses = Uses(mark)

    def _uses(self, buffer: DeviceBuffer) -> Uses:
        uses = buffer.uses
        if uses is None:
            assert self._first is not None
            uses = buffer.uses = Uses(self._first)
        return uses

    # ------------------------------------------------------------------------------------------------ other libraries
    def borrow(self, ptr: int, nbytes: int, owner: Any) -> DeviceBuffer:
        """Memory of another library, which `owner` keeps alive, ready for this thread's stream."""
        with self.lock, self.driver:
            self.track()
            return self.pool.borrow(ptr, nbytes, owner, self.mark(self.stream))

    def take_over(self, handle: int) -> None:
        """This thread's stream waits for another library's."""
        with self.lock, self.driver:
            self.driver.stream_wait(self.stream.queue, self.driver.foreign_event(handle))

    def hand_over(self, buffer: DeviceBuffer, handle: int | None) -> None:
        """Another library's stream waits for all work on the buffer, and so does this thread's (None: that alone)."""
        stream = self.stream
        with self.lock, self.driver:
            self.track()
            self.acquire(stream, (), (buffer,))
            if handle is not None:
                self.driver.foreign_wait(handle, stream.queue)

    # --------------------------------------------------------------------------------------------------------- copies
    def upload(self, array: np.ndarray) -> DeviceBuffer:
        """A buffer with the bytes of a C-contiguous array, which may be changed as soon as this returns."""
        stream = self.stream
        buffer = stream.allocate(array.nbytes)
        with self.lock, self.driver:
            stream.transfers.upload(buffer.ptr, array)
            if self.tracking:
                self.release(stream, (), (buffer,))
        return buffer

    def download(self, array: np.ndarray, buffer: DeviceBuffer) -> None:
        """Fills a C-contiguous array, when what writes the buffer has run. Raises IndexOutOfRange for a run whose check failed and nobody has heard of
        yet, and every time where the buffer depends on such an index."""
        stream = self.stream
        if self.tracking:
            with self.lock, self.driver:
                self.acquire(stream, (buffer,))
        self.synchronize(stream)
        error = buffer.fault.found() if buffer.fault is not None else None
        if error is not None:
            raise error
        with self.lock, self.driver:
            stream.transfers.download(array, buffer.ptr)

    def filled(self, byte: int, nbytes: int) -> DeviceBuffer:
        """A buffer whose bytes are all `byte`."""
        stream = self.stream
        buffer = stream.allocate(nbytes)
        with self.lock, self.driver:
            if nbytes:
                self.driver.fill(buffer.ptr, byte, nbytes, stream.queue)
            if self.tracking:
                self.release(stream, (), (buffer,))
        return buffer

    def duplicate(self, buffer: DeviceBuffer) -> DeviceBuffer:
        """A buffer of its own with the same bytes."""
        stream = self.stream
        out = stream.allocate(buffer.nbytes)
        self.copy(out, buffer, buffer.nbytes)
        return out

    def copy(self, target: DeviceBuffer, source: DeviceBuffer, nbytes: int) -> None:
        """The first bytes of one buffer to another."""
        stream = self.stream
        with self.lock, self.driver:
            if self.tracking:
                self.acquire(stream, (source,), (target,))
            target.fault = source.fault or target.fault
            if nbytes:
                self.driver.copy(target.ptr, source.ptr, nbytes, stream.queue)
            if self.tracking:
                self.release(stream, (source,), (target,))

    def put_scalars(self, ptr: int, words: Sequence[int], stream: Stream) -> None:
        """Numbers, as their bits, to the device; the memory holds whole launches of SCALARS of them."""
        function = self._scalars()
        for start in range(0, len(words), SCALARS):
            part = [*words[start : start + SCALARS], *[0] * SCALARS][:SCALARS]
            packed = struct.pack(f"{1 + SCALARS}q", ptr + 8 * start, *part)
            self.driver.launch(function, 1, 1, packed, 0, stream.queue)

    def read_bool(self, ptr: int, stream: Stream) -> bool:
        """The bool at an address, when all that the stream was given has run."""
        block = self._block(1)
        self.driver.to_host(block.ptr, ptr, 1, stream.queue)
        self.driver.synchronize(stream.queue)
        value = ctypes.c_ubyte.from_address(block.ptr).value
        self._idle.append(block)
        return value != 0

    # ------------------------------------------------------------------------------------------------ waiting, checks
    def synchronize(self, stream: Stream | None = None) -> None:
        """Waits for all that `stream`, or any, was given. Raises IndexOutOfRange for the first run whose check failed and nobody has
        heard of yet."""
        with self.driver:
            events = []
            with self.lock:
                for each in self._streams if stream is None else (stream,):
                    event = self.driver.event()
                    self.driver.record(event, each.queue)
                    events.append(event)
            for event in events:
                self.driver.wait(event)  # without the lock: other threads may go on
            if stream is None:
                self.pool.reap(wait=True)
        self.look()

    def look(self) -> None:
        """Raises IndexOutOfRange for the first run that is through, whose check failed and nobody has heard of yet."""
        with self.lock, self.driver:
            for stream in self._streams:
                while stream.checks and self.driver.ready(stream.checks[0].event):
                    self._take(stream.checks.popleft())
            failed, self._failed = self._failed, None
        if failed is not None and failed.error is not None:
            raise failed.error()

    def start_check(self, ptr: int, table: Table, stream: Stream) -> Outcome:
        """Sends for a run's status words."""
        checks = stream.checks
        while checks and (len(checks) >= WAITING or self.driver.ready(checks[0].event)):
            self._take(checks.popleft())
        checks.append(self._fetch(ptr, table, stream))
        return checks[-1].outcome

    def check_now(self, ptr: int, table: Table, stream: Stream) -> None:
        """Waits for a run's status words. Raises IndexOutOfRange."""
        check = self._fetch(ptr, table, stream)
        error = self._hear(check)
        if error is not None:
            raise error

    def _fetch(self, ptr: int, table: Table, stream: Stream) -> _Check:
        block = self._block(table.status)
        self.driver.to_host(block.ptr, ptr, table.status, stream.queue)
        event = self.driver.event()
        self.driver.record(event, stream.queue)
        return _Check(event, block, table, self._current.explain, Outcome())

    def _take(self, check: _Check) -> None:
        error = self._hear(check)
        if error is None:
            return
        explain = check.explain
        made: list[Exception] = []

        def once() -> Exception:
            if not made:
                made.append(error if explain is None else explain(error))
            return made[0].with_traceback(None)

        check.outcome.error = once
        if self._failed is None:
            self._failed = check.outcome

    def _hear(self, check: _Check) -> IndexOutOfRange | None:
        """Waits for a run's status words, says in its outcome which checks failed, and returns the first one's error."""
        self.driver.wait(check.event)
        errors: dict[int, IndexOutOfRange] = {}
        for n, note in enumerate(check.table.notes):
            _, point, site, index, bound = (ctypes.c_int64 * 5).from_address(check.words.ptr + STATUS_STRIDE * n)
            if point:
                errors[n] = index_error(note, site, index, bound)
        self._idle.append(check.words)
        check.outcome.failed = frozenset(errors)
        check.outcome.pending = False
        return next(iter(errors.values()), None)

    def _block(self, nbytes: int) -> Pinned:
        for n, block in enumerate(self._idle):
            if block.nbytes >= nbytes:
                return self._idle.pop(n)
        return self.driver.pinned(max(nbytes, 1024))
