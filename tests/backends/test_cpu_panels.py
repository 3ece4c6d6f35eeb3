"""Convolutions whose weights lie in panels: the bits of the plain ones, around the edges of tiles, panels, K blocks and units, from two Functions;
kernels read the panels where they are; what cannot be in panels is left as it was."""

from __future__ import annotations

from typing import Any

import conformance as c
import numpy as np
import pytest
from test_cpu_conv import attributes, operands, values

from duo_backends.cpu.conv import compile_conv
from duo_backends.cpu.conv_plan import make_plan
from duo_ir import ops
from duo_ir.core import Function, Value, function_of
from duo_ir.interpret import interpret
from duo_ir.kernels.fuse import fuse
from duo_ir.kernels.kernel import ConvKernel
from duo_ir.ops import broadcasting as nd
from duo_ir.transforms.hoist import Hoisted, hoist
from duo_ir.transforms.simplify import simplify
from duo_ir.types import f16, f64
from duo_ir.verify import verify

Shape = tuple[int, ...]
_PAD = ((1, 1), (1, 1))
SHAPES: list[tuple[Shape, Shape, dict[str, Any]]] = [
    ((1, 1, 1, 9), (1, 1, 9, 32), {}),
    ((1, 7, 7, 60), (3, 3, 60, 128), {"padding": _PAD}),  # units of columns: one slab for all, a last block cut short
    ((2, 7, 7, 33), (3, 3, 33, 96), {"padding": _PAD}),  # lines of the slab that end within a vector
    ((1, 30, 29, 3), (3, 3, 3, 64), {"strides": (2, 2), "padding": _PAD}),
    ((3, 8, 9, 24), (1, 1, 24, 96), {"strides": (2, 3)}),  # x in place
    ((1, 9, 9, 5), (2, 3, 5, 32), {"w_dilation": (3, 2), "padding": _PAD}),  # K written out
    ((1, 4, 3, 1100), (1, 1, 1100, 64), {"padding": _PAD}),
    ((2, 33, 4), (3, 4, 64), {"padding": ((1, 1),)}),
    ((1, 3, 4, 5, 3), (2, 3, 2, 3, 32), {"padding": ((1, 0), (1, 1), (0, 1))}),
    ((1, 1800, 10), (1795, 10, 32), {}),  # K beyond 16384
    ((0, 5, 6, 6), (3, 3, 6, 32), {"padding": _PAD}),
    ((1, 70, 16, 64), (3, 3, 64, 32), {"padding": _PAD}),
]


def panels_of(width: int | None) -> Any:
    return lambda op: width


def split(function: Function, width: int | None) -> Hoisted | None:
    return hoist(simplify(function), [1], panels_of(width))


def check(function: Function, arrays: list[np.ndarray], width: int, **choices: Any) -> Hoisted:
    """The two Functions give the bits of one; returns them."""
    found = split(function, width)
    assert found is not None
    for part in found[:2]:
        verify(part)
    want = interpret(function, *arrays)
    ((_, _, kept), *_) = c.outcomes(found.prologue, [arrays[1]])
    assert all(map(c.same, interpret(found.main, *arrays, *kept), want))
    for how, _, got in c.outcomes(found.main, [*arrays, *kept], **choices):
        assert all(map(c.same, got, want)), how
    return found


def plans(function: Function) -> list[Any]:
    kernels = [item.kernel for item in fuse(function).items]
    return [make_plan(k, c.backend().target) for k in kernels if isinstance(k, ConvKernel)]


