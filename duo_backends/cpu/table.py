"""A Program with known sizes as the flat table that the native runner walks (layout in `runner_text.py`).

Control flow is flattened into branches and jumps, so that every buffer of every nested program has a fixed place: an
argument of the call, or an offset in the call's arena. Arena offsets come from lifetimes. A loop's carried values
alternate between two sets of places, for which its body is written out twice; a carried value that the body may update in
place (`Program.donations`) has one place only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from duo_backends.cpu.bound import Note, Table
from duo_backends.cpu.code import KernelCode, no_scratch
from duo_backends.cpu.pool_text import MAX_THREADS
from duo_backends.cpu.runner_text import BRANCH, CODE_WORDS, END, FRAME_HEADER, JUMP, PHASE
from duo_ir.errors import VerifyError
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Cond, Copy, Program, Step, While
from duo_ir.kernels.work import describe, flops, traffic
from duo_ir.types import evaluate

SERIAL_NANOSECONDS = 50_000  # a phase below this is not worth waking threads for
SHARE_NANOSECONDS = 20_000  # least work for one thread of a parallel phase
EAGER_NANOSECONDS = 5_000  # a phase below this is not worth telling threads that spin already
EAGER_SHARE_NANOSECONDS = 2_500
COPY_UNIT = 1 << 18  # bytes, of `duo_copy`
COPY_NANOSECONDS = 0.1  # a byte
_SMALL_ARENA = 1 << 20  # bytes up to which an arena is good enough
_LINE = 64


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel's code and the addresses of its phases. `library` keeps the code loaded."""

    code: KernelCode
    addresses: tuple[int, ...]
    library: object


class StepNote:
    """What bound programs tell of a step (`bound.Note`), computed when somebody asks. `sizes`: the values of its kernel's sizes."""

    __slots__ = ("_sizes", "_step")

    def __init__(self, step: Step, sizes: Mapping[str, int]) -> None:
        self._step, self._sizes = step, sizes

    @property
    def where(self) -> str:
        return self._step.where

    @property
    def sites(self) -> Sequence[str]:
        return self._step.kernel.sites

    @property
    def description(self) -> str:
        return describe(self._step.kernel, self._sizes)

    @property
    def flops(self) -> int:
        return flops(self._step.kernel, self._sizes)

    @property
    def traffic(self) -> int:
        return traffic(self._step.kernel, self._sizes)


def argument(k: int) -> int:
    """The place of argument k of the call; places in the arena are their offsets, 0 and up."""
    return -1 - k


