"""Templates on the CPU: kernels compiled for any sizes give the bits of kernels compiled for one, and are compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import conformance as c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_programs import programs

import duo
import duo.functional as F
from duo import runtime
from duo.eager import flush as flushing
from duo_backends.cpu.backend import CpuBackend
from duo_ir import ops
from duo_ir.core import Function, Value, function_of
from duo_ir.interpret import interpret
from duo_ir.kernels.fuse import fuse
from duo_ir.kernels.generic import generalize_program
from duo_ir.kernels.plan import plan
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import compile as compile_function
from duo_ir.pipeline import lower
from duo_ir.transforms.simplify import simplify
from duo_ir.types import DType, TensorType, bf16, f16, f32, f64, i8, i64
from tests.frontends.models import Transformer

FLOATS = (f32, f64, f16, bf16)


def numbers(*shapes: tuple[int, ...], dtype: DType = f32) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.asarray(rng.normal(size=s) * 3).astype(dtype.numpy) for s in shapes]


def check(
    fn: Callable[..., Any] | Function,
    *arrays: np.ndarray,
    cpu: str | None = None,
    fusions: tuple[bool, ...] = (False, True),
) -> None:
    """The templates of the unfused and of the fused kernels give the interpreter's bits on one thread and two."""
    function = fn if isinstance(fn, Function) else function_of(fn, *c.types_of(arrays))
    want = interpret(function, *arrays)
    machine = c.backend(cpu)
    for fusion in fusions:
        program = generalize_program(plan(fuse(simplify(function), fusion), fusion=fusion))
        with c.every_phase_split():
            bound = machine.compile(program).bind({})
        for threads in (1, 2):
            with c.thread_count(threads):
                for w, g in zip(want, c.run_once(machine, function, bound, arrays), strict=True):
                    assert c.same(g, w), f"fusion={fusion}, {threads} threads: {c.difference(g, w)}"


# ---------------------------------------------------------------------------------------------------------------- bits
EDGES = [1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 65]


@pytest.mark.parametrize("dtype", [f32, f64, bf16, i8], ids=lambda d: d.name)
def test_matmul(dtype: DType) -> None:
    rng = np.random.default_rng(1)
    sizes = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (2, 2, 2), (14, 32, 512), (15, 33, 513), (29, 65, 1025), (280, 270, 5)]
    sizes += [tuple(int(v) for v in rng.choice(EDGES, 3)) for _ in range(5)]
    if dtype is f32:
        sizes.append((2, 3, 16385))
    for m, n, k in sizes:
        x, y, z = numbers((m, k), (k, n), (n, k), dtype=dtype)
        check(
            lambda a, b, d: (
                nd.matmul(a, b),
                nd.matmul(a, nd.swap_last(d)),
                nd.matmul(nd.swap_last(b), nd.swap_last(a)),
            ),
            x,
            y,
            z,
            fusions=(False,),
        )


@pytest.mark.parametrize("n, k", [(2, 2), (15, 3), (16, 4), (33, 17), (70, 515)])
def test_one_row_of_a_transposed_matrix(n: int, k: int) -> None:
    """B is transposed on the fly, with a stride known at run time only."""

    def fn(row: Value, whole: Value, part: Value) -> tuple[Value, Value]:
        part = ops.slice(part, start=(1, k), stop=(n + 1, 2 * k), step=(1, 1))
        return nd.matmul(row, nd.swap_last(whole)), nd.matmul(row, nd.swap_last(part))

    for dtype in (f32, f64, bf16, i8):
        check(fn, *numbers((1, k), (n, k), (n + 3, 2 * k), dtype=dtype), fusions=(False,))


@pytest.mark.parametrize("batch", [(2, 3), (5, 1), (0, 2)], ids=str)
def test_batched_matmul_of_views(batch: tuple[int, ...]) -> None:
    for t, d in ((7, 4), (33, 16), (2, 65)):
        (x,) = numbers((batch[0], t, 3, max(batch[1], 1), d))

        def attention(v: Value, t: int = t, d: int = d) -> Value:
            q, k, w = (nd.transpose(nd.reshape(ops.slice(v, start=(0, 0, i, 0, 0), stop=(*v.type.shape[:2], i + 1, *v.type.shape[3:]), step=(1,) * 5), (v.type.shape[0], t, v.type.shape[3], d)), (0, 2, 1, 3)) for i in range(3))  # fmt: skip
            return nd.matmul(nd.matmul(q, nd.swap_last(k)), w)

        check(attention, x)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(1, 1), (17, 16), (5, 1025), (1025, 5), (600, 70)], ids=str)
def test_reductions(shape: tuple[int, int], dtype: DType) -> None:
    (x,) = numbers(shape, dtype=dtype)

    def fn(v: Value) -> tuple[Value, ...]:
        return (
            nd.sum(v, 0), nd.sum(v, 1), nd.sum(v), nd.max(v, 0), nd.max(v, 1),
            ops.argmax(v, axes=(0,)), ops.argmax(v, axes=(1,)), ops.cumsum(v, axis=0), ops.cumsum(v, axis=1),
        )  # fmt: skip

    check(fn, x)


