"""`duo.profile`: where the time of a piece of a program goes, by source line and by kernel, against what the machine can do.

The backends note each kernel of each program (duo_backends/cpu/profile.py, by its runner; duo_backends/cuda/profile.py, by events); here the notes are
added up, set against the work that the kernels are (duo_ir/kernels/work.py, which programs ask) and the devices' measured peaks, printed, and written as a Chrome
trace.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from duo import runtime
from duo.devices import CPU
from duo.eager.flush import synchronize

MAX_EVENTS = 1 << 18


@dataclass
class Row:
    """What one kernel, or one source line, took in all on a device. `seconds`: time on the clock; `flops`, `nbytes`: work as `duo_ir.kernels.work`
    counts it; `core_seconds`: time times the threads that shared it (a GPU counts as one)."""

    name: str
    device: str = CPU
    calls: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    flops: int = 0
    nbytes: int = 0
    lines: dict[str, None] = field(default_factory=dict)

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations a second."""
        return self.flops / self.seconds * 1e-9 if self.seconds else 0.0

    @property
    def gbytes(self) -> float:
        """Billions of bytes a second, each argument of a kernel counted once."""
        return self.nbytes / self.seconds * 1e-9 if self.seconds else 0.0


@dataclass(frozen=True)
class _Run:
    """A kernel that ran once: consecutive phases of one step."""

    name: str
    line: str
    start: int
    end: int
    threads: int
    flops: int
    nbytes: int
    device: str


