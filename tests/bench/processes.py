"""What is timed in processes of its own: imports, the first call of a compiled step (cold, and from the disk cache), the demo."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tests.bench.harness import Row, installed, row_of

FIRST_CALL = """
import time, numpy as np, duo
rng = np.random.default_rng(0)
x, y = duo.tensor(rng.standard_normal((128, 784), "f4")), duo.tensor(rng.integers(0, 10, 128))
model = duo.nn.Sequential(duo.nn.Linear(784, 512), duo.nn.ReLU(), duo.nn.Linear(512, 256), duo.nn.ReLU(), duo.nn.Linear(256, 10))
optimizer = duo.optim.Adam(model.parameters(), lr=1e-4)
duo.synchronize()
@duo.compile
def step(x, y):
    optimizer.zero_grad()
    loss = duo.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss
start = time.perf_counter()
step(x, y).item()
print(time.perf_counter() - start)
"""


def run(arguments: list[str], **environment: str) -> str:
    """The output of Python with these arguments and these variables. Byte code is kept, as it is for a user."""
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | environment
    done = subprocess.run([sys.executable, *arguments], env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"python {arguments} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def first_call(rounds: int, threads: int) -> list[Row]:
    """Seconds of the first call of a compiled 784-512-256-10 Adam step: nothing cached, then with object code on disk."""
    cold, warm = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            settings = {"DUO_CACHE_DIR": folder, "DUO_NUM_THREADS": str(threads)}
            cold.append(float(run(["-c", FIRST_CALL], **settings)))
            warm.append(float(run(["-c", FIRST_CALL], **settings)))
    name = "first call of a compiled step"
    return [row_of(f"{name}, cold", "duo", "s", cold), row_of(f"{name}, from disk", "duo", "s", warm)]


def imports(rounds: int, threads: int) -> list[Row]:
    """Milliseconds of `import` inside a fresh interpreter; duo's are those on top of NumPy's."""
    code = "import time, sys, numpy; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"
    alone = "import time; s = time.perf_counter(); import numpy; print(time.perf_counter() - s)"
    names = ["duo", "duo.graph", *(["torch"] if installed("torch") else [])]
    taken: dict[str, list[float]] = {name: [] for name in [*names, "numpy"]}
    for warm in [False] + [True] * rounds:  # the first time writes the byte code
        for name, text in {**{n: code.format(n) for n in names}, "numpy": alone}.items():
            seconds = float(run(["-c", text]))
            if warm:
                taken[name].append(seconds)
    rows = [row_of("import, beyond numpy's", name, "ms", taken[name]) for name in names]
    return [*rows, row_of("import", "numpy", "ms", taken["numpy"])]


def demo(rounds: int, threads: int) -> list[Row]:
    """Seconds of the whole `duo demo`, with an empty cache and with a filled one."""
    cold, warm = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for taken in (cold, warm):
                start = time.perf_counter()
                run(["-m", "duo", "demo"], DUO_CACHE_DIR=folder, DUO_NUM_THREADS=str(threads))
                taken.append(time.perf_counter() - start)
    return [row_of("duo demo, cold", "duo", "s", cold), row_of("duo demo, from disk", "duo", "s", warm)]


PROCESSES: dict[str, Callable[[int, int], list[Row]]] = {"first_call": first_call, "imports": imports, "demo": demo}
