"""Timing: cases of one workload take turns, round by round, so that a busy moment of the machine meets all of them; medians count."""

from __future__ import annotations

import gc
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from duo import runtime


@dataclass
class Case:
    """`call()` is what is timed. `amount`: what one call does, in the unit's terms (ops, floating-point operations, bytes). `unit`: a
    time ('us', 'ms', 's') is time per amount; a rate ('GFLOP/s', 'GB/s') is amount per time."""

    workload: str
    framework: str
    call: Callable[[], Any]
    unit: str
    amount: float = 1.0


@dataclass
class Row:
    """A measured case; `low` and `high` are the quartiles."""

    workload: str
    framework: str
    unit: str
    value: float
    low: float
    high: float


SCALES = {"us": 1e6, "ms": 1e3, "s": 1.0, "GFLOP/s": 1e-9, "GB/s": 1e-9}


def is_rate(unit: str) -> bool:
    return unit.endswith("/s")


def installed(package: str) -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec(package) is not None


def measure(cases: Iterable[Case], rounds: int, seconds: float) -> list[Row]:
    """One Row per case. `seconds`: about how long one sample lasts."""
    prepared = [(case, _repeats(case, seconds)) for case in cases]
    samples: list[list[float]] = [[] for _ in prepared]
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for (case, repeats), taken in zip(prepared, samples):
                taken.append(_sample(case, repeats))
    finally:
        gc.enable()
    return [row_of(case.workload, case.framework, case.unit, s, case.amount) for (case, _), s in zip(prepared, samples)]


def _repeats(case: Case, seconds: float) -> int:
    """Calls per sample; the calls made to find out are the warm-up (compilation, tiers, caches)."""
    for _ in range(4):
        case.call()
    repeats = 1
    while True:
        taken = _sample(case, repeats) * repeats
        if taken >= seconds / 2 or repeats >= 1 << 20:
            return max(1, round(repeats * seconds / max(taken, 1e-9)))
        repeats *= 4


def _sample(case: Case, repeats: int) -> float:
    call = case.call
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def row_of(workload: str, framework: str, unit: str, seconds: list[float], amount: float = 1.0) -> Row:
    """The Row for these times of one call."""
    values = sorted((amount / s if is_rate(unit) else s / amount) * SCALES[unit] for s in seconds)
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return Row(workload, framework, unit, middle, low, high)


def table(rows: list[Row]) -> str:
    """A line per workload: each framework's median, and how many times slower than duo's best it is (below 1: faster)."""
    lines = []
    for workload in dict.fromkeys(row.workload for row in rows):
        group = [row for row in rows if row.workload == workload]
        unit = group[0].unit
        own = [row.value for row in group if row.framework.startswith("duo")]
        best = (max(own) if is_rate(unit) else min(own)) if own else None
        cells = []
        for row in group:
            ratio = ""
            if best is not None and not row.framework.startswith("duo"):
                slower = best / row.value if is_rate(unit) else row.value / best
                ratio = f" ({slower:.2f}x)"
            cells.append(f"{row.framework} {_number(row.value)}{ratio}")
        lines.append(f"{workload:40}{unit:9}{'   '.join(cells)}")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def describe(threads: int) -> str:
    """The machine and the versions, to be quoted with every figure."""
    machine = runtime.backend().machine
    packages = [p for p in ("numpy", "torch", "llvmlite") if installed(p)]
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    return (
        f"{machine.cpu}, {machine.target.vector_bytes * 8}-bit vectors, {os.cpu_count()} cores, {threads} thread(s); "
        f"Python {platform.python_version()}, {versions}; medians; in brackets: times slower than duo's best"
    )
