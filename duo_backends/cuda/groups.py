"""Loop kernels with inner axes, all stages in one launch: a group of threads has an outer point to itself.

Two layouts. *Rows*: the 16 lanes of a chunk are neighbouring threads, or several lanes each where they lie together in memory, so that a thread
reads vectors; a group has one such set per chunk, up to 32. *Columns*: neighbouring threads are neighbouring outer points, 32 of them in a block, and each of its 16 warps is a lane; for one chunk only. Between
stages the reduced values are known to every thread of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from duo_backends.cuda.body import Emitter, Scope, Value, Writer
from duo_backends.cuda.code import (
    GpuTarget,
    KernelCode,
    Launch,
    ceil_div,
    parameters,
    points,
    polynomial,
    wide_positions,
)
from duo_backends.cuda.packs import emit_points, pack_width
from duo_backends.cuda.reduce import CHUNK, LANES, Reducer, reducers
from duo_ir.kernels.kernel import LoopKernel, Stage
from duo_ir.types import evaluate, product

COLUMNS = 32  # outer points of a block where neighbouring threads are neighbouring points
_MOST_SETS = 32  # sets of 16 threads in a group
_BLOCK = 128
_LEAST_THREADS = 128  # of a multiprocessor, for which a thread rather has fewer lanes
_SHARED = 48 << 10  # bytes of shared memory of a group, so that a multiprocessor has several


def fits_groups(kernel: LoopKernel, columns: bool, target: GpuTarget) -> bool:
    """Whether the kernel's reductions are short, or its outer points many, so that one launch does."""
    chunks = _most_chunks(kernel)
    if chunks is None:
        return False
    if chunks == 1:
        return True
    rows = product(kernel.axes)
    few = isinstance(rows, int) and rows < target.multiprocessors and chunks > _MOST_SETS
    return not columns and not few and chunks * _state_bytes(kernel) * LANES * 3 // 2 <= min(_SHARED, target.shared)


def _most_chunks(kernel: LoopKernel) -> int | None:
    most = 1
    for stage in kernel.stages:
        n = product(stage.axes)
        if not isinstance(n, int):
            return None
        most = max(most, ceil_div(n, CHUNK))
    return most


def _state_bytes(kernel: LoopKernel) -> int:
    return max([sum(r.nbytes for r in reducers(s)) for s in kernel.stages], default=0)


def compile_groups(kernel: LoopKernel, columns: bool, name: str, target: GpuTarget) -> KernelCode:
    """One launch for the whole kernel."""
    chunks = _most_chunks(kernel)
    assert chunks is not None
    plan = _Columns(kernel, name) if columns and chunks == 1 else _Rows(kernel, name, chunks, target)
    return plan.compile()


def lanes_together(kernel: LoopKernel, stage: Stage) -> int:
    """Lanes of a chunk that lie together in memory, so that one thread should have them."""
    if not stage.axes:
        return 1
    width = pack_width(kernel.args, [(stage.body, stage.stores)], stage.axes[-1], False)
    return min(width, 4) if any(r.nbytes > 8 for r in reducers(stage)) else width  # a value and its index fill registers


