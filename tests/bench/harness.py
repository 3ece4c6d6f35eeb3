"""Cases, their timing in slices, the comparison of results before it, and the table. Imports no framework: every process of a run uses it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Case:
    """One timed call. `amount`: what it does, in the unit's terms (ops, floating-point operations, bytes). `unit`: a time ('us', 'ms',
    's') is time per amount, a rate ('GFLOP/s', 'GB/s') is amount per time. `result`: arrays that every framework must agree on, asked for
    once, before the timing and on fresh state; None for a yardstick, which has none. `variant`: which of a framework's ways this is, where it
    has several."""

    name: str
    call: Callable[[], Any]
    unit: str
    result: Callable[[], Sequence[np.ndarray]] | None
    amount: float = 1.0
    variant: str = ""
    tolerance: float = 2e-3


@dataclass
class Row:
    """A measured case. `values`: one of each slice or process, in the order in which they took turns with those of other frameworks;
    `error`, instead of values: why there are none."""

    workload: str
    framework: str
    unit: str
    values: list[float] = field(default_factory=list)
    error: str = ""

    def quartiles(self) -> tuple[float, float, float]:
        """The lower quartile, the median and the upper quartile."""
        if len(self.values) < 2:
            only = self.values[0] if self.values else 0.0
            return only, only, only
        low, middle, high = statistics.quantiles(self.values, n=4)
        return low, middle, high

    @property
    def value(self) -> float:
        return self.quartiles()[1]

    def written(self) -> dict[str, Any]:
        """What a file of figures says of it."""
        return {**self.__dict__, **dict(zip(("low", "value", "high"), self.quartiles()))}


SCALES = {"us": 1e6, "ms": 1e3, "s": 1.0, "GFLOP/s": 1e-9, "GB/s": 1e-9}
STEPS = 5  # training steps whose losses are compared
YARDSTICK = "memcpy"  # the column that is no framework, but what the machine can do


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
    if case.result is None:
        return ""
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
def prime(call: Callable[[], Any], seconds: float) -> None:
    """Calls that compile, fill caches and wake threads."""
    start, calls = time.perf_counter(), 0
    while calls < 4 or (time.perf_counter() - start < seconds and calls < 1000):
        call()
        calls += 1


def time_slice(call: Callable[[], Any], seconds: float) -> float:
    """Seconds per call in a slice of that length: the median of batches, behind calls for a quarter of it that make caches and clock its own."""
    clock = time.perf_counter
    start = clock()
    while True:
        begun = clock()
        call()
        ended = clock()
        if ended - start >= seconds / 4:
            break
    batch = max(1, int(seconds / 20 / max(ended - begun, 1e-7)))
    samples: list[float] = []
    start = clock()
    while not samples or clock() - start < seconds:
        begun = clock()
        for _ in range(batch):
            call()
        samples.append((clock() - begun) / batch)
    return statistics.median(samples)


def rest(longest: float = 0.05) -> None:
    """Returns when the threads of this process sleep, or after `longest` seconds: some libraries' spin for a while before they do."""
    end = time.perf_counter() + longest
    while time.perf_counter() < end:
        used, begun = time.process_time(), time.perf_counter()
        time.sleep(0.002)
        if time.process_time() - used < (time.perf_counter() - begun) / 5:
            return


def in_unit(unit: str, seconds: float, amount: float = 1.0) -> float:
    """A call's time as the unit says it."""
    return (amount / seconds if is_rate(unit) else seconds / amount) * SCALES[unit]


def row_of(workload: str, framework: str, unit: str, seconds: Sequence[float], amount: float = 1.0) -> Row:
    """The Row for these times of one call."""
    return Row(workload, framework, unit, [in_unit(unit, s, amount) for s in seconds])


def pooled(rows: Sequence[Row]) -> list[Row]:
    """One row per workload and framework: with the values of all rounds, or an error if one had one."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.framework), []).append(row)
    out = []
    for (workload, framework), group in groups.items():
        failed = next((r for r in group if r.error), None)
        out.append(failed or Row(workload, framework, group[0].unit, [v for r in group for v in r.values]))
    return out


# ----------------------------------------------------------------------------------------------------------------- table
def table(rows: Sequence[Row]) -> str:
    """A line per workload: each framework's median, in brackets its time as a multiple of the best peer's (below 1: faster), behind a bar
    duo's rate as a share of the yardstick's where there is one."""
    lines = []
    for workload in dict.fromkeys(row.workload for row in rows):
        group = [row for row in rows if row.workload == workload]
        done = sorted((row for row in group if not row.error), key=_cost)
        if done:
            best = next((r for r in done if not is_own(r.framework) and r.framework != YARDSTICK), None)
            cells = [f"{r.framework} {_number(r.value)}" + (f" ({times(r, best):.2f})" if best else "") for r in done]
            yardstick = next((row for row in done if row.framework == YARDSTICK), None)
            shares = [f"{r.framework} {1 / times(r, yardstick):.2f}" for r in done if yardstick and is_own(r.framework)]
            cells += [f"| of {YARDSTICK}: {', '.join(shares)}"] if shares else []
            lines.append(f"{workload + ', ' + done[0].unit:44}{'   '.join(cells)}")
        lines += [f"{workload:44}{row.framework}: {row.error}" for row in group if row.error]
    return "\n".join(lines)


def times(row: Row, other: Row) -> float:
    """`row`'s time as a multiple of the other's: the median over turns, so that what the machine did meanwhile happened to both."""
    ratios = [b / a if is_rate(row.unit) else a / b for a, b in zip(row.values, other.values)]
    return statistics.median(ratios)


def _cost(row: Row) -> float:
    return 1 / row.value if is_rate(row.unit) else row.value


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
