"""cuBLASLt: which kernels it computes, how it is called, on a library of the emulator that looks at every descriptor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from duo_backends.binding import kernels_of
from duo_backends.cuda import library
from duo_backends.cuda.backend import CudaBackend
from duo_backends.cuda.blas import Blas, Layout, Problem
from duo_backends.cuda.library import epilogues, library_call
from duo_backends.cuda.work import Multiply
from duo_ir import ops
from duo_ir.core import Value, function_of
from duo_ir.interpret import interpret
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import compile
from duo_ir.types import Dim, DType, TensorType, bf16, f16, f32, f64
from tests.cuda_emulator import build
from tests.cuda_emulator.support import driver, needs_emulator

pytestmark = needs_emulator


def relu(x: Value) -> Value:
    return nd.maximum(x, nd.zeros_like(x))


def gelu(x: Value, result: int = 0) -> Value:
    return nd.cast_to(ops.gelu_tanh(nd.cast_to(x, f32))[result], x.type.dtype)


@pytest.fixture(scope="module", params=[False, True], ids=["pool", "exact"])
def gpu(request):
    yield CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), exact=request.param, blas=lambda arch: Blas(str(build.blas_library()), arch))


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """The emulator is slow."""
    monkeypatch.setattr(library, "LEAST_WORK", 1)
    monkeypatch.setattr(library, "LEAST_SIDE", 1)


def run(gpu: CudaBackend, f: Callable[..., Any], *arrays: np.ndarray, dtype: DType, times: int = 1, types: Any = None, sizes: Any = None) -> Any:
    """Results, and how many products the library was given."""
    function = function_of(f, *(types or [TensorType(dtype, a.shape) for a in arrays]))
    executable = compile(function, gpu, numerics="fast")
    bound = executable.bind(sizes or {})
    buffers = [gpu.from_numpy(a) for a in arrays]
    for _ in range(times):
        outs = bound.run(buffers)
    count = sum(isinstance(item, Multiply) for block in bound.table.blocks for item in block.work)
    results = [t.static_shape(sizes or {}) for t in function.result_types]
    got = [gpu.to_numpy(b, t.dtype, shape) for b, t, shape in zip(outs, function.result_types, results)]
    return got, interpret(function, *arrays), count


def numbers(dtype: DType, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Small integers: exact in any order."""
    rng = np.random.default_rng(0)
    return [rng.integers(-3, 4, s).astype(dtype.numpy) for s in shapes]


@pytest.mark.parametrize("dtype", [bf16, f16, f32], ids=lambda d: d.name)
def test_epilogues(gpu, dtype: DType) -> None:
    cases: list[tuple[Callable[..., Value], list[tuple[int, ...]]]] = [
        (lambda x, y: nd.matmul(x, y), []),
        (lambda x, y, b: nd.matmul(x, y) + b, [(16,)]),
        (lambda x, y, b: b + nd.matmul(x, y), [(16,)]),
        (lambda x, y, c: nd.matmul(x, y) + c, [(8, 16)]),
        (lambda x, y, b, c: nd.matmul(x, y) + b + c, [(16,), (8, 16)]),
        (lambda x, y: relu(nd.matmul(x, y)), []),
        (lambda x, y, b: relu(nd.matmul(x, y) + b), [(16,)]),
    ]
    for f, others in cases:
        x, y, *rest = numbers(dtype, (8, 24), (24, 16), *others)
        (got,), (want,), count = run(gpu, f, x, y, *rest, dtype=dtype)
        assert count == 1
        assert (got == want).all()


@pytest.mark.parametrize("dtype", [bf16, f32], ids=lambda d: d.name)
def test_gelu_and_its_gradient(gpu, dtype: DType) -> None:
    """One rounding of the result apart, as the library rounds once only."""
    x, y, b, z = [a / 4 for a in numbers(f32, (8, 24), (24, 16), (16,), (8, 16))]
    x, y, b, z = [a.astype(dtype.numpy) for a in (x, y, b, z)]
    last = 2.0**-7 if dtype is bf16 else 2.0**-17  # the emulator's slope is a difference quotient
    for f, rest in (
        (lambda x, y: gelu(nd.matmul(x, y)), []),
        (lambda x, y, b: gelu(nd.matmul(x, y) + b), [b]),
        (lambda x, y, z: nd.matmul(x, y) * gelu(z, 1), [z]),
    ):
        (got,), (want,), count = run(gpu, f, x, y, *rest, dtype=dtype)
        assert count == 1
        np.testing.assert_allclose(got.astype("f8"), want.astype("f8"), rtol=last, atol=last / 4)


def masked(z: Value, g: Value) -> Value:
    """g where z is positive."""
    return ops.where(ops.le(z, nd.zeros_like(z)), nd.zeros_like(g), g)


