"""The benchmarks run, and their table says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.harness import Row, row_of, table

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", "tests.bench", *arguments], cwd=ROOT, env=settings, capture_output=True, text=True
    )


def test_a_quick_round(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = bench("--quick", "--only", "chain,simplenet", "--json", str(file), OPENBLAS_CORETYPE="Prescott")
    assert done.returncode == 0, done.stderr
    rows = {(r["workload"], r["framework"]): r for r in json.loads(file.read_text())}
    assert ("eager op", "duo") in rows and ("eager op, with gradients", "duo") in rows
    assert {f for w, f in rows if w.startswith("step 10-5-1")} >= {"duo", "duo.compile", "duo.graph"}
    assert all(r["low"] <= r["value"] <= r["high"] and r["value"] > 0 for r in rows.values())
    assert "eager op" in done.stdout


def test_unknown_names_are_refused() -> None:
    done = bench("--only", "nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr


def test_rates_and_times_become_ratios() -> None:
    assert row_of("w", "duo", "us", [2e-6, 1e-6, 3e-6], 2).value == pytest.approx(1.0)
    assert row_of("w", "duo", "GFLOP/s", [1e-3], 1e9).value == pytest.approx(1000.0)
    rows = [
        Row("a", "duo", "us", 4, 4, 4),
        Row("a", "duo.compile", "us", 2, 2, 2),
        Row("a", "torch", "us", 6, 6, 6),
        Row("b", "duo", "GB/s", 4, 4, 4),
        Row("b", "numpy", "GB/s", 8, 8, 8),
    ]
    first, second = table(rows).splitlines()
    assert "torch 6 (3.00x)" in first and "duo 4 " in first
    assert "numpy 8 (0.50x)" in second
