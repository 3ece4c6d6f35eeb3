"""The micro-kernel for few rows of A and a B that lies with k contiguous (x W' of one or a few x): B is transposed in registers.

Packing B would cost more than the product, so each strip of one cache line along k is read from as many columns as a vector has lanes, turned, and
multiplied at once; the sums of all its columns wait in memory meanwhile, so that many columns' chains of additions overlap. The order of
additions is the contract's.
"""

from __future__ import annotations

from duo_backends.cpu.code import Target
from duo_backends.cpu.convert import convert
from duo_backends.cpu.gemm_pack import load_square
from duo_backends.cpu.gemm_tile import PARAMETERS, Tile, broadcast, lanes_of, leave_sums, multiply_add
from duo_backends.cpu.llvm import Function, Module, memory_type, register_type, vector

AHEAD = 128  # how far ahead, in bytes, lines are asked for; the hardware does not follow so many columns


def emit_rows_kernel(module: Module, target: Target, name: str, tile: Tile) -> None:
    """As `gemm_tile.emit_micro_kernel`, for a `tile` with `b_column`."""
    f = Function(module, f"define internal void @{name}({PARAMETERS}) noinline #0")
    rows, vectors, a, b, compute = tile.rows, tile.vectors, tile.a, tile.b, tile.compute
    lanes, element = lanes_of(target, compute), register_type(compute)
    type_, size = vector(lanes, element), lanes * compute.itemsize
    apart = "%bs" if tile.b_column is None else str(tile.b_column)
    columns = [f.mul(apart, str(lane), f.top) for lane in range(lanes)]
    next_vector = f.mul(apart, str(lanes), f.top)
    sums = f.alloca(type_, rows * vectors)
    for i in range(rows * vectors):
        f.emit(f"store {type_} zeroinitializer, ptr {f.gep('i8', sums, str(i * size))}, align {size}")

    def each_vector(a_at: list[str], b_at: str, count: int) -> None:
        """The k steps whose elements of A's first row are at `a_at`, for all vectors of columns."""
        with f.loop("0", str(vectors), 1, [("ptr", b_at), ("ptr", sums)], runs=True) as loop:
            first, place = loop.values
            starts = [f.gep("i8", first, column) for column in columns]
            places = [f.gep("i8", place, str(r * vectors * size)) for r in range(rows)]
            acc = [f.op(f"load {type_}, ptr {at}, align {size}") for at in places]
            values = _one_step(starts) if count == 1 else load_square(f, target, starts, b, compute)
            for at, value in zip(a_at, values, strict=True):
                for r in range(rows):
                    scalar = f.op(
                        f"load {memory_type(a)}, ptr {f.gep('i8', at, str(r * tile.a_row))}, align {a.itemsize}"
                    )
                    splat = broadcast(f, convert(f, target, scalar, a, compute, 1, None), lanes, element)
                    acc[r] = multiply_add(f, type_, splat, value, acc[r], compute)
            if count > 1:
                for start in starts:
                    ahead = [("ptr", f.gep("i8", start, str(AHEAD))), ("i32", "0"), ("i32", "3"), ("i32", "1")]
                    f.emit(f.intrinsic("prefetch", "void", ahead, "p0"))
            for at, value in zip(places, acc, strict=True):
                f.emit(f"store {type_} {value}, ptr {at}, align {size}")
            loop.next = [f.gep("i8", first, next_vector), f.gep("i8", place, str(size))]

    def _one_step(starts: list[str]) -> list[str]:
        loose, value = vector(lanes, memory_type(b)), "poison"
        for lane, at in enumerate(starts):
            loaded = f.op(f"load {memory_type(b)}, ptr {at}, align {b.itemsize}")
            value = f.op(f"insertelement {loose} {value}, {memory_type(b)} {loaded}, i64 {lane}")
        return [convert(f, target, value, b, compute, lanes, None)]

    a_at, b_at, done = "%a", "%b", "0"
    for count in dict.fromkeys((lanes, 1)):
        end = "%k" if count == 1 else f.op(f"and i64 %k, {-count}")
        with f.loop(done, end, count, [("ptr", a_at), ("ptr", b_at)]) as loop:
            a_k = [loop.values[0]]
            for _ in range(count):
                a_k.append(f.op(f"getelementptr i8, ptr {a_k[-1]}, i64 %as"))
            each_vector(a_k[:-1], loop.values[1], count)
            loop.next = [a_k[-1], f.gep("i8", loop.values[1], str(count * b.itemsize))]
        (a_at, b_at), done = loop.results, end
    places = [f.gep("i8", sums, str(i * size)) for i in range(rows * vectors)]
    leave_sums(f, tile, type_, size, [f.op(f"load {type_}, ptr {at}, align {size}") for at in places])
    f.finish()
