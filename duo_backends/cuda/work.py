"""A Program with known sizes as what the GPU's stream is given, in `Block`s.

A block is work without a decision (launches, copies, products by cuBLASLt, which a CUDA graph can hold), and what the host does when it has been handed over:
read a bool of the device and branch, jump, see whether an index was out of range, or end. Arguments of launches are words of one array:
addresses, each a base of the call plus an offset, and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from duo_backends.calls import Site
from duo_backends.cuda.blas import Plan, Problem
from duo_backends.cuda.code import STATUS_WORDS, KernelCode
from duo_backends.cuda.library import LibraryCall
from duo_backends.cuda.together import Joined, Together, together
from duo_backends.flat import Flattener, StepNote, argument, round_up
from duo_ir.kernels.checks import failing
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Program, Step, reads_writes

CONSTANT, ARENA, SCRATCH, STATUS, ARGUMENTS = range(
    5
)  # bases of a call's words; arguments and then `Table.own` regions follow
STATUS_STRIDE = round_up(8 * STATUS_WORDS)  # bytes from one step's status words to the next one's


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel's code and the function of each launch. `module` keeps them loaded. `library`: the kernel as cuBLASLt computes it, where it can."""

    code: KernelCode
    functions: tuple[Any, ...]
    module: Any
    library: LibraryCall | None = None


@dataclass(frozen=True)
class Launch:
    """A kernel's function: `first` to `last` number its words; `note`: of which step."""

    function: Any
    blocks: int
    threads: int
    shared: int
    first: int
    last: int
    note: StepNote


@dataclass(frozen=True)
class Copy:
    """Bytes from the address in word `source` to that in word `target`."""

    target: int
    source: int
    nbytes: int
    note = None


@dataclass(frozen=True)
class Multiply:
    """A product by cuBLASLt: the words with the addresses of its operands by name, and of its workspace."""

    plan: Plan
    operands: Mapping[str, int]
    workspace: int
    note: StepNote


Work: TypeAlias = Launch | Copy | Multiply


@dataclass
class End:
    """What follows a block: 'branch' to `target` unless the bool at the address in `word` is true, 'jump' to `target`, 'check' (an index out of
    range is an error now), 'end'."""

    kind: str
    word: int = 0
    target: int = 0


@dataclass(frozen=True)
class Block:
    work: tuple[Work, ...]
    end: End


@dataclass(frozen=True)
class Table:
    """`blocks`, of which the first is the entry. Word k is base `bases[k]` of the call plus `offsets[k]`. Bytes of the arena, of scratch, and of
    status words, one set for each of `notes`. `own`: bytes of what has an allocation of its own, instead of an arena. `reach`: for each output, the numbers
    of the notes and of the inputs that it depends on."""

    blocks: tuple[Block, ...]
    bases: np.ndarray
    offsets: np.ndarray
    arena: int
    scratch: int
    status: int
    notes: tuple[Site, ...]
    own: tuple[int, ...]
    reach: tuple[tuple[frozenset[int], tuple[int, ...]], ...]


def build_table(
    program: Program,
    kernels: Mapping[Kernel, LoadedKernel],
    sizes: Mapping[str, int],
    share: bool = True,
    plan: Callable[[Problem], Plan | None] = lambda problem: None,
) -> Table:
    """The table of `program`. Without `share` every temporary is memory of its own. `plan`: how cuBLASLt computes a product."""
    coder = _Coder(program, kernels, sizes, share, plan)
    count = len(program.inputs) + len(program.outputs)
    coder.emit(program, [argument(k) for k in range(count)], 0)
    coder.actions.append(End("end"))
    own = tuple([coder.regions[place] for place in coder.own])
    return Table(
        blocks_of(coder.actions),
        np.array(coder.bases, np.int64),
        np.array(coder.offsets, np.int64),
        coder.layout(program).nbytes if share else 0,
        coder.scratch,
        STATUS_STRIDE * len(coder.notes),
        tuple(coder.notes),
        own,
        reach_of(program, coder.noted),
    )


def reach_of(program: Program, noted: Sequence[int]) -> tuple[tuple[frozenset[int], tuple[int, ...]], ...]:
    """See `Table`. noted: how many notes there are after each item."""
    first = len(program.inputs)
    notes: dict[int, frozenset[int]] = {}
    read: dict[int, frozenset[int]] = {k: frozenset([k]) for k in range(first)}
    before = 0
    for item, after in zip(program.items, noted):
        sources, targets = reads_writes(item)
        own = frozenset(range(before, after)).union(*[notes.get(slot, frozenset()) for slot in sources])
        needs: frozenset[int] = frozenset().union(*[read.get(slot, frozenset()) for slot in sources])
        for slot in targets:
            notes[slot] = notes.get(slot, frozenset()) | own
            read[slot] = read.get(slot, frozenset()) | needs
        before = after
    outputs = range(first, first + len(program.outputs))
    return tuple([(notes.get(slot, frozenset()), tuple(sorted(read.get(slot, ())))) for slot in outputs])


