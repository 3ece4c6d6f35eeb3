"""A Program as tables that hold for all values of its free dims: `Plan`, which `module.py` writes into an artefact.

`duo_backends/cpu/table.py` does the same for sizes that are known, and `cpu/runner_text.py` says what the native runner makes of the words. Where lifetimes
meet, an arena of known sizes is packed as tightly as there; with free dims temporaries share the places of others that are dead by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from duo_backends.aot.runtime import frame_bytes
from duo_backends.aot.sizes import Size, dim, larger, traced, value
from duo_backends.cpu.code import KernelCode, no_scratch
from duo_backends.cpu.runner_text import BRANCH, END, JUMP, PHASE
from duo_backends.cpu.table import COPY_NANOSECONDS, COPY_UNIT, threads_for
from duo_backends.flat import LINE, Flattener, Layout, round_up, single_place
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Cond, Program, Step, While
from duo_ir.types import evaluate

Number: TypeAlias = Any  # an int or a Size
THREADS = (
    "threads"  # the dim that scratch depends on beside the program's own; an identifier of a program may not be it
)
TYPICAL = 8  # the size of free dims for which temporaries are matched


@dataclass(frozen=True)
class Argument:
    """The place of argument `k` of a call."""

    k: int


@dataclass(frozen=True)
class Row:
    """One instruction of the runner: `symbol` runs (None: the runner's copy) in `units` with up to `threads`, its pointer words from number `words`
    on, its sizes from number `dims` on. Branches go to `target`."""

    kind: int
    symbol: str | None = None
    words: int = 0
    dims: int = 0
    units: Number = 0
    threads: tuple[Number, Number] = (1, 1)
    target: int = 0
    where: str = ""
    sites: tuple[str, ...] = ()
    description: str = ""


@dataclass
class Plan:
    """`rows` end with END. `words`: pointer words, Arguments or offsets in the arena; `dims`: words of sizes; `arena` and `scratch` are bytes, the latter of
    `THREADS` threads."""

    program: Program
    rows: list[Row] = field(default_factory=list)
    words: list[Argument | Number] = field(default_factory=list)
    dims: list[Number] = field(default_factory=list)
    arena: Number = 0
    scratch: Number = 0

    def frame_bytes(self, sizes: Mapping[str, int], threads: int) -> int:
        """All temporary memory of a call with these free sizes, what a library's `..._scratch_bytes` says of it."""
        arena, scratch = value(self.arena, sizes), value(self.scratch, {**sizes, THREADS: threads})
        return frame_bytes(len(self.words), arena, scratch, threads)


def make_plan(program: Program, codes: Mapping[Kernel, KernelCode]) -> Plan:
    """The plan of `program`. Raises ArgumentError for kernels whose sizes cannot be told from free dims."""
    coder = _Coder(program, codes)
    count = len(program.inputs) + len(program.outputs)
    coder.emit(program, [Argument(k) for k in range(count)], 0)  # type: ignore[misc]
    coder.add(Row(END))
    plan = coder.plan
    plan.arena = coder.layout(program).nbytes
    threads: Number = dim(THREADS)
    needs = [traced(partial(code.scratch, sizes, threads)) for code, sizes in coder.users]
    plan.scratch = larger(0, *needs)
    return plan


class FreeFlattener(Flattener):
    """Writes `program` out for all values of its free dims: places in the arena are Numbers, and what lies there is matched at typical sizes."""

    def __init__(self, program: Program) -> None:
        super().__init__({name: dim(name) for name in program.dims})  # type: ignore[misc]
        self.typical = dict.fromkeys(program.dims, TYPICAL)

    def layout(self, program: Program) -> Layout:
        if not self.sizes:
            return super().layout(program)
        found = self.layouts.get(id(program))
        if found is None:
            spans = [(evaluate(t.nbytes, self.sizes), t.first, t.last) for t in program.temps]
            nested = [i for i, item in enumerate(program.items) if isinstance(item, Cond | While)]
            spans += [(self.nested_bytes(program.items[i]), i, i) for i in nested]
            offsets, total = self._shared(spans)
            count = len(program.temps)
            found = Layout(offsets[:count], dict(zip(nested, offsets[count:])), total)
            self.layouts[id(program)] = found
        return found

    def _shared(self, spans: Sequence[tuple[Number, int, int]]) -> tuple[list[Number], Number]:
        """Offsets and the arena's size. Each place serves one after the other, and is as large as the largest of them."""
        typical = [value(s[0], self.typical) for s in spans]
        places: list[tuple[list[int], int]] = []  # members, typical size
        for i in sorted(range(len(spans)), key=lambda i: (-typical[i], spans[i][1])):
            _, first, last = spans[i]
            fitting = [
                n
                for n, (members, _) in enumerate(places)
                if all(spans[k][2] < first or spans[k][1] > last for k in members)
            ]
            if fitting:
                best = min(fitting, key=lambda n: abs(places[n][1] - typical[i]))
                places[best][0].append(i)
            else:
                places.append(([i], typical[i]))
        offsets: list[Number] = [0] * len(spans)
        end: Number = 0
        for members, _ in places:
            for i in members:
                offsets[i] = end
            end = end + round_up(larger(*[spans[i][0] for i in members]))
        return offsets, end

    def nested_bytes(self, item: object) -> Number:
        if not self.sizes:
            return super().nested_bytes(item)
        if isinstance(item, Cond):
            return larger(self.block_bytes(item.then), self.block_bytes(item.orelse))
        assert isinstance(item, While)
        single = single_place(item.body, len(item.initial))
        shadowed = [item.body.inputs[k] for k in range(len(item.initial)) if k not in single]
        shadows: Number = sum(round_up(evaluate(t.nbytes, self.sizes)) for t in shadowed)
        return LINE + shadows + larger(self.block_bytes(item.test), self.block_bytes(item.body))

    def claim(self, place: Number, nbytes: Number) -> None:
        pass  # regions are what the GPU's memory checks need


class _Coder(FreeFlattener):
    def __init__(self, program: Program, codes: Mapping[Kernel, KernelCode]) -> None:
        super().__init__(program)
        self.codes, self.plan = codes, Plan(program)
        self.users: list[tuple[KernelCode, Mapping[str, Any]]] = []  # kernels that need scratch

    def step(self, step: Step, places: list[Any]) -> None:
        code, sizes = self.codes[step.kernel], step.bind(self.sizes)
        cost = traced(partial(code.cost, sizes))
        units = [traced(partial(phase.units, sizes)) for phase in code.phases]
        if all(n.__class__ is int and n == 0 for n in units):
            return
        words = self.pointers([places[slot] for slot in step.slots])
        dims = len(self.plan.dims)
        self.plan.dims += sizes.values()
        for phase, n in zip(code.phases, units):
            if n.__class__ is int and n == 0:
                continue
            sites = tuple(step.kernel.sites)
            name = type(step.kernel).__name__
            self.add(Row(PHASE, phase.symbol, words, dims, n, _threads(cost, n), 0, step.where, sites, name))
        if code.scratch is not no_scratch:
            self.users.append((code, sizes))

    def copy_bytes(self, source: Any, target: Any, nbytes: Number) -> None:
        if source == target or (nbytes.__class__ is int and nbytes == 0):
            return
        cost, units = nbytes * COPY_NANOSECONDS, -(-nbytes // COPY_UNIT)
        words, dims = self.pointers([source, target]), len(self.plan.dims)
        self.plan.dims.append(nbytes)
        self.add(Row(PHASE, None, words, dims, units, _threads(cost, units), description="copy"))

    def branch(self, place: Any) -> int:
        return self.add(Row(BRANCH, words=self.pointers([place])))

    def jump(self, target: int | None = None) -> int:
        return self.add(Row(JUMP, target=target or 0))

    def here(self) -> int:
        return len(self.plan.rows)

    def land(self, label: int) -> None:
        row = self.plan.rows[label]
        self.plan.rows[label] = Row(row.kind, words=row.words, target=len(self.plan.rows))

    def pointers(self, places: list[Any]) -> int:
        self.plan.words += places
        return len(self.plan.words) - len(places)

    def add(self, row: Row) -> int:
        self.plan.rows.append(row)
        return len(self.plan.rows) - 1


def _threads(cost: Number, units: Number) -> tuple[Number, Number]:
    """`table.threads_for`, of which a Size has two ops."""
    if isinstance(cost, Size) or isinstance(units, Size):
        return Size("patient", (cost, units)), Size("eager", (cost, units))
    return threads_for(cost, units)


__all__ = ["THREADS", "Argument", "Number", "Plan", "Row", "Size", "make_plan"]
