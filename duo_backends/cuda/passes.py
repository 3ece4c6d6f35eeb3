"""Loop kernels with inner axes, stage by stage: for few outer points with much to reduce, and for sizes that are not known.

A stage that reduces takes two launches: every chunk of every outer point is summed by 16 threads, one per lane, or by fewer that read vectors, and
the chunks of an outer point are then combined by the adjacent tree in `scratch`. A stage that does not is a map, or, where it has one point
only, the end of the launch before it. Reduced values go through `scratch`.
"""

from __future__ import annotations

from collections.abc import Mapping

from duo_backends.cuda.body import Emitter, Scope, Value, Writer
from duo_backends.cuda.code import (
    KernelCode,
    Launch,
    ceil_div,
    parameters,
    points,
    polynomial,
    register,
    wide_positions,
)
from duo_backends.cuda.groups import (
    COLUMNS,
    accumulate_vectors,
    declare,
    each_lane,
    halve,
    lanes_together,
    times,
    tree,
)
from duo_backends.cuda.reduce import CHUNK, LANES, Reducer, reducers
from duo_ir.kernels.kernel import LoopKernel, Stage
from duo_ir.types import product

_THREADS = 256
_MOST_SHARED = 48 << 10  # bytes of a block
_ALIGN = 256


def compile_passes(kernel: LoopKernel, columns: bool, name: str) -> KernelCode:
    """Launches for each stage. `columns`: neighbouring threads are neighbouring outer points."""
    return _Passes(kernel, columns, name).compile()


