"""The first few of many elements (top-k): one pass over the row, which keeps what comes before the last of the `count` best so far.

The first elements of a row fill a buffer, which is sorted; from then on only elements with a lesser key than record number `count` are
collected (an equal one comes later, so it is behind), and when the buffer is full it is sorted again and cut to `count`. Elements are collected in
order of position and the sort is stable, so equal ones keep their order.
"""

from __future__ import annotations

from duo_backends.cpu.body import Scope
from duo_backends.cpu.llvm import vector
from duo_backends.cpu.sort_keys import Keys, Records
from duo_backends.cpu.sort_parts import COUNTS, Radix, Rows

_SPARE = 256  # records collected beside twice the count before the buffer is sorted
_VECTORS = 4  # looked at together


class First:
    """Emits the phase; a work unit is a row."""

    def __init__(self, rows: Rows, radix: Radix) -> None:
        self.rows, self.radix, self.f, self.e, self.r = rows, radix, rows.f, rows.e, rows.r
        self.width = rows.target.vector_bytes // (8 if self.r.key == "i64" else 4)

    @staticmethod
    def _room(count: int) -> int:
        return (2 * count + _SPARE + 64 * _VECTORS + 7) // 8 * 8  # whole cache lines

    @staticmethod
    def scratch(records: Records, count: int) -> int:
        """Bytes for one thread."""
        return COUNTS + 2 * len(records.columns) * First._room(count) * records.column_bytes

    def emit(self) -> None:
        f, rows, r = self.f, self.rows, self.r
        top, columns = f.top, len(r.columns)
        count = rows.count
        limit = f.add(f.mul(count, "2", top), str(_SPARE), top)  # sorted once it holds so many
        eighths = f.div(f.add(limit, str(64 * _VECTORS + 7), top), "8", top)
        room = f.mul(eighths, str(8 * r.column_bytes), top)
        share = f.add(f.mul(room, str(2 * columns), top), str(COUNTS), top)
        base = f.gep("i8", "%scratch", f.mul("%tid", share, top), top)
        places = [
            f.gep("i8", base, f.add(f.mul(room, str(k), top), str(COUNTS), top), top) for k in range(2 * columns)
        ]
        self.a, self.b, self.counts = places[:columns], places[columns:], base
        self.held = f.alloca("i64")  # how many records the buffer holds
        self.bound = f.alloca(r.key)  # the key of the last one kept
        self.seen = f.alloca(r.key, self.width)
        fill = f.min(limit, rows.length)
        with f.loop("%begin", "%end") as units:
            outer = rows.phase.unravel(units.index, rows.kernel.axes)
            rows.read_row(outer, self.a, "0", fill)
            f.emit(f"store i64 {fill}, ptr {self.held}, align 8")
            self._cut(count)
            step = self.width * _VECTORS
            rest = f.op(f"sub i64 {rows.length}, {fill}")
            middle = f.op(f"add i64 {fill}, {f.op(f'and i64 {rest}, {-step}')}")
            with f.loop(fill, middle, step) as loop:
                self._look(outer, loop.index)
                self._full(limit, count)
            with f.loop(middle, rows.length) as loop:
                scope = Scope.flat((*outer, loop.index))
                self._collect(self._keys(scope), loop.index, 1)
            self._cut(count)
            rows.write_row(outer, self.a, "0", count)
        f.finish()

    def _keys(self, scope: Scope) -> str:
        value = self.e.load(self.rows.kernel.source, (), self.r.dtype, scope)
        return Keys(self.f, self.r, scope.width).key(self.e.splat(scope, value))

    def _look(self, outer: list[str], index: str) -> None:
        """A few vectors of elements; most often none of them counts."""
        f, width, element = self.f, self.width, self.r.key
        bound = f.op(f"load {element}, ptr {self.bound}, align 8")
        limit = self.e.splat_scalar(bound, element, width)
        found = []
        for k in range(_VECTORS):
            at = f.add(index, str(k * width))
            key = self._keys(Scope.flat((*outer, at), self.rows.rank, width))
            less = f.op(f"icmp ult {vector(width, element)} {key}, {limit}")
            bits = f.op(f"bitcast <{width} x i1> {less} to i{width}")
            found.append((at, key, bits))
        some = found[0][2]
        for _, _, bits in found[1:]:
            some = f.op(f"or i{width} {some}, {bits}")
        with f.when(f.op(f"icmp ne i{width} {some}, 0")):
            for at, key, bits in found:
                with f.when(f.op(f"icmp ne i{width} {bits}, 0")):
                    self._collect(key, at, width)

    def _collect(self, key: str, index: str, width: int) -> None:
        """Adds those of some elements whose keys are below the bound to the buffer."""
        f, element = self.f, self.r.key
        keys = Keys(f, self.r, 1)
        f.emit(f"store {vector(width, element)} {key}, ptr {self.seen}, align {self.rows.target.vector_bytes if width > 1 else 8}")
        bound = f.op(f"load {element}, ptr {self.bound}, align 8")
        held = f.op(f"load i64, ptr {self.held}, align 8")
        with f.loop("0", str(width), carried=[("i64", held)], runs=True) as lane:
            one = f.op(f"load {element}, ptr {f.gep(element, self.seen, lane.index)}, align {4 if element == 'i32' else 8}")
            columns = keys.record(one, f.op(f"add i64 {index}, {lane.index}"))
            for base, c, value in zip(self.a, self.r.columns, columns):
                f.emit(f"store {c} {value}, ptr {f.gep(c, base, lane.values[0])}, align {self.r.column_bytes}")
            less = f.op(f"icmp ult {element} {one}, {bound}")
            lane.next = [f.op(f"add i64 {lane.values[0]}, {f.op(f'zext i1 {less} to i64')}")]
        f.emit(f"store i64 {lane.results[0]}, ptr {self.held}, align 8")

    def _full(self, limit: str, count: str) -> None:
        f = self.f
        held = f.op(f"load i64, ptr {self.held}, align 8")
        with f.when(f.op(f"icmp sge i64 {held}, {limit}")):
            self._cut(count)

    def _cut(self, count: str) -> None:
        """Sorts the buffer and keeps the first `count`, which are then in the columns `a`; the last one's key is the bound."""
        f, r = self.f, self.r
        held = f.op(f"load i64, ptr {self.held}, align 8")
        found = self.radix.sort(f, self.a, self.b, held, self.counts)
        moved = f.op(f"icmp ne ptr {found[0]}, {self.a[0]}")
        with f.when(moved), f.loop("0", count) as loop:
            for old, new, c in zip(self.b, self.a, r.columns):
                word = f.op(f"load {c}, ptr {f.gep(c, old, loop.index)}, align {r.column_bytes}")
                f.emit(f"store {c} {word}, ptr {f.gep(c, new, loop.index)}, align {r.column_bytes}")
        f.emit(f"store i64 {count}, ptr {self.held}, align 8")
        last = f.op(f"sub i64 {count}, 1")
        columns = [
            f.op(f"load {c}, ptr {f.gep(c, base, last)}, align {r.column_bytes}") for base, c in zip(self.a, r.columns)
        ]
        key, _ = Keys(f, r, 1).split(columns)
        f.emit(f"store {r.key} {key}, ptr {self.bound}, align 8")
