"""Products on tensor cores, for `fast` numerics: bf16 and f16 as they are, f32 rounded to tf32; sums in f32, in the hardware's order.

A block computes a tile of the result, a warp a part of it in fragments (`mma.cuh`). Tiles of both operands go through a ring of stages in shared
memory, filled by copies that run while earlier stages are used; zeros stand where an operand ends. The sums pass through shared memory once more, so
that the epilogue reads and writes whole vectors of a row. Where results are too few for all multiprocessors K is cut into chunks, whose
sums a second launch adds in order. For a device and a program the bits are the same in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from duo_backends.cuda.body import Emitter, Writer
from duo_backends.cuda.code import (
    GpuTarget,
    KernelCode,
    Launch,
    ceil_div,
    parameters,
    points,
    polynomial,
    symbol,
    wide_positions,
)
from duo_backends.cuda.products import Operand, Product, emit_results
from duo_ir.types import DimLike, bf16, evaluate, f16, f32, product

STEP = 32  # bytes of k that one instruction takes
LEAST_CHUNK = 256  # k of a chunk
UNKNOWN_CHUNK = 2048  # the same where K is not known
MOST_CHUNKS = 32
_UNKNOWN = 4096  # what a size that is not known is taken for
_INSTRUCTION = {bf16: "bf16", f16: "f16", f32: "tf32"}


@dataclass(frozen=True)
class Tile:
    """m x n results of a block, shared out among warps_m x warps_n warps; a stage has `line` bytes of k. `rate`: results per time beside the
    largest tile, an estimate."""

    m: int
    n: int
    warps_m: int
    warps_n: int
    line: int
    stages: int
    rate: float

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def fragments(self) -> tuple[int, int]:
        """Of a warp: of 16 rows, and of 8 columns."""
        return self.m // self.warps_m // 16, self.n // self.warps_n // 8

    @property
    def stage(self) -> int:
        return (self.m + self.n) * self.line

    @property
    def pitch(self) -> int:
        """Floats from one row of a warp's sums to the next in shared memory: no two rows in the same banks."""
        return self.n // self.warps_n + 8

    @property
    def shared(self) -> int:
        return max(self.stages * self.stage, self.warps_m * self.warps_n * 16 * self.pitch * 4)


TILES = (
    Tile(128, 256, 2, 4, 128, 3, 1.0),
    Tile(128, 256, 2, 4, 64, 4, 0.97),
    Tile(128, 128, 2, 4, 64, 4, 0.9),
    Tile(64, 64, 2, 2, 64, 4, 0.6),
    Tile(16, 128, 1, 4, 64, 4, 0.4),
    Tile(64, 16, 4, 1, 64, 4, 0.3),
)


def on_tensor_cores(p: Product) -> bool:
    """Whether they compute such a product: operands of one of their dtypes, and results and k of more than a few."""
    known = [d for d in (p.n, p.k) if isinstance(d, int)]
    return p.a.dtype is p.b.dtype and p.a.dtype in _INSTRUCTION and p.kernel.acc is f32 and all(d >= 8 for d in known)


def compile_fast(p: Product, target: GpuTarget) -> KernelCode:
    """One launch, or two where K is cut."""
    return _Mma(p, target).compile()


def choose_tile(p: Product, target: GpuTarget) -> Tile:
    """The one that takes the least time by an estimate: waves of blocks times results of a tile."""
    m, n = [max(d, 1) if isinstance(d, int) else _UNKNOWN for d in (p.m, p.n)]
    batch = points([d for d in p.batch if isinstance(d, int)], {})

    def cost(tile: Tile) -> float:
        blocks = ceil_div(m, tile.m) * ceil_div(n, tile.n) * max(batch, 1)
        return ceil_div(blocks, target.multiprocessors) * tile.m * tile.n / tile.rate

    # beside 128 sums a thread has registers for the simplest addresses only
    simple = all(o.vector * o.dtype.itemsize == 16 and (o.near_k or o.dtype is not f32) for o in (p.a, p.b))
    return min([tile for tile in TILES if tile.shared <= target.shared and (simple or tile.n < 256)], key=cost)


