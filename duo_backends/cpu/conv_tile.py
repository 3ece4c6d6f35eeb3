"""Micro-kernel of a convolution: a tile of sums over one K block, A read where it lies, in runs of consecutive k.

Like `gemm_tile.py`'s, but the rows of A are at any constant distances and K comes in runs (a kernel row of contiguous positions and channels,
say), given as a table of (offset in A, length). The sums go on from run to run: each starts at +0.0 and takes fma(a, b, acc) for
ascending k of the block (numerics contract, rule 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from duo_backends.cpu.code import Target
from duo_backends.cpu.gemm_tile import broadcast, lanes_of, multiply_add
from duo_backends.cpu.llvm import Function, Module, register_type, vector
from duo_ir.types import DType

MOST_UNROLLED = 32  # k steps that are written out instead of read from a table
RUN_WORDS = 3  # of a run in the table: bytes from the tile's first element of A, length, and what packing w needs


@dataclass(frozen=True)
class RunTile:
    """`rows`: bytes from the first row of A to each; `steps`: bytes from the tile's first element of A to each k, where they are few and known."""

    rows: tuple[int, ...]
    vectors: int
    compute: DType
    a_step: int | None  # bytes of A per k within a run; None: the third word of each says
    steps: tuple[int, ...] = ()
    adds: bool = True  # whether it is ever called with `add`
    in_place: bool = False  # b is where it was given: it may be unaligned
    fetches: bool = False  # what the call says of the next block of b, which comes from far


def emit_run_kernel(module: Module, target: Target, name: str, tile: RunTile) -> None:
    """define void @name(ptr a, ptr b, ptr runs, i64 count, ptr tile, i1 add, i64 ahead): b is packed, `vectors` vectors each k step; the
    sums are [rows][vectors * lanes], written or added to. A tile that `fetches` asks at each k step for what lies `ahead` bytes on."""
    f = Function(
        module,
        f"define internal void @{name}(ptr noalias readonly %a, ptr noalias readonly %b, ptr noalias readonly %runs, "
        "i64 %count, ptr noalias %tile, i1 %add, i64 %ahead) noinline #0",
    )
    compute, vectors = tile.compute, tile.vectors
    lanes, element = lanes_of(target, compute), register_type(compute)
    type_, size = vector(lanes, element), lanes * compute.itemsize
    align = compute.itemsize if tile.in_place else size

    def step(a_at: str, b_at: str, acc: list[str], offset: int = 0, k: int = 0) -> list[str]:
        out = list(acc)
        columns = []
        for v in range(vectors):
            columns.append(f.op(f"load {type_}, ptr {f.gep('i8', b_at, str((k * vectors + v) * size))}, align {align}"))
        if tile.fetches and not tile.steps:
            next_ = f.gep("i8", b_at, "%ahead")
            f.emit(f.intrinsic("prefetch", "void", [("ptr", next_), ("i32", "0"), ("i32", "2"), ("i32", "1")], "p0"))
        for r, row in enumerate(tile.rows):
            scalar = f.op(f"load {element}, ptr {f.gep('i8', a_at, str(row + offset))}, align {compute.itemsize}")
            splat = broadcast(f, scalar, lanes, element)
            for v in range(vectors):
                place = r * vectors + v
                out[place] = multiply_add(f, type_, splat, columns[v], out[place], compute)
        return out

    acc = ["zeroinitializer"] * (len(tile.rows) * vectors)
    if tile.steps:
        for k, offset in enumerate(tile.steps):
            acc = step("%a", "%b", acc, offset, k)
    else:
        acc = _over_runs(f, tile, type_, vectors * size, acc, step)
    places = [f.gep("i8", "%tile", str(i * size)) for i in range(len(acc))]

    def leave(add: bool) -> None:
        for at, value in zip(places, acc, strict=True):
            if add:
                before = f.op(f"load {type_}, ptr {at}, align {size}")
                value = f.op(f"{'fadd' if compute.is_float else 'add'} {type_} {before}, {value}")
            f.emit(f"store {type_} {value}, ptr {at}, align {size}")

    if tile.adds:
        with f.when("%add"):
            leave(True)
        with f.when(f.op("xor i1 %add, true")):
            leave(False)
    else:
        leave(False)
    f.finish()


def _over_runs(f: Function, tile: RunTile, type_: str, b_step: int, acc: list[str], step: object) -> list[str]:
    assert callable(step)
    carried = [("ptr", "%b"), *((type_, x) for x in acc)]
    with f.loop("0", "%count", 1, carried, runs=True) as run:
        b_at, *acc = run.values
        entry = f.gep("i64", "%runs", f.mul(run.index, str(RUN_WORDS)))
        offset = f.op(f"load i64, ptr {entry}, align 8")
        length = f.op(f"load i64, ptr {f.gep('i64', entry, '1')}, align 8")
        a_at = f.op(f"getelementptr i8, ptr %a, i64 {offset}")
        a_step = str(tile.a_step)
        if tile.a_step is None:
            a_step = f.op(f"load i64, ptr {f.gep('i64', entry, '2')}, align 8")
        with f.loop("0", length, 1, [("ptr", a_at), ("ptr", b_at), *((type_, x) for x in acc)], runs=True) as k:
            a_at, b_at, *acc = k.values
            acc = step(a_at, b_at, acc)
            a_at = f.op(f"getelementptr i8, ptr {a_at}, i64 {a_step}")
            b_at = f.op(f"getelementptr i8, ptr {b_at}, i64 {b_step}")
            k.next = [a_at, b_at, *acc]
        run.next = k.results[1:]
    return run.results[1:]
