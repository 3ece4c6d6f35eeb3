"""Loop kernels whose vectors run along an outer axis while inner axes are walked one by one: sums over columns.

A work unit is a strip of the last outer axis (for one point of the others). Each column's accumulators, 16 of them where
the order is the contract's and one where it is free, lie in this thread's scratch, small enough to stay in L1 or L2; so do the
finished results, which later stages read back. Rows that go to the same accumulators are taken several at a time, so that those pass
through registers once for all of them and memory is read in several long streams. The bits are those of `rows.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duo_backends.cpu.body import Scope, Value
from duo_backends.cpu.code import KernelCode, Target
from duo_backends.cpu.code import Phase as PhaseCode
from duo_backends.cpu.llvm import Module, Region, is_literal, memory_type, register_type, vector
from duo_backends.cpu.nest import Phase, ceil_div, lanes_for, points
from duo_backends.cpu.reductions import (
    CHUNK,
    LANES,
    Reducer,
    drain,
    identities,
    load_state,
    push,
    split_states,
    state_bytes,
    store_state,
    tree_levels,
)
from duo_ir.kernels.kernel import LoopKernel, Stage
from duo_ir.types import DimLike, evaluate, product

_STRIP = 512  # columns of a strip where their number is not known, or rows are few
_WIDEST = 1024  # where it is: strips for all cores, or more of the widest: long pieces of rows are read fastest
_MOST_STRIPS = 8  # of few columns
_FEW_ROWS = 512
_FEW = 4096  # columns below which groups of chunks of a long reduction are work units too
_GROUP = 8  # chunks whose partial is one work unit of a split reduction
_ROUNDS = (8, 4, 2)  # rows of a lane taken at once: the most that is allowed as often as it fits, then two, then one
_LARGEST = 32  # instructions of so many bodies
_STREAMS = 8  # of memory read at once
_FREE_ROUNDS = 4  # of reductions in any order: their steps are several instructions that wait for each other
_AHEAD = 3  # rows whose cache lines are asked for early: pieces of rows are too short for the hardware to foresee
_FAR = 8 << 20  # bytes of input from which it pays
_ALIGN = 64


def compile_columns(kernel: LoopKernel, target: Target, name: str, cost: Any) -> KernelCode:
    """`kernel` with the axis to vectorise last among its outer ones."""
    module = Module()
    split = _splits(kernel)
    plan = _Columns(Phase(module, f"{name}_2" if split else name, kernel, target), kernel, split)
    plan.emit()
    phases = [PhaseCode(plan.phase.name, plan.units)]
    if split:
        _Columns(Phase(module, f"{name}_1", kernel, target), kernel, split).emit_groups()
        phases.insert(0, PhaseCode(f"{name}_1", lambda sizes: plan.units(sizes) * plan.groups(sizes)))

    def scratch(sizes: Mapping[str, int], threads: int) -> int:
        return plan.partial_bytes(sizes) + threads * plan.share(sizes)

    return KernelCode(module.text(), tuple(phases), scratch, cost)


def _splits(kernel: LoopKernel) -> bool:
    """Whether the first reduction is long over few columns: then groups of chunks are reduced in parallel."""
    first, last = kernel.stages[0], kernel.axes[-1]
    if not first.reduces or first.stores or len(first.axes) != 1:
        return False
    if any(r.kind in ("argmax", "argmin") for r in first.reduces):
        return False
    n, outer = first.axes[0], product(kernel.axes)
    few = isinstance(last, int) and isinstance(outer, int) and outer < _FEW
    return few and (not isinstance(n, int) or n >= 2 * _GROUP * CHUNK)


class _Stage:
    """The memory of one reducing stage in a strip: accumulators, stack of the tree, results, in bytes."""

    def __init__(self, stage: Stage, strip: int, width: int) -> None:
        self.reducers = [Reducer(r, stage.body[r.args[0]].dtype) for r in stage.reduces]
        self.ordered = any(r.ordered for r in self.reducers)
        self.count: DimLike = product(stage.axes)
        self.lanes = LANES if self.ordered else 1
        if self.ordered and isinstance(self.count, int):
            self.lanes = max(1, min(LANES, self.count))
        self.each = state_bytes(self.reducers, width)  # one lane of one vector of columns
        self.layer = self.each * self.lanes * (strip // width)
        self.rounds = _rounds(stage, self.ordered)
        self.chunked = self.ordered and not (isinstance(self.count, int) and self.count <= CHUNK)

    def levels(self, sizes: Mapping[str, int]) -> int:
        return tree_levels(ceil_div(evaluate(self.count, sizes), CHUNK)) if self.chunked else 0


def _rounds(stage: Stage, ordered: bool) -> list[int]:
    loads = sum(instr.op == "load" for instr in stage.body)
    most = min(_LARGEST // max(len(stage.body), 1), _STREAMS // max(loads, 1), _STREAMS if ordered else _FREE_ROUNDS)
    allowed = [r for r in _ROUNDS if r <= most]
    return sorted({*allowed[:1], *allowed[-1:]}, reverse=True)


class _Columns:
    """One phase. With `split`, stage 0's accumulators of each group of chunks pass through shared scratch."""

    def __init__(self, phase: Phase, kernel: LoopKernel, split: bool) -> None:
        self.phase, self.kernel, self.f, self.e, self.split = phase, kernel, phase.f, phase.e, split
        self.width = lanes_for([s.body for s in kernel.stages], phase.target)
        last = kernel.axes[-1]
        self.strip = _STRIP
        if isinstance(last, int):
            strips = min(max(phase.target.cores, 2), _MOST_STRIPS)
            self.strip = min(_STRIP if self._few_rows() else _WIDEST, ceil_div(max(last, 1), strips))
        self.strip = ceil_div(self.strip, self.width) * self.width
        self.stages = [_Stage(s, self.strip, self.width) for s in kernel.stages]
        self.result_at: dict[tuple[int, int], int] = {}
        at = 0
        for number, stage in enumerate(self.stages):
            for n, r in enumerate(stage.reducers):
                self.result_at[number, n] = at
                at += ceil_div(r.result_dtype.itemsize * self.strip, _ALIGN) * _ALIGN
        self.results_bytes = at
        self.accumulator_bytes = ceil_div(max([0, *(s.layer for s in self.stages)]), _ALIGN) * _ALIGN
        self.outer: list[str] = []
        self.base = self.begin = self.end = ""
        self.row: Region = self.f.top

    def _few_rows(self) -> bool:
        """Whether the accumulators, once set up, are added to few times: then they should lie in L1."""
        rows = [product(s.axes) for s in self.kernel.stages if s.reduces]
        return all(isinstance(n, int) and n < _FEW_ROWS for n in rows)

    # ------------------------------------------------------------------------- sizes, known when the kernel runs
    def units(self, sizes: Mapping[str, int]) -> int:
        axes = self.kernel.axes
        return points(axes[:-1], sizes) * ceil_div(evaluate(axes[-1], sizes), self.strip)

    def groups(self, sizes: Mapping[str, int]) -> int:
        return max(1, ceil_div(evaluate(self.stages[0].count, sizes), _GROUP * CHUNK)) if self.split else 0

    def partial_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes at the start of scratch for the accumulators of every (unit, group)."""
        size = self.units(sizes) * self.groups(sizes) * self.stages[0].layer
        return ceil_div(size, _ALIGN) * _ALIGN

    def share(self, sizes: Mapping[str, int]) -> int:
        """Bytes of scratch of one thread: results, accumulators, stack."""
        stack = max([0, *(s.levels(sizes) * s.layer for s in self.stages)])
        if self.split:
            stack = max(stack, tree_levels(max(_GROUP, self.groups(sizes))) * self.stages[0].layer)
        return self.results_bytes + self.accumulator_bytes + ceil_div(stack, _ALIGN) * _ALIGN

    def _share_name(self) -> str:
        """`share` at run time. A symbolic count's levels are the bits of its number of chunks."""
        f, e = self.f, self.e
        fixed = self.results_bytes + self.accumulator_bytes
        stack = "0"
        counts = [
            (s, f.div(f.add(e.dim(s.count), str(CHUNK - 1), f.top), str(CHUNK), f.top))
            for s in self.stages
            if s.chunked
        ]
        if self.split:
            counts.append((self.stages[0], self._max(self._groups(), str(_GROUP))))
        for s, count in counts:
            if is_literal(count):
                levels = str(tree_levels(int(count)))
            else:
                bits = [("i64", self._max(count, "1")), ("i1", "false")]
                levels = f.sub("64", f.call("ctlz", "i64", bits, region=f.top), f.top)
            stack = self._max(f.mul(levels, str(s.layer), f.top), stack)
        rounded = f.mul(f.div(f.add(stack, str(_ALIGN - 1), f.top), str(_ALIGN), f.top), str(_ALIGN), f.top)
        return f.add(rounded, str(fixed), f.top)

    def _max(self, a: str, b: str) -> str:
        if is_literal(a) and is_literal(b):
            return str(max(int(a), int(b)))
        return self.f.call("smax", "i64", [("i64", a), ("i64", b)], region=self.f.top)

    def _groups(self) -> str:
        f = self.f
        n = self.e.dim(self.stages[0].count)
        return self._max(f.div(f.add(n, str(_GROUP * CHUNK - 1), f.top), str(_GROUP * CHUNK), f.top), "1")

    # ------------------------------------------------------------------------------------------------- the nest
    def _locate(self) -> str:
        """Sets `base`, this thread's share; the number of strips."""
        f, axes = self.f, self.kernel.axes
        last = self.e.dim(axes[-1])
        strips = f.div(f.add(last, str(self.strip - 1), f.top), str(self.strip), f.top)
        shares = "%scratch"
        if self.split:
            units = f.mul(strips, self.e.dim(product(axes[:-1])), f.top)
            size = f.mul(f.mul(units, self._groups(), f.top), str(self.stages[0].layer), f.top)
            size = f.mul(f.div(f.add(size, str(_ALIGN - 1), f.top), str(_ALIGN), f.top), str(_ALIGN), f.top)
            shares = f.gep("i8", shares, size, f.top)
        self.base = f.gep("i8", shares, f.mul("%tid", self._share_name(), f.top), f.top)
        return strips

    def _enter(self, unit: str, strips: str) -> None:
        """Sets the indices and columns of a unit."""
        f, axes = self.f, self.kernel.axes
        last = self.e.dim(axes[-1])
        self.outer = self.phase.unravel(f.div(unit, strips), axes[:-1]) if len(axes) > 1 else []
        strip = f.rem(unit, strips) if len(axes) > 1 else unit
        self.begin = f.mul(strip, str(self.strip))
        self.end = f.min(f.add(self.begin, str(self.strip)), last)
        if is_literal(last) and int(last) % self.strip == 0:
            self.end = ""  # every strip is full
        self.row = f.section()

    def emit(self) -> None:
        f = self.f
        strips = self._locate()
        with f.loop("%begin", "%end") as units:
            self._enter(units.index, strips)
            for number, stage in enumerate(self.kernel.stages):
                if number == 0 and self.split:
                    self._combine(units.index)
                else:
                    self._stage(number, stage)
        f.finish()

    def emit_groups(self) -> None:
        """Phase 1 of a split reduction: unit = (unit of phase 2, group of chunks); leaves its accumulators in scratch."""
        f, plan = self.f, self.stages[0]
        strips, groups = self._locate(), self._groups()
        with f.loop("%begin", "%end") as units:
            self._enter(f.div(units.index, groups), strips)
            first = f.mul(f.rem(units.index, groups), str(_GROUP * CHUNK))
            last = f.min(f.add(first, str(_GROUP * CHUNK)), self.e.dim(plan.count))
            accumulators = self._reduce(self.kernel.stages[0], plan, (first, last))
            slot = f.gep("i8", "%scratch", f.mul(units.index, str(plan.layer)))
            with f.loop("0", str(plan.layer), plan.each) as loop:
                state = load_state(f, plan.reducers, self.width, f.gep("i8", accumulators, loop.index))
                store_state(f, plan.reducers, self.width, f.gep("i8", slot, loop.index), state)
        f.finish()

    def _combine(self, unit: str) -> None:
        f, plan, groups = self.f, self.stages[0], self._groups()
        accumulators, stack = self._memory()
        first = f.gep("i8", "%scratch", f.mul(f.mul(unit, groups), str(plan.layer)))
        with f.loop("0", groups, runs=True) as loop:
            slot = f.gep("i8", first, f.mul(loop.index, str(plan.layer)))
            self._push(plan, slot, stack, loop.index)
        self._drain(plan, accumulators, stack, groups)
        self._finish(0, plan, accumulators)

    def _over_strip(self, emit: Any) -> None:
        """emit(column, offset in the strip, mask) for each vector of columns."""
        f = self.f
        if not self.end:
            with f.loop("0", str(self.strip), self.width) as loop:
                emit(f.add(self.begin, loop.index), loop.index, None)
            return

        def shifted(index: str, width: int, mask: str | None) -> None:
            emit(index, f.sub(index, self.begin), mask)

        self.phase.over_lanes(self.begin, self.end, self.width, shifted, scalar_tail=False)

    def _scope(self, column: str, inner: Sequence[str], sections: Sequence[Region], mask: str | None) -> Scope:
        outer = len(self.outer)
        last = 2 + len(sections)
        levels = (*(1 for _ in range(outer)), last, *(2 + k for k in range(len(inner))))
        regions = (self.f.top, self.row, *sections, None)
        return Scope((*self.outer, column, *inner), levels, regions, outer, self.width, mask)

    def _point(self, stage: Stage, scope: Scope, offset: str) -> list[Value]:
        def reduced(number: int, n: int) -> Value:
            return self._result(number, n, offset, len(scope.regions) - 1)

        values = self.e.emit(stage.body, scope, reduced)
        for store in stage.stores:
            self.e.store(store, values, scope)
        return values

    def _result_address(self, number: int, n: int, offset: str) -> tuple[str, str]:
        f = self.f
        d = self.stages[number].reducers[n].result_dtype
        start = f.gep("i8", self.base, str(self.result_at[number, n]), f.top)
        return f.gep(memory_type(d), start, offset), vector(self.width, memory_type(d))

    def _result(self, number: int, n: int, offset: str, level: int) -> Value:
        f, d = self.f, self.stages[number].reducers[n].result_dtype
        address, type_ = self._result_address(number, n, offset)
        name = f.pure(f"load {type_}, ptr {address}, align {d.itemsize}")
        if d.kind == "b":
            name = f.pure(f"icmp ne {type_} {name}, zeroinitializer")
        return Value(name, d, True, level)

    # ------------------------------------------------------------------------------------------------- stages
    def _stage(self, number: int, stage: Stage) -> None:
        if not stage.reduces:
            self._nest(stage, [], [])
            return
        plan = self.stages[number]
        self._finish(number, plan, self._reduce(stage, plan, None))

    def _memory(self) -> tuple[str, str]:
        """This thread's accumulators and stack."""
        f = self.f
        accumulators = f.gep("i8", self.base, str(self.results_bytes), f.top)
        return accumulators, f.gep("i8", accumulators, str(self.accumulator_bytes), f.top)

    def _reduce(self, stage: Stage, plan: _Stage, span: tuple[str, str] | None) -> str:
        """Accumulators of the stage's elements, or of those in `span` (one axis; begins with a chunk)."""
        f = self.f
        accumulators, stack = self._memory()
        self._clear(plan, accumulators)
        if not plan.chunked:
            self._walk(stage, plan, [], [], accumulators, "0", None, span)
            return accumulators
        begin, end = span or ("0", self.e.dim(plan.count))
        chunks = f.div(f.add(f.sub(end, begin), str(CHUNK - 1)), str(CHUNK))
        if not is_literal(chunks):
            chunks = f.call("smax", "i64", [("i64", chunks), ("i64", "1")])
        self._walk(stage, plan, [], [], accumulators, "0", stack, span)
        self._push(plan, accumulators, stack, f.sub(chunks, "1"))
        self._drain(plan, accumulators, stack, chunks)
        return accumulators

    def _nest(self, stage: Stage, inner: list[str], sections: list[Region]) -> None:
        f = self.f
        if len(inner) == len(stage.axes):
            self._over_strip(
                lambda column, offset, mask: self._point(stage, self._scope(column, inner, sections, mask), offset)
            )
            return
        with f.loop("0", self.e.dim(stage.axes[len(inner)])) as loop:
            self._nest(stage, [*inner, loop.index], [*sections, f.section()])

    def _clear(self, plan: _Stage, accumulators: str) -> None:
        f = self.f
        with f.loop("0", str(plan.layer), plan.each) as loop:
            address = f.gep("i8", accumulators, loop.index)
            store_state(f, plan.reducers, self.width, address, identities(plan.reducers, self.width))

    def _slot(self, plan: _Stage, base: str, lane: str, offset: str) -> str:
        """Where lane `lane` of the vector of columns at `offset` of the strip lies: lane-major."""
        f = self.f
        row = f.gep("i8", base, f.mul(lane, str(plan.each * (self.strip // self.width))))
        return f.gep("i8", row, f.mul(f.div(offset, str(self.width)), str(plan.each)))

    def _walk(
        self,
        stage: Stage,
        plan: _Stage,
        inner: list[str],
        sections: list[Region],
        accumulators: str,
        flat: str,
        stack: str | None,
        span: tuple[str, str] | None,
    ) -> None:
        """All elements of a stage (or those in `span`) in row-major order; `flat` is the number of the first."""
        f, sizes, origin = self.f, stage.axes, span[0] if span else "0"
        if len(inner) < len(sizes):
            begin, end = span or ("0", self.e.dim(sizes[len(inner)]))
            if len(sizes) == 1:
                begin = self._walk_rounds(stage, plan, accumulators, stack, begin, end)
                if begin == end:
                    return
            rest = self.e.dim(product(sizes[len(inner) + 1 :]))
            with f.loop(begin, end) as loop:
                here = f.add(flat, f.mul(loop.index, rest))
                nested = [*sections, f.section()]
                self._walk(stage, plan, [*inner, loop.index], nested, accumulators, here, stack, span)
            return
        if stack is not None:
            self._next_chunk(plan, accumulators, stack, flat, origin)
        lane = f.pure(f"and i64 {flat}, {LANES - 1}") if plan.lanes > 1 else "0"
        elements = product((*self.kernel.axes, *sizes))
        far = isinstance(elements, int) and elements * plan.reducers[0].value_dtype.itemsize >= _FAR

        def emit(column: str, offset: str, mask: str | None) -> None:
            scope = self._scope(column, inner, sections, mask)
            slot = self._slot(plan, accumulators, lane, offset)
            before = load_state(f, plan.reducers, self.width, slot)
            state = self._step(stage, plan, scope, offset, flat, before)
            if far:
                self.e.prefetch(stage.body, scope, len(self.outer) + len(sizes), _AHEAD)
            store_state(f, plan.reducers, self.width, slot, state)

        self._over_strip(emit)

    def _step(
        self, stage: Stage, plan: _Stage, scope: Scope, offset: str, flat: str, before: Sequence[str]
    ) -> list[str]:
        """The states `before` and one more element, of row-major number `flat`, in each column."""
        values = self._point(stage, scope, offset)
        position = ""
        if any(r.is_arg for r in plan.reducers):
            position = self.e.splat_scalar(flat, "i64", self.width)
        state: list[str] = []
        for r, s in zip(plan.reducers, split_states(plan.reducers, before), strict=True):
            operands = [self.e.splat(scope, values[k]) for k in r.args]
            state += r.step(self.f, self.width, s, operands, position, None)
        return state

    def _walk_rounds(
        self, stage: Stage, plan: _Stage, accumulators: str, stack: str | None, origin: str, end: str
    ) -> str:
        """Rows of one axis, those of a lane several at a time: its accumulators pass through registers once for all of them,
        and that many streams of memory are read at once. The first row that is left."""
        f, begin = self.f, origin
        for rounds in plan.rounds:
            rows = plan.lanes * rounds
            middle = f.add(begin, f.mul(f.div(f.sub(end, begin), str(rows)), str(rows)))
            if middle == begin:
                continue
            with f.loop(begin, middle, rows) as blocks:
                if stack is not None:
                    self._next_chunk(plan, accumulators, stack, blocks.index, origin)
                with f.loop("0", str(plan.lanes)) as lanes:
                    first, section = f.add(blocks.index, lanes.index), f.section()
                    indices = [f.add(first, str(plan.lanes * k), section) for k in range(rounds)]

                    def emit(column: str, offset: str, mask: str | None) -> None:
                        slot = self._slot(plan, accumulators, lanes.index, offset)
                        state = load_state(f, plan.reducers, self.width, slot)
                        for index in indices:  # noqa: B023
                            scope = self._scope(column, [index], [section], mask)  # noqa: B023
                            state = self._step(stage, plan, scope, offset, index, state)
                        store_state(f, plan.reducers, self.width, slot, state)

                    self._over_strip(emit)
            begin = middle
        return begin

    def _next_chunk(self, plan: _Stage, accumulators: str, stack: str, flat: str, origin: str) -> None:
        """Where element `flat` begins a chunk other than the first: puts the last one's accumulators away."""
        f = self.f
        inside = f.pure(f"and i64 {flat}, {CHUNK - 1}")
        first = f.pure(f"icmp eq i64 {inside}, 0")
        later = f.pure(f"icmp ne i64 {flat}, {origin}")
        with f.when(f.pure(f"and i1 {first}, {later}")):
            self._push(plan, accumulators, stack, f.sub(f.div(f.sub(flat, origin), str(CHUNK)), "1"))
            self._clear(plan, accumulators)

    def _push(self, plan: _Stage, accumulators: str, stack: str, finished: str) -> None:
        """The chunk's accumulators, vector by vector, into the counter of number `finished`."""
        f = self.f
        with f.loop("0", str(plan.layer), plan.each) as loop:
            state = load_state(f, plan.reducers, self.width, f.gep("i8", accumulators, loop.index))
            column = f.gep("i8", stack, loop.index)
            push(f, plan.reducers, self.width, column, state, finished, plan.layer)

    def _drain(self, plan: _Stage, accumulators: str, stack: str, chunks: str) -> None:
        f = self.f
        with f.loop("0", str(plan.layer), plan.each) as loop:
            column = f.gep("i8", stack, loop.index)
            state = drain(f, plan.reducers, self.width, column, chunks, plan.layer)
            store_state(f, plan.reducers, self.width, f.gep("i8", accumulators, loop.index), state)

    def _finish(self, number: int, plan: _Stage, accumulators: str) -> None:
        """Halves the lanes of each column and keeps the results."""
        f, width, reducers = self.f, self.width, plan.reducers
        with f.loop("0", str(self.strip), width) as loop:
            lanes: list[list[str]] = []
            for lane in range(plan.lanes):
                slot = self._slot(plan, accumulators, str(lane), loop.index)
                lanes.append(load_state(f, reducers, width, slot))
            if plan.ordered:
                lanes += [identities(reducers, width)] * (LANES - plan.lanes)
            for n, r in enumerate(reducers):
                states = [split_states(reducers, s)[n] for s in lanes]
                while len(states) > 1:
                    half = len(states) // 2
                    states = [r.merge(f, width, states[k], states[k + half]) for k in range(half)]
                address, type_ = self._result_address(number, n, loop.index)
                name = r.result(f, states[0], width)
                if r.result_dtype.kind == "b":
                    name = f.op(f"zext {vector(width, register_type(r.result_dtype))} {name} to {type_}")
                f.emit(f"store {type_} {name}, ptr {address}, align {r.result_dtype.itemsize}")