def choose_chunk(p: Product, tile: Tile, target: GpuTarget) -> int | None:
    """k of a chunk where K is cut: results are known to be fewer than the device could compute side by side."""
    if not isinstance(p.m, int) or not isinstance(p.n, int) or any(not isinstance(d, int) for d in p.batch):
        return None
    blocks = p.tiles(tile.m, tile.n, {})
    wanted = target.multiprocessors // max(blocks, 1)
    if wanted < 2:
        return None
    if not isinstance(p.k, int):
        return UNKNOWN_CHUNK
    chunks = min(wanted, MOST_CHUNKS, p.k // LEAST_CHUNK)
    return ceil_div(ceil_div(p.k, chunks), 64) * 64 if chunks > 1 else None


class _Mma:
    def __init__(self, p: Product, target: GpuTarget) -> None:
        self.p, self.dtype = p, p.a.dtype
        self.name = symbol(p.kernel, target)
        self.tile = choose_tile(p, target)
        self.chunk = choose_chunk(p, self.tile, target)
        chunks: DimLike = ceil_div(p.k, self.chunk) if self.chunk and isinstance(p.k, int) else 1
        batch = product(p.batch)
        spaces = [(batch, p.m, p.n, chunks), (batch, p.m, p.k), (batch, p.n, p.k)]
        self.w = Writer()
        self.e = Emitter(self.w, p.kernel.args, wide_positions(p.kernel, *spaces))
        self.step = self.tile.line // self.dtype.itemsize  # k of a stage

    def chunks(self, sizes: Mapping[str, int]) -> int:
        return max(1, ceil_div(evaluate(self.p.k, sizes), self.chunk)) if self.chunk else 1

    def compile(self) -> KernelCode:
        p, tile = self.p, self.tile
        self._product()

        def blocks(sizes: Mapping[str, int]) -> int:
            return p.tiles(tile.m, tile.n, sizes) * self.chunks(sizes)

        first = Launch(self.name, tile.threads, blocks, lambda sizes: tile.shared)
        if self.chunk is None:
            return KernelCode(self.w.text(), (first,), headers=("mma.cuh",))
        self._combine()

        def threads(sizes: Mapping[str, int]) -> int:
            return points((*p.batch, p.m, p.n), sizes) // p.width

        def scratch(sizes: Mapping[str, int]) -> int:
            return points((*p.batch, p.m, p.n), sizes) * self.chunks(sizes) * 4

        second = Launch(f"{self.name}_add", 256, lambda sizes: ceil_div(threads(sizes), 256))
        return KernelCode(self.w.text(), (first, second), scratch, ("mma.cuh",))

    def _sizes(self) -> None:
        w, p, index = self.w, self.p, self.e.index_type
        w.put(f"const {index} M = {polynomial(p.m)}, N = {polynomial(p.n)}, K = {polynomial(p.k)};")
        if self.chunk:
            w.put(f"const {index} chunks = K > 0 ? (K + {self.chunk - 1}) / {self.chunk} : 1;")

    # ---------------------------------------------------------------------------------------------------- the product
    def _product(self) -> None:
        w, p, tile, index = self.w, self.p, self.tile, self.e.index_type
        rows, columns = tile.fragments
        head = f'extern "C" __global__ void __launch_bounds__({tile.threads}) {self.name}({parameters(p.kernel)})'
        with w.block(head):
            self._sizes()
            w.put("extern __shared__ __align__(16) unsigned char duo_shared[];")
            w.put("const int t = threadIdx.x, lane = t % 32;")
            w.put(f"const int row0 = t / 32 / {tile.warps_n}*{16 * rows}, column0 = t / 32 % {tile.warps_n}*{8 * columns};")
            w.put(f"const {index} tiles_m = (M + {tile.m - 1}) / {tile.m}, tiles_n = (N + {tile.n - 1}) / {tile.n};")
            w.put(f"const {index} rest = ({index})(blockIdx.x / (tiles_m*tiles_n));")
            w.put(f"{index} tile_m, tile_n;")
            w.put(f"duo_place<{index}>(({index})blockIdx.x - rest*(tiles_m*tiles_n), tiles_m, tiles_n, tile_m, tile_n);")
            w.put(f"const {index} m0 = tile_m*{tile.m}, n0 = tile_n*{tile.n};")
            if self.chunk:
                w.put(f"const {index} chunk = rest % chunks, group = rest / chunks, k_begin = chunk*{self.chunk};")
                w.put(f"const {index} k_end = k_begin + {self.chunk} < K ? k_begin + {self.chunk} : K;")
                batch = self.e.unravel("group", p.batch)
            else:
                w.put(f"const {index} k_begin = 0, k_end = K;")
                batch = self.e.unravel("rest", p.batch)
            self._fetch(batch)
            w.put(f"float sum[{rows}][{columns}][4] = {{}};")
            self._main_loop()
            self._results(batch)

    def _pitch(self, operand: Operand, side: int) -> int:
        """Bytes of a line of the operand's tile: a line has the k of a row, or the rows of a k."""
        return self.tile.line if operand.near_k else side * self.dtype.itemsize

    def _reader(self, operand: Operand) -> str:
        return "lines" if operand.near_k else "across" if self.dtype.itemsize == 2 else "words"

    def _fetch(self, batch: Sequence[str]) -> None:
        """Defines `fetch`: it starts the copies of a stage."""
        w, p, tile, index = self.w, self.p, self.tile, self.e.index_type
        with w.block(f"const auto fetch = [&](unsigned char *stage, {index} k0)", "};"):
            self._copies(p.a, tile.m, "M", "m0", "stage", batch)
            self._copies(p.b, tile.n, "N", "n0", f"stage + {tile.m * tile.line}", batch)

    def _copies(self, operand: Operand, side: int, size: str, start: str, stage: str, batch: Sequence[str]) -> None:
        w, index, itemsize = self.w, self.e.index_type, self.dtype.itemsize
        vector, step, threads = operand.vector, self.step, self.tile.threads
        total = side * step // vector
        w.put("#pragma unroll")
        with w.block(f"for (int s = 0; s < {ceil_div(total, threads)}; ++s)"):
            w.put(f"const int u = s*{threads} + t;")
            if total % threads:
                w.put(f"if (u >= {total}) break;")
            near = step if operand.near_k else side
            w.put(f"const int line = u / {near // vector}, at = u % {near // vector}*{vector};")
            row, k = ("line", "at") if operand.near_k else ("at", "line")
            w.put(f"const {index} row = {start} + {row}, col = k0 + {k};")
            address, condition = operand.address(self.e, batch, "row", "col")
            inside = " && ".join([f"row < {size}", "col < k_end", *([f"({condition})"] if condition else [])])
            w.put(f"const bool there = {inside};")
            place = "duo_word" if self._reader(operand) == "words" else "duo_unit"
            target = f"{stage} + {place}<{self._pitch(operand, side)}>(line, at*{itemsize})"
            source = f"a{operand.buffer} + (there ? {address} : 0)"
            if vector * itemsize < 4:
                w.put(f"duo_copy_now((unsigned short *)({target}), {source}, there);")
            else:
                w.put(f"duo_copy_async<{vector * itemsize}>({target}, {source}, there);")

    def _main_loop(self) -> None:
        """Stages are filled `stages - 1` ahead. The barrier says both that a stage has arrived for all and that the one to be filled is no longer read."""
        w, p, tile, index = self.w, self.p, self.tile, self.e.index_type
        rows, columns = tile.fragments
        ahead = tile.stages - 1
        w.put(f"const {index} steps = (k_end - k_begin + {self.step - 1}) / {self.step};")
        w.put("#pragma unroll")
        with w.block(f"for (int s = 0; s < {ahead}; ++s)"):
            w.put(f"if (s < steps) fetch(duo_shared + s*{tile.stage}, k_begin + s*{self.step});")
            w.put("duo_commit();")
        w.put(f"int now = 0, next = {ahead};")
        with w.block(f"for ({index} step = 0; step < steps; ++step)"):
            w.put(f"duo_arrived<{ahead - 1}>();")
            w.put("__syncthreads();")
            w.put(f"if (step + {ahead} < steps) fetch(duo_shared + next*{tile.stage}, k_begin + (step + {ahead})*{self.step});")
            w.put("duo_commit();")
            w.put(f"const unsigned char *const as = duo_shared + now*{tile.stage}, *const bs = as + {tile.m * tile.line};")
            w.put("#pragma unroll")
            with w.block(f"for (int k = 0; k < {tile.line // STEP}; ++k)"):
                w.put(f"unsigned a[{rows}][4], b[{columns}][2];")
                a, b = [f"{self._reader(o)}<{self._pitch(o, side)}>" for o, side in ((p.a, tile.m), (p.b, tile.n))]
                w.put("#pragma unroll")
                w.put(f"for (int i = 0; i < {rows}; ++i) duo_a_{a}(a[i], as, row0 + i*16, k);")
                w.put("#pragma unroll")
                w.put(f"for (int j = 0; j < {columns}; j += 2) duo_b_{b}(b[j], b[j + 1], bs, column0 + j*8, k);")
                if self.dtype is f32:
                    w.put("#pragma unroll")
                    w.put(f"for (int i = 0; i < {rows}; ++i) duo_round_tf32(a[i]);")
                    w.put("#pragma unroll")
                    w.put(f"for (int j = 0; j < {columns}; ++j) duo_round_tf32(b[j]);")
                w.put("#pragma unroll")
                with w.block(f"for (int i = 0; i < {rows}; ++i)"):
                    w.put("#pragma unroll")
                    w.put(f"for (int j = 0; j < {columns}; ++j) duo_mma_{_INSTRUCTION[self.dtype]}(sum[i][j], a[i], b[j]);")
            w.put(f"now = now + 1 < {tile.stages} ? now + 1 : 0;")
            w.put(f"next = next + 1 < {tile.stages} ? next + 1 : 0;")
        w.put("__syncthreads();  // all copies have arrived, and what they brought has been read")

    # ---------------------------------------------------------------------------------------------------- the results
    def _results(self, batch: Sequence[str]) -> None:
        """16 rows at a time through shared memory of the warp, then the epilogue, or the chunk's sums, by vectors of a row."""
        w, p, tile, index = self.w, self.p, self.tile, self.e.index_type
        rows, columns = tile.fragments
        pitch, width = tile.pitch, 8 * columns
        count = self._together() if self.chunk else p.width
        w.put(f"float *const slab = (float *)duo_shared + t / 32*{16 * pitch};")
        w.put("#pragma unroll")
        with w.block(f"for (int i = 0; i < {rows}; ++i)"):
            w.put("__syncwarp();")
            w.put("#pragma unroll")
            with w.block(f"for (int j = 0; j < {columns}; ++j)"):
                for half in (0, 1):
                    place = f"slab + (lane / 4 + {8 * half})*{pitch} + j*8 + lane % 4*2"
                    w.put(f"*(Pack<float, 2> *)({place}) = {{{{sum[i][j][{2 * half}], sum[i][j][{2 * half + 1}]}}}};")
            w.put("__syncwarp();")
            with w.block(f"for (int u = lane; u < {16 * width // count}; u += 32)"):
                w.put(f"const int r = u / {width // count}, c = u % {width // count}*{count};")
                w.put(f"const {index} m = m0 + row0 + i*16 + r, first = n0 + column0 + c;")
                w.put("if (m >= M || first >= N) continue;")
                w.put(f"const float *const part = slab + r*{pitch} + c;")
                if self.chunk:
                    place = "(float *)scratch + (((long long)group*chunks + chunk)*M + m)*N + first"
                    w.put(f"*(Pack<float, {count}> *)({place}) = *(const Pack<float, {count}> *)part;")
                else:
                    emit_results(self.e, p, batch, "part[%s]", count)

    def _together(self) -> int:
        """Columns of a partial sum that are written as one: four where rows are multiples of four."""
        return 4 if isinstance(self.p.n, int) and self.p.n % 4 == 0 else 1

    def _combine(self) -> None:
        """The second launch: adds the chunks in order, then the epilogue; a thread has the columns of one vector."""
        w, p, index, width = self.w, self.p, self.e.index_type, self.p.width
        with w.block(f'extern "C" __global__ void __launch_bounds__(256) {self.name}_add({parameters(p.kernel)})'):
            self._sizes()
            w.put(f"const {index} unit = (({index})blockIdx.x*256 + ({index})threadIdx.x)*{width}, size = M*N;")
            w.put(f"if (unit >= {polynomial(product(p.batch))}*size) return;")
            w.put(f"const {index} group = unit / size, m = unit / N % M, first = unit % N;")
            batch = self.e.unravel("group", p.batch)
            pack = f"Pack<float, {min(width, 4)}>"
            w.put("const float *const part = (const float *)scratch + (long long)group*chunks*size + m*N + first;")
            w.put(f"float sum[{width}] = {{}};")
            with w.block(f"for ({index} c = 0; c < chunks; ++c)"):
                w.put("#pragma unroll")
                with w.block(f"for (int j = 0; j < {width}; j += {min(width, 4)})"):
                    w.put(f"const {pack} x = *(const {pack} *)(part + (long long)c*size + j);")
                    w.put("#pragma unroll")
                    w.put(f"for (int l = 0; l < {min(width, 4)}; ++l) sum[j + l] += x.v[l];")
            emit_results(self.e, p, batch, "sum[%s]", width)
