"""The contraction kernel on the CPU: (batched) matrix multiplication from register tiles, with a fused epilogue.

The result is cut into *row tiles* and *column panels*; a work unit is a rectangle of them in one batch entry. For each K block of 512
a unit packs what cannot be read in place (`gemm_pack.py`), calls micro-kernels (`gemm_tile.py`) that leave or add block sums in small tiles,
and after the last block runs the kernel's body on the tiles. Scratch is bounded per thread whatever the sizes. Which tiles, whether
to pack and how to cut are chosen in `gemm_plan.py`; none of it changes a bit (numerics contract, rule 2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from duo_backends.cpu.body import Emitter
from duo_backends.cpu.code import SIGNATURE, KernelCode, Phase, Target
from duo_backends.cpu.gemm_ahead import Block, ahead_offsets, emit_ahead_asks, piece_of
from duo_backends.cpu.gemm_epilogue import ask_every, in_place, last_results, lines, pointers
from duo_backends.cpu.gemm_functions import GemmFunctions
from duo_backends.cpu.gemm_line import blocks_at_once, emit_line
from duo_backends.cpu.gemm_plan import CHUNK_BLOCKS, SEQUENTIAL_K, Plan, make_plan
from duo_backends.cpu.gemm_tile import BLOCK, LINE, transposed_lanes
from duo_backends.cpu.llvm import Function, Module, is_literal, memory_type, register_type, vector
from duo_backends.cpu.stream import with_streamed_stores
from duo_ir.errors import ArgumentError
from duo_ir.kernels.kernel import Access, ContractKernel
from duo_ir.types import DimLike, DType, evaluate, product


def compile_contract(kernel: ContractKernel, target: Target) -> KernelCode:
    """One phase; units are rectangles of the result. Raises ArgumentError for operands with guards or index operands."""
    for access in (kernel.a, kernel.b):
        if access.guards or access.index_strides:
            raise ArgumentError(
                "matmul: a contraction reads its operands at plain affine positions; materialise them first"
            )
    plan = make_plan(kernel, target)
    name = "contract_" + hashlib.sha256(repr((kernel, target)).encode()).hexdigest()[:16]
    module = Module()

    at_once = blocks_at_once(plan, target)

    def emit(name: str, internal: bool, streams: frozenset[int]) -> None:
        if at_once:
            emit_line(module, target, plan, name, "internal " if internal else "", streams, at_once)
            return
        _Driver(module, kernel, target, plan, name, internal, streams).emit()

    columns = len(kernel.batch) + 1
    with_streamed_stores(module, name, kernel.args, [(store, columns) for store in kernel.stores], emit)

    def cost(sizes: Mapping[str, int]) -> float:
        batch, m, n, k = (evaluate(d, sizes) for d in (product(kernel.batch), kernel.m, kernel.n, kernel.k))
        multiplied = batch * m * n * k / (1.9 * target.vector_bytes / plan.compute.itemsize * 4)
        moved = batch * (m * k + k * n + m * n) * plan.compute.itemsize / 80
        return 50.0 + multiplied + moved

    return KernelCode(
        module.text(), (Phase(name, plan.units),), lambda sizes, threads: threads * plan.scratch(sizes), cost
    )


# ---------------------------------------------------------------------------------------------------------- driver
class _RowTile(NamedTuple):
    """SSA names: the tile's number, its first row and its rows."""

    number: str
    row: str
    rows: str


class _Panel(NamedTuple):
    """SSA names: the panel's number, first column, columns, and the i1 that says whether it is the tail."""

    number: str
    column: str
    columns: str
    tail: str


class _Unit(NamedTuple):
    """SSA names: batch indices, row tiles [t0, t1), panels [p0, p1), the addresses of the first element of A and of B in this batch entry."""

    batch: tuple[str, ...]
    t0: str
    t1: str
    p0: str
    p1: str
    a: str
    b: str


