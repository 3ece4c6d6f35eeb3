"""Attention and its gradient on the CPU backend: equal bits to the definition at every edge of blocks, tiles and vectors."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from duo_backends.cpu.threads import get_num_threads, set_num_threads
from duo_ir import ops
from duo_ir.core import Builder, Function
from duo_ir.interpret import interpret
from duo_ir.kernels.evaluate import evaluate
from duo_ir.kernels.kernel import AttentionKernel
from duo_ir.kernels.program import Step
from duo_ir.kernels.work import describe, flops
from duo_ir.opdef import compute_dtype
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import compile as compile_function
from duo_ir.pipeline import lower
from duo_ir.types import Dim, DType, TensorType, bf16, f16, f32, f64
from duo_ir.types import dtype as dtype_of
from tests.backends.conformance import backend, difference, every_phase_split, same

Shape = tuple[int, ...]


def make_arrays(dtype: DType, lead: Shape, t: int, s: int, heads: int, d: int, e: int, mask: str) -> list[np.ndarray]:
    """q, k, v, g and perhaps a mask; a few numbers are what breaks sums that are not done as defined."""
    rng = np.random.default_rng([t, s, d, e, len(mask)])
    shapes = [(*lead, t, heads, d), (*lead, s, heads, d), (*lead, s, heads, e), (*lead, t, heads, e)]
    out = [np.asarray(rng.standard_normal(shape)).astype(dtype.numpy) for shape in shapes]
    grid = (*lead, heads, t, s)
    if mask == "bool":
        allowed = np.asarray(rng.random(grid) < 0.6)
        allowed[..., : min(t, 2), :] = False  # queries that see nothing
        out.append(allowed)
    if mask == "float":
        out.append(rng.standard_normal(grid).astype(compute_dtype(dtype).numpy))
        out[-1][rng.random(grid) < 0.2] = -np.inf
    return out


def program(arrays: list[np.ndarray], causal: bool, scale: float = 0.37, packed: bool = False) -> Function:
    """Result, lse and the three gradients. `packed`: q, k and v are the first three slices, as wide as g, of one array."""
    builder = Builder("attention")
    with builder:
        given = [builder.parameter(TensorType(dtype_of(a.dtype), a.shape)) for a in arrays]
        if packed:
            x, g, *mask = given
            width, last = g.type.shape[-1], x.type.rank - 1
            q, k, v = (nd.slice_axis(x, last, n * width, (n + 1) * width) for n in range(3))
        else:
            q, k, v, g, *mask = given
        out, lse = ops.attention(q, k, v, *mask, causal=causal, scale=scale)
        c = compute_dtype(q.type.dtype)
        delta = nd.sum(nd.cast_to(out, c) * nd.cast_to(g, c), out.type.rank - 1)
        grads = ops.attention_gradient(q, k, v, lse, delta, g, *mask, causal=causal, scale=scale)
    return builder.build([out, lse, *grads])


def check(function: Function, arrays: list[np.ndarray], cpu: str | None = None) -> None:
    want = interpret(function, *arrays)
    machine = backend(cpu)
    for fusion in (True, False):
        for got, w in zip(evaluate(lower(function, fusion), *arrays), want):
            assert same(got, np.asarray(w)), difference(got, np.asarray(w))
        with every_phase_split():
            bound = compile_function(function, machine, fusion=fusion).bind({})
            results = bound.run([machine.from_numpy(a) for a in arrays])
        for result, w, r in zip(results, want, function.results):
            got = machine.to_numpy(result, r.type.dtype, r.type.static_shape({}))
            assert same(got, np.asarray(w)), difference(got, np.asarray(w))


@cache
def machines() -> tuple[str | None, ...]:
    widest = backend().target.vector_bytes
    return (None, *[f"native/{width}" for width in (32, 16) if width < widest])


@pytest.mark.parametrize("size", [
    (1, 1), (0, 3), (3, 0), (63, 64), (64, 65), (65, 63), (1, 130), (130, 1), (130, 70), (66, 130),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_sizes(size: tuple[int, int], causal: bool) -> None:
    arrays = make_arrays(f32, (2,), *size, 2, 16, 16, "")
    check(program(arrays, causal), arrays)


@pytest.mark.parametrize("dtype", [f64, f16, bf16], ids=str)
@pytest.mark.parametrize("mask", ["", "bool", "float"])
def test_dtypes(dtype: DType, mask: str) -> None:
    arrays = make_arrays(dtype, (), 67, 70, 2, 8, 5, mask)
    check(program(arrays, mask == "float"), arrays)


@pytest.mark.parametrize("widths", [(1, 1), (3, 2), (5, 7), (20, 33), (64, 64), (130, 16)], ids=str)
def test_widths(widths: tuple[int, int]) -> None:
    arrays = make_arrays(f32, (), 65, 67, 1, *widths, "float")
    check(program(arrays, True), arrays)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_vector_widths(number: int, dtype: DType) -> None:
    if number >= len(machines()):
        pytest.skip("this machine has narrower vectors")
    for mask, causal in (("bool", False), ("", True)):
        arrays = make_arrays(dtype, (2,), 66, 66, 1, 9, 16, mask)
        check(program(arrays, causal), arrays, machines()[number])


@pytest.mark.parametrize("width", [24, 48, 13 * 3])
def test_packed_projections(width: int) -> None:
    """q, k and v read where one projection put them, at strides between near and far."""
    for heads in (1, 7):
        x = np.random.default_rng(width).standard_normal((2, 70, heads, width)).astype(np.float32)
        g = np.random.default_rng(1).standard_normal((2, 70, heads, width // 3)).astype(np.float32)
        check(program([x, g], True, packed=True), [x, g])


def test_rows_that_share_cache_sets() -> None:
    """A row every 4096 bytes: keys and values are copied."""
    rng = np.random.default_rng(4)
    x, g = (rng.standard_normal((9, 66, 1, width)).astype(np.float32) for width in (1024, 8))
    check(program([x, g], True, packed=True), [x, g])


def test_one_thread_and_three() -> None:
    arrays = make_arrays(f32, (3,), 70, 80, 2, 16, 16, "")
    function = program(arrays, True)
    before = get_num_threads()
    try:
        for n in (1, 3):
            set_num_threads(n)
            check(function, arrays)
    finally:
        set_num_threads(before)


def test_rows_are_independent() -> None:
    """A query's result is the same alone, in another batch, and with other queries beside it."""
    q, k, v, g = make_arrays(f32, (2,), 130, 130, 2, 16, 16, "")
    whole = interpret(program([q, k, v, g], False), q, k, v, g)[0]
    for rows in (slice(77, 78), slice(3, 70)):
        some = [q[:1, rows], k[:1], v[:1], g[:1, rows]]
        function = program(some, False)
        assert same(interpret(function, *some)[0], np.ascontiguousarray(whole[:1, rows]))
        check(function, some)


