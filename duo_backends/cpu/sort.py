"""Sorting on the CPU: four algorithms, which all give the one stable order, chosen by the sizes of a call.

    lanes    many rows that are not long: a merge-exchange network, a row in each lane of a vector
    radix    rows one by one, by the bytes of their keys
    shared   few long rows: the same radix sort, each row cut into chunks that threads count and distribute together
    first    few of many elements (top-k): those before the last one kept so far are collected, and now and then sorted

Keys and records are those of `sort_keys.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from duo_backends.cpu.code import KernelCode, Target
from duo_backends.cpu.code import Phase as PhaseCode
from duo_backends.cpu.llvm import Module
from duo_backends.cpu.nest import Phase, ceil_div, points, symbol
from duo_backends.cpu.sort_first import First
from duo_backends.cpu.sort_keys import Records
from duo_backends.cpu.sort_lanes import Lanes, comparators
from duo_backends.cpu.sort_parts import COUNTS, RADIX, Radix, Rows
from duo_ir.kernels.kernel import SortKernel
from duo_ir.types import evaluate

LANES, RADIX_ROWS, SHARED, FIRST = "lanes", "radix", "shared", "first"
_LONG = 1 << 15  # elements from which threads work on a row together where rows are few
_LINE = 64


def compile_sort(kernel: SortKernel, target: Target) -> KernelCode:
    """LLVM text and phases of a SortKernel; phases of an algorithm that the sizes do not choose have no units."""
    return _Sort(kernel, target).compile()


class _Sort:
    def __init__(self, kernel: SortKernel, target: Target) -> None:
        self.kernel, self.target = kernel, target
        self.module, self.name = Module(), symbol(kernel, target)
        self.records = Records.of(kernel)
        self.kept = Records.of(kernel, indexed=True)  # what `first` collects
        self.chunks = max(2, target.cores)
        self.phases: list[PhaseCode] = []

    def compile(self) -> KernelCode:
        kernel = self.kernel
        known = None if kernel.dims else self.choose({})
        wanted = [known] if known is not None else [LANES, RADIX_ROWS, SHARED, FIRST]
        if kernel.dims and kernel.count == kernel.length:
            wanted.remove(FIRST)
        if LANES in wanted:
            self.lanes()
        radix = None
        if RADIX_ROWS in wanted or SHARED in wanted:
            radix = Radix(self.module, f"{self.name}_r", self.records)
        if radix is not None and RADIX_ROWS in wanted:
            self.rows(radix)
        if radix is not None and SHARED in wanted:
            self.shared(radix)
        if FIRST in wanted:
            self.first()
        return KernelCode(self.module.text(), tuple(self.phases), self.scratch, self.cost)

    # -------------------------------------------------------------------------------------------------------- choosing
    def sizes(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """(rows, length, count)."""
        kernel = self.kernel
        return points(kernel.axes, sizes), evaluate(kernel.length, sizes), evaluate(kernel.count, sizes)

    def costs(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Rough cycles of each algorithm that can be chosen, on one thread."""
        rows, n, count = self.sizes(sizes)
        lanes, r = self.records.lanes(self.target), self.records
        last = evaluate(self.kernel.axes[-1], sizes)
        groups = rows // max(1, last) * ceil_div(last, lanes)
        reach = 1.0 if n * lanes * r.column_bytes * len(r.columns) < 1 << 19 else 3.0
        found = {
            LANES: groups * (comparators(n) * 2.5 * reach * len(r.columns) ** 2 + 40 * n),
            RADIX_ROWS: rows * (r.digits * (n * 4.0 + 600) + 4 * n + 200),
        }
        if n >= _LONG and rows < 2 * self.chunks:
            found[SHARED] = found.pop(RADIX_ROWS)
        if count * 4 <= n:
            found[FIRST] = rows * (0.5 * n + 60 * count + 8000)
        return found

    def choose(self, sizes: Mapping[str, int]) -> str:
        costs = self.costs(sizes)
        return min(costs, key=lambda name: costs[name])

    def cost(self, sizes: Mapping[str, int]) -> float:
        return 30.0 + min(self.costs(sizes).values()) / 4

    def add(self, name: str, which: str, units: Callable[[Mapping[str, int]], int]) -> None:
        kernel = self.kernel

        def chosen(sizes: Mapping[str, int]) -> int:
            if not evaluate(kernel.count, sizes) or not points(kernel.axes, sizes) or self.choose(sizes) != which:
                return 0
            return units(sizes)

        self.phases.append(PhaseCode(name, chosen))

    def scratch(self, sizes: Mapping[str, int], threads: int) -> int:
        rows, n, count = self.sizes(sizes)
        if not rows or not count:
            return 0
        which, r = self.choose(sizes), self.records
        line = len(r.columns) * _column(r, n)
        if which == LANES:
            return threads * n * self.target.vector_bytes * len(r.columns)
        if which == RADIX_ROWS:
            return threads * (2 * line + COUNTS)
        if which == SHARED:
            return rows * (2 * line + self.chunks * COUNTS + _flags(r))
        return threads * First.scratch(self.kept, count)

    def phase(self, suffix: str, records: Records) -> Rows:
        phase = Phase(self.module, f"{self.name}_{suffix}", self.kernel, self.target)
        return Rows(phase, self.kernel, records, self.target)

    # ------------------------------------------------------------------------------------------------------ algorithms
    def lanes(self) -> None:
        rows = self.phase("lanes", self.records)
        Lanes(rows).emit()
        axes = self.kernel.axes
        width = self.records.lanes(self.target)
        self.add(
            rows.phase.name, LANES,
            lambda sizes: points(axes[:-1], sizes) * ceil_div(evaluate(axes[-1], sizes), width),
        )  # fmt: skip

    def rows(self, radix: Radix) -> None:
        rows = self.phase("rows", self.records)
        f, r = rows.f, self.records
        line = self.line(rows, r)
        whole = f.add(f.mul(line, str(2 * len(r.columns)), f.top), str(COUNTS), f.top)
        base = f.gep("i8", "%scratch", f.mul("%tid", whole, f.top), f.top)
        counts = base
        columns = [
            f.gep("i8", base, f.add(f.mul(line, str(k), f.top), str(COUNTS), f.top), f.top)
            for k in range(2 * len(r.columns))
        ]
        a, b = columns[: len(r.columns)], columns[len(r.columns) :]
        with f.loop("%begin", "%end") as units:
            outer = rows.phase.unravel(units.index, self.kernel.axes)
            rows.read_row(outer, a, "0", rows.length)
            found = radix.sort(f, a, b, rows.length, counts)
            rows.write_row(outer, found, "0", rows.count)
            rows.zeros_in_place(outer, lambda at: rows.column(found[0], at))
        f.finish()
        self.add(rows.phase.name, RADIX_ROWS, lambda sizes: points(self.kernel.axes, sizes))

    def first(self) -> None:
        rows = self.phase("first", self.kept)
        radix = Radix(self.module, f"{self.name}_k", self.kept)
        First(rows, radix).emit()
        self.add(rows.phase.name, FIRST, lambda sizes: points(self.kernel.axes, sizes))

    def line(self, rows: Rows, records: Records) -> str:
        """Bytes of one column, at the top of the phase."""
        f, size = rows.f, records.column_bytes
        return f.mul(
            f.div(f.add(f.mul(rows.length, str(size), f.top), str(_LINE - 1), f.top), str(_LINE), f.top),
            str(_LINE),
            f.top,
        )

    def shared(self, radix: Radix) -> None:
        """Each byte has two phases, with a barrier between: chunks count, then, each from the counts of all, place. Flag d of a row says in
        which of its two sets of columns its records lie before byte d."""

        def units(sizes: Mapping[str, int]) -> int:
            return points(self.kernel.axes, sizes) * self.chunks

        for digit in range(self.records.digits + 1):
            last = ("write", "zeros") if self.records.tells_zeros_apart else ("write",)
            for part in ("count", "place") if digit < self.records.digits else last:
                rows = self.phase(f"{part}{digit}", self.records)
                _Chunk(self, rows, radix, digit, part).emit()
                self.add(rows.phase.name, SHARED, units)