class _Driver:
    """Emits the functions of one contraction."""

    def __init__(
        self,
        module: Module,
        kernel: ContractKernel,
        target: Target,
        plan: Plan,
        name: str,
        internal: bool,
        streams: frozenset[int],
    ) -> None:
        self.linkage, self.streams = "internal " if internal else "", streams
        self.module, self.kernel, self.target, self.plan, self.name = module, kernel, target, plan, name
        self.a_type = kernel.args[kernel.a.buffer].dtype
        self.b_type = kernel.args[kernel.b.buffer].dtype
        self.functions = GemmFunctions(module, kernel, target, plan, name, streams)

    # -------------------------------------------------------------------------------------------------------- main
    def emit(self) -> None:
        kernel, plan = self.kernel, self.plan
        f = self.f = Function(self.module, f"define {self.linkage}void @{self.name}({SIGNATURE}) #0")
        emitter = Emitter(f, self.target, kernel.args, pointers(f, kernel), kernel.dims)
        self.dim, self.pointers = emitter.dim, emitter.pointers
        self.m, self.n, self.k = (self.dim(d) for d in (kernel.m, kernel.n, kernel.k))
        # like Plan.scratch, per thread
        levels = "1"
        chunks = self._ceil_div(self.k, BLOCK * CHUNK_BLOCKS)
        if plan.may_be_long:
            self.long = f.op(f"icmp sgt i64 {self.k}, {SEQUENTIAL_K}", f.top)
            zeros = f.op(
                f.intrinsic("ctlz", "i64", [("i64", f.sub(chunks, "1", f.top)), ("i1", "false")], "i64"), f.top
            )
            levels = f.op(f"select i1 {self.long}, i64 {f.sub('65', zeros, f.top)}, i64 1", f.top)
        share = f.add(str(plan.a_bytes + plan.b_bytes), f.mul(levels, str(plan.sums_bytes), f.top), f.top)
        mine = f.gep("i8", "%scratch", f.mul("%tid", share, f.top), f.top)
        self.b_packed = self.b_slots = mine
        self.a_packed = self.a_slots = f.gep("i8", mine, str(plan.b_bytes), f.top)
        self.sums = f.gep("i8", mine, str(plan.a_bytes + plan.b_bytes), f.top)
        self.lines = lines(plan, self.streams)
        self.asking = ask_every(plan, self.streams) > 0
        self.table, self.written = "null", "0"
        if self.asking:
            ahead = len(ahead_offsets(plan)) * plan.ahead_steps
            self.table = f.alloca("ptr", self.lines.most * plan.segments[0].rows + ahead)
            for n, there in zip(self.lines.written, in_place(f, kernel, self.pointers, plan, self.streams)):
                more = str(n) if there == "false" else f.pure(f"select i1 {there}, i64 0, i64 {n}", f.top)
                self.written = f.add(self.written, more, f.top)
        self._count_tiles()
        self.panels = self._ceil_div(self.n, plan.panel)
        self.row_units = self._ceil_div(self.tiles, plan.unit_tiles) if plan.row_units is None else str(plan.row_units)
        self.column_units = self._ceil_div(self.panels, plan.unit_panels)
        self.blocks = "1" if plan.one_block else f.call(
            "smax", "i64", [("i64", self._ceil_div(self.k, BLOCK)), ("i64", "1")], region=f.top
        )  # fmt: skip

        with f.loop("%begin", "%end") as unit:
            self.unit = self._unit(unit.index)
            self._multiply_unit(unit.index)
        if last_results(kernel):
            f.emit("fence seq_cst")  # stores past the caches are ordered by nothing else
        f.finish()

    def _unit(self, number: str) -> _Unit:
        f, plan, kernel = self.f, self.plan, self.kernel
        # By groups of rows, so that threads, which take units from the front and from the back, keep to their own rows, as in other kernels; in
        # a group all rows with the same columns of B, which stay near.
        each = f.mul(self.row_units, self.column_units, f.top)
        entry, place = f.div(number, each), f.rem(number, each)
        group = "0"
        if not is_literal(self.row_units) or int(self.row_units) > plan.group:
            group = f.mul(f.div(place, f.mul(self.column_units, str(plan.group), f.top)), str(plan.group))
        rows, place = (
            f.min(f.sub(self.row_units, group), str(plan.group)),
            f.sub(place, f.mul(group, self.column_units)),
        )
        p0 = f.mul(f.div(place, rows), str(plan.unit_panels))
        row_unit = f.add(group, f.rem(place, rows))
        batch: list[str] = []
        for axis in reversed(range(len(kernel.batch))):
            size = self.dim(kernel.batch[axis])
            batch.insert(0, f.rem(entry, size) if axis else entry)
            entry = f.div(entry, size) if axis else entry
        if plan.row_units is None:
            t0 = f.mul(row_unit, str(plan.unit_tiles))
            t1 = f.min(f.add(t0, str(plan.unit_tiles)), self.tiles)
        elif self.tiles == self.row_units:
            t0, t1 = row_unit, f.add(row_unit, "1")
        else:
            t0, t1 = (f.div(f.mul(unit, self.tiles), self.row_units) for unit in (row_unit, f.add(row_unit, "1")))
        p1 = f.min(f.add(p0, str(plan.unit_panels)), self.panels)
        a, b = self._operand(batch, kernel.a, self.a_type), self._operand(batch, kernel.b, self.b_type)
        return _Unit(tuple(batch), t0, t1, p0, p1, a, b)

    def _ceil_div(self, x: str, y: int) -> str:
        return self.f.div(self.f.add(x, str(y - 1), self.f.top), str(y), self.f.top)

    def _count_tiles(self) -> None:
        """For each segment the number of its first tile, their count and the first one's row."""
        f, plan = self.f, self.plan
        self.spans: list[tuple[str, str, str]] = []
        tile, row = "0", "0"
        rest = ""
        for number, segment in enumerate(plan.segments):
            if segment.count is not None:
                count = str(segment.count)
            elif number == 0:
                count = f.div(self.m, str(segment.rows), f.top)
                rest = f.rem(self.m, str(segment.rows), f.top)
            else:
                count = f.pure(f"and i64 {f.div(rest, str(segment.rows), f.top)}, 1", f.top)
            self.spans.append((tile, count, row))
            tile = f.add(tile, count, f.top)
            row = f.add(row, f.mul(count, str(segment.rows), f.top), f.top)
        self.tiles = tile

    def _operand(self, batch: Sequence[str], access: Access, dtype: DType) -> str:
        """The address of an operand's first element in a batch entry."""
        f = self.f
        at = self.dim(access.at.offset)
        for index, stride in zip(batch, access.at.strides, strict=False):
            at = f.add(at, f.mul(index, self.dim(stride)))
        return f.gep(memory_type(dtype), self.pointers[access.buffer], at)

    def _bytes(self, stride: DimLike, dtype: DType) -> str:
        return self.f.mul(self.dim(stride), str(dtype.itemsize), self.f.top)

    def _multiply_unit(self, number: str) -> None:
        f, plan, unit = self.f, self.plan, self.unit
        with f.loop("0", self.blocks, runs=True) as block:
            k0 = f.mul(block.index, str(BLOCK))
            k = f.min(f.sub(self.k, k0), str(BLOCK))
            a, b = self._from_step(unit, k0)
            sums, add = self.sums, "false"
            if not plan.one_block:
                add = f.op(f"icmp ne i64 {block.index}, 0")
            if plan.may_be_long:
                inside = f.rem(block.index, str(CHUNK_BLOCKS))
                chunk = f.div(block.index, str(CHUNK_BLOCKS))
                add = f.op(f"select i1 {self.long}, i64 {inside}, i64 {block.index}")
                add = f.op(f"icmp ne i64 {add}, 0")
                level = f.op(f.intrinsic("ctpop", "i64", [("i64", chunk)]))
                level = f.op(f"select i1 {self.long}, i64 {level}, i64 0")
                sums = f.gep("i8", self.sums, f.mul(level, str(plan.sums_bytes)))
            # after its last block a tile is finished at once, while it and what was fetched for it are near
            last_block = "true"
            if not plan.one_block:
                last_block = f.op(f"icmp eq i64 {block.index}, {f.sub(self.blocks, '1', f.top)}")
            finish = None if plan.may_be_long else last_block
            if plan.ahead:
                self._begin_block(number, block.index, k0, k, last_block)
            if not (plan.ahead and plan.pack_b):
                self._pack_b(b, k, unit.p0, unit.p1, self.b_packed)
            if plan.pack_a and not plan.ahead:
                with f.loop(unit.t0, unit.t1, plan.cached_tiles, runs=True) as cached:
                    last = f.min(f.add(cached.index, str(plan.cached_tiles)), unit.t1)
                    self._pack_a(a, k, cached.index, last)
                    self._multiply(cached.index, last, a, b, k, sums, add, finish)
            elif plan.pass_steps:
                self._multiply_in_passes(a, b, k, add, last_block)
            else:
                self._multiply(unit.t0, unit.t1, a, b, k, sums, add, finish)
            if plan.may_be_long:
                with f.when(self.long):
                    self._combine_chunks(block.index, chunk, level)
        if plan.may_be_long:
            with self._sweep(unit.t0, unit.t1) as (panel, tile):
                self._finish_tile(tile, panel, self.sums)

    def _from_step(self, unit: _Unit, k0: str) -> tuple[str, str]:
        """The addresses of a unit's A and B from k step k0 on."""
        a_step, b_step = self.kernel.a.at.strides[-1], self.kernel.b.at.strides[-2]
        a = self.f.gep("i8", unit.a, self.f.mul(k0, self._bytes(a_step, self.a_type)))
        return a, self.f.gep("i8", unit.b, self.f.mul(k0, self._bytes(b_step, self.b_type)))

    # ------------------------------------------------------------------------------------------------ packing ahead
    def _begin_block(self, number: str, block: str, k0: str, k: str, last: str) -> None:
        """Packs a call's first block; then says which slot holds this block of unit `number`, and in `self.next` what is packed meanwhile. `last`:
        the i1 that tells whether it is its unit's last block."""
        f, plan = self.f, self.plan
        place = f.add(f.mul(f.sub(number, "%begin"), self.blocks), block)
        first = f.op(f"icmp eq i64 {place}, 0")
        odd = f.op(f"trunc i64 {place} to i1")
        even_slot = self.a_slots if plan.pack_a else self.b_slots
        odd_slot = f.gep("i8", even_slot, str(plan.a_block_bytes if plan.pack_a else plan.b_block_bytes), f.top)
        here, there = self._choose(odd, odd_slot, even_slot, "ptr"), self._choose(odd, even_slot, odd_slot, "ptr")
        if plan.pack_a:
            self.a_packed = here
        else:
            self.b_packed = here
        with f.when(first):
            self._pack_piece(self._block(self.unit, k0, k, here, k), "0", k)
        after = f.add(number, self._choose(last, "1", "0"))
        more = f.op(f"icmp slt i64 {after}, %end")
        begin = self._choose(last, "0", f.add(k0, str(BLOCK)))
        steps = self._choose(more, f.min(f.sub(self.k, begin), str(BLOCK)), "0")
        unit = self.unit
        calls = f.mul(f.sub(unit.t1, unit.t0), f.sub(unit.p1, unit.p0))
        piece = f.div(f.add(steps, f.sub(calls, "1")), calls)
        self.next = self._block(self._unit(self._choose(more, after, number)), begin, steps, there, piece)

    def _block(self, unit: _Unit, k0: str, k: str, to: str, piece: str) -> Block:
        """What is packed of a unit from k step k0 on."""
        f, plan = self.f, self.plan
        a, b = self._from_step(unit, k0)
        if plan.pack_a:
            step = self._bytes(self.kernel.a.at.strides[-1], self.a_type)
            return Block(a, f.mul(self._row(unit.t0), str(self.a_type.itemsize)), step, k, to, unit.t0, unit.t1, piece)
        step = self._bytes(self.kernel.b.at.strides[-2], self.b_type)
        return Block(b, f.mul(unit.p0, str(plan.panel * self.b_type.itemsize)), step, k, to, unit.p0, unit.p1, piece)

    def _pack_piece(self, block: Block, begin: str, end: str) -> None:
        """Packs k steps [begin, end) of a block."""
        f, plan = self.f, self.plan
        source, k = f.gep("i8", block.source, f.mul(begin, block.step)), f.sub(end, begin)
        lanes = plan.a_stride if plan.pack_a else plan.lanes
        to = f.gep("i8", block.to, f.mul(begin, str(lanes * plan.compute.itemsize)))
        (self._copy_a if plan.pack_a else self._pack_panels)(source, k, block.low, block.high, to)

    def _pack_ahead(self, number: str) -> str:
        """Before micro-kernel `number` of a block: packs its piece of the next block, and puts down which lines the piece after that is in; their
        number."""
        f, block = self.f, self.next
        begin, end = piece_of(f, block, number)
        with f.when(f.op(f"icmp slt i64 {begin}, {end}")):
            self._pack_piece(block, begin, end)
        return emit_ahead_asks(f, self.plan, block, end, self.table) if self.asking else "0"

    # ------------------------------------------------------------------------------------------------------ tiles
    def _select(self, tile: str, choices: list[str], type_: str = "i64") -> str:
        """The choice of the segment that holds `tile`."""
        f, value = self.f, choices[0]
        for (first, _, _), choice in zip(self.spans[1:], choices[1:], strict=True):
            if choice != value:
                later = f.pure(f"icmp sge i64 {tile}, {first}")
                value = f.pure(f"select i1 {later}, {type_} {choice}, {type_} {value}")
        return value

    @contextmanager
    def _each_tile(self, t0: str, t1: str) -> Iterator[_RowTile]:
        """A loop over row tiles [t0, t1)."""
        f = self.f
        with f.loop(t0, t1, runs=True) as loop:
            yield _RowTile(loop.index, self._row(loop.index), self._rows(loop.index))

    def _rows(self, tile: str) -> str:
        return self._select(tile, [str(s.rows) for s in self.plan.segments])

    def _row(self, tile: str) -> str:
        """The first row of a tile."""
        f = self.f
        first = self._select(tile, [first for first, _, _ in self.spans])
        return f.add(self._select(tile, [row for _, _, row in self.spans]), f.mul(f.sub(tile, first), self._rows(tile)))

    @contextmanager
    def _sweep(self, t0: str, t1: str) -> Iterator[tuple[_Panel, _RowTile]]:
        """A loop over the unit's panels and, inside, over row tiles [t0, t1)."""
        f, plan = self.f, self.plan
        whole = f.div(self.n, str(plan.panel), f.top)
        with f.loop(self.unit.p0, self.unit.p1, runs=True) as loop:
            column = f.mul(loop.index, str(plan.panel))
            columns = f.min(f.sub(self.n, column), str(plan.panel))
            tail = f.pure(f"icmp sge i64 {loop.index}, {whole}") if plan.has_tail else "false"
            with self._each_tile(t0, t1) as tile:
                yield _Panel(loop.index, column, columns, tail), tile

    def _choose(self, condition: str, yes: str, no: str, type_: str = "i64") -> str:
        if condition == "false" or yes == no:
            return no
        if condition == "true":
            return yes
        return self.f.pure(f"select i1 {condition}, {type_} {yes}, {type_} {no}")

    def _multiply_in_passes(self, a: str, b: str, k: str, add: str, last_block: str) -> None:
        """One block of K, some steps of it over all panels at a time: so few rows of B are read along, and not many in short pieces, which the
        hardware would not foresee. The sums under way wait in memory, from +0.0 on; those of a block that is not the first in a place of their own."""
        f, plan, unit = self.f, self.plan, self.unit
        under_way = self._choose(add, f.gep("i8", self.sums, str(plan.unit_bytes), f.top), self.sums, "ptr")
        type_, size = vector(plan.lanes, register_type(plan.compute)), plan.lanes * plan.compute.itemsize
        with f.loop("0", str(plan.unit_bytes // size), runs=True) as loop:
            f.emit(f"store {type_} zeroinitializer, ptr {f.gep('i8', under_way, f.mul(loop.index, str(size)))}, align {size}")
        with f.loop("0", k, plan.pass_steps) as loop:
            steps = f.min(f.sub(k, loop.index), str(plan.pass_steps))
            last = f.op(f"icmp eq i64 {f.add(loop.index, steps)}, {k}")
            a_at, b_at = self._from_step(unit._replace(a=a, b=b), loop.index)
            finish, settle = f.op(f"and i1 {last}, {last_block}"), f.op(f"and i1 {last}, {add}")
            self._multiply(unit.t0, unit.t1, a_at, b_at, steps, under_way, "false", finish, loop.index, settle)

    def _settle(self, place: str, to: str) -> None:
        """Adds a tile's sums of a block to those of the blocks before."""
        f, plan = self.f, self.plan
        type_, size = vector(plan.lanes, register_type(plan.compute)), plan.lanes * plan.compute.itemsize
        operation = "fadd" if plan.compute.is_float else "add"
        with f.loop("0", str(plan.tile_elements // plan.lanes), runs=True) as loop:
            at = f.mul(loop.index, str(size))
            left, right = f.gep("i8", to, at), f.gep("i8", place, at)
            x, y = (f.op(f"load {type_}, ptr {p}, align {size}") for p in (left, right))
            f.emit(f"store {type_} {f.op(f'{operation} {type_} {x}, {y}')}, ptr {left}, align {size}")

    def _multiply(
        self, t0: str, t1: str, a: str, b: str, k: str, sums: str, add: str, finish: str | None, step: str = "0", settle: str = "false"
    ) -> None:  # fmt: skip
        """One block of K, or a pass of it from k step `step` on, into the sums of row tiles [t0, t1); then, where the i1 `settle` says so, these are
        added to the unit's, and where `finish` does, the epilogue follows."""
        f, plan, kernel = self.f, self.plan, self.kernel
        size = plan.compute.itemsize
        with self._sweep(t0, t1) as (panel, tile):
            if plan.pack_a:
                a_at = f.gep("i8", self.a_packed, f.mul(f.sub(tile.number, t0), str(self.plan.a_tile_bytes)))
                a_step = str(plan.a_stride * size)
            else:
                a_at = f.gep("i8", a, f.mul(tile.row, self._bytes(kernel.a.at.strides[-2], self.a_type)))
                a_step = self._bytes(kernel.a.at.strides[-1], self.a_type)
            b_step = str(plan.lanes * size)
            if plan.pack_b:
                b_at = f.gep(
                    "i8",
                    self.b_packed,
                    f.mul(f.sub(panel.number, self.unit.p0), str(self.plan.vectors * self.plan.strip_bytes)),
                )
            else:
                packed = panel.tail if plan.pack_tail else "false"
                b_at = f.gep("i8", b, f.mul(panel.column, self._bytes(kernel.b.at.strides[-1], self.b_type)))
                b_at = self._choose(packed, f.gep("i8", self.b_packed, f.mul(step, b_step)), b_at, "ptr")
                # a step of B in place; for a micro-kernel that transposes, whose step is one element, its columns' stride
                row, column = kernel.b.at.strides[-2:]
                b_step = self._choose(packed, b_step, self._bytes(row if column == 1 else column, self.b_type))
            names = [
                self._choose(
                    panel.tail,
                    f"@{self.functions.micro_kernel(s.rows, plan.tail_vectors, plan.pack_b or plan.pack_tail)}",
                    f"@{self.functions.micro_kernel(s.rows, plan.vectors, plan.pack_b)}",
                    "ptr",
                )
                if plan.has_tail
                else f"@{self.functions.micro_kernel(s.rows, plan.vectors, plan.pack_b)}"
                for s in plan.segments
            ]
            name, place = self._select(tile.number, names, "ptr"), self._sums_of(tile, panel, sums)
            ahead = "0"
            if plan.ahead:
                unit = self.unit
                number = f.mul(f.sub(panel.number, unit.p0), f.sub(unit.t1, unit.t0))
                ahead = self._pack_ahead(f.add(number, f.sub(tile.number, unit.t0)))
            more = f", i64 {self._next_panel(tile, panel, k, b_step, finish)}" if plan.b_next else ""
            if self.asking:
                counts = [f.mul(tile.rows, n) for n in (str(self.lines.read), self.written)]
                reads, writes = [self._choose(finish or "false", n, "0") for n in counts]
                more += f", ptr {self.table}, i64 {f.add(ahead, reads)}, i64 {writes}"
            if self.lines.most and finish is not None:
                with f.when(finish):
                    table = f.gep("ptr", self.table, ahead)
                    self._call_on_tile(self.functions.asks(), tile, panel, f", ptr {table}")
            f.emit(
                f"call void {name}(i64 {k}, ptr {a_at}, i64 {a_step}, ptr {b_at}, i64 {b_step}, ptr {place}, i1 {add}{more})"
            )
            if settle != "false":
                with f.when(settle):
                    self._settle(place, self._sums_of(tile, panel, self.sums))
            if finish is not None:
                with f.when(finish):
                    self._finish_tile(tile, panel, self.sums)

    def _next_panel(self, tile: _RowTile, panel: _Panel, k: str, b_step: str, finish: str | None) -> str:
        """Bytes from a k step of this panel of B to a line of the next panel, which may be the next block's first; all row tiles ask for all."""
        f, plan = self.f, self.plan
        size = plan.panel * self.b_type.itemsize
        last = f.op(f"icmp eq i64 {panel.number}, {f.sub(self.unit.p1, '1')}")
        back = f.mul(f.sub(panel.number, self.unit.p0), str(-size))
        first = self._choose(finish or "false", back, f.add(back, f.mul(k, b_step)))
        line = f.mul(f.rem(tile.number, str(plan.panel_lines)), str(LINE))
        return f.add(self._choose(last, first, str(size)), line)

    def _sums_of(self, tile: _RowTile, panel: _Panel, sums: str) -> str:
        if self.plan.one_block and not self.plan.pass_steps:
            return sums
        f, plan = self.f, self.plan
        number = f.add(f.mul(f.sub(panel.number, self.unit.p0), str(plan.unit_tiles)), f.sub(tile.number, self.unit.t0))
        return f.gep("i8", sums, f.mul(number, str(plan.tile_elements * plan.compute.itemsize)))

    def _finish_tile(self, tile: _RowTile, panel: _Panel, sums: str) -> None:
        plan, size = self.plan, self.plan.lanes * self.plan.compute.itemsize
        row_bytes = self._choose(panel.tail, str(plan.tail_vectors * size), str(plan.vectors * size))
        self._call_on_tile(
            self.functions.epilogue(), tile, panel, f", ptr {self._sums_of(tile, panel, sums)}, i64 {row_bytes}"
        )  # fmt: skip

    def _call_on_tile(self, name: str, tile: _RowTile, panel: _Panel, more: str) -> None:
        batch = "".join(f"i64 {b}, " for b in self.unit.batch)
        self.f.emit(
            f"call void @{name}(ptr %args, ptr %dims, ptr %status, {batch}i64 {tile.row}, i64 {tile.rows}, "
            f"i64 {panel.column}, i64 {panel.columns}{more})"
        )

    # --------------------------------------------------------------------------------------------------- packing
    def _pack_b(self, b: str, k: str, p0: str, p1: str, to: str) -> None:
        """The panels [p0, p1) of B, or the last one of them, where they are packed."""
        f, plan = self.f, self.plan
        if plan.pack_b:
            self._pack_panels(b, k, p0, p1, to)
        elif plan.pack_tail:
            whole = f.div(self.n, str(plan.panel), f.top)
            with f.when(f.op(f"icmp sgt i64 {p1}, {whole}")):
                self._pack_panels(b, k, whole, f.add(whole, "1", f.top), to)

    def _pack_panels(self, b: str, k: str, p0: str, p1: str, to: str) -> None:
        f, plan = self.f, self.plan
        step, lane = self.kernel.b.at.strides[-2:]
        lanes = plan.lanes
        if not isinstance(lane, int) or (lane != 1 and isinstance(self.kernel.n, int) and self.kernel.n < lanes):
            lanes = transposed_lanes(self.target, plan.compute)
        filled = isinstance(self.kernel.n, int) and self.kernel.n % lanes == 0
        name, at_once = self.functions.packer(self.b_type, lane, step, lanes, plan.vectors, plan.strip_bytes, filled)
        lane_bytes, step_bytes = self._bytes(lane, self.b_type), self._bytes(step, self.b_type)
        size = plan.compute.itemsize
        last = f.sub(self.n, str(lanes) if filled else "1", f.top)
        with f.loop(p0, p1, runs=True) as panel:
            slot = f.gep("i8", to, f.mul(f.sub(panel.index, p0), str(plan.vectors * plan.strip_bytes)))
            with f.loop("0", str(plan.panel), at_once, runs=True) as loop:
                # lanes wholly beyond the last column repeat it, or the last vector where all are whole
                column = f.min(f.add(f.mul(panel.index, str(plan.panel)), loop.index), last)
                from_ = f.gep("i8", b, f.mul(column, lane_bytes))
                valid = f.min(f.sub(self.n, column), str(at_once))
                strip = f.mul(f.div(loop.index, str(plan.lanes)), str(plan.strip_bytes))
                place = f.gep("i8", slot, f.add(strip, f.mul(f.rem(loop.index, str(plan.lanes)), str(size))))
                f.emit(
                    f"call void @{name}(ptr {from_}, i64 {lane_bytes}, i64 {step_bytes}, i64 {valid}, i64 {k}, "
                    f"ptr {place}, i64 {plan.lanes * size})"
                )

    def _pack_a(self, a: str, k: str, t0: str, t1: str) -> None:
        if self.kernel.a.at.strides[-2] == 1:
            self._copy_a(a, k, t0, t1, self.a_packed)
            return
        f, plan = self.f, self.plan
        lane, step = self.kernel.a.at.strides[-2:]
        filled = all(segment.rows % plan.a_vector == 0 for segment in plan.segments)
        name, at_once = self.functions.packer(self.a_type, lane, step, plan.a_vector, 1, 0, filled)
        lane_bytes, step_bytes = self._bytes(lane, self.a_type), self._bytes(step, self.a_type)
        size = plan.compute.itemsize
        with self._each_tile(t0, t1) as tile:
            slot = f.gep("i8", self.a_packed, f.mul(f.sub(tile.number, t0), str(plan.a_tile_bytes)))
            with f.loop("0", tile.rows, at_once, runs=True) as loop:
                from_ = f.gep("i8", a, f.mul(f.add(tile.row, loop.index), lane_bytes))
                valid = f.min(f.sub(tile.rows, loop.index), str(at_once))
                to = f.gep("i8", slot, f.mul(loop.index, str(size)))
                f.emit(
                    f"call void @{name}(ptr {from_}, i64 {lane_bytes}, i64 {step_bytes}, i64 {valid}, i64 {k}, "
                    f"ptr {to}, i64 {plan.a_stride * size})"
                )

    def _copy_a(self, a: str, k: str, t0: str, t1: str, packed: str) -> None:
        """Rows of A side by side in memory: all tiles of a height at once, so that a cache line is read once for all that it holds."""
        f, plan = self.f, self.plan
        step_bytes = self._bytes(self.kernel.a.at.strides[-1], self.a_type)
        for segment, (first, count, row) in zip(plan.segments, self.spans, strict=True):
            begin, end = f.call("smax", "i64", [("i64", t0), ("i64", first)]), f.min(t1, f.add(first, count))
            name = self.functions.tile_copier(segment.rows)
            with f.when(f.op(f"icmp slt i64 {begin}, {end}")):
                at = f.add(row, f.mul(f.sub(begin, first), str(segment.rows)))
                from_ = f.gep("i8", a, f.mul(at, str(self.a_type.itemsize)))
                to = f.gep("i8", packed, f.mul(f.sub(begin, t0), str(plan.a_tile_bytes)))
                f.emit(f"call void @{name}(ptr {from_}, i64 {step_bytes}, i64 {f.sub(end, begin)}, i64 {k}, ptr {to})")

    # ----------------------------------------------------------------------------------------------------- long K
    def _combine_chunks(self, block: str, chunk: str, level: str) -> None:
        """After a chunk's last block: merges equal-sized neighbours, as a binary counter carries; after the last chunk all that
        is left, from the right. That is the adjacent tree: an odd last one moves up unchanged."""
        f, plan = self.f, self.plan
        next_block = f.op(f"add i64 {block}, 1")
        last = f.op(f"icmp eq i64 {next_block}, {self.blocks}")
        full = f.op(f"icmp eq i64 {f.rem(next_block, str(CHUNK_BLOCKS))}, 0")
        with f.when(f.op(f"or i1 {last}, {full}")):
            carries = f.op(f.intrinsic("cttz", "i64", [("i64", f.add(chunk, "1")), ("i1", "true")], "i64"))
            merges = f.op(f"select i1 {last}, i64 {level}, i64 {carries}")
            type_ = vector(plan.lanes, register_type(plan.compute))
            size = plan.compute.itemsize * plan.lanes
            operation = "fadd" if plan.compute.is_float else "add"
            with f.loop("0", merges) as merge:
                right = f.gep("i8", self.sums, f.mul(f.sub(level, merge.index), str(plan.sums_bytes)))
                left = f.op(f"getelementptr i8, ptr {right}, i64 {-plan.sums_bytes}")
                with f.loop("0", str(plan.sums_bytes), size) as loop:
                    to = f.gep("i8", left, loop.index)
                    x = f.op(f"load {type_}, ptr {to}, align {size}")
                    y = f.op(f"load {type_}, ptr {f.gep('i8', right, loop.index)}, align {size}")
                    f.emit(f"store {type_} {f.op(f'{operation} {type_} {x}, {y}')}, ptr {to}, align {size}")
