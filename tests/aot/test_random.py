"""Random programs with free sizes as libraries: the bits of the CPU backend for sizes of every kind, arrays that are aligned to their elements only,
between pages that must not be touched."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

import duo
from duo.aot.capture import source_of
from duo_backends.aot.limits import signed_dims
from duo_backends.aot.source import Source
from duo_backends.aot.special import free_columns, with_special
from duo_backends.cpu.backend import CpuBackend
from duo_ir import pipeline
from duo_ir.core import Function
from duo_ir.transforms.sizes import with_sizes
from duo_ir.types import evaluate
from tests.aot.programs import Library, same_bits, source_of_function

sys.path.append(str(Path(__file__).parents[1] / "backends"))
from test_conformance_random import NAMED, Maker

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler"),
]
EXAMPLES = int(os.environ.get("DUO_EXAMPLES", "16"))
SIZES = ({"n": 33, "m": 18}, {"n": 2, "m": 5}, {"n": 1, "m": 7}, {"n": 0, "m": 3}, {"n": 1, "m": 1}, {"n": 16, "m": 0})


def expected(function: Function, sizes: dict[str, int], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """What the CPU backend makes of the program with its sizes known."""
    fixed = with_sizes(function, sizes)
    backend = CpuBackend()
    out = pipeline.compile(fixed, backend).bind({}).run([backend.from_numpy(a) for a in arrays])
    return [backend.to_numpy(b, t.dtype, t.static_shape()) for b, t in zip(out, fixed.result_types)]


def refused(source: Source, sizes: dict[str, int]) -> bool:
    """Whether a product of floats has one column for these sizes, and there is no program for that."""
    program, *special = with_special(source)[0].programs
    if any(dict(p.special.sizes).items() <= sizes.items() for p in special):
        return False
    return any(evaluate(d, sizes) == 1 for d in free_columns(program.function))


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_random_programs(tmp_path, seed):
    maker = Maker(seed + 7000, sizes=NAMED)
    function = maker.function(8)
    target = ("native", "x86-64-v3")[seed % 2]
    source, signed = source_of_function(function), signed_dims(function)
    least = with_special(source)[0].programs[0].least
    jobs = []
    for k, sizes in enumerate(SIZES):
        possible = all(sizes[name] >= n for name, n in least.items())
        if possible and all(evaluate(d, sizes) >= 0 for d in signed) and not refused(source, sizes):
            jobs.append((1 + k % 2, sizes, maker.arrays(function.param_types, sizes)))
    library = Library.of(source, tmp_path, target)
    for (threads, sizes, arrays), out in zip(jobs, library.run(jobs)):
        for k, (a, b) in enumerate(zip(out, expected(function, sizes, arrays), strict=True)):
            assert same_bits(a, b), (seed, threads, sizes, k, str(function))


TYPES = {"f16": "f2", "bf16": bfloat16, "f64": "f8", "i8": "i1", "u8": "u1", "i32": "i4"}


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_and_no_rows(tmp_path, dtype):
    """Among the results are an input, and of flags; a sort and a scan of nothing."""

    def program(x, y):
        more = x > y[:1]
        return (x * y[1:2] + x).sum(1), x @ y.T, x.cumsum(0), more, duo.where(more, x, y[:1]).sort(1)[0], x

    rng = np.random.default_rng(0)
    make = lambda n: (rng.standard_normal((n, 7)) * 3).astype(TYPES[dtype])  # noqa: E731
    library = Library.of(source_of(program, [f"{dtype}[n,7]", f"{dtype}[3,7]"], "m"), tmp_path)
    jobs = [(1 + n % 2, {"n": n}, [make(n), make(3)]) for n in (0, 1, 5, 33)]
    for (_, sizes, arrays), out in zip(jobs, library.run(jobs)):
        for k, (a, b) in enumerate(zip(out, program(*map(duo.tensor, arrays)))):
            assert same_bits(a, b.numpy()), (sizes, k)