class _Chunk:
    """One phase of `shared`. Unit = row * chunks + chunk."""

    def __init__(self, sort: _Sort, rows: Rows, radix: Radix, digit: int, part: str) -> None:
        self.sort, self.rows, self.radix, self.digit, self.part = sort, rows, radix, digit, part
        self.f, self.r = rows.f, sort.records

    def emit(self) -> None:
        f, rows, chunks, r = self.f, self.rows, self.sort.chunks, self.r
        n = len(r.columns)
        line = self.sort.line(rows, r)
        size = f.add(f.mul(line, str(2 * n), f.top), str(chunks * COUNTS + _flags(r)), f.top)
        step = f.div(f.add(rows.length, str(chunks - 1), f.top), str(chunks), f.top)
        with f.loop("%begin", "%end") as units:
            row, chunk = f.div(units.index, str(chunks)), f.rem(units.index, str(chunks))
            base = f.gep("i8", "%scratch", f.mul(row, size))
            counts, flags = base, f.gep("i8", base, str(chunks * COUNTS))
            first = f.gep("i8", flags, str(_flags(r)))
            columns = [f.gep("i8", first, f.mul(line, str(k))) for k in range(2 * n)]
            begin = f.min(f.mul(chunk, step), rows.length)
            end = f.min(f.add(begin, step), rows.length)
            outer = rows.phase.unravel(row, self.sort.kernel.axes)
            flag = "false"
            if self.digit:
                word = f.op(f"load i64, ptr {f.gep('i64', flags, str(self.digit))}, align 8")
                flag = f.op(f"icmp ne i64 {word}, 0")
            old = [f.op(f"select i1 {flag}, ptr {columns[n + k]}, ptr {columns[k]}") for k in range(n)]
            new = [f.op(f"select i1 {flag}, ptr {columns[k]}, ptr {columns[n + k]}") for k in range(n)]
            mine = f.gep("i8", counts, f.mul(chunk, str(COUNTS)))
            shift = str(r.first_bit + 8 * self.digit)
            if self.part == "count":
                if not self.digit:
                    rows.read_row(outer, old, begin, end)
                self.radix.count(f, old[0], begin, end, shift, mine)
            elif self.part == "place":
                self._place(counts, flags, flag, chunk, old, new, begin, end, shift)
            elif self.part == "write":
                rows.write_row(outer, old, f.min(begin, rows.count), f.min(end, rows.count))
            else:
                with f.when(f.op(f"icmp eq i64 {chunk}, 0")):
                    rows.zeros_in_place(outer, lambda at: rows.column(old[0], at))
        f.finish()

    def _place(
        self, counts: str, flags: str, flag: str, chunk: str, old: list[str], new: list[str], begin: str, end: str, shift: str
    ) -> None:  # fmt: skip
        f, chunks, n = self.f, self.sort.chunks, self.rows.length
        starts = f.alloca("i64", RADIX)
        # where this chunk's records of a byte go: after all of lesser bytes, and after those of the chunks before it
        most = "0"
        with f.loop("0", str(RADIX), carried=[("i64", "0"), ("i64", "0")]) as loop:
            at, total, before = loop.values[0], "0", "0"
            for k in range(chunks):
                some = f.op(f"load i64, ptr {f.gep('i64', counts, f.add(loop.index, str(k * RADIX)))}, align 8")
                earlier = f.op(f"icmp ult i64 {k}, {chunk}")
                before = f.op(f"add i64 {before}, {f.op(f'select i1 {earlier}, i64 {some}, i64 0')}")
                total = f.op(f"add i64 {total}, {some}")
            f.emit(f"store i64 {f.op(f'add i64 {at}, {before}')}, ptr {f.gep('i64', starts, loop.index)}, align 8")
            more = f.op(f"icmp ugt i64 {total}, {loop.values[1]}")
            loop.next = [f.op(f"add i64 {at}, {total}"), f.op(f"select i1 {more}, i64 {total}, i64 {loop.values[1]}")]
        most = loop.results[1]
        moves = f.op(f"icmp ne i64 {most}, {n}")
        with f.when(moves):
            self.radix.place(f, old, new, begin, end, shift, starts)
        with f.when(f.op(f"icmp eq i64 {chunk}, 0")):
            swapped = f.op(f"zext i1 {f.op(f'xor i1 {flag}, {moves}')} to i64")
            f.emit(f"store i64 {swapped}, ptr {f.gep('i64', flags, str(self.digit + 1))}, align 8")


def _column(records: Records, n: int) -> int:
    return ceil_div(n * records.column_bytes, _LINE) * _LINE


def _flags(records: Records) -> int:
    return ceil_div(8 * (records.digits + 1), _LINE) * _LINE
