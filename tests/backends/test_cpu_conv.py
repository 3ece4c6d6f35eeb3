"""Convolution on the CPU: the interpreter's bits for sizes around every edge of tiles, vectors, K blocks and units; fused or not; on one to
three threads; and independent of the batch."""

from __future__ import annotations

from typing import Any

import conformance as c
import numpy as np
import pytest

from duo_ir import ops
from duo_ir.core import Value, function_of
from duo_ir.interpret import interpret
from duo_ir.kernels.fuse import fuse
from duo_ir.kernels.kernel import ConvKernel
from duo_ir.ops import broadcasting as nd
from duo_ir.transforms.autodiff import reverse
from duo_ir.transforms.simplify import simplify
from duo_ir.types import Dim, TensorType, bf16, f16, f32, f64, i8, i32, i64, u8

Shape = tuple[int, ...]


def attributes(spatial: int, **given: Any) -> dict[str, Any]:
    ones = (1,) * spatial
    return {
        "strides": ones,
        "padding": ((0, 0),) * spatial,
        "x_dilation": ones,
        "w_dilation": ones,
        "groups": 1,
    } | given


def values(rng: np.random.Generator, shape: Shape, dtype: Any = f32) -> np.ndarray:
    if dtype.is_float:
        return rng.standard_normal(shape).astype(dtype.numpy)
    info = np.iinfo(dtype.numpy)
    return rng.integers(info.min, info.max, shape, dtype.numpy, endpoint=True)


def operands(x: Shape, w: Shape, dtype: Any = f32) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(x) * 31 + sum(w))
    return [values(rng, x, dtype), values(rng, w, dtype)]


_PAD = ((1, 1), (1, 1))
SHAPES: list[tuple[Shape, Shape, dict[str, Any]]] = [
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    ((1, 1, 1, 3), (3, 3, 3, 5), {"padding": _PAD}),
    ((2, 5, 5, 16), (5, 5, 16, 32), {"padding": ((2, 2), (2, 2))}),
    ((1, 2, 30, 7), (3, 3, 7, 33), {"padding": _PAD}),  # rows of several tiles, a narrow last panel
    ((2, 9, 7, 8), (3, 3, 8, 40), {"padding": _PAD}),  # two rows a tile, an odd last one
    ((3, 4, 3, 5), (2, 2, 5, 17), {"padding": ((0, 1), (1, 0))}),  # four rows a tile
    ((1, 6, 29, 3), (3, 3, 3, 64), {"strides": (2, 2), "padding": _PAD}),
    ((2, 8, 8, 24), (1, 1, 24, 16), {"strides": (2, 3)}),  # only what is read is copied
    ((1, 7, 15, 1), (7, 7, 1, 32), {"strides": (2, 2), "padding": ((3, 3), (3, 3))}),  # taps written out
    ((1, 4, 4, 600), (1, 1, 600, 9), {"padding": _PAD}),  # K blocks cut within a tap
    ((1, 6, 5, 100), (3, 3, 100, 31), {"padding": _PAD}),  # and between
    ((1, 3, 16, 1024), (1, 3, 1024, 3), {}),  # positions 4096 bytes apart
    ((2, 12, 5, 6), (3, 2, 6, 20), {"w_dilation": (3, 2)}),
    ((2, 6, 6, 4), (4, 4, 4, 18), {"padding": ((-1, 2), (3, -2))}),
    ((1, 3, 3, 2), (5, 5, 2, 16), {"padding": ((3, 3), (4, 4))}),  # a kernel larger than x
    ((2, 4, 5, 6), (3, 3, 6, 24), {"x_dilation": (2, 3), "padding": ((2, 2), (2, 3))}),
    ((1, 5, 6, 8), (3, 3, 2, 12), {"groups": 4, "padding": _PAD}),
    ((2, 5, 6, 20), (3, 3, 1, 20), {"groups": 20, "padding": _PAD}),  # depthwise
    ((1, 5, 6, 6), (3, 3, 1, 36), {"groups": 6, "padding": _PAD}),
    ((0, 5, 6, 6), (3, 3, 6, 4), {"padding": _PAD}),
    ((2, 5, 6, 0), (3, 3, 0, 4), {"padding": _PAD}),
    ((2, 33, 4), (3, 4, 17), {"padding": ((1, 1),)}),
    ((1, 9, 2), (9, 2, 16), {}),
    ((1, 3, 4, 5, 3), (2, 3, 2, 3, 16), {"padding": ((1, 0), (1, 1), (0, 1)), "strides": (1, 2, 1)}),
    ((1, 5, 3, 2, 3), (2, 1, 1, 3, 8), {"w_dilation": (3, 1, 1), "padding": ((1, 1), (0, 0), (0, 0))}),
    ((1, 70, 16, 64), (3, 3, 64, 16), {"padding": _PAD}),  # several units
    ((1, 3, 2000), (2, 2000, 2), {}),
    ((1, 1800, 10), (1795, 10, 3), {}),  # K beyond 16384
    ((7, 1650, 10), (1640, 10, 3), {}),
]


