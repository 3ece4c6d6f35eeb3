"""Programs on the CUDA backend, on the emulated GPU: the bits of `duo_ir.kernels.evaluate`, control flow, donation, numbers, checks, graphs."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import conformance as c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_programs import programs

from duo_backends.cuda import bound as bounds
from duo_backends.cuda.backend import CudaBackend
from duo_ir import ops
from duo_ir.core import Function, Value, bind_dims, function_of
from duo_ir.errors import ArgumentError, DeviceError, IndexOutOfRange
from duo_ir.kernels.evaluate import evaluate
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import lower
from duo_ir.types import Dim, TensorType, bf16, bool_, f16, f32, f64, i64
from tests.cuda_emulator import build
from tests.cuda_emulator.support import ORDERS, driver, driver_name, every_order, needs_emulator

pytestmark = needs_emulator


@pytest.fixture(scope="module", params=["exact", "arena"])
def gpu(request):
    """`exact`: every buffer and temporary is an allocation of its own, so that an access past its end is caught."""
    yield CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), exact=request.param == "exact")
    gc.collect()


@pytest.fixture(scope="module")
def arena():
    return CudaBackend(driver=driver(), compiler=build.EmulatorCompiler())


def run(
    gpu: CudaBackend, bound: Any, types: Sequence[TensorType], inputs: Sequence[Any], donated: Any = ()
) -> list[np.ndarray]:
    """The results, whose types are `types`, for arrays and Python numbers."""
    given = [x if type(x) in (int, float, bool) else gpu.from_numpy(np.asarray(x)) for x in inputs]
    out = bound.run(given, donated)
    return [gpu.to_numpy(b, t.dtype, t.static_shape({})) for b, t in zip(out, types)]


def check(
    gpu: CudaBackend, function: Function | Callable[..., Any], *runs: Sequence[np.ndarray], fusion: bool = True
) -> None:
    """The program gives the reference's bits for each list of arrays, three times: by launches, captured, and replayed."""
    if not isinstance(function, Function):
        function = function_of(function, *c.types_of(runs[0]))
    program = lower(function, fusion)
    executable = gpu.compile(program)
    for arrays in runs:
        sizes = bind_dims(function.param_types, [a.shape for a in arrays])
        types = [TensorType(t.dtype, t.static_shape(sizes)) for t in function.result_types]
        want = evaluate(program, *arrays)
        bound = executable.bind(sizes)
        for k in range(3):
            for n, (got, expected) in enumerate(zip(run(gpu, bound, types, arrays), want, strict=True)):
                assert c.same(got, expected), f"result {n} of run {k}: {c.difference(got, expected)}"


def numbers(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape)).astype("f4") for shape in shapes]


# ------------------------------------------------------------------------------------------------------------------- bits
@every_order
@pytest.mark.parametrize("fusion", [True, False])
def test_small_programs_under_every_schedule(gpu, order, fusion, monkeypatch):
    monkeypatch.setenv("DUO_EMU_ORDER", order)

    def network(x: Value, w: Value, b: Value) -> tuple[Value, ...]:
        h = ops.tanh(nd.matmul(x, w) + b)
        e = ops.exp(h - nd.max(h, axes=(1,), keepdims=True))
        return e / nd.sum(e, axes=(1,), keepdims=True), nd.sum(h * h), ops.transpose(h, permutation=(1, 0))

    check(gpu, network, numbers((7, 33), (33, 10), (10,)), fusion=fusion)


def test_symbolic_sizes_take_any_batch(gpu):
    b = Dim.symbol("b")
    function = function_of(
        lambda x, y: (nd.sum(x * y, axes=(1,)), x + 1.0), TensorType(f32, (b, 5)), TensorType(f32, (b, 5))
    )
    check(gpu, function, *[numbers((n, 5), (n, 5)) for n in (0, 1, 2, 63)])


def test_special_values_and_dtypes(gpu):
    for dtype in (f16, f32, f64):
        x = c.specials(dtype)
        check(gpu, lambda x: (ops.exp(x), x * 0.5 + 1.0, ops.sqrt(x)), [x])
    check(gpu, lambda x: (x * x + 3, ops.lt(x, x * 2)), [c.specials(i64)])


def test_empty_programs_and_results(gpu):
    (x,) = numbers((3, 4))
    check(gpu, lambda x: (x,), [x])
    check(gpu, lambda x: (ops.reshape(x, shape=(12,)), x, x + 1.0), [x])
    check(gpu, lambda x: (nd.sum(x, axes=(0,)), x * 2.0), [np.zeros((0, 4), "f4")])
    check(gpu, lambda: (nd.constant_of(2.5, f32),), [])


