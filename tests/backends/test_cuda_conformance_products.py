"""Products, convolutions and attention as CUDA kernels on the emulated GPU, to the bit of `duo_ir.kernels.evaluate`: sizes around every edge of
the tiles, blocks and chunks, all dtypes, transposed operands, batches, epilogues, named sizes, special values; under three schedules.

A device of one multiprocessor makes small products take the large tiles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import cuda_conformance as cuda
import numpy as np
import pytest

from duo_backends.binding import kernels_of
from duo_backends.cuda.code import GpuTarget
from duo_backends.cuda.emit import compile_kernel
from duo_ir import ops
from duo_ir.core import Value, function_of
from duo_ir.kernels.kernel import AttentionKernel, ContractKernel, ConvKernel
from duo_ir.ops import broadcasting as nd
from duo_ir.ops.attention import attention, attention_gradient
from duo_ir.pipeline import lower
from duo_ir.types import Dim, DType, TensorType, bf16, bool_, f16, f32, f64, i8, i32
from tests.cuda_emulator.support import needs_emulator

pytestmark = needs_emulator

LITTLE, LARGE = GpuTarget(multiprocessors=1), GpuTarget()
CORNERS = (  # results that hang over the tile that a device of one multiprocessor gives them
    ("128x128", 250, 140), ("128x128", 65, 67), ("64x64", 129, 132), ("32x32", 33, 20), ("8x64", 9, 66),
)  # fmt: skip
KS = (0, 1, 7, 8, 9, 511, 512, 513, 1030)


def product_of(ta: bool, tb: bool, epilogue: str = "") -> Callable[..., Value]:
    """x y of perhaps transposed operands; then with a bias along a row, or a column, or an image of the result's shape."""

    def f(x: Value, y: Value, *rest: Value) -> Value:
        z = nd.matmul(nd.swap_last(x) if ta else x, nd.swap_last(y) if tb else y)
        if epilogue == "bias":
            return nd.maximum(z + rest[0], nd.cast_to(nd.constant_of(0, z.type.dtype), z.type.dtype))
        if epilogue == "column":
            return z * rest[0] + rest[1]
        return z

    return f


def product_case(
    dtype: DType, m: int, n: int, k: int, ta: bool = False, tb: bool = False, batch: tuple[int, ...] = (), epilogue: str = "",
    named: bool = False, salt: float = 0.0, seed: int = 0,
) -> Iterator[cuda.Case]:  # fmt: skip
    def types(m: Any, n: Any, k: Any) -> list[TensorType]:
        shapes = [(*batch, k, m) if ta else (*batch, m, k), (*batch, n, k) if tb else (*batch, k, n)]
        shapes += {"": [], "bias": [(n,)], "column": [(m, 1), (*batch, m, n)]}[epilogue]
        return [TensorType(dtype, s) for s in shapes]

    arrays = cuda.numbers(*types(m, n, k), seed=seed, salt=salt)
    asked = types(Dim.symbol("m"), Dim.symbol("n"), Dim.symbol("k")) if named else types(m, n, k)
    label = f"{dtype.name} {batch} {m}x{n}x{k} ta={ta} tb={tb} {epilogue}{' named' if named else ''}"
    return cuda.cases(label, product_of(ta, tb, epilogue), arrays, types=asked)


def tile_of(case: cuda.Case, target: GpuTarget) -> str:
    """The tile of the case's product, by what its text does."""
    (kernel,) = [k for k in kernels_of(case.program) if isinstance(k, ContractKernel)]
    text = compile_kernel(kernel, target).text
    sides = [re.search(rf"tiles_{x} = \({x.upper()} \+ (\d+)\)", text) for x in "mn"]
    return "x".join([str(int(found[1]) + 1) for found in sides if found])


def transpositions() -> Iterator[tuple[bool, bool]]:
    yield from [(a, b) for a in (False, True) for b in (False, True)]


def test_tiles() -> None:
    """Every tile, filled and hanging over, for each layout; K around the step of 8 and the block of 512."""
    cases: list[cuda.Case] = []
    for tile, m, n in CORNERS:
        for number, (ta, tb) in enumerate(transpositions()):
            k = (13, 9, 7, 24)[number] if m > 200 else (1030, 515, 513, 8)[number]
            made = list(product_case(f32, m, n, k, ta, tb))
            assert [tile_of(case, LITTLE) for case in made] == [tile]
            cases += made
    cases += product_case(f32, 128, 128, 16)
    cases += product_case(f32, 256, 4, 24, ta=True)
    cases += product_case(f64, 65, 64, 17, epilogue="bias")
    cases += product_case(bf16, 130, 128, 20, tb=True, epilogue="bias")
    tally = cuda.check(cases, LITTLE)
    assert sum(isinstance(k, ContractKernel) for k in tally.kernels) == len(cases)


