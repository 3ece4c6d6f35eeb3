"""Starts the processes of a run, and measures what is timed from outside one: imports, first calls, the demo. Frameworks take turns here
too, one process after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.harness import YARDSTICK, Row, row_of
from tests.bench.worker import FIRST_CALLS, FRAMEWORKS, TRAININGS

ROOT = Path(__file__).resolve().parents[2]
# Variables that choose a BLAS library's kernels or threads: with them a peer may be handicapped, and a comparison no comparison.
HANDICAPS = ("OPENBLAS_", "MKL_", "OMP_", "GOTO_", "BLIS_", "ONEDNN_", "NVPL_")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "DUO_NUM_THREADS")
COMPILES = ("duo.compile", "torch.compile", "jax", "tensorflow")  # whose first call is measured
# Ways to train beside the plain one whose memory is measured too: of a framework, or of one training of it.
VARIANTS = {"tensorflow": ("xla", "eager"), ("torch", "cnn"): ("channels_last",)}


@dataclass
class Setting:
    """What the processes of a run have in common. `pythons`: framework -> interpreter, where that is not this one."""

    threads: int
    quick: bool
    pythons: dict[str, str] = field(default_factory=dict)

    def python(self, framework: str) -> str:
        return self.pythons.get(framework, sys.executable)

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(HANDICAPS) and k != "PYTHONDONTWRITEBYTECODE"}
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        return kept | quiet | dict.fromkeys(THREADS, str(self.threads)) | more

    def started(self, framework: str, arguments: Sequence[str], **how: Any) -> subprocess.Popen:
        """Python with these arguments, on as many processors as there are to be threads; `how` is for Popen."""
        how = {"env": self.environment(), "text": True, **how}
        command = [self.python(framework), *arguments]
        return subprocess.Popen(command, cwd=ROOT, preexec_fn=lambda: _confine(self.threads), **how)

    def run(self, framework: str, arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess:
        """Such a process from its start to its end."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.started(framework, arguments, env=self.environment(**environment), **pipes) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _confine(threads: int) -> None:
    """Some frameworks take as many threads as they find processors, whatever they are told."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def version(setting: Setting, framework: str) -> str | None:
    """The version of the package that the framework needs, None where it is not installed."""
    package = FRAMEWORKS[framework].package
    code = f"from importlib import metadata, util; assert util.find_spec({package!r}); print(metadata.version({package!r}))"
    if package in ("duo", "tensorflow"):  # which may be found without being installed, or under another name
        code = f"from importlib import util; assert util.find_spec({package!r}); import {package} as p; print(p.__version__)"
    done = setting.run(framework, ["-c", code])
    return done.stdout.strip() if done.returncode == 0 else None


# ------------------------------------------------------------------------------------------------------ timed from outside
def first_call(setting: Setting, frameworks: Sequence[str], rounds: int) -> list[Row]:
    """Seconds of the first call of a compiled step: nothing cached, then with what the first process left on disk."""
    rows = Gathered("s")
    for case in FIRST_CALLS:
        for _ in range(rounds):
            for framework in [f for f in frameworks if f in COMPILES]:
                for when, seconds in cold_and_cached(setting, framework, "first_call", "--case", case).items():
                    rows.add(f"first call, {case}, {when}", framework, seconds)
    return rows.by_workload()


def memory(setting: Setting, frameworks: Sequence[str], rounds: int) -> list[Row]:
    """Megabytes that a process needs to train: its peak, and what of it came after the import; nothing cached, then with a filled cache."""
    rows = Gathered("MB")
    for case in TRAININGS:
        for _ in range(rounds):
            for framework in [f for f in frameworks if f not in ("onnxruntime", YARDSTICK)]:
                for variant in ("", *VARIANTS.get((framework, case), VARIANTS.get(framework, ()))):
                    arguments = ("memory", "--case", case, "--variant", variant)
                    column = f"{framework}:{variant}" if variant else framework
                    for when, taken in cold_and_cached(setting, framework, *arguments).items():
                        for what, megabytes in zip(("peak memory", "memory above the import's"), taken or ()):
                            rows.add(f"{what}, {case}, {when}", column, megabytes)
    return rows.by_workload()


def cold_and_cached(setting: Setting, framework: str, workload: str, *arguments: str) -> dict[str, Any]:
    """What processes for `workload` report: with nothing cached, and with what that process has left on disk."""
    taken: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "DUO_CACHE_DIR": f"{folder}/duo", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch",
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }  # fmt: skip
        for when in ("cold", "from disk"):
            out = Path(folder, "report")
            command = ["-m", "tests.bench.worker", framework, workload, *arguments]
            command += ["--threads", str(setting.threads), "--folder", folder, "--out", str(out)]
            done = setting.run(framework, command, **caches)
            if done.returncode:
                said = done.stderr[-2000:]
                raise RuntimeError(f"{workload} {' '.join(arguments)} with {framework} failed:\n{said}")
            taken[when] = json.loads(out.read_text())
    return taken


class Gathered:
    """Rows that get their values one by one, in turns of the frameworks."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.rows: dict[tuple[str, str], Row] = {}

    def add(self, workload: str, framework: str, value: float) -> None:
        self.rows.setdefault((workload, framework), Row(workload, framework, self.unit)).values.append(value)

    def by_workload(self) -> list[Row]:
        """The rows of each workload side by side."""
        order = list(dict.fromkeys(workload for workload, _ in self.rows))
        return sorted(self.rows.values(), key=lambda row: order.index(row.workload))


def imports(setting: Setting, frameworks: Sequence[str], rounds: int) -> list[Row]:
    """Milliseconds from starting Python to its end with one import in it."""
    modules = {f: "duo.graph" if f == "duo.graph" else FRAMEWORKS[f].package for f in frameworks}
    chosen = {m: f for f, m in reversed(modules.items()) if f != YARDSTICK}
    rows = Gathered("ms")
    for n in range(rounds + 1):  # the first time writes the byte code
        for module, framework in reversed(chosen.items()):
            start = time.perf_counter()
            done = setting.run(framework, ["-c", f"import {module}"])
            if done.returncode:
                raise RuntimeError(f"import {module} failed:\n{done.stderr}")
            if n:
                rows.add("a process that imports it", framework, (time.perf_counter() - start) * 1e3)
    return rows.by_workload()


def demo(setting: Setting, frameworks: Sequence[str], rounds: int) -> list[Row]:
    """Seconds of the whole `duo demo`, with an empty cache and with a filled one."""
    if "duo" not in frameworks:
        return []
    taken: dict[str, list[float]] = {"cold": [], "from disk": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for seconds in taken.values():
                start = time.perf_counter()
                done = setting.run("duo", ["-m", "duo", "demo"], DUO_CACHE_DIR=folder)
                if done.returncode:
                    raise RuntimeError(f"duo demo failed:\n{done.stdout}{done.stderr}")
                seconds.append(time.perf_counter() - start)
    return [row_of(f"duo demo, {k}", "duo", "s", s) for k, s in taken.items()]


PROCESSES: dict[str, Callable[[Setting, Sequence[str], int], list[Row]]] = {
    "imports": imports, "first_call": first_call, "memory": memory, "demo": demo,
}  # fmt: skip
