"""One process of a run: one framework, one workload. Started by `python -m tests.bench`. A workload's process answers the questions on its
standard input (see `serve`); one for a first call or for memory writes what it found to a file.

python -m tests.bench.worker FRAMEWORK WORKLOAD --folder DIR [--out FILE] [--threads N] [--quick] [--case CASE] [--variant NAME]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench import data
from tests.bench.harness import YARDSTICK, Case, Row, agrees, in_unit, prime, rest, time_slice


class Framework(NamedTuple):
    """The package it needs, and where the class with its workloads is."""

    package: str
    module: str
    name: str


# In this order their results are asked for, so that what duo is compared with is a peer's, where there is one.
FRAMEWORKS = {
    "torch": Framework("torch", "torch_style", "Torch"),
    "jax": Framework("jax", "jax_style", "Jax"),
    "numpy": Framework("numpy", "numpy_style", "Numpy"),
    "onnxruntime": Framework("onnxruntime", "numpy_style", "OnnxRuntime"),
    YARDSTICK: Framework("numpy", "numpy_style", "Memcpy"),
    "tensorflow": Framework("tensorflow", "tf_style", "TensorFlow"),
    "tensorflow1": Framework("tensorflow", "tf_style", "TensorFlow1"),
    "torch.compile": Framework("torch", "torch_style", "TorchCompile"),
    "duo": Framework("duo", "torch_style", "Duo"),
    "duo.compile": Framework("duo", "torch_style", "DuoCompile"),
    "duo.graph": Framework("duo", "tf_style", "DuoGraph"),
}

WORKLOADS = {
    "ops": "a chain of a thousand multiplications and additions of eight numbers",
    "tiny": "training step 10-5-1, batch 32: SGD, squared error",
    "mlp": "training step 784-512-256-10, batch 128, cross-entropy: Adam, and SGD",
    "cnn": "training step of two 3x3 convolutions with pooling and two full layers, 28x28, batch 64: momentum",
    "gpt": "GPT of 4 layers, width 256, 8 rows of 128 tokens: training step with AdamW, and the forward pass",
    "arrays": "sixteen million f32: a copy, fused elementwise, gelu, softmax, layer norm, sums",
    "million": "the same of one million f32",
    "matmul": "f32 products, square and skinny",
    "latency": "inference of one sample: the MLP, the CNN, ResNet-18",
    "adam": "Adam's update of ten tensors of a million f32",
}
CASES = {  # of each workload, in their order; no framework has others
    "ops": ("tiny op", "tiny op, gradients recorded"),
    "tiny": ("tiny",),
    "mlp": ("mlp adam", "mlp sgd"),
    "cnn": ("cnn",),
    "gpt": ("gpt", "gpt forward"),
    "arrays": tuple(f"{name}, 16M" for name in data.FUNCTIONS),
    "million": tuple(f"{name}, 1M" for name in data.FUNCTIONS),
    "matmul": tuple(f"matmul {m}x{k}x{n}" for m, k, n in data.PRODUCTS),
    "latency": ("mlp, batch 1", "cnn, batch 1", "ResNet-18, batch 1"),
    "adam": ("Adam, 10M parameters",),
}
SLICE, QUICK_SLICE = 0.04, 0.002  # seconds
FIRST_CALLS = ("mlp adam", "gpt forward", "gpt")
TRAININGS = ("mlp adam", "cnn", "gpt")  # whose memory is measured
MEMORY_STEPS = 30


def cases_of(style: Any, workload: str) -> Iterator[Case]:
    """The cases that this framework has of the workload."""
    if workload in ("arrays", "million"):
        name, arguments = "arrays", ((1 << 24, "16M") if workload == "arrays" else (1 << 20, "1M"))
    else:
        name, arguments = workload, ()
    make = getattr(style, name, None)
    return iter(()) if make is None else make(*arguments)


def style_of(framework: str, threads: int) -> Any:
    """The framework's workloads; it is imported here."""
    found = FRAMEWORKS[framework]
    return getattr(importlib.import_module(f"tests.bench.{found.module}"), found.name)(threads)


