"""The CPU runtime with hand-written kernels: calls, control flow, threads, errors, donation, fork, the disk cache."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from duo_backends import flat
from duo_backends.cache import DiskCache
from duo_backends.cpu import jit
from duo_backends.cpu.backend import CpuBackend
from duo_backends.cpu.code import SIGNATURE, KernelCode, Phase, no_scratch
from duo_backends.cpu.memory import Buffer
from duo_backends.cpu.threads import get_num_threads, set_num_threads
from duo_ir.errors import ArgumentError, DeviceError, IndexOutOfRange
from duo_ir.kernels.kernel import Arg, LoopKernel
from duo_ir.kernels.program import Cond, Copy, Program, Step, Temp, While
from duo_ir.types import Dim, TensorType, bf16, bool_, dtype, f16, f32, f64, i8, i32, i64, u8

N = Dim.symbol("n")
LLVM = {"f32": "float", "f64": "double", "i64": "i64", "i32": "i32"}


def loop(symbol: str, types: str, body: str) -> str:
    """A phase that runs `body` for %i in [begin, end); %a0.. are the argument pointers."""
    heads = "".join(
        f"  %h{k} = getelementptr ptr, ptr %args, i64 {k}\n  %a{k} = load ptr, ptr %h{k}\n" for k in range(len(types))
    )
    return f"""
define void @{symbol}({SIGNATURE}) #0 {{
entry:
{heads}  %some = icmp slt i64 %begin, %end
  br i1 %some, label %loop, label %exit
loop:
  %i = phi i64 [ %begin, %entry ], [ %next, %tail ]
{body}
  br label %tail
tail:
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %end
  br i1 %more, label %loop, label %exit
exit:
  ret void
}}
"""


ADD = """
  %p = getelementptr float, ptr %a0, i64 %i
  %q = getelementptr float, ptr %a1, i64 %i
  %x = load float, ptr %p, align 4
  %y = fadd float %x, 1.0
  store float %y, ptr %q, align 4"""
MIX = """
  %p = getelementptr float, ptr %a0, i64 %i
  %q = getelementptr float, ptr %a1, i64 %i
  %r = getelementptr float, ptr %a2, i64 %i
  %x = load float, ptr %p, align 4
  %y = load float, ptr %q, align 4
  %z = fsub float %x, %y
  store float %z, ptr %r, align 4"""
CHECK = """
  %p = getelementptr i64, ptr %a0, i64 %i
  %x = load i64, ptr %p
  %n = load i64, ptr %dims
  %bad = icmp uge i64 %x, %n
  %first = load i64, ptr %status
  %clean = icmp eq i64 %first, 0
  %report = and i1 %bad, %clean
  br i1 %report, label %oops, label %tail
oops:
  store i64 1, ptr %status
  %s1 = getelementptr i64, ptr %status, i64 1
  store i64 %x, ptr %s1
  %s2 = getelementptr i64, ptr %status, i64 2
  store i64 %n, ptr %s2"""
LESS = """
  %x = load i64, ptr %a0
  %y = load i64, ptr %a1
  %c = icmp slt i64 %x, %y
  %b = zext i1 %c to i8
  store i8 %b, ptr %a2"""
INC = """
  %x = load i64, ptr %a0
  %y = add i64 %x, 1
  store i64 %y, ptr %a1"""
COPY8 = """
  %x = load i64, ptr %a0
  store i64 %x, ptr %a1"""


class Codes(CpuBackend):
    """A backend whose kernels are given as text."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: dict[LoopKernel, KernelCode] = {}

    def emit(self, kernel):
        return self.codes[kernel]

    def kernel(self, body, types, units=1, cost=10.0, sizes=(), sites=(), tag=0, scratch=no_scratch, phases=1):
        name = f"test_{len(self.codes)}_{tag}"
        args = tuple(Arg(dtype(t), 1, output=k == len(types) - 1) for k, t in enumerate(types))
        dims = ("n",) if units is N else ()
        k = LoopKernel(args, (len(self.codes), tag), (), dims, tuple(sites))
        count = (lambda s: s["n"]) if units is N else (lambda s: units)
        symbols = [f"{name}_{p}" for p in range(phases)]
        text = "".join(loop(s, types, body) for s in symbols)
        self.codes[k] = KernelCode(text, tuple(Phase(s, count) for s in symbols), scratch, lambda s: cost)
        return k


