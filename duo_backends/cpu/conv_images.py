"""Convolution from tiles of images: what the weight gradient is, whose images (input channels) lie side by side and whose K (positions, batch) is long.

A unit is some result positions, as a rule all, of some images and some column panels. Block by block of K it packs w for its columns and lists, for each
result position, the runs that the block is made of, one for each tap: where x lies, or zeros where a tap falls outside it. Micro-kernels
read x in place. The sums of a unit stay in the cache until the last block; beyond 16384 k they are kept for each chunk that waits for its
neighbour (numerics contract, rule 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from duo_backends.cpu.body import Emitter
from duo_backends.cpu.code import SIGNATURE, Phase, Target
from duo_backends.cpu.conv_epilogue import TileEmitter, pointers_of
from duo_backends.cpu.conv_plan import MOST_ROWS, MOST_VECTORS, UNITS, ColumnPanels, round_up
from duo_backends.cpu.conv_tile import RUN_WORDS, RunTile, emit_run_kernel
from duo_backends.cpu.gemm_pack import emit_copy
from duo_backends.cpu.gemm_plan import CHUNK_BLOCKS, SEQUENTIAL_K
from duo_backends.cpu.gemm_tile import BLOCK, compute_dtype, lanes_of, max_rows, registers_of, tile_cost
from duo_backends.cpu.llvm import Function, Module, memory_type, register_type, vector
from duo_ir.kernels.kernel import ConvKernel
from duo_ir.types import DimLike, DType, evaluate, product

SUMS_BYTES = 3 << 16  # of a unit, so that it stays in the second-level cache beside w and x
PACKED_BYTES = 1 << 17  # of w for one block


@dataclass(frozen=True)
class ImagePlan(ColumnPanels):
    kernel: ConvKernel
    compute: DType
    lanes: int
    vectors: int
    rows: int  # images of a tile; tiles differ by one at most
    unit_positions: int
    unit_images: int
    unit_panels: int

    @property
    def images(self) -> int:
        assert isinstance(self.kernel.images, int)
        return self.kernel.images

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple([w.count for w in self.kernel.windows if isinstance(w.count, int)])

    @property
    def positions(self) -> int:
        return math.prod(self.counts)

    @property
    def k(self) -> DimLike:
        return self.kernel.c * product([w.taps for w in self.kernel.windows])

    @property
    def position_units(self) -> int:
        return -(-self.positions // self.unit_positions)

    @property
    def image_units(self) -> int:
        return -(-self.images // self.unit_images)

    @property
    def tiles(self) -> int:
        """Of one position in a unit."""
        return -(-self.unit_images // self.rows)

    @property
    def may_be_long(self) -> bool:
        return not isinstance(self.k, int) or self.k > SEQUENTIAL_K

    @property
    def tile_bytes(self) -> int:
        return self.rows * self.k_row

    @property
    def sums_bytes(self) -> int:
        return round_up(self.unit_positions * self.tiles * self.unit_panels * self.tile_bytes)

    @property
    def packed_bytes(self) -> int:
        return round_up(self.unit_panels * BLOCK * self.k_row)

    @property
    def zero_bytes(self) -> int:
        return round_up(self.images * self.compute.itemsize)

    @property
    def table_bytes(self) -> int:
        """A block has a run for each of its k at most."""
        return BLOCK * RUN_WORDS * 8

    def scratch(self, sizes: Mapping[str, int], threads: int) -> int:
        levels = 1
        k = evaluate(self.k, sizes)
        if k > SEQUENTIAL_K:
            levels = (-(-k // (BLOCK * CHUNK_BLOCKS)) - 1).bit_length() + 1
        return threads * (self.zero_bytes + self.table_bytes + self.packed_bytes + levels * self.sums_bytes)

    def units(self, sizes: Mapping[str, int]) -> int:
        return self.groups * self.position_units * self.image_units * self.column_units


def make_image_plan(kernel: ConvKernel, target: Target) -> ImagePlan | None:
    """The plan for tiles of images, or None where they do not lie side by side or too little is known."""
    compute = compute_dtype(kernel.acc)
    lanes, registers = lanes_of(target, compute), registers_of(target)
    images, n = kernel.images, kernel.n
    counts = [w.count for w in kernel.windows]
    known = all(isinstance(d, int) and d > 0 for d in (images, n, kernel.groups, *counts))
    side_by_side = kernel.a.at.strides[0] == 1 and kernel.b.at.strides[-1] == 1
    same = all(kernel.args[a.buffer].dtype is compute for a in (kernel.a, kernel.b))
    empty = 0 in (kernel.c, *[w.taps for w in kernel.windows])
    if not (known and side_by_side and same) or empty:
        return None
    assert isinstance(images, int) and isinstance(n, int) and isinstance(kernel.groups, int)
    if n == 1 and kernel.groups > 1:
        return None
    column_vectors = -(-n // lanes)
    best: tuple[float, int, int] | None = None
    for vectors in range(1, min(MOST_VECTORS, column_vectors) + 1):
        most = min(max_rows(vectors, registers), MOST_ROWS)
        tiles = -(-images // most)
        rows = -(-images // tiles)
        cost = tiles * -(-column_vectors // vectors) * tile_cost(rows, vectors) * (1 + 0.3 / rows + 0.1 / vectors)
        if best is None or cost < best[0]:
            best = (cost, vectors, rows)
    assert best is not None
    _, vectors, rows = best
    panels = -(-column_vectors // vectors)
    row_bytes = vectors * lanes * compute.itemsize
    positions = math.prod([c for c in counts if isinstance(c, int)])
    unit_panels = max(1, min(panels, PACKED_BYTES // (BLOCK * row_bytes)))
    unit_tiles = max(1, min(-(-images // rows), SUMS_BYTES // (positions * unit_panels * rows * row_bytes)))
    unit_positions, groups = positions, kernel.groups

    def units() -> int:
        others = -(-panels // unit_panels) * -(-positions // unit_positions)
        return groups * -(-images // (unit_tiles * rows)) * others

    while units() < UNITS:
        if unit_tiles > 1 and unit_tiles * rows * positions >= 2 * unit_panels * vectors * lanes:
            unit_tiles = -(-unit_tiles // 2)
        elif unit_panels > 1:
            unit_panels = -(-unit_panels // 2)
        elif unit_tiles > 1:
            unit_tiles = -(-unit_tiles // 2)
        elif unit_positions > 1 and units() < UNITS // 2:  # each of them packs the same part of w
            unit_positions = -(-unit_positions // 2)
        else:
            break
    return ImagePlan(kernel, compute, lanes, vectors, rows, unit_positions, min(images, unit_tiles * rows), unit_panels)


def emit_images(module: Module, target: Target, plan: ImagePlan, name: str) -> tuple[Phase, ...]:
    """define void @name(SIGNATURE), and the phase it is."""
    _Images(module, target, plan, name).emit()
    return (Phase(name, plan.units),)


class _Images(TileEmitter):
    def __init__(self, module: Module, target: Target, plan: ImagePlan, name: str) -> None:
        super().__init__(module, target, plan.kernel, plan.compute, plan.lanes, name)
        self.plan = plan
        self.type = vector(plan.lanes, register_type(plan.compute))

    # -------------------------------------------------------------------------------------------------------- main
    def emit(self) -> None:
        plan, kernel = self.plan, self.kernel
        f = self.f = Function(self.module, f"define void @{self.name}({SIGNATURE}) #0")
        emitter = Emitter(f, self.target, kernel.args, pointers_of(f, kernel), kernel.dims)
        self.dim = emitter.dim
        self.c, self.taps = self.dim(kernel.c), [self.dim(w.taps) for w in kernel.windows]
        self.k = self.c
        for t in self.taps:
            self.k = f.mul(self.k, t, f.top)
        self.blocks = f.div(f.add(self.k, str(BLOCK - 1), f.top), str(BLOCK), f.top)
        levels = "1"
        if plan.may_be_long:
            self.long = f.op(f"icmp sgt i64 {self.k}, {SEQUENTIAL_K}", f.top)
            chunks = f.div(f.add(self.blocks, str(CHUNK_BLOCKS - 1), f.top), str(CHUNK_BLOCKS), f.top)
            zeros = f.op(
                f.intrinsic("ctlz", "i64", [("i64", f.sub(chunks, "1", f.top)), ("i1", "false")], "i64"), f.top
            )
            levels = f.op(f"select i1 {self.long}, i64 {f.sub('65', zeros, f.top)}, i64 1", f.top)
        fixed = plan.zero_bytes + plan.table_bytes + plan.packed_bytes
        share = f.add(str(fixed), f.mul(levels, str(plan.sums_bytes), f.top), f.top)
        self.zeros = f.gep("i8", "%scratch", f.mul("%tid", share, f.top), f.top)
        self.table = f.gep("i8", self.zeros, str(plan.zero_bytes), f.top)
        self.packed = f.gep("i8", self.table, str(plan.table_bytes), f.top)
        self.sums = f.gep("i8", self.packed, str(plan.packed_bytes), f.top)
        x, w = emitter.pointers[kernel.a.buffer], emitter.pointers[kernel.b.buffer]
        element = memory_type(plan.compute)
        self.x = f.gep(element, x, self.dim(kernel.a.at.offset), f.top)
        self.w = f.gep(element, w, self.dim(kernel.b.at.offset), f.top)
        with f.loop("0", str(plan.zero_bytes), 64) as loop:
            f.emit(f"store <16 x i32> zeroinitializer, ptr {f.gep('i8', self.zeros, loop.index)}, align 64")
        with f.loop("%begin", "%end") as unit:
            self._unit(unit.index)
        f.finish()

    def _unit(self, unit: str) -> None:
        f, plan = self.f, self.plan
        columns, rest = f.rem(unit, str(plan.column_units)), f.div(unit, str(plan.column_units))
        self.image0 = f.mul(f.rem(rest, str(plan.image_units)), str(plan.unit_images))
        self.images = f.min(f.sub(str(plan.images), self.image0), str(plan.unit_images))
        rest = f.div(rest, str(plan.image_units))
        self.q0 = f.mul(f.rem(rest, str(plan.position_units)), str(plan.unit_positions))
        self.q1 = f.min(f.add(self.q0, str(plan.unit_positions)), str(plan.positions))
        self.group = f.div(rest, str(plan.position_units))
        self.p0 = f.mul(columns, str(plan.unit_panels))
        self.p1 = f.min(f.add(self.p0, str(plan.unit_panels)), str(plan.panels))
        at = f.add(self.image0, f.mul(self.group, self.dim(self.kernel.a.at.strides[-2])))
        self.x_unit = f.gep(memory_type(plan.compute), self.x, at)
        with f.loop("0", self.blocks, runs=isinstance(self.kernel.c, int)) as block:
            begin = f.mul(block.index, str(BLOCK))
            length = f.min(f.sub(self.k, begin), str(BLOCK))
            sums, add = self.sums, f.op(f"icmp ne i64 {block.index}, 0")
            chunk, level = "0", "0"
            if plan.may_be_long:
                chunk = f.div(block.index, str(CHUNK_BLOCKS))
                inside = f.op(f"select i1 {self.long}, i64 {f.rem(block.index, str(CHUNK_BLOCKS))}, i64 {block.index}")
                add = f.op(f"icmp ne i64 {inside}, 0")
                level = f.op(f.intrinsic("ctpop", "i64", [("i64", chunk)]))
                level = f.op(f"select i1 {self.long}, i64 {level}, i64 0")
                sums = f.gep("i8", self.sums, f.mul(level, str(plan.sums_bytes)))
            with f.loop(self.p0, self.p1, runs=True) as panel:
                to = f.gep("i8", self.packed, f.mul(f.sub(panel.index, self.p0), str(BLOCK * plan.k_row)))
                self._pack(panel.index, begin, length, to)
            for position, q in self._positions():
                count = self._list_runs(q, begin, length)
                with f.loop(self.p0, self.p1, runs=True) as panel:
                    number = f.sub(panel.index, self.p0)
                    b = f.gep("i8", self.packed, f.mul(number, str(BLOCK * plan.k_row)))
                    for tile, image, rows in self._tiles():
                        a = f.gep(memory_type(plan.compute), self.x_unit, image)
                        place = self._sums_of(sums, position, number, tile)
                        name = self._micro_kernel(rows)
                        f.emit(
                            f"call void @{name}(ptr {a}, ptr {b}, ptr {self.table}, i64 {count}, ptr {place}, i1 {add}, i64 0)"
                        )
            if plan.may_be_long:
                with f.when(self.long):
                    self._combine_chunks(block.index, chunk, level)
        if not isinstance(self.kernel.c, int):  # a gradient of weights over no images
            with f.when(f.op(f"icmp eq i64 {self.blocks}, 0")), f.loop("0", str(plan.sums_bytes), 64) as loop:
                f.emit(f"store <16 x i32> zeroinitializer, ptr {f.gep('i8', self.sums, loop.index)}, align 64")
        for position, q in self._positions():
            with f.loop(self.p0, self.p1, runs=True) as panel:
                for tile, image, rows in self._tiles():
                    place = self._sums_of(self.sums, position, f.sub(panel.index, self.p0), tile)
                    self._finish(q, panel.index, image, rows, place)

    # ----------------------------------------------------------------------------------------------- what is looped over
    def _positions(self) -> Iterator[tuple[str, list[str]]]:
        """Emits a loop over the unit's positions: (number in it, index along each spatial axis)."""
        f = self.f
        with f.loop(self.q0, self.q1) as loop:
            rest = loop.index
            q: list[str] = []
            for count in reversed(self.plan.counts):
                q.insert(0, f.rem(rest, str(count)))
                rest = f.div(rest, str(count))
            yield f.sub(loop.index, self.q0), q

    def _tiles(self) -> Iterator[tuple[str, str, int]]:
        """Emits loops over the unit's tiles: (number, first image from the unit's, images), once for each height."""
        f, plan = self.f, self.plan
        full = f.div(self.images, str(plan.rows))
        with f.loop("0", full) as loop:
            yield loop.index, f.mul(loop.index, str(plan.rows)), plan.rows
        rest = plan.images % plan.unit_images % plan.rows
        if rest:
            with f.when(f.op(f"icmp ne i64 {f.rem(self.images, str(plan.rows))}, 0")):
                yield full, f.mul(full, str(plan.rows)), rest

    def _sums_of(self, sums: str, position: str, panel: str, tile: str) -> str:
        f, plan = self.f, self.plan
        number = f.add(f.mul(f.add(f.mul(position, str(plan.unit_panels)), panel), str(plan.tiles)), tile)
        return f.gep("i8", sums, f.mul(number, str(plan.tile_bytes)))

    # ------------------------------------------------------------------------------------------------------------ parts
    def _micro_kernel(self, rows: int) -> str:
        plan = self.plan
        tile = RunTile(tuple([r * self.size for r in range(rows)]), plan.vectors, plan.compute, None)
        return self._function(tile, "tile", lambda name: emit_run_kernel(self.module, self.target, name, tile))

    def _finish(self, q: list[str], panel: str, image: str, rows: int, sums: str) -> None:
        """The epilogue, image by image: its rows are positions."""
        f, plan = self.f, self.plan
        name = self._epilogue()
        column = f.mul(panel, str(plan.panel))
        columns = f.min(f.sub(str(plan.n), column), str(plan.panel))
        d, h, w = (*["0"] * (3 - len(q)), *q)
        with f.loop("0", str(rows)) as row:
            at = f.gep("i8", sums, f.mul(row.index, str(plan.k_row)))
            number = f.add(self.image0, f.add(image, row.index))
            f.emit(
                f"call void @{name}(ptr %args, ptr %dims, ptr %status, i64 {number}, i64 {d}, i64 {h}, i64 {w}, i64 {self.group}, "
                f"i64 {column}, i64 {columns}, i64 1, i64 1, ptr {at}, i64 {plan.k_row})"
            )

    def _each_tap(self, begin: str, length: str) -> Iterator[tuple[str, list[str], str, str]]:
        """Emits a loop over the taps of K from `begin`: (number in the block, index along each spatial axis, first c, how many)."""
        f = self.f
        first = f.op(f"udiv i64 {begin}, {self.c}")
        end = f.add(begin, length)
        last = f.op(f"udiv i64 {f.sub(end, '1')}, {self.c}")
        with f.loop(first, f.add(last, "1"), runs=True) as tap:
            base = f.mul(tap.index, self.c)
            c = f.op(f.intrinsic("smax", "i64", [("i64", f.sub(begin, base)), ("i64", "0")]))
            count = f.sub(f.min(f.sub(end, base), self.c), c)
            rest = tap.index
            taps: list[str] = []
            for size in reversed(self.taps[1:]):
                taps.insert(0, f.rem(rest, size))
                rest = f.div(rest, size)
            yield f.sub(tap.index, first), [rest, *taps], c, count

    def _list_runs(self, q: list[str], begin: str, length: str) -> str:
        """Fills the table for result position `q`; returns the number of runs."""
        f, kernel = self.f, self.kernel
        steps = kernel.a.at.strides
        start = f.op(f"ptrtoint ptr {self.x_unit} to i64")
        nowhere = f.sub(f.op(f"ptrtoint ptr {self.zeros} to i64"), start)
        step = f.mul(self.dim(steps[-1]), str(self.size))
        for number, taps, c, count in self._each_tap(begin, length):
            at, inside = f.mul(c, self.dim(steps[-1])), "true"
            for w, place, t, x_step in zip(kernel.windows, q, taps, steps[1:]):
                p = f.add(f.add(self.dim(w.offset), f.mul(place, self.dim(w.stride))), f.mul(t, self.dim(w.dilation)))
                inside = f.op(f"and i1 {inside}, {f.op(f'icmp ult i64 {p}, {self.dim(w.bound)}')}")
                at = f.add(at, f.mul(p, self.dim(x_step)))
            offset = f.op(f"select i1 {inside}, i64 {f.mul(at, str(self.size))}, i64 {nowhere}")
            entry = f.gep("i64", self.table, f.mul(number, str(RUN_WORDS)))
            f.emit(f"store i64 {offset}, ptr {entry}, align 8")
            f.emit(f"store i64 {count}, ptr {f.gep('i64', entry, '1')}, align 8")
            a_step = f.op(f"select i1 {inside}, i64 {step}, i64 0")
            f.emit(f"store i64 {a_step}, ptr {f.gep('i64', entry, '2')}, align 8")
        last = f.op(f"udiv i64 {f.sub(f.add(begin, length), '1')}, {self.c}")
        return f.add(f.sub(last, f.op(f"udiv i64 {begin}, {self.c}")), "1")

    def _pack(self, panel: str, begin: str, length: str, to: str) -> None:
        f, plan, kernel = self.f, self.plan, self.kernel
        compute, lanes, vectors = plan.compute, plan.lanes, plan.vectors
        name = self._function(
            "copy",
            "copy",
            lambda name: emit_copy(
                self.module, self.target, name, compute, compute, lanes, vectors, lanes * compute.itemsize
            ),
        )
        *tap_steps, group_step, c_step, _ = kernel.b.at.strides
        column = f.mul(panel, str(plan.panel))
        valid = f.min(f.sub(str(plan.n), column), str(plan.panel))
        start = f.add(column, f.mul(self.group, self.dim(group_step)))
        place = f.alloca("i64")
        f.emit(f"store i64 0, ptr {place}, align 8")
        for _, taps, c, count in self._each_tap(begin, length):
            at = f.add(start, f.mul(c, self.dim(c_step)))
            for t, step in zip(taps, tap_steps):
                at = f.add(at, f.mul(t, self.dim(step)))
            done = f.op(f"load i64, ptr {place}, align 8")
            target = f.gep("i8", to, f.mul(done, str(plan.k_row)))
            source = f.gep(memory_type(compute), self.w, at)
            step_bytes = f.mul(self.dim(c_step), str(self.size))
            f.emit(
                f"call void @{name}(ptr {source}, i64 {self.size}, i64 {step_bytes}, i64 {valid}, i64 {count}, ptr {target}, i64 {plan.k_row})"
            )
            f.emit(f"store i64 {f.add(done, count)}, ptr {place}, align 8")

    def _combine_chunks(self, block: str, chunk: str, level: str) -> None:
        """After a chunk's last block: it joins neighbours of its size, as a binary counter carries; after the last chunk all that is left
        joins from the right."""
        f, plan = self.f, self.plan
        following = f.op(f"add i64 {block}, 1")
        last = f.op(f"icmp eq i64 {following}, {self.blocks}")
        full = f.op(f"icmp eq i64 {f.rem(following, str(CHUNK_BLOCKS))}, 0")
        with f.when(f.op(f"or i1 {last}, {full}")):
            carries = f.op(f.intrinsic("cttz", "i64", [("i64", f.add(chunk, "1")), ("i1", "true")], "i64"))
            merges = f.op(f"select i1 {last}, i64 {level}, i64 {carries}")
            operation = "fadd" if plan.compute.is_float else "add"
            bytes_ = plan.lanes * self.size
            with f.loop("0", merges) as merge:
                right = f.gep("i8", self.sums, f.mul(f.sub(level, merge.index), str(plan.sums_bytes)))
                left = f.op(f"getelementptr i8, ptr {right}, i64 {-plan.sums_bytes}")
                with f.loop("0", str(plan.sums_bytes), bytes_) as loop:
                    to = f.gep("i8", left, loop.index)
                    x = f.op(f"load {self.type}, ptr {to}, align {bytes_}")
                    y = f.op(f"load {self.type}, ptr {f.gep('i8', right, loop.index)}, align {bytes_}")
                    f.emit(f"store {self.type} {f.op(f'{operation} {self.type} {x}, {y}')}, ptr {to}, align {bytes_}")
