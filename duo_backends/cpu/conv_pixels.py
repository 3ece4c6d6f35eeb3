"""Convolution from tiles of result positions: an implicit matrix product with rows (image, position), columns channels, K (taps, channels).

A unit is some result rows of one image and group, and some column panels. It copies what it reads of x to a *slab* (padded with zeros,
widened, channels contiguous) unless x can be read in place or a phase before has filled one for several units, packs w panel by panel unless
it lies in panels or a phase before has packed all of it for all units, and lets micro-kernels (`conv_tile.py`) sum over runs of both. After
the last block the body runs on each tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from duo_backends.cpu.body import Emitter
from duo_backends.cpu.code import SIGNATURE, Phase, Target
from duo_backends.cpu.conv_epilogue import TileEmitter, pointers_of
from duo_backends.cpu.conv_pack import WeightPacker
from duo_backends.cpu.conv_plan import Plan
from duo_backends.cpu.conv_tile import MOST_UNROLLED, RUN_WORDS, RunTile, emit_run_kernel
from duo_backends.cpu.convert import convert
from duo_backends.cpu.gemm_plan import CHUNK_BLOCKS
from duo_backends.cpu.gemm_tile import BLOCK
from duo_backends.cpu.llvm import Function, Module, mangle, memory_type, register_type, vector
from duo_ir.types import evaluate

MOST_INTERLEAVED = 4  # channels of an image that come in planes


class _Tile(NamedTuple):
    """SSA names: its number in the unit, first row from the unit's, first position along a row; and its shape."""

    number: str
    h: str
    w: str
    high: int
    wide: int


def emit_pixels(module: Module, target: Target, plan: Plan, name: str) -> tuple[Phase, ...]:
    """Functions @name... (SIGNATURE), and the phases they are."""
    pixels = _Pixels(module, target, plan, name)
    phases = [Phase(name, lambda sizes: plan.units(sizes) * plan.chunks)]
    pixels.emit()
    if plan.resident:
        pixels.emit_packing()
        phases.insert(0, Phase(f"{name}_pack", lambda sizes: plan.panels * plan.groups if plan.units(sizes) else 0))
    if plan.shares_slab:
        pixels.emit_filling()
        phases.insert(0, Phase(f"{name}_fill", lambda sizes: evaluate(plan.kernel.images, sizes) * plan.slab_high))
    if plan.chunks > 1:
        pixels.emit_combination()
        phases.append(Phase(f"{name}_combine", plan.units))
    return tuple(phases)


