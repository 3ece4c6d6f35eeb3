"""Artefacts run by a C program (`run_model.c`): raw bytes in, raw bytes out, every array between pages that must not be touched."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from duo_backends.aot.artefact import Artefact
from duo_backends.aot.source import Port, ProgramSource, Source
from duo_backends.aot.targets import target as target_of
from duo_ir.core import Function
from duo_ir.types import evaluate

HERE = Path(__file__).parent
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-g"]
KINDS = {
    "guarded": [],
    "sanitized": ["-DPLAIN", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-static-libasan"],
    "plain": ["-DPLAIN"],
}


@cache
def program(kind: str = "guarded", name: str = "run_model") -> str:
    """The path of a C program of this folder, built once."""
    path = f"{mkdtemp(prefix='duo-aot-')}/{name}"
    command = [str(shutil.which("gcc")), *FLAGS, *KINDS[kind], str(HERE / f"{name}.c"), "-ldl", "-lm", "-o", path]
    subprocess.run(command, check=True)
    return path


def source_of_function(function: Function, name: str = "made") -> Source:
    """A Source of one function of inputs alone."""
    params = tuple([Port("input", f"x{k}") for k in range(len(function.params))])
    results = tuple([Port("output", f"y{k}") for k in range(len(function.results))])
    return Source(name, (ProgramSource("forward", function, params, results),), {}, {})


@dataclass
class Library:
    """A library in a folder, to be run by the C program."""

    path: Path
    source: Source

    @classmethod
    def of(cls, source: Source, folder: Path, target: str = "native") -> Library:
        made = Artefact.of(source, target_of(target))
        path = folder / f"lib{source.name}.so"
        path.write_bytes(made.library())
        path.with_suffix(".weights").write_bytes(made.block.content)
        return cls(path, source)

    def run(
        self,
        jobs: Sequence[tuple[int, Mapping[str, int], Sequence[np.ndarray]]],
        kind: str = "guarded",
        before: Sequence[str] = (),
    ) -> list[list[np.ndarray]]:
        """Outputs of each job: (threads, sizes, inputs)."""
        (p,) = self.source.programs
        types = [t for _, t in p.ports("output")]
        given = []
        for threads, sizes, inputs in jobs:
            dims = [sizes[d] for d in p.function.dims]
            nbytes = [x.nbytes for x in inputs] + [evaluate(t.nbytes, sizes) for t in types]
            words = [threads, len(dims), *dims, len(inputs), len(types), *nbytes]
            given += [np.array(words, "i8").tobytes(), *[np.ascontiguousarray(x).tobytes() for x in inputs]]
        weights = [str(self.path.with_suffix(".weights"))] * bool(self.source.weights)
        done = subprocess.run(
            [*before, program(kind), str(self.path), self.source.name, *weights],
            input=b"".join(given),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, (done.returncode, done.stderr.decode()[-3000:])
        out, at = [], 0
        for _, sizes, _ in jobs:
            row = []
            for t in types:
                shape = [evaluate(d, sizes) for d in t.shape]
                count = int(np.prod(shape, dtype=np.int64))
                row.append(np.frombuffer(done.stdout, t.dtype.numpy, count, at).reshape(shape))
                at += count * t.dtype.numpy.itemsize
            out.append(row)
        assert at == len(done.stdout)
        return out


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """The same bits, any NaN equal to any."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind in "biu":
        return bool((a == b).all())
    nan = np.isnan(a)
    return bool((nan == np.isnan(b)).all()) and a[~nan].tobytes() == b[~nan].tobytes()