@pytest.fixture
def backend():
    return Codes()


@pytest.fixture(autouse=True)
def threads():
    before = get_num_threads()
    yield
    set_num_threads(before)


def buffer(values, t=f32):
    return CpuBackend.from_numpy(None, np.asarray(values, t.numpy))


def values(b, t=f32, shape=None):
    return b.read(t, (b.nbytes // t.itemsize,) if shape is None else shape)


def vec(t=f32, n=N):
    return TensorType(t, (n,))


def add_one(backend, **options):
    return backend.kernel(ADD, ["f32", "f32"], units=N, **options)


def chain(backend, length, **options):
    """x + length, through temporaries."""
    k = add_one(backend, **options)
    slots = [0, *range(2, length + 1), 1]
    items = tuple(Step(k, (slots[i], slots[i + 1])) for i in range(length))
    temps = tuple(Temp(N * 4, i, i + 1) for i in range(length - 1))
    return Program((vec(),), (vec(),), temps, items, (1,), ((0, 0),), ("n",))


@pytest.mark.parametrize("n", [0, 1, 5, 1000])
def test_step(backend, n):
    bound = backend.compile(chain(backend, 1)).bind({"n": n})
    (out,) = bound.run([buffer(np.arange(n))])
    assert np.array_equal(values(out), np.arange(n, dtype=np.float32) + 1)


def test_bind_is_cached_and_checks_sizes(backend):
    executable = backend.compile(chain(backend, 1))
    assert executable.bind({"n": 3}) is executable.bind({"n": 3})
    assert executable.bind({"n": 3}) is not executable.bind({"n": 4})
    with pytest.raises(ArgumentError, match="missing"):
        executable.bind({})
    with pytest.raises(ArgumentError, match="negative"):
        executable.bind({"n": -1})


def test_kernels_are_compiled_once(backend):
    program = chain(backend, 3)
    backend.compile(program)
    backend.compile(program)
    assert (backend.compile_count, backend.loaded_count) == (1, 1)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_parallel_phases(backend, number):
    set_num_threads(number)
    program = chain(backend, 9, cost=1e6, phases=2)
    bound = backend.compile(program).bind({"n": 1003})
    assert bound.table.parallel
    x = np.random.default_rng(0).standard_normal(1003).astype(np.float32)
    expected = x
    for _ in range(9):
        expected = expected + np.float32(1)
    for _ in range(50):
        assert np.array_equal(values(bound.run([buffer(x)])[0]), expected)


def test_set_num_threads_between_calls(backend):
    seen = []

    def scratch(sizes, threads):
        seen.append(threads)
        return 64 * threads

    bound = backend.compile(chain(backend, 4, cost=1e6, scratch=scratch)).bind({"n": 64})
    for number in (1, 4, 2, 5):
        set_num_threads(number)
        assert np.array_equal(values(bound.run([buffer(np.zeros(64))])[0]), np.full(64, 4, np.float32))
        assert seen[-1] == number
    with pytest.raises(ArgumentError):
        set_num_threads(0)


def test_concurrent_callers(backend):
    set_num_threads(2)
    bound = backend.compile(chain(backend, 6, cost=1e6)).bind({"n": 257})
    problems = []

    def work(seed):
        x = np.random.default_rng(seed).integers(-100, 100, 257).astype(np.float32)
        for _ in range(200):
            if not np.array_equal(values(bound.run([buffer(x)])[0]), x + 6):
                problems.append(seed)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not problems


def test_arena_is_reused(backend):
    bound = backend.compile(chain(backend, 20)).bind({"n": 1024})
    assert bound.table.arena == 2 * 4096


@pytest.mark.parametrize("seed", range(20))
def test_pack_keeps_lifetimes_apart(seed):
    rng = np.random.default_rng(seed)
    spans = [(int(rng.integers(0, 3000)), int(a), int(a + rng.integers(0, 9))) for a in rng.integers(0, 30, 60)]
    offsets, total = flat.pack(spans)
    for i, (n, a, b) in enumerate(spans):
        assert offsets[i] % 64 == 0 and offsets[i] + n <= total
        for j, (m, c, d) in enumerate(spans[:i]):
            if n and m and a <= d and c <= b:
                assert offsets[i] + n <= offsets[j] or offsets[j] + m <= offsets[i]


def test_pack_finds_the_smallest_arena_of_several_orders():
    """No arena is smaller than the largest live set, and none larger than if the largest had been placed first."""
    rng = np.random.default_rng(0)
    best = 0
    for _ in range(40):
        spans = [(64 * int(rng.integers(1, 9)), int(a), int(a + rng.integers(0, 6))) for a in rng.integers(0, 12, 14)]
        spans = [(n << 14, a, b) for n, a, b in spans]
        size, first, last = (np.array(column) for column in zip(*spans))
        total, least = flat.pack(spans)[1], flat.largest_live_set(size, first, last)
        assert least == max(sum(n for n, a, b in spans if a <= t <= b) for t in range(18))
        largest = sorted(range(len(spans)), key=lambda i: (-size[i], first[i]))
        alone = int((flat._placed(largest, size, first, last) + size).max())
        assert least <= total <= alone
        best += total < alone
    assert best > 3


def mix_program(backend, donations):
    k = backend.kernel(MIX, ["f32", "f32", "f32"], units=N)
    return Program((vec(), vec()), (vec(),), (), (Step(k, (0, 1, 2)),), (2,), donations, ("n",))


def test_donation_takes_the_memory(backend):
    bound = backend.compile(mix_program(backend, ((0, 0), (0, 1)))).bind({"n": 8})
    x, y = buffer(np.arange(8)), buffer(np.ones(8))
    address = y.ptr
    (out,) = bound.run([x, y], donated={1})
    assert out is y and out.ptr == address
    assert np.array_equal(values(out), np.arange(8, dtype=np.float32) - 1)
    assert np.array_equal(values(bound.run([x, out])[0]), np.ones(8, np.float32))


@pytest.mark.parametrize("kind", [tuple, list, set, frozenset])
def test_every_choice_of_donations(backend, kind):
    """x - y and y - x, each of which may take either input's memory."""
    k = backend.kernel(MIX, ["f32", "f32", "f32"], units=N)
    items = (Step(k, (0, 1, 4)), Step(k, (2, 3, 5)))
    program = Program((vec(),) * 4, (vec(),) * 2, (), items, (4, 5), ((0, 0), (0, 1), (1, 2), (1, 3), (1, 2)), ("n",))
    bound = backend.compile(program).bind({"n": 5})
    for choice in [c for n in range(5) for c in itertools.combinations(range(4), n)]:
        given = [buffer(np.full(5, v)) for v in (1, 20, 300, 4000)]
        results = bound.run(given, kind(choice))
        assert [values(r).tolist() for r in results] == [[-19.0] * 5, [-3700.0] * 5]
        reused = (0 in choice or 1 in choice) + (2 in choice or 3 in choice)
        assert sum(any(r is b for b in given) for r in results) == reused
        del results, given


def test_a_call_knows_whether_it_has_run(backend):
    bound = backend.compile(mix_program(backend, ((0, 0),))).bind({"n": 4})
    x, y = buffer(np.arange(4)), buffer(np.ones(4))
    for _ in range(3):
        before = values(x).copy()
        call = bound.begin([x, y], (0,))
        assert not call.done and call.results[0] is x and np.array_equal(values(x), before)
        assert call.run() is call.results and call.done and np.array_equal(values(x), before - 1)


def test_a_failed_call_leaves_its_inputs_as_they_were(backend):
    """y is given away, and its heir is written before the check fails or not at all."""
    check = backend.kernel(CHECK, ["i64", "f32"], units=N, sites=("gather on axis 0",))
    mix = backend.kernel(MIX, ["f32", "f32", "f32"], units=N)
    for items in ((Step(mix, (1, 2, 3)), Step(check, (0, 4))), (Step(check, (0, 4)), Step(mix, (1, 2, 3)))):
        program = Program((vec(i64), vec(), vec()), (vec(), vec()), (), items, (3, 4), ((0, 1),), ("n",))
        bound = backend.compile(program).bind({"n": 10})
        assert bound.givable == (frozenset() if items[1].kernel is check else frozenset({1}))
        index, x, y = np.arange(10), buffer(np.arange(10)), buffer(np.ones(10))
        index[7] = 99999
        call = bound.begin([buffer(index, i64), x, y], (1,))
        with pytest.raises(IndexOutOfRange):
            call.run()
        assert not call.done and np.array_equal(values(x), np.arange(10))


def test_donation_never_takes_memory_that_others_see(backend):
    bound = backend.compile(mix_program(backend, ((0, 0),))).bind({"n": 4})
    array = np.arange(4, dtype=np.float32)
    (out,) = bound.run([Buffer.from_numpy(array), buffer(np.ones(4))], donated=(0,))
    assert np.array_equal(array, np.arange(4)) and np.array_equal(values(out), array - 1)
    x = buffer(array)
    view = x.numpy(f32, (4,))
    bound.run([x, buffer(np.ones(4))], donated=(0,))
    assert np.array_equal(view, array)
    x = buffer(array)
    (out,) = bound.run([x, x], donated=(0,))  # the same buffer twice
    assert np.array_equal(values(x), array) and not values(out).any()


def test_results_may_be_inputs_or_repeat(backend):
    k = add_one(backend)
    program = Program((vec(), vec()), (vec(),), (), (Step(k, (0, 2)),), (1, 2, 2), ((0, 1),), ("n",))
    x, y = buffer(np.zeros(3)), buffer(np.ones(3))
    a, b, c = backend.compile(program).bind({"n": 3}).run([x, y], donated=(0, 1))
    assert a is y and b is c and np.array_equal(values(b), np.ones(3, np.float32))


def test_failed_check(backend):
    k = backend.kernel(CHECK, ["i64", "f32"], units=N, sites=("gather on axis 0",), cost=1e6)
    program = Program((vec(i64),), (vec(),), (), (Step(k, (0, 1), "train.py:14"),), (1,), (), ("n",))
    bound = backend.compile(program).bind({"n": 100})
    good, bad = np.arange(100), np.arange(100)
    bad[[30, 77, 99]] = -5, 1000, 200
    for number in (1, 2, 5):
        set_num_threads(number)
        bound.run([buffer(good, i64)])
        with pytest.raises(IndexOutOfRange, match=r"train\.py:14: gather on axis 0: index -5 .* size 100"):
            bound.run([buffer(bad, i64)])
        bound.run([buffer(good, i64)])


SCALARS = [
    (f32, 1.1), (f64, 1e300), (f32, 1e300), (f32, float("nan")), (f32, -1.0), (f32, -0.0), (f32, 1e-45), (f64, 3),
    (i64, -1), (i64, 2**62), (i32, -(2**31)), (i8, -128), (u8, 255), (bool_, True), (bool_, False), (f16, 1.1),
    (bf16, -2.7), (f16, 1e9),
]  # fmt: skip


@pytest.mark.parametrize("t, value", SCALARS)
def test_scalar_inputs(backend, t, value):
    program = Program((TensorType(t),), (TensorType(t),), (), (Copy(0, 1),), (1, 0))
    copied, itself = backend.compile(program, scalars=[0]).bind().run([value])
    with np.errstate(over="ignore"):
        expected = np.asarray(value, t.numpy)
    for result in (copied, itself):
        assert result.read(t, ()).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "t, value, error", [(i8, 128, ArgumentError), (u8, -1, ArgumentError), (i32, 2**31, ArgumentError)]
)
def test_scalar_out_of_range(backend, t, value, error):
    program = Program((TensorType(t),), (TensorType(t),), (), (Copy(0, 1),), (1,))
    bound = backend.compile(program, scalars=[0]).bind()
    with pytest.raises(error, match="does not fit"):
        bound.run([value])
    with pytest.raises(TypeError):
        bound.run(["x"])
    bound.run([1])


S = TensorType(i64)


def test_cond(backend):
    inc = backend.kernel(INC, ["i64", "i64"])
    plus = Program((S,), (S,), (Temp(8, 0, 1),), (Step(inc, (0, 2)), Step(inc, (2, 1))), (1, 0))
    keep = Program((S,), (), (), (), (0, 0))
    items = (Cond(0, plus, keep, (1,), (2, 3)),)
    program = Program((TensorType(bool_), S), (S, S), (), items, (2, 3))
    bound = backend.compile(program, scalars=(0, 1)).bind()
    for flag, expected in ((True, (12, 10)), (False, (10, 10))):
        assert tuple(int(values(r, i64)[0]) for r in bound.run([flag, 10])) == expected


@pytest.mark.parametrize("donated", [(), ((0, 0),)])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("limit", [-3, 0, 1, 2, 7, 1000])
def test_while(backend, donated, swap, limit):
    """i, a, b := i + 1, b, a (or a, b) while i < limit."""
    less, inc = backend.kernel(LESS, ["i64", "i64", "bool"]), backend.kernel(INC, ["i64", "i64"])
    test = Program((S, S, S, S), (TensorType(bool_),), (), (Step(less, (0, 3, 4)),), (4,))
    body = Program((S, S, S, S), (S,), (), (Step(inc, (0, 4)),), (4, 2, 1) if swap else (4, 1, 2), donated)
    program = Program((S, S, S, S), (S, S, S), (), (While(test, body, (0, 1, 2), (3,), (4, 5, 6)),), (4, 5, 6))
    bound = backend.compile(program, scalars=(0, 1, 2, 3)).bind()
    i, a, b = (int(values(r, i64)[0]) for r in bound.run([0, 5, 6, limit]))
    turns = max(limit, 0)
    assert i == turns and (a, b) == ((6, 5) if swap and turns % 2 else (5, 6))


def test_nested_loops(backend):
    """for i < n: for j < m: total += 1; the inner limit is a constant of the outer loop."""
    less, inc = backend.kernel(LESS, ["i64", "i64", "bool"]), backend.kernel(INC, ["i64", "i64"])
    flag = TensorType(bool_)
    test = Program((S, S, S), (flag,), (), (Step(less, (0, 2, 3)),), (3,))
    inner_body = Program((S, S, S), (S, S), (), (Step(inc, (0, 3)), Step(inc, (1, 4))), (3, 4))
    # outer: carried (i, total), constants (n, m, zero)
    outer_test = Program((S, S, S, S, S), (flag,), (), (Step(less, (0, 2, 5)),), (5,))
    outer_body = Program(
        (S, S, S, S, S), (S, S), (Temp(8, 1, 1),),
        (Step(inc, (0, 5)), While(test, inner_body, (4, 1), (3,), (7, 6))), (5, 6),
    )  # fmt: skip
    items = (While(outer_test, outer_body, (0, 0), (1, 2, 0), (3, 4)),)
    program = Program((S, S, S), (S, S), (), items, (3, 4))
    bound = backend.compile(program, scalars=(0, 1, 2)).bind()
    for n, m in ((0, 3), (3, 0), (4, 5), (1, 1)):
        i, total = (int(values(r, i64)[0]) for r in bound.run([0, n, m]))
        assert (i, total) == (n, n * m)


def test_parallel_loop_is_interruptible_by_other_threads(backend):
    """A long program lets other Python threads run meanwhile."""
    less, inc = backend.kernel(LESS, ["i64", "i64", "bool"]), backend.kernel(INC, ["i64", "i64"])
    test = Program((S, S), (TensorType(bool_),), (), (Step(less, (0, 1, 2)),), (2,))
    body = Program((S, S), (S,), (), (Step(inc, (0, 2)),), (2,))
    program = Program((S, S), (S,), (), (While(test, body, (0,), (1,), (2,)),), (2,))
    bound = backend.compile(program, scalars=(0, 1)).bind()

    def work() -> None:
        running.set()  # whoever waits for it gets the GIL when `run` gives it up
        bound.run([0, 20_000_000])
        over.set()

    for _ in range(20):  # on a busy machine this thread may not get a processor meanwhile
        running, over, ticks = threading.Event(), threading.Event(), 0
        worker = threading.Thread(target=work)
        worker.start()
        running.wait()
        while not over.is_set():
            ticks += 1
        worker.join()
        if ticks > 10:
            return
    pytest.fail("no other thread ran")


@pytest.mark.parametrize("n", [(1 << 20) + 13, (8 << 20) + 13])
def test_large_copy_is_exact(backend, n):
    """Also one that goes past the caches: from memory that is not aligned, to an end within a line."""
    program = Program((vec(),), (vec(),), (), (Copy(0, 1),), (1,), (), ("n",))
    x = np.random.default_rng(1).random(n + 1, np.float32)[1:]
    source = backend.from_numpy(x, copy=False)
    for number in (1, 2, 3):
        set_num_threads(number)
        assert np.array_equal(values(backend.compile(program).bind({"n": n}).run([source])[0]), x)
    assert np.array_equal(values(backend.duplicate(source)), x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_pool_restarts_in_a_forked_child(backend):
    set_num_threads(2)
    bound = backend.compile(chain(backend, 4, cost=1e6)).bind({"n": 500})
    bound.run([buffer(np.zeros(500))])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ok = all(np.all(values(bound.run([buffer(np.zeros(500))])[0]) == 4) for _ in range(20))
            workers = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 2
            code = 0 if ok and workers >= 2 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert np.all(values(bound.run([buffer(np.zeros(500))])[0]) == 4)


@pytest.mark.skipif(jit.machine().target.arch != "x86_64", reason="sets MXCSR")
@pytest.mark.parametrize("number", [1, 3])
def test_denormals_survive_a_caller_that_flushes_them(backend, number):
    set_num_threads(number)
    bound = backend.compile(mix_program_parallel(backend)).bind({"n": 96})
    text = """
define void @set_mxcsr(i32 %v) {
  %c = alloca i32
  store i32 %v, ptr %c
  call void @llvm.x86.sse.ldmxcsr(ptr %c)
  ret void
}
define i32 @get_mxcsr() {
  %c = alloca i32
  call void @llvm.x86.sse.stmxcsr(ptr %c)
  %v = load i32, ptr %c
  ret i32 %v
}
declare void @llvm.x86.sse.ldmxcsr(ptr)
declare void @llvm.x86.sse.stmxcsr(ptr)
"""
    import ctypes

    library = jit.build(text, ("set_mxcsr", "get_mxcsr"), jit.machine())
    set_ = ctypes.PYFUNCTYPE(None, ctypes.c_int32)(library.addresses["set_mxcsr"])
    get = ctypes.PYFUNCTYPE(ctypes.c_int32)(library.addresses["get_mxcsr"])
    x, y = buffer(np.full(96, 1.5e-38)), buffer(np.full(96, 1.4e-38))
    old = get()
    set_(0x1F80 | 0x8040 | 0x6000)  # flush to zero, denormals are zero, round towards zero
    try:
        (out,) = bound.run([x, y])
        kept = get() & 0xFFC0
    finally:
        set_(old)
    assert kept == 0x1F80 | 0x8040 | 0x6000
    assert np.array_equal(values(out), np.full(96, np.float32(1.5e-38) - np.float32(1.4e-38)))


def mix_program_parallel(backend):
    k = backend.kernel(MIX, ["f32", "f32", "f32"], units=N, cost=1e6)
    return Program((vec(), vec()), (vec(),), (), (Step(k, (0, 1, 2)),), (2,), (), ("n",))


def test_inputs_are_checked_on_request(backend, monkeypatch):
    monkeypatch.setenv("DUO_VERIFY", "1")
    bound = backend.compile(chain(backend, 1)).bind({"n": 4})
    with pytest.raises(ArgumentError, match="needs a buffer of 16 bytes"):
        bound.run([buffer(np.zeros(3))])
    with pytest.raises(ArgumentError, match="takes 1 inputs"):
        bound.run([])
    bound.run([buffer(np.zeros(4))])


# ------------------------------------------------------------------------------------------------------------ jit, disk
def test_invalid_text_is_reported():
    with pytest.raises(DeviceError, match="LLVM rejects"):
        jit.object_codes(["define void @f() { nonsense }"], jit.machine())
    with pytest.raises(ArgumentError, match="DUO_CPU"):
        jit.machine("z80")


def test_disk_cache_survives_damage(tmp_path):
    cache = DiskCache(tmp_path / "c")
    assert cache.get("ab" * 32) is None
    cache.put("ab" * 32, b"payload" * 100)
    assert cache.get("ab" * 32) == b"payload" * 100
    (path,) = (tmp_path / "c").glob("??/*")
    data = path.read_bytes()
    for damaged in (data[:-1], data[:10], b"", data[:-1] + b"!", b"x" + data[1:]):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damaged)
        assert cache.get("ab" * 32) is None and not path.exists()
        path.write_bytes(damaged)
        cache.put("ab" * 32, b"new")
        assert cache.get("ab" * 32) == b"new"


def test_disk_cache_is_bounded(tmp_path):
    cache = DiskCache(tmp_path, limit=10_000)
    for i in range(30):
        cache.put(f"{i:064x}", bytes(1000))
        os.utime(next(tmp_path.glob(f"??/{i:062x}.o")), (i, i))
    cache.sweep()
    left = sorted(int(p.stem, 16) for p in tmp_path.glob("??/*"))
    assert sum(p.stat().st_size for p in tmp_path.glob("??/*")) <= 10_000 and left == list(range(30 - len(left), 30))


def test_unusable_folders_are_ignored(tmp_path):
    (tmp_path / "file").write_text("")
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o777)
    for directory in (None, tmp_path / "file" / "below", public):
        cache = DiskCache(directory)
        cache.put("cd" * 32, b"x")
        assert cache.get("cd" * 32) is None