class _Groups:
    """What both layouts share. `size`: threads of a group; `per_block`: groups of a block."""

    size: int
    per_block: int
    row: str  # the group's number in its block
    place: str  # the thread's number in its group

    def __init__(self, kernel: LoopKernel, name: str) -> None:
        self.kernel, self.name = kernel, name
        inner = [product((*kernel.axes, *s.axes)) for s in kernel.stages]
        self.w = Writer()
        self.e = Emitter(self.w, kernel.args, wide_positions(kernel, *[(n,) for n in inner]))
        self.reduced: dict[tuple[int, int], Value] = {}

    @property
    def threads(self) -> int:
        return self.size * self.per_block

    def shared(self, sizes: Mapping[str, int]) -> int:
        return 0

    def compile(self) -> KernelCode:
        w, e, kernel = self.w, self.e, self.kernel
        rows = product(kernel.axes)
        index = e.index_type
        with w.block(f'extern "C" __global__ void __launch_bounds__({self.threads}) {self.name}({parameters(kernel)})'):
            w.put(f"const int t = {self.place};")
            w.put(f"const {index} row = ({index})blockIdx.x*{self.per_block} + {self.row};")
            w.put(f"const bool live = row < {polynomial(rows)};")
            self.prepare()
            self.outer = e.unravel("row", kernel.axes)
            for number, stage in enumerate(kernel.stages):
                w.put(f"// stage {number}")
                if stage.reduces:
                    self.reduce(number, stage)
                else:
                    self.map(stage)

        def blocks(sizes: Mapping[str, int]) -> int:
            return ceil_div(points(kernel.axes, sizes), self.per_block)

        return KernelCode(w.text(), (Launch(self.name, self.threads, blocks, self.shared),))

    def prepare(self) -> None:
        """Declarations at the top."""

    def scope(self, stage: Stage, inner: str) -> Scope:
        """Unravels the inner index and gives the scope of a point."""
        n = product(stage.axes)
        indices = (*self.outer, *self.e.unravel(inner, stage.axes))
        return Scope(indices, f"(long long)row*({polynomial(n)}) + {inner}", reduced=lambda s, k: self.reduced[s, k])

    def map(self, stage: Stage) -> None:
        """A stage without reductions: its points are shared out among the group."""
        n = polynomial(product(stage.axes))
        with self.w.block(f"if (live) for ({self.e.index_type} j = t; j < {n}; j += {self.size})"):
            self.point(stage, "j")

    def point(self, stage: Stage, inner: str) -> list[Value]:
        scope = self.scope(stage, inner)
        values = self.e.emit(stage.body, scope)
        for store in stage.stores:
            self.e.store(store, values, scope)
        return values

    def accumulate(self, stage: Stage, found: Sequence[Reducer], names: Sequence[str], start: str, end: str) -> None:
        """The lane's elements start, start + 16, ... before `end`."""
        with self.w.block(f"for ({self.e.index_type} j = {start}; j < {end}; j += {LANES})"):
            values = self.point(stage, "j")
            for reducer, name in zip(found, names):
                self.w.put(f"{name} = {reducer.step(name, [values[a] for a in reducer.args], 'j')};")

    def reduce(self, number: int, stage: Stage) -> None:
        raise NotImplementedError

    def publish(self, number: int, k: int, reducer: Reducer, state: str) -> None:
        self.reduced[number, k] = self.e.define(reducer.dtype, reducer.result(state), "red")


    def leave(self, number: int) -> None:
        """Shared memory is read; a later stage that reduces may write it."""
        if any(stage.reduces for stage in self.kernel.stages[number + 1 :]):
            self.w.put("__syncthreads();")