class _Passes:
    def __init__(self, kernel: LoopKernel, columns: bool, name: str) -> None:
        self.kernel, self.columns, self.name = kernel, columns, name
        self.rows = product(kernel.axes)
        self.wide = wide_positions(kernel, *[(product((*kernel.axes, *s.axes)),) for s in kernel.stages])
        self.found = [reducers(s) for s in kernel.stages]
        self.w = Writer()
        self.e = Emitter(self.w, kernel.args, self.wide)
        self.launches: list[Launch] = []

    def compile(self) -> KernelCode:
        endings = self.endings()
        done = {n for numbers in endings.values() for n in numbers}
        for number, stage in enumerate(self.kernel.stages):
            if not stage.reduces:
                if number not in done:
                    self.map(number, stage)
                continue
            if self.columns:
                self.column_chunks(number, stage)
            else:
                self.row_chunks(number, stage)
            self.combine(number, stage, endings[number])
        return KernelCode(self.w.text(), tuple(self.launches), self.scratch)

    def endings(self) -> dict[int, list[int]]:
        """For each stage that reduces those right after it that have one point for each outer point: its last launch does them."""
        found: dict[int, list[int]] = {}
        last = None
        for number, stage in enumerate(self.kernel.stages):
            if stage.reduces:
                last = number
                found[number] = []
            elif last is not None and not stage.axes:
                found[last].append(number)
            else:
                last = None
        return found

    # --------------------------------------------------------------------------------------------------- scratch
    def parts(self, stage: Stage, sizes: Mapping[str, int]) -> int:
        """Sets of 16 partial values of an outer point."""
        chunks = ceil_div(points(stage.axes, sizes), CHUNK)
        return chunks if self.columns else ceil_div(chunks, self.sets(stage))

    def together(self, stage: Stage) -> int:
        """Lanes of a thread of `row_chunks`."""
        vector = lanes_together(self.kernel, stage)
        most = max([r.nbytes for r in reducers(stage)], default=0) * len(stage.reduces)
        while vector > 1 and 2 * _THREADS * vector * most > _MOST_SHARED:
            vector //= 2
        return vector

    def sets(self, stage: Stage) -> int:
        """Chunks of a block of `row_chunks`: a whole subtree."""
        return _THREADS // LANES * self.together(stage)

    def scratch(self, sizes: Mapping[str, int]) -> int:
        total, rows = 0, points(self.kernel.axes, sizes)
        for stage, found in zip(self.kernel.stages, self.found):
            for reducer in found:
                total += _aligned(2 * rows * self.parts(stage, sizes) * LANES * reducer.nbytes)
                total += _aligned(rows * reducer.dtype.itemsize)
        return total

    def places(self, upto: int) -> None:
        """Declares where the reduced values of stages before `upto` and the partial values of stage `upto` are."""
        w = self.w
        w.put(f"const long long rows = {polynomial(self.rows)};")
        w.put("long long at = 0;")
        for number, (stage, found) in enumerate(zip(self.kernel.stages, self.found)):
            if number > upto:
                return
            for k, reducer in enumerate(found):
                per = CHUNK if self.columns else CHUNK * self.sets(stage)
                count = f"(({polynomial(product(stage.axes))}) + {per - 1}LL) / {per}"
                if number == upto:
                    w.put(f"const long long parts = {count};") if k == 0 else None
                    w.put(f"{reducer.state} *part{k} = ({reducer.state} *)(scratch + at);")
                w.put(f"at += (2*rows*({count})*{LANES * reducer.nbytes} + {_ALIGN - 1}) / {_ALIGN} * {_ALIGN};")
                w.put(f"{register(reducer.dtype)} *red{number}_{k} = ({register(reducer.dtype)} *)(scratch + at);")
                w.put(f"at += (rows*{reducer.dtype.itemsize} + {_ALIGN - 1}) / {_ALIGN} * {_ALIGN};")

    # ------------------------------------------------------------------------------------------------------ stages
    def function(self, threads: int) -> str:
        name = f"{self.name}_{len(self.launches)}"
        return f'extern "C" __global__ void __launch_bounds__({threads}) {name}({parameters(self.kernel)})'

    def launch(self, threads: int, blocks: object, shared: int = 0) -> None:
        name = f"{self.name}_{len(self.launches)}"
        self.launches.append(Launch(name, threads, blocks, lambda sizes: shared))  # type: ignore[arg-type]

    def scope(self, stage: Stage, row: str, inner: str) -> Scope:
        """Unravels the indices of a point."""
        e = self.e
        n = polynomial(product(stage.axes))
        indices = (*e.unravel(row, self.kernel.axes), *e.unravel(inner, stage.axes))

        def reduced(s: int, k: int) -> Value:
            return Value(f"red{s}_{k}[{row}]", self.found[s][k].dtype)

        return Scope(indices, f"(long long){row}*({n}) + {inner}", reduced=reduced)

    def point(self, stage: Stage, row: str, inner: str) -> list[Value]:
        scope = self.scope(stage, row, inner)
        values = self.e.emit(stage.body, scope)
        for store in stage.stores:
            self.e.store(store, values, scope)
        return values

    def map(self, number: int, stage: Stage) -> None:
        w, index = self.w, self.e.index_type
        n = polynomial(product(stage.axes))
        with w.block(self.function(_THREADS)):
            self.places(number)
            w.put(f"const {index} unit = ({index})blockIdx.x*{_THREADS} + threadIdx.x;")
            w.put(f"if (unit >= ({index})(rows*({n}))) return;")
            row, inner = self._split(stage)
            self.point(stage, row, inner)

        def blocks(sizes: Mapping[str, int]) -> int:
            return ceil_div(points((*self.kernel.axes, *stage.axes), sizes), _THREADS)

        self.launch(_THREADS, blocks)

    def _split(self, stage: Stage) -> tuple[str, str]:
        """Of a unit of a map: its outer point and its inner one; the nearer in memory runs faster."""
        w, index = self.w, self.e.index_type
        if self.columns:
            w.put(f"const {index} row = unit % ({index})rows, j = unit / ({index})rows;")
        else:
            n = polynomial(product(stage.axes))
            w.put(f"const {index} row = unit / ({n}), j = unit % ({n});")
        return "row", "j"

    def accumulate(self, stage: Stage, found: list[Reducer], start: str, end: str, vector: int) -> None:
        if vector > 1:
            names = [f"acc{k}" for k in range(len(found))]
            accumulate_vectors(self.e, stage, found, names, vector, start, end, lambda inner: self.scope(stage, "row", inner))
            return
        with self.w.block(f"for ({self.e.index_type} j = {start}; j < {end}; j += {LANES})"):
            values = self.point(stage, "row", "j")
            for k, reducer in enumerate(found):
                self.w.put(f"acc{k} = {reducer.step(f'acc{k}', [values[a] for a in reducer.args], 'j')};")

    def _lane(self, stage: Stage, found: list[Reducer], condition: str, vector: int = 1) -> None:
        """Accumulates this thread's lanes, from `lane` on, of `chunk` of `row` into acc0, acc1..."""
        w, index, n = self.w, self.e.index_type, polynomial(product(stage.axes))
        for k, reducer in enumerate(found):
            declare(w, reducer, f"acc{k}", vector)
        with w.block(f"if ({condition})"):
            w.put(f"const {index} end = (chunk + 1)*{CHUNK} < ({n}) ? (chunk + 1)*{CHUNK} : ({n});")
            self.accumulate(stage, found, f"chunk*{CHUNK} + lane", "end", vector)

    def row_chunks(self, number: int, stage: Stage) -> None:
        """A block takes 16 chunks of an outer point, or more, and combines them: a whole subtree."""
        w, index, found = self.w, self.e.index_type, self.found[number]
        vector, sets = self.together(stage), self.sets(stage)
        with w.block(self.function(_THREADS)):
            self.places(number)
            w.put(f"const int lane = threadIdx.x % {LANES // vector}{times(vector)}, set = threadIdx.x / {LANES // vector};")
            w.put(f"const {index} row = ({index})(blockIdx.x / parts), part = ({index})(blockIdx.x % parts);")
            n = polynomial(product(stage.axes))
            w.put(f"const {index} chunk = part*{sets} + set, chunks = (({n}) + {CHUNK - 1}) / {CHUNK};")
            self._lane(stage, found, "chunk < chunks", vector)
            w.put("extern __shared__ __align__(16) unsigned char duo_shared[];")
            w.put(f"const int present = chunks - part*{sets} < {sets} ? (int)(chunks - part*{sets}) : {sets};")
            at = 0
            for k, reducer in enumerate(found):
                w.put(
                    f"{reducer.state} *mine{k} = ({reducer.state} *)(duo_shared + {at}), *other{k} = mine{k} + {sets * LANES};"
                )
                each_lane(w, vector, f"mine{k}[threadIdx.x{times(vector)}%s] = acc{k}%s;")
                at += 2 * sets * LANES * reducer.nbytes
            w.put("__syncthreads();")
            for k, reducer in enumerate(found):
                tree(w, reducer, f"mine{k}", f"other{k}", "present", _THREADS, "threadIdx.x")
                place = f"part{k}[((long long)row*parts + part)*{LANES} + threadIdx.x]"
                w.put(f"if (threadIdx.x < {LANES}) {place} = mine{k}[threadIdx.x];")

        def blocks(sizes: Mapping[str, int]) -> int:
            return points(self.kernel.axes, sizes) * self.parts(stage, sizes)

        self.launch(_THREADS, blocks, at)

    def column_chunks(self, number: int, stage: Stage) -> None:
        """A block takes one chunk of 32 neighbouring outer points, a warp per lane."""
        w, index, found = self.w, self.e.index_type, self.found[number]
        threads = COLUMNS * LANES
        with w.block(self.function(threads)):
            self.places(number)
            w.put(f"const int lane = threadIdx.x / {COLUMNS};")
            w.put(f"const {index} chunk = ({index})(blockIdx.x % parts);")
            w.put(f"const {index} row = ({index})(blockIdx.x / parts)*{COLUMNS} + threadIdx.x % {COLUMNS};")
            self._lane(stage, found, "row < rows")
            for k in range(len(found)):
                w.put(f"if (row < rows) part{k}[((long long)row*parts + chunk)*{LANES} + lane] = acc{k};")

        def blocks(sizes: Mapping[str, int]) -> int:
            return ceil_div(points(self.kernel.axes, sizes), COLUMNS) * self.parts(stage, sizes)

        self.launch(threads, blocks)

    def combine(self, number: int, stage: Stage, ending: list[int]) -> None:
        """A block per outer point: the adjacent tree over its partial values, then the lanes by halving; then the stages of `ending`."""
        w, found = self.w, self.found[number]
        with w.block(self.function(_THREADS)):
            self.places(number)
            w.put("const long long row = blockIdx.x;")
            w.put(f"const int lane = threadIdx.x % {LANES};")
            for k, reducer in enumerate(found):
                w.put(f"{reducer.state} *from{k} = part{k} + row*parts*{LANES}, *to{k} = from{k} + rows*parts*{LANES};")
                tree(w, reducer, f"from{k}", f"to{k}", "(int)parts", _THREADS, "threadIdx.x")
                w.put(f"{reducer.state} acc{k} = parts > 0 ? from{k}[lane] : {reducer.identity};")
                halve(w, reducer, f"acc{k}")
                w.put(f"if (threadIdx.x == 0) red{number}_{k}[row] = {reducer.result(f'acc{k}')};")
            for n in ending:
                with w.block("if (threadIdx.x == 0)"):
                    self.point(self.kernel.stages[n], "row", "0")

        def blocks(sizes: Mapping[str, int]) -> int:
            return points(self.kernel.axes, sizes)

        self.launch(_THREADS, blocks)


def _aligned(nbytes: int) -> int:
    return ceil_div(nbytes, _ALIGN) * _ALIGN