@given(data=st.data())
@settings(max_examples=12)
def test_random_programs(gpu, data):
    function, arrays = data.draw(programs(data.draw(st.sampled_from((f32, f64, f16, bf16)))))
    os.environ["DUO_EMU_ORDER"] = data.draw(st.sampled_from(ORDERS))
    try:
        check(gpu, function, arrays, fusion=data.draw(st.booleans()))
    finally:
        del os.environ["DUO_EMU_ORDER"]


# ----------------------------------------------------------------------------------------------------------- control flow
@every_order
def test_control_flow(gpu, order, monkeypatch):
    monkeypatch.setenv("DUO_EMU_ORDER", order)
    x, y = numbers((3, 5), (3, 5))

    def inner(x: Value, y: Value) -> tuple[Value, ...]:
        then = function_of(lambda a, b: (ops.tanh(a) * b, a), x.type, y.type)
        orelse = function_of(lambda a, b: (a - b, ops.exp(b)), x.type, y.type)
        return ops.cond(nd.gt(nd.sum(x), 0.0), x, y, then=then, orelse=orelse)

    def looped(n: Value, x: Value, y: Value) -> tuple[Value, ...]:
        types = [n.type, n.type, x.type, y.type]
        test = function_of(lambda i, n, x, y: nd.lt(i, n), *types)
        body = function_of(lambda i, n, x, y: (i + 1, n, *inner(x, y)), *types)
        return ops.while_(nd.constant_of(0, i64), n, x, y, test=test, body=body, carried=4)[2:]

    check(gpu, looped, *[[np.asarray(n, np.int64), x, y] for n in (0, 1, 5)])
    then, orelse = (function_of(f, x_type(x), x_type(y)) for f in (lambda a, b: nd.sum(a * b), lambda a, b: nd.max(a)))
    function = function_of(
        lambda p, a, b: ops.cond(p, a, b, then=then, orelse=orelse), TensorType(bool_), x_type(x), x_type(y)
    )
    check(gpu, function, [np.asarray(True), x, y], [np.asarray(False), x, y])


def x_type(x: np.ndarray) -> TensorType:
    return c.types_of([x])[0]


# ------------------------------------------------------------------------------------------------- numbers, donation, threads
def test_python_numbers_change_from_run_to_run(gpu):
    """Twenty of them, so more than one launch brings; the graphs of a run keep. Nothing waits between runs."""
    (x,) = numbers((4,))
    scalars = list(range(1, 21))
    function = function_of(
        lambda x, *s: tuple([x * v for v in s[:3]] + [s[19]] + [sum(s[1:], s[0])]), x_type(x), *[TensorType(f32)] * 20
    )
    program = lower(function)
    bound = gpu.compile(program, scalars).bind()
    given = gpu.from_numpy(x)
    runs = []
    for k in range(5):
        values = [0.5 * k + n for n in range(20)]
        runs.append((values, bound.run([given, *values])))
    for values, out in runs:
        want = evaluate(program, x, *[np.asarray(v, "f4") for v in values])
        for b, w in zip(out, want):
            assert c.same(gpu.to_numpy(b, f32, w.shape), w)
    integer = gpu.compile(lower(function_of(lambda n: n + 1, TensorType(i64))), [0]).bind()
    assert gpu.to_numpy(integer.run([-7])[0], i64, ()) == -6
    with pytest.raises(ArgumentError, match="does not fit i64"):
        integer.run([1 << 63])


def test_results_take_the_memory_of_inputs_given_away(gpu):
    w, g = numbers((50,), (50,))
    function = function_of(lambda w, g: (w - g * 0.1, nd.sum(w)), x_type(w), x_type(g))
    program = lower(function)
    bound = gpu.compile(program).bind()
    want = evaluate(program, w, g)
    assert 0 in bound.givable
    a, b = gpu.from_numpy(w), gpu.from_numpy(g)
    call = bound.begin([a, b], (0,))
    assert not call.done and call.results[0] is a
    assert call.run() is call.results and call.done
    call.close()
    assert all(c.same(gpu.to_numpy(r, f32, v.shape), v) for r, v in zip(call.results, want))
    assert bound.run([b, b], (0,))[0] is not b  # it is seen twice
    b.shared = True
    assert bound.run([b, a], (0,))[0] is not b
    with pytest.raises(ArgumentError, match="takes 2 inputs"):
        bound.run([a])
    with pytest.raises(ArgumentError, match=r"needs a buffer of 200 bytes on the GPU"):
        bound.run([a, g])