def test_splits_and_threads_do_not_enter() -> None:
    (x,) = numbers((3, 70001))
    check(lambda v: (nd.sum(v), nd.sum(v, 1), nd.sum(v, 0), nd.sum(nd.transpose(v, (1, 0)), 0)), x)


@given(programs(f32))
@settings(max_examples=25)
def test_random_programs(case: tuple[Function, list[np.ndarray]]) -> None:
    check(case[0], *case[1])


@given(st.sampled_from(["native/16", "native/32"]), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=8)
def test_other_vector_widths(cpu: str, n: int, k: int) -> None:
    x, w = numbers((n, k), (k + 1, k))
    check(
        lambda a, b: (nd.sum(F.softmax(nd.matmul(a, nd.swap_last(b)), -1), 0), nd.transpose(a, (1, 0))), x, w, cpu=cpu
    )


def test_updates_by_index() -> None:
    for n, width, count in ((5, 3, 9), (40, 17, 3), (2, 2, 2)):
        x, updates = numbers((n, width), (count, width))
        at = np.random.default_rng(0).integers(0, n, count)
        check(
            lambda a, u, i: (ops.scatter(a, u, i, axes=(0,), mode="add"), ops.gather(a, i, axes=(0,))), x, updates, at
        )


def test_an_index_out_of_range_names_the_real_size() -> None:
    machine = CpuBackend()
    for n, width in ((5, 3), (9, 4)):
        types = TensorType(f32, (n, width)), TensorType(i64, (2,))
        function = function_of(lambda x, i: ops.gather(x, i, axes=(0,)), *types)
        bound = compile_function(function, machine, fusion=False).bind({})
        with pytest.raises(IndexError, match=f"index 17 is out of range .* {n}"):
            c.run_once(machine, function, bound, [*numbers((n, width)), np.array([1, 17])])
    assert machine.compile_count == 1


# -------------------------------------------------------------------------------------------------------------- counts
def network(x: Value, w1: Value, b1: Value, w2: Value) -> Value:
    h = F.layer_norm(F.gelu(F.linear(x, w1, b1)), (w1.type.shape[0],))
    return F.softmax(F.linear(h, w2), -1)


def test_other_sizes_compile_nothing() -> None:
    machine = CpuBackend()
    counts = []
    for n, d, h, k in ((3, 5, 7, 4), (17, 5, 7, 4), (64, 5, 7, 9), (2, 33, 7, 10)):
        types = [TensorType(f32, s) for s in ((n, d), (h, d), (h,), (k, h))]
        compile_function(function_of(network, *types), machine, fusion=False)
        counts.append(machine.compile_count)
    assert counts[0] == counts[-1]
    assert len({id(kernel) for kernel in machine._kernels}) == counts[0]


def test_fused_programs_are_compiled_for_their_sizes() -> None:
    program = lower(function_of(network, *[TensorType(f32, s) for s in ((3, 5), (7, 5), (7,), (4, 7))]))
    assert all(item.kernel.dims == () for item in program.items)  # type: ignore[union-attr]


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch) -> Iterator[CpuBackend]:
    """The backend of eager mode, which runs a path op by op when it is new."""
    monkeypatch.setattr(flushing, "FUSE_AT_ONCE", False)
    runtime.clear_cache()
    yield runtime.backend()
    runtime.clear_cache()


def test_new_batch_sizes_and_lengths_compile_nothing(tiers: CpuBackend) -> None:
    duo.manual_seed(0)
    model = Transformer(words=11, width=12, time=24, heads=3)
    model.eval()
    rng = np.random.default_rng(0)

    def run(batch: int, time: int) -> np.ndarray:
        tokens = duo.tensor(rng.integers(0, 11, (batch, time)))
        with duo.no_grad():
            x = model.embed(tokens) + model.place[:time]
            return model.head(model.norm(model.block(x))).numpy()

    run(3, 5), run(4, 6), run(1, 5), run(3, 1), run(3, 12), run(4, 24)
    before, fused = tiers.compile_count, runtime.statistics.fused
    for batch, time in [(2, 9), (5, 7), (6, 17), (7, 11), (9, 23), (13, 5), (2, 19), (11, 14)]:
        run(batch, time)
    assert tiers.compile_count - before <= 3  # where two sizes meet by chance another template may arise
    assert runtime.statistics.fused == fused


def test_only_a_path_seen_again_is_compiled_as_a_whole(tiers: CpuBackend) -> None:
    def step(n: int) -> np.ndarray:
        x = duo.tensor(np.arange(3 * n, dtype=np.float32).reshape(n, 3))
        return (x * 2.0 - x.sum()).exp().numpy()

    start = runtime.statistics.fused
    first = {n: step(n) for n in range(2, 40)}
    assert runtime.statistics.fused == start
    assert c.same(step(7), first[7])
    assert runtime.statistics.fused == start + 1
    assert c.same(step(7), first[7]) and runtime.statistics.fused == start + 1
