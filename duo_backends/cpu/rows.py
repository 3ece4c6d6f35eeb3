"""Loop kernels whose stages run along their inner axes: softmax, layer norm and full sums over contiguous rows.

A work unit is one outer point. Reducing stages use 16 lanes, the lanes of the numerics contract. A kernel with
few outer points and a long first reduction gets two phases: partial states of aligned groups of chunks, which are
subtrees of the contract's tree, go to scratch in parallel; the second phase combines them and runs what follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from duo_backends.cpu.body import Scope, Value
from duo_backends.cpu.code import KernelCode, Target, no_scratch
from duo_backends.cpu.code import Phase as PhaseCode
from duo_backends.cpu.llvm import Module, Region, is_literal, memory_type, part, register_type, vector
from duo_backends.cpu.nest import Phase, ceil_div, lanes_for, points, together
from duo_backends.cpu.reductions import (
    CHUNK,
    LANES,
    BitReducer,
    Reducer,
    all_types,
    drain,
    identities,
    load_state,
    merge_all,
    push,
    split_states,
    state_bytes,
    store_state,
    tree_levels,
    typed,
)
from duo_backends.cpu.reuse import Reuse, find_reuse
from duo_backends.cpu.row_waves import Waves, runs_in_waves
from duo_backends.cpu.stream import with_streams
from duo_ir.kernels.kernel import Access, LoopKernel, Stage
from duo_ir.types import DimLike, evaluate, product

_GROUP = 16  # chunks whose partial is one work unit of a split reduction
_SPLIT_FROM = 4 * _GROUP * CHUNK  # elements from which splitting pays for its barrier
_SMALL_BODY = 8  # instructions up to which loops are unrolled
_UNROLL = 8  # vectors of a reduction in one go,
_STATES = 4  # or of one in any order, each with a state of its own
_FAR = 1 << 18  # elements from which cache lines are asked for early,
_AHEAD = 512  # and how many elements early,
_BEYOND = 1 << 22, 4096  # or, from so many elements on, which come from memory
_NEXT_ROW = 512, 1 << 16  # elements of rows that are asked for while the row before is worked on
_PAD = 64  # elements: rows of saved values end with room for a vector
_MANY_LEVELS = 54  # enough for 2^63 elements


def compile_rows(kernel: LoopKernel, target: Target, name: str, cost: Any) -> KernelCode:
    module = Module()
    if _splits(kernel):
        return _compile_split(kernel, target, module, name, cost)
    reuse = find_reuse(kernel.stages)
    if reuse is not None:
        kernel = replace(kernel, stages=reuse.stages)
    with_streams(module, name, kernel, target, lambda phase: _emit(phase, kernel, reuse))
    phase = PhaseCode(name, lambda sizes: points(kernel.axes, sizes))
    if reuse is None:
        return KernelCode(module.text(), (phase,), no_scratch, cost)
    each, length = sum(d.itemsize for d in reuse.slots), reuse.length

    def scratch(sizes: Mapping[str, int], threads: int) -> int:
        return threads * each * ((evaluate(length, sizes) + 2 * _PAD - 1) // _PAD * _PAD)

    return KernelCode(module.text(), (phase,), scratch, cost)


def _emit(phase: Phase, kernel: LoopKernel, reuse: Reuse | None) -> None:
    rows = Rows(phase, kernel, reuse)
    if runs_in_waves(kernel, reuse):
        rows.fetching = None  # rows are asked for by the wave that reads them first
        Waves(rows).emit()
    else:
        rows.emit(None)


def _splits(kernel: LoopKernel) -> bool:
    first = kernel.stages[0]
    outer, n = product(kernel.axes), product(first.axes)
    if not first.reduces or first.stores or len(first.axes) != 1:
        return False
    return isinstance(outer, int) and outer <= 8 and (not isinstance(n, int) or n >= _SPLIT_FROM)


def _compile_split(kernel: LoopKernel, target: Target, module: Module, name: str, cost: Any) -> KernelCode:
    reducers = _reducers(kernel.stages[0], target)
    each = state_bytes(reducers, LANES)
    n = kernel.stages[0].axes[0]

    def groups(sizes: Mapping[str, int]) -> int:
        return max(1, ceil_div(evaluate(n, sizes), _GROUP * CHUNK))

    Rows(Phase(module, f"{name}_1", kernel, target), kernel).emit_groups(each)
    Rows(Phase(module, f"{name}_2", kernel, target), kernel).emit(each)
    phases = (
        PhaseCode(f"{name}_1", lambda sizes: points(kernel.axes, sizes) * groups(sizes)),
        PhaseCode(f"{name}_2", lambda sizes: points(kernel.axes, sizes)),
    )
    return KernelCode(
        module.text(), phases, lambda sizes, threads: points(kernel.axes, sizes) * groups(sizes) * each, cost
    )


def _reducers(stage: Stage, target: Target) -> list[Reducer]:
    """Those of a stage. Where the processor has IEEE maximum (AArch64), or no maximum of 64 bits (x86 before AVX-512), nothing is gained by bits."""
    values = [stage.body[r.args[0]].dtype for r in stage.reduces]
    widest = 8 if target.vector_bytes == 64 else 4
    by_bits = target.arch == "x86_64" and all(
        BitReducer.serves(r, d) and d.itemsize <= widest for r, d in zip(stage.reduces, values)
    )
    return [(BitReducer if by_bits else Reducer)(r, d) for r, d in zip(stage.reduces, values)]


class Rows:
    """Emits the stages of rows."""

    def __init__(self, phase: Phase, kernel: LoopKernel, reuse: Reuse | None = None) -> None:
        self.phase, self.kernel, self.f, self.e, self.reuse = phase, kernel, phase.f, phase.e, reuse
        self.number = 0  # of the stage being emitted
        self.fetching = self._fetching()
        self.slots: list[str] = self._slots(reuse) if reuse is not None else []
        self.results: dict[tuple[int, int], Value] = {}
        self.outer: list[str] = []
        self.row: Region = self.f.top

    def _fetching(self) -> int | None:
        """The stage during which the next row is asked for: its arithmetic hides what memory takes."""
        sizes = [s.axes[0] for s in self.kernel.stages if len(s.axes) == 1]
        if len(sizes) < 2 or not self.kernel.axes or not self._is_far(self.kernel.stages[0]):
            return None
        if not all(isinstance(n, int) and _NEXT_ROW[0] <= n <= _NEXT_ROW[1] for n in sizes):
            return None
        stages = self.kernel.stages
        return max(
            range(len(stages)),
            key=lambda k: len(stages[k].body) if stages[k].reduces and self._streams(stages[k]) else -1,
        )

    def _streams(self, stage: Stage) -> bool:
        """Whether it reads rows, each element once."""
        outer = len(self.kernel.axes)
        reads = [i.attr.at.strides for i in stage.body if i.op == "load" and isinstance(i.attr, Access)]
        return len(stage.axes) == 1 and any(s[outer - 1] != 0 and s[outer] == 1 for s in reads)

    def _slots(self, reuse: Reuse) -> list[str]:
        """Addresses of this thread's rows of saved values."""
        f, top = self.f, self.f.top
        length = f.add(self.e.dim(reuse.length), str(2 * _PAD - 1), top)
        length = f.mul(f.div(length, str(_PAD), top), str(_PAD), top)
        share = f.mul(length, str(sum(d.itemsize for d in reuse.slots)), top)
        addresses = [f.gep("i8", "%scratch", f.mul("%tid", share, top), top)]
        for d in reuse.slots[:-1]:
            addresses.append(f.gep("i8", addresses[-1], f.mul(length, str(d.itemsize), top), top))
        return addresses

    def _saved(self, slot: int, scope: Scope) -> Value:
        assert self.reuse is not None
        d = self.reuse.slots[slot]
        address = self.f.gep(memory_type(d), self.slots[slot], scope.indices[-1])
        name = self.f.op(f"load {vector(scope.width, memory_type(d))}, ptr {address}, align {d.itemsize}")
        return Value(name, d, scope.width > 1, len(scope.regions) - 1)

    def _save(self, values: Sequence[Value], scope: Scope) -> None:
        if self.reuse is None:
            return
        for k, slot in self.reuse.saves.get(self.number, []):
            d = values[k].dtype
            address = self.f.gep(memory_type(d), self.slots[slot], scope.indices[-1])
            name = self.e.splat(scope, values[k])
            self.f.emit(f"store {vector(scope.width, memory_type(d))} {name}, ptr {address}, align {d.itemsize}")

    # ------------------------------------------------------------------------------------------------- phases
    def emit(self, partial_bytes: int | None) -> None:
        """The kernel; with `partial_bytes`, stage 0's states come from scratch (phase 2 of a split reduction)."""
        f = self.f
        with f.loop("%begin", "%end") as units:
            self.outer = self.phase.unravel(units.index, self.kernel.axes)
            self.row = f.section()
            for number, stage in enumerate(self.kernel.stages):
                self.number = number
                if number == 0 and partial_bytes is not None:
                    self._combine(stage, units.index, partial_bytes)
                else:
                    self._stage(number, stage)
        f.finish()

    def emit_groups(self, each: int) -> None:
        """Phase 1 of a split reduction: unit = (outer point, group of chunks)."""
        f, stage = self.f, self.kernel.stages[0]
        reducers = _reducers(stage, self.phase.target)
        n = self.e.dim(stage.axes[0])
        groups = self._groups(n)
        with f.loop("%begin", "%end") as units:
            self.outer = self.phase.unravel(f.div(units.index, groups), self.kernel.axes)
            self.row = f.section()
            begin = f.mul(f.rem(units.index, groups), str(_GROUP * CHUNK))
            end = f.min(f.add(begin, str(_GROUP * CHUNK)), n)
            state = self._chunks(stage, reducers, f.section(), begin, end, tree_levels(_GROUP))
            slot = f.gep("i8", "%scratch", f.mul(units.index, str(each)))
            store_state(f, reducers, LANES, slot, state)
        f.finish()

    def _groups(self, n: str) -> str:
        f = self.f
        count = f.div(f.add(n, str(_GROUP * CHUNK - 1), f.top), str(_GROUP * CHUNK), f.top)
        if is_literal(count):
            return str(max(1, int(count)))
        return f.call("smax", "i64", [("i64", count), ("i64", "1")], region=f.top)

    def _combine(self, stage: Stage, unit: str, each: int) -> None:
        f, reducers = self.f, _reducers(stage, self.phase.target)
        n = self.e.dim(stage.axes[0])
        groups = self._groups(n)
        first = f.mul(unit, groups)
        levels = tree_levels(int(groups)) if is_literal(groups) else _MANY_LEVELS
        stack = f.alloca("i8", levels * each)
        with f.loop("0", groups, runs=True) as loop:
            slot = f.gep("i8", "%scratch", f.mul(f.add(first, loop.index), str(each)))
            push(f, reducers, LANES, stack, load_state(f, reducers, LANES, slot), loop.index)
        self._finish(0, reducers, drain(f, reducers, LANES, stack, groups))

    # ------------------------------------------------------------------------------------------------- stages
    def _reduced(self, stage: int, n: int) -> Value:
        return self.results[stage, n]

    def _stage(self, number: int, stage: Stage) -> None:
        f = self.f
        start = f.section()
        if stage.reduces:
            reducers = _reducers(stage, self.phase.target)
            if len(stage.axes) == 1:
                state = self.whole(stage, reducers, start)
            else:
                state = self._segments(stage, reducers, start)
            self._finish(number, reducers, state)
            return
        if not stage.axes:
            self._point(stage, self.scope(start, [], None, 1, None))
            return
        self.store_stage(stage, start)

    def store_stage(self, stage: Stage, start: Region) -> None:
        """A stage with axes that only stores."""
        self._nest(stage, [], [start], lanes_for([stage.body], self.phase.target))

    def _nest(self, stage: Stage, inner: list[str], sections: list[Region], width: int) -> None:
        """The remaining axes of a stage that only stores."""
        f = self.f
        size = self.e.dim(stage.axes[len(inner)])
        if len(inner) == len(stage.axes) - 1:

            def emit(index: str, lanes: int, mask: str | None) -> None:
                scope = self._nested_scope([*inner, index], sections, len(inner) if lanes > 1 else None, lanes, mask)
                self._point(stage, scope)

            self.phase.over_lanes("0", size, width, emit, scalar_tail=not self.phase.target.has_masks)
            return
        with f.loop("0", size) as loop:
            self._nest(stage, [*inner, loop.index], [*sections, f.section()], width)

    def scope(self, start: Region, inner: Sequence[str], vector: int | None, width: int, mask: str | None) -> Scope:
        return self._nested_scope(inner, [start], vector, width, mask)

    def _nested_scope(
        self, inner: Sequence[str], sections: Sequence[Region], vector: int | None, width: int, mask: str | None
    ) -> Scope:
        """Regions: top, row, one per section (before the stage, then inside each loop but the last), here."""
        outer = len(self.outer)
        levels = (*(1 for _ in range(outer)), *(3 + k for k in range(len(inner))))
        regions = (self.f.top, self.row, *sections, None)
        where = None if vector is None else outer + vector
        return Scope((*self.outer, *inner), levels, regions, where, width, mask)

    def _point(self, stage: Stage, scope: Scope) -> list[Value]:
        values = self.e.emit(stage.body, scope, self._reduced, saved=lambda slot: self._saved(slot, scope))
        self._save(values, scope)
        if self.number == self.fetching and scope.width > 1:
            self.e.prefetch(stage.body, scope, len(self.outer) - 1, 1, near=2)
        for store in stage.stores:
            self.e.store(store, values, scope)
        return values

    def _finish(self, number: int, reducers: Sequence[Reducer], state: Sequence[str]) -> None:
        for n, value in enumerate(self.reduced_values(reducers, state)):
            self.results[number, n] = value

    def reduced_values(self, reducers: Sequence[Reducer], state: Sequence[str]) -> list[Value]:
        """What the state of a whole row comes to."""
        return [
            Value(r.result(self.f, r.halve(self.f, s), 1), r.result_dtype, False, 2)
            for r, s in zip(reducers, split_states(reducers, state), strict=True)
        ]

    def reducers(self, stage: Stage) -> list[Reducer]:
        """Those of a stage."""
        return _reducers(stage, self.phase.target)

    # --------------------------------------------------------------------------------------------- reductions
    def _together(self, stage: Stage, reducers: Sequence[Reducer]) -> int:
        """How many vectors to compute as one."""
        if any(r.is_arg for r in reducers):
            return 1
        return together(stage, len(self.outer), self._elements(stage))

    def steps(
        self, stage: Stage, reducers: Sequence[Reducer], scope: Scope, count: int, state: Sequence[str]
    ) -> list[str]:
        """`count` vectors of 16 elements, in order, their values computed together."""
        values = self._point(stage, scope)
        wide = {k: self.e.splat(scope, values[k]) for r in reducers for k in r.args}
        for first in range(0, count * LANES, LANES):
            out: list[str] = []
            for r, s in zip(reducers, split_states(reducers, state), strict=True):
                operands = [
                    part(self.f, vector(scope.width, register_type(values[k].dtype)), wide[k], first, LANES)
                    for k in r.args
                ]
                out += r.step(self.f, LANES, s, operands, "", None)
            state = out
        return list(state)

    def _step(
        self, stage: Stage, reducers: Sequence[Reducer], scope: Scope, flat: str, state: Sequence[str]
    ) -> list[str]:
        """One vector of 16 elements, the first of which has row-major number `flat`."""
        values = self._point(stage, scope)
        position = ""
        if any(r.is_arg for r in reducers):
            position = self.e.ramp(scope, flat, 1, len(scope.regions) - 1)
        out: list[str] = []
        for r, s in zip(reducers, split_states(reducers, state), strict=True):
            operands = [self.e.splat(scope, values[k]) for k in r.args]
            out += r.step(self.f, LANES, s, operands, position, scope.mask)
        return out

    def _run(
        self,
        stage: Stage,
        reducers: Sequence[Reducer],
        start: Region,
        begin: str,
        end: str,
        state: Sequence[str],
    ) -> list[str]:
        """`state` after elements [begin, end) of a one-axis stage; begin is a multiple of 16."""
        f = self.f
        free = not any(r.ordered or isinstance(r, BitReducer) for r in reducers)  # by bits, steps need not wait
        unroll = 1
        if len(stage.body) <= _SMALL_BODY:
            unroll = _STATES if free else _UNROLL
        if is_literal(begin) and is_literal(end) and int(end) - int(begin) < LANES * unroll:
            unroll = 1
        state = list(state)
        step = LANES * unroll
        if unroll > 1:
            begin, state = self._unrolled(stage, reducers, start, begin, end, state, unroll, free)
        wide = self._together(stage, reducers)
        if wide > 1 and not (is_literal(begin) and is_literal(end) and int(end) - int(begin) < LANES * wide):
            begin, state = self._run_wide(stage, reducers, start, begin, end, state, wide)
        step = LANES
        count = f.sub(end, begin)
        middle = f.add(begin, f.pure(f"and i64 {count}, {-step}") if not is_literal(count) else str(int(count) & -step))
        if middle != begin:
            with f.loop(begin, middle, step, typed(reducers, LANES, state)) as loop:
                scope = self.scope(start, [loop.index], 0, LANES, None)
                loop.next = self._step(stage, reducers, scope, loop.index, loop.values)
            state = loop.results
        if middle == end:
            return state
        # runs once or not at all; a loop, so that the state flows through
        with f.loop(middle, end, LANES, typed(reducers, LANES, state)) as loop:
            mask = self.phase.lane_mask(f.sub(end, loop.index), LANES)
            scope = self.scope(start, [loop.index], 0, LANES, mask)
            loop.next = self._step(stage, reducers, scope, loop.index, loop.values)
        return loop.results

    def _run_wide(
        self,
        stage: Stage,
        reducers: Sequence[Reducer],
        start: Region,
        begin: str,
        end: str,
        state: list[str],
        wide: int,
    ) -> tuple[str, list[str]]:
        """Full strides of `wide` vectors; gives where they end."""
        f, step = self.f, LANES * wide
        count = f.sub(end, begin)
        whole = str(int(count) & -step) if is_literal(count) else f.pure(f"and i64 {count}, {-step}")
        middle = f.add(begin, whole)
        with f.loop(begin, middle, step, typed(reducers, LANES, state)) as loop:
            scope = self.scope(start, [loop.index], 0, step, None)
            self._ask(stage, scope)
            loop.next = self.steps(stage, reducers, scope, wide, loop.values)
        return middle, list(loop.results)

    def _unrolled(
        self,
        stage: Stage,
        reducers: Sequence[Reducer],
        start: Region,
        begin: str,
        end: str,
        state: list[str],
        unroll: int,
        free: bool,
    ) -> tuple[str, list[str]]:
        """Full strides of `unroll` vectors; with one state per vector where the order is free."""
        f, step = self.f, LANES * unroll
        count = f.sub(end, begin)
        whole = str(int(count) & -step) if is_literal(count) else f.pure(f"and i64 {count}, {-step}")
        middle = f.add(begin, whole)
        extra = [identities(reducers, LANES) for _ in range(unroll - 1)] if free else []
        carried = [c for s in (state, *extra) for c in typed(reducers, LANES, s)]
        size = len(state)
        with f.loop(begin, middle, step, carried) as loop:
            states = [loop.values[k : k + size] for k in range(0, len(carried), size)]
            for k in range(unroll):
                index = f.add(loop.index, str(LANES * k))
                scope = self.scope(start, [index], 0, LANES, None)
                self._ask(stage, scope)
                which = k if free else 0
                states[which] = self._step(stage, reducers, scope, index, states[which])
            loop.next = [name for s in states for name in s]
        total = loop.results[:size]
        for k in range(size, len(carried), size):
            total = merge_all(f, reducers, LANES, total, loop.results[k : k + size])
        return middle, list(total)

    def whole(self, stage: Stage, reducers: Sequence[Reducer], start: Region) -> list[str]:
        n = self.e.dim(stage.axes[0])
        levels = tree_levels(ceil_div(int(n), CHUNK)) if is_literal(n) else _MANY_LEVELS
        return self._chunks(stage, reducers, start, "0", n, levels)

    def _chunks(
        self, stage: Stage, reducers: Sequence[Reducer], start: Region, begin: str, end: str, levels: int
    ) -> list[str]:
        """The state of elements [begin, end), a subtree of the contract's tree; begin is a multiple of a chunk."""
        f = self.f
        initial = identities(reducers, LANES)
        one = is_literal(begin) and is_literal(end) and int(end) - int(begin) <= CHUNK
        if one or not any(r.ordered for r in reducers):
            return self._run(stage, reducers, start, begin, end, initial)
        stack = f.alloca("i8", levels * state_bytes(reducers, LANES))
        done = self._full_chunks(stage, reducers, start, begin, end, stack)
        count = f.div(f.add(f.sub(end, begin), str(CHUNK - 1)), str(CHUNK))
        chunks = f.call("smax", "i64", [("i64", count), ("i64", "1")]) if not is_literal(count) else count
        with f.loop(done, chunks) as loop:  # once or not at all
            first = f.add(begin, f.mul(loop.index, str(CHUNK)))
            push(f, reducers, LANES, stack, self._run(stage, reducers, start, first, end, initial), loop.index)
        return drain(f, reducers, LANES, stack, chunks)

    def _full_chunks(
        self, stage: Stage, reducers: Sequence[Reducer], start: Region, begin: str, end: str, stack: str
    ) -> str:
        """Full chunks one after the other: additions of a chunk wait for each other, but a stream of memory is what the
        hardware reads fastest. The number of chunks done."""
        f = self.f
        chunks = f.div(f.sub(end, begin), str(CHUNK))
        unroll = _UNROLL if len(stage.body) <= _SMALL_BODY else 1
        wide = self._together(stage, reducers)
        with f.loop("0", chunks) as loop:
            first = f.add(begin, f.mul(loop.index, str(CHUNK)))
            initial = typed(reducers, LANES, identities(reducers, LANES))
            with f.loop("0", str(CHUNK), LANES * unroll * wide, initial) as lanes:
                base, state = f.add(first, lanes.index), lanes.values
                for k in range(unroll):
                    index = f.add(base, str(k * LANES))
                    scope = self.scope(start, [index], 0, LANES * wide, None)
                    self._ask(stage, scope)
                    if wide > 1:
                        state = self.steps(stage, reducers, scope, wide, state)
                    else:
                        state = self._step(stage, reducers, scope, index, state)
                lanes.next = state
            push(f, reducers, LANES, stack, lanes.results, loop.index)
        return chunks

    def _ask(self, stage: Stage, scope: Scope) -> None:
        """Asks for what a stage reads a little later, where it reads it first and nothing else has asked."""
        if self.number == 0 and self.fetching is None and self._is_far(stage):
            size = self._elements(stage)
            early = _BEYOND[1] if isinstance(size, int) and size >= _BEYOND[0] else _AHEAD
            self.e.prefetch(stage.body, scope, len(self.outer), early)

    def _elements(self, stage: Stage) -> DimLike:
        return product((*self.kernel.axes, *stage.axes))

    def _is_far(self, stage: Stage) -> bool:
        """Whether what it reads is likely to come from beyond a core's own caches."""
        elements = self._elements(stage)
        return not isinstance(elements, int) or elements >= _FAR

    def _segments(self, stage: Stage, reducers: Sequence[Reducer], start: Region) -> list[str]:
        """Several axes: each run along the last one is cut at the multiples of 16 of the row-major number, so that a
        lane of a vector is a lane of the contract; lanes outside the run are masked."""
        f = self.f
        total = product(stage.axes)
        ordered = any(r.ordered for r in reducers)
        single = not ordered or (isinstance(total, int) and total <= CHUNK)
        levels = tree_levels(ceil_div(total, CHUNK)) if isinstance(total, int) else _MANY_LEVELS
        stack = "" if single else f.alloca("i8", levels * state_bytes(reducers, LANES))
        initial = ["0", *identities(reducers, LANES)]
        results = self._walk(stage, reducers, [], [start], "0", initial, stack)
        if single:
            return results[1:]
        finished, *state = results
        push(f, reducers, LANES, stack, state, finished)
        return drain(f, reducers, LANES, stack, f.add(finished, "1"))

    def _walk(
        self,
        stage: Stage,
        reducers: Sequence[Reducer],
        inner: list[str],
        sections: list[Region],
        flat: str,
        state: Sequence[str],
        stack: str,
    ) -> list[str]:
        """Walks the remaining axes from row-major number `flat`; state = (chunks finished, *registers)."""
        f = self.f
        sizes = stage.axes
        size = self.e.dim(sizes[len(inner)])
        types = ["i64", *all_types(reducers, LANES)]
        carried = list(zip(types, state, strict=True))
        if len(inner) < len(sizes) - 1:
            rest: DimLike = product(sizes[len(inner) + 1 :])
            with f.loop("0", size, carried=carried) as loop:
                here = f.add(flat, f.mul(loop.index, self.e.dim(rest)))
                nested = [*inner, loop.index]
                loop.next = self._walk(stage, reducers, nested, [*sections, f.section()], here, loop.values, stack)
            return loop.results
        aligned = isinstance(sizes[-1], int) and sizes[-1] % LANES == 0
        before = "0" if aligned else f.sub("0", f.pure(f"and i64 {flat}, {LANES - 1}"))
        with f.loop(before, size, LANES, carried) as loop:
            finished, *registers = loop.values
            number = f.add(flat, loop.index)
            if stack:
                chunk = f.div(number, str(CHUNK))
                with f.loop(finished, chunk, carried=typed(reducers, LANES, registers)) as flush:
                    push(f, reducers, LANES, stack, flush.values, flush.index)
                    flush.next = identities(reducers, LANES)
                registers, finished = flush.results, chunk
            mask = None if aligned else self._inside(loop.index, size)
            scope = self._nested_scope([*inner, loop.index], sections, len(inner), LANES, mask)
            loop.next = [finished, *self._step(stage, reducers, scope, number, registers)]
        return loop.results

    def _inside(self, index: str, size: str) -> str:
        """Lanes whose position index + lane lies in [0, size)."""
        f = self.f
        type_ = f"<{LANES} x i64>"
        lanes = f"<{', '.join(f'i64 {k}' for k in range(LANES))}>"
        position = f.pure(f"add {type_} {self.e.splat_scalar(index, 'i64', LANES)}, {lanes}")
        return f.pure(f"icmp ult {type_} {position}, {self.e.splat_scalar(size, 'i64', LANES)}")
