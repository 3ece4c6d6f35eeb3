"""Profiles of the CUDA backend: what each kernel of each program took, by events before and after it.

While a profile is on, programs are launched kernel by kernel instead of as CUDA graphs, each between two events, which cost about a microsecond
of the host's time and no wait. Where the GPU has nothing else to do, what a launch takes to arrive counts as the kernel's time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from duo_backends.cuda.streams import Runtime, Stream
from duo_ir.errors import ArgumentError


class Event(NamedTuple):
    """One run of a kernel: what is known of it (`flat.StepNote`; None: a copy), nanoseconds on the clock of `time.perf_counter_ns`, and 1."""

    note: Any
    start: int
    end: int
    threads: int = 1


class Recording:
    """A profile being made: `with Recording(runtime, capacity) as r: ...`, then `r.events()`. One at a time for a device."""

    def __init__(self, runtime: Runtime, capacity: int) -> None:
        if capacity < 1:
            raise ArgumentError(f"a profile needs room for at least one event, not {capacity}")
        self.runtime, self.capacity = runtime, capacity
        self.lost = 0  # kernels that there was no room for
        self._spans: list[tuple[Any, Any, Any]] = []
        self._origin: Any = None
        self._began = 0

    def __enter__(self) -> Recording:
        runtime = self.runtime
        with runtime.lock, runtime.driver:
            if runtime.recording is not None:
                raise ArgumentError("a profile is being made already; there can be one at a time")
            self._origin = runtime.driver.event()
            runtime.driver.record(self._origin, runtime.default.queue)
            runtime.driver.wait(self._origin)
            self._began = time.perf_counter_ns()
            runtime.recording = self
        return self

    def __exit__(self, *exc: object) -> None:
        with self.runtime.lock:
            self.runtime.recording = None

    def run(self, note: Any, stream: Stream, launch: Any) -> None:
        """Calls `launch()`, which gives the stream a kernel's work."""
        if len(self._spans) >= self.capacity:
            self.lost += 1
            launch()
            return
        driver = self.runtime.driver
        first, last = driver.event(), driver.event()
        driver.record(first, stream.queue)
        launch()
        driver.record(last, stream.queue)
        self._spans.append((note, first, last))

    def events(self) -> Sequence[Event]:
        """By start; waits for what has been started."""
        driver = self.runtime.driver
        out = []
        with driver:
            for note, first, last in self._spans:
                driver.wait(last)
                start = self._began + round(driver.elapsed(self._origin, first) * 1e6)
                out.append(Event(note, start, start + round(driver.elapsed(first, last) * 1e6)))
        return sorted(out, key=lambda e: e.start)
