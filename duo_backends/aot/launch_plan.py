"""A Program as what a GPU is given, for all values of its free dims: the JSON that a `.duo` file keeps as its launch plan.

`duo_backends/cuda/work.py` does the same for sizes that are known; `launches.py` reads it. For each program:

    name, dims      as in the manifest               least       the least value of each free size
    nodes           expressions (`formulas.py`); a number below may be [n], node n
    signed, single  numbers that must not be negative, nor 1 (columns of products, which would be added up in another order)
    special         [number of a program, {size: value}]: which runs instead, with the same arguments, where sizes are these
    params          where each argument comes from: ["input", k], ["weight", name], ["state", name]
    inputs, outputs of the program: [dtype, [sizes]]  results     [slot, "output" or "state", its name]
    arena, scratch  bytes                            notes       [the user's line, [what an index error says]] of steps that check
    reach           of each output the [numbers of notes], [numbers of inputs] that it depends on
    steps           [the user's line, kind of kernel, flops (0: not told), bytes of traffic] for profiles
    words           [base, offset]: base 0 a number itself, 1 the arena, 2 scratch, 3 status words, 4 + k argument k
    code            ["launch", module, symbol, blocks, threads, shared bytes, first word, end, step], ["copy", target word, source word, bytes],
                    ["branch", word, target], ["jump", target], ["check"], ["end"], which comes last; a target is a number of code
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from duo_backends.aot.formulas import Writer
from duo_backends.aot.limits import signed_dims
from duo_backends.aot.plan import FreeFlattener
from duo_backends.aot.sizes import dim, larger, traced
from duo_backends.aot.source import ProgramSource
from duo_backends.aot.special import free_columns
from duo_backends.cuda.code import KernelCode
from duo_backends.cuda.work import ARENA, ARGUMENTS, CONSTANT, SCRATCH, STATUS, STATUS_STRIDE, reach_of
from duo_backends.flat import argument
from duo_ir.errors import ArgumentError
from duo_ir.kernels.checks import failing
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Cond, Program, Step, While
from duo_ir.kernels.work import flops, traffic
from duo_ir.types import DimLike, TensorType, evaluate


@dataclass(frozen=True)
class Placed:
    """A kernel's code, and the number of the module that it is in."""

    code: KernelCode
    module: int


def launch_plan(
    source: ProgramSource, program: Program, kernels: Mapping[Kernel, Placed], special: Sequence[Any]
) -> dict[str, Any]:
    """The plan of `program`, which `source` was lowered to; `special`: numbers of the programs that run instead, and their sizes. Raises ArgumentError for kernels whose sizes cannot be told from free dims."""
    coder = _Coder(program, kernels)
    count = len(program.inputs) + len(program.outputs)
    coder.emit(program, [argument(k) for k in range(count)], 0)
    coder.code.append(["end"])
    put, given = coder.put, [port.name for port in source.params if port.kind == "input"]
    known = {name: dim(name) for name in program.dims}

    def size(d: DimLike) -> Any:
        return put(evaluate(d, known))  # type: ignore[arg-type]

    def row(type: TensorType) -> list[Any]:
        return [type.dtype.name, [size(d) for d in type.shape]]

    return {
        "name": source.name,
        "dims": list(source.dims),
        "least": {**dict.fromkeys(source.dims, 0), **source.least},
        "signed": [size(d) for d in signed_dims(source.function)],
        "single": [size(d) for d in free_columns(source.function)],
        "special": special,
        "params": [["input", given.index(p.name)] if p.kind == "input" else [p.kind, p.name] for p in source.params],
        "inputs": [row(t) for t in program.inputs],
        "outputs": [row(t) for t in program.outputs],
        "results": [[slot, port.kind, port.name] for slot, port in zip(program.results, source.results)],
        "arena": put(coder.layout(program).nbytes),
        "scratch": put(larger(0, *coder.scratch)),
        "notes": coder.notes,
        "reach": [[sorted(notes), list(inputs)] for notes, inputs in reach_of(program, coder.noted)],
        "steps": coder.steps,
        "words": coder.words,
        "code": coder.code,
        "nodes": put.nodes,
    }


