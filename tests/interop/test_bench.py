"""The benchmarks run, and their table says what was measured."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bench.harness import Case, Row, agrees, pooled, row_of, table
from tests.bench.processes import Setting, cold_and_cached
from tests.bench.worker import FRAMEWORKS, WORKLOADS

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
    taken = cold_and_cached(setting, "duo.graph", 1, "memory", "--case", "mlp adam")
    assert list(taken) == ["cold", "from disk"]
    for ((peak, growth),) in taken.values():
        assert 0 < growth < peak  # megabytes: Python alone takes ten, this training a few
        assert 10 < peak < 1000
    assert cold_and_cached(setting, "numpy", 1, "memory", "--case", "cnn") == {"cold": [None], "from disk": [None]}


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
    assert found == named


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
        Row("a", "torch", "us", 6, 6, 6),
        Row("a", "duo.compile", "us", 3, 3, 3),
        Row("a", "jax", "us", 12, 12, 12),
        Row("b", "numpy", "GB/s", 8, 8, 8),
        Row("b", "duo", "GB/s", 4, 4, 4),
        Row("c", "duo", "s", 1, 1, 1),
        Row("d", "duo", "", error="went wrong"),
    ]
    a, b, c, d = table(rows).splitlines()
    assert [c.strip() for c in a.split("   ")][-3:] == ["duo.compile 3 (0.50)", "torch 6 (1.00)", "jax 12 (2.00)"]
    assert [c.strip() for c in b.split("   ")][-2:] == ["numpy 8 (1.00)", "duo 4 (2.00)"]
    assert c.endswith("duo 1") and d.endswith("duo: went wrong")


def test_rounds_are_pooled_by_their_median() -> None:
    rows = [Row("a", "duo", "us", v, v, v) for v in (1.0, 9.0, 2.0)] + [Row("b", "duo", "us", 1, 1, 1)]
    assert [(r.workload, r.value) for r in pooled(rows)] == [("a", 2.0), ("b", 1)]
    assert pooled([*rows, Row("b", "duo", "us", error="no")])[1].error == "no"