def test_object_code_comes_from_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("DUO_CACHE_DIR", str(tmp_path))
    text = loop("from_disk", ["f32", "f32"], ADD)
    before = jit.statistics.compiled
    (first,) = jit.object_codes([text], jit.machine())
    assert jit.statistics.compiled == before + 1
    assert jit.object_codes([text], jit.machine()) == [first]
    assert jit.statistics.compiled == before + 1
    (path,) = tmp_path.glob("??/*")
    path.write_bytes(path.read_bytes()[:100])
    assert jit.object_codes([text], jit.machine()) == [first]
    assert jit.statistics.compiled == before + 2


def test_threads_end_with_the_process(tmp_path):
    """No crash and no wait at exit while workers spin, also with a daemon thread inside a program."""
    script = f"""
import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r})
import numpy as np, threading
from test_cpu_runtime import Codes, buffer, chain, set_num_threads
set_num_threads(3)
backend = Codes()
bound = backend.compile(chain(backend, 4, cost=1e6)).bind({{"n": 100000}})
def forever():
    while True:
        bound.run([buffer(np.zeros(100000))])
threading.Thread(target=forever, daemon=True).start()
for _ in range(20): bound.run([buffer(np.zeros(100000))])
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_code_is_generated_while_texts_are_still_coming():
    import sys

    def texts():
        for k in range(5):
            started.append(k)
            yield f"define i64 @coming{k}() {{\n  ret i64 {k + 4711}\n}}\n"

    started: list[int] = []
    interval = sys.getswitchinterval()
    codes = jit.object_codes(texts(), jit.machine())
    assert started == list(range(5)) and len(set(codes)) == 5
    assert codes == jit.object_codes([*texts()], jit.machine())
    assert sys.getswitchinterval() == interval


def test_texts_that_cannot_be_made_and_code_that_cannot_be_generated_raise():
    def texts():
        yield "define i64 @before() {\n  ret i64 4812\n}\n"
        raise KeyError("text")

    with pytest.raises(KeyError, match="text"):
        jit.object_codes(texts(), jit.machine())
    early = jit.Early("define void @f() { nonsense }")
    assert early.code() is None
    early = jit.Early("define i64 @early() {\n  ret i64 4911\n}\n")
    assert early.code() == jit.object_codes(["define i64 @early() {\n  ret i64 4911\n}\n"], jit.machine("native"))[0]
