"""What the sort emitters share: elements of a row to records and back, and the radix sort of records in memory.

Columns of records lie apart from each other. The radix sort takes one byte of the key at a time, lowest first; each byte is counted and then
distributed, which keeps the order of equal ones. Bytes that all records share are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from duo_backends.cpu.body import Scope, Value
from duo_backends.cpu.code import Target
from duo_backends.cpu.llvm import Function, Module
from duo_backends.cpu.nest import Phase
from duo_backends.cpu.sort_keys import Keys, Records
from duo_ir.kernels.kernel import Access, Affine, SortKernel, Store
from duo_ir.types import i64

RADIX = 256
COUNTS = 8 * RADIX  # bytes of one table of counts


class Rows:
    """One phase of a sort kernel: reads rows as records and writes them out. `rank`: axes of rows; the row's own axis follows."""

    def __init__(self, phase: Phase, kernel: SortKernel, records: Records, target: Target) -> None:
        self.phase, self.f, self.e, self.kernel, self.r, self.target = phase, phase.f, phase.e, kernel, records, target
        self.rank = len(kernel.axes)
        self.length, self.count = phase.e.dim(kernel.length), phase.e.dim(kernel.count)
        source = kernel.source.at
        # the element whose position is a number: the row's axis does not walk
        self.indexed_source = Access(
            kernel.source.buffer, Affine(source.offset, (*source.strides[:-1], 0)), (), (source.strides[-1],)
        )

    def column(self, base: str, index: str, size: str | None = None) -> str:
        """The address of record `index` in a column that starts at `base`; `size`: the columns' type unless a record's."""
        return self.f.gep(size or self.r.columns[0], base, index)

    def load_records(self, scope: Scope, position: str) -> list[str]:
        """The columns of the records at the scope's place, as registers."""
        keys = Keys(self.f, self.r, scope.width)
        value = self.e.load(self.kernel.source, (), self.r.dtype, scope)
        return keys.record(keys.key(self.e.splat(scope, value)), position)

    def store_results(self, scope: Scope, columns: list[str]) -> None:
        """Writes values and positions of records where the scope is."""
        kernel, e = self.kernel, self.e
        keys = Keys(self.f, self.r, scope.width)
        key, position = keys.split(columns)
        lanes = scope.width > 1
        if kernel.positions is not None:
            e.store(Store(kernel.positions, 0), [Value(position, i64, lanes, 0)], scope)
        if kernel.values is None:
            return
        found = keys.element(key)
        e.store(Store(kernel.values, 0), [Value(found, self.r.dtype, lanes, 0)], scope)
        if self.r.dtype.kind == "f" and self.r.indexed:
            self._signs_of_zeros(scope, keys, key, position)

    def _signs_of_zeros(self, scope: Scope, keys: Keys, key: str, position: str) -> None:
        """Zeros again, read where they came from."""
        f, e = self.f, self.e
        assert self.kernel.values is not None
        zero = keys.op("icmp eq", self.r.key, key, keys.lit(keys.zero_key(False), self.r.key))
        if scope.width == 1:
            with f.when(zero):
                again = e.load(self.indexed_source, [Value(position, i64, False, 0)], self.r.dtype, scope)
                e.store(Store(self.kernel.values, 0), [again], scope)
            return
        if scope.mask is not None:
            zero = keys.op("and", "i1", zero, scope.mask)
        bits = f.op(f"bitcast {keys.type('i1')} {zero} to i{scope.width}")
        with f.when(f.op(f"icmp ne i{scope.width} {bits}, 0")):
            here = Scope.flat(scope.indices, scope.vector, scope.width, zero)
            again = e.load(self.indexed_source, [Value(position, i64, True, 0)], self.r.dtype, here)
            e.store(Store(self.kernel.values, 0), [again], here)

    def read_row(self, outer: Sequence[str], bases: Sequence[str], begin: str, end: str) -> None:
        """Records of the row's elements [begin, end) in columns."""
        f = self.f
        width = self.r.lanes(self.target)

        def move(index: str, lanes: int, mask: str | None) -> None:
            scope = Scope.flat((*outer, index), self.rank, lanes, mask)
            position = index
            if lanes > 1 and self.r.indexed:
                position = self.e.ramp(scope, index, 1, 0)
            for base, element, value in zip(bases, self.r.columns, self.load_records(scope, position)):
                type_ = element if lanes == 1 else f"<{lanes} x {element}>"
                f.emit(f"store {type_} {value}, ptr {self.column(base, index)}, align {self.r.column_bytes}")

        self.phase.over_lanes(begin, end, width, move, scalar_tail=True)

    def write_row(self, outer: Sequence[str], bases: Sequence[str], begin: str, end: str) -> None:
        """Results [begin, end) of the row from sorted records."""
        f = self.f

        def move(index: str, lanes: int, mask: str | None) -> None:
            columns = []
            for base, element in zip(bases, self.r.columns):
                type_ = element if lanes == 1 else f"<{lanes} x {element}>"
                columns.append(f.op(f"load {type_}, ptr {self.column(base, index)}, align {self.r.column_bytes}"))
            self.store_results(Scope.flat((*outer, index), self.rank, lanes, mask), columns)

        self.phase.over_lanes(begin, end, self.r.lanes(self.target), move, scalar_tail=True)

    # ----------------------------------------------------------------------------------------- zeros without positions
    def zeros_in_place(self, outer: Sequence[str], key_at: Callable[[str], str]) -> None:
        """Where a row has zeros of both signs, writes them again in the order in which they came. `key_at`: the address of a sorted key."""
        f, e, kernel = self.f, self.e, self.kernel
        if not self.r.tells_zeros_apart or kernel.values is None:
            return
        keys = Keys(f, self.r, 1)
        first_sign = self.r.descending  # the sign of the zeros that come first is plus only in descending order
        first = self._lower_bound(keys, key_at, keys.zero_key(not first_sign))
        other = self._lower_bound(keys, key_at, keys.zero_key(first_sign))
        last = f.min(other, f.sub(self.length, "1"))
        found = f.op(f"load {self.r.key}, ptr {key_at(last)}, align {self.r.column_bytes}")
        some = f.op(f"icmp eq {self.r.key} {found}, {keys.zero_key(first_sign)}")
        both = f.op(f"and i1 {some}, {f.op(f'icmp ult i64 {first}, {other}')}")
        with f.when(both), f.loop("0", self.length, carried=[("i64", first)]) as loop:
            scope = Scope.flat((*outer, loop.index))
            value = e.load(kernel.source, (), self.r.dtype, scope)
            bits = value.name
            if not self.r.dtype.is_narrow_float:
                type_ = "float" if keys.bits == 32 else "double"
                bits = f.op(f"bitcast {type_} {bits} to {keys.int}")
            zero = f.op(f"icmp eq {keys.int} {f.op(f'shl {keys.int} {bits}, 1')}, 0")
            room = f.op(f"icmp slt i64 {loop.values[0]}, {self.count}")
            with f.when(f.op(f"and i1 {zero}, {room}")):
                e.store(Store(kernel.values, 0), [value], Scope.flat((*outer, loop.values[0])))
            loop.next = [f.op(f"add i64 {loop.values[0]}, {f.op(f'zext i1 {zero} to i64')}")]

    def _lower_bound(self, keys: Keys, key_at: Callable[[str], str], key: int) -> str:
        """How many of the sorted keys are less."""
        f = self.f
        steps = f.op(f"sub i64 64, {f.call('ctlz', 'i64', [('i64', self.length), ('i1', 'false')], 'i64')}")

        def before(at: str) -> str:
            found = f.op(f"load {self.r.key}, ptr {key_at(at)}, align {self.r.column_bytes}")
            return f.op(f"icmp ult {self.r.key} {found}, {key}")

        with f.loop("0", steps, carried=[("i64", "0"), ("i64", self.length)], runs=True) as loop:
            low, left = loop.values
            half = f.op(f"lshr i64 {left}, 1")
            some = f.op(f"icmp ne i64 {half}, 0")
            step = f.op(f"sub i64 {half}, {f.op(f'zext i1 {some} to i64')}")
            less = before(f.op(f"add i64 {low}, {step}"))
            moved = f.op(f"select i1 {less}, i64 {half}, i64 0")
            loop.next = [f.op(f"add i64 {low}, {moved}"), f.op(f"sub i64 {left}, {half}")]
        low = loop.results[0]
        return f.op(f"add i64 {low}, {f.op(f'zext i1 {before(low)} to i64')}")


