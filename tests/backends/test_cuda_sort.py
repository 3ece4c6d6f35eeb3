"""Sort kernels as CUDA C on the emulated GPU, under three schedules: rows of one tile and of several, all of a row and its first few."""

from __future__ import annotations

import cuda_conformance as cuda
import numpy as np
from test_cpu_sort import hard

from duo_backends.binding import kernels_of
from duo_backends.cuda.code import GpuTarget
from duo_backends.cuda.emit import compile_kernel
from duo_ir import ops
from duo_ir.types import Dim, TensorType, bool_, f16, f32, f64, i32, i64
from tests.cuda_emulator.support import needs_emulator

pytestmark = needs_emulator


def cases(dtype, shape, axis, count, descending, runs=1):
    arrays = [[hard(dtype, int(np.prod(shape)), k).reshape(shape)] for k in range(runs)]
    label = f"{dtype.name}{list(shape)} along {axis}, {count}"
    return cuda.cases(label, lambda x: ops.sort(x, axis=axis, descending=descending, count=count), *arrays)


def test_tiles_and_merges():
    given = []
    for dtype, shape, axis, count, descending in (
        (f32, (2, 2500), 1, 2500, False), (f64, (1100, 2), 0, 1100, True), (i32, (1, 4100), 1, 300, True), (f16, (3, 1024), 1, 1024, False),
        (i64, (2, 1030), 1, 1029, False), (bool_, (5, 65), 1, 65, True), (f32, (3, 1), 1, 1, False),
    ):  # fmt: skip
        given += cases(dtype, shape, axis, count, descending)
    cuda.check(given)


def test_one_kernel_for_any_length():
    n = Dim.symbol("n")
    runs = [[hard(f32, 2 * size, size).reshape(2, size)] for size in (0, 1, 33, 1025, 3000)]
    types = [TensorType(f32, (2, n))]
    given = cuda.cases("any length", lambda x: ops.sort(x, axis=1, descending=False, count=n), *runs, types=types)
    cuda.check(given)


def test_the_first_few():
    """Tiles that keep them are gathered once and more often, up to the number from which runs are merged."""
    given = []
    for dtype, shape, axis, count, descending in (
        (f32, (2, 2500), 1, 1, True), (f64, (9300, 2), 0, 128, True), (i64, (1, 9217), 1, 127, False), (f16, (3, 3000), 1, 64, False),
        (f32, (1, 3000), 1, 129, True), (bool_, (2, 2049), 1, 5, True),
    ):  # fmt: skip
        given += cases(dtype, shape, axis, count, descending)
    launches = [[launch for launch in compile_kernel(k, GpuTarget()).launches if launch.blocks({})] for case in given for k in kernels_of(case.program)]
    assert [len(found) for found in launches] == [2, 4, 4, 2, 6, 2]
    n = Dim.symbol("n")
    runs = [[hard(f32, 2 * size, size).reshape(2, size), np.ones(size - 7, np.float32)] for size in (7, 1024, 1025, 9300)]
    types = [TensorType(f32, (2, n + 7)), TensorType(f32, (n,))]
    given += cuda.cases("any length", lambda x, y: (*ops.sort(x, axis=1, descending=True, count=7), y), *runs, types=types)
    cuda.check(given)


def test_launches_are_few():
    (case,) = cases(f32, (2, 2500), 1, 2500, False)
    (kernel,) = kernels_of(case.program)
    code = compile_kernel(kernel, GpuTarget())
    launched = [x for x in code.launches if x.blocks({})]
    assert len(launched) == 1 + 2 * 2 + 1  # tiles, two merges each with a step, results
    assert len({x.symbol for x in code.launches}) == 4