@pytest.mark.parametrize(
    ("x", "w", "attrs"), SHAPES, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else ""
)
def test_shapes(x: Shape, w: Shape, attrs: dict[str, Any]) -> None:
    attrs = attributes(len(x) - 2, **attrs)
    threads = (1, 2, 3)
    c.check(lambda x, w: ops.conv(x, w, **attrs), operands(x, w), threads=threads)


@pytest.mark.parametrize(
    ("x", "w", "attrs"), SHAPES[:26], ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else ""
)
def test_gradients(x: Shape, w: Shape, attrs: dict[str, Any]) -> None:
    attrs = attributes(len(x) - 2, **attrs)

    def gradients(x: Value, w: Value, g: Value) -> tuple[Value, ...]:
        out = ops.conv(x, w, **attrs)
        return tuple(v for v in reverse([out.op], {out: g}, [x, w]) if v is not None)

    arrays = operands(x, w)
    out = interpret(function_of(lambda x, w: ops.conv(x, w, **attrs), *c.types_of(arrays)), *arrays)[0]
    c.check(gradients, [*arrays, values(np.random.default_rng(5), out.shape)])


@pytest.mark.parametrize("dtype", [f64, f16, bf16, i8, u8, i32, i64], ids=lambda d: d.name)
def test_dtypes(dtype: Any) -> None:
    attrs = attributes(2, padding=_PAD, strides=(1, 2))
    for x, w in (((2, 5, 9, 3), (3, 3, 3, 17)), ((1, 4, 30, 70), (3, 3, 70, 5))):
        c.check(lambda x, w: ops.conv(x, w, **attrs), operands(x, w, dtype))