# ------------------------------------------------------------------------------------------------------------- radix
class Radix:
    """The functions of a radix sort of records, made once in a module: `count` one byte of a run of records, `place` them by it."""

    def __init__(self, module: Module, name: str, records: Records) -> None:
        self.name, self.r = name, records
        self._count(module)
        self._place(module)

    def count(self, f: Function, column: str, begin: str, end: str, shift: str, counts: str) -> None:
        """counts[b] = how many of the records [begin, end) have the byte b at `shift`."""
        f.emit(f"call void @{self.name}_count(ptr {column}, i64 {begin}, i64 {end}, i64 {shift}, ptr {counts})")

    def place(
        self, f: Function, old: Sequence[str], new: Sequence[str], begin: str, end: str, shift: str, starts: str
    ) -> None:  # fmt: skip
        """Moves records to where starts[byte] says, which is then one further."""
        columns = ", ".join(f"ptr {x}" for x in (*old, *new))
        f.emit(f"call void @{self.name}_place({columns}, i64 {begin}, i64 {end}, i64 {shift}, ptr {starts})")

    def _byte(self, f: Function, column: str, index: str) -> tuple[str, str]:
        """(record's first column, its byte as i64)."""
        element = self.r.columns[0]
        word = f.op(f"load {element}, ptr {f.gep(element, column, index)}, align {self.r.column_bytes}")
        shift = "%shift" if element == "i64" else f.pure("trunc i64 %shift to i32", f.top)
        byte = f.op(f"and {element} {f.op(f'lshr {element} {word}, {shift}')}, 255")
        return word, byte if element == "i64" else f.op(f"zext i32 {byte} to i64")

    def _count(self, module: Module) -> None:
        f = Function(
            module,
            f"define internal void @{self.name}_count(ptr %column, i64 %begin, i64 %end, i64 %shift, ptr %counts) #0",
        )
        with f.loop("0", str(RADIX), 8) as loop:
            f.emit(f"store <8 x i64> zeroinitializer, ptr {f.gep('i64', '%counts', loop.index)}, align 64")
        with f.loop("%begin", "%end") as loop:
            _, byte = self._byte(f, "%column", loop.index)
            at = f.gep("i64", "%counts", byte)
            so_far = f.op(f"load i64, ptr {at}, align 8")
            f.emit(f"store i64 {f.op(f'add i64 {so_far}, 1')}, ptr {at}, align 8")
        f.finish()

    def _place(self, module: Module) -> None:
        n = len(self.r.columns)
        names = ", ".join([f"ptr %old{k}" for k in range(n)] + [f"ptr %new{k}" for k in range(n)])
        f = Function(
            module, f"define internal void @{self.name}_place({names}, i64 %begin, i64 %end, i64 %shift, ptr %starts) #0"
        )
        with f.loop("%begin", "%end") as loop:
            word, byte = self._byte(f, "%old0", loop.index)
            start = f.gep("i64", "%starts", byte)
            at = f.op(f"load i64, ptr {start}, align 8")
            f.emit(f"store i64 {f.op(f'add i64 {at}, 1')}, ptr {start}, align 8")
            for k, element in enumerate(self.r.columns):
                if k:
                    word = f.op(f"load {element}, ptr {f.gep(element, '%old1', loop.index)}, align 8")
                f.emit(f"store {element} {word}, ptr {f.gep(element, f'%new{k}', at)}, align {self.r.column_bytes}")
        f.finish()

    def sort(self, f: Function, a: Sequence[str], b: Sequence[str], n: str, counts: str) -> list[str]:
        """Sorts n > 0 records in the columns `a`, by way of `b`; returns the columns, of the one or the other, that hold them then."""
        states = [("ptr", x) for x in (*a, *b)]
        digits = self.r.digits
        with f.loop("0", str(8 * digits), 8, carried=states) as loop:
            old, new = loop.values[: len(a)], loop.values[len(a) :]
            shift = f.add(loop.index, str(self.r.first_bit))
            self.count(f, old[0], "0", n, shift, counts)
            moves = self.differs(f, old[0], n, shift, counts)
            with f.when(moves):
                self.starts(f, counts)
                self.place(f, old, new, "0", n, shift, counts)
            swapped = (*new, *old)
            loop.next = [
                f.op(f"select i1 {moves}, ptr {x}, ptr {y}") for x, y in zip(swapped, loop.values, strict=True)
            ]
        return loop.results[: len(a)]

    def differs(self, f: Function, column: str, n: str, shift: str, counts: str) -> str:
        """i1: whether not all n records have one byte there."""
        element = self.r.columns[0]
        word = f.op(f"load {element}, ptr {column}, align {self.r.column_bytes}")
        wide = word if element == "i64" else f.op(f"zext i32 {word} to i64")
        byte = f.op(f"and i64 {f.op(f'lshr i64 {wide}, {shift}')}, 255")
        same = f.op(f"load i64, ptr {f.gep('i64', counts, byte)}, align 8")
        return f.op(f"icmp ne i64 {same}, {n}")

    def starts(self, f: Function, counts: str) -> None:
        """Counts to where each byte's records begin."""
        with f.loop("0", str(RADIX), carried=[("i64", "0")]) as loop:
            at = f.gep("i64", counts, loop.index)
            some = f.op(f"load i64, ptr {at}, align 8")
            f.emit(f"store i64 {loop.values[0]}, ptr {at}, align 8")
            loop.next = [f.op(f"add i64 {loop.values[0]}, {some}")]


__all__ = ["COUNTS", "RADIX", "Radix", "Rows"]