def test_every_k() -> None:
    """Values among which -0.0, infinity and NaN show a K that was padded or skipped."""
    cases = []
    for number, k in enumerate(KS):
        ta, tb = list(transpositions())[number % 4]
        cases += product_case(f32, 3, 5, k, ta, tb, salt=0.02)
        cases += product_case(f32, 3, 5, k, tb, ta, named=True)
    # a sum of nothing but -0.0: each factor is +0 times a negative number
    for k in (1, 3, 8, 520):
        x, y = np.full((3, k), 1e-30, "f4"), np.full((k, 5), -1e-30, "f4")
        cases += cuda.cases(f"underflow {k}", product_of(False, False), [x, y])
    cuda.check(cases)


def test_chunks_of_a_long_k() -> None:
    """K of one sum, and cut into 5, 6, 7 chunks: the tree's shapes."""
    cases = []
    for k, named in ((16384, False), (16385, False), (20000, True), (24577, False), (16390, True)):
        cases += product_case(f32, 2, 3, k, named=named, epilogue="bias" if k % 2 else "")
    cases += product_case(bf16, 2, 3, 16390, ta=True, epilogue="bias")
    cases += product_case(f32, 2, 3, 16400, batch=(2,), tb=True)
    cuda.check(cases)


def test_partial_sums_of_a_large_result_have_wide_positions() -> None:
    """Both operands and the result have fewer than 2^30 elements; the sums of five chunks more than 2^31."""
    for k, index in ((20_000, "long long"), (16_384, "int")):
        types = [TensorType(f32, (30_000, k)), TensorType(f32, (k, 30_000))]
        (kernel,) = kernels_of(lower(function_of(product_of(False, False), *types)))
        assert f"const {index} M = 30000" in compile_kernel(kernel, LARGE).text


@pytest.mark.parametrize("dtype", [f32, f64, f16, bf16, i8, i32], ids=lambda d: d.name)
def test_dtypes_layouts_batches_epilogues(dtype: DType) -> None:
    cases = []
    for number, (ta, tb) in enumerate(transpositions()):
        cases += product_case(dtype, 33, 36, 20, ta, tb, salt=0.05 if number == 0 else 0.0)
    cases += product_case(dtype, 9, 12, 515, epilogue="column")
    cases += product_case(dtype, 5, 8, 12, batch=(2, 3), tb=True, epilogue="bias")
    cases += product_case(dtype, 1, 6, 9, batch=(3,), ta=True, epilogue="column")
    cases += product_case(dtype, 17, 5, 33, named=True, epilogue="bias")
    cases += product_case(dtype, 0, 5, 3)
    cuda.check(cases)


# ------------------------------------------------------------------------------------------------------------ convolution
def conv_cases(dtype: DType) -> Iterator[cuda.Case]:
    for x, w, strides, padding, x_dilation, w_dilation, groups in (
        ((2, 9, 3), (3, 3, 10), (2,), ((1, 1),), (1,), (1,), 1),
        ((1, 7, 6, 8), (3, 3, 8, 12), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1),
        ((2, 6, 5, 4), (3, 2, 2, 8), (2, 3), ((1, 0), (0, 2)), (1, 1), (2, 1), 2),
        ((1, 4, 5, 6), (2, 3, 1, 6), (1, 2), ((1, 1), (2, 1)), (2, 3), (1, 2), 6),
        ((1, 3, 3, 2), (3, 3, 2, 5), (1, 1), ((5, 4), (6, 3)), (1, 1), (1, 1), 1),
        ((2, 5, 4, 3), (2, 2, 3, 4), (1, 1), ((-1, 1), (1, -1)), (2, 2), (1, 1), 1),
        ((1, 4, 4, 58), (3, 3, 58, 4), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1),
        ((1, 2, 3, 2, 2), (2, 2, 1, 2, 3), (1, 1, 2), ((0, 1), (1, 1), (0, 0)), (1, 1, 1), (1, 2, 1), 1),
    ):
        arrays = cuda.numbers(TensorType(dtype, x), TensorType(dtype, w), seed=len(x) + groups)
        attrs: dict[str, Any] = {
            "strides": strides, "padding": padding, "x_dilation": x_dilation, "w_dilation": w_dilation, "groups": groups,
        }  # fmt: skip
        yield from cuda.cases(f"{dtype.name} {x} {w} {attrs}", lambda a, b, attrs=attrs: ops.conv(a, b, **attrs), arrays)


@pytest.mark.parametrize("dtype", [f32, f64, bf16], ids=lambda d: d.name)
def test_convolutions(dtype: DType) -> None:
    tally = cuda.check(conv_cases(dtype), LITTLE if dtype is f32 else LARGE)
    assert any(isinstance(k, ConvKernel) for k in tally.kernels)


