"""Reductions as CUDA kernels on the emulated GPU, to the bit of `duo_ir.kernels.evaluate`: rows and columns, lengths around lanes, chunks and the
blocks that combine chunks, few rows of much, named sizes, several in one stage, NaN and ties, nothing; under three schedules."""

from __future__ import annotations

from collections.abc import Iterator

import conformance as c
import cuda_conformance as cuda
import numpy as np

from duo_backends.binding import kernels_of
from duo_backends.cuda.code import GpuTarget
from duo_backends.cuda.emit import compile_kernel
from duo_ir import ops
from duo_ir.core import Value
from duo_ir.kernels.kernel import LoopKernel
from duo_ir.ops import broadcasting as nd
from duo_ir.types import Dim, TensorType, bf16, bool_, f16, f32, f64, i8, i64
from tests.cuda_emulator.support import needs_emulator

pytestmark = needs_emulator

ROWS = ((3, 1), (3, 15), (5, 16), (2, 17), (9, 33), (1, 1023), (2, 1024), (3, 1025), (2, 5000))
FEW = ((1, 16383), (2, 16384), (1, 16385), (1, 33000), (2, 40961), (1, 100_003))
COLUMNS = ((1, 33), (15, 32), (17, 31), (1024, 33), (1025, 5), (2100, 70), (16385, 3))


def statistics(axis: int):
    def f(x: Value) -> tuple[Value, ...]:
        mean = nd.sum(x, (axis,), True) * 0.001
        return nd.sum(x, (axis,)), nd.max(x, (axis,)), nd.sum((x - mean) * (x - mean), (axis,))

    return f


def softmax(axis: int):
    def f(x: Value) -> Value:
        e = ops.exp(x - nd.max(x, (axis,), True))
        return e / nd.sum(e, (axis,), True)

    return f


def lengths() -> Iterator[cuda.Case]:
    for axis, shapes in ((1, (*ROWS, *FEW)), (0, COLUMNS)):
        for shape in shapes:
            (x,) = cuda.numbers(TensorType(f32, shape), seed=shape[1])
            yield from cuda.cases(f"sums {shape} over {axis}", statistics(axis), [x])
            if shape[axis] in (33, 1025, 5000, 16385):
                yield from cuda.cases(f"softmax {shape} over {axis}", softmax(axis), [x], [c.salted(x, np.random.default_rng(1), 0.1)])


def test_lengths() -> None:
    """Among these are kernels of one launch and of several, with several reductions in a stage and with several stages that reduce."""
    cases = list(lengths())
    found = set()
    for kernel in {k for case in cases for k in kernels_of(case.program) if isinstance(k, LoopKernel)}:
        counts = [len(stage.reduces) for stage in kernel.stages if stage.reduces]
        found.add((len(compile_kernel(kernel, GpuTarget()).launches) > 1, max(counts, default=0), len(counts)))
    assert found >= {(several, 2, stages) for several in (False, True) for stages in (1, 2)}
    cuda.check(cases)


def test_rows_read_as_vectors() -> None:
    """A device of few multiprocessors, for which threads have several lanes; sums of few elements, which need few lanes."""
    cases: list[cuda.Case] = []
    for dtype in (f32, bf16, f64):
        for shape in ((3, 2), (40, 4), (7, 8), (5, 12), (3, 16), (2, 56), (3, 1032), (2, 4104)):
            x, y = cuda.numbers(TensorType(dtype, shape), TensorType(dtype, shape), seed=shape[1])
            cases += cuda.cases(f"{dtype.name} {shape}", softmax(1), [c.salted(x, np.random.default_rng(1), 0.05)])
            if dtype is f32:
                cases += cuda.cases(f"sums {shape}", statistics(1), [x])
                f = lambda x, y: (ops.argmax(x, axes=(1,)), nd.sum(x * y, (1,)), nd.prod(x, (1,)), x + 1.0)  # noqa: E731
                cases += cuda.cases(f"several {shape}", f, [np.rint(x), y])
    (x,) = cuda.numbers(TensorType(f32, (6, 4, 4)))
    cases += cuda.cases("several axes", lambda x: nd.sum(x, (1, 2)), [x])
    tally = cuda.check(cases, GpuTarget(multiprocessors=0))
    assert sum("duo_down(acc" in compile_kernel(k, GpuTarget(multiprocessors=0)).text for k in tally.kernels) > 10
    long = [cuda.numbers(TensorType(dtype, (1, n)), seed=n) for dtype, n in ((f32, 70_004), (bf16, 140_008), (f64, 40_002))]
    kinds = [lambda x: (nd.sum(x, (1,)), nd.max(x, (1,))), lambda x: nd.sum(x * x) / 3.0]
    cuda.check([case for f in kinds for x in long for case in cuda.cases("long", f, x)])