class Turns:
    """What this process does when it is asked. The cases of one name (a framework's variants) are there together, and gone with the next."""

    def __init__(self, framework: str, workload: str, threads: int, folder: Path, quick: bool) -> None:
        self.framework, self.workload, self.folder, self.quick = framework, workload, folder, quick
        self.timed: list[Case] = []
        self.failed: list[Row] = []
        self.groups = itertools.groupby(self._cases(threads), key=lambda case: case.name)
        self.next = next(self.groups, None)

    def _cases(self, threads: int) -> Iterator[Case]:
        try:
            yield from cases_of(style_of(self.framework, threads), self.workload)
        except Exception as error:  # no further case, then
            self.failed.append(Row(self.workload, self.framework, "", error=reported(error)))

    def prepare(self, name: str) -> list[Row]:
        """Forgets the cases before and makes those of this name, as many as there are, compares their results with the first framework's and
        warms them up. Gives a row of each, without values; the ones that have no error can be timed, numbered in this order."""
        self.timed.clear()
        gc.collect()
        rows = []
        if self.next is not None and self.next[0] == name:
            for case in list(self.next[1]):
                error = self._checked(case)
                column = f"{self.framework}:{case.variant}" if case.variant else self.framework
                rows.append(Row(name, column, case.unit, error=error))
                if not error:
                    self.timed.append(case)
            self.next = next(self.groups, None)
        rows += self.failed
        self.failed.clear()
        gc.collect()
        rest()
        return rows

    def _checked(self, case: Case) -> str:
        try:
            error = agrees(case, self.folder)
            if not error:
                prime(case.call, 0.01 if self.quick else 0.2)
        except Exception as failure:  # a case that fails does not keep the others from running
            error = reported(failure)
        return error

    def turn(self, number: int) -> float | str:
        """A slice of that case's calls, in its unit, or what went wrong; then this process's threads sleep."""
        case = self.timed[number]
        try:
            seconds = time_slice(case.call, QUICK_SLICE if self.quick else SLICE)
        except Exception as error:
            return reported(error)
        rest()
        return in_unit(case.unit, seconds, case.amount)


def serve(turns: Turns, answers: Any) -> None:
    """Reads questions, a line each, and writes a line of JSON to `answers`: 'prepare NAME' (see Turns.prepare), 'turn NUMBER' (Turns.turn)."""
    for line in sys.stdin:
        what, _, argument = line.rstrip("\n").partition(" ")
        answer: Any = (
            [row.__dict__ for row in turns.prepare(argument)] if what == "prepare" else turns.turn(int(argument))
        )
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def reported(error: Exception) -> str:
    """What the table says of it; the traceback goes to stderr."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def first_call(framework: str, case: str, threads: int) -> float:
    """Seconds of the first call of a compiled function, with the result in hand; models and inputs are there before."""
    style = style_of(framework, threads)
    made = style.forward_case(case) if case == "gpt forward" else style.train_case(case)
    start = time.perf_counter()
    made.call()
    return time.perf_counter() - start


def memory(framework: str, case: str, variant: str, threads: int) -> tuple[float, float] | None:
    """Megabytes (10^6 bytes) of physical memory that this process held at most while it made a model and trained it: all, and what came on top of
    what it held when the framework was imported. None where the framework has no such training."""
    style = style_of(framework, threads)
    data.Draw(0)  # NumPy loads its generators: the same for all
    before = resident("VmRSS")
    try:
        made = style.train_case(case, variant)
    except LookupError:
        return None
    for _ in range(MEMORY_STEPS):
        made.call()
    peak = resident("VmHWM")
    return peak, peak - before


def resident(field: str) -> float:
    """Megabytes of this process in physical memory: 'VmRSS', now, or 'VmHWM', at most so far."""
    with open("/proc/self/status") as file:
        (kilobytes,) = [line.split()[1] for line in file if line.startswith(field + ":")]
    return int(kilobytes) * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("workload", choices=[*WORKLOADS, "first_call", "memory"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="of first_call and memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", choices=dict.fromkeys((*FIRST_CALLS, *TRAININGS)), help="of first_call and memory")
    parser.add_argument("--variant", default="", help="of memory")
    options = parser.parse_args()
    if options.workload == "first_call":
        options.out.write_text(json.dumps(first_call(options.framework, options.case, options.threads)))
        return 0
    if options.workload == "memory":
        found = memory(options.framework, options.case, options.variant, options.threads)
        options.out.write_text(json.dumps(found))
        return 0
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(Turns(options.framework, options.workload, options.threads, options.folder, options.quick), answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
