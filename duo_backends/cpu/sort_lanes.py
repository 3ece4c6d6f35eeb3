"""Many rows at once, one in each lane of a vector: a merge-exchange network over vectors of records in scratch memory.

The network is Batcher's, in the form for any number of elements (Knuth, The Art of Computer Programming 3, algorithm 5.2.2M): which elements
are compared depends on the length alone. Records are distinct (positions, or keys alone, where equal ones cannot be told apart), so that it is
as good as a stable sort.
"""

from __future__ import annotations

from duo_backends.cpu.body import Scope
from duo_backends.cpu.llvm import vector
from duo_backends.cpu.sort_keys import Keys
from duo_backends.cpu.sort_parts import Rows

_UNROLLED = 4  # comparisons in one turn of a loop
_NEAR = 8  # runs of so many comparisons or fewer are walked across


def comparators(n: int) -> float:
    """About how many comparisons the network of n elements has."""
    levels = max(0, (n - 1).bit_length())
    return n * (levels * (levels - 1) / 4 + 1)


class Lanes:
    """Emits the phase; a work unit is a vector of rows along the last axis of rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.f, self.e, self.r = rows, rows.f, rows.e, rows.r
        self.width = rows.r.lanes(rows.target)
        self.keys = Keys(self.f, self.r, self.width)
        self.bytes = rows.target.vector_bytes
        self.step = str(self.bytes)

    def emit(self) -> None:
        f, rows, kernel, width = self.f, self.rows, self.rows.kernel, self.width
        n = rows.length
        column = f.mul(n, self.step, f.top)
        share = f.mul(column, str(len(self.r.columns)), f.top)
        base = f.gep("i8", "%scratch", f.mul("%tid", share, f.top), f.top)
        self.bases = [f.gep("i8", base, f.mul(column, str(k), f.top), f.top) for k in range(len(self.r.columns))]
        size = rows.e.dim(kernel.axes[-1])
        strips = f.div(f.add(size, str(width - 1), f.top), str(width), f.top)
        with f.loop("%begin", "%end") as units:
            outer = rows.phase.unravel(f.div(units.index, strips), kernel.axes[:-1])
            begin = f.mul(f.rem(units.index, strips), str(width))
            live = f.min(f.sub(size, begin), str(width))
            mask = rows.phase.lane_mask(live, width)
            row = [*outer, begin]
            with f.loop("0", n) as loop:
                self._read(row, loop.index, mask)
            self._network(n)
            with f.loop("0", rows.count) as loop:
                rows.store_results(self._scope(row, loop.index, mask), self._load(loop.index))
            if self.r.tells_zeros_apart:
                with f.loop("0", live) as lane:
                    self._zeros(outer, begin, lane.index)
        f.finish()

    def _scope(self, row: list[str], index: str, mask: str) -> Scope:
        return Scope.flat((*row, index), self.rows.rank - 1, self.width, mask)

    def _read(self, row: list[str], index: str, mask: str) -> None:
        position = self.e.splat_scalar(index, "i64", self.width)
        self._store(index, self.rows.load_records(self._scope(row, index, mask), position))

    def _zeros(self, outer: list[str], begin: str, lane: str) -> None:
        f = self.f
        at = f.gep(self.r.key, self.bases[0], lane)
        self.rows.zeros_in_place([*outer, f.add(begin, lane)], lambda k: f.gep("i8", at, f.mul(k, self.step)))

    # ---------------------------------------------------------------------------------------------------- the network
    def _address(self, k: int, index: str) -> str:
        f = self.f
        return f.gep("i8", self.bases[k], f.mul(index, self.step))

    def _load(self, index: str) -> list[str]:
        f = self.f
        return [
            f.op(f"load {vector(self.width, c)}, ptr {self._address(k, index)}, align {self.bytes}")
            for k, c in enumerate(self.r.columns)
        ]

    def _store(self, index: str, values: list[str]) -> None:
        for k, (value, c) in enumerate(zip(values, self.r.columns)):
            self.f.emit(f"store {vector(self.width, c)} {value}, ptr {self._address(k, index)}, align {self.bytes}")

    def _compare(self, low: str, distance: str) -> None:
        """Puts the lesser of two records first."""
        f, keys = self.f, self.keys
        high = f.add(low, distance)
        a, b = self._load(low), self._load(high)
        if len(a) == 1:
            type_ = vector(self.width, self.r.columns[0])
            self._store(low, [f.op(f.intrinsic("umin", type_, [(type_, a[0]), (type_, b[0])]))])
            self._store(high, [f.op(f.intrinsic("umax", type_, [(type_, a[0]), (type_, b[0])]))])
            return
        swap = keys.less(b, a)
        self._store(low, [keys.select(swap, c, y, x) for x, y, c in zip(a, b, self.r.columns)])
        self._store(high, [keys.select(swap, c, x, y) for x, y, c in zip(a, b, self.r.columns)])

    def _run(self, begin: str, end: str, step: str, distance: str) -> None:
        """Comparisons of begin, begin + step, ... below end, each with what is `distance` further."""
        f = self.f
        several = f.mul(step, str(_UNROLLED))
        span, spare = f.op(f"sub i64 {end}, {begin}"), f.sub(step, "1")
        count = f.op(f"udiv i64 {f.op(f'add i64 {span}, {spare}')}, {step}")
        some = f.op(f"icmp slt i64 {begin}, {end}")
        count = f.op(f"select i1 {some}, i64 {count}, i64 0")
        turns = f.op(f"lshr i64 {count}, {_UNROLLED.bit_length() - 1}")
        middle = f.op(f"add i64 {begin}, {f.op(f'mul i64 {turns}, {several}')}")
        with f.loop(begin, middle, several) as loop:
            at = loop.index
            for _ in range(_UNROLLED):
                self._compare(at, distance)
                at = f.add(at, step)
        with f.loop(middle, end, step) as loop:
            self._compare(loop.index, distance)

    def _network(self, n: str) -> None:
        f = self.f
        zeros = f.call("ctlz", "i64", [("i64", f.sub(n, "1", f.top)), ("i1", "false")], "i64", f.top)
        levels = f.sub("64", zeros, f.top)
        with f.loop("0", levels) as level:
            last = f.sub(levels, "1", f.top)
            p = f.op(f"shl i64 1, {f.op(f'sub i64 {last}, {level.index}')}")
            near = f.op(f"icmp ule i64 {p}, {_NEAR}")
            with f.loop("0", f.add(level.index, "1"), runs=True) as merge:
                start = f.op(f"icmp eq i64 {merge.index}, 0")
                power = f.op(f"sub i64 {levels}, {merge.index}")
                reach = f.op(f"sub i64 {f.op(f'shl i64 1, {power}')}, {p}")
                distance = f.op(f"select i1 {start}, i64 {p}, i64 {reach}")
                first = f.op(f"select i1 {start}, i64 0, i64 {p}")
                end = f.op(f"sub i64 {n}, {distance}")
                twice = f.op(f"shl i64 {p}, 1")
                with f.when(near), f.loop("0", p) as offset:
                    self._run(f.op(f"add i64 {first}, {offset.index}"), end, twice, distance)
                far = f.op(f"xor i1 {near}, true")
                with f.when(far), f.loop(first, end, twice) as base:
                    stop = f.min(f.op(f"add i64 {base.index}, {p}"), end)
                    self._run(base.index, stop, "1", distance)
