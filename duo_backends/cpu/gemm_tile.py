"""Register tiles of the contraction: which shape to use, and the micro-kernel that computes one.

A micro-kernel multiplies `rows` rows of A by `vectors` vectors of columns of B over one K block of at most 512 and
leaves the sums in a small contiguous tile of memory, [rows][vectors * lanes], either written or added to. Each sum starts at
+0.0 and takes fma(a, b, acc) for ascending k (numerics contract, rule 2). It knows nothing of the matrices' shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from duo_backends.cpu.code import Target
from duo_backends.cpu.convert import convert
from duo_backends.cpu.llvm import Function, Module, memory_type, register_type, vector
from duo_ir.types import DType, f32, f64, i32, i64

LINE = 64  # bytes of a cache line
_STEPS_TOGETHER = 48  # multiply-adds of the steps of a group up to which they are written out: code costs time to generate, and short loops time to run
BLOCK = 512  # K per block: the sums of blocks are added in order (rule 2)


def compute_dtype(acc: DType) -> DType:
    """What a tile accumulates in. Narrow integers use i32: wrapping i32 sums truncate to the wrapped narrow sum."""
    return acc if acc in (f32, f64, i64) else i32


def lanes_of(target: Target, compute: DType) -> int:
    return target.vector_bytes // compute.itemsize


def transposed_lanes(target: Target, compute: DType) -> int:
    """Lanes of the vectors that transposes work in: 32 bytes are enough to fill the shuffle units, and take few rows that may
    share a cache set."""
    return min(target.vector_bytes, 32) // compute.itemsize


def registers_of(target: Target) -> int:
    """Vector registers that compiled code may use."""
    return 32 if target.vector_bytes == 64 or target.arch != "x86_64" else 16


def broadcast(f: Function, scalar: str, width: int, element: str) -> str:
    to = vector(width, element)
    first = f.op(f"insertelement {to} poison, {element} {scalar}, i64 0")
    return f.op(f"shufflevector {to} {first}, {to} poison, <{width} x i32> zeroinitializer")


# ------------------------------------------------------------------------------------------------------ tile shapes
def tile_cost(rows: int, vectors: int) -> float:
    """Rough cycles of one k step: two multiply-adds and two loads a cycle, and a latency of four cycles to hide."""
    return max(rows * vectors / 2, (rows + vectors) / 2, 4.0) + 0.5


def max_rows(vectors: int, registers: int) -> int:
    """Rows whose accumulators fit beside one row of B and a broadcast of A."""
    return (registers - 1 - vectors) // vectors


def best_tile(m: int | None, column_vectors: int | None, registers: int, side_by_side: bool = False) -> tuple[int, int]:
    """(rows, vectors) of the fastest tile for an m x (column_vectors * lanes) result; None where the size is not known.
    `side_by_side`: rows of A lie so, and are packed with fewer reads of each line the more of them there are."""
    best: tuple[float, int, int] | None = None
    for vectors in range(1, min(8, column_vectors or 8) + 1):
        widths = _pieces(column_vectors or 840, vectors, even=False)
        for rows in range(1, min(max_rows(vectors, registers), 14) + 1):
            heights = _pieces(m or 360360, rows, even=True)
            if heights[0][0] != rows:
                continue
            cost = sum(tile_cost(h, w) * hs * ws for h, hs in heights for w, ws in widths)
            # loads of B and of A for each multiply-add; rows that may have to be packed; code for the last panel
            cost *= 1 + 0.3 / rows + 0.1 / vectors + (0.02 if rows > 8 and not side_by_side else 0) + 0.03 * (len(widths) - 1)
            if best is None or cost < best[0]:
                best = (cost, rows, vectors)
    assert best is not None
    return best[1], best[2]


def _pieces(total: int, largest: int, even: bool) -> list[tuple[int, int]]:
    """(size, count) of the pieces that `total` is cut into: evenly, or full ones and a smaller last one."""
    count = -(-total // largest)
    if not even:
        return [(largest, total // largest), *([(total % largest, 1)] if total % largest else [])]
    high = -(-total // count)
    big = total - count * (high - 1)
    return [(high, big), *([(high - 1, count - big)] if count > big else [])]


# ---------------------------------------------------------------------------------------------------- micro-kernel
@dataclass(frozen=True)
class Tile:
    """A micro-kernel's shape and how it reads A and B: the dtypes in memory (converted to `compute` as they are read), the
    bytes between rows of A and between vectors of one k step of B. With `b_column`, the bytes between columns, B is contiguous along
    k instead (None: so many bytes as the call's step of B says); that is for `gemm_rows.py`."""

    rows: int
    vectors: int
    a: DType
    a_row: int
    b: DType
    b_vector: int
    compute: DType
    b_column: int | None = 0
    adds: bool = True  # whether it is ever called with `add`
    b_ahead: int = 0  # k steps from here whose row of B is asked for early; 0: none
    b_beside: int = 0  # bytes along B's rows from here that are asked for early; 0: none
    carries: bool = False  # whether the sums begin at what the tile in memory holds instead of +0.0
    asks: int = 0  # k steps from one line that the epilogue will meet to the next one asked for; 0: none are
    b_next: bool = False  # whether a line of the next panel of B is asked for at each k step
    a_ahead: bool = False  # whether the lines of the next tile of A, which follows this one in memory, are asked for
    multiple: int = 0  # what the number of k steps of each call is a multiple of, and at least; 0: nothing is known


PARAMETERS = "i64 %k, ptr noalias readonly %a, i64 %as, ptr noalias readonly %b, i64 %bs, ptr noalias %tile, i1 %add"  # see below
NEXT = ", i64 %next"  # with `b_next`: bytes from a k step's B to the line that it asks for
# with `asks`: addresses of the lines that the epilogue will read, then of those that it will write, and how many there are
ASKS = ", ptr %asks, i64 %reads, i64 %writes"


def emit_micro_kernel(module: Module, target: Target, name: str, tile: Tile) -> None:
    """define void @name(i64 k, ptr a, i64 a_step, ptr b, i64 b_step, ptr tile, i1 add); steps in bytes per k.

    The tile's rows are `vectors * lanes` elements apart. Not for a `tile` with `b_column`."""
    f = Function(module, f"define internal void @{name}({PARAMETERS}{NEXT if tile.b_next else ''}{ASKS if tile.asks else ''}) noinline #0")
    rows, vectors, a, b, compute = tile.rows, tile.vectors, tile.a, tile.b, tile.compute
    lanes, element = lanes_of(target, compute), register_type(compute)
    type_ = vector(lanes, element)

    def step(a_at: str, b_at: str, acc: list[str]) -> list[str]:
        columns = []
        for v in range(vectors):
            at = f.gep("i8", b_at, str(v * tile.b_vector))
            loaded = f.op(f"load {vector(lanes, memory_type(b))}, ptr {at}, align {b.itemsize}")
            columns.append(convert(f, target, loaded, b, compute, lanes, None))
        out = []
        for r in range(rows):
            at = f.gep("i8", a_at, str(r * tile.a_row))
            scalar = f.op(f"load {memory_type(a)}, ptr {at}, align {a.itemsize}")
            splat = broadcast(f, convert(f, target, scalar, a, compute, 1, None), lanes, element)
            for v, column in enumerate(columns):
                out.append(multiply_add(f, type_, splat, column, acc[r * vectors + v], compute))
        return out

    before = ["zeroinitializer"] * (rows * vectors)
    if tile.carries:
        size = lanes * compute.itemsize
        before = [f.op(f"load {type_}, ptr {f.gep('i8', '%tile', str(i * size))}, align {size}") for i in range(rows * vectors)]
    types, values = ["ptr", "ptr", *(type_ for _ in before)], ["%a", "%b", *before]

    def steps(values: list[str], count: int) -> list[str]:
        """The values after so many steps: where A and B are read, and the sums."""
        a_at, b_at, *acc = values
        for _ in range(count):
            if tile.b_ahead or tile.b_beside:
                _ask_b(f, b_at, tile)
            if tile.b_next:
                ask(f, f.op(f"getelementptr i8, ptr {b_at}, i64 %next"), near=2)
            acc = step(a_at, b_at, acc)
            a_at = f.op(f"getelementptr i8, ptr {a_at}, i64 %as")
            b_at = f.op(f"getelementptr i8, ptr {b_at}, i64 %bs")
        return [a_at, b_at, *acc]

    def run(begin: str, end: str, count: int, values: list[str], runs: bool) -> list[str]:
        """Steps from `begin` to `end`, `count` at a time."""
        with f.loop(begin, end, count, [*zip(types, values)], runs) as loop:
            loop.next = steps(loop.values, count)
        return loop.results

    every, known = tile.asks or (_steps_of_line(tile) if tile.a_ahead else 0), tile.multiple > 0
    if every:  # groups of steps, before each of which lines are asked for
        whole = every * rows * vectors <= _STEPS_TOGETHER and known and tile.multiple % every == 0
        # which line on the list is next; the line of the next tile's A to ask for, and how many rows from there are left
        state = [("i64", "0")] if tile.asks else []
        if tile.a_ahead:
            state += [("ptr", f.gep("i8", "%a", str(rows * tile.a_row))), ("i64", str(rows))]
        asks = f.add("%reads", "%writes") if tile.asks else "0"
        with f.loop("0", "%k", every, [*zip(types, values), *state], runs=known) as groups:
            now, after = groups.values[: len(types)], []
            if tile.asks:
                after.append(_ask_listed(f, groups.values[len(types)], asks))
            if tile.a_ahead:
                at, left = groups.values[-2:]
                for _ in range(max(1, every // _steps_of_line(tile))):
                    at, left = _ask_a(f, tile, at, left)
                after += [at, left]
            end = f.op(f"add i64 {groups.index}, {every}")
            now = steps(now, every) if whole or every == 1 else run(groups.index, f.min(end, "%k"), 1, now, True)
            groups.next = [*now, *after]
        values = groups.results[: len(types)]
    else:
        unroll = 4 if rows * vectors <= 8 else 2 if rows * vectors <= 12 else 1
        done = f.op(f"and i64 %k, {-unroll}") if unroll > 1 else "%k"
        values = run("0", done, unroll, values, known and tile.multiple >= unroll)
        if unroll > 1 and not (known and tile.multiple % unroll == 0):
            values = run(done, "%k", 1, values, False)
    leave_sums(f, tile, type_, lanes * compute.itemsize, values[2:])
    f.finish()


def ask(f: Function, at: str, write: int = 0, near: int = 3) -> None:
    """Asks for the cache line at `at`. `near`: 3 for the first-level cache, 2 for the second."""
    operands = [("ptr", at), ("i32", str(write)), ("i32", str(near)), ("i32", "1")]
    f.emit(f.intrinsic("prefetch", "void", operands, "p0"))


def _ask_listed(f: Function, number: str, asks: str) -> str:
    """Asks for the line of that number on the list, if there are so many; the next number."""
    with f.when(f.op(f"icmp slt i64 {number}, {asks}")):
        line = f.op(f"load ptr, ptr {f.op(f'getelementptr ptr, ptr %asks, i64 {number}')}, align 8")
        read = f.op(f"icmp slt i64 {number}, %reads")
        with f.when(read):
            ask(f, line)
        with f.when(f.op(f"xor i1 {read}, true")):
            ask(f, line, 1)
    return f.op(f"add i64 {number}, 1")


def _steps_of_line(tile: Tile) -> int:
    """K steps after which another line of the next tile of A is due: a line of each row lasts as many steps as it has elements. 1, 2 or 4."""
    return next(n for n in (4, 2, 1) if n == 1 or n * tile.rows <= LINE // tile.a.itemsize)


def _ask_a(f: Function, tile: Tile, at: str, left: str) -> tuple[str, str]:
    """Asks for the line `at` of the next tile of A; the line after it, down its rows and then along them, and the rows left from there."""
    ask(f, at)
    left = f.op(f"sub i64 {left}, 1")
    bottom = f.op(f"icmp eq i64 {left}, 0")
    far = f.op(f"select i1 {bottom}, i64 {LINE - (tile.rows - 1) * tile.a_row}, i64 {tile.a_row}")
    left = f.op(f"select i1 {bottom}, i64 {tile.rows}, i64 {left}")
    return f.op(f"getelementptr i8, ptr {at}, i64 {far}"), left


def _ask_b(f: Function, b_at: str, tile: Tile) -> None:
    """Asks for the row of B `b_ahead` k steps from here, or for this row from `b_beside` bytes on."""
    row = f.gep("i8", b_at, str(tile.b_beside) if tile.b_beside else f.mul("%bs", str(tile.b_ahead), f.top))
    for v in range(tile.vectors):
        ask(f, f.gep("i8", row, str(v * tile.b_vector)))


def leave_sums(f: Function, tile: Tile, type_: str, size: int, sums: list[str]) -> None:
    """Writes vectors of `size` bytes to the tile in memory, or adds them to it."""
    places = [f.gep("i8", "%tile", str(i * size)) for i in range(len(sums))]

    def leave(add: bool) -> None:
        for at, value in zip(places, sums, strict=True):
            if add:
                before = f.op(f"load {type_}, ptr {at}, align {size}")
                value = f.op(f"{'fadd' if tile.compute.is_float else 'add'} {type_} {before}, {value}")
            f.emit(f"store {type_} {value}, ptr {at}, align {size}")

    if not tile.adds:
        leave(False)
        return
    with f.when("%add"):
        leave(True)
    with f.when(f.op("xor i1 %add, true")):
        leave(False)


def multiply_add(f: Function, type_: str, x: str, y: str, acc: str, compute: DType) -> str:
    if compute.is_float:
        return f.op(f.intrinsic("fma", type_, [(type_, x), (type_, y), (type_, acc)]))
    return f.op(f"add {type_} {f.op(f'mul {type_} {x}, {y}')}, {acc}")