def steps_of(program: Program) -> Iterator[Step]:
    """All steps of a program and of those nested in it."""
    for item in program.items:
        if isinstance(item, Step):
            yield item
        elif isinstance(item, Cond):
            yield from steps_of(item.then)
            yield from steps_of(item.orelse)
        elif isinstance(item, While):
            yield from steps_of(item.test)
            yield from steps_of(item.body)


def _told(count: Callable[[], Any]) -> Any:
    """What a profile says of a step's work: 0 where that is no expression of sizes (the pairs of causal attention, say)."""
    try:
        return traced(count)
    except ArgumentError:
        return 0


class _Coder(FreeFlattener):
    def __init__(self, program: Program, kernels: Mapping[Kernel, Placed]) -> None:
        super().__init__(program)
        self.program, self.kernels, self.put = program, kernels, Writer()
        self.last_check = max(failing(program.items), default=-1)
        self.code: list[list[Any]] = []
        self.words: list[list[Any]] = []
        self.notes: list[list[Any]] = []
        self.noted: list[int] = []  # how many notes there are after each item
        self.steps: list[list[Any]] = []
        self.scratch: list[Any] = []

    def step(self, step: Step, places: list[Any]) -> None:
        placed, sizes = self.kernels[step.kernel], step.bind(self.sizes)
        launches = [
            (traced(partial(x.blocks, sizes)), traced(partial(x.shared, sizes)), x) for x in placed.code.launches
        ]
        launches = [row for row in launches if not (row[0].__class__ is int and row[0] == 0)]
        if not launches:
            return
        first = len(self.words)
        for slot in step.slots:
            self.address(places[slot])
        self.word(SCRATCH, 0)
        self.word(STATUS, STATUS_STRIDE * len(self.notes) if step.kernel.sites else 0)
        for size in sizes.values():
            self.word(CONSTANT, size)
        if step.kernel.sites:
            self.notes.append([step.where, list(step.kernel.sites)])
        self.scratch.append(traced(partial(placed.code.scratch, sizes)))
        work = [self.put(_told(partial(count, step.kernel, sizes))) for count in (flops, traffic)]
        self.steps.append([step.where, type(step.kernel).__name__, *work])
        end, number = len(self.words), len(self.steps) - 1
        for blocks, shared, x in launches:
            row = [placed.module, x.symbol, self.put(blocks), x.threads, self.put(shared), first, end, number]
            self.code.append(["launch", *row])

    def copy_bytes(self, source: Any, target: Any, nbytes: Any) -> None:
        if source != target and not (nbytes.__class__ is int and nbytes == 0):
            self.code.append(["copy", self.address(target), self.address(source), self.put(nbytes)])

    def item_done(self, program: Program, number: int) -> None:
        if program is not self.program:
            return
        self.noted.append(len(self.notes))
        if number == self.last_check and program.donations:
            self.code.append(["check"])

    def branch(self, place: Any) -> int:
        self.code.append(["branch", self.address(place), 0])
        return len(self.code) - 1

    def jump(self, target: int | None = None) -> int:
        self.code.append(["jump", target or 0])
        return len(self.code) - 1

    def here(self) -> int:
        return len(self.code)

    def land(self, label: int) -> None:
        self.code[label][-1] = len(self.code)

    def address(self, place: Any) -> int:
        """A new word with the address of a place; its number."""
        if place.__class__ is int and place < 0:
            return self.word(ARGUMENTS - 1 - place, 0)
        return self.word(ARENA, place)

    def word(self, base: int, offset: Any) -> int:
        self.words.append([base, self.put(offset)])
        return len(self.words) - 1