def test_named_lengths() -> None:
    n, m = Dim.symbol("n"), Dim.symbol("m")
    sizes = ((0, 3), (3, 0), (1, 1), (2, 17), (33, 16), (3, 1025))
    runs = [cuda.numbers(TensorType(f32, shape), seed=shape[1]) for shape in sizes]
    long, tall = (cuda.numbers(TensorType(f32, shape)) for shape in ((1, 16390), (2050, 2)))
    some = [r for r in runs if r[0].size]
    kinds = [("rows", statistics(1), [*some, long]), ("columns", statistics(0), [*some[:3], tall]), ("softmax", softmax(1), some)]
    kinds += [("sums", lambda x: (nd.sum(x), nd.sum(x, (0,)), nd.sum(x, (1,))), runs)]
    cases = [case for label, f, given in kinds for case in cuda.cases(label, f, *given, types=[TensorType(f32, (n, m))])]
    three = TensorType(f32, (3, n))
    given = [cuda.numbers(TensorType(f32, (3, k)), seed=k, salt=0.1) for k in (1, 16, 17, 1025)]
    cases += cuda.cases("argmax", lambda x: (ops.argmax(x, axes=(1,)), ops.argmin(x, axes=(1,))), *given, types=[three])
    cuda.check(cases)


def test_kinds_and_dtypes() -> None:
    cases: list[cuda.Case] = []
    for dtype in (f32, f64, f16, bf16, i8, i64):
        for shape, axis in (((3, 40), 1), ((40, 35), 0), ((2, 1100), 1)):
            x, y = cuda.numbers(TensorType(dtype, shape), TensorType(dtype, shape), seed=shape[0])
            salted = c.salted(x, np.random.default_rng(3), 0.05)
            f = lambda x, y, axis=axis: (*[getattr(nd, n)(x, (axis,)) for n in ("sum", "prod", "max", "min")], ops.argmax(x, axes=(axis,)), ops.argmin(y, axes=(axis,)))  # noqa: E731
            cases += cuda.cases(f"{dtype.name} {shape}", f, [x, y], [salted, y])
    (flags,) = cuda.numbers(TensorType(bool_, (4, 1030)))
    cases += cuda.cases("any all", lambda x: (ops.any(x, axes=(1,)), ops.all(x, axes=(0,))), [flags], [~flags & False])
    cuda.check(cases)


def test_dots() -> None:
    """One result column: fused multiply and add, absent elements skipped."""
    cases: list[cuda.Case] = []
    for dtype in (f32, f64, bf16, i8):
        for k in (0, 1, 15, 17, 1025) + ((20_000,) if dtype is f32 else ()):
            x, y = cuda.numbers(TensorType(dtype, (3, k)), TensorType(dtype, (k,)), seed=k)
            cases += cuda.cases(f"dot {dtype.name} {k}", nd.matmul, [x, y])
    cuda.check(cases)


def test_extrema_with_nan_and_ties() -> None:
    rng = np.random.default_rng(5)
    cases: list[cuda.Case] = []
    for shape, axis in (((4, 50), 1), ((50, 40), 0), ((2, 3000), 1), ((1, 40_000), 1)):
        ties = (rng.integers(0, 3, shape) * rng.choice([1.0, -1.0], shape)).astype("f4")
        nans = np.where(rng.random(shape) < 0.05, np.nan, ties).astype("f4")
        runs = [ties, nans, np.full(shape, np.nan, "f4"), np.full(shape, -np.inf, "f4"), np.copysign(0.0, ties).astype("f4")]
        f = lambda x, axis=axis: (ops.argmax(x, axes=(axis,)), ops.argmin(x, axes=(axis,)), nd.max(x, (axis,)), nd.min(x, (axis,)))  # noqa: E731
        cases += cuda.cases(f"{shape}", f, *[[r] for r in runs])
    cuda.check(cases)


def test_nothing_and_several_axes() -> None:
    cases: list[cuda.Case] = []
    for shape, axes in (((0,), (0,)), ((0, 3), (0,)), ((3, 0), (1,)), ((3, 0), (0,)), ((), ()), ((2, 3), ()), ((3, 5, 7), (0, 2)), ((2, 40, 33), (1, 0)), ((2, 3, 4, 5), (1, 3))):  # fmt: skip
        (x,) = cuda.numbers(TensorType(f32, shape))
        f = lambda x, axes=axes: (nd.sum(x, axes), nd.prod(x, axes), nd.sum(nd.sum(x, axes) * 2.0))  # noqa: E731
        cases += cuda.cases(f"{shape} {axes}", f, [x], fusions=(True, False))
    cuda.check(cases)
