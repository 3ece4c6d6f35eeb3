"""Profiles of the CPU backend: what each phase of each program took, noted by the native runner itself.

While a profile is on, the runner appends an event per phase to a block of memory (`runner_text.py`), which costs a few dozen
nanoseconds a phase; without one it costs a load. `Recording.events()` tells which program step each event belongs to.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import numpy as np

from duo_backends.cpu.runner import native
from duo_backends.cpu.runner_text import CODE_WORDS, EVENT_WORDS, PROFILE_HEADER
from duo_ir.errors import ArgumentError

_bounds: weakref.WeakSet[Any] = weakref.WeakSet()  # every bound program
_lock = threading.Lock()
_active: Recording | None = None


def register(bound: Any) -> None:
    """A bound program, whose `table` events may come from."""
    with _lock:
        _bounds.add(bound)
        if _active is not None:
            _active.bounds.append(bound)


class Event(NamedTuple):
    """One run of a kernel, all its phases: what is known of it (`bound.Note`; None: a copy), nanoseconds on the clock of
    `time.perf_counter_ns`, threads it may have used."""

    note: Any
    start: int
    end: int
    threads: int


class Recording:
    """A profile being made: `with Recording(capacity) as r: ...`, then `r.events()`. One at a time."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ArgumentError(f"a profile needs room for at least one event, not {capacity}")
        self.memory = np.zeros(PROFILE_HEADER // 8 + EVENT_WORDS * capacity, np.int64)
        self.memory[1] = capacity
        self.capacity = capacity
        self.bounds: list[Any] = []

    def __enter__(self) -> Recording:
        global _active
        with _lock:
            if _active is not None:
                raise ArgumentError("a profile is being made already; there can be one at a time")
            self.bounds = list(_bounds)  # held, so that the addresses in events stay theirs
            _active = self
        native().set_profile(self.memory.ctypes.data)
        return self

    def __exit__(self, *exc: object) -> None:
        global _active
        native().set_profile(0)
        with _lock:
            _active = None
        # A program that another thread is running has read the address and may write yet: its memory is never freed.
        _kept.append(self.memory)

    @property
    def lost(self) -> int:
        """Events that there was no room for."""
        return max(0, int(self.memory[0]) - self.capacity)

    def events(self) -> list[Event]:
        """By start. Raises ArgumentError on a system without a clock for profiles."""
        spans = sorted((b.table.code.ctypes.data, n) for n, b in enumerate(self.bounds))
        starts = np.array([address for address, _ in spans], np.int64)
        count = min(int(self.memory[0]), self.capacity)
        header = PROFILE_HEADER // 8
        rows = self.memory[header : header + EVENT_WORDS * count].reshape(count, EVENT_WORDS)
        out: list[Event] = []
        latest: dict[int, int] = {}  # bound program -> its latest event in `out`
        for address, start, end, threads in rows.tolist():
            if end == 0:
                raise ArgumentError("profiles are not there on this operating system yet")
            begin, number = spans[int(np.searchsorted(starts, address, "right")) - 1]
            bound = self.bounds[number]
            row = (address - begin) // (8 * CODE_WORDS)
            note = bound.table.notes[row]
            if row > 0 and note is not None and bound.table.notes[row - 1] is note and number in latest:
                k = latest[number]  # a further phase
                out[k] = out[k]._replace(end=end, threads=max(threads, out[k].threads))
                continue
            latest[number] = len(out)
            out.append(Event(note, start, end, threads))
        return sorted(out, key=lambda e: e.start)


_kept: list[np.ndarray] = []