def test_threads_share_the_stream(arena):
    (x,) = numbers((1000,))
    function = function_of(lambda x: (nd.sum(ops.exp(x) * x), ops.exp(x)), x_type(x))
    program = lower(function, False)
    bound = arena.compile(program).bind()
    want = evaluate(program, x)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(10):
            got = run(arena, bound, [TensorType(f32), x_type(x)], [x])
            wrong.extend(c.difference(g, w) for g, w in zip(got, want) if not c.same(g, w))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ------------------------------------------------------------------------------------------------------------- checks
def gathering() -> Function:
    def function(x: Value, index: Value, w: Value) -> tuple[Value, ...]:
        rows = ops.gather(x, index, axes=(0,))
        sums = nd.sum(rows, axes=(1,))
        return (w - nd.sum(sums) * 0.5, sums)

    return function_of(function, TensorType(f32, (6, 4)), TensorType(i64, (3,)), TensorType(f32, (40,)))


@every_order
def test_an_index_out_of_range_is_told_when_somebody_waits(gpu, order, monkeypatch):
    monkeypatch.setenv("DUO_EMU_ORDER", order)
    x, w = numbers((6, 4), (40,))
    good, bad = np.array([0, 5, 3]), np.array([1, 6, -9])
    check(gpu, gathering(), [x, good, w])
    bound = gpu.compile(lower(gathering())).bind()
    first = bound.run([gpu.from_numpy(a) for a in (x, bad, w)])  # nobody waits
    with pytest.raises(IndexOutOfRange, match="gather: index 6 is out of range for axis 0"):
        gpu.to_numpy(first[1], f32, (3,))
    gpu.synchronize()  # told once
    bound.run([gpu.from_numpy(a) for a in (x, bad, w)])
    bound.run([gpu.from_numpy(a) for a in (x, good, w)])
    with pytest.raises(IndexOutOfRange):
        gpu.synchronize()
    monkeypatch.setenv("DUO_SYNC", "1")
    with pytest.raises(IndexOutOfRange):
        bound.run([gpu.from_numpy(a) for a in (x, bad, w)])
    gpu.synchronize()


def test_what_depends_on_a_bad_index_raises_every_time(gpu):
    """A result, what is computed from it before anybody knows and after, and copies; nothing else of the run."""

    def looked_up(x, index, y):
        return ops.gather(x, index, axes=(0,)) * 2.0, y + 1.0

    def joined(a, y, x):
        return nd.sum(a) + y, x * 2.0

    types = [TensorType(f32, (6,)), TensorType(i64, (3,)), TensorType(f32, (4,))]
    first = gpu.compile(lower(function_of(looked_up, *types))).bind()
    second = gpu.compile(lower(function_of(joined, TensorType(f32, (3,)), types[2], types[0]))).bind()
    x, y = numbers((6,), (4,))
    for index in ([0, 6, 2], [-1, 0, 0]):
        bad, fine = first.run([gpu.from_numpy(a) for a in (x, np.array(index), y)])
        later, also_fine = second.run([bad, fine, gpu.from_numpy(x)])
        twice, _ = second.run([gpu.from_numpy(x[:3]), later, gpu.from_numpy(x)])
        over, _ = second.begin([bad, later, gpu.from_numpy(x)], (1,)).run()
        copied = gpu.runtime.duplicate(bad)
        with pytest.raises(IndexOutOfRange, match="gather: index"):
            gpu.synchronize()
        for _ in range(2):
            for buffer in (bad, later, twice, over, copied):
                with pytest.raises(IndexOutOfRange, match="gather: index"):
                    gpu.to_numpy(buffer, f32, (3,))
            assert c.same(gpu.to_numpy(fine, f32, (4,)), y + np.float32(1))
            assert c.same(gpu.to_numpy(also_fine, f32, (6,)), x * np.float32(2))
        with pytest.raises(IndexOutOfRange, match="gather: index"):
            second.run([bad, fine, also_fine])
    good, fine = first.run([gpu.from_numpy(a) for a in (x, np.array([0, 5, 2]), y)])
    third, _ = second.run([good, fine, also_fine])
    assert third.fault is not None
    assert gpu.to_numpy(third, f32, (4,)).shape == (4,)
    second.run([good, third, also_fine])
    assert good.fault is None and third.fault is None  # what has turned out well is forgotten


def test_a_failed_run_leaves_what_was_given_away_as_it_was(gpu):
    x, w = numbers((6, 4), (40,))
    bound = gpu.compile(lower(gathering())).bind()
    assert 2 in bound.givable
    for index, fails in (([0, 1, 2], False), ([0, 6, 2], True), ([5, 1, 2], False)):
        buffers = [gpu.from_numpy(a) for a in (x, np.array(index), w)]
        call = bound.begin(buffers, (2,))
        assert call.results[0] is buffers[2]
        if fails:
            with pytest.raises(IndexOutOfRange):
                call.run()
            assert not call.done and c.same(gpu.to_numpy(buffers[2], f32, (40,)), w)
        else:
            call.run()
            assert c.same(
                gpu.to_numpy(call.results[0], f32, (40,)), evaluate(lower(gathering()), x, np.array(index), w)[0]
            )