def blocks_of(actions: list[Work | End]) -> tuple[Block, ...]:
    """Actions, in which targets are numbers of actions, as blocks, in which they are numbers of blocks."""
    starts = {0}
    for n, action in enumerate(actions):
        if isinstance(action, End):
            starts.add(n + 1)
            if action.kind in ("branch", "jump"):
                starts.add(action.target)
    starts.discard(len(actions))
    number = {start: n for n, start in enumerate(sorted(starts))}
    blocks: list[Block] = []
    for start in sorted(starts):
        work: list[Work] = []
        n = start
        while True:
            action = actions[n]
            if isinstance(action, End):
                blocks.append(Block(tuple(work), End(action.kind, action.word, number.get(action.target, 0))))
                break
            work.append(action)
            n += 1
            if n in starts:  # a branch comes in here
                blocks.append(Block(tuple(work), End("jump", target=number[n])))
                break
    return tuple(blocks)


class _Coder(Flattener):
    def __init__(
        self,
        program: Program,
        kernels: Mapping[Kernel, LoadedKernel],
        sizes: Mapping[str, int],
        share: bool,
        plan: Callable[[Problem], Plan | None],
    ) -> None:
        super().__init__(sizes, share)
        self.program, self.kernels, self.plan = program, kernels, plan
        self.last_check = max(failing(program.items), default=-1)
        self.actions: list[Work | End] = []
        self.bases: list[int] = []
        self.offsets: list[int] = []
        self.notes: list[Site] = []
        self.noted: list[int] = []  # how many notes there are after each item
        self.own: dict[int, int] = {}  # place -> its base
        self.joined: dict[int, Together] = {}
        self.scratch = 0

    def step(self, step: Step, places: list[int]) -> None:
        loaded, sizes = self.kernels[step.kernel], step.bind(self.sizes)
        found = loaded.library.problem(sizes) if loaded.library is not None and loaded.library.epilogue != "relu slope" else None
        plan = self.plan(found[0]) if found else None
        if found is not None and plan is not None:
            operands = {role: (step.slots[arg], start) for role, (arg, start) in found[1].items()}
            self.multiply(plan, operands, step, places)
            return
        launches = [(f, launch, launch.blocks(sizes)) for f, launch in zip(loaded.functions, loaded.code.launches)]
        launches = [entry for entry in launches if entry[2] > 0]
        if not launches:
            return
        first = len(self.bases)
        for slot in step.slots:
            self.address(places[slot])
        self.word(SCRATCH, 0)
        self.word(STATUS, STATUS_STRIDE * len(self.notes) if step.kernel.sites else 0)
        for size in sizes.values():
            self.word(CONSTANT, size)
        note = StepNote(step, sizes)
        if step.kernel.sites:
            self.notes.append(note)
        self.scratch = max(self.scratch, loaded.code.scratch(sizes))
        last = len(self.bases)
        for function, launch, blocks in launches:
            self.actions.append(Launch(function, blocks, launch.threads, launch.shared(sizes), first, last, note))

    def multiply(self, plan: Plan, operands: Mapping[str, tuple[int, int]], step: Step, places: list[int]) -> None:
        """A product by cuBLASLt. operands: slots, and where in them these start in bytes."""
        words = {role: self.address(places[slot], start) for role, (slot, start) in operands.items()}
        self.scratch = max(self.scratch, plan.workspace)
        self.actions.append(Multiply(plan, words, self.word(SCRATCH, 0), StepNote(step, step.bind(self.sizes))))

    def step_at(self, program: Program, number: int, step: Step, places: list[int]) -> None:
        what = self.together(program).items.get(number)
        if what is None:
            self.step(step, places)
        elif isinstance(what, Joined):
            self.multiply(what.plan, what.operands, step, places)
        elif what.source is not None:
            self.copy_bytes(places[what.source], places[what.target], what.nbytes)

    def extras(self, program: Program) -> Sequence[tuple[int, int, int]]:
        return self.together(program).buffers

    def together(self, program: Program) -> Together:
        found = self.joined.get(id(program))
        if found is None:
            calls = {kernel: x.library for kernel, x in self.kernels.items() if x.library is not None}
            found = self.joined[id(program)] = together(program, calls, self.sizes, self.plan)
        return found

    def copy_bytes(self, source: int, target: int, nbytes: int) -> None:
        if source != target and nbytes:
            self.actions.append(Copy(self.address(target), self.address(source), nbytes))

    def item_done(self, program: Program, number: int) -> None:
        if program is self.program:
            self.noted.append(len(self.notes))
        if program is self.program and number == self.last_check and program.donations:
            self.actions.append(End("check"))

    def branch(self, place: int) -> int:
        self.actions.append(End("branch", self.address(place)))
        return len(self.actions) - 1

    def jump(self, target: int | None = None) -> int:
        self.actions.append(End("jump", target=target or 0))
        return len(self.actions) - 1

    def here(self) -> int:
        return len(self.actions)

    def land(self, label: int) -> None:
        end = self.actions[label]
        assert isinstance(end, End)
        end.target = len(self.actions)

    def address(self, place: int, start: int = 0) -> int:
        """A new word with the address of a place, `start` bytes from its beginning; its number."""
        if place < 0:
            return self.word(ARGUMENTS - 1 - place, start)
        if self.share:
            return self.word(ARENA, place + start)
        first_own = ARGUMENTS + len(self.program.inputs) + len(self.program.outputs)
        return self.word(self.own.setdefault(place, first_own + len(self.own)), start)

    def word(self, base: int, offset: int) -> int:
        self.bases.append(base)
        self.offsets.append(offset)
        return len(self.bases) - 1