def test_special_numbers() -> None:
    q, k, v, g = make_arrays(f32, (), 70, 70, 1, 4, 4, "")
    q[3, 0, 1], k[5, 0, 0], v[64, 0, 2], v[2, 0, 1] = np.nan, np.inf, np.inf, -0.0
    q[10], k[66] = 1e30, -1e30
    for causal in (False, True):
        function = program([q, k, v, g], causal)
        check(function, [q, k, v, g])
        out = interpret(function, q, k, v, g)[0]
        assert np.isnan(out[3]).all()
        # with `causal` the block of keys from 64 on takes no part in the first 64 queries: not even its infinity
        assert np.isfinite(out[:3]).all() == causal


def test_nothing_to_see() -> None:
    """Queries without any key: result and gradients 0, whatever the others do."""
    q, k, v, g, mask = make_arrays(f32, (), 66, 70, 1, 4, 4, "bool")
    function = program([q, k, v, g, mask], False)
    out, lse, dq, _, _ = interpret(function, q, k, v, g, mask)
    assert (
        not out[:2].any()
        and np.isposinf(lse[:2]).all()
        and not dq[:2].any()
        and out[2:].any()
        and np.isfinite(dq).all()
    )


def test_work_that_profiles_report() -> None:
    """Products of the pairs that take part: with `causal`, keys by halves of a block."""
    arrays = make_arrays(f32, (2,), 70, 80, 3, 16, 8, "")
    for causal, pairs in ((False, 70 * 80), (True, 32 * 32 + 32 * 64 + 6 * 80)):
        items = lower(program(arrays, causal)).items
        found = [i.kernel for i in items if isinstance(i, Step) and isinstance(i.kernel, AttentionKernel)]
        assert [flops(k, {}) for k in found] == [6 * pairs * 2 * 24, 6 * pairs * 2 * 64]
        assert [describe(k, {}) for k in found] == [
            f"{'causal ' * causal}attention{what} 2x3 of 70x80, width 16x8 f32" for what in ("", " gradient")
        ]


def test_named_sizes() -> None:
    """One executable for any batch and length."""
    t, n = Dim.symbol("t"), Dim.symbol("n")
    builder = Builder("attention")
    with builder:
        q, k, v, g = (builder.parameter(TensorType(f32, (n, t, 2, 8))) for _ in range(4))
        out, lse = ops.attention(q, k, v, causal=True, scale=0.5)
        delta = nd.sum(out * g, 3)
        grads = ops.attention_gradient(q, k, v, lse, delta, g, causal=True, scale=0.5)
    function = builder.build([out, *grads])
    executable, machine = compile_function(function, backend()), backend()
    for sizes in ({"n": 2, "t": 70}, {"n": 3, "t": 5}, {"n": 2, "t": 128}):
        rng = np.random.default_rng(sizes["t"])
        arrays = [rng.standard_normal((sizes["n"], sizes["t"], 2, 8)).astype(np.float32) for _ in range(4)]
        results = executable.bind(sizes).run([machine.from_numpy(a) for a in arrays])
        for result, w, r in zip(results, interpret(function, *arrays), function.results):
            assert same(machine.to_numpy(result, f32, r.type.static_shape(sizes)), np.asarray(w))