def pack(spans: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets in one arena for (nbytes, first, last): two that live at the same item do not overlap. Returns them and the arena's
    size. Each at the lowest offset that is free for all its life: in that of several orders that makes the arena smallest."""
    n = len(spans)
    size = np.array([-(-s[0] // _LINE) * _LINE for s in spans], np.int64)
    first, last = np.array([s[1] for s in spans], np.int64), np.array([s[2] for s in spans], np.int64)
    least = largest_live_set(size, first, last)
    best, total = np.zeros(n, np.int64), -1
    for key in (
        lambda i: (-size[i], first[i]),  # largest first
        lambda i: (-size[i] * (last[i] - first[i] + 1), first[i]),  # so that what is large for long is at the bottom
        lambda i: (first[i] - last[i], -size[i]),  # longest life first
        lambda i: (first[i], -size[i]),  # as they come
    ):
        offset = _placed(sorted(range(n), key=key), size, first, last)
        end = int((offset + size).max(initial=0))
        if total < 0 or end < total:
            best, total = offset, end
        if total <= max(least, _SMALL_ARENA):
            break
    return best.tolist(), total


def largest_live_set(size: np.ndarray, first: np.ndarray, last: np.ndarray) -> int:
    """The most bytes that live at one item: no arena is smaller."""
    if not len(size):
        return 0
    change = np.zeros(int(last.max()) + 2, np.int64)
    np.add.at(change, first, size)
    np.add.at(change, last + 1, -size)
    return int(np.cumsum(change).max())


def _placed(order: Sequence[int], size: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Offsets, each the lowest that is free, taken in this order."""
    offset = np.zeros(len(size), np.int64)
    done: list[int] = []
    for i in order:
        if not size[i]:
            continue
        if done:
            others = np.array(done)
            others = others[(first[others] <= last[i]) & (last[others] >= first[i])]
            others = others[np.argsort(offset[others], kind="stable")]
            # Free from the highest end of those below, up to the next one's start.
            ends = np.maximum.accumulate(np.concatenate([[0], offset[others] + size[others]]))
            starts = np.concatenate([offset[others], [np.iinfo(np.int64).max]])
            offset[i] = ends[np.argmax(starts - ends >= size[i])]
        done.append(i)
    return offset


@dataclass
class _Layout:
    """Arena of one program, relative to its own start: temporaries, blocks of nested items, total."""

    temps: list[int]
    nested: dict[int, int]
    nbytes: int


@dataclass
class _Coder:
    kernels: Mapping[Kernel, LoadedKernel]
    sizes: Mapping[str, int]
    copy: int  # address of duo_copy
    base: int  # frame offset of the first pointer word
    layouts: dict[int, _Layout] = field(default_factory=dict)
    code: list[list[int]] = field(default_factory=list)
    notes: list[Note | None] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    dims: list[int] = field(default_factory=list)
    users: list[tuple[KernelCode, Mapping[str, int], int]] = field(default_factory=list)
    cost: float = 0.0
    loops: bool = False

    # ------------------------------------------------------------------------------------------------- arena sizes
    def layout(self, program: Program) -> _Layout:
        found = self.layouts.get(id(program))
        if found is not None:
            return found
        spans = [(evaluate(t.nbytes, self.sizes), t.first, t.last) for t in program.temps]
        nested = [i for i, item in enumerate(program.items) if isinstance(item, Cond | While)]
        for i in nested:
            spans.append((self.nested_bytes(program.items[i]), i, i))
        offsets, total = pack(spans)
        count = len(program.temps)
        made = _Layout(offsets[:count], dict(zip(nested, offsets[count:])), total)
        self.layouts[id(program)] = made
        return made

    def nested_bytes(self, item: object) -> int:
        if isinstance(item, Cond):
            return max(self.block_bytes(item.then), self.block_bytes(item.orelse))
        assert isinstance(item, While)
        single = single_place(item.body, len(item.initial))
        shadowed = [item.body.inputs[k] for k in range(len(item.initial)) if k not in single]
        shadows = sum(_round(evaluate(t.nbytes, self.sizes)) for t in shadowed)
        return _LINE + shadows + max(self.block_bytes(item.test), self.block_bytes(item.body))

    def output_bytes(self, program: Program) -> list[int]:
        return [evaluate(t.nbytes, self.sizes) for t in program.outputs]

    def block_bytes(self, program: Program) -> int:
        """A nested program's arena: its outputs that no result names, then its own layout."""
        dead = sum(
            _round(n) for k, n in enumerate(self.output_bytes(program)) if _slot(program, k) not in program.results
        )
        return dead + self.layout(program).nbytes

    # -------------------------------------------------------------------------------------------------------- code
    def emit(self, program: Program, arguments: list[int], start: int) -> None:
        """Code of `program` with its inputs and outputs at `arguments` and its arena from `start` on."""
        layout = self.layout(program)
        places = [*arguments, *(start + offset for offset in layout.temps)]
        types = [*program.inputs, *program.outputs]
        nbytes = [evaluate(t.nbytes, self.sizes) for t in types] + [
            evaluate(t.nbytes, self.sizes) for t in program.temps
        ]
        for number, item in enumerate(program.items):
            if isinstance(item, Step):
                self.step(item, places)
            elif isinstance(item, Copy):
                self.copy_bytes(places[item.source], places[item.target], nbytes[item.source])
            elif isinstance(item, Cond):
                self.cond(item, places, start + layout.nested[number])
            else:
                self.loop(item, places, start + layout.nested[number])

    def step(self, step: Step, places: list[int]) -> None:
        loaded, sizes = self.kernels[step.kernel], step.bind(self.sizes)
        units = [phase.units(sizes) for phase in loaded.code.phases]
        if not any(units):
            return
        cost = loaded.code.cost(sizes)
        self.cost += cost
        args = self.pointers([places[slot] for slot in step.slots])
        dims = len(self.dims)
        self.dims += sizes.values()
        most = 1
        note = StepNote(step, sizes)
        for address, n in zip(loaded.addresses, units):
            if n > 0:
                threads = _threads(cost, n)
                most = max(most, *threads)
                self.add([PHASE, address, args, dims, n, *threads], note)
        self.users.append((loaded.code, sizes, most))

    def copy_bytes(self, source: int, target: int, nbytes: int) -> None:
        if source == target or nbytes == 0:
            return
        cost, units = nbytes * COPY_NANOSECONDS, -(-nbytes // COPY_UNIT)
        self.cost += cost
        args, dims = self.pointers([source, target]), len(self.dims)
        self.dims.append(nbytes)
        self.add([PHASE, self.copy, args, dims, units, *_threads(cost, units)])

    def cond(self, item: Cond, places: list[int], start: int) -> None:
        inputs, outputs = [places[s] for s in item.inputs], [places[s] for s in item.outputs]
        branch = self.add([BRANCH, self.pointers([places[item.predicate]]), 0])
        self.nested(item.then, inputs, outputs, start)
        jump = self.add([JUMP, 0])
        self.code[branch][2] = len(self.code)
        self.nested(item.orelse, inputs, outputs, start)
        self.code[jump][1] = len(self.code)

    def loop(self, item: While, places: list[int], start: int) -> None:
        self.loops = True
        constants = [places[s] for s in item.constants]
        here, there, flag, rest = [places[s] for s in item.outputs], [], start, start + _LINE
        nbytes = [evaluate(item.body.inputs[k].nbytes, self.sizes) for k in range(len(here))]
        single = single_place(item.body, len(here))
        for k, place in enumerate(here):
            there.append(place if k in single else rest)
            rest += 0 if k in single else _round(nbytes[k])
        for k, slot in enumerate(item.initial):
            self.copy_bytes(places[slot], here[k], nbytes[k])
        top = len(self.code)
        out_of = []
        turns = [(here, there), (there, here)] if here != there else [(here, there)]
        for before, after in turns:
            predicate = self.result_place(item.test, [*before, *constants], flag)
            self.nested(item.test, [*before, *constants], [predicate], rest)
            out_of.append(self.add([BRANCH, self.pointers([predicate]), 0]))
            self.nested(item.body, [*before, *constants], after, rest)
        self.add([JUMP, top])
        if len(turns) == 2:
            self.code[out_of[1]][2] = len(self.code)
            for k in range(len(here)):
                self.copy_bytes(there[k], here[k], nbytes[k])
        self.code[out_of[0]][2] = len(self.code)

    def result_place(self, program: Program, inputs: list[int], otherwise: int) -> int:
        """Where result 0 of a test lies: at an input if it is one."""
        slot = program.results[0]
        return inputs[slot] if slot < len(program.inputs) else otherwise

    def nested(self, program: Program, inputs: list[int], targets: list[int], start: int) -> None:
        """`program` with result k at `targets[k]`: its outputs are written there, other results copied."""
        outputs: list[int] = []
        for k, n in enumerate(self.output_bytes(program)):
            slot = _slot(program, k)
            if slot in program.results:
                outputs.append(targets[program.results.index(slot)])
            else:
                outputs.append(start)
                start += _round(n)
        self.emit(program, [*inputs, *outputs], start)
        places = [*inputs, *outputs]
        types = [*program.inputs, *program.outputs]
        for k, slot in enumerate(program.results):
            if slot >= len(places):
                raise VerifyError(
                    f"result {k} of a nested program is temporary slot {slot}; results are inputs or outputs"
                )
            self.copy_bytes(places[slot], targets[k], evaluate(types[slot].nbytes, self.sizes))

    def pointers(self, places: list[int]) -> int:
        offset = self.base + 8 * len(self.places)
        self.places += places
        return offset

    def add(self, words: list[int], note: Note | None = None) -> int:
        self.code.append(words)
        self.notes.append(note)
        return len(self.code) - 1


def build_table(program: Program, kernels: Mapping[Kernel, LoadedKernel], sizes: Mapping[str, int], copy: int) -> Table:
    """The table of `program`; `copy` is the address of `duo_copy`. Pointer words start after the frame's header and one
    scalar cell per input."""
    coder = _Coder(kernels, sizes, copy, FRAME_HEADER + 8 * len(program.inputs))
    count = len(program.inputs) + len(program.outputs)
    coder.emit(program, [argument(k) for k in range(count)], 0)
    coder.add([END])
    dims = np.array([*coder.dims, 0], np.int64)
    code = np.zeros((len(coder.code), CODE_WORDS), np.int64)
    for row, words in zip(code, coder.code):
        row[: len(words)] = words
        if words[0] == PHASE:
            row[3] = dims.ctypes.data + 8 * words[3]
    parallel = any(words[0] == PHASE and words[6] > 1 for words in coder.code)
    arena = coder.layout(program).nbytes
    users = [user for user in coder.users if user[0].scratch is not no_scratch]

    def scratch(threads: int) -> int:
        return max((code.scratch(sizes, min(n, threads)) for code, sizes, n in users), default=0)

    return Table(code, dims, coder.places, arena, coder.cost, parallel, coder.loops, coder.notes, scratch)


def single_place(body: Program, carried: int) -> set[int]:
    """Carried values that need one place only: passed on as they are, or updated in place, which the body allows by a
    donation and which must not be seen by another result that is the old value."""
    found = {k for k in range(carried) if body.results[k] == k}
    for output, given in body.donations:
        slot = _slot(body, output)
        if (
            given < carried
            and body.results[given] == slot
            and given not in body.results
            and body.results.count(slot) == 1
        ):
            found.add(given)
    return found


def _slot(program: Program, output: int) -> int:
    return len(program.inputs) + output


def _threads(cost: float, units: int) -> tuple[int, int]:
    """How many threads to use at most: in any case, and while all workers are awake."""
    patient = 1 if cost < SERIAL_NANOSECONDS else int(cost / SHARE_NANOSECONDS)
    eager = 1 if cost < EAGER_NANOSECONDS else int(cost / EAGER_SHARE_NANOSECONDS)
    return min(units, patient, MAX_THREADS), min(units, max(patient, eager), MAX_THREADS)


def _round(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE
