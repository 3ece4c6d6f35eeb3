"""Contractions in CUDA C, in the contract's order (rule 2): matrix products, and convolution as an implicit one.

A block computes a tile of the result, a thread some rows and columns of it in registers. Tiles of both operands go through shared memory, two
of each, so that the next is fetched while this one is used. K runs in ascending order within blocks of 512, whose sums are added in order in shared
memory; longer than 16384 it is cut into chunks of 4096, computed side by side, and a second launch combines them by the adjacent tree. K is
never padded: -0.0 + 0.0*0.0 is +0.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from duo_backends.cuda.body import Emitter, Scope, Value, Writer, arithmetic, convert, literal
from duo_backends.cuda.code import (
    GpuTarget,
    KernelCode,
    Launch,
    ceil_div,
    integer,
    memory,
    parameters,
    points,
    polynomial,
    register,
    symbol,
    wide_positions,
)
from duo_backends.cuda.mma import compile_fast, on_tensor_cores
from duo_backends.cuda.products import Operand, Product, emit_results, matrices
from duo_ir.kernels.kernel import ContractKernel
from duo_ir.types import DType, evaluate, product

BLOCK = 512  # k of a block sum
SEQUENTIAL_K = 16384
CHUNK_K = 4096
STEP = 8  # k of a tile in shared memory


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a block's tile, and of a thread's."""

    m: int
    n: int
    rows: int
    columns: int

    @property
    def threads(self) -> int:
        return self.m // self.rows * (self.n // self.columns)


_TILES = (Tile(128, 128, 8, 8), Tile(64, 64, 4, 4), Tile(32, 32, 2, 2), Tile(8, 64, 1, 4))


def compile_contract(kernel: ContractKernel, target: GpuTarget) -> KernelCode:
    """CUDA C and launches of a ContractKernel."""
    return compile_product(matrices(kernel), target)


def compile_product(p: Product, target: GpuTarget) -> KernelCode:
    """One launch, or two where K is cut."""
    if target.fast and on_tensor_cores(p):
        return compile_fast(p, target)
    return _Contraction(p, target).compile()


def _choose_tile(p: Product, acc: DType, target: GpuTarget) -> Tile:
    """The largest tile that gives every multiprocessor a block and does not mostly hang over; the largest where sizes are not known."""
    best, least = _TILES[-1], float("inf")
    for tile in _TILES:
        if acc.itemsize == 8 and tile.rows == 8:
            continue
        if not isinstance(p.m, int) or not isinstance(p.n, int):
            return tile
        batch = points([d for d in p.batch if isinstance(d, int)], {})
        blocks = ceil_div(max(p.m, 1), tile.m) * ceil_div(max(p.n, 1), tile.n) * max(batch, 1)
        waves = ceil_div(blocks, target.multiprocessors)
        # a small tile reads shared memory more often for each fma
        cost = waves * tile.m * tile.n * (1.0 + 4.0 / tile.rows + 4.0 / tile.columns)
        if cost < least:
            best, least = tile, cost
    return best