class _Pixels(TileEmitter):
    def __init__(self, module: Module, target: Target, plan: Plan, name: str) -> None:
        super().__init__(module, target, plan.kernel, plan.compute, plan.lanes, name)
        self.plan = plan
        self.a_type = self.kernel.args[self.kernel.a.buffer].dtype
        self.b_type = self.kernel.args[self.kernel.b.buffer].dtype
        self.packer = WeightPacker(module, target, plan, self.b_type, self._function)

    # -------------------------------------------------------------------------------------------------------- main
    def emit(self) -> None:
        plan = self.plan
        self._begin(self.name)
        f = self.f
        mine = f.add(self.shared_bytes, f.mul("%tid", str(plan.own_bytes), f.top), f.top)
        own = f.gep("i8", "%scratch", mine, f.top)
        if not plan.shares_slab:
            self.slab = own
        if not plan.resident:
            self.packed = f.gep("i8", own, str(0 if plan.shares_slab else plan.slab_bytes), f.top)
        self.sums = f.gep("i8", own, str(plan.own_bytes - plan.own_sums_bytes), f.top)
        with f.loop("%begin", "%end") as unit:
            self._unit(unit.index)
        f.finish()

    def _begin(self, name: str) -> None:
        """A function of a phase; the scratch that threads share is first: packed weights, slabs, then the sums of chunks."""
        plan, kernel = self.plan, self.kernel
        f = self.f = Function(self.module, f"define void @{name}({SIGNATURE}) #0")
        emitter = Emitter(f, self.target, kernel.args, pointers_of(f, kernel), kernel.dims)
        self.dim = emitter.dim
        self.units = f.mul(self.dim(kernel.images), str(plan.image_units), f.top)
        self.packed = "%scratch"
        self.slab = f.gep("i8", "%scratch", str(plan.shared_packed_bytes), f.top)
        self.shared_bytes: str = str(plan.shared_packed_bytes + plan.shared_slab_bytes)
        self.chunk_sums = f.gep("i8", "%scratch", self.shared_bytes, f.top)
        if plan.chunks > 1:
            sums = f.mul(self.units, str(plan.chunks * plan.sums_bytes), f.top)
            self.shared_bytes = f.add(self.shared_bytes, sums, f.top)
        self._fill_table()
        x, w = emitter.pointers[kernel.a.buffer], emitter.pointers[kernel.b.buffer]
        self.x = f.gep(memory_type(self.a_type), x, self.dim(kernel.a.at.offset), f.top)
        self.w = f.gep(memory_type(self.b_type), w, self.dim(kernel.b.at.offset), f.top)

    def emit_combination(self) -> None:
        """The second phase of a long K: the chunks of each unit by the adjacent tree, then the epilogue."""
        plan = self.plan
        self._begin(f"{self.name}_combine")
        f = self.f
        type_, step = vector(plan.lanes, register_type(plan.compute)), plan.lanes * self.size
        with f.loop("%begin", "%end") as unit:
            self.sums = self._chunk_sums("0", unit.index)
            apart = f.mul(self.units, str(plan.sums_bytes))
            with f.loop("0", str(plan.sums_bytes), step) as loop:
                at = f.gep("i8", self.sums, loop.index)
                places = [f.gep("i8", at, f.mul(apart, str(chunk))) for chunk in range(plan.chunks)]
                parts = [f.op(f"load {type_}, ptr {place}, align {step}") for place in places]
                while len(parts) > 1:
                    even = len(parts) // 2 * 2
                    operation = "fadd" if plan.compute.is_float else "add"
                    paired = [f.op(f"{operation} {type_} {x}, {y}") for x, y in zip(parts[:even:2], parts[1:even:2])]
                    parts = paired + parts[even:]
                f.emit(f"store {type_} {parts[0]}, ptr {at}, align {step}")
            self._locate(unit.index)
            for panel, vectors in self._panels():
                for tile in self._tiles():
                    self._finish(tile, panel, vectors, self._sums_of(tile, panel))
        f.finish()

    def _chunk_sums(self, chunk: str, unit: str) -> str:
        f, plan = self.f, self.plan
        return f.gep("i8", self.chunk_sums, f.mul(f.add(f.mul(chunk, self.units), unit), str(plan.sums_bytes)))

    def _panel_kinds(self) -> list[tuple[int, int, int]]:
        """(first panel, last, vectors): the full ones and the tail, if it is narrower."""
        plan = self.plan
        if plan.tail_vectors == plan.vectors:
            return [(0, plan.panels, plan.vectors)]
        kinds = [(0, plan.panels - 1, plan.vectors), (plan.panels - 1, plan.panels, plan.tail_vectors)]
        return [kind for kind in kinds if kind[0] < kind[1]]

    def _fill_table(self) -> None:
        """The runs of all blocks: for each block as many entries as the longest has."""
        blocks = self.plan.runs
        self.longest = max(len(runs) for runs in blocks)
        none = (0,) * RUN_WORDS
        words = [
            word
            for runs in blocks
            for entry in [*[(run.a, run.length, run.w) for run in runs], *[none] * (self.longest - len(runs))]
            for word in entry
        ]
        self.table = self.module.table(f"{self.name}_runs", words)
        self.counts = self.module.table(f"{self.name}_counts", [len(runs) for runs in blocks])

    def _runs_of(self, block: str) -> tuple[str, str]:
        """(address of the block's first run, their number)."""
        f = self.f
        count = f.op(f"load i64, ptr {f.gep('i64', self.counts, block)}, align 8")
        return f.gep("i64", self.table, f.mul(block, str(self.longest * RUN_WORDS))), count

    def _locate(self, unit: str) -> None:
        """What unit number `unit` (of all in one chunk) is."""
        f, plan = self.f, self.plan
        self.columns, rest = f.rem(unit, str(plan.column_units)), f.div(unit, str(plan.column_units))
        self.h0 = f.mul(f.rem(rest, str(plan.row_units)), str(plan.block_high))
        rest = f.div(rest, str(plan.row_units))
        self.d, rest = f.rem(rest, str(plan.axes[0].count)), f.div(rest, str(plan.axes[0].count))
        self.group, self.image = f.rem(rest, str(plan.groups)), f.div(rest, str(plan.groups))
        self.rows = f.min(f.sub(str(plan.axes[1].count), self.h0), str(plan.block_high))
        self.p0 = f.mul(self.columns, str(plan.unit_panels))
        self.p1 = f.min(f.add(self.p0, str(plan.unit_panels)), str(plan.panels))

    def _unit(self, number: str) -> None:
        f, plan = self.f, self.plan
        chunk, unit = "0", number
        if plan.chunks > 1:
            chunk, unit = f.op(f"udiv i64 {number}, {self.units}"), f.op(f"urem i64 {number}, {self.units}")
            self.sums = self._chunk_sums(chunk, unit)
        self.chunk = chunk
        self._locate(unit)
        image_step, group_step = self.kernel.a.at.strides[0], self.kernel.a.at.strides[-2]
        at = f.add(f.mul(self.image, self.dim(image_step)), f.mul(self.group, self.dim(group_step)))
        self.x_unit = f.gep(memory_type(self.a_type), self.x, at)
        if plan.shares_slab:
            lines = f.add(
                f.mul(self.image, str(plan.slab_bytes)), f.mul(self.h0, str(plan.axes[1].step * plan.line_bytes))
            )
            self.a = f.gep("i8", self.slab, lines)
        elif plan.in_place:
            place = "0"
            for axis, q in zip(plan.axes, (self.d, self.h0, "0")):
                place = f.add(place, f.mul(f.add(str(axis.offset), f.mul(q, str(axis.stride))), str(axis.x_step)))
            self.a = f.gep(memory_type(self.a_type), self.x_unit, place)
        else:
            self.a = self.slab
            with f.when(self._needs_slab(number)):
                self._fill_slab()
        for panel, vectors in self._panels():
            self._panel(panel, vectors)

    def _needs_slab(self, number: str) -> str:
        """Whether the unit before, in this call, left another slab than this one needs: they go column by column, chunk by chunk."""
        f, plan = self.f, self.plan
        first = f.op(f"icmp eq i64 {number}, %begin")
        one = plan.column_units if plan.chunks > 1 else 0
        fresh = f.op(f"icmp eq i64 {self.columns}, 0")
        if one:
            several = f.op(f"icmp ne i64 {self.units}, {one}")  # with one slab in all, the next chunk needs the same
            fresh = f.op(f"and i1 {fresh}, {several}")
        return f.op(f"or i1 {first}, {fresh}")

    def _panels(self) -> Iterator[tuple[str, int]]:
        """Emits loops over the unit's panels: (number, vectors), once for each kind."""
        f = self.f
        for first, last, vectors in self._panel_kinds():
            begin = f.op(f.intrinsic("smax", "i64", [("i64", self.p0), ("i64", str(first))]))
            with f.loop(begin, f.min(self.p1, str(last))) as panel:
                yield panel.index, vectors

    def _panel(self, panel: str, vectors: int) -> None:
        f, plan = self.f, self.plan
        begin, end = "0", str(plan.blocks)
        if plan.chunks > 1:
            begin = f.mul(self.chunk, str(CHUNK_BLOCKS))
            end = f.min(f.add(begin, str(CHUNK_BLOCKS)), end)
        packs = not (plan.resident or plan.laid_out)
        if self.packer.turns and packs:
            self._pack_panel(panel, vectors)
        with f.loop(begin, end) as block:
            if packs and not self.packer.turns:
                self._pack_block(panel, block.index, vectors)
            b = self._packed_block(panel, block.index, vectors)
            runs, count = self._runs_of(block.index)
            add = "false" if plan.blocks == 1 else f.op(f"icmp ne i64 {block.index}, {begin}")
            last = f.op(f"icmp eq i64 {block.index}, {plan.blocks - 1}")
            distance = self._next_block(panel, block.index, last, vectors) if plan.fetches else "0"
            for tile in self._tiles():
                sums = self._sums_of(tile, panel)
                name = self._micro_kernel(tile.high, tile.wide, vectors)
                operands = f"ptr {self._a_of(tile)}, ptr {b}, ptr {runs}, i64 {count}, ptr {sums}, i1 {add}"
                f.emit(f"call void @{name}({operands}, i64 {self._ahead(tile, distance, vectors)})")
                if plan.blocks == 1:
                    self._finish(tile, panel, vectors, sums)
                elif plan.chunks == 1:
                    with f.when(last):
                        self._finish(tile, panel, vectors, sums)

    def _next_block(self, panel: str, block: str, last: str, vectors: int) -> str:
        """Bytes from a row of w in place to the same one of the next block, the next panel's after the last; after the last of all 0: what lies
        there may be memory that other threads write."""
        f, plan = self.f, self.plan
        length = f.min(f.sub(str(plan.k), f.mul(block, str(BLOCK))), str(BLOCK))
        final = f.op(f"and i1 {last}, {f.op(f'icmp eq i64 {panel}, {plan.panels - 1}')}")
        return f.op(f"select i1 {final}, i64 0, i64 {f.mul(length, str(vectors * plan.lanes * self.size))}")

    def _ahead(self, tile: _Tile, distance: str, vectors: int) -> str:
        """How far from a row of w in place the tile fetches: at the next block each of the first tiles takes one vector."""
        f, plan = self.f, self.plan
        if not plan.fetches:
            return "0"
        return f.add(distance, f.mul(f.rem(tile.number, str(vectors)), str(plan.lanes * self.size)))

    def _sums_of(self, tile: _Tile, panel: str) -> str:
        f, plan = self.f, self.plan
        if plan.blocks == 1:
            return self.sums
        number = tile.number
        if plan.chunks > 1:
            number = f.add(f.mul(f.sub(panel, self.p0), str(plan.unit_tiles)), number)
        return f.gep("i8", self.sums, f.mul(number, str(plan.tile_bytes)))

    def _tiles(self) -> Iterator[_Tile]:
        """Emits loops over the unit's tiles: yields once for each shape, inside its loops."""
        f, plan = self.f, self.plan
        across, big = plan.wide
        full = f.div(self.rows, str(plan.tile_high))
        rest = plan.axes[1].count % plan.tile_high
        for high in (plan.tile_high, rest):
            if high == 0:
                continue
            begin, end = ("0", full) if high == plan.tile_high else (full, self._ceil(self.rows, plan.tile_high))
            with f.loop(begin, end) as down:
                h, number = f.mul(down.index, str(plan.tile_high)), f.mul(down.index, str(across))
                for first, count, wide in ((0, big, plan.tile_wide), (big, across - big, plan.tile_wide - 1)):
                    if count == 0:
                        continue
                    with f.loop("0", str(count)) as along:
                        w = f.add(str(first * plan.tile_wide), f.mul(along.index, str(wide)))
                        yield _Tile(f.add(number, f.add(str(first), along.index)), h, w, high, wide)

    def _ceil(self, x: str, y: int) -> str:
        return self.f.div(self.f.add(x, str(y - 1)), str(y))

    def _a_of(self, tile: _Tile) -> str:
        f, plan = self.f, self.plan
        _, line, pixel = plan.a_steps
        _, h, w = plan.axes
        high, wide = (h.stride, w.stride) if plan.in_place else (h.step, w.step)
        at = f.add(f.mul(tile.h, str(high * line * self.size)), f.mul(tile.w, str(wide * pixel * self.size)))
        return f.gep("i8", self.a, at)

    def _micro_kernel(self, high: int, wide: int, vectors: int) -> str:
        plan = self.plan
        steps: tuple[int, ...] = ()
        if plan.k <= MOST_UNROLLED:
            steps = tuple([run.a + i * self.size for run in plan.runs[0] for i in range(run.length)])
        offsets = plan.row_offsets(high, wide)
        tile = RunTile(offsets, vectors, plan.compute, self.size, steps, plan.blocks > 1, plan.laid_out, plan.fetches)
        return self._function(tile, "tile", lambda name: emit_run_kernel(self.module, self.target, name, tile))

    def _finish(self, tile: _Tile, panel: str, vectors: int, sums: str) -> None:
        f, plan = self.f, self.plan
        name = self._epilogue()
        row = vectors * plan.lanes * self.size
        if plan.laid_out:
            group, column, columns = panel, "0", str(plan.panel)
        else:
            group, column = self.group, f.mul(panel, str(plan.panel))
            columns = f.min(f.sub(str(plan.n), column), str(vectors * plan.lanes))
        f.emit(
            f"call void @{name}(ptr %args, ptr %dims, ptr %status, i64 {self.image}, i64 {self.d}, i64 {f.add(self.h0, tile.h)}, "
            f"i64 {tile.w}, i64 {group}, i64 {column}, i64 {columns}, i64 {tile.high}, i64 {tile.wide}, ptr {sums}, i64 {row})"
        )

    # ---------------------------------------------------------------------------------------------------- packing w
    def _packed_block(self, panel: str, block: str, vectors: int) -> str:
        """Where a block of a panel is, packed or in place: panels one after the other, K block after K block."""
        f, plan = self.f, self.plan
        at = "0"
        if plan.laid_out:
            at = f.add(f.mul(panel, str(plan.k * plan.k_row)), f.mul(block, str(BLOCK * plan.k_row)))
            return f.gep("i8", self.w, at)
        if plan.resident:
            at = f.mul(f.add(f.mul(self.group, str(plan.panels)), panel), str(plan.k * plan.k_row))
        if plan.resident or self.packer.turns:
            at = f.add(at, f.mul(block, str(BLOCK * self.packer.row(vectors))))
        return f.gep("i8", self.packed, at)

    def _pack_panel(self, panel: str, vectors: int) -> None:
        """All K of a panel."""
        f = self.f
        if self.packer.turns:
            self.packer.turn(f, self.w, self.group, panel, self._packed_block(panel, "0", vectors), vectors)
            return
        with f.loop("0", str(self.plan.blocks), 1) as block:
            self._pack_block(panel, block.index, vectors)

    def _pack_block(self, panel: str, block: str, vectors: int) -> None:
        runs, count = self._runs_of(block)
        to = self._packed_block(panel, block, vectors)
        self.packer.pack(self.f, self.w, self.group, panel, runs, count, to, vectors)

    def emit_packing(self) -> None:
        """The first phase where w stays packed for all units: a unit is one panel."""
        plan = self.plan
        self._begin(f"{self.name}_pack")
        f = self.f
        with f.loop("%begin", "%end") as unit:
            self.group, panel = f.div(unit.index, str(plan.panels)), f.rem(unit.index, str(plan.panels))
            if plan.tail_vectors == plan.vectors:
                self._pack_panel(panel, plan.vectors)
            else:
                tail = f.op(f"icmp eq i64 {panel}, {plan.panels - 1}")
                with f.when(tail):
                    self._pack_panel(panel, plan.tail_vectors)
                if plan.panels > 1:
                    with f.when(f.op(f"xor i1 {tail}, true")):
                        self._pack_panel(panel, plan.vectors)
        f.finish()

    # ------------------------------------------------------------------------------------------------------ the slab
    def emit_filling(self) -> None:
        """The first phase where units share slabs: a unit is one line of an image."""
        plan = self.plan
        self._begin(f"{self.name}_fill")
        f = self.f
        self.d = self.h0 = "0"
        slabs = self.slab
        with f.loop("%begin", "%end") as unit:
            image, row = f.div(unit.index, str(plan.slab_high)), f.rem(unit.index, str(plan.slab_high))
            self.x_unit = f.gep(memory_type(self.a_type), self.x, f.mul(image, self.dim(self.kernel.a.at.strides[0])))
            self.slab = f.gep("i8", slabs, f.mul(image, str(plan.slab_bytes)))
            with f.loop("0", str(plan.axes[0].taps)) as tap:
                self._fill_line(tap.index, row)
        f.finish()

    def _fill_slab(self) -> None:
        f, plan = self.f, self.plan
        with f.loop("0", str(plan.axes[0].taps)) as tap, f.loop("0", str(plan.slab_high)) as row:
            self._fill_line(tap.index, row.index)

    def _fill_line(self, tap: str, row: str) -> None:
        """One line: zeros outside x; the end of each step may spill into what comes after it."""
        f, plan = self.f, self.plan
        d, h, w = plan.axes
        _, line, pixel = plan.a_steps
        spacing = w.stride if w.taps == 1 else 1
        covered = w.covered(w.count)
        first = min(covered, max(0, (spacing - 1 - w.offset) // spacing))
        last = max(first, min(covered, (w.bound - 1 - w.offset) // spacing + 1))
        p_d = f.add(f.add(str(d.offset), f.mul(self.d, str(d.stride))), f.mul(tap, str(d.dilation)))
        p_h = f.add(str(h.offset), f.mul(self.h0, str(h.stride)))
        p_h = f.add(p_h, f.mul(row, str(h.stride if h.taps == 1 else 1)))
        number = f.add(f.mul(tap, str(plan.slab_high)), row)
        to = f.gep("i8", self.slab, f.mul(number, str(line * self.size)))
        conditions = [f.op(f"icmp ult i64 {p}, {axis.bound}") for p, axis in ((p_d, d), (p_h, h))]
        inside = f.op(f"and i1 {conditions[0]}, {conditions[1]}")
        with f.when(inside):
            self._zeros(to, first * pixel)
            at = f.add(f.mul(p_d, str(d.x_step)), f.mul(p_h, str(h.x_step)))
            from_ = f.gep(
                memory_type(self.a_type), self.x_unit, f.add(at, str((w.offset + first * spacing) * w.x_step))
            )
            self._copy_positions(
                from_, f.gep("i8", to, str(first * pixel * self.size)), last - first, spacing * w.x_step
            )
            self._zeros(f.gep("i8", to, str(last * pixel * self.size)), (covered - last) * pixel)
        with f.when(f.op(f"xor i1 {inside}, true")):
            self._zeros(to, covered * pixel)

    def _zeros(self, to: str, count: int) -> None:
        f, plan = self.f, self.plan
        type_ = vector(plan.lanes, register_type(plan.compute))
        with f.loop("0", str(count), plan.lanes) as loop:
            f.emit(
                f"store {type_} zeroinitializer, ptr {f.gep('i8', to, f.mul(loop.index, str(self.size)))}, align {self.size}"
            )

    def _copy_positions(self, from_: str, to: str, count: int, step: int) -> None:
        """`count` positions, `step` elements apart in x."""
        if count == 0:
            return
        f, plan, item = self.f, self.plan, self.a_type.itemsize
        channel = self.kernel.a.at.strides[-1]
        assert isinstance(channel, int)
        if channel == 1 and step == plan.c == plan.pixel:
            self._copy(from_, to, count * plan.c)
            return
        if channel == 1 and plan.c > 1:
            with f.loop("0", str(count)) as position:
                source = f.gep("i8", from_, f.mul(position.index, str(step * item)))
                self._copy(source, f.gep("i8", to, f.mul(position.index, str(plan.pixel * self.size))), plan.c)
            return
        element = register_type(plan.compute)
        whole = 0
        if step == 1 and plan.pixel == plan.c <= MOST_INTERLEAVED and self.a_type is plan.compute:
            whole = count // plan.lanes * plan.lanes
            self._interleave(from_, to, whole, channel)
        with f.loop("0", str(plan.c)) as c, f.loop(str(whole), str(count)) as position:
            source = f.gep(
                "i8", from_, f.add(f.mul(c.index, str(channel * item)), f.mul(position.index, str(step * item)))
            )
            value = f.op(f"load {memory_type(self.a_type)}, ptr {source}, align {item}")
            value = convert(f, self.target, value, self.a_type, plan.compute, 1, None)
            at = f.add(f.mul(position.index, str(plan.pixel)), c.index)
            f.emit(f"store {element} {value}, ptr {f.gep('i8', to, f.mul(at, str(self.size)))}, align {self.size}")

    def _interleave(self, from_: str, to: str, count: int, channel: int) -> None:
        """`count` positions, whole vectors, of the few channels of an image that lie `channel` elements apart in x."""
        f, plan, lanes, channels = self.f, self.plan, self.plan.lanes, self.plan.c
        type_ = vector(lanes, register_type(plan.compute))
        with f.loop("0", str(count), lanes) as loop:
            at = f.gep("i8", from_, f.mul(loop.index, str(self.size)))
            planes = [
                f.op(f"load {type_}, ptr {f.gep('i8', at, str(c * channel * self.size))}, align {self.size}")
                for c in range(channels)
            ]
            place = f.gep("i8", to, f.mul(loop.index, str(channels * self.size)))
            for part in range(channels):
                # Lane by lane: the position and channel of element part * lanes + lane; one more channel put in at a time.
                where = [divmod(part * lanes + lane, channels) for lane in range(lanes)]
                value, picked = planes[0], [position for position, _ in where]
                for c in range(1, channels):
                    picked = [lanes + where[i][0] if where[i][1] == c else picked[i] for i in range(lanes)]
                    mask = ", ".join(f"i32 {i}" for i in picked)
                    value = f.op(f"shufflevector {type_} {value}, {type_} {planes[c]}, <{lanes} x i32> <{mask}>")
                    picked = list(range(lanes))
                f.emit(
                    f"store {type_} {value}, ptr {f.gep('i8', place, str(part * lanes * self.size))}, align {self.size}"
                )

    def _copy(self, from_: str, to: str, count: int) -> None:
        """`count` contiguous elements, in whole vectors: the last writes zeros beyond."""
        f, plan, item = self.f, self.plan, self.a_type.itemsize
        lanes = plan.lanes
        source = vector(lanes, memory_type(self.a_type))

        def move(index: str, mask: str | None) -> None:
            at = f.gep("i8", from_, f.mul(index, str(item)))
            if mask is None:
                value = f.op(f"load {source}, ptr {at}, align {item}")
            else:
                operands = [("ptr", at), ("i32", str(item)), (vector(lanes, "i1"), mask), (source, "zeroinitializer")]
                value = f.op(f.intrinsic("masked.load", source, operands, f"{mangle(source)}.p0"))
            value = convert(f, self.target, value, self.a_type, plan.compute, lanes, None)
            place = f.gep("i8", to, f.mul(index, str(self.size)))
            f.emit(f"store {vector(lanes, register_type(plan.compute))} {value}, ptr {place}, align {self.size}")

        whole = count // lanes * lanes
        with f.loop("0", str(whole), lanes) as loop:
            move(loop.index, None)
        if whole < count:
            bits = ", ".join(f"i1 {'true' if lane < count - whole else 'false'}" for lane in range(lanes))
            move(str(whole), f"<{bits}>")
