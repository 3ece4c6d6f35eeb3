"""Sorting in CUDA C: tiles of a row by a bitonic network in shared memory, then runs merged two by two, a launch for each doubling.

A row that fits a tile takes one launch. How long runs are, and in which half of the scratch memory they lie, is kept in its first words, which a
launch between two merges moves on: so one function merges runs of any length. Records hold a key and a position, so that all are distinct and the order is the one stable order of
`duo_ir/ops/order.py`; values are read again where they came from. Where only the first few are wanted, a tile keeps no more, and the next launch sorts what
many tiles have kept as a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from duo_backends.cuda.body import Emitter, Scope, Writer, in_memory
from duo_backends.cuda.code import GpuTarget, KernelCode, Launch, ceil_div, parameters, points, polynomial, symbol
from duo_ir.kernels.kernel import Access, Affine, SortKernel
from duo_ir.types import DimLike, evaluate, i64, product

_TILE = 1024  # records that a block sorts at most
_FEW = _TILE // 8  # results up to which tiles are gathered instead of merged
_DOUBLINGS = 22  # merges that a kernel for any length may take: up to 2^32 records, all that positions tell apart
_STATE = 16  # bytes of what is kept before the records: the length of runs, and whether they lie in the second half
_EACH, _THREADS = 8, 128  # results that a thread merges
_GATHERING = 256  # threads that sort what tiles have kept


def compile_sort(kernel: SortKernel, target: GpuTarget) -> KernelCode:
    """CUDA C and launches of a SortKernel."""
    return _Sort(kernel, symbol(kernel, target)).compile()


@dataclass
class _Sort:
    kernel: SortKernel
    name: str

    def __post_init__(self) -> None:
        kernel = self.kernel
        self.w = Writer()
        self.e = Emitter(self.w, kernel.args, True)
        self.wide = kernel.dtype.itemsize == 8
        self.record = "SortPair" if self.wide else "SortWord"
        self.record_bytes = 16 if self.wide else 8
        n = kernel.length
        self.tile = min(_TILE, max(32, 1 << (n - 1).bit_length())) if isinstance(n, int) and n > 0 else _TILE
        self.n, self.count = polynomial(n), polynomial(kernel.count)
        few = kernel.count if isinstance(kernel.count, int) and 0 < kernel.count <= _FEW else 0
        self.together = self.tile // few if few else 0  # runs of results that are sorted as one tile; 0: runs are merged
        names = [f"a{k}" for k in range(len(kernel.args))] + ["scratch", "status"] + [f"d_{d}" for d in kernel.dims]
        self.arguments = ", ".join(names)
        self.launches: list[Launch] = []

    def compile(self) -> KernelCode:
        self._load()
        self._store()
        self._tiles()
        n = self.kernel.length
        most = self._passes(n) if isinstance(n, int) else _DOUBLINGS
        if most and self.together:
            self._gather(n)
        elif most:
            self._merges(most)
            self._write()
        return KernelCode(self.w.text(), tuple(self.launches), self._scratch, headers=("sort.cuh",))

    # ------------------------------------------------------------------------------------------------------- sizes
    def _passes(self, n: int) -> int:
        return max(0, ceil_div(n, self.tile) - 1).bit_length()

    def _length(self, sizes: Mapping[str, int]) -> int:
        return evaluate(self.kernel.length, sizes)

    def _wanted(self, sizes: Mapping[str, int]) -> int:
        """Rows, none where nothing is to be written."""
        return points(self.kernel.axes, sizes) if evaluate(self.kernel.count, sizes) else 0

    def _scratch(self, sizes: Mapping[str, int]) -> int:
        n = self._length(sizes)
        kept = ceil_div(n, self.tile) * evaluate(self.kernel.count, sizes) if self.together else n
        return _STATE + 2 * self.record_bytes * kept * self._wanted(sizes) if self._passes(n) else 0

    # ------------------------------------------------------------------------------------------------------- functions
    def _load(self) -> None:
        """The record of element i of a row."""
        w, e, kernel = self.w, self.e, self.kernel
        head = f"static __device__ __forceinline__ {self.record} {self.name}_load({parameters(kernel)}, long long row, long long i)"
        with w.block(head):
            x = e.define(kernel.dtype, e.load(kernel.source, (), Scope((*e.unravel("row", kernel.axes), "i"))))
            w.put(f"{self.record} r;")
            w.put(f"duo_record(r, {'~' if kernel.descending else ''}duo_key_{kernel.dtype.name}({x.name}), i);")
            w.put("return r;")

    def _store(self) -> None:
        """Result j of a row, from its record."""
        w, e, kernel = self.w, self.e, self.kernel
        head = f"static __device__ __forceinline__ void {self.name}_store({parameters(kernel)}, long long row, long long j, {self.record} r)"
        with w.block(head):
            outer = e.unravel("row", kernel.axes)
            place = e.define(i64, "duo_place(r)")
            if kernel.positions is not None:
                w.put(f"{self._target(kernel.positions, (*outer, 'j'))} = {place.name};")
            if kernel.values is not None:
                at = kernel.source.at
                source = Access(kernel.source.buffer, Affine(at.offset, at.strides))
                x = e.define(kernel.dtype, e.load(source, (), Scope((*outer, place.name))))
                w.put(f"{self._target(kernel.values, (*outer, 'j'))} = {in_memory(x)};")

    def _target(self, access: Access, indices: tuple[str, ...]) -> str:
        return f"a{access.buffer}[{self.e.address(access, indices)}]"

    def _function(self, name: str, threads: int) -> str:
        return f'extern "C" __global__ void __launch_bounds__({threads}) {name}({parameters(self.kernel)})'

    # -------------------------------------------------------------------------------------------------------- launches
    def _tiles(self) -> None:
        """Sorts each tile of each row; to scratch memory, or as results where the row is one tile."""
        w, name, tile = self.w, f"{self.name}_0", self.tile
        threads = max(32, min(256, tile // 2))
        with w.block(self._function(name, threads)):
            w.put("extern __shared__ __align__(16) unsigned char duo_shared[];")
            w.put(f"{self.record} *s = ({self.record} *)duo_shared;")
            w.put(f"const long long n = {self.n}, tiles = (n + {tile - 1}) / {tile};")
            w.put(f"const long long row = blockIdx.x / tiles, first = blockIdx.x % tiles * {tile};")
            with w.block(f"for (int t = threadIdx.x; t < {tile}; t += {threads})"):
                w.put(f"if (first + t < n) s[t] = {self.name}_load({self.arguments}, row, first + t);")
                w.put("else duo_last(s[t]);")
            w.put(f"duo_sort_tile<{self.record}, {tile}>(s);")
            w.put(f"const long long count = {self.count};")
            with w.block(f"for (int t = threadIdx.x; t < {tile}; t += {threads})"):
                w.put(f"if ({'' if self.together else 'first + t >= n || '}t >= count) continue;")
                with w.block("if (tiles == 1)"):
                    w.put(f"if (t < n) {self.name}_store({self.arguments}, row, t, s[t]);")
                w.put(f"else {self._records()}[{'blockIdx.x*count' if self.together else 'row*n + first'} + t] = s[t];")
            with w.block("if (tiles > 1 && blockIdx.x == 0 && threadIdx.x == 0)"):
                w.put(f"((long long *)scratch)[0] = {'tiles' if self.together else tile};")
                w.put("((long long *)scratch)[1] = 0;")

        def blocks(sizes: Mapping[str, int]) -> int:
            return self._wanted(sizes) * ceil_div(self._length(sizes), tile)

        self.launches.append(Launch(name, threads, blocks, lambda sizes: tile * self.record_bytes))

    def _records(self) -> str:
        return f"(({self.record} *)(scratch + {_STATE}))"

    def _runs(self, sizes: Mapping[str, int], number: int) -> int:
        """How many runs of results a row has before gathering for the time `number`."""
        runs = ceil_div(self._length(sizes), self.tile)
        for _ in range(number):
            runs = ceil_div(runs, self.together)
        return runs

    def _gather(self, n: DimLike) -> None:
        """Sorts the runs of results that many tiles have kept as one tile, until a row has one run; says after each time how many there are now."""
        w, gather, step, tile, together = self.w, f"{self.name}_1", f"{self.name}_2", self.tile, self.together
        most, left = 0, ceil_div(n if isinstance(n, int) else 1 << 32, tile)
        while left > 1:
            most, left = most + 1, ceil_div(left, together)
        with w.block(self._function(gather, _GATHERING)):
            w.put("extern __shared__ __align__(16) unsigned char duo_shared[];")
            w.put(f"{self.record} *s = ({self.record} *)duo_shared;")
            w.put(f"const long long rows = {polynomial(product(self.kernel.axes))}, half = rows*(({self.n} + {tile - 1}) / {tile})*{self.count};")
            w.put("const long long runs = ((long long *)scratch)[0], second = ((long long *)scratch)[1];")
            w.put(f"const long long groups = (runs + {together - 1}) / {together}, row = blockIdx.x / groups, first = blockIdx.x % groups * {together};")
            w.put(f"const long long count = {self.count}, many = (runs - first < {together} ? runs - first : {together})*count;")
            w.put(f"{self.record} *const records = {self._records()};")
            w.put(f"const {self.record} *const from = records + (second ? half : 0) + (row*runs + first)*count;")
            with w.block(f"for (int t = threadIdx.x; t < {tile}; t += {_GATHERING})"):
                w.put("if (t < many) s[t] = from[t];")
                w.put("else duo_last(s[t]);")
            w.put(f"duo_sort_tile<{self.record}, {tile}>(s);")
            with w.block(f"for (int t = threadIdx.x; t < count; t += {_GATHERING})"):
                w.put(f"if (groups == 1) {self.name}_store({self.arguments}, row, t, s[t]);")
                w.put("else records[(second ? 0 : half) + blockIdx.x*count + t] = s[t];")
        with w.block(self._function(step, 32)), w.block("if (threadIdx.x == 0)"):
            w.put(f"((long long *)scratch)[0] = (((long long *)scratch)[0] + {together - 1}) / {together};")
            w.put("((long long *)scratch)[1] ^= 1;")
        for number in range(most):
            self._launch_gather(gather, step, number)

    def _launch_gather(self, gather: str, step: str, number: int) -> None:
        def blocks(sizes: Mapping[str, int]) -> int:
            runs = self._runs(sizes, number)
            return self._wanted(sizes) * ceil_div(runs, self.together) if runs > 1 else 0

        def again(sizes: Mapping[str, int]) -> int:
            return min(1, blocks(sizes)) if self._runs(sizes, number + 1) > 1 else 0

        self.launches.append(Launch(gather, _GATHERING, blocks, lambda sizes: self.tile * self.record_bytes))
        self.launches.append(Launch(step, 32, again))

    def _merges(self, most: int) -> None:
        """Merges runs, and after each merge says that they are twice as long and in the other half."""
        w, merge, step = self.w, f"{self.name}_1", f"{self.name}_2"
        with w.block(self._function(merge, _THREADS)):
            w.put(
                f"const long long n = {self.n}, rows = {polynomial(product(self.kernel.axes))}, each = (n + {_EACH - 1}) / {_EACH};"
            )
            w.put(f"const long long point = (long long)blockIdx.x*{_THREADS} + threadIdx.x;")
            w.put("if (point >= rows*each) return;")
            w.put(f"const long long row = point / each, begin = point % each * {_EACH};")
            w.put("const long long width = ((long long *)scratch)[0], second = ((long long *)scratch)[1];")
            w.put(f"{self.record} *a = {self._records()} + row*n, *b = a + rows*n;")
            w.put(f"duo_merge<{self.record}>(second ? b : a, second ? a : b, n, {self.count}, width, begin, {_EACH});")
        with w.block(self._function(step, 32)), w.block("if (threadIdx.x == 0)"):
            w.put("((long long *)scratch)[0] *= 2;")
            w.put("((long long *)scratch)[1] ^= 1;")
        for number in range(most):
            self._launch_merge(merge, step, number)

    def _launch_merge(self, merge: str, step: str, number: int) -> None:
        def blocks(sizes: Mapping[str, int]) -> int:
            n = self._length(sizes)
            return ceil_div(self._wanted(sizes) * ceil_div(n, _EACH), _THREADS) if number < self._passes(n) else 0

        self.launches.append(Launch(merge, _THREADS, blocks))
        self.launches.append(Launch(step, 32, lambda sizes: min(1, blocks(sizes))))

    def _write(self) -> None:
        """Results from the records of one run."""
        w, name, kernel = self.w, f"{self.name}_3", self.kernel
        with w.block(self._function(name, _THREADS)):
            w.put(f"const long long n = {self.n}, count = {self.count}, rows = {polynomial(product(kernel.axes))};")
            w.put(f"const long long point = (long long)blockIdx.x*{_THREADS} + threadIdx.x;")
            w.put("if (point >= rows*count) return;")
            w.put("const long long row = point / count, j = point % count;")
            w.put(f"const {self.record} *from = {self._records()} + (((long long *)scratch)[1] ? rows*n : 0);")
            w.put(f"{self.name}_store({self.arguments}, row, j, from[row*n + j]);")

        def blocks(sizes: Mapping[str, int]) -> int:
            if not self._passes(self._length(sizes)):
                return 0
            return ceil_div(self._wanted(sizes) * evaluate(kernel.count, sizes), _THREADS)

        self.launches.append(Launch(name, _THREADS, blocks))
