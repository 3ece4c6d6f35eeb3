"""Cases, their timing, the comparison of results before it, and the table. Imports no framework: every process of a run uses it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Case:
    """One timed call. `amount`: what it does, in the unit's terms (ops, floating-point operations, bytes). `unit`: a time ('us', 'ms',
    's') is time per amount, a rate ('GFLOP/s', 'GB/s') is amount per time. `result`: arrays that every framework must agree on, asked for
    once, before the timing and on fresh state. `variant`: which of a framework's ways this is, where it has several."""

    name: str
    call: Callable[[], Any]
    unit: str
    result: Callable[[], Sequence[np.ndarray]]
    amount: float = 1.0
    variant: str = ""
    tolerance: float = 2e-3


@dataclass
class Row:
    """A measured case; `low` and `high` are the quartiles; `error`, instead of a value: why there is none."""

    workload: str
    framework: str
    unit: str
    value: float = 0.0
    low: float = 0.0
    high: float = 0.0
    error: str = ""


SCALES = {"us": 1e6, "ms": 1e3, "s": 1.0, "GFLOP/s": 1e-9, "GB/s": 1e-9}
STEPS = 5  # training steps whose losses are compared


def is_rate(unit: str) -> bool:
    return unit.endswith("/s")


def is_own(framework: str) -> bool:
    return framework.startswith("duo")


def training(name: str, step: Callable[[], float], variant: str = "") -> Case:
    """A case whose call is a training step that gives its loss."""
    return Case(name, step, "us", lambda: [np.array([float(step()) for _ in range(STEPS)])], variant=variant)


def unit_of(forward: str) -> str:
    """The unit in which a forward pass is read best."""
    return "us" if forward in ("mlp, batch 1", "cnn, batch 1") else "ms"


# ------------------------------------------------------------------------------------------------------------ comparison
def difference(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference, relative to the largest magnitude in its array; infinite for other shapes and values that are not finite."""
    worst = 0.0
    if len(got) != len(expected):
        return float("inf")
    for a, b in zip(got, expected):
        a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
        if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        if a.size:
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst


def agrees(case: Case, folder: Path) -> str:
    """'' when the case's result is what the first framework of this run got (kept in `folder`), else what is wrong."""
    got = [np.array(a) for a in case.result()]
    file = folder / (case.name.replace(" ", "_").replace("/", "_") + ".npz")
    if not file.exists():
        if not all(np.isfinite(np.asarray(a, np.float64)).all() for a in got):
            return "the result is not finite"
        np.savez(file, *got)
        return ""
    with np.load(file) as kept:
        off = difference(got, [kept[k] for k in kept.files])
    return "" if off <= case.tolerance else f"the result differs by {off:.1e} from that of the first framework"


# ---------------------------------------------------------------------------------------------------------------- timing
def measure(case: Case, quick: bool = False) -> list[float]:
    """Seconds per call of several samples, after calls that compile, fill caches and wake threads."""
    call, clock = case.call, time.perf_counter
    start, calls = clock(), 0
    while calls < 4 or (clock() - start < (0.01 if quick else 0.2) and calls < 1000):
        call()
        calls += 1
    start = clock()
    call()
    repeats = max(1, int((0.0005 if quick else 0.005) / max(clock() - start, 1e-7)))
    gc.collect()
    samples: list[float] = []
    start = clock()
    wanted, least, longest = (2, 0.0, 1.0) if quick else (20, 0.6, 15.0)
    while (len(samples) < wanted or clock() - start < least) and clock() - start < longest:
        begun = clock()
        for _ in range(repeats):
            call()
        samples.append((clock() - begun) / repeats)
    return samples


def row_of(workload: str, framework: str, unit: str, seconds: Sequence[float], amount: float = 1.0) -> Row:
    """The Row for these times of one call."""
    values = [(amount / s if is_rate(unit) else s / amount) * SCALES[unit] for s in seconds]
    return spread(workload, framework, unit, values)


def spread(workload: str, framework: str, unit: str, values: Sequence[float]) -> Row:
    """The Row for these measured values."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return Row(workload, framework, unit, middle, low, high)


def pooled(rows: Sequence[Row]) -> list[Row]:
    """One row per workload and framework: the medians over the rounds that measured it, an error if one had one."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.framework), []).append(row)
    out = []
    for group in groups.values():
        failed = next((r for r in group if r.error), None)
        if failed is not None or len(group) == 1:
            out.append(failed or group[0])
            continue
        middle = [statistics.median(getattr(r, field) for r in group) for field in ("value", "low", "high")]
        out.append(Row(group[0].workload, group[0].framework, group[0].unit, *middle))
    return out


# ----------------------------------------------------------------------------------------------------------------- table
def table(rows: Sequence[Row]) -> str:
    """A line per workload: each framework's median, in brackets its time as a multiple of the best peer's (below 1: faster)."""
    lines = []
    for workload in dict.fromkeys(row.workload for row in rows):
        group = [row for row in rows if row.workload == workload]
        done = [row for row in group if not row.error]
        cells = []
        if done:
            unit = done[0].unit
            peers = [_cost(row) for row in done if not is_own(row.framework)]
            for row in sorted(done, key=_cost):
                ratio = f" ({_cost(row) / min(peers):.2f})" if peers else ""
                cells.append(f"{row.framework} {_number(row.value)}{ratio}")
            lines.append(f"{workload + ', ' + unit:44}{'   '.join(cells)}")
        lines += [f"{workload:44}{row.framework}: {row.error}" for row in group if row.error]
    return "\n".join(lines)


def _cost(row: Row) -> float:
    return 1 / row.value if is_rate(row.unit) else row.value


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
