"""The gradient of attention on the CPU: for each block of 64 keys all blocks of queries, five small products a pair of blocks.

A work unit is one head. Keys and values are transposed once a block; the scores of a pair of blocks have lanes over keys, become
exponentials and slopes in place, and multiply into the block's dk and dv and into dq, whose rows stay in scratch memory
until all keys have been seen. Few heads are shared out by blocks, in two phases: dk and dv for each block of keys, then dq for each
block of queries, from scores computed again. The order is that of `duo_ir/ops/attention.py` either way.
"""

from __future__ import annotations

from duo_backends.cpu.attention_parts import ADD, SET, Asked, Parts
from duo_backends.cpu.body import Scope
from duo_backends.cpu.code import Target
from duo_backends.cpu.llvm import Module
from duo_ir.kernels.kernel import Access, AttentionKernel
from duo_ir.ops.attention import BLOCK, HALF
from duo_ir.scalar import explog
from duo_ir.types import DimLike, product

FEW_HEADS = 8  # below, heads alone do not keep threads busy
ALL, KEYS, QUERIES = "all", "keys", "queries"  # what a phase makes: all three gradients, dk and dv, dq


def emit_gradient(
    module: Module, kernel: AttentionKernel, target: Target, name: str
) -> list[tuple[Parts, DimLike | None]]:
    """The phases as (what was emitted, the size that units cut into blocks; None: units are heads)."""
    heads = product(kernel.batch)
    one_block = (
        isinstance(kernel.keys, int) and isinstance(kernel.queries, int) and max(kernel.keys, kernel.queries) <= BLOCK
    )
    if not isinstance(heads, int) or heads >= FEW_HEADS or one_block:
        phases: list[tuple[str, DimLike | None]] = [(ALL, None)]
    else:
        phases = [(KEYS, kernel.keys), (QUERIES, kernel.queries)]
    out = []
    for makes, cut in phases:
        parts = Parts(module, kernel, target, f"{name}_{makes}")
        _Gradient(parts, makes).emit()
        out.append((parts, cut))
    return out


