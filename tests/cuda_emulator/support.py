"""The emulated GPU for tests: one driver for the process, through PyCUDA where that is installed, else by ctypes.

DUO_TEST_PYCUDA=1 builds PyCUDA from its source against the emulator's libcuda (about 80 s, once; it needs CUDA's headers).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_emulator import build

PYCUDA = "pycuda==2026.1"
ORDERS = ("0", "1", "2")

needs_emulator = pytest.mark.skipif(build.missing() is not None, reason=build.missing() or "")
every_order = pytest.mark.parametrize("order", ORDERS)


def toolkit() -> Path | None:
    """Where CUDA's headers are."""
    places = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT")]
    return next(
        (Path(p) for p in [*places, "/usr/local/cuda"] if p and (Path(p) / "include" / "cuda.h").exists()), None
    )


def _built_pycuda() -> str | None:
    """A folder with PyCUDA, built once; None where it was not asked for or cannot be."""
    cuda = toolkit()
    if os.environ.get("DUO_TEST_PYCUDA") != "1" or cuda is None:
        return None
    stub = build.library()

    def make(path: Path) -> None:
        path.unlink()
        home = path.with_suffix(".home")
        home.mkdir(exist_ok=True)
        # PyCUDA's setup reads this file of the home folder, for which we give it another
        lines = [f'CUDA_ROOT = "{cuda}"', "CUDA_ENABLE_CURAND = False", f'CUDADRV_LIB_DIR = ["{stub}"]']
        (home / ".aksetup-defaults.py").write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(path), "--no-cache-dir", PYCUDA]
        # nothing of it is in the way of a test: compiling it without optimisation takes a part of the time
        settings = {**os.environ, "HOME": str(home), "CFLAGS": "-O0 -g0 -w"}
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"PyCUDA does not build:\n{done.stderr[-4000:]}")

    return str(build.kept(["pycuda", PYCUDA, sys.version, str(cuda)], "", make))


def _undefined(extension: Path) -> list[str]:
    """The driver's functions that PyCUDA links to."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(extension)], capture_output=True, text=True, check=True
    ).stdout
    return sorted({line.split()[-1].split("@")[0] for line in listed.splitlines() if line.split()[-1].startswith("cu")})


@functools.cache
def _driver() -> tuple[str, Any]:
    folder = _built_pycuda()
    if folder is not None:
        sys.path.append(folder)
    spec = importlib.util.find_spec("pycuda")
    if spec is not None and spec.submodule_search_locations:
        extensions = list(Path(next(iter(spec.submodule_search_locations))).glob("_driver*.so"))
        if extensions:
            # loaded first, it is the libcuda.so.1 that PyCUDA gets
            ctypes.CDLL(str(build.library(_undefined(extensions[0])) / "libcuda.so.1"), ctypes.RTLD_GLOBAL)
            module = importlib.import_module("duo_backends.cuda.driver")
            return "PyCUDA", module.PycudaDriver()
    module = importlib.import_module("tests.cuda_emulator.ctypes_driver")
    return "ctypes", module.CtypesDriver(str(build.library() / "libcuda.so.1"))


def driver() -> Any:
    """The driver of the emulated GPU."""
    return _driver()[1]


def driver_name() -> str:
    return _driver()[0]


if __name__ == "__main__":  # builds what the tests of CUDA need, before they want it
    if build.missing() is None:
        _built_pycuda()
