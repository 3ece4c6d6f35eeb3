"""What the attention emitters share: products of small tiles in scratch memory, blocks of rows packed or copied, scalar recipes on vectors.

Blocks are 64 queries by 64 keys; a *grid* is one such block of numbers of the compute dtype, its rows 64 elements apart. All products go
through one micro-kernel, c[r][*] (+)= fma over ascending k of a[r, k] * b[k][*], with a read element by element and b and c by vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from duo_backends.cpu.body import Scope, Value
from duo_backends.cpu.code import Target
from duo_backends.cpu.convert import convert
from duo_backends.cpu.gemm_pack import emit_gather, emit_transpose, emit_turn
from duo_backends.cpu.gemm_tile import LINE, ask, broadcast, registers_of, transposed_lanes
from duo_backends.cpu.llvm import Function as LlvmFunction
from duo_backends.cpu.llvm import Module, literal, register_type, splat_literal, vector
from duo_backends.cpu.nest import Phase
from duo_ir.kernels.body import BodyBuilder, finish
from duo_ir.kernels.kernel import Access, AttentionKernel, Body, Store
from duo_ir.ops.attention import BLOCK
from duo_ir.types import DimLike, DType

SET, ADD = "set", "add"  # c = sum, c += sum
PAGE = 4096  # bytes of addresses after which the sets of a first-level cache repeat
WAYS = 8  # lines that may share a set of it

UNROLLED = 8  # vectors of a row that are copied without a loop


class Asked(NamedTuple):
    """Rows of a tensor that will be met soon, which products ask for on their way: each of the first `lines` tiles asks for one line of a row,
    a row a step. `row`: bytes between rows."""

    at: str
    row: str
    lines: int


class Parts:
    """One attention kernel being emitted: its phase function, and what is put together from tiles. `buffers` are laid out by
    `reserve` in each thread's scratch memory."""

    def __init__(self, module: Module, kernel: AttentionKernel, target: Target, name: str) -> None:
        self.module, self.kernel, self.target = module, kernel, target
        self.phase = Phase(module, name, kernel, target)
        self.f, self.e = self.phase.f, self.phase.e
        self.compute = kernel.acc
        self.size = self.compute.itemsize
        self.lanes = target.vector_bytes // self.size
        self.rows, self.vectors = (12 if registers_of(target) >= 32 else 6), 2  # of a register tile
        self.element = register_type(self.compute)
        self.type = vector(self.lanes, self.element)
        self.grid_row = BLOCK * self.size
        self.share = 0  # bytes of scratch that one thread needs, known when all is reserved
        self.whole_rows: DimLike = 0  # bytes beside, which depend on sizes
        self._made: dict[object, str] = {}
        self._bodies: dict[object, tuple[Body, int]] = {}

    # ------------------------------------------------------------------------------------------------- small things
    def padded(self, width: int) -> int:
        """A row's width as whole vectors."""
        return -(-width // self.lanes) * self.lanes

    def reserve(self, rows: int, width: int) -> int:
        """The offset of [rows][width] numbers in a thread's scratch memory."""
        at, self.share = self.share, self.share + -(-rows * width * self.size // 64) * 64
        return at

    def at(self, base: str, *offsets: tuple[str, int]) -> str:
        """base plus index * bytes for each pair."""
        f = self.f
        for index, step in offsets:
            base = f.gep("i8", base, f.mul(index, str(step)))
        return base

    def number(self, value: float) -> str:
        return splat_literal(self.lanes, self.element, literal(value, self.compute))

    def splat(self, scalar: str) -> str:
        return broadcast(self.f, scalar, self.lanes, self.element)

    def load(self, pointer: str) -> str:
        return self.f.op(f"load {self.type}, ptr {pointer}, align {self.lanes * self.size}")

    def store(self, value: str, pointer: str) -> None:
        self.f.emit(f"store {self.type} {value}, ptr {pointer}, align {self.lanes * self.size}")

    def op(self, code: str, x: str, y: str) -> str:
        return self.f.op(f"{code} {self.type} {x}, {y}")

    def compare(self, code: str, x: str, y: str) -> str:
        return self.f.op(f"fcmp {code} {self.type} {x}, {y}")

    def select(self, condition: str, x: str, y: str) -> str:
        return self.f.op(f"select {vector(self.lanes, 'i1')} {condition}, {self.type} {x}, {self.type} {y}")

    def recipe(self, recipe: Callable[..., int], *values: str) -> str:
        """A scalar recipe on vectors of the compute dtype."""
        key = (recipe, len(values))
        if key not in self._bodies:
            builder = BodyBuilder()
            handle = recipe(builder, *[builder.put("saved", (), self.compute, k) for k in range(len(values))])
            body, numbers = finish(builder.rows, [handle], lambda row: row[3])
            self._bodies[key] = body, numbers[handle]
        body, number = self._bodies[key]
        scope = Scope.flat((), None, self.lanes)
        found = self.e.emit(body, scope, saved=lambda slot: Value(values[slot], self.compute, True, 0))
        return found[number].name

    def lane_numbers(self, first: int) -> str:
        return f"<{', '.join(f'i32 {first + lane}' for lane in range(self.lanes))}>"

    def splat_at(self, place: str) -> str:
        """The number at `place` in all lanes."""
        return self.splat(self.f.op(f"load {self.element}, ptr {place}, align {self.size}"))

    def scale_row(self, row: str, nbytes: int, factor: str) -> None:
        """Multiplies so many bytes of whole vectors."""
        width = self.lanes * self.size
        with self.f.loop("0", str(nbytes), math.gcd(nbytes, UNROLLED * width), runs=True) as loop:
            for offset in range(0, math.gcd(nbytes, UNROLLED * width), width):
                at = self.f.gep("i8", row, self.f.add(loop.index, str(offset)))
                self.store(self.op("fmul", self.load(at), factor), at)

    def fill(self, base: str, numbers: int, value: float) -> None:
        """`numbers`, a multiple of the lanes, set from `base` on."""
        with self.f.loop("0", str(numbers * self.size), self.lanes * self.size, runs=True) as loop:
            self.store(self.number(value), self.f.gep("i8", base, loop.index))

    # ------------------------------------------------------------------------------------------------------ products
    def multiply(
        self, rows: str, k: str, a: str, a_row: int, a_step: str, b: str, b_step: str, columns: int | str, c: str, c_row: int, mode: str,
        asked: Asked | None = None,
    ) -> None:  # fmt: skip
        """c[rows][columns] from a (bytes between rows and between steps) and b. `columns`: a multiple of the lanes, or, in bytes, a value
        that is a multiple of a panel's."""
        f, width = self.f, self.lanes * self.size
        step = self.vectors * width
        tiles, left = f.div(rows, str(self.rows)), f.rem(rows, str(self.rows))

        def panel(offset: str, count: int) -> None:
            met = f.mul(f.div(offset, str(step)), f.add(tiles, "1")) if asked is not None else "0"  # tiles before
            b_at, c_at = f.gep("i8", b, offset), f.gep("i8", c, offset)

            def tile(height: int, first: str, number: str) -> None:
                name = self._micro_kernel(height, count, a_row, c_row, mode, asked is not None)
                a_from, c_to = self.at(a, (first, a_row)), self.at(c_at, (first, c_row))
                more = ""
                if asked is not None:
                    line = self.at(asked.at, (f.min(f.add(met, number), str(asked.lines - 1)), LINE))
                    more = f", ptr {line}, i64 {asked.row}"
                f.emit(
                    f"call void @{name}(i64 {k}, ptr {a_from}, i64 {a_step}, ptr {b_at}, i64 {b_step}, ptr {c_to}{more})"
                )

            with f.loop("0", tiles) as loop:
                tile(self.rows, f.mul(loop.index, str(self.rows)), loop.index)
            done = f.mul(tiles, str(self.rows))
            for height in (8, 4, 2, 1):
                if height >= self.rows:
                    continue
                bit = f.pure(f"and i64 {left}, {height}")
                with f.when(f.op(f"icmp ne i64 {bit}, 0")):
                    tile(height, done, tiles)
                done = f.add(done, bit)

        whole, rest = (
            (columns, 0)
            if isinstance(columns, str)
            else (str(columns * self.size // step * step), columns * self.size % step)
        )
        if whole != "0":
            with f.loop("0", whole, step, runs=True) as loop:
                panel(loop.index, self.vectors)
        if rest:
            panel(whole, rest // width)

    def _micro_kernel(self, rows: int, vectors: int, a_row: int, c_row: int, mode: str, asks: bool) -> str:
        key = (rows, vectors, a_row, c_row, mode, asks)
        if key not in self._made:
            self._made[key] = f"{self.phase.name}_tile{len(self._made)}"
            self._emit_micro_kernel(self._made[key], rows, vectors, a_row, c_row, mode, asks)
        return self._made[key]

    def _emit_micro_kernel(
        self, name: str, rows: int, vectors: int, a_row: int, c_row: int, mode: str, asks: bool
    ) -> None:  # fmt: skip
        f = LlvmFunction(
            self.module,
            f"define internal void @{name}(i64 %k, ptr noalias readonly %a, i64 %as, ptr noalias readonly %b, i64 %bs, "
            f"ptr noalias %c{', ptr %ask, i64 %ask_step' if asks else ''}) noinline #0",
        )
        width = self.lanes * self.size
        carried = [("ptr", "%a"), ("ptr", "%b"), *[(self.type, "zeroinitializer")] * (rows * vectors)]
        if asks:
            carried.append(("ptr", "%ask"))
        with f.loop("0", "%k", 1, carried) as loop:
            a_at, b_at, *acc = loop.values
            after: list[str] = []
            if asks:
                line = acc.pop()
                ask(f, line)
                after = [f.op(f"getelementptr i8, ptr {line}, i64 %ask_step")]
            loaded = [
                f.op(f"load {self.type}, ptr {f.gep('i8', b_at, str(v * width))}, align {self.size}")
                for v in range(vectors)
            ]
            for r in range(rows):
                scalar = f.op(f"load {self.element}, ptr {f.gep('i8', a_at, str(r * a_row))}, align {self.size}")
                factor = broadcast(f, scalar, self.lanes, self.element)
                for v in range(vectors):
                    operands = [(self.type, x) for x in (factor, loaded[v], acc[r * vectors + v])]
                    acc[r * vectors + v] = f.op(f.intrinsic("fma", self.type, operands))
            following = [f.op("getelementptr i8, ptr " + p) for p in (f"{a_at}, i64 %as", f"{b_at}, i64 %bs")]
            loop.next = [*following, *acc, *after]
        for r in range(rows):
            for v in range(vectors):
                place, value = f.gep("i8", "%c", str(r * c_row + v * width)), loop.results[2 + r * vectors + v]
                if mode == ADD:
                    before = f.op(f"load {self.type}, ptr {place}, align {width}")
                    value = f.op(f"fadd {self.type} {before}, {value}")
                f.emit(f"store {self.type} {value}, ptr {place}, align {width}")
        f.finish()

    # ---------------------------------------------------------------------------------------------- rows in and out
    def pointer(self, access: Access, batch: Sequence[str], row: str) -> str:
        """The address of the first element of a row."""
        scope = Scope.flat((*batch, row, "0"))
        position, _, _ = self.e.affine(scope, access.at)
        dtype = self.kernel.args[access.buffer].dtype
        return self.f.gep(_memory(dtype), self.e.pointers[access.buffer], position)

    def strides(self, access: Access) -> tuple[str, str]:
        """Bytes between rows and between columns."""
        size = self.kernel.args[access.buffer].dtype.itemsize
        row, column = (self.f.mul(self.e.dim(s), str(size), self.f.top) for s in access.at.strides[-2:])
        return row, column

    def in_place(self, access: Access, width: int, whole_vectors: bool, together: int = BLOCK) -> bool:
        """Whether products may read the rows where they lie: of the compute dtype, at known strides, so many `together` in enough sets of the
        first-level cache; by vectors too where that is asked for."""
        row, column = access.at.strides[-2:]
        if self.kernel.args[access.buffer].dtype is not self.compute or not isinstance(row, int) or column != 1:
            return False
        sets = min(PAGE // LINE, PAGE // math.gcd(row * self.size, PAGE))
        return together <= sets * WAYS and (not whole_vectors or width % self.lanes == 0)

    def asked(self, access: Access, batch: Sequence[str], row: str, rows: str, width: int) -> Asked:
        """A block of rows to ask for; of one that is not whole the first row alone."""
        f = self.f
        dtype = self.kernel.args[access.buffer].dtype
        step = f.op(f"select i1 {f.op(f'icmp sge i64 {rows}, {BLOCK}')}, i64 {self.strides(access)[0]}, i64 0")
        return Asked(self.pointer(access, batch, row), step, max(1, width * dtype.itemsize // LINE))

    def of_half(self, half: str, pair: Sequence[Asked]) -> Asked:
        """What is asked for in the first half of a block, or in the second."""
        f, (a, b) = self.f, pair
        second = f.op(f"icmp ne i64 {half}, 0")
        at = f.op(f"select i1 {second}, ptr {b.at}, ptr {a.at}")
        return Asked(at, f.op(f"select i1 {second}, i64 {b.row}, i64 {a.row}"), min(a.lines, b.lines))

    def copy_in(
        self, access: Access, batch: Sequence[str], row: str, rows: str, width: int, to: str, factor: float | None = None
    ) -> None:  # fmt: skip
        """Rows of a tensor, widened and multiplied, at `to`, whole vectors each."""
        f, e = self.f, self.e
        dtype = self.kernel.args[access.buffer].dtype
        with f.loop("0", rows, runs=True) as loop:
            line, target = f.add(row, loop.index), self.at(to, (loop.index, self.padded(width) * self.size))

            def emit(column: str, lanes: int, mask: str | None, line: str = line, target: str = target) -> None:
                scope = Scope.flat((*batch, line, column), len(batch) + 1, lanes, mask)
                value = e.splat(scope, e.load(access, (), dtype, scope))
                value = convert(f, self.target, value, dtype, self.compute, lanes, None)
                if factor is not None and factor != 1.0:
                    value = self.op("fmul", value, self.number(factor))
                self.store(value, self.at(target, (column, self.size)))

            self._vectors(width, emit)

    def copy_out(
        self, access: Access, batch: Sequence[str], row: str, rows: str, width: int, source: str,
        factor: float | Callable[[str], str] | None = None,
    ) -> None:  # fmt: skip
        """Rows of whole vectors at `source`, multiplied (by one number, or by each row's own) and rounded, to a tensor."""
        f, e = self.f, self.e
        dtype = self.kernel.args[access.buffer].dtype
        with f.loop("0", rows, runs=True) as loop:
            line, origin = f.add(row, loop.index), self.at(source, (loop.index, self.padded(width) * self.size))
            times = None
            if factor is not None and factor != 1.0:
                times = self.number(factor) if isinstance(factor, float) else factor(loop.index)

            def emit(
                column: str, lanes: int, mask: str | None, line: str = line, origin: str = origin, times: str | None = times
            ) -> None:  # fmt: skip
                value = self.load(self.at(origin, (column, self.size)))
                if times is not None:
                    value = self.op("fmul", value, times)
                value = convert(f, self.target, value, self.compute, dtype, lanes, None)
                scope = Scope.flat((*batch, line, column), len(batch) + 1, lanes, mask)
                e.store(Store(access, 0), [Value(value, dtype, True, 0)], scope)

            self._vectors(width, emit)

    def _vectors(self, width: int, emit: Callable[[str, int, str | None], None]) -> None:
        """Each vector of a row; few of them one after the other, without a loop."""
        whole = width // self.lanes * self.lanes if width <= UNROLLED * self.lanes else 0
        for column in range(0, whole, self.lanes):
            emit(str(column), self.lanes, None)
        if whole < width:
            self.phase.over_lanes(str(whole), str(width), self.lanes, emit, scalar_tail=False)

    def transposed(self, access: Access, batch: Sequence[str], row: str, rows: str, width: int, to: str) -> None:
        """Up to 64 rows of a tensor as the columns of [width][64]; columns beyond hold anything."""
        dtype = self.kernel.args[access.buffer].dtype
        row_bytes, column_bytes = self.strides(access)
        source = self.pointer(access, batch, row)
        contiguous = access.at.strides[-1] == 1 and width * self.size >= 16
        row_stride = access.at.strides[-2]
        apart = row_stride * dtype.itemsize if isinstance(row_stride, int) else None
        self._transpose(
            source, row_bytes, column_bytes, rows, str(width), to, str(self.grid_row), dtype, contiguous, apart
        )

    def _transpose(
        self, source: str, lane: str, step: str, lanes: str, steps: str, to: str, row: str, dtype: DType, contiguous: bool,
        apart: int | None,
    ) -> None:  # fmt: skip
        """to[step][lane] = source; `contiguous`: steps are, and there are enough of them for vectors. `apart`: `lane`, where it is known."""
        f, at_once = self.f, transposed_lanes(self.target, self.compute) if apart is None else self.lanes
        if not contiguous:
            f.emit(
                f"call void @{self._gather(dtype)}(ptr {source}, i64 {lane}, i64 {step}, i64 {lanes}, i64 {steps}, ptr {to}, i64 {row})"
            )
            return
        name = self._packer("transpose", dtype, apart)
        with f.loop("0", lanes, at_once, runs=True) as loop:
            valid = f.min(f.sub(lanes, loop.index), str(at_once))
            from_, target = f.gep("i8", source, f.mul(loop.index, lane)), self.at(to, (loop.index, self.size))
            f.emit(
                f"call void @{name}(ptr {from_}, i64 {lane}, i64 {step}, i64 {valid}, i64 {steps}, ptr {target}, i64 {row})"
            )

    def _gather(self, dtype: DType) -> str:
        return self._packer("gather", dtype)

    def _packer(self, kind: str, dtype: DType, apart: int | None = None) -> str:
        """A function that packs: `gather`, `transpose`, or with lanes `apart` bytes from each other by whole squares."""
        key = (kind, dtype, apart)
        if key not in self._made:
            gather = None if kind == "gather" else self._gather(dtype)
            self._made[key] = name = f"{self.phase.name}_{kind}{len(self._made)}"
            if gather is None:
                emit_gather(self.module, self.target, name, dtype, self.compute)
                return name
            loose = name if apart is None else f"{name}_rest"
            lanes = transposed_lanes(self.target, self.compute) if apart is None else self.lanes
            emit_transpose(self.module, self.target, loose, gather, dtype, self.compute, lanes)
            if apart is not None:
                emit_turn(self.module, self.target, name, loose, dtype, self.compute, apart)
        return self._made[key]

    # --------------------------------------------------------------------------------------------------------- masks
    def add_mask(
        self, batch: Sequence[str], grid: str, query: str, key: str, rows: str, columns: str, count: int, query_lanes: bool
    ) -> None:  # fmt: skip
        """The mask operand onto a part of a grid, whose lanes are queries (rows are keys) or the other way round. `grid`: its first number, that
        of query number `query` and key number `key`; `count` columns of which the first `columns` are there."""
        access = self.kernel.mask
        if access is None:
            return
        f, e = self.f, self.e
        dtype = self.kernel.args[access.buffer].dtype
        rank = len(batch)
        with f.loop("0", rows, runs=True) as loop:
            for number in range(count // self.lanes):
                first = str(number * self.lanes)
                live = self.phase.lane_mask(
                    f.call("smax", "i64", [("i64", f.sub(columns, first)), ("i64", "0")]), self.lanes
                )
                lane0, line = (query, f.add(key, loop.index)) if query_lanes else (key, f.add(query, loop.index))
                lane0 = f.add(lane0, first)
                indices = (*batch, lane0, line) if query_lanes else (*batch, line, lane0)
                scope = Scope.flat(indices, rank if query_lanes else rank + 1, self.lanes, live)
                mask = e.splat(scope, e.load(access, (), dtype, scope))
                place = self.at(grid, (loop.index, self.grid_row), (first, self.size))
                if dtype.kind == "b":
                    self.store(self.select(mask, self.load(place), self.number(float("-inf"))), place)
                else:
                    self.store(self.op("fadd", self.load(place), mask), place)

    def cut_triangle(self, grid: str, rows: str, behind: str, count: int, query_lanes: bool) -> None:
        """-inf where the key comes after the query, in `count` columns; the first column is number `behind` where the first row is 0."""
        f = self.f
        with f.loop("0", rows, runs=True) as loop:
            line = f.sub(loop.index, behind)
            line = broadcast(f, f.op(f"trunc i64 {line} to i32"), self.lanes, "i32")
            for number in range(count // self.lanes):
                place = self.at(grid, (loop.index, self.grid_row), (str(number * self.lanes), self.size))
                code = f"icmp {'sge' if query_lanes else 'sle'} <{self.lanes} x i32>"
                seen = f.op(f"{code} {self.lane_numbers(number * self.lanes)}, {line}")
                self.store(self.select(seen, self.load(place), self.number(float("-inf"))), place)


def _memory(dtype: DType) -> str:
    return "i16" if dtype.is_narrow_float else "float" if dtype.itemsize == 4 else "double"