class _Gradient:
    """One phase. `parts.whole_rows` becomes the bytes of scratch that depend on the number of queries."""

    def __init__(self, parts: Parts, makes: str) -> None:
        self.makes = makes
        self.p, self.f, self.e, self.kernel = parts, parts.f, parts.e, parts.kernel
        kernel = self.kernel
        self.q, self.k, self.v, self.g = kernel.reads
        self.width, self.value_width = kernel.width, kernel.value_width
        row, wide = parts.padded(self.width), parts.padded(self.value_width)
        self.row, self.wide = row * parts.size, wide * parts.size  # bytes
        self.copy_k = not parts.in_place(self.k, self.width, True, parts.rows)  # a tile reads so many rows side by side
        self.copy_g = not parts.in_place(self.g, self.value_width, True, parts.rows)
        offsets = [
            parts.reserve(self.width, BLOCK),  # keys: [d][j]
            parts.reserve(self.value_width, BLOCK),  # values: [e][j]
            parts.reserve(BLOCK, BLOCK),  # scores, then exponentials: [i][j]
            parts.reserve(BLOCK, BLOCK),  # their cotangents, then slopes: [i][j]
            parts.reserve(BLOCK, row),  # queries, scaled
            parts.reserve(BLOCK, row),  # dk
            parts.reserve(BLOCK, wide),  # dv
            parts.reserve(BLOCK, row) if self.copy_k else 0,
            parts.reserve(BLOCK, wide) if self.copy_g else 0,
        ]
        f = self.f
        self.t, self.s = self.e.dim(kernel.queries), self.e.dim(kernel.keys)
        parts.whole_rows = (BLOCK if makes == QUERIES else 0 if makes == KEYS else kernel.queries) * self.row
        rows = self.e.dim(parts.whole_rows)
        share = f.add(rows, str(parts.share), f.top)
        base = f.gep("i8", "%scratch", f.mul("%tid", share, f.top), f.top)
        places = [f.gep("i8", base, str(at), f.top) for at in (*offsets, parts.share)]
        (
            self.keys,
            self.values,
            self.scores,
            self.slopes,
            self.queries,
            self.dk,
            self.dv,
            self.key_rows,
            self.g_rows,
            self.dq,
        ) = places

    def emit(self) -> None:
        f, p, kernel = self.f, self.p, self.kernel
        with f.loop("%begin", "%end") as units:
            key_blocks, query_blocks = (
                f.div(f.add(n, str(BLOCK - 1), f.top), str(BLOCK), f.top) for n in (self.s, self.t)
            )
            if self.makes == ALL:
                batch = p.phase.unravel(units.index, kernel.batch)
                self.next_batch = p.phase.unravel(
                    f.min(f.add(units.index, "1"), f.sub("%end", "1", f.top)), kernel.batch
                )
                self._clear_dq(self.t)
                with f.loop("0", key_blocks) as loop:
                    self._keys(batch, loop.index, loop.index if kernel.causal else "0", query_blocks)
                with f.when(f.op(f"icmp sgt i64 {self.t}, 0")):
                    p.copy_out(kernel.writes[0], batch, "0", self.t, self.width, self.dq, kernel.scale)
            elif self.makes == KEYS:
                block = f.rem(units.index, key_blocks)
                batch = p.phase.unravel(f.div(units.index, key_blocks), kernel.batch)
                self._keys(batch, block, block if kernel.causal else "0", query_blocks)
            else:
                block = f.rem(units.index, query_blocks)
                batch = p.phase.unravel(f.div(units.index, query_blocks), kernel.batch)
                i0, following = f.mul(block, str(BLOCK)), f.add(block, "1")
                rows = f.min(f.sub(self.t, i0), str(BLOCK))
                self._clear_dq(rows)
                with f.loop("0", f.min(key_blocks, following) if kernel.causal else key_blocks) as loop:
                    self._keys(batch, loop.index, block, following)
                p.copy_out(kernel.writes[0], batch, i0, rows, self.width, self.dq, kernel.scale)
        f.finish()

    def _clear_dq(self, rows: str) -> None:
        with self.f.loop("0", rows) as loop:
            self.p.fill(self.p.at(self.dq, (loop.index, self.row)), self.p.padded(self.width), 0.0)

    def _keys(self, batch: list[str], number: str, begin: str, end: str) -> None:
        """One block of keys with the blocks of queries [begin, end)."""
        f, p, kernel = self.f, self.p, self.kernel
        j0 = f.mul(number, str(BLOCK))
        rows = f.min(f.sub(self.s, j0), str(BLOCK))
        p.transposed(self.k, batch, j0, rows, self.width, self.keys)
        p.transposed(self.v, batch, j0, rows, self.value_width, self.values)
        key_rows, key_step = "", 0
        if self.makes != KEYS:
            key_rows, key_step = self._rows(self.copy_k, self.k, batch, j0, rows, self.width, self.key_rows)
        if self.makes != QUERIES:
            p.fill(self.dk, BLOCK * p.padded(self.width), 0.0)
            p.fill(self.dv, BLOCK * p.padded(self.value_width), 0.0)
        with f.loop(begin, end) as loop:
            asked = self._asked(batch, number, loop.index, end, rows) if self.makes == ALL else {}
            self._pair(batch, number, loop.index, j0, rows, key_rows, key_step, asked)
        if self.makes == QUERIES:
            return
        p.copy_out(kernel.writes[1], batch, j0, rows, self.width, self.dk)
        p.copy_out(kernel.writes[2], batch, j0, rows, self.value_width, self.dv)

    def _asked(self, batch: list[str], number: str, block: str, end: str, keys: str) -> dict[str, list[Asked]]:
        """What the products of a pair ask for, in their first and second half, by what they make: what the next pair or, after a block's
        last pair, the next block of keys or the next head will read, and where the gradients will go."""
        f, p, kernel = self.f, self.p, self.kernel
        dq, dk, dv = kernel.writes
        width, value_width = self.width, self.value_width

        def after(index: str, count: str) -> tuple[list[str], str]:
            """The block after `index` of `count`, in the next head where there is none."""
            following = f.add(index, "1")
            more = f.op(f"icmp slt i64 {following}, {count}")
            place = [f.op(f"select i1 {more}, i64 {a}, i64 {b}") for a, b in zip(batch, self.next_batch)]
            return place, f.mul(f.op(f"select i1 {more}, i64 {following}, i64 0"), str(BLOCK))

        key_blocks = f.div(f.add(self.s, str(BLOCK - 1), f.top), str(BLOCK), f.top)
        (q_batch, i0), (k_batch, j0) = after(block, end), after(number, key_blocks)
        queries, more_keys = f.sub(self.t, i0), f.sub(self.s, j0)
        here, row = f.mul(block, str(BLOCK)), f.mul(number, str(BLOCK))
        own = p.asked(dq, batch, here, f.sub(self.t, here), width)
        return {
            "scores": [p.asked(self.q, q_batch, i0, queries, width), p.asked(dk, batch, row, keys, width)],
            "slopes": [p.asked(self.g, q_batch, i0, queries, value_width), p.asked(dv, batch, row, keys, value_width)],
            "dq": [p.asked(x, k_batch, j0, more_keys, w) for x, w in ((self.k, width), (self.v, value_width))],
            "dv": [own, own],
        }

    def _rows(
        self, copy: bool, access: Access, batch: list[str], row: str, rows: str, width: int, to: str
    ) -> tuple[str, int]:  # fmt: skip
        """(address, bytes between rows) of a block of rows that products read by vectors."""
        p = self.p
        if copy:
            p.copy_in(access, batch, row, rows, width, to)
            return to, p.padded(width) * p.size
        stride = access.at.strides[-2]
        assert isinstance(stride, int)
        return p.pointer(access, batch, row), stride * p.size

    def _pair(
        self, batch: list[str], number: str, block: str, j0: str, keys: str, key_rows: str, key_step: int,
        asked: dict[str, list[Asked]],
    ) -> None:  # fmt: skip
        """A block of keys and one of queries."""
        f, p, kernel = self.f, self.p, self.kernel
        i0 = f.mul(block, str(BLOCK))
        rows = f.min(f.sub(self.t, i0), str(BLOCK))
        p.copy_in(self.q, batch, i0, rows, self.width, self.queries, kernel.scale)
        g, g_step = self._rows(self.copy_g, self.g, batch, i0, rows, self.value_width, self.g_rows)
        diagonal = f.op(f"icmp eq i64 {number}, {block}") if kernel.causal else "false"
        with f.loop("0", f.div(f.add(rows, str(HALF - 1)), str(HALF)), runs=True) as half:
            first = f.mul(half.index, str(HALF))
            self._queries(
                batch,
                i0,
                first,
                f.min(f.sub(rows, first), str(HALF)),
                j0,
                keys,
                diagonal,
                g,
                g_step,
                key_rows,
                key_step,
                {name: p.of_half(half.index, pair) for name, pair in asked.items()},
            )
        if self.makes == QUERIES:
            return
        grid = str(p.grid_row)
        with f.loop("0", f.div(f.add(keys, str(HALF - 1)), str(HALF)), runs=True) as half:
            first = f.mul(half.index, str(HALF))
            some = f.min(f.sub(keys, first), str(HALF))
            # on the diagonal the second half of the keys meets the second half of the queries only
            start = f.op(f"select i1 {diagonal}, i64 {first}, i64 0")
            count, columns = f.sub(rows, start), f.mul(first, str(p.size))
            with f.when(f.op(f"icmp sgt i64 {count}, 0")):
                weights, slopes = (
                    f.gep("i8", p.at(x, (start, p.grid_row)), columns) for x in (self.scores, self.slopes)
                )
                dv, dk = p.at(self.dv, (first, self.wide)), p.at(self.dk, (first, self.row))
                g_from, queries = p.at(g, (start, g_step)), p.at(self.queries, (start, self.row))
                wide, width = p.padded(self.value_width), p.padded(self.width)
                results = p.of_half(half.index, asked["dv"]) if asked else None
                p.multiply(some, count, weights, p.size, grid, g_from, str(g_step), wide, dv, self.wide, ADD, results)
                p.multiply(some, count, slopes, p.size, grid, queries, str(self.row), width, dk, self.row, ADD, results)

    def _queries(
        self, batch: list[str], i0: str, first: str, rows: str, j0: str, keys: str, diagonal: str, g: str, g_step: int, key_rows: str,
        key_step: int, asked: dict[str, Asked],
    ) -> None:  # fmt: skip
        """Half a block of queries (from row `first` on) and a block of keys: its weights, slopes and part of dq."""
        f, p = self.f, self.p
        grid, one, half = str(p.grid_row), str(p.size), HALF * p.size
        near = f.op(f"select i1 {diagonal}, i64 {f.add(f.mul(first, str(p.size)), str(half))}, i64 {p.grid_row}")
        queries, g = p.at(self.queries, (first, self.row)), p.at(g, (first, g_step))
        scores, slopes = (p.at(x, (first, p.grid_row)) for x in (self.scores, self.slopes))
        ask_q, ask_g, ask_k = (asked.get(name) for name in ("scores", "slopes", "dq"))
        p.multiply(rows, str(self.width), queries, self.row, one, self.keys, grid, near, scores, p.grid_row, SET, ask_q)
        wide = str(self.value_width)
        p.multiply(rows, wide, g, g_step, one, self.values, grid, near, slopes, p.grid_row, SET, ask_g)
        p.add_mask(batch, scores, f.add(i0, first), j0, rows, keys, BLOCK, query_lanes=False)
        if diagonal != "false":
            with f.when(diagonal):
                p.cut_triangle(scores, rows, f.sub("0", first), BLOCK, query_lanes=False)
        self._slopes(batch, f.add(i0, first), rows, scores, slopes, near)
        if self.makes == KEYS:
            return
        some = f.min(keys, f.div(near, str(p.size)))
        dq = p.at(self.dq, (f.add(i0, first) if self.makes == ALL else first, self.row))
        width = p.padded(self.width)
        p.multiply(rows, some, slopes, p.grid_row, one, key_rows, str(key_step), width, dq, self.row, ADD, ask_k)

    def _slopes(self, batch: list[str], i0: str, rows: str, scores: str, slopes: str, columns: str) -> None:
        """Scores to exponentials, and their cotangents to ds = p * (dp - delta), in columns of so many bytes."""
        f, p, kernel = self.f, self.p, self.kernel
        with f.loop("0", rows, runs=True) as loop:
            scope = Scope.flat((*batch, f.add(i0, loop.index)), None, p.lanes)
            lse, delta = (self.e.splat(scope, self.e.load(a, (), p.compute, scope)) for a in kernel.rows)
            line = f.mul(loop.index, str(p.grid_row))
            with f.loop("0", columns, p.vectors * p.lanes * p.size, runs=True) as panel:
                for v in range(p.vectors):
                    at = f.add(f.add(line, panel.index), str(v * p.lanes * p.size))
                    score, slope = f.gep("i8", scores, at), f.gep("i8", slopes, at)
                    weight = p.recipe(explog.exp, p.op("fsub", p.load(score), lse))
                    p.store(weight, score)
                    p.store(p.op("fmul", weight, p.op("fsub", p.load(slope), delta)), slope)
