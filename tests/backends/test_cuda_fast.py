"""Products on tensor cores (`fast` numerics) on the emulated GPU, under three schedules.

Operands that are small integers have the same sums in any order, and f16, bf16 and tf32 hold them, so there the bits are those of the reference:
sizes around every edge of the tiles, layouts, alignments, epilogues, batches, chunks of K, convolutions. Others keep a bound that is
stated beside the test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cuda_conformance as cuda
import numpy as np
import pytest
from test_cuda_conformance_products import product_case

from duo_backends.binding import kernels_of
from duo_backends.cuda.code import GpuTarget
from duo_backends.cuda.emit import compile_kernel
from duo_backends.cuda.mma import choose_chunk, choose_tile, on_tensor_cores
from duo_backends.cuda.products import matrices
from duo_ir import ops
from duo_ir.core import Value
from duo_ir.kernels.kernel import ContractKernel
from duo_ir.ops import broadcasting as nd
from duo_ir.types import Dim, DType, TensorType, bf16, f16, f32, f64, i32
from tests.cuda_emulator.support import needs_emulator

pytestmark = needs_emulator

LITTLE, MIDDLE, LARGE = (GpuTarget(multiprocessors=n, fast=True) for n in (1, 8, 132))
SMALL_SHARED = GpuTarget(multiprocessors=1, fast=True, shared=99 << 10)


def whole(cases: Iterator[cuda.Case]) -> Iterator[cuda.Case]:
    """The cases with small integers for numbers."""
    for case in cases:
        yield replace(case, runs=[[np.rint(2 * a).astype(a.dtype) for a in arrays] for arrays in case.runs])


def contraction(case: cuda.Case) -> ContractKernel:
    (kernel,) = [k for k in kernels_of(case.program) if isinstance(k, ContractKernel)]
    return kernel


def tile_of(case: cuda.Case, target: GpuTarget) -> str:
    tile = choose_tile(matrices(contraction(case)), target)
    return f"{tile.m}x{tile.n}x{tile.line}"


def check(cases: Iterator[cuda.Case] | list[cuda.Case], target: GpuTarget) -> None:
    cases = list(cases)
    tally = cuda.check(cases, target)
    text = [compile_kernel(k, target).text for k in tally.kernels]
    assert sum("duo_mma_" in t for t in text) >= len(cases)


@pytest.mark.parametrize(
    ("tile", "m", "n", "target"),
    [
        ("128x256x128", 248, 248, LITTLE),
        ("128x256x64", 120, 256, SMALL_SHARED),
        ("128x128x64", 130, 120, LITTLE),
        ("64x64x64", 72, 56, LITTLE),
        ("16x128x64", 8, 136, LITTLE),
        ("64x16x64", 72, 16, LITTLE),
    ],
)
def test_tiles(tile: str, m: int, n: int, target: GpuTarget) -> None:
    """Results that hang over the tile, more steps of K than stages, and a rest; the dtypes and layouts in turn."""
    dtypes = [bf16, f16] if tile == "128x256x128" else [bf16, f32]
    cases: list[cuda.Case] = []
    for number, dtype in enumerate(dtypes):
        layouts = [(number == 1, False), (number == 0, True)]
        if tile == "128x256x64" and dtype is f32:
            layouts = [(False, True)]  # the only one for which it has registers
        for ta, tb in layouts:
            k = 200 if tile.endswith("128") else 104
            (case,) = whole(product_case(dtype, m, n, k, ta, tb, epilogue="bias" if ta else ""))
            assert tile_of(case, target) == tile
            cases.append(case)
    check(cases, target)


def test_alignments() -> None:
    """Rows of whole 16 bytes, 8, 4 and one element; K of nothing and of less than a step."""
    cases: list[cuda.Case] = []
    for dtype, n in ((bf16, 20), (bf16, 18), (f16, 17), (f32, 14), (f32, 11)):
        for ta, tb in ((False, False), (True, True)):
            cases += whole(product_case(dtype, n + 2, n, n + 4, ta, tb, epilogue="column"))
    cases += whole(product_case(bf16, 17, 9, 33, named=True, epilogue="bias"))
    cases += whole(product_case(f32, 9, 13, 21, ta=True, named=True))
    check(cases, LARGE)
    cuda.check([*whole(product_case(f32, 0, 16, 8)), *whole(product_case(bf16, 3, 8, 0, named=True))], LARGE)


def test_chunks_of_k() -> None:
    """Few results and a long K, known and not known; batches."""
    cases: list[cuda.Case] = []
    for dtype, epilogue, batch in ((bf16, "bias", ()), (f32, "column", (2,)), (f16, "", (3,))):
        cases += whole(product_case(dtype, 3, 16, 1090, False, dtype is f32, batch, epilogue))
    cases += whole(product_case(f32, 5, 9, 530))
    for case in cases:
        p = matrices(contraction(case))
        assert choose_chunk(p, choose_tile(p, MIDDLE), MIDDLE) in (256, 320, 576)
    k = Dim.symbol("k")
    types = [TensorType(bf16, (k, 16)), TensorType(bf16, (k, 24))]
    runs = [[np.rint(2 * a).astype(a.dtype) for a in cuda.numbers(*[TensorType(bf16, (n, w)) for w in (16, 24)])] for n in (0, 7, 2100)]
    cases += cuda.cases("named k", lambda x, y: nd.matmul(nd.swap_last(x), y), *runs, types=types)
    check(cases, MIDDLE)


def convolutions(dtype: DType) -> Iterator[cuda.Case]:
    for x, w, strides, padding, dilation, groups in (
        ((1, 7, 6, 8), (3, 3, 8, 16), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
        ((2, 6, 5, 6), (3, 2, 3, 24), (2, 1), ((1, 0), (0, 2)), (2, 1), 2),
        ((2, 9, 3), (5, 3, 10), (2,), ((2, 1),), (1,), 1),
    ):
        attrs: dict[str, Any] = {
            "strides": strides, "padding": padding, "x_dilation": (1,) * len(strides), "w_dilation": dilation, "groups": groups,
        }  # fmt: skip
        bias = TensorType(dtype, (w[-1],))
        arrays = cuda.numbers(TensorType(dtype, x), TensorType(dtype, w), bias, seed=groups)

        def f(a: Value, b: Value, c: Value, attrs: dict[str, Any] = attrs) -> Value:
            return ops.conv(a, b, **attrs) + c

        yield from whole(cuda.cases(f"{dtype.name} {x} {w}", f, arrays))


@pytest.mark.parametrize("dtype", [f32, bf16], ids=lambda d: d.name)
def test_convolutions(dtype: DType) -> None:
    check(convolutions(dtype), LARGE)


def test_infinities_and_nan_stay_where_they_are() -> None:
    """Zeros beside an operand's end meet zeros only."""
    cases = []
    for dtype in (bf16, f32):
        for case in whole(product_case(dtype, 19, 20, 37, tb=True)):
            x, y = case.runs[0]
            x[3, 36], x[5, 0], y[7, 36], y[19, 1] = np.inf, np.nan, -np.inf, np.inf
            cases.append(replace(case, runs=[[x, y]]))
    check(cases, LITTLE)


