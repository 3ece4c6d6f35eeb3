"""Maps that read across what they write, by tiles in shared memory, on the emulated GPU, to the bit of `duo_ir.kernels.evaluate`."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_conformance as cuda
import numpy as np

from duo_backends.binding import kernels_of
from duo_backends.cuda.code import GpuTarget
from duo_backends.cuda.emit import compile_kernel
from duo_ir import ops
from duo_ir.core import Value
from duo_ir.types import Dim, TensorType, bf16, bool_, f32, f64, i8
from tests.cuda_emulator.support import needs_emulator

pytestmark = needs_emulator


def turned(x: Value, *order: int) -> Value:
    return ops.transpose(x, permutation=order)


def transposes() -> Iterator[cuda.Case]:
    for dtype, shape in ((f32, (33, 70)), (bf16, (40, 64)), (f64, (17, 16)), (i8, (65, 31)), (bool_, (32, 33))):
        (x,) = cuda.numbers(TensorType(dtype, shape))
        yield from cuda.cases(f"{dtype.name} {shape}", lambda x: turned(x, 1, 0), [x])
    x, y, b = cuda.numbers(*[TensorType(f32, s) for s in ((33, 40), (40, 33), (33,))])
    yield from cuda.cases("with others", lambda x, y, b: turned(x, 1, 0) * y + b, [x, y, b])
    yield from cuda.cases("two results", lambda x, y, b: (turned(x, 1, 0) * y, turned(x, 1, 0) - b), [x, y, b])
    (x,) = cuda.numbers(TensorType(f32, (3, 20, 2, 18)))
    for order in ((0, 3, 2, 1), (3, 2, 1, 0), (2, 3, 0, 1)):
        yield from cuda.cases(f"axes {order}", lambda x, order=order: turned(x, *order) + 1.0, [x])
    types = [TensorType(f32, (Dim.symbol("n"), Dim.symbol("m")))]
    runs = [cuda.numbers(TensorType(f32, s)) for s in ((1, 1), (33, 5), (40, 70), (0, 3))]
    yield from cuda.cases("named", lambda x: turned(x, 1, 0) * 2.0, *runs, types=types)
    x, y = cuda.numbers(TensorType(f32, (33, 33)), TensorType(f32, (33, 40)))
    i = np.random.default_rng(0).integers(0, 33, 40)
    runs = [[x, i, y], [x, np.where(np.isin(np.arange(40), (7, 35)), 99, i), y]]  # the first of those out of range is told
    yield from cuda.cases("gather", lambda x, i, y: ops.gather(x, i, axes=(0,)) * turned(y, 1, 0), *runs)


def test_transposes() -> None:
    tally = cuda.check(transposes())
    assert sum("tile0" in compile_kernel(k, GpuTarget()).text for k in tally.kernels) >= 11


def test_small_axes_go_without_tiles() -> None:
    for shape in ((5, 70), (70, 5)):
        (case,) = cuda.cases("small", lambda x: turned(x, 1, 0), cuda.numbers(TensorType(f32, shape)))
        (kernel,) = kernels_of(case.program)
        assert "tile0" not in compile_kernel(kernel, GpuTarget()).text