def layers(x: Value, v: Value, b: Value, w: Value, c: Value, g: Value, turned: bool = False) -> tuple[Value, ...]:
    """Of g relu(x v + b) w + c the values and the gradients of all that goes in. turned: weights lie as [output, input]."""

    def turn(x: Value, when: bool = True) -> Value:
        return nd.swap_last(x) if when else x

    h = relu(nd.matmul(x, turn(v, turned)) + b)
    dh = masked(h, nd.matmul(g, turn(w, not turned)))
    slopes = [nd.matmul(turn(d), a) if turned else nd.matmul(turn(a), d) for a, d in ((h, g), (x, dh))]
    return nd.matmul(h, turn(w, turned)) + c, *slopes, nd.sum(g, (0,)), nd.matmul(dh, turn(v, not turned)), nd.sum(dh, (0,))


class Noting(Blas):
    """The emulator's library, and what it was asked to compute. `without`: words of epilogues that it has not."""

    def __init__(self, without: tuple[str, ...] = ()) -> None:
        super().__init__(str(build.blas_library()), 90)
        self.ran: list[str] = []
        self.without = without

    def plan(self, problem: Problem) -> Any:
        return None if any(word in problem.epilogue for word in self.without) else super().plan(problem)

    def multiply(self, plan: Any, *rest: Any) -> None:
        self.ran.append(plan.problem.epilogue)
        super().multiply(plan, *rest)


@pytest.mark.parametrize("without", ["", "slope sums", "mask", "slope", "sums"])
@pytest.mark.parametrize(("dtype", "turned"), [(bf16, True), (f16, False), (f32, True)], ids=["bf16", "f16", "f32"])
def test_gradients_of_relu_and_of_biases(dtype: DType, turned: bool, without: str) -> None:
    """A product of the forward pass leaves a mask for one of the backward pass; sums come with products that read or write what is added up. A library
    that has no such epilogue computes what it has."""
    shapes = [(8, 24), (24, 144), (144,), (144, 16), (16,), (8, 16)]
    arrays = numbers(dtype, *[s[::-1] if turned and n in (1, 3) else s for n, s in enumerate(shapes)])
    arrays = [np.sign(a.astype("f4")).astype(dtype.numpy) for a in arrays]  # no sum has more digits than bf16
    of_operand = "a sums" if turned else "b sums"
    wanted = {
        "": {"relu bias mask", "relu slope sums", of_operand}, "slope sums": {"relu bias mask", "relu slope", of_operand},
        "mask": {"relu bias", of_operand}, "slope": {"relu bias", of_operand}, "sums": {"relu bias mask", "relu slope"},
    }[without]  # fmt: skip
    blas = Noting((without,) if without else ())
    gpu = CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), exact=dtype is f16, blas=lambda arch: blas)
    got, want, count = run(gpu, lambda *a: layers(*a, turned), *arrays, dtype=dtype, times=3)
    assert set(blas.ran) == wanted | {"bias", "none"}
    assert count == (6 if "relu bias mask" in wanted else 5)
    for a, b in zip(got, want):
        assert (a == b).all()


def test_sums_that_somebody_reads_too_early_or_that_others_make() -> None:
    """What is not joined: sums that are wanted before the product, rows of another matrix, a mask of a ReLU that the library has not computed."""

    def early(x: Value, v: Value, g: Value) -> tuple[Value, ...]:
        s = nd.sum(g, (0,))
        return nd.matmul(x, v) + s, nd.matmul(nd.swap_last(x), g)

    def others(x: Value, v: Value, g: Value) -> tuple[Value, ...]:
        part = ops.slice(g, start=(0, 0), stop=(4, 16), step=(1, 1))
        return nd.sum(part, (0,)), nd.sum(g, (1,)), nd.matmul(nd.swap_last(x), g), masked(g, nd.matmul(x, v))

    for f in (early, others):
        arrays = numbers(f32, (8, 24), (24, 16), (8, 16))
        blas = Noting()
        gpu = CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), blas=lambda arch: blas)  # noqa: B023
        got, want, _ = run(gpu, f, *arrays, dtype=f32, times=2)
        assert set(blas.ran) <= {"none", "bias"}
        for a, b in zip(got, want):
            assert (a == b).all()


def test_gelu_slopes_come_with_their_sums() -> None:
    def f(g: Value, w: Value, z: Value) -> tuple[Value, ...]:
        d = nd.matmul(g, w) * gelu(z, 1)
        return d, nd.sum(d, (0,))

    blas = Noting()
    gpu = CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), blas=lambda arch: blas)
    got, want, _ = run(gpu, f, *[a / 4 for a in numbers(f32, (8, 24), (24, 16), (8, 16))], dtype=f32, times=3)
    assert set(blas.ran) == {"gelu slope sums"}
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=2.0**-15, atol=2.0**-16)


def test_layouts_and_batches(gpu) -> None:
    turn = nd.swap_last
    shapes = {"": ((2, 3, 8, 24), (2, 3, 24, 16)), "a": ((2, 3, 24, 8), (2, 3, 24, 16)), "b": ((2, 3, 8, 24), (2, 3, 16, 24)), "one b": ((3, 8, 24), (24, 16))}
    for name, pair in shapes.items():
        x, y = numbers(bf16, *pair)

        def f(x: Value, y: Value, name: str = name) -> Value:
            return nd.matmul(turn(x) if name == "a" else x, turn(y) if name == "b" else y)

        (got,), (want,), count = run(gpu, f, x, y, dtype=bf16)
        assert count == 1
        assert (got == want).all()
    # a part of a larger matrix
    x, y = numbers(f32, (8, 64), (24, 16))
    (got,), (want,), count = run(gpu, lambda x, y: nd.matmul(ops.slice(x, start=(0, 8), stop=(8, 32), step=(1, 1)), y), x, y, dtype=f32)
    assert count == 1
    assert (got == want).all()


