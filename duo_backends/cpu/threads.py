"""How many threads programs use, and the life of the pool: its size, its spinning, its end at exit.

The pool itself is native (`pool_text.py`); its workers start with the first parallel region, also in a forked child.
Results never depend on the number of threads.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from typing import Any, Protocol

from duo_backends.cpu.pool_text import MAX_THREADS
from duo_backends.cpu.system import system
from duo_ir.errors import ArgumentError

SPIN_MICROSECONDS = 200  # how long an idle worker spins before it sleeps: longer than Python takes from one call to the next


def _initial() -> int:
    text = os.environ.get("DUO_NUM_THREADS")
    if not text:
        return min(system.usable_cores(), MAX_THREADS)
    if not text.isdigit() or not 1 <= int(text) <= MAX_THREADS:
        raise ArgumentError(f"DUO_NUM_THREADS={text!r}: give a number from 1 to {MAX_THREADS}")
    return int(text)


class PoolControls(Protocol):
    """What is asked of the native runtime (`runner.Native`) here."""

    set_spins: Any
    resize: Any
    relax_times: Any


_threads: int | None = None
_native: PoolControls | None = None
_lock = threading.Lock()
_listeners: weakref.WeakSet[Any] = weakref.WeakSet()


def get_num_threads() -> int:
    """Threads that one program uses, the caller's among them."""
    global _threads
    if _threads is None:
        _threads = _initial()
    return _threads


def set_num_threads(n: int) -> None:
    """Sets how many threads a program uses (1 to 256, the caller's among them), from the next call on."""
    global _threads
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_THREADS:
        raise ArgumentError(f"set_num_threads({n!r}): give a number from 1 to {MAX_THREADS}")
    _threads = n
    if _native is not None:
        _resize(_native)
    with _lock:
        listeners = list(_listeners)
    for listener in listeners:
        listener.threads_changed()


def on_change(listener: Any) -> None:
    """`listener.threads_changed()` is called after each `set_num_threads`; it is referenced weakly."""
    with _lock:
        _listeners.add(listener)


def attach(native: PoolControls) -> None:
    """The native runtime has been loaded: from here on its pool follows."""
    global _native
    _resize(native)
    _native = native


def _resize(native: PoolControls) -> None:
    n = get_num_threads()
    # More threads than cores: spinning would take the core from a thread that has work.
    micros = SPIN_MICROSECONDS if n <= system.usable_cores() else 1
    native.set_spins(max(1, int(micros * _spins_per_microsecond(native))))
    native.resize(n, 1 << 62)


def _spins_per_microsecond(native: PoolControls) -> float:
    best = 0.0
    for _ in range(3):
        start = time.perf_counter_ns()
        native.relax_times(1000)
        best = max(best, 1e6 / max(time.perf_counter_ns() - start, 1))
    return best


def _end() -> None:
    # A worker must not spin in code that the interpreter's end unloads; a daemon thread may still own the pool, so do not wait long.
    if _native is not None:
        _native.resize(1, 100_000)


atexit.register(_end)
