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

BLOCK = 512  # K per block: the sums of blocks are added in order (rule 2)


def compute_dtype(acc: DType) -> DType:
    """What a tile accumulates in. Narrow integers use i32: wrapping i32 sums truncate to the wrapped narrow sum."""
    return acc if acc in (f32, f64, i64) else i32


def lanes_of(target: Target, compute: DType) -> int:
    return target.vector_bytes // compute.itemsize


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


def best_tile(m: int | None, column_vectors: int | None, registers: int) -> tuple[int, int]:
    """(rows, vectors) of the fastest tile for an m x (column_vectors * lanes) result; None where the size is not known."""
    best: tuple[float, int, int] | None = None
    for vectors in range(1, 9):
        if column_vectors is not None and vectors > column_vectors:
            break
        panels = -(-column_vectors // vectors) if column_vectors else 1000 / vectors
        limit = max_rows(vectors, registers)
        for rows in range(1, min(limit, 14) + 1):
            if m is None:
                cost = tile_cost(rows, vectors) / rows
            else:
                tiles = -(-m // rows)
                high = -(-m // tiles)
                if high != rows:
                    continue
                big = m - tiles * (high - 1)
                cost = big * tile_cost(high, vectors) + (tiles - big) * tile_cost(high - 1, vectors)
            cost *= panels * (1 + 0.003 * (rows / vectors + vectors))
            if best is None or cost < best[0]:
                best = (cost, rows, vectors)
    assert best is not None
    return best[1], best[2]


# ---------------------------------------------------------------------------------------------------- micro-kernel
@dataclass(frozen=True)
class Tile:
    """A micro-kernel's shape and how it reads A and B: the dtypes in memory (converted to `compute` as they are read), the
    bytes between rows of A and between vectors of one k step of B."""

    rows: int
    vectors: int
    a: DType
    a_row: int
    b: DType
    b_vector: int
    compute: DType


def emit_micro_kernel(module: Module, target: Target, name: str, tile: Tile) -> None:
    """define void @name(i64 k, ptr a, i64 a_step, ptr b, i64 b_step, ptr tile, i1 add); steps in bytes per k.

    The tile's rows are `vectors * lanes` elements apart."""
    f = Function(
        module,
        f"define internal void @{name}(i64 %k, ptr noalias readonly %a, i64 %as, ptr noalias readonly %b, i64 %bs, "
        "ptr noalias %tile, i1 %add) noinline #0",
    )
    rows, vectors, a, b, compute = tile.rows, tile.vectors, tile.a, tile.b, tile.compute
    lanes = lanes_of(target, compute)
    element = register_type(compute)
    type_ = vector(lanes, element)
    sums = [(type_, "zeroinitializer")] * (rows * vectors)

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
            for v in range(vectors):
                out.append(multiply_add(f, type_, splat, columns[v], acc[r * vectors + v], compute))
        return out

    unroll = 4 if rows * vectors <= 8 else 1
    a_at, b_at, acc = "%a", "%b", [initial for _, initial in sums]
    k_done = "0"
    for count in dict.fromkeys((unroll, 1)):
        end = "%k" if count == 1 else f.op(f"and i64 %k, {-count}")
        carried = [("ptr", a_at), ("ptr", b_at), *((type_, x) for x in acc)]
        with f.loop(k_done, end, count, carried) as loop:
            a_at, b_at, *acc = loop.values
            for _ in range(count):
                acc = step(a_at, b_at, acc)
                a_at = f.op(f"getelementptr i8, ptr {a_at}, i64 %as")
                b_at = f.op(f"getelementptr i8, ptr {b_at}, i64 %bs")
            loop.next = [a_at, b_at, *acc]
        a_at, b_at, *acc = loop.results
        k_done = end

    addition = "fadd" if compute.is_float else "add"
    places = [f.gep("i8", "%tile", str(i * lanes * compute.itemsize)) for i in range(rows * vectors)]
    with f.when("%add"):
        for at, value in zip(places, acc, strict=True):
            before = f.op(f"load {type_}, ptr {at}, align {lanes * compute.itemsize}")
            f.emit(
                f"store {type_} {f.op(f'{addition} {type_} {before}, {value}')}, ptr {at}, align "
                f"{lanes * compute.itemsize}"
            )
    with f.when(f.op("xor i1 %add, true")):
        for at, value in zip(places, acc, strict=True):
            f.emit(f"store {type_} {value}, ptr {at}, align {lanes * compute.itemsize}")
    f.finish()


def multiply_add(f: Function, type_: str, x: str, y: str, acc: str, compute: DType) -> str:
    if compute.is_float:
        return f.op(f.intrinsic("fma", type_, [(type_, x), (type_, y), (type_, acc)]))
    return f.op(f"add {type_} {f.op(f'mul {type_} {x}, {y}')}, {acc}")
