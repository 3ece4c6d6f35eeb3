"""`python -m tests.device_check [--wheels DIR] [--minutes N] [--emulated]`

On a machine with a CUDA device: installs PyCUDA if it is not there (from a folder of wheels, or by pip), compares the device's bits with the CPU's,
runs small programs under compute-sanitizer, and prints figures beside the frameworks that are installed, all in one table. The exit code is 1
if anything differs. `--emulated` runs the same on the emulator of the tests, small: it shows that the command works, not how fast a GPU is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def main() -> int:
    """Runs everything; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.device_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", metavar="DIR", help="where a wheel of PyCUDA lies, for a machine without a network")
    parser.add_argument("--minutes", type=float, default=20, help="how long it may take (default: %(default)s)")
    parser.add_argument("--emulated", action="store_true", help="on the emulator, small")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    if options.emulated:
        support = importlib.import_module("tests.frontends.cuda_support")
        runtime = importlib.import_module("duo.runtime")
        runtime.use_backend("cuda:0", support.emulated_once())
        build = importlib.import_module("tests.cuda_emulator.build")
        artefact: Any = importlib.import_module("duo_backends.aot.cuda_artefact")
        artefact.find_compiler = build.EmulatorCompiler
    elif not _pycuda(options.wheels):
        return 1
    correctness = importlib.import_module("tests.device_check.correctness")
    runtime = importlib.import_module("duo.runtime")
    properties = runtime.backend("cuda:0").driver.properties
    print(
        f"{properties.name}, sm_{properties.arch}, {properties.memory / 1e9:.0f} GB, {properties.multiprocessors} multiprocessors"
    )
    good = True
    for what, right in _checks(correctness, 10 if options.emulated else 240, [f"cuda:sm_{properties.arch}"]):
        good = good and right
        print(f"{'ok  ' if right else 'WRONG'} {what}", flush=True)
    if not options.emulated:
        for what, right in _sanitized():
            good = good and right
            print(f"{'ok  ' if right else 'WRONG'} {what}", flush=True)
    left = end - time.monotonic()
    if left > 30:
        speed = importlib.import_module("tests.device_check.speed")
        sizes = (1 << 12, 32, 32) if options.emulated else (speed.GIGA, 4096, 8192)
        found = []
        for figure in speed.figures(*sizes, limit=left - 20):
            found.append(figure)
            print(f"     {figure.framework}: {figure.what} {figure.value:.4g} {figure.unit}", flush=True)
        print(f"\n{properties.name}\n{speed.table(found)}")
    return 0 if good else 1


def _pycuda(wheels: str | None) -> bool:
    """Whether PyCUDA is there, now."""
    if importlib.util.find_spec("pycuda") is None:
        source = ["--no-index", "--find-links", wheels] if wheels else []
        done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *source, "pycuda"], check=False)
        importlib.invalidate_caches()
        if done.returncode or importlib.util.find_spec("pycuda") is None:
            print("PyCUDA cannot be installed: give a folder with a wheel of it, --wheels DIR", file=sys.stderr)
            return False
    return True


def _checks(correctness: object, limit: float, targets: Sequence[str]) -> Iterator[tuple[str, bool]]:
    count, wrong = correctness.table(limit)  # type: ignore[attr-defined]
    yield f"{count} programs of the op table have the CPU's bits{''.join(f'; not {w}' for w in wrong[:10])}", not wrong
    yield from correctness.models()  # type: ignore[attr-defined]
    yield from correctness.artefacts(targets)  # type: ignore[attr-defined]
    yield from correctness.errors()  # type: ignore[attr-defined]


def _sanitized() -> Iterator[tuple[str, bool]]:
    """compute-sanitizer's tools on small programs."""
    tool = shutil.which("compute-sanitizer") or _beside_nvcc()
    if tool is None:
        yield "compute-sanitizer is not there: nothing was watched", True
        return
    for name in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            name,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "tests.device_check.correctness",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        yield (
            f"compute-sanitizer {name}{'' if done.returncode == 0 else ': ' + done.stdout[-2000:]}",
            done.returncode == 0,
        )


def _beside_nvcc() -> str | None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    found = Path(os.path.realpath(nvcc)).parent / "compute-sanitizer"
    return str(found) if found.exists() else None


if __name__ == "__main__":
    sys.exit(main())
