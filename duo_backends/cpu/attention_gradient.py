"""The gradient of attention on the CPU: for each block of 64 keys all blocks of queries, five small products a pair of blocks.

A work unit is one head. Keys and values are transposed once a block; the scores of a pair of blocks have lanes over keys, become
exponentials and slopes in place, and multiply into the block's dk and dv and into dq, whose rows stay in scratch memory
until all keys have been seen. The order is that of `duo_ir/ops/attention.py`.
"""

from __future__ import annotations

from duo_backends.cpu.attention_parts import ADD, SET, Parts
from duo_backends.cpu.body import Scope
from duo_ir.kernels.kernel import Access
from duo_ir.ops.attention import BLOCK
from duo_ir.scalar import explog


def emit_gradient(parts: Parts) -> None:
    """The phase function; sets `parts.whole_rows`, the bytes of scratch that depend on the number of queries."""
    _Gradient(parts).emit()


class _Gradient:
    def __init__(self, parts: Parts) -> None:
        self.p, self.f, self.e, self.kernel = parts, parts.f, parts.e, parts.kernel
        kernel = self.kernel
        self.q, self.k, self.v, self.g = kernel.reads
        self.width, self.value_width = kernel.width, kernel.value_width
        row, wide = parts.padded(self.width), parts.padded(self.value_width)
        self.row, self.wide = row * parts.size, wide * parts.size  # bytes
        self.copy_k = not parts.in_place(self.k, self.width, True)
        self.copy_g = not parts.in_place(self.g, self.value_width, True)
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
        parts.whole_rows = kernel.queries * self.row
        rows = f.mul(self.t, str(self.row), f.top)
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
            batch = p.phase.unravel(units.index, kernel.batch)
            with f.loop("0", self.t) as loop:
                p.fill(p.at(self.dq, (loop.index, self.row)), p.padded(self.width), 0.0)
            blocks = f.div(f.add(self.s, str(BLOCK - 1), f.top), str(BLOCK), f.top)
            with f.loop("0", blocks) as loop:
                self._keys(batch, loop.index)
            with f.when(f.op(f"icmp sgt i64 {self.t}, 0")):
                p.copy_out(kernel.writes[0], batch, "0", self.t, self.width, self.dq, kernel.scale)
        f.finish()

    def _keys(self, batch: list[str], number: str) -> None:
        """One block of keys."""
        f, p, kernel = self.f, self.p, self.kernel
        j0 = f.mul(number, str(BLOCK))
        rows = f.min(f.sub(self.s, j0), str(BLOCK))
        p.transposed(self.k, batch, j0, rows, self.width, self.keys)
        p.transposed(self.v, batch, j0, rows, self.value_width, self.values)
        key_rows, key_step = self._rows(self.copy_k, self.k, batch, j0, rows, self.width, self.key_rows)
        p.fill(self.dk, BLOCK * p.padded(self.width), 0.0)
        p.fill(self.dv, BLOCK * p.padded(self.value_width), 0.0)
        blocks = f.div(f.add(self.t, str(BLOCK - 1), f.top), str(BLOCK), f.top)
        with f.loop(number if kernel.causal else "0", blocks) as loop:
            self._pair(batch, number, loop.index, j0, rows, key_rows, key_step)
        p.copy_out(kernel.writes[1], batch, j0, rows, self.width, self.dk)
        p.copy_out(kernel.writes[2], batch, j0, rows, self.value_width, self.dv)

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
        self, batch: list[str], number: str, block: str, j0: str, keys: str, key_rows: str, key_step: int
    ) -> None:
        """A block of keys and one of queries."""
        f, p, kernel = self.f, self.p, self.kernel
        i0 = f.mul(block, str(BLOCK))
        rows = f.min(f.sub(self.t, i0), str(BLOCK))
        p.copy_in(self.q, batch, i0, rows, self.width, self.queries, kernel.scale)
        g, g_step = self._rows(self.copy_g, self.g, batch, i0, rows, self.value_width, self.g_rows)
        grid, one = str(p.grid_row), str(p.size)
        p.multiply(
            rows, str(self.width), self.queries, self.row, one, self.keys, grid, BLOCK, self.scores, p.grid_row, SET
        )
        p.multiply(rows, str(self.value_width), g, g_step, one, self.values, grid, BLOCK, self.slopes, p.grid_row, SET)
        p.add_mask(batch, self.scores, i0, j0, rows, keys, query_lanes=False)
        if kernel.causal:
            with f.when(f.op(f"icmp eq i64 {number}, {block}")):
                p.cut_triangle(self.scores, rows, query_lanes=False)
        self._slopes(batch, i0, rows)
        width, wide = p.padded(self.width), p.padded(self.value_width)
        p.multiply(keys, rows, self.scores, p.size, grid, g, str(g_step), wide, self.dv, self.wide, ADD)
        p.multiply(keys, rows, self.slopes, p.size, grid, self.queries, str(self.row), width, self.dk, self.row, ADD)
        dq = p.at(self.dq, (i0, self.row))
        p.multiply(rows, keys, self.slopes, p.grid_row, one, key_rows, str(key_step), width, dq, self.row, ADD)

    def _slopes(self, batch: list[str], i0: str, rows: str) -> None:
        """Scores to exponentials, and their cotangents to ds = p * (dp - delta)."""
        f, p, kernel = self.f, self.p, self.kernel
        with f.loop("0", rows, runs=True) as loop:
            scope = Scope.flat((*batch, f.add(i0, loop.index)), None, p.lanes)
            lse, delta = (self.e.splat(scope, self.e.load(a, (), p.compute, scope)) for a in kernel.rows)

            def panel(offset: str, line: str = loop.index, lse: str = lse, delta: str = delta) -> None:
                for v in range(p.vectors):
                    at = f.add(f.mul(line, str(p.grid_row)), f.add(offset, str(v * p.lanes * p.size)))
                    score, slope = f.gep("i8", self.scores, at), f.gep("i8", self.slopes, at)
                    weight = p.recipe(explog.exp, p.op("fsub", p.load(score), lse))
                    p.store(weight, score)
                    p.store(p.op("fmul", weight, p.op("fsub", p.load(slope), delta)), slope)

            p.panels(panel)
