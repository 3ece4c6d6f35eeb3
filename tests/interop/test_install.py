"""Importing duo is light, and a wheel holds all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "llvmlite",
    "torch",
    "sklearn",
    "scipy",
    "pycuda",
    "onnx",
    "safetensors",
    "fractions",
    "numpy.testing",
    "duo_backends.cpu.body",
    "duo_backends.cpu.backend",
    "duo_backends.cpu.llvm",
    "duo_ir.kernels",
    "duo.func",
    "duo.profiling",
    "duo_ir.pipeline",
)


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["duo", "duo.graph"])
def test_import_loads_no_compiler(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*sys.modules)").split()
    assert [name for name in HEAVY if name in loaded] == []


def test_ops_are_recorded_without_a_compiler() -> None:
    code = "import sys, duo; x = duo.ones(3) + 1; x.shape; print(*sys.modules)"
    assert "llvmlite" not in python(code).split()


def test_what_is_loaded_later_is_there() -> None:
    code = "import duo; from duo import vmap; print({'func', 'vmap', 'profile'} <= set(dir(duo)), duo.func.vmap is vmap, duo.profile.__name__)"
    assert python(code).split() == ["True", "True", "profile"]
    code = "import sys, duo; early = 'duo.jit.compile' in sys.modules; print(early, duo.compile(lambda x: x + 1)(duo.ones(2)).tolist(), duo.lower)"
    assert python(code).startswith("False [2.0, 2.0] <function lower")
    assert "no attribute" in python("import duo\ntry: duo.nothing\nexcept AttributeError as e: print(e)")


@pytest.mark.parametrize("module", ["duo", "duo.graph"])
def test_import_time(module: str, tmp_path: Path) -> None:
    # CPU time of the import beyond NumPy's: the least of several, and in units of NumPy's own, so that a busy or slow machine does not count.
    code = "import time; a = time.process_time(); import numpy; b = time.process_time(); import {}; print(b - a, time.process_time() - b)"
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    python(code.format(module), **compiled)  # writes the byte code
    times = [tuple(map(float, python(code.format(module), **compiled).split())) for _ in range(5)]
    numpy, extra = (min(column) for column in zip(*times))
    print(f"import {module}: {extra * 1e3:.0f} ms of CPU beyond numpy's {numpy * 1e3:.0f} ms")
    assert extra < max(0.1, 1.5 * numpy)


def test_every_package_is_importable_by_name() -> None:
    # A folder without __init__.py would be left out of a wheel by tools that look for packages.
    for package in ("duo", "duo_ir", "duo_backends"):
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path.parent
