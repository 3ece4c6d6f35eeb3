"""What disturbs a step: interrupts at random moments, and threads that read meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

TRIALS = int(os.environ.get("DUO_SIGNAL_TRIALS", "300"))


@contextlib.contextmanager
def interrupts(least: float, longest: float) -> Iterator[Callable[[Callable[[], object]], bool]]:
    """A function that does some work with a KeyboardInterrupt on the way, after a time between the two (seconds), and tells whether it came in
    time. Nothing else is interrupted."""
    rng, armed = random.Random(0), False

    def interrupt(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    def disturbed(work: Callable[[], object]) -> bool:
        nonlocal armed
        hit = False
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(least, longest))
            work()
            armed = False
        except KeyboardInterrupt:
            armed, hit = False, True
        signal.setitimer(signal.ITIMER_REAL, 0)
        return hit

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield disturbed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def torn_reads(read: Callable[[], Iterable], work: Callable[[], object], times: int) -> list:
    """Does the work so many times while two threads read arrays whose elements are all equal; gives those that were not."""
    torn, stop = [], threading.Event()

    def reader() -> None:
        while not stop.is_set():
            for seen in read():
                if not (seen == seen[0, 0]).all():
                    torn.append(seen)

    readers = [threading.Thread(target=reader) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        for _ in range(times):
            work()
    finally:
        stop.set()
        for thread in readers:
            thread.join()
    return torn
