"""Attention on the CPU: a block of 64 queries against blocks of 64 keys, softmax on the way; scores never leave the first-level cache.

A work unit is one block of queries of one head. Scores are kept transposed, lanes over queries, so that maxima and sums run down
the columns; queries are transposed for that once a unit. Sums of values have lanes over their columns, as the result has. The order is that
of `duo_ir/ops/attention.py`; keys and values are read where they lie, or copied block by block, and what comes next is asked for by products
on their way. The gradient is in `attention_gradient.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from duo_backends.cpu.attention_gradient import emit_gradient
from duo_backends.cpu.attention_parts import ADD, SET, Asked, Parts
from duo_backends.cpu.body import Scope, Value
from duo_backends.cpu.code import KernelCode, Target
from duo_backends.cpu.code import Phase as PhaseCode
from duo_backends.cpu.llvm import Module, vector
from duo_backends.cpu.nest import ceil_div, points, symbol
from duo_ir.kernels.kernel import AttentionKernel, Store
from duo_ir.ops.attention import BLOCK, HALF
from duo_ir.scalar import explog
from duo_ir.types import DimLike, evaluate

_INF = float("inf")
CHAINS = 4  # maxima of a query that are found side by side


def compile_attention(kernel: AttentionKernel, target: Target) -> KernelCode:
    """Units: blocks of queries of each head; for the gradient heads, or where they are few their blocks in two phases."""
    module, name = Module(), symbol(kernel, target)
    if kernel.backward:
        emitted = emit_gradient(module, kernel, target, name)
    else:
        parts = Parts(module, kernel, target, name)
        _Forward(parts).emit()
        emitted = [(parts, kernel.queries)]

    def phase(parts: Parts, cut: DimLike | None) -> PhaseCode:
        def units(sizes: Mapping[str, int]) -> int:
            return points(kernel.batch, sizes) * (1 if cut is None else ceil_div(evaluate(cut, sizes), BLOCK))

        return PhaseCode(parts.phase.name, units)

    def cost(sizes: Mapping[str, int]) -> float:
        pairs = points((*kernel.batch, kernel.queries, kernel.keys), sizes) * (0.6 if kernel.causal else 1.0)
        work = pairs * (kernel.width + kernel.value_width) * (2.5 if kernel.backward else 1.0)
        speed = 1.2 * target.vector_bytes * (4 / kernel.acc.itemsize)
        return 200.0 + work * 2 / speed + pairs * 0.3

    def scratch(sizes: Mapping[str, int], threads: int) -> int:
        return threads * max(parts.share + evaluate(parts.whole_rows, sizes) for parts, _ in emitted)

    return KernelCode(module.text(), tuple([phase(*e) for e in emitted]), scratch, cost)


class _Forward:
    def __init__(self, parts: Parts) -> None:
        self.p, self.f, self.e, self.kernel = parts, parts.f, parts.e, parts.kernel
        kernel = self.kernel
        self.q, self.k, self.v = kernel.reads
        self.width, self.value_width = kernel.width, kernel.value_width
        self.copies = (
            not parts.in_place(self.k, self.width, False, parts.rows),  # a tile reads so many rows side by side
            not parts.in_place(self.v, self.value_width, True, parts.rows),
        )
        row, wide = parts.padded(self.width), parts.padded(self.value_width)
        self.wide = wide * parts.size  # bytes of a row of sums
        offsets = [
            parts.reserve(self.width, BLOCK),  # queries, scaled: [d][i]
            parts.reserve(BLOCK, BLOCK),  # scores, then exponentials: [j][i]
            parts.reserve(BLOCK, wide),  # sums of values: [i][e]
            *[parts.reserve(1, BLOCK) for _ in range(3)],  # maxima, sums of exponentials, factors of the sums of values
            parts.reserve(BLOCK, row) if self.copies[0] else 0,
            parts.reserve(BLOCK, wide) if self.copies[1] else 0,
        ]
        f = self.f
        base = f.gep("i8", "%scratch", f.mul("%tid", str(parts.share), f.top), f.top)
        places = [f.gep("i8", base, str(at), f.top) for at in offsets]
        self.queries, self.scores, self.sums, self.top, self.total, self.factor, self.key_rows, self.value_rows = places

    def emit(self) -> None:
        f, e, kernel = self.f, self.e, self.kernel
        t = e.dim(kernel.queries)
        blocks = f.div(f.add(t, str(BLOCK - 1), f.top), str(BLOCK), f.top)
        last = f.sub("%end", "1", f.top)
        with f.loop("%begin", "%end") as units:
            block = f.rem(units.index, blocks)
            batch = self.p.phase.unravel(f.div(units.index, blocks), kernel.batch)
            following = f.min(f.add(units.index, "1"), last)
            self.next_batch = self.p.phase.unravel(f.div(following, blocks), kernel.batch)
            self.next_block = f.rem(following, blocks)
            self._unit(batch, block, f.mul(block, str(BLOCK)), t)
        f.finish()

    def _unit(self, batch: list[str], block: str, i0: str, t: str) -> None:
        f, p, kernel = self.f, self.p, self.kernel
        count = f.min(f.sub(t, i0), str(BLOCK))
        p.transposed(self.q, batch, i0, count, self.width, self.queries)
        if kernel.scale != 1.0:
            with f.loop("0", str(self.width * p.grid_row), p.lanes * p.size, runs=True) as loop:
                at = f.gep("i8", self.queries, loop.index)
                p.store(p.op("fmul", p.load(at), p.number(kernel.scale)), at)
        p.fill(self.sums, BLOCK * p.padded(self.value_width), 0.0)
        p.fill(self.top, BLOCK, -_INF)
        p.fill(self.total, BLOCK, 0.0)
        keys = self.e.dim(kernel.keys)
        blocks = f.div(f.add(keys, str(BLOCK - 1), f.top), str(BLOCK), f.top)
        if kernel.causal:
            blocks = f.min(blocks, f.add(block, "1"))
        with f.loop("0", blocks) as loop:
            asked = self._asked(batch, i0, count, f.add(loop.index, "1"), blocks, keys, t)
            self._block(batch, loop.index, block, i0, count, keys, asked)
        self._finish(batch, i0, count)

    def _asked(
        self, batch: list[str], i0: str, count: str, number: str, blocks: str, keys: str, t: str
    ) -> tuple[list[Asked], list[Asked]]:  # fmt: skip
        """What the products of both halves ask for, with keys and with values: block `number` of both, or the first of the next unit; where
        the result will go, and the next unit's queries."""
        f, p = self.f, self.p
        more = f.op(f"icmp slt i64 {number}, {blocks}")
        place = [f.op(f"select i1 {more}, i64 {a}, i64 {b}") for a, b in zip(batch, self.next_batch)]
        j0 = f.op(f"select i1 {more}, i64 {f.mul(number, str(BLOCK))}, i64 0")
        rows, q0 = f.sub(keys, j0), f.mul(self.next_block, str(BLOCK))
        k, v = (p.asked(x, place, j0, rows, w) for x, w in ((self.k, self.width), (self.v, self.value_width)))
        q = p.asked(self.q, self.next_batch, q0, f.sub(t, q0), self.width)
        return [k, p.asked(self.kernel.writes[0], batch, i0, count, self.value_width)], [v, q]

    def _block(
        self, batch: list[str], number: str, block: str, i0: str, count: str, keys: str, asked: tuple[list[Asked], list[Asked]]
    ) -> None:  # fmt: skip
        """One block of keys, for each half of the queries."""
        f, p, kernel = self.f, self.p, self.kernel
        j0 = f.mul(number, str(BLOCK))
        rows = f.min(f.sub(keys, j0), str(BLOCK))
        k, k_row, k_step = self._rows(0, batch, j0, rows, self.width, self.key_rows)
        v, v_row, _ = self._rows(1, batch, j0, rows, self.value_width, self.value_rows)
        grid, diagonal = str(p.grid_row), f.op(f"icmp eq i64 {number}, {block}")
        halves = f.div(f.add(count, str(HALF - 1)), str(HALF))
        with f.loop("0", halves, runs=True) as half:
            first = f.mul(half.index, str(HALF))
            offset = f.mul(first, str(p.size))
            queries, scores = (f.gep("i8", at, offset) for at in (self.queries, self.scores))
            there = f.min(f.sub(count, first), str(HALF))
            some = rows
            if kernel.causal:
                near = f.min(rows, f.add(first, str(HALF)))
                some = f.op(f"select i1 {diagonal}, i64 {near}, i64 {rows}")
            ask_keys, ask_values = (p.of_half(half.index, pair) for pair in asked)
            p.multiply(some, str(self.width), k, k_row, k_step, queries, grid, HALF, scores, p.grid_row, SET, ask_keys)
            p.add_mask(batch, scores, f.add(i0, first), j0, some, f.sub(count, first), HALF, query_lanes=True)
            if kernel.causal:
                with f.when(diagonal):
                    p.cut_triangle(scores, some, first, HALF, query_lanes=True)
            with f.loop("0", str(HALF * p.size), p.vectors * p.lanes * p.size, runs=True) as panel:
                self._softmax(f.add(offset, panel.index), some, number)
            # of the weights' transpose: rows are queries
            sums, wide = p.at(self.sums, (first, self.wide)), p.padded(self.value_width)
            p.multiply(there, some, scores, p.size, grid, v, str(v_row), wide, sums, self.wide, ADD, ask_values)

    def _rows(
        self, which: int, batch: list[str], j0: str, rows: str, width: int, to: str
    ) -> tuple[str, int, str]:  # fmt: skip
        """(address, bytes between rows, bytes between columns) of a block of keys or values."""
        p = self.p
        operand = self.kernel.reads[1 + which]
        if self.copies[which]:
            p.copy_in(operand, batch, j0, rows, width, to)
            return to, p.padded(width) * p.size, str(p.size)
        stride = operand.at.strides[-2]
        assert isinstance(stride, int)
        return p.pointer(operand, batch, j0), stride * p.size, str(p.size)

    def _softmax(self, offset: str, rows: str, number: str) -> None:
        """Scores to exponentials in one panel of queries; its maxima, sums and results so far rescaled."""
        f, p = self.f, self.p
        width = p.lanes * p.size
        tops, totals = f.gep("i8", self.top, offset), f.gep("i8", self.total, offset)
        old = [p.load(f.gep("i8", tops, str(v * width))) for v in range(p.vectors)]

        def line(index: str) -> list[str]:
            start = p.at(f.gep("i8", self.scores, offset), (index, p.grid_row))
            return [f.gep("i8", start, str(v * width)) for v in range(p.vectors)]

        def larger(s: str, m: str) -> str:
            return p.select(p.compare("ogt", s, m), s, m)

        # several maxima a query, as each waits for the one before it
        found = [*old, *[p.number(-_INF)] * ((CHAINS - 1) * p.vectors)]
        whole = f.op(f"and i64 {rows}, {-CHAINS}")
        for begin, end, count in (("0", whole, CHAINS), (whole, rows, 1)):
            with f.loop(begin, end, count, [(p.type, m) for m in found]) as loop:
                lines = [at for k in range(count) for at in line(f.add(loop.index, str(k)))]
                kept = loop.values[len(lines) :]
                loop.next = [*(larger(p.load(at), m) for at, m in zip(lines, loop.values)), *kept]
            found = loop.results
        while len(found) > p.vectors:
            found = [*(larger(a, b) for a, b in zip(found, found[-p.vectors :])), *found[p.vectors : -p.vectors]]
        new = found
        safe = [p.select(p.compare("oeq", m, p.number(-_INF)), p.number(0.0), m) for m in new]
        again = [p.recipe(explog.exp, p.op("fsub", m, n)) for m, n in zip(old, safe)]
        with f.loop("0", rows, 1, [(p.type, p.number(0.0))] * p.vectors, runs=True) as loop:
            places = line(loop.index)
            exps = [p.recipe(explog.exp, p.op("fsub", p.load(at), n)) for at, n in zip(places, safe)]
            for at, x in zip(places, exps):
                p.store(x, at)
            loop.next = [p.op("fadd", so_far, x) for so_far, x in zip(loop.values, exps)]
        for v in range(p.vectors):
            p.store(new[v], f.gep("i8", tops, str(v * width)))
            at = f.gep("i8", totals, str(v * width))
            p.store(p.op("fadd", p.op("fmul", p.load(at), again[v]), loop.results[v]), at)
        changed = [p.compare("une", a, p.number(1.0)) for a in again]
        lanes = vector(p.lanes, "i1")
        some = changed[0]
        for other in changed[1:]:
            some = f.op(f"or {lanes} {some}, {other}")
        bits = f.op(f"bitcast {lanes} {some} to i{p.lanes}")
        differs, later = f.op(f"icmp ne i{p.lanes} {bits}, 0"), f.op(f"icmp ne i64 {number}, 0")
        # times 1 changes nothing, and the first block finds zeros
        with f.when(f.op(f"and i1 {differs}, {later}")):
            factors = f.gep("i8", self.factor, offset)
            for v, a in enumerate(again):
                p.store(a, f.gep("i8", factors, str(v * width)))
            sums = f.gep("i8", self.sums, f.mul(offset, str(self.wide // p.size)))
            with f.loop("0", str(p.vectors * p.lanes), runs=True) as loop:
                factor = p.splat_at(p.at(factors, (loop.index, p.size)))
                p.scale_row(p.at(sums, (loop.index, self.wide)), self.wide, factor)

    def _finish(self, batch: list[str], i0: str, count: str) -> None:
        f, p, kernel = self.f, self.p, self.kernel
        width = p.lanes * p.size
        assert kernel.sums is not None
        for number in range(BLOCK // p.lanes):
            at = str(number * width)
            top, total = p.load(f.gep("i8", self.top, at)), p.load(f.gep("i8", self.total, at))
            safe = p.select(p.compare("oeq", top, p.number(-_INF)), p.number(0.0), top)
            none = p.compare("oeq", total, p.number(0.0))
            total = p.select(none, p.number(1.0), total)
            p.store(p.op("fdiv", p.number(1.0), total), f.gep("i8", self.factor, at))
            lse = p.select(none, p.number(_INF), p.op("fadd", safe, p.recipe(explog.log, total)))
            live = p.phase.lane_mask(f.sub(count, str(number * p.lanes)), p.lanes)
            scope = Scope.flat((*batch, f.add(i0, str(number * p.lanes))), len(batch), p.lanes, live)
            with f.when(f.op(f"icmp sgt i64 {count}, {number * p.lanes}")):
                self.e.store(Store(kernel.sums, 0), [Value(lse, p.compute, True, 0)], scope)

        def factor(row: str) -> str:
            return p.splat_at(p.at(self.factor, (row, p.size)))

        p.copy_out(kernel.writes[0], batch, i0, count, self.value_width, self.sums, factor)
