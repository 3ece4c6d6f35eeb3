"""What compiled code depends on beside the program: duo's own sources, LLVM's package, the CPU. Part of the keys of what is kept on disk
under a Function's hash, so that it is found without asking the compiler."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path

import duo_backends
import duo_ir
from duo_backends.cpu.objects import OWN_LOADER

FORMAT = 2  # of the entries of `saved.py`
_STARTED = time.time()


@functools.cache
def fingerprint() -> str | None:
    """Of duo's sources, LLVM's package and the CPU. None where code cannot be loaded without LLVM, and where a source is younger than this
    process: what runs may be older than what the file says."""
    if not OWN_LOADER:
        return None
    parts = [str(FORMAT)]
    for package in (duo_ir, duo_backends):
        sources = list(_sources(Path(package.__path__[0])))
        if not sources or any(status.st_mtime > _STARTED for _, status in sources):
            return None
        parts += [f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in sources]
    found = importlib.util.find_spec("llvmlite")
    if found is None or found.origin is None:
        return None
    status = os.stat(found.origin)
    parts.append(f"{found.origin} {status.st_size} {status.st_mtime_ns}")
    try:
        with open("/proc/cpuinfo") as file:
            first = file.read(8192).split("\n\n")[0].splitlines()
    except OSError:
        return None
    wanted = ("flags", "model", "cpu family", "vendor_id", "stepping")
    parts += [line for line in first if line.startswith(wanted)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _sources(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name.endswith(".py"):
                yield entry.path, entry.stat()
            elif entry.is_dir() and not entry.name.startswith(("_", ".")):
                yield from _sources(Path(entry.path))
