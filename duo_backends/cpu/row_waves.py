"""Rows whose stages run side by side: while a row gets its maximum, the one before it gets its sum of exponentials and the one before that is
divided and stored.

One after the other, the stages of a row (`rows.py`) wait for memory in turn: the first for reads, the last for writes, and the arithmetic between them
for neither. In a *wave*, stage s works on row t - s, all stages in one loop over the elements, so that arithmetic hides both. At the begin and end of
a range of rows, where some stages have no row, those that have one run by themselves. No row's order changes, and so no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from duo_backends.cpu.body import Value
from duo_backends.cpu.llvm import register_type
from duo_backends.cpu.nest import is_long, is_plain
from duo_backends.cpu.reductions import CHUNK, LANES, Reducer, drain, identities, push, state_bytes, tree_levels, typed
from duo_ir.kernels.kernel import LoopKernel
from duo_ir.types import product

if TYPE_CHECKING:
    from duo_backends.cpu.reuse import Reuse
    from duo_backends.cpu.rows import Rows

_MANY = 1 << 18  # elements from which more code pays,
_MANY_ROWS = 128  # and rows: at the ends of a thread's rows nothing runs side by side
_ROW = 512, 1 << 14  # elements of a row: long enough to hide something, and a few of them fit into the first caches
_TOGETHER = 4  # vectors of 16 elements in one go
_AHEAD = 2048  # elements that the first stage's reads are asked for early


def runs_in_waves(kernel: LoopKernel, reuse: Reuse | None) -> bool:
    """Whether the kernel's stages can run so, and there is enough arithmetic for it to pay (a layer norm of much memory takes half as long
    again so)."""
    stages, outer, rows = kernel.stages, len(kernel.axes), product(kernel.axes)
    if len(stages) < 2 or not outer or any(len(s.axes) != 1 or s.axes != stages[0].axes for s in stages):
        return False
    n = stages[0].axes[0]
    if (
        not isinstance(n, int)
        or not isinstance(rows, int)
        or rows * n < _MANY
        or rows < _MANY_ROWS
        or not _ROW[0] <= n <= _ROW[1]
    ):
        return False
    if n % (LANES * _TOGETHER) or (n > CHUNK and n % CHUNK):
        return False
    if any(r.kind in ("argmax", "argmin") for s in stages for r in s.reduces):
        return False
    if not all(is_plain(s, outer) for s in stages) or not any(s.reduces and is_long(s) for s in stages):
        return False
    # a row of saved values is overwritten a wave later
    return reuse is None or all(
        instr.op != "saved" or instr.attr in {slot for _, slot in reuse.saves.get(number - 1, [])}
        for number, stage in enumerate(stages)
        for instr in stage.body
    )


class Waves:
    """Emits the kernel of `rows`."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.f, self.stages = rows, rows.f, rows.kernel.stages
        self.reducers: list[list[Reducer]] = [rows.reducers(stage) for stage in self.stages]
        self.kept = {  # results of the rows that later stages still ask for
            (s, k): self.f.alloca(register_type(r.result_dtype), len(self.stages))
            for s, reducers in enumerate(self.reducers)
            for k, r in enumerate(reducers)
        }

    def emit(self) -> None:
        f, last = self.f, len(self.stages) - 1
        with f.loop("%begin", f.add("%end", str(last), f.top)) as wave:
            whole = f.pure(f"and i1 {self._has_row(wave.index, last)}, {self._has_row(wave.index, 0)}")
            with f.when(whole):
                self._side_by_side(wave.index)
            with f.when(f.pure(f"xor i1 {whole}, true")):
                for number in range(last, -1, -1):
                    with f.when(self._has_row(wave.index, number)):
                        self._alone(number, wave.index)
        f.finish()

    def _has_row(self, wave: str, number: int) -> str:
        f = self.f
        row = f.sub(wave, str(number))
        return f.pure(f"and i1 {f.pure(f'icmp sge i64 {row}, %begin')}, {f.pure(f'icmp slt i64 {row}, %end')}")

    def _enter(self, number: int, wave: str) -> None:
        """Makes the row of stage `number` the one that is being emitted, with the results that earlier stages got for it."""
        f, rows = self.f, self.rows
        row = f.sub(wave, str(number))
        place = f.rem(row, str(len(self.stages)))
        rows.number = number
        rows.outer = rows.phase.unravel(row, rows.kernel.axes)
        rows.row = f.section()
        rows.results = {}
        for (s, k), cells in self.kept.items():
            if s < number:
                d = self.reducers[s][k].result_dtype
                element = register_type(d)
                rows.results[s, k] = Value(f.op(f"load {element}, ptr {f.gep(element, cells, place)}"), d, False, 2)

    def _keep(self, number: int, wave: str, state: Sequence[str]) -> None:
        """Results of stage `number` for later waves."""
        f = self.f
        place = f.rem(f.sub(wave, str(number)), str(len(self.stages)))
        for k, value in enumerate(self.rows.reduced_values(self.reducers[number], state)):
            element = register_type(value.dtype)
            f.emit(f"store {element} {value.name}, ptr {f.gep(element, self.kept[number, k], place)}")

    def _alone(self, number: int, wave: str) -> None:
        self._enter(number, wave)
        rows, stage, start = self.rows, self.stages[number], self.f.section()
        if stage.reduces:
            self._keep(number, wave, rows.whole(stage, self.reducers[number], start))
        else:
            rows.store_stage(stage, start)

    def _side_by_side(self, wave: str) -> None:
        f, rows, stages = self.f, self.rows, self.stages
        places = []
        for number in range(len(stages)):
            self._enter(number, wave)
            places.append((rows.outer, rows.row, rows.results, f.section()))
        n = stages[0].axes[0]
        assert isinstance(n, int)
        chunk = min(n, CHUNK)
        # what is added in chunks begins anew in each; extremes go on through the row
        ordered = [n > CHUNK and any(r.ordered for r in reducers) for reducers in self.reducers]
        stacks = [
            f.alloca("i8", tree_levels(n // chunk) * state_bytes(reducers, LANES)) if tree else ""
            for reducers, tree in zip(self.reducers, ordered)
        ]
        zeros = [identities(reducers, LANES) for reducers in self.reducers]
        onward = [k for k, tree in enumerate(ordered) if not tree]

        def carried(states: dict[int, Sequence[str]]) -> list[tuple[str, str]]:
            return [pair for k, state in states.items() for pair in typed(self.reducers[k], LANES, state)]

        def split(flat: Sequence[str], numbers: Sequence[int]) -> dict[int, Sequence[str]]:
            out, at = {}, 0
            for k in numbers:
                out[k] = flat[at : at + len(zeros[k])]
                at += len(zeros[k])
            return out

        with f.loop("0", str(n // chunk), carried=carried({k: zeros[k] for k in onward})) as chunks:
            states = dict(enumerate(zeros)) | split(chunks.values, onward)
            base = f.mul(chunks.index, str(chunk))
            numbers = list(states)
            with f.loop("0", str(chunk), LANES * _TOGETHER, carried(states)) as loop:
                states = split(loop.values, numbers)
                index = f.add(base, loop.index)
                for number in range(
                    len(stages) - 1, -1, -1
                ):  # what is read from a row of saved values before it is overwritten
                    rows.number = number
                    rows.outer, rows.row, rows.results, start = places[number]
                    scope = rows.scope(start, [index], 0, LANES * _TOGETHER, None)
                    if number == 0:
                        rows.e.prefetch(stages[0].body, scope, len(rows.outer), _AHEAD)
                    states[number] = rows.steps(stages[number], self.reducers[number], scope, _TOGETHER, states[number])
                loop.next = [name for k in numbers for name in states[k]]
            states = split(loop.results, numbers)
            for k, tree in enumerate(ordered):
                if tree:
                    push(f, self.reducers[k], LANES, stacks[k], states[k], chunks.index)
            chunks.next = [name for k in onward for name in states[k]]
        states = split(chunks.results, onward)
        for k, reducers in enumerate(self.reducers):
            if reducers:
                state = drain(f, reducers, LANES, stacks[k], str(n // chunk)) if ordered[k] else states[k]
                self._keep(k, wave, state)