def result(case: cuda.Case, target: GpuTarget, order: str) -> np.ndarray:
    """What the case's product leaves on the emulated GPU."""
    kernel = contraction(case)
    code = compile_kernel(kernel, target)
    gpu = cuda.Gpu([code])
    out = np.zeros(kernel.args[-1].size, kernel.args[-1].dtype.numpy)
    buffers = [*[np.ascontiguousarray(a).reshape(-1) for a in case.runs[0]], out]
    got, _ = gpu.run(kernel, code, buffers, buffers, {}, order)
    gpu.close()
    return got[-1].astype("f8")


@pytest.mark.parametrize("k", [72, 1500])
@pytest.mark.parametrize("dtype", [bf16, f16, f32], ids=lambda d: d.name)
def test_error_bounds(dtype: DType, k: int) -> None:
    """Against f64. With S = sum of |a||b|: a sum of k exact products in f32, each addition perhaps cut off, is off by at most k 2^-23 S; rounding
    both factors to tf32 adds 2^-10 S; rounding the result half a unit of its dtype."""
    (case,) = product_case(dtype, 24, 40, k)
    a, b = [x.astype("f8") for x in case.runs[0]]
    want, scale = a @ b, np.abs(a) @ np.abs(b)
    last = {bf16: 2.0**-8, f16: 2.0**-11, f32: 2.0**-24}[dtype]
    bound = (k * 2.0**-23 + (2.0**-10 if dtype is f32 else 0)) * scale + last * np.abs(want)
    error = np.abs(result(case, LARGE, "0").reshape(want.shape) - want)
    assert (error <= bound).all()
    if dtype is f32:  # and it is tf32: strict numerics are a hundred times nearer
        strict = np.abs(result(case, GpuTarget(), "0").reshape(want.shape) - want)
        assert 100 * strict.max() < error.max()


def test_others_stay_strict() -> None:
    """f64, integers, and products of almost nothing."""
    for dtype, n, k in ((f64, 16, 16), (i32, 16, 16), (f32, 4, 16), (bf16, 16, 4)):
        (case,) = product_case(dtype, 16, n, k)
        assert not on_tensor_cores(matrices(contraction(case)))
        cuda.check([case], LARGE)
