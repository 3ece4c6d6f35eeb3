"""The benchmarks run, and their table says what was measured."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.bench.harness import Case, Row, agrees, pooled, row_of, table, times
from tests.bench.processes import Setting, cold_and_cached
from tests.bench.turns import Worker
from tests.bench.worker import CASES, FRAMEWORKS, WORKLOADS, Turns

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", "tests.bench", *arguments], cwd=ROOT, env=settings, capture_output=True, text=True
    )


def test_a_quick_round(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    names = ["--only", "ops,tiny", "--frameworks", "numpy,duo,duo.compile,duo.graph", "--threads", "1"]
    done = bench("--quick", *names, "--json", str(file), OPENBLAS_CORETYPE="Prescott")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(r["workload"], r["framework"]): r for r in json.loads(file.read_text())}
    assert {f for w, f in rows if w == "tiny op"} == {"numpy", "duo"}
    assert ("tiny op, gradients recorded", "duo") in rows
    assert {f for w, f in rows if w == "tiny"} == {"numpy", "duo", "duo.compile", "duo.graph"}
    assert all(r["low"] <= r["value"] <= r["high"] and r["value"] > 0 for r in rows.values())
    assert "tiny op, us" in done.stdout


def test_memory_of_training() -> None:
    setting = Setting(threads=1, quick=True)
    taken = cold_and_cached(setting, "duo.graph", "memory", "--case", "mlp adam")
    assert list(taken) == ["cold", "from disk"]
    for peak, growth in taken.values():
        assert 0 < growth < peak  # megabytes: Python alone takes ten, this training a few
        assert 10 < peak < 1000
    assert cold_and_cached(setting, "numpy", "memory", "--case", "cnn") == {"cold": None, "from disk": None}


def test_unknown_names_are_refused() -> None:
    for option in ("--only", "--frameworks"):
        done = bench(option, "nonsense")
        assert done.returncode == 2 and "nonsense" in done.stderr


def test_every_style_has_the_workloads_it_claims() -> None:
    """Each name of a workload is one that some framework has, and each framework's class is where it is said to be."""
    named = {"arrays" if w == "million" else w for w in WORKLOADS}
    found: set[str] = set()
    for framework in FRAMEWORKS.values():
        style = getattr(importlib.import_module(f"tests.bench.{framework.module}"), framework.name)
        found |= {w for w in named if hasattr(style, w)}
    assert found == named and set(CASES) == set(WORKLOADS)


def test_wrong_results_are_not_timed(tmp_path: Path) -> None:
    def case(values: list[float]) -> Case:
        return Case("c", lambda: None, "us", lambda: [np.array(values)])

    assert "not finite" in agrees(case([np.nan]), tmp_path)
    assert agrees(case([1.0, 2.0]), tmp_path) == ""
    assert agrees(case([1.0, 2.001]), tmp_path) == ""
    assert "differs by" in agrees(case([1.0, 2.1]), tmp_path)
    assert "differs by inf" in agrees(case([1.0]), tmp_path)
    assert "differs by inf" in agrees(case([1.0, np.nan]), tmp_path)


def test_rates_and_times_become_ratios_to_the_best_peer() -> None:
    assert row_of("w", "duo", "us", [2e-6, 1e-6, 3e-6], 2).value == pytest.approx(1.0)
    assert row_of("w", "duo", "GFLOP/s", [1e-3], 1e9).value == pytest.approx(1000.0)
    rows = [
        Row("a", "torch", "us", [6]),
        Row("a", "duo.compile", "us", [3]),
        Row("a", "jax", "us", [12]),
        Row("b", "numpy", "GB/s", [8]),
        Row("b", "duo", "GB/s", [4]),
        Row("b", "memcpy", "GB/s", [16]),
        Row("c", "duo", "s", [1]),
        Row("d", "duo", "", error="went wrong"),
    ]
    a, b, c, d = table(rows).splitlines()
    assert [c.strip() for c in a.split("   ")][-3:] == ["duo.compile 3 (0.50)", "torch 6 (1.00)", "jax 12 (2.00)"]
    assert [c.strip() for c in b.split("   ")][-4:] == [
        "memcpy 16 (0.50)",
        "numpy 8 (1.00)",
        "duo 4 (2.00)",
        "| of memcpy: duo 0.25",
    ]
    assert c.endswith("duo 1") and d.endswith("duo: went wrong")


def test_ratios_are_of_slices_that_took_turns() -> None:
    """The machine is twice as slow for half of the time: the medians of the two say something else than each turn does."""
    fast_then_slow = Row("a", "duo", "us", [1, 1, 2, 2, 2]), Row("a", "torch", "us", [1.5, 1.5, 3, 3, 1.5])
    assert times(*fast_then_slow) == pytest.approx(2 / 3)
    assert fast_then_slow[0].value / fast_then_slow[1].value == pytest.approx(4 / 3)
    assert times(Row("a", "duo", "GB/s", [2, 4]), Row("a", "torch", "GB/s", [1, 2])) == pytest.approx(0.5)


def test_rounds_are_pooled() -> None:
    rows = [Row("a", "duo", "us", [v, v]) for v in (1.0, 9.0, 2.0)] + [Row("b", "duo", "us", [1])]
    a, b = pooled(rows)
    assert (a.values, a.value, b.values) == ([1, 1, 9, 9, 2, 2], 2.0, [1])
    assert pooled([*rows, Row("b", "duo", "us", error="no")])[1].error == "no"
    written = a.written()
    assert (written["low"], written["value"], written["high"]) == a.quartiles() and written["workload"] == "a"


def test_a_process_makes_its_cases_one_name_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one name needs is gone when the next is asked for, variants are there together, and errors keep no other case from running."""
    calls: list[str] = []

    def made(name: str, variant: str = "", result: float = 1.0) -> Case:
        call = partial(calls.append, name + variant)
        return Case(name, call, "us", lambda: [np.array([result])], variant=variant)

    class Style:
        def latency(self) -> Iterator[Case]:
            yield made("a")
            yield made("a", "other", result=2.0)
            yield made("c")
            raise LookupError("no more")

    monkeypatch.setattr("tests.bench.worker.style_of", lambda *_: Style())
    turns = Turns("numpy", "latency", 1, tmp_path, quick=True)
    first, second = turns.prepare("a")
    assert (first.framework, first.error) == ("numpy", "")
    assert second.framework == "numpy:other" and "differs by" in second.error
    value = turns.turn(0)
    assert isinstance(value, float) and value > 0
    assert set(calls) == {"a"}
    first_case = weakref.ref(turns.timed[0])
    assert turns.prepare("b") == []
    assert first_case() is None
    done, failed = turns.prepare("c")
    assert done.error == "" and "no more" in failed.error


def test_a_process_that_ends_is_reported(tmp_path: Path) -> None:
    with Worker(Setting(1, True), "numpy", "nonsense", tmp_path) as worker:
        (row,) = worker.prepare("tiny op")
    assert (row.workload, row.framework) == ("tiny op", "numpy") and "ended with 2" in row.error