class _Rows(_Groups):
    """Lanes are neighbouring threads, `vector` lanes each. `lanes`: how many there are; sums of few elements need no more than that."""

    def __init__(self, kernel: LoopKernel, name: str, chunks: int, target: GpuTarget) -> None:
        super().__init__(kernel, name)
        sets = 1
        while sets < min(chunks, _MOST_SETS):
            sets *= 2
        reducing = [stage for stage in kernel.stages if stage.reduces]
        self.lanes = _present(reducing)
        self.vector = min(self.lanes, *[lanes_together(kernel, stage) for stage in reducing])
        rows = product(kernel.axes)
        while isinstance(rows, int) and self.vector > 1 and rows * sets * self.lanes // self.vector < target.multiprocessors * _LEAST_THREADS:
            self.vector //= 2
        self.set = self.lanes // self.vector  # threads
        self.size = self.set * sets
        self.per_block = max(1, _BLOCK // self.size)
        self.row, self.place = f"threadIdx.x / {self.size}", f"threadIdx.x % {self.size}"
        self.region = 0  # bytes of shared memory of a group
        if sets > 1:
            for stage in kernel.stages:
                parts = ceil_div(evaluate(product(stage.axes), {}), CHUNK)
                total = sum(r.nbytes * LANES * (parts + ceil_div(parts, 2)) for r in reducers(stage))
                self.region = max(self.region, ceil_div(total, 16) * 16)

    def shared(self, sizes: Mapping[str, int]) -> int:
        return self.region * self.per_block

    def prepare(self) -> None:
        self.w.put(f"const int lane = t % {self.set}{times(self.vector)};")
        if self.region:
            self.w.put("extern __shared__ __align__(16) unsigned char duo_shared[];")
            self.w.put(f"unsigned char *const mine = duo_shared + {self.row}*{self.region};")

    def map(self, stage: Stage) -> None:
        width = lanes_together(self.kernel, stage)
        if width == 1:
            super().map(stage)
            return
        n = polynomial(product(stage.axes))
        with self.w.block(f"if (live) for ({self.e.index_type} j = t*{width}; j < {n}; j += {self.size * width})"):
            scope = self.scope(stage, "j")
            emit_points(self.e, stage.body, stage.stores, scope.indices, width, f"({scope.point})", reduced=scope.reduced)

    def accumulate(self, stage: Stage, found: Sequence[Reducer], names: Sequence[str], start: str, end: str) -> None:
        """The thread's lanes' elements from start on, before `end`."""
        if self.vector == 1:
            super().accumulate(stage, found, names, start, end)
            return
        accumulate_vectors(self.e, stage, found, names, self.vector, start, end, lambda inner: self.scope(stage, inner))

    def reduce(self, number: int, stage: Stage) -> None:
        found = reducers(stage)
        n = evaluate(product(stage.axes), {})
        chunks = max(1, ceil_div(n, CHUNK))
        names = [self.w.name("acc") for _ in found]
        if self.region == 0:
            for name, reducer in zip(names, found):
                declare(self.w, reducer, name, self.vector)
            with self.w.block("if (live)"):
                self.accumulate(stage, found, names, "lane", str(n))
        else:
            self._chunks(stage, found, names, n, chunks)
        for k, (name, reducer) in enumerate(zip(names, found)):
            self.publish(number, k, reducer, halve(self.w, reducer, name, self.lanes, self.vector))
        if self.region:
            self.leave(number)

    def _chunks(self, stage: Stage, found: Sequence[Reducer], names: Sequence[str], n: int, chunks: int) -> None:
        """Partial sums of every chunk and lane in shared memory, combined by the adjacent tree."""
        w, at, vector = self.w, 0, self.vector
        parts = [self.w.name("part") for _ in found]
        for part, reducer in zip(parts, found):
            w.put(f"{reducer.state} *{part} = ({reducer.state} *)(mine + {at});")
            at += reducer.nbytes * LANES * (chunks + ceil_div(chunks, 2))
        with w.block(f"for (int c = t / {self.set}; c < {chunks}; c += {self.size // self.set})"):
            for name, reducer in zip(names, found):
                declare(w, reducer, name, vector)
            with w.block("if (live)"):
                w.put(f"const int end = (c + 1)*{CHUNK} < {n} ? (c + 1)*{CHUNK} : {n};")
                self.accumulate(stage, found, names, f"c*{CHUNK} + lane", "end")
            for part, name in zip(parts, names):
                each_lane(w, vector, f"{part}[c*{LANES} + lane%s] = {name}%s;")
        w.put("__syncthreads();")
        for name, part, reducer in zip(names, parts, found):
            w.put(f"{reducer.state} *to_{part} = {part} + {LANES * chunks};")
            tree(w, reducer, part, f"to_{part}", str(chunks), self.size, "t")
            declare(w, reducer, name, vector)
            each_lane(w, vector, f"{name}%s = {part}[lane%s];", swapped=True)


def _present(reducing: Sequence[Stage]) -> int:
    """Lanes that any element goes to, as a power of two. A lane without elements changes no result but a dot product of -0.0."""
    most = max([evaluate(product(stage.axes), {}) for stage in reducing], default=LANES)
    if any(r.kind == "dot" for stage in reducing for r in stage.reduces):
        return LANES
    lanes = 1
    while lanes < min(most, LANES):
        lanes *= 2
    return lanes


# ------------------------------------------------------------------------------------------------------- lanes of a thread
def times(count: int) -> str:
    return f"*{count}" if count > 1 else ""


def declare(w: Writer, reducer: Reducer, name: str, vector: int) -> None:
    """The accumulators of a thread's lanes, without elements yet."""
    if vector == 1:
        w.put(f"{reducer.state} {name} = {reducer.identity};")
        return
    w.put(f"{reducer.state} {name}[{vector}];")
    each_lane(w, vector, f"{name}%s = {reducer.identity};")


def each_lane(w: Writer, vector: int, statement: str, swapped: bool = False) -> None:
    """The statement for each of a thread's lanes: %s is first where it is in memory (`+ l`), then the index of an accumulator, or the other way
    round."""
    memory, register = ("", "") if vector == 1 else (" + l", "[l]")
    marks = statement.count("%s")
    filled = statement % ((register, memory) if swapped else (memory, register)) if marks == 2 else statement % register
    if vector > 1:
        w.put("#pragma unroll")
    w.put(f"for (int l = 0; l < {vector}; ++l) {filled}" if vector > 1 else filled)


def accumulate_vectors(
    e: Emitter, stage: Stage, found: Sequence[Reducer], names: Sequence[str], vector: int, start: str, end: str, scope: Callable[[str], Scope]
) -> None:
    """Elements start, start + 16, ... before `end` and those beside each of them, a vector. scope: that of the point with such an inner number."""
    w = e.w

    def each(values: list[Value]) -> None:
        for reducer, name in zip(found, names):
            w.put(f"{name}[l] = {reducer.step(f'{name}[l]', [values[a] for a in reducer.args], 'j + l')};")

    w.put("#pragma unroll 4")
    with w.block(f"for ({e.index_type} j = {start}; j < {end}; j += {LANES})"):
        at = scope("j")
        emit_points(e, stage.body, stage.stores, at.indices, vector, f"({at.point})", reduced=at.reduced, each=each)


def halve(w: Writer, reducer: Reducer, name: str, lanes: int = LANES, vector: int = 1) -> str:
    """Lanes of neighbouring threads by halving; all of them then know the result, which this names."""
    threads = lanes // vector
    if vector == 1:
        w.put("#pragma unroll")
        w.put(f"for (int d = {lanes // 2}; d; d /= 2) {name} = {reducer.merge(name, f'duo_down({name}, d)')};")
        if threads > 1:
            w.put(f"{name} = duo_first({name}, {threads});")
        return name
    for d in [1 << k for k in reversed(range(lanes.bit_length() - 1))]:
        w.put("#pragma unroll")
        other = f"duo_down({name}[l], {d // vector})" if d >= vector else f"{name}[l + {d}]"
        w.put(f"for (int l = 0; l < {min(d, vector)}; ++l) {name}[l] = {reducer.merge(f'{name}[l]', other)};")
    if threads > 1:
        w.put(f"{name}[0] = duo_first({name}[0], {threads});")
    return f"{name}[0]"


def tree(w: Writer, reducer: Reducer, source: str, other: str, count: str, threads: int, thread: str) -> None:
    """The adjacent tree over `count` sets of 16 lanes by the threads of a block; `source` then points to the result."""
    with w.block(f"for (int m = {count}; m > 1; m = (m + 1) / 2)"):
        with w.block(f"for (int k = {thread}; k < (m + 1) / 2 * {LANES}; k += {threads})"):
            w.put(f"const int a = k / {LANES} * {2 * LANES} + k % {LANES}, b = a + {LANES};")
            w.put(f"if (b < m*{LANES}) {other}[k] = {reducer.merge(f'{source}[a]', f'{source}[b]')};")
            w.put(f"else {other}[k] = {source}[a];")
        w.put("__syncthreads();")
        w.put(f"{reducer.state} *swap = {source}; {source} = {other}; {other} = swap;")


class _Columns(_Groups):
    """Neighbouring threads are neighbouring outer points; the warps of the block are the lanes."""

    size = LANES
    per_block = COLUMNS
    row, place = f"threadIdx.x % {COLUMNS}", f"threadIdx.x / {COLUMNS}"

    def shared(self, sizes: Mapping[str, int]) -> int:
        return _state_bytes(self.kernel) * LANES * COLUMNS

    def prepare(self) -> None:
        self.w.put("extern __shared__ __align__(16) unsigned char duo_shared[];")
        self.w.put(f"const int column = threadIdx.x % {COLUMNS};")

    def reduce(self, number: int, stage: Stage) -> None:
        w, found, at = self.w, reducers(stage), 0
        names, parts = [w.name("acc") for _ in found], [w.name("part") for _ in found]
        for name, part, reducer in zip(names, parts, found):
            w.put(f"{reducer.state} {name} = {reducer.identity};")
            w.put(f"{reducer.state} *const {part} = ({reducer.state} *)(duo_shared + {at}) + column;")
            at += reducer.nbytes * LANES * COLUMNS
        with w.block("if (live)"):
            self.accumulate(stage, found, names, "t", polynomial(product(stage.axes)))
        for name, part in zip(names, parts):
            w.put(f"{part}[t*{COLUMNS}] = {name};")
        w.put("__syncthreads();")
        for k, (name, part, reducer) in enumerate(zip(names, parts, found)):
            w.put(f"{reducer.state} all_{name}[{LANES}];")
            w.put("#pragma unroll")
            w.put(f"for (int l = 0; l < {LANES}; ++l) all_{name}[l] = {part}[l*{COLUMNS}];")
            w.put("#pragma unroll")
            with w.block(f"for (int d = {LANES // 2}; d; d /= 2)"):
                w.put("#pragma unroll")
                w.put(
                    f"for (int l = 0; l < d; ++l) all_{name}[l] = {reducer.merge(f'all_{name}[l]', f'all_{name}[l + d]')};"
                )
            self.publish(number, k, reducer, f"all_{name}[0]")
        self.leave(number)
