"""Register tiles of the contraction: which shape to use, and the micro-kernel that computes one.

A micro-kernel multiplies `rows` rows of A by `vectors` vectors of columns of B over one K block of at most 512 and
leaves the sums in a small contiguous tile of memory, [rows][vectors * lanes], either written or added to. Each sum starts at
+0.0 and takes fma(a, b, acc) for ascending k (numerics contract, rule 2). It knows nothing of the matrices' shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from duo_backends.cpu.code import Target
from duo_backends.cpu.convert import convert
from duo_backends.cpu.gemm_pack import load_transposed
from duo_backends.cpu.llvm import Function, Module, memory_type, register_type, vector
from duo_ir.types import DType, f32, f64, i32, i64

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


def best_tile(m: int | None, column_vectors: int | None, registers: int) -> tuple[int, int]:
    """(rows, vectors) of the fastest tile for an m x (column_vectors * lanes) result; None where the size is not known."""
    best: tuple[float, int, int] | None = None
    for vectors in range(1, min(8, column_vectors or 8) + 1):
        widths = _pieces(column_vectors or 840, vectors, even=False)
        for rows in range(1, min(max_rows(vectors, registers), 14) + 1):
            heights = _pieces(m or 360360, rows, even=True)
            if heights[0][0] != rows:
                continue
            cost = sum(tile_cost(h, w) * hs * ws for h, hs in heights for w, ws in widths)
            # loads of B and of A for each multiply-add; rows that may have to be packed; code for the last panel
            cost *= 1 + 0.3 / rows + 0.1 / vectors + (0.02 if rows > 8 else 0) + 0.03 * (len(widths) - 1)
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
    k instead and transposed on the fly: for few rows that is faster than packing (None: so many bytes as the call's step of B says)."""

    rows: int
    vectors: int
    a: DType
    a_row: int
    b: DType
    b_vector: int
    compute: DType
    b_column: int | None = 0
    adds: bool = True  # whether it is ever called with `add`


def emit_micro_kernel(module: Module, target: Target, name: str, tile: Tile) -> None:
    """define void @name(i64 k, ptr a, i64 a_step, ptr b, i64 b_step, ptr tile, i1 add); steps in bytes per k.

    The tile's rows are `vectors * lanes` elements apart."""
    f = Function(
        module,
        f"define internal void @{name}(i64 %k, ptr noalias readonly %a, i64 %as, ptr noalias readonly %b, i64 %bs, "
        "ptr noalias %tile, i1 %add) noinline #0",
    )
    rows, a, b, compute = tile.rows, tile.a, tile.b, tile.compute
    lanes = lanes_of(target, compute)
    vectors, transposes = tile.vectors, tile.b_column != 0
    if transposes:
        lanes, vectors = transposed_lanes(target, compute), vectors * lanes // transposed_lanes(target, compute)
    element = register_type(compute)
    type_ = vector(lanes, element)

    def columns(v: int, b_at: str, steps: int) -> list[str]:
        """Vector v of the columns of B, for each of some k steps."""
        if not transposes:
            at = f.gep("i8", b_at, str(v * tile.b_vector))
            loaded = f.op(f"load {vector(lanes, memory_type(b))}, ptr {at}, align {b.itemsize}")
            return [convert(f, target, loaded, b, compute, lanes, None)]
        apart = "%bs" if tile.b_column is None else str(tile.b_column)
        starts = [f.gep("i8", b_at, f.mul(apart, str(v * lanes + lane), f.top)) for lane in range(lanes)]
        if steps == 1:
            loose, value = vector(lanes, memory_type(b)), "poison"
            for lane, at in enumerate(starts):
                loaded = f.op(f"load {memory_type(b)}, ptr {at}, align {b.itemsize}")
                value = f.op(f"insertelement {loose} {value}, {memory_type(b)} {loaded}, i64 {lane}")
            return [convert(f, target, value, b, compute, lanes, None)]
        out: list[str] = []
        while len(out) < steps:
            pieces = [f.gep("i8", start, str(len(out) * b.itemsize)) for start in starts]
            out += load_transposed(f, target, pieces, b, compute)
        return out

    def step(a_at: list[str], b_at: str, acc: list[str]) -> list[str]:
        """One k step for each address of A's column; all steps of a vector of columns of B before the next vector."""
        out = list(acc)
        loaded = [columns(v, b_at, len(a_at)) for v in range(1 if transposes else vectors)]
        for v0 in range(vectors if transposes else 1):
            if v0:
                loaded = [columns(v0, b_at, len(a_at))]
            for number, a_k in enumerate(a_at):
                for r in range(rows):
                    at = f.gep("i8", a_k, str(r * tile.a_row))
                    scalar = f.op(f"load {memory_type(a)}, ptr {at}, align {a.itemsize}")
                    splat = broadcast(f, convert(f, target, scalar, a, compute, 1, None), lanes, element)
                    for v, values in enumerate(loaded, v0):
                        place = r * vectors + v
                        out[place] = multiply_add(f, type_, splat, values[number], out[place], compute)
        return out

    a_at, b_at, acc = "%a", "%b", ["zeroinitializer"] * (rows * vectors)
    unroll = 64 // compute.itemsize if transposes else 4 if rows * vectors <= 8 else 2 if rows * vectors <= 12 else 1
    together = unroll if transposes else 1  # k steps that share their loads of B
    k_done = "0"
    for count in dict.fromkeys((unroll, 1)):
        end = "%k" if count == 1 else f.op(f"and i64 %k, {-count}")
        carried = [("ptr", a_at), ("ptr", b_at), *((type_, x) for x in acc)]
        with f.loop(k_done, end, count, carried) as loop:
            a_at, b_at, *acc = loop.values
            for _ in range(0, count, together):
                addresses = [a_at]
                for _ in range(min(count, together)):
                    addresses.append(f.op(f"getelementptr i8, ptr {addresses[-1]}, i64 %as"))
                acc = step(addresses[:-1], b_at, acc)
                a_at = addresses[-1]
                advance = "%bs" if together == 1 else str(min(count, together) * b.itemsize)
                b_at = f.op(f"getelementptr i8, ptr {b_at}, i64 {advance}")
            loop.next = [a_at, b_at, *acc]
        a_at, b_at, *acc = loop.results
        k_done = end

    align = lanes * compute.itemsize
    places = [f.gep("i8", "%tile", str(i * align)) for i in range(rows * vectors)]

    def leave(add: bool) -> None:
        for at, value in zip(places, acc, strict=True):
            if add:
                before = f.op(f"load {type_}, ptr {at}, align {align}")
                value = f.op(f"{'fadd' if compute.is_float else 'add'} {type_} {before}, {value}")
            f.emit(f"store {type_} {value}, ptr {at}, align {align}")

    if tile.adds:
        with f.when("%add"):
            leave(True)
        with f.when(f.op("xor i1 %add, true")):
            leave(False)
    else:
        leave(False)
    f.finish()


def multiply_add(f: Function, type_: str, x: str, y: str, acc: str, compute: DType) -> str:
    if compute.is_float:
        return f.op(f.intrinsic("fma", type_, [(type_, x), (type_, y), (type_, acc)]))
    return f.op(f"add {type_} {f.op(f'mul {type_} {x}, {y}')}, {acc}")
