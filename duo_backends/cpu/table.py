"""A Program with known sizes as the flat table that the native runner walks (layout in `runner_text.py`).

`duo_backends/flat.py` flattens control flow and lays out the arena; here are the words for each thing it asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from duo_backends.cpu.bound import Note, Table
from duo_backends.cpu.code import KernelCode, no_scratch
from duo_backends.cpu.pool_text import MAX_THREADS
from duo_backends.cpu.runner_text import BRANCH, CODE_WORDS, END, FRAME_HEADER, JUMP, PHASE
from duo_backends.flat import Flattener, StepNote, argument
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Program, Step

SERIAL_NANOSECONDS = 50_000  # a phase below this is not worth waking threads for
SHARE_NANOSECONDS = 20_000  # least work for one thread of a parallel phase
EAGER_NANOSECONDS = 2_500  # a phase below this is not worth telling threads that spin already
EAGER_SHARE_NANOSECONDS = 1_250
COPY_UNIT = 1 << 18  # bytes, of `duo_copy`
COPY_NANOSECONDS = 0.1  # a byte


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel's code and the addresses of its phases. `library` keeps the code loaded."""

    code: KernelCode
    addresses: tuple[int, ...]
    library: object


class _Coder(Flattener):
    """`copy`: the address of duo_copy; `base`: the frame's offset of the first pointer word."""

    def __init__(self, kernels: Mapping[Kernel, LoadedKernel], sizes: Mapping[str, int], copy: int, base: int) -> None:
        super().__init__(sizes)
        self.kernels, self.copy, self.base = kernels, copy, base
        self.code: list[list[int]] = []
        self.notes: list[Note | None] = []
        self.places: list[int] = []
        self.dims: list[int] = []
        self.users: list[tuple[KernelCode, Mapping[str, int], int]] = []
        self.cost = 0.0

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
                threads = threads_for(cost, n)
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
        self.add([PHASE, self.copy, args, dims, units, *threads_for(cost, units)])

    def branch(self, place: int) -> int:
        return self.add([BRANCH, self.pointers([place]), 0])

    def jump(self, target: int | None = None) -> int:
        return self.add([JUMP, target or 0])

    def here(self) -> int:
        return len(self.code)

    def land(self, label: int) -> None:
        words = self.code[label]
        words[2 if words[0] == BRANCH else 1] = len(self.code)

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


THREAD_LIMITS = (SERIAL_NANOSECONDS, SHARE_NANOSECONDS, EAGER_NANOSECONDS, EAGER_SHARE_NANOSECONDS, MAX_THREADS)


def threads_for(cost: float, units: int) -> tuple[int, int]:
    """How many threads to use at most: in any case, and while all workers are awake."""
    patient = 1 if cost < SERIAL_NANOSECONDS else math.trunc(cost / SHARE_NANOSECONDS)
    eager = 1 if cost < EAGER_NANOSECONDS else math.trunc(cost / EAGER_SHARE_NANOSECONDS)
    return min(units, patient, MAX_THREADS), min(units, max(patient, eager), MAX_THREADS)
