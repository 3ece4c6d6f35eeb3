"""Random programs with free sizes as libraries: the bits of the CPU backend for sizes of every kind, arrays that are aligned to their elements only,
between pages that must not be touched."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from duo_backends.aot.limits import least_sizes, signed_dims
from duo_backends.cpu.backend import CpuBackend
from duo_ir import pipeline
from duo_ir.core import Function
from duo_ir.transforms.sizes import with_sizes
from duo_ir.types import evaluate
from tests.aot.programs import Library, source_of_function

sys.path.append(str(Path(__file__).parents[1] / "backends"))
from test_conformance_random import NAMED, Maker

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler"),
]
EXAMPLES = int(os.environ.get("DUO_EXAMPLES", "12"))
SIZES = ({"n": 33, "m": 18}, {"n": 2, "m": 5}, {"n": 1, "m": 7}, {"n": 0, "m": 3}, {"n": 1, "m": 1}, {"n": 16, "m": 0})


def expected(function: Function, sizes: dict[str, int], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """What the CPU backend makes of the program with its sizes known."""
    fixed = with_sizes(function, sizes)
    backend = CpuBackend()
    out = pipeline.compile(fixed, backend).bind({}).run([backend.from_numpy(a) for a in arrays])
    return [backend.to_numpy(b, t.dtype, t.static_shape()) for b, t in zip(out, fixed.result_types)]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """The same bits, any NaN equal to any."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind in "biu":
        return bool((a == b).all())
    nan = np.isnan(a)
    return bool((nan == np.isnan(b)).all()) and a[~nan].tobytes() == b[~nan].tobytes()


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_random_programs(tmp_path, seed):
    maker = Maker(seed + 7000, sizes=NAMED)
    function = maker.function(8)
    target = ("native", "x86-64-v3")[seed % 2]
    least, signed = least_sizes(function), signed_dims(function)
    jobs = []
    for k, sizes in enumerate(SIZES):
        possible = all(sizes[name] >= n for name, n in least.items())
        if possible and all(evaluate(d, sizes) >= 0 for d in signed):
            jobs.append((1 + k % 2, sizes, maker.arrays(function.param_types, sizes)))
    library = Library.of(source_of_function(function), tmp_path, target)
    for (threads, sizes, arrays), out in zip(jobs, library.run(jobs)):
        for k, (a, b) in enumerate(zip(out, expected(function, sizes, arrays), strict=True)):
            assert same(a, b), (seed, threads, sizes, k, str(function))