def test_what_the_library_is_not_given(gpu, monkeypatch) -> None:
    """Odd rows, other epilogues, f64, small products; strict numerics."""
    cases: list[tuple[DType, Any, list[tuple[int, ...]]]] = [
        (bf16, lambda x, y: nd.matmul(x, y), [(8, 12), (12, 16)]),
        (f32, lambda x, y: ops.exp(nd.matmul(x, y) * 0.125), [(8, 24), (24, 16)]),
        (f32, lambda x, y, b: nd.matmul(x, y) + b, [(8, 24), (24, 16), (8, 1)]),
        (f64, lambda x, y: nd.matmul(x, y), [(8, 24), (24, 16)]),
    ]
    for dtype, f, shapes in cases:
        (got,), (want,), count = run(gpu, f, *numbers(dtype, *shapes), dtype=dtype)
        assert count == 0
        np.testing.assert_allclose(got.astype("f8"), want.astype("f8"), rtol=1e-6)
    x, y = numbers(f32, (8, 24), (24, 16))
    function = function_of(nd.matmul, TensorType(f32, x.shape), TensorType(f32, y.shape))
    for numerics, least in (("strict", 1), ("fast", 1 << 24)):
        monkeypatch.setattr(library, "LEAST_WORK", least)
        bound = compile(function, gpu, numerics=numerics).bind({})
        assert not any(isinstance(item, Multiply) for block in bound.table.blocks for item in block.work)


def test_named_sizes_graphs_and_neighbours(gpu) -> None:
    """Products and kernels in turn, over and over, so that they are captured; the library's workspace is nobody else's."""
    b = Dim.symbol("b")
    types = [TensorType(f32, s) for s in ((b, 24), (24, 16), (16,), (16, 8))]

    def f(x: Value, v: Value, bias: Value, w: Value) -> Value:
        h = relu(nd.matmul(x, v) + bias)
        return nd.sum(nd.matmul(h, w), (1,))

    for n in (4, 8):
        arrays = numbers(f32, (n, 24), (24, 16), (16,), (16, 8))
        replays = gpu.runtime.replays
        (got,), (want,), count = run(gpu, f, *arrays, dtype=f32, times=4, types=types, sizes={"b": n})
        assert count == 2
        assert gpu.runtime.replays > replays or gpu.runtime.pool.exact
        assert (got == want).all()


def test_without_the_library_own_kernels_do_it() -> None:
    for find in (lambda arch: None, lambda arch: Refusing(str(build.blas_library()), arch)):
        alone = CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), blas=find)
        (got,), (want,), count = run(alone, nd.matmul, *numbers(bf16, (8, 24), (24, 16)), dtype=bf16)
        assert count == 0
        assert (got == want).all()


class Refusing(Blas):
    """A library that has no way to compute anything."""

    def object(self, create: str, *arguments: Any) -> Any:
        raise OSError("not supported")


def test_a_problem_is_planned_once() -> None:
    blas = Blas(str(build.blas_library()), 90)
    p = Problem(bf16, bf16, 1, 8, 16, 24, Layout(24), Layout(16), Layout(16))
    with driver():
        first = blas.plan(p)
        with mock.patch.object(blas, "object", side_effect=AssertionError):
            assert blas.plan(p) is first
        assert first is not None and first.workspace == 1000
        assert blas.plan(Problem(bf16, bf16, 1, 8, 16, 24, Layout(8), Layout(16), Layout(16))) is None  # rows that overlap


def test_epilogues_are_told_apart() -> None:
    """A kernel gets the epilogue of its own body, whatever the order of operands."""
    for dtype in (bf16, f32):
        names = [e.name for e in epilogues(dtype)]
        assert names.count("gelu bias") == 1
    types = [TensorType(f32, (64, 64))] * 2 + [TensorType(f32, (64,))]
    wanted = {
        "relu bias": lambda x, y, b: relu(b + nd.matmul(x, y)),
        "gelu bias": lambda x, y, b: gelu(nd.matmul(x, y) + b),
        "bias": lambda x, y, b: nd.matmul(x, y) + b,
    }
    for name, f in wanted.items():
        (kernel,) = kernels_of(compile(function_of(f, *types), Programs()))
        found = library_call(kernel)
        assert found is not None and found.epilogue == name
    for f in (lambda x, y, b: nd.matmul(x, y) - b, lambda x, y, b: relu(nd.matmul(x, y)) + b, lambda x, y, b: ops.gelu(nd.matmul(x, y) + b)[0]):
        (kernel,) = kernels_of(compile(function_of(f, *types), Programs()))
        assert library_call(kernel) is None


class Programs:
    """A backend that hands back what it is given."""

    def compile(self, program: Any, scalars: Any = (), numerics: str = "strict") -> Any:
        return program