class profile:
    """`with duo.profile() as p:` notes every kernel that runs inside, in any thread and either mode, on any device in use, and prints the result at the
    end: time by source line and by kernel, each with GFLOP/s and GB/s and their share of the device's measured peaks. While it is on, a GPU runs kernel by kernel
    instead of whole CUDA graphs.

    show: print at the end. trace: a path for a Chrome trace (open it in chrome://tracing or Perfetto). limit: rows of each
    table. capacity: kernels that there is room for; more are counted as lost. Afterwards `p.kernels` and `p.lines` are lists of
    `Row`s, longest first, `p.seconds` is the time on the clock, `p.kernel_seconds` that inside kernels, and `p.chrome_trace(path)` writes the trace.

    Programs are cached by what they compute: where two source lines give the same program, the first one's line is shown, and what eager
    mode runs for the first time, entry by entry, has none: profile a few steps after the first two.
    Raises ArgumentError when a profile is being made already, and where programs run by the interpreter.
    """

    def __init__(
        self, *, show: bool = True, trace: str | os.PathLike | None = None, limit: int = 20, capacity: int = MAX_EVENTS
    ) -> None:
        self.show, self.trace, self.limit = show, trace, limit
        self._recordings = runtime.recordings(capacity)
        self._entered = ExitStack()
        self._runs: list[_Run] = []
        self._begin = self._end = 0
        self.lost = 0

    def __enter__(self) -> profile:
        synchronize()
        with ExitStack() as entered:  # if one cannot be entered, none is
            for recording in self._recordings.values():
                entered.enter_context(recording)
            self._entered = entered.pop_all()
        self._begin = time.perf_counter_ns()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                synchronize()
        finally:
            self._end = time.perf_counter_ns()
            self._entered.close()
        if exc[0] is not None:
            return
        runs = [run for device, recording in self._recordings.items() for run in _runs(recording.events(), device)]
        self._runs = sorted(runs, key=lambda r: r.start)
        self.lost = sum(recording.lost for recording in self._recordings.values())
        if self.trace is not None:
            self.chrome_trace(self.trace)
        if self.show:
            print(self)

    # ------------------------------------------------------------------------------------------------ what was found
    @property
    def seconds(self) -> float:
        """From the beginning of the block to its end."""
        return (self._end - self._begin) * 1e-9

    @property
    def kernel_seconds(self) -> float:
        """Inside kernels, added up over the threads of Python that ran programs."""
        return sum(r.end - r.start for r in self._runs) * 1e-9

    @property
    def kernels(self) -> list[Row]:
        """By kernel, longest first."""
        return self._rows(lambda r: r.name)

    @property
    def lines(self) -> list[Row]:
        """By source line (file:line of the user's program), longest first."""
        return self._rows(lambda r: r.line)

    def _rows(self, key: Callable[[_Run], str]) -> list[Row]:
        rows: dict[tuple[str, str], Row] = {}
        for run in self._runs:
            name = key(run)
            row = rows.setdefault((name, run.device), Row(name, run.device))
            taken = (run.end - run.start) * 1e-9
            row.calls += 1
            row.seconds += taken
            row.core_seconds += taken * run.threads
            row.flops += run.flops
            row.nbytes += run.nbytes
            row.lines[run.line] = None
        return sorted(rows.values(), key=lambda r: -r.seconds)

    def chrome_trace(self, path: str | os.PathLike) -> None:
        """Writes the kernels as a Chrome trace: one event each, with its line, work and rates; a row for each device."""
        number = {device: n for n, device in enumerate(self._recordings)}
        events = [
            {
                "name": run.name, "cat": "kernel", "ph": "X", "pid": os.getpid(), "tid": number[run.device],
                "ts": (run.start - self._begin) / 1e3, "dur": (run.end - run.start) / 1e3,
                "args": {"device": run.device, "line": run.line, "threads": run.threads, "flops": run.flops, "bytes": run.nbytes},
            }
            for run in self._runs
        ]  # fmt: skip
        with open(path, "w") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ns"}, file)

    # ------------------------------------------------------------------------------------------------------ printing
    def __str__(self) -> str:
        if not self._runs:
            return "duo.profile: no kernel ran"
        peaks = {device: runtime.peaks(device) for device in dict.fromkeys(run.device for run in self._runs)}
        rates = "; ".join(f"{'peaks here' if device is CPU else device}: {found}" for device, found in peaks.items())
        out = [
            f"duo.profile: {_time(self.seconds)}, {_time(self.kernel_seconds)} of it in {len(self._runs)} kernel runs; {rates}"
        ]
        if self.lost:
            out.append(f"{self.lost} phases more ran than there was room for: raise `capacity`")
        out += ["", *self._table("source line", self.lines, peaks), "", *self._table("kernel", self.kernels, peaks)]
        return "\n".join(out)

    def _table(self, title: str, rows: Sequence[Row], peaks: Mapping[str, Any]) -> list[str]:
        total = sum(r.seconds for r in rows) or 1.0
        shown = rows[: self.limit]
        names = [_short(r.name if r.device is CPU else f"{r.device} {r.name}") for r in shown]
        width = max(len(title), *map(len, names))
        head = (
            f"{title:<{width}}  {'runs':>6} {'time':>9} {'share':>6} {'GFLOP/s':>8} {'peak':>5} {'GB/s':>7} {'peak':>5}"
        )
        out = [head, "-" * len(head)]
        for r, name in zip(shown, names):
            peak = peaks[r.device]
            compute = r.flops / r.core_seconds * 1e-9 / peak.gflops if r.core_seconds else 0.0
            out.append(
                f"{name:<{width}}  {r.calls:>6} {_time(r.seconds):>9} {r.seconds / total:>6.1%} {r.gflops:>8.1f} {compute:>5.0%} "
                f"{r.gbytes:>7.1f} {r.gbytes / peak.gbytes:>5.0%}"
            )
        if len(rows) > len(shown):
            rest = sum(r.seconds for r in rows[self.limit :])
            out.append(f"{f'{len(rows) - len(shown)} more':<{width}}  {'':>6} {_time(rest):>9} {rest / total:>6.1%}")
        return out


def _runs(events: Iterable[Any], device: str) -> list[_Run]:
    out = []
    for e in events:
        note = e.note
        if note is None:
            out.append(_Run("copy", "(copies)", e.start, e.end, e.threads, 0, 0, device))
        else:
            line = note.where or "(no line)"
            out.append(_Run(note.description, line, e.start, e.end, e.threads, note.flops, note.traffic, device))
    return out


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."