class _Contraction:
    def __init__(self, p: Product, target: GpuTarget) -> None:
        kernel = p.kernel
        self.p, self.kernel, self.acc = p, kernel, kernel.acc
        self.name = symbol(kernel, target)
        self.tile = _choose_tile(p, kernel.acc, target)
        chunks = ceil_div(p.k, CHUNK_K) if isinstance(p.k, int) and p.k > SEQUENTIAL_K else 1  # scratch has a sum for each
        batch = product(p.batch)
        spaces = [(batch, p.m, p.n, chunks), (batch, p.m, p.k), (batch, p.n, p.k)]
        self.w = Writer()
        self.e = Emitter(self.w, kernel.args, wide_positions(kernel, *spaces))
        self.cut = not isinstance(p.k, int) or p.k > SEQUENTIAL_K
        self.one_block = isinstance(p.k, int) and p.k <= BLOCK
        self.pad = 4 if self.tile.rows >= 4 else 0
        self.stage_bytes = 2 * STEP * (self.tile.m + self.tile.n + 2 * self.pad) * self.acc.itemsize
        self.total_bytes = 0 if self.one_block else self.tile.m * self.tile.n * self.acc.itemsize

    @property
    def index(self) -> str:
        return self.e.index_type

    def chunks(self, sizes: Mapping[str, int]) -> int:
        k = evaluate(self.p.k, sizes)
        return 1 if k <= SEQUENTIAL_K else ceil_div(k, CHUNK_K)

    def compile(self) -> KernelCode:
        p, tile = self.p, self.tile
        self._product()

        def blocks(sizes: Mapping[str, int]) -> int:
            return p.tiles(tile.m, tile.n, sizes) * self.chunks(sizes)

        shared = self.stage_bytes + self.total_bytes
        first = Launch(self.name, tile.threads, blocks, lambda sizes: shared)
        if not self.cut:
            return KernelCode(self.w.text(), (first,))
        self._combine()

        def results(sizes: Mapping[str, int]) -> int:
            return ceil_div(points((*p.batch, p.m, p.n), sizes), 256)

        def scratch(sizes: Mapping[str, int]) -> int:
            return points((*p.batch, p.m, p.n), sizes) * self.chunks(sizes) * self.acc.itemsize

        return KernelCode(self.w.text(), (first, Launch(f"{self.name}_tree", 256, results)), scratch)

    # ---------------------------------------------------------------------------------------------------- the product
    def _product(self) -> None:
        w, p, tile, index = self.w, self.p, self.tile, self.index
        acc = register(self.acc)
        head = f'extern "C" __global__ void __launch_bounds__({tile.threads}) {self.name}({parameters(self.kernel)})'
        with w.block(head):
            w.put(f"const {index} M = {polynomial(p.m)}, N = {polynomial(p.n)}, K = {polynomial(p.k)};")
            w.put("extern __shared__ __align__(16) unsigned char duo_shared[];")
            w.put(f"{acc} *const as = ({acc} *)duo_shared, *const bs = as + {2 * STEP * (tile.m + self.pad)};")
            if not self.one_block:
                w.put(f"{acc} *const total = ({acc} *)(duo_shared + {self.stage_bytes}) + threadIdx.x;")
            columns = tile.n // tile.columns
            w.put(f"const int tx = threadIdx.x % {columns}, ty = threadIdx.x / {columns};")
            w.put(f"const {index} tiles_m = (M + {tile.m - 1}) / {tile.m}, tiles_n = (N + {tile.n - 1}) / {tile.n};")
            w.put(f"const {index} m0 = ({index})(blockIdx.x % tiles_m)*{tile.m};")
            w.put(f"const {index} n0 = ({index})(blockIdx.x / tiles_m % tiles_n)*{tile.n};")
            w.put(f"const {index} rest = ({index})(blockIdx.x / tiles_m / tiles_n);")
            if self.cut:
                w.put(f"const {index} chunks = K <= {SEQUENTIAL_K} ? 1 : (K + {CHUNK_K - 1}) / {CHUNK_K};")
                w.put(f"const {index} chunk = rest % chunks, group = rest / chunks;")
                w.put(f"const {index} k_begin = chunk*{CHUNK_K};")
                w.put(f"const {index} k_end = chunk + 1 < chunks ? k_begin + {CHUNK_K} : K;")
                batch = self.e.unravel("group", p.batch)
            else:
                w.put(f"const {index} k_begin = 0, k_end = K;")
                batch = self.e.unravel("rest", p.batch)
            w.put(f"{acc} sum[{tile.rows}][{tile.columns}];")
            self._each_sum("sum[i][j] = " + literal(0, self.acc))
            self._main_loop(batch)
            self._results(batch)

    def _each_sum(self, statement: str) -> None:
        w = self.w
        w.put("#pragma unroll")
        with w.block(f"for (int i = 0; i < {self.tile.rows}; ++i)"):
            w.put("#pragma unroll")
            w.put(f"for (int j = 0; j < {self.tile.columns}; ++j) {statement};")

    def _main_loop(self, batch: Sequence[str]) -> None:
        w, p, tile, index = self.w, self.p, self.tile, self.index
        pairs = [("a", p.a, tile.m), ("b", p.b, tile.n)]
        counts = {}
        for letter, operand, side in pairs:
            counts[letter] = self._vector(operand, side)
            loads = ceil_div(side * STEP, tile.threads * counts[letter])
            w.put(f"Pack<{memory(operand.dtype)}, {counts[letter]}> next_{letter}[{loads}];")
        for letter, operand, side in pairs:
            self._fetch(letter, operand, side, counts[letter], "k_begin", batch)
        for letter, operand, side in pairs:
            self._put_away(letter, operand, side, counts[letter], "0")
        w.put("__syncthreads();")
        w.put("int now = 0;")
        with w.block(f"for ({index} k0 = k_begin; k0 < k_end; k0 += {STEP})"):
            w.put(f"const bool more = k0 + {STEP} < k_end;")
            with w.block("if (more)"):
                for letter, operand, side in pairs:
                    self._fetch(letter, operand, side, counts[letter], f"(k0 + {STEP})", batch)
            with w.block(f"if (k0 + {STEP} <= k_end)"):
                w.put("#pragma unroll")
                with w.block(f"for (int k = 0; k < {STEP}; ++k)"):
                    self._step()
            with w.block("else for (int k = 0; k < (int)(k_end - k0); ++k)"):
                self._step()
            if not self.one_block:
                self._end_of_block()
            with w.block("if (more)"):
                for letter, operand, side in pairs:
                    self._put_away(letter, operand, side, counts[letter], "(now ^ 1)")
                w.put("__syncthreads();")
                w.put("now ^= 1;")

    def _end_of_block(self) -> None:
        """After every 512 k, and at the end: the block's sum joins those before it."""
        w = self.w
        threads = self.tile.threads
        place = f"total[(i*{self.tile.columns} + j)*{threads}]"
        with w.block(f"if (!more || (k0 - k_begin) % {BLOCK} == {BLOCK - STEP})"):
            w.put(f"const bool first = k0 - k_begin < {BLOCK};")
            one = Value(place, self.acc)
            added = arithmetic("add", [one, Value("sum[i][j]", self.acc)], self.acc)
            with w.block("if (!more)"):
                self._each_sum(f"sum[i][j] = first ? sum[i][j] : {added}")
            with w.block("else"):
                self._each_sum(f"{place} = first ? sum[i][j] : {added}, sum[i][j] = {literal(0, self.acc)}")

    def _vector(self, operand: Operand, side: int) -> int:
        """Elements of one access: no more than a step has, nor than keep all threads busy."""
        vector = min(operand.vector, STEP if operand.near_k else side)
        while vector > 1 and side * STEP % (self.tile.threads * vector):
            vector //= 2
        return vector

    def _places(self, operand: Operand, side: int, vector: int) -> None:
        """Names of load number s of this thread: its row and k within the tile."""
        w = self.w
        w.put(f"const int u = (s*{self.tile.threads} + (int)threadIdx.x)*{vector};")
        if operand.near_k:
            w.put(f"const int r = u / {STEP}, kk = u % {STEP};")
        else:
            w.put(f"const int kk = u / {side}, r = u % {side};")

    def _loads(self, side: int, vector: int) -> int:
        return ceil_div(side * STEP, self.tile.threads * vector)

    def _whole(self, side: int, vector: int) -> bool:
        return side * STEP % (self.tile.threads * vector) == 0

    def _fetch(self, letter: str, operand: Operand, side: int, vector: int, k: str, batch: Sequence[str]) -> None:
        w, index = self.w, self.index
        size, start = ("M", "m0") if letter == "a" else ("N", "n0")
        w.put("#pragma unroll")
        with w.block(f"for (int s = 0; s < {self._loads(side, vector)}; ++s)"):
            self._places(operand, side, vector)
            w.put(f"const {index} row = {start} + r, col = {k} + kk;")
            inside = [f"row < {size}", "col < k_end"]
            if not self._whole(side, vector):
                inside.append(f"u < {side * STEP}")
            zero = "{}" if vector > 1 else f"{{{{{_zero(operand.dtype)}}}}}"
            w.put(f"Pack<{memory(operand.dtype)}, {vector}> x = {zero};")
            with w.block(f"if ({' && '.join(inside)})"):
                address, condition = operand.address(self.e, batch, "row", "col")
                source = f"a{operand.buffer}"
                read = (
                    f"x.v[0] = {source}[{address}];"
                    if vector == 1
                    else f"x = *(const Pack<{memory(operand.dtype)}, {vector}> *)({source} + {address});"
                )
                w.put(f"if ({condition}) {read}" if condition else read)
            w.put(f"next_{letter}[s] = x;")

    def _put_away(self, letter: str, operand: Operand, side: int, vector: int, which: str) -> None:
        """What was fetched into shared memory, widened, [k][row]."""
        w = self.w
        w.put("#pragma unroll")
        with w.block(f"for (int s = 0; s < {self._loads(side, vector)}; ++s)"):
            self._places(operand, side, vector)
            if not self._whole(side, vector):
                w.put(f"if (u >= {side * STEP}) break;")
            w.put("#pragma unroll")
            stride = side + self.pad
            place = f"(kk + l)*{stride} + r" if operand.near_k else f"kk*{stride} + r + l"
            value = convert(f"next_{letter}[s].v[l]", operand.dtype, self.acc)
            target = f"{letter}s[{which}*{STEP * stride} + {place}]"
            w.put(f"for (int l = 0; l < {vector}; ++l) {target} = {value};")

    def _step(self) -> None:
        """One k: the thread's rows of A times its columns of B."""
        w, tile = self.w, self.tile
        acc = register(self.acc)
        for letter, side, count, thread in (("a", tile.m, tile.rows, "ty"), ("b", tile.n, tile.columns, "tx")):
            w.put(f"{acc} {letter}[{count}];")
            stride, group = side + self.pad, min(4, count)
            pieces = count // group
            for g in range(pieces):
                place = f"{letter}s + (now*{STEP} + k)*{stride} + {g * side // pieces} + {thread}*{group}"
                w.put(f"*(Pack<{acc}, {group}> *)({letter} + {g * group}) = *(const Pack<{acc}, {group}> *)({place});")
        operands = [Value("a[i]", self.acc), Value("b[j]", self.acc), Value("sum[i][j]", self.acc)]
        if self.acc.is_float:
            self._each_sum(f"sum[i][j] = {arithmetic('fma', operands, self.acc)}")
        else:
            product_ = Value(arithmetic("mul", operands[:2], self.acc), self.acc)
            self._each_sum(f"sum[i][j] = {arithmetic('add', [operands[2], product_], self.acc)}")

    # ---------------------------------------------------------------------------------------------------- the results
    def _results(self, batch: Sequence[str]) -> None:
        """The epilogue of the thread's rows and columns, or the chunk's sums."""
        w, tile, index = self.w, self.tile, self.index
        group_m, group_n = min(4, tile.rows), min(4, tile.columns)
        w.put("#pragma unroll")
        with w.block(f"for (int i = 0; i < {tile.rows}; ++i)"):
            row = f"i / {group_m}*{tile.m * group_m // tile.rows} + ty*{group_m} + i % {group_m}"
            w.put(f"const {index} m = m0 + {row};")
            w.put("if (m >= M) continue;")
            w.put("#pragma unroll")
            with w.block(f"for (int g = 0; g < {tile.columns // group_n}; ++g)"):
                w.put(f"const {index} first = n0 + g*{tile.n * group_n // tile.columns} + tx*{group_n};")
                value = f"sum[i][g*{group_n} + %s]"
                if self.cut:
                    place = "((group*chunks + chunk)*M + m)*N + first + l"
                    w.put("#pragma unroll")
                    w.put(
                        f"for (int l = 0; l < {group_n}; ++l) if (first + l < N) (({register(self.acc)} *)scratch)[{place}] = {value % 'l'};"
                    )
                else:
                    emit_results(self.e, self.p, batch, value, group_n)

    def _combine(self) -> None:
        """The second launch: chunks by the adjacent tree, run as a binary counter, then the epilogue."""
        w, p, index = self.w, self.p, self.index
        acc = register(self.acc)
        with w.block(f'extern "C" __global__ void __launch_bounds__(256) {self.name}_tree({parameters(self.kernel)})'):
            w.put(f"const {index} M = {polynomial(p.m)}, N = {polynomial(p.n)}, K = {polynomial(p.k)};")
            w.put(f"const {index} chunks = K <= {SEQUENTIAL_K} ? 1 : (K + {CHUNK_K - 1}) / {CHUNK_K};")
            w.put(f"const {index} unit = ({index})blockIdx.x*256 + threadIdx.x, size = M*N;")
            w.put(f"if (unit >= {polynomial(product(p.batch))}*size) return;")
            w.put(f"const {index} group = unit / size, m = unit / N % M, first = unit % N;")
            batch = self.e.unravel("group", p.batch)
            w.put(f"const {acc} *part = (const {acc} *)scratch + group*chunks*size + m*N + first;")
            w.put(f"{acc} level[32];")
            with w.block(f"for ({index} c = 0; c < chunks; ++c)"):
                w.put(f"{acc} x = part[c*size];")
                w.put("int at = 0;")
                w.put(f"for (; c >> at & 1; ++at) x = {self._add('level[at]', 'x')};")
                w.put("level[at] = x;")
            w.put("bool any = false;")
            w.put(f"{acc} sum = {literal(0, self.acc)};")
            with w.block("for (int at = 0; chunks >> at; ++at)"):
                w.put("if (!(chunks >> at & 1)) continue;")
                w.put(f"sum = any ? {self._add('level[at]', 'sum')} : level[at];")
                w.put("any = true;")
            indices = p.indices(self.e, batch, "m", "first")
            value = self.e.define(self.kernel.result, convert("sum", self.acc, self.kernel.result), "acc")
            scope = Scope(indices, "(long long)unit", acc=value)
            values = self.e.emit(self.kernel.body, scope)
            for store in self.kernel.stores:
                self.e.store(store, values, scope)

    def _add(self, x: str, y: str) -> str:
        return arithmetic("add", [Value(x, self.acc), Value(y, self.acc)], self.acc)


def _zero(dtype: DType) -> str:
    return integer(0) if not dtype.is_float or dtype.is_narrow_float else literal(0, dtype)