def test_long_weight_gradients() -> None:
    """K beyond 16384 is summed by chunks: in tiles of images, and where there is one image."""
    for x, w in (((2, 96, 90, 4), (1, 1, 4, 3)), ((3, 80, 75, 1), (3, 3, 1, 18))):
        attrs = attributes(2, padding=((w[0] // 2, w[0] // 2),) * 2)

        def gradient(x: Value, g: Value, w: Shape = w, attrs: dict[str, Any] = attrs) -> Value:
            out = ops.conv(x, nd.full(w, 0.0, f32), **attrs)
            (found,) = reverse([out.op], {out: g}, [out.op.operands[1]])
            assert found is not None
            return found

        c.check(gradient, operands(x, (*x[:3], w[3])))


@pytest.mark.parametrize(
    ("fill", "low", "high", "gap", "folds"),
    [
        (0.0, (0, 2, 1, 0), (0, 0, 3, 0), 0, True),
        (-0.0, (0, 2, 1, 0), (0, 0, 3, 0), 0, False),
        (1.0, (0, 2, 1, 0), (0, 0, 3, 0), 0, False),
        (0.0, (0, 1, 0, 0), (0, 0, 0, 0), 1, False),
        (0.0, (1, 0, 0, 0), (0, 0, 0, 0), 0, False),
        (0.0, (0, 0, 0, 0), (0, 0, 0, 2), 0, False),
    ],
)
def test_padding_before_is_padding_of(fill: float, low: Shape, high: Shape, gap: int, folds: bool) -> None:
    attrs = attributes(2, padding=((-1, 1), (1, -2)))

    def padded(x: Value, w: Value) -> Value:
        x = ops.pad(x, nd.constant_of(fill, f32), low=low, high=high, interior=(0, gap, 0, 0))
        return ops.conv(x, w, **attrs)

    arrays = operands((2, 5, 6, 4), (3, 3, 4 + high[3], 18))
    function = function_of(padded, *c.types_of(arrays))
    left = [op.definition for op in simplify(function).ops]
    assert (ops.pad not in left) is folds
    c.check(function, arrays)


def test_first_layers() -> None:
    """Weight gradients with few input channels, in either kind of tile, also where the batch is a run-time size."""
    b = Dim.symbol("b")
    for channels, size in ((1, 30), (2, 60), (3, 20)):
        attrs = attributes(2, padding=_PAD, strides=(2, 2))
        kernel, half = (3, 3, channels, 20), (size + 1) // 2

        def gradient(x: Value, g: Value, kernel: Shape = kernel, attrs: dict[str, Any] = attrs) -> Value:
            out = ops.conv(x, nd.full(kernel, 0.0, f32), **attrs)
            (found,) = reverse([out.op], {out: g}, [out.op.operands[1]])
            assert found is not None
            return found

        arrays = [operands((5, size, size, channels), (1,))[0], operands((5, half, half, 20), (1,))[0]]
        c.check(gradient, arrays)
        types = (TensorType(f32, (b, size, size, channels)), TensorType(f32, (b, half, half, 20)))
        c.check(function_of(gradient, *types), arrays, [a[:3] for a in arrays])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_planes_of_an_image(channels: int) -> None:
    """Channels first in memory: few are interleaved in registers, more go one by one; widths around a vector."""
    for width, dtype in ((15, f32), (16, f32), (37, f32), (19, f64), (21, f16)):
        attrs = attributes(2, padding=_PAD, strides=(2, 2))
        arrays = operands((2, channels, 5, width), (3, 3, channels, 20), dtype)
        c.check(lambda x, w, a=attrs: ops.conv(nd.transpose(x, (0, 2, 3, 1)), w, **a), arrays, fusions=[True])


def test_special_values() -> None:
    """Padding takes part: infinity times a padding tap is NaN, and -0.0 stays where a sum underflows."""
    rng = np.random.default_rng(3)
    attrs = attributes(2, padding=_PAD)
    x, w = operands((2, 6, 7, 5), (3, 3, 5, 20))
    c.check(lambda x, w: ops.conv(x, w, **attrs), [c.salted(x, rng, 0.05), w], [x, c.salted(w, rng, 0.02)])


@pytest.mark.parametrize(
    ("x", "w", "kernel"),
    [
        (lambda x: ops.transpose(x, permutation=(0, 2, 3, 1)), lambda w: ops.transpose(w, permutation=(2, 3, 1, 0)), (19, 6, 3, 3)),
        (lambda x: ops.flip(ops.transpose(x, permutation=(0, 3, 2, 1)), axes=(1, 3)), nd.swap_last, (3, 3, 19, 6)),
        (lambda x: ops.slice(x, start=(0, 1, 1, 0), stop=(2, 6, 7, 8), step=(1, 1, 2, 3)), lambda w: ops.flip(w, axes=(0, 3)), (3, 3, 3, 19)),
        (lambda x: ops.broadcast(nd.slice_axis(x, 1, 0, 1), shape=x.type.shape), lambda w: w, (3, 3, 8, 19)),
    ],
    ids=["channels first", "reversed", "strided", "broadcast"],
)  # fmt: skip
def test_operands_are_read_through_views(x: Any, w: Any, kernel: Shape) -> None:
    attrs = attributes(2, padding=_PAD)
    c.check(lambda a, b: ops.conv(x(a), w(b), **attrs), operands((2, 6, 7, 8), kernel))


def test_symbolic_batch() -> None:
    b = Dim.symbol("b")
    attrs = attributes(2, padding=_PAD)
    types = (TensorType(f32, (b, 6, 15, 5)), TensorType(f32, (3, 3, 5, 20)))
    w = operands((1,), (3, 3, 5, 20))[1]
    batches = [[operands((n, 6, 15, 5), (1,))[0], w] for n in (2, 3, 5)]
    c.check(function_of(lambda x, w: ops.conv(x, w, **attrs), *types), *batches)


def test_symbolic_everything() -> None:
    b, h, w = (Dim.symbol(name) for name in "bhw")
    attrs = attributes(2, padding=((1, 1), (0, 1)))
    types = (TensorType(f32, (b, h, w, 3)), TensorType(f32, (3, 2, 3, 20)), TensorType(f32, (b, h, w, 20)))

    def step(x: Value, k: Value, g: Value) -> tuple[Value, ...]:
        out = ops.conv(x, k, **attrs)
        return (out, *[v for v in reverse([out.op], {out: g}, [x, k]) if v is not None])

    rng = np.random.default_rng(2)
    runs = [
        [values(rng, (n, p, q, 3)), values(rng, (3, 2, 3, 20)), values(rng, (n, p, q, 20))]
        for n, p, q in ((2, 3, 4), (3, 8, 5))
    ]
    c.check(function_of(step, *types), *runs)


def test_rows_do_not_depend_on_the_batch() -> None:
    attrs = attributes(2, padding=_PAD)
    x, w = operands((5, 9, 10, 12), (3, 3, 12, 35))
    (whole,) = interpret(function_of(lambda x, w: ops.conv(x, w, **attrs), *c.types_of([x, w])), x, w)
    for n in (1, 2):
        arrays = [x[:n], w]
        function = function_of(lambda x, w: ops.conv(x, w, **attrs), *c.types_of(arrays))
        for how, _, (got,) in c.outcomes(function, arrays):
            assert c.same(got, whole[:n]), how


def test_epilogues_are_fused() -> None:
    """Bias, an affine of each channel, the residual and relu run in the convolution's kernel."""
    attrs = attributes(2, padding=_PAD)

    def block(x: Value, w: Value, bias: Value, scale: Value) -> Value:
        return nd.maximum((ops.conv(x, w, **attrs) + bias) * scale + x, 0.0)

    rng = np.random.default_rng(7)
    arrays = [values(rng, s) for s in ((2, 6, 9, 20), (3, 3, 20, 20), (20,), (20,))]
    function = function_of(block, *c.types_of(arrays))
    (item,) = fuse(function).items
    assert isinstance(item.kernel, ConvKernel)
    c.check(function, arrays, threads=(1, 2, 3))


def test_groups_fuse_too() -> None:
    attrs = attributes(2, padding=_PAD, groups=3)
    rng = np.random.default_rng(8)
    arrays = [values(rng, s) for s in ((2, 5, 6, 12), (3, 3, 4, 18), (18,))]
    function = function_of(lambda x, w, b: ops.tanh(ops.conv(x, w, **attrs) + b), *c.types_of(arrays))
    assert len(fuse(function).items) == 1
    c.check(function, arrays)


def test_narrow_vectors() -> None:
    attrs = attributes(2, padding=_PAD)
    for cpu in ("x86-64-v3", "native/16"):
        c.check(lambda x, w: ops.conv(x, w, **attrs), operands((2, 7, 9, 6), (3, 3, 6, 22)), cpu=cpu)