def test_convolution_of_any_batch_with_an_epilogue() -> None:
    b = Dim.symbol("b")
    x, w, bias = TensorType(f32, (b, 6, 5, 8)), TensorType(f32, (3, 3, 8, 12)), TensorType(f32, (12,))

    def f(x: Value, w: Value, bias: Value) -> Value:
        y = ops.conv(x, w, strides=(1, 1), padding=((1, 1), (1, 1)), x_dilation=(1, 1), w_dilation=(1, 1), groups=1)
        return nd.maximum(y + bias, 0.0)

    runs = [cuda.numbers(TensorType(f32, (n, 6, 5, 8)), w, bias, salt=0.02) for n in (0, 1, 3)]
    cuda.check(cuda.cases("any batch", f, *runs, types=[x, w, bias]))


# -------------------------------------------------------------------------------------------------------------- attention
def attention_cases(
    dtype: DType, queries: int, keys: int, width: int, value_width: int, causal: bool, mask: str, backward: bool
) -> Iterator[cuda.Case]:
    c = f64 if dtype is f64 else f32
    q, k, v = (TensorType(dtype, (n, 2, w)) for n, w in ((queries, width), (keys, width), (keys, value_width)))
    g, row = TensorType(dtype, (queries, 2, value_width)), TensorType(c, (queries, 2))
    masks = {"": [], "bool": [TensorType(bool_, (2, queries, keys))], "number": [TensorType(c, (2, queries, keys))]}[mask]
    types = [q, k, v, row, row, g, *masks] if backward else [q, k, v, *masks]
    arrays = cuda.numbers(*types, seed=queries)
    if backward:
        arrays[3] = np.abs(arrays[3]) * 3 + 2
    if mask == "bool":
        arrays[-1][:, 0] = False  # a query that sees nothing
    op = attention_gradient if backward else attention
    label = f"{op.name} {dtype.name} {queries}x{keys} widths {width} {value_width} causal={causal} {mask}"
    return cuda.cases(label, lambda *a: op(*a, causal=causal, scale=0.17), arrays)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "gradient"])
def test_attention(backward: bool) -> None:
    """Across the edges of blocks of 32 queries and 64 keys, slabs of 64 columns, for each mask."""
    cases: list[cuda.Case] = []
    for dtype, queries, keys, width, value_width, causal, mask in (
        (f32, 33, 65, 1, 8, False, ""), (f32, 66, 66, 8, 1, True, ""), (f32, 31, 64, 64, 80, False, "bool"),
        (f32, 65, 70, 80, 64, True, "number"), (f32, 3, 129, 130, 8, False, "number"), (f32, 97, 40, 8, 8, True, "bool"),
        (bf16, 34, 66, 8, 66, True, "bool"), (f16, 5, 3, 16, 8, False, ""), (f64, 33, 65, 8, 8, True, "number"),
    ):  # fmt: skip
        cases += attention_cases(dtype, queries, keys, width, value_width, causal, mask, backward)
    tally = cuda.check(cases)
    assert sum(isinstance(k, AttentionKernel) for k in tally.kernels) == len(cases)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "gradient"])
def test_attention_where_a_block_has_little(backward: bool) -> None:
    """Less shared memory, so shorter runs of what is summed over; and results of several launches, as threads have registers for some."""
    little = GpuTarget(86, shared=99 << 10)
    check = [attention_cases(f64, 33, 70, 40, 66, causal, mask, backward) for causal, mask in ((True, "bool"), (False, "number"))]
    check.append(attention_cases(f64, 66, 65, 18, 8, True, "", backward))
    assert cuda.check([case for cases in check for case in cases], little).kernels
    wide = [attention_cases(d, 33, 35, w, v, True, "", backward) for d, w, v in ((f64, 200, 300), (f32, 330, 264))]
    tally = cuda.check([case for cases in wide for case in cases])
    assert sorted(len(compile_kernel(k, GpuTarget()).launches) for k in tally.kernels) == ([3, 5] if backward else [1, 2])


def test_attention_of_named_sizes() -> None:
    t, s = Dim.symbol("t"), Dim.symbol("s")
    types = [TensorType(f32, (n, 1, 8)) for n in (t, s, s)]
    runs = [cuda.numbers(*[TensorType(f32, (n, 1, 8)) for n in (a, b, b)]) for a, b in ((1, 1), (33, 65), (0, 3), (2, 0))]
    for causal in (False, True):
        program = lower(function_of(lambda q, k, v: attention(q, k, v, causal=causal, scale=1.0), *types))  # noqa: B023
        cuda.check([cuda.Case(f"causal={causal}", program, runs)])