@pytest.mark.parametrize(
    ("x", "w", "attrs"), SHAPES, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else ""
)
@pytest.mark.parametrize("width", [16, 32])
def test_equal_bits(x: Shape, w: Shape, attrs: dict[str, Any], width: int) -> None:
    attrs = attributes(len(x) - 2, **attrs)
    arrays = operands(x, w)
    function = function_of(lambda x, w: ops.conv(x, w, **attrs), *c.types_of(arrays))
    if width == w[-1]:  # it lies so already
        assert split(function, width) is None
        c.check(function, arrays, threads=(1, 2, 3))
        return
    found = check(function, arrays, width, threads=(1, 2, 3))
    (kept,) = found.prologue.result_types
    assert kept.shape == (w[-1] // width, *w[:-1], width)
    if x[0]:
        lanes = c.backend().target.vector_bytes // 4
        (plan,) = plans(found.main)
        assert plan is not None and plan.laid_out == (width % lanes == 0)


def test_units_of_one_image_share_its_slab() -> None:
    attrs = attributes(2, padding=_PAD)
    arrays = operands((1, 14, 14, 64), (3, 3, 64, 256))
    found = split(function_of(lambda x, w: ops.conv(x, w, **attrs), *c.types_of(arrays)), 32)
    assert found is not None
    (plan,) = plans(found.main)
    assert plan.laid_out and plan.shares_slab and plan.column_units > 1


def test_a_block_with_its_epilogue_is_one_kernel() -> None:
    """Channels first, as frontends write it; the epilogue reads what it needs by (panel, column)."""
    attrs = attributes(2, padding=_PAD)

    def block(x: Value, w: Value, bias: Value) -> Value:
        y = ops.conv(nd.transpose(x, (0, 2, 3, 1)), nd.transpose(w, (2, 3, 1, 0)), **attrs)
        return nd.maximum(nd.transpose(y + bias + nd.transpose(x, (0, 2, 3, 1)), (0, 3, 1, 2)), 0.0)

    rng = np.random.default_rng(3)
    arrays = [values(rng, s) for s in ((1, 64, 9, 11), (64, 64, 3, 3), (64,))]
    function = function_of(block, *c.types_of(arrays))
    found = check(function, arrays, 32, threads=(1, 2, 3))
    ((_, _, kept), *_) = c.outcomes(found.prologue, [arrays[1]])
    assert kept[0].shape == (2, 3, 3, 64, 32)


def test_special_values() -> None:
    """NaN and infinity times the zeros of padding, and the sign of zero."""
    attrs = attributes(2, padding=_PAD)
    rng = np.random.default_rng(4)
    arrays = [c.salted(a, rng, 0.1) for a in operands((1, 5, 6, 20), (3, 3, 20, 64))]
    check(function_of(lambda x, w: ops.conv(x, w, **attrs), *c.types_of(arrays)), arrays, 32)


@pytest.mark.parametrize("dtype", [f64, f16], ids=lambda d: d.name)
def test_dtypes(dtype: Any) -> None:
    attrs = attributes(2, padding=_PAD)
    arrays = operands((1, 5, 9, 7), (3, 3, 7, 64), dtype)
    check(function_of(lambda x, w: ops.conv(x, w, **attrs), *c.types_of(arrays)), arrays, 16)


@pytest.mark.parametrize("cpu", ["x86-64-v3", "native/16"])
def test_narrow_vectors(cpu: str) -> None:
    attrs = attributes(2, padding=_PAD)
    arrays = operands((1, 7, 9, 30), (3, 3, 30, 64))
    check(function_of(lambda x, w: ops.conv(x, w, **attrs), *c.types_of(arrays)), arrays, 16, cpu=cpu)


def test_weights_shared_by_two_convolutions_are_laid_out_once() -> None:
    attrs = attributes(2, padding=_PAD)
    arrays = operands((1, 6, 6, 32), (3, 3, 32, 32))
    function = function_of(lambda x, w: ops.conv(ops.conv(x, w, **attrs), w, **attrs), *c.types_of(arrays))
    assert len(check(function, arrays, 16).prologue.results) == 1


def test_what_is_left_alone() -> None:
    """Groups, a dilated x, weights that change, and where the backend wants no panels."""
    for x, w, given in (
        ((1, 5, 6, 32), (3, 3, 8, 64), {"groups": 4, "padding": _PAD}),
        ((1, 5, 6, 32), (3, 3, 32, 64), {"x_dilation": (2, 1)}),
    ):
        attrs = attributes(2, **given)
        function = function_of(lambda x, w, a=attrs: ops.conv(x, w, **a), *c.types_of(operands(x, w)))
        assert split(function, 32) is None
    attrs = attributes(2)
    function = function_of(lambda x, w: ops.conv(x, w, **attrs), *c.types_of(operands((1, 5, 6, 32), (3, 3, 32, 64))))
    assert split(function, None) is None
    assert hoist(function, [0], panels_of(32)) is None


def test_the_backend_says_how_wide() -> None:
    def width(x: Shape, w: Shape, dtype: Any = None) -> int | None:
        arrays = operands(x, w) if dtype is None else operands(x, w, dtype)
        attrs = attributes(len(x) - 2)
        function = function_of(lambda x, w: ops.conv(x, w, **attrs), *c.types_of(arrays))
        return c.backend("native").panel_columns(function.ops[0])

    lanes = c.backend("native").target.vector_bytes // 4
    for n in (32, 48, 64, 80, 512):
        found = width((1, 9, 9, 8), (3, 3, 8, n))
        assert found is None or (n % found == 0 and found % lanes == 0)
    assert width((1, 9, 9, 8), (3, 3, 8, 512)) is not None
    assert width((1, 9, 8), (3, 8, 512)) is not None
    assert width((1, 9, 9, 8), (3, 3, 8, 33)) is None
    assert width((1, 9, 9, 8), (3, 3, 8, 512), f16) is None


def test_nothing_behind_the_weights_is_asked_for() -> None:
    """Tiles ask for the next block of their weights where there is one: behind the last lies memory that other threads may be writing."""
    for channels, asks in ((56, False), (57, True)):  # 504 and 513 steps of K
        arrays = operands((1, 6, 6, channels), (3, 3, channels, 64))
        found = split(function_of(lambda x, w: ops.conv(x, w, **attributes(2, padding=_PAD)), *c.types_of(arrays)), 32)
        assert found is not None
        kernel = next(item.kernel for item in fuse(found.main).items if isinstance(item.kernel, ConvKernel))
        assert make_plan(kernel, c.backend().target).fetches == asks
        assert ("@llvm.prefetch" in compile_conv(kernel, c.backend().target).text) == asks