# ------------------------------------------------------------------------------------------------------------- graphs, errors
def test_a_second_run_on_the_same_buffers_is_a_graph(arena):
    x, y = numbers((64,), (64,))
    function = function_of(lambda x, y: (nd.sum(ops.exp(x) * y), ops.exp(x) - y, ops.tanh(y)), x_type(x), x_type(y))
    program = lower(function, False)
    bound = arena.compile(program).bind()
    want = evaluate(program, x, y)
    a, b = arena.from_numpy(x), arena.from_numpy(y)
    counts = []
    for _ in range(5):
        before = arena.runtime.launches, arena.runtime.replays
        out = bound.run([a, b])
        counts.append((arena.runtime.launches - before[0], arena.runtime.replays - before[1]))
        for r, w in zip(out, want):
            assert c.same(arena.to_numpy(r, f32, w.shape), w)
        del out, r
    launches = counts[0][0]
    assert launches >= bounds.GRAPH_LEAST
    assert counts[0] == (launches, 0) and counts[1] == (launches, 1) and counts[2:] == [(0, 1)] * 3
    other = arena.from_numpy(y + 1)  # other addresses: other words
    for r, w in zip(bound.run([a, other]), evaluate(program, x, y + 1)):
        assert c.same(arena.to_numpy(r, f32, w.shape), w)


def test_many_sets_of_addresses_are_forgotten(arena):
    (x,) = numbers((16,))
    bound = arena.compile(lower(function_of(lambda x: (x + 1.0,), x_type(x)))).bind()
    kept = [arena.from_numpy(x + n) for n in range(2 * bounds.PLACEMENTS)]
    for n, buffer in enumerate(kept):
        (out,) = bound.run([buffer])
        assert c.same(arena.to_numpy(out, f32, (16,)), x + np.float32(n) + np.float32(1))
    assert len(bound._placements) == bounds.PLACEMENTS


def test_kernels_are_compiled_once(arena):
    (x,) = numbers((10,))
    program = lower(function_of(lambda x: (ops.exp(x) + 3.0,), x_type(x)))
    arena.compile(program)
    before = arena.compile_count
    arena.compile(program)
    assert arena.compile_count == before and arena.loaded_count > 0


def test_a_source_for_each_kernel():
    """What NVRTC is given: several modules, compiled side by side."""
    compiler = build.EmulatorCompiler()
    compiler.unit = 1
    gpu = CudaBackend(driver=driver(), compiler=compiler)
    x, y = numbers((5, 8), (8, 3))
    check(gpu, lambda x, y: (ops.tanh(nd.matmul(x, y)), nd.sum(x * x, axes=(0,)), ops.exp(y)), [x, y], fusion=False)
    assert len({id(kernel.module) for kernel in gpu._kernels.values()}) == gpu.compile_count > 3


def test_a_fault_of_the_device_is_an_error_of_duo(arena):
    """A buffer that says it is longer than it is stands for a kernel with a fault."""
    gpu = CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), exact=True)
    (x,) = numbers((1000,))
    bound = gpu.compile(lower(function_of(lambda x: (x + 1.0,), x_type(x)))).bind()
    short = gpu.from_numpy(x[:500])
    short.nbytes = 4000
    bound.run([short])
    with pytest.raises(DeviceError, match="past the end of an allocation of 2000 bytes"):
        gpu.synchronize()


def test_memory_given_back_ends_graphs(arena):
    (x,) = numbers((1 << 19,))
    program = lower(function_of(lambda x: (ops.exp(x), x * 2.0, nd.max(x)), x_type(x)), False)
    bound = arena.compile(program).bind()
    want = evaluate(program, x)
    for _ in range(2):
        for _ in range(3):
            got = run(arena, bound, [x_type(x), x_type(x), TensorType(f32)], [x])
            assert all(c.same(g, w) for g, w in zip(got, want))
        assert arena.runtime.pool.trim() > 0


def test_a_forked_child_is_told_that_it_cannot_use_the_gpu(arena):
    if driver_name() != "PyCUDA":
        pytest.skip("PyCUDA's driver looks for this")
    child = os.fork()
    if child == 0:
        try:
            arena.from_numpy(np.zeros(3))
        except DeviceError as error:
            os._exit(0 if "spawn" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_nothing_of_cuda_is_touched_before_it_is_needed():
    backend = CudaBackend(driver=None)  # there need not be a GPU
    assert "driver" not in vars(backend) and "runtime" not in vars(backend)
