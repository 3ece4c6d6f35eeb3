"""Products that cuBLASLt computes together with other steps of a program: the gradient of a ReLU, of which it wants a mask that the product before
the ReLU has written; and the gradient of a bias, sums of what a product reads or writes.

Found when sizes are known, among the steps of one program, and only where the library has a plan for it. Other steps stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from duo_backends.binding import kernels_of
from duo_backends.cuda.blas import MASK_LINE, Layout, Plan, Problem
from duo_backends.cuda.code import ceil_div
from duo_backends.cuda.library import ALIGNED, DTYPES, LibraryCall
from duo_ir.core import function_of
from duo_ir.kernels.kernel import Access, Affine, Body, Kernel, LoopKernel
from duo_ir.kernels.program import Program, Step, reads_writes
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import lower
from duo_ir.types import DType, TensorType, evaluate

Place: TypeAlias = tuple[int, int]  # a slot, and a byte in it


@dataclass(frozen=True)
class Joined:
    """A product, and where its operands are."""

    plan: Plan
    operands: Mapping[str, Place]


@dataclass(frozen=True)
class Done:
    """A step whose results a product has computed, or will have: bytes to be copied from the slot `source`, if any, to `target`."""

    source: int | None = None
    target: int = 0
    nbytes: int = 0


@dataclass
class Together:
    """What becomes of items, by number; the others stay. `buffers`: bytes, first and last item of extra slots, which follow those of the program."""

    items: dict[int, Joined | Done] = field(default_factory=dict)
    buffers: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class _Call:
    """A product of the program, as it is for now."""

    problem: Problem
    operands: dict[str, Place]


@dataclass(frozen=True)
class _Sums:
    """sums[column] = the sum of matrix[row, column] over all rows, `ld` elements apart."""

    matrix: Place
    sums: int
    rows: int
    columns: int
    ld: int
    dtype: DType


def together(
    program: Program, calls: Mapping[Kernel, LibraryCall], sizes: Mapping[str, int], plan: Callable[[Problem], Plan | None]
) -> Together:
    """What cuBLASLt computes together in the program. `plan`: how it computes a product, if it does."""
    found: dict[int, _Call] = {}
    for number, item in enumerate(program.items):
        call = calls.get(item.kernel) if isinstance(item, Step) else None
        problem = call.problem(item.bind(sizes)) if call and isinstance(item, Step) else None
        if problem is not None:
            operands = {role: (item.slots[arg], start) for role, (arg, start) in problem[1].items()}  # type: ignore[union-attr]
            found[number] = _Call(problem[0], operands)
    return _Joiner(program, found, sizes, plan).run() if found else Together()


class _Joiner:
    def __init__(
        self, program: Program, calls: dict[int, _Call], sizes: Mapping[str, int], plan: Callable[[Problem], Plan | None]
    ) -> None:
        self.program, self.calls, self.sizes, self.plan = program, calls, sizes, plan
        self.out = Together()
        self.slots = len(program.inputs) + len(program.outputs) + len(program.temps)
        self.reads: list[tuple[int, ...]] = []
        self.writers: dict[int, list[int]] = {}
        for number, item in enumerate(program.items):
            reads, writes = reads_writes(item)
            self.reads.append(reads)
            for slot in writes:
                self.writers.setdefault(slot, []).append(number)

    def run(self) -> Together:
        masked: dict[int, int] = {}  # product -> slot of its mask
        for number in [n for n, call in self.calls.items() if call.problem.epilogue == "relu slope"]:
            self._mask(number, masked)
        for number, item in enumerate(self.program.items):
            sums = _sums(item, self.sizes) if isinstance(item, Step) else None
            if sums is not None:
                self._add_up(number, sums)
        return self.out

    def _buffer(self, nbytes: int, first: int, last: int) -> int:
        """A new slot."""
        self.out.buffers.append((nbytes, first, last))
        return self.slots + len(self.out.buffers) - 1

    def _join(self, number: int, problem: Problem, **more: Place) -> bool:
        """Makes the product that one; whether the library can."""
        plan = self.plan(problem)
        if plan is not None:
            call = self.calls[number]
            call.problem = problem
            call.operands.update(more)
            self.out.items[number] = Joined(plan, call.operands)
        return plan is not None

    def _only_writer(self, slot: int) -> int | None:
        writers = self.writers.get(slot, [])
        return writers[0] if len(writers) == 1 else None

    # ------------------------------------------------------------------------------------------------------------ ReLU
    def _mask(self, number: int, masked: dict[int, int]) -> None:
        """The product of the gradient reads a mask, where one that precedes it can write that."""
        slope = self.calls[number]
        writer = self._only_writer(slope.operands["aux"][0])
        before = self.calls.get(writer) if writer is not None and writer < number else None
        if writer is None or before is None or before.problem.epilogue not in ("relu", "relu bias", "relu mask", "relu bias mask"):
            return
        p = slope.problem
        if before.operands["d"] != slope.operands["aux"] or (p.batch, p.m, p.n, p.aux) != (1, before.problem.m, before.problem.n, before.problem.d):
            return
        bits = Layout(ceil_div(p.n, MASK_LINE) * MASK_LINE)
        if self.plan(replace(p, aux=bits)) is None:
            return
        if writer not in masked:
            slot = self._buffer(p.m * bits.ld // 8, writer, number)
            if not self._join(writer, replace(before.problem, epilogue=f"{before.problem.epilogue} mask", aux=bits), aux=(slot, 0)):
                self.out.buffers.pop()
                return
            masked[writer] = slot
        slot = masked[writer]
        nbytes, first, last = self.out.buffers[slot - self.slots]
        self.out.buffers[slot - self.slots] = nbytes, first, max(last, number)
        self._join(number, replace(p, aux=bits), aux=(slot, 0))

    # ------------------------------------------------------------------------------------------------------------ sums
    def _add_up(self, number: int, sums: _Sums) -> None:
        """A product does what that step does, where one that reads or writes the matrix can."""
        for other, epilogue in self._candidates(sums):
            problem = replace(self.calls[other].problem, epilogue=epilogue)
            if problem.result is not sums.dtype or self.plan(problem) is None:
                continue
            nbytes = sums.columns * sums.dtype.itemsize
            if other < number:  # the slot's memory is not its own yet
                slot = self._buffer(nbytes, other, number)
                self.out.items[number] = Done(slot, sums.sums, nbytes)
            elif any(sums.sums in reads for reads in self.reads[number + 1 : other + 1]):
                continue
            else:
                slot = sums.sums
                self.out.items[number] = Done()
            self._join(other, problem, sums=(slot, 0))
            return

    def _candidates(self, sums: _Sums) -> Iterator[tuple[int, str]]:
        """Products and what they would be."""
        writers = self.writers.get(sums.matrix[0], [])
        if len(writers) > 1:
            return
        for other, call in self.calls.items():
            p, at = call.problem, call.operands
            if p.batch != 1:
                continue
            whole = (sums.matrix, sums.rows, sums.columns, sums.ld)
            if p.epilogue == "none" and "c" not in at:
                if p.a.turned and (at["a"], p.k, p.m, p.a.ld) == whole:
                    yield other, "a sums"
                if not p.b.turned and (at["b"], p.k, p.n, p.b.ld) == whole:
                    yield other, "b sums"
            joined = p.epilogue == "gelu slope" or (p.epilogue == "relu slope" and other in self.out.items)
            if joined and (at["d"], p.m, p.n, p.d.ld) == whole:
                yield other, f"{p.epilogue} sums"


@functools.cache
def _sum_of_rows(dtype: DType) -> LoopKernel:
    """The kernel that adds up the rows of a matrix."""
    (kernel,) = kernels_of(lower(function_of(lambda x: nd.sum(x, (0,)), TensorType(dtype, (6, 8)))))
    assert isinstance(kernel, LoopKernel)
    return kernel


def _sums(step: Step, sizes: Mapping[str, int]) -> _Sums | None:
    """The step as sums of rows; None where it is anything else."""
    kernel = step.kernel
    if not isinstance(kernel, LoopKernel) or len(kernel.args) != 2 or kernel.args[0].dtype not in DTYPES:
        return None
    like = _sum_of_rows(kernel.args[0].dtype)
    if [_shape(kernel), [a.dtype for a in kernel.args]] != [_shape(like), [a.dtype for a in like.args]]:
        return None
    (read,), (store,) = [i.attr for i in kernel.stages[0].body if i.op == "load"], kernel.stages[1].stores
    assert isinstance(read, Access)
    sizes = step.bind(sizes)
    at, to = _numbers(read.at, sizes), _numbers(store.access.at, sizes)
    start = at[0] * kernel.args[0].dtype.itemsize
    if len(at) != 3 or at[1] != 1 or to != (0, 1) or start % ALIGNED:
        return None
    (columns,), (rows,) = kernel.axes, kernel.stages[0].axes
    source, target = step.slots[read.buffer], step.slots[store.access.buffer]
    return _Sums((source, start), target, evaluate(rows, sizes), evaluate(columns, sizes), at[2], kernel.args[1].dtype)


def _numbers(at: Affine, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Offset and strides."""
    return tuple([evaluate(d, sizes) for d in (at.offset, *at.strides)])


def _shape(kernel: LoopKernel) -> object:
    """A kernel without its sizes and positions."""

    def body(given: Body) -> Sequence[object]:
        return [(i.op, i.args, i.dtype, _guards(i.attr) if isinstance(i.attr, Access) else i.attr) for i in given]

    return len(kernel.axes), [
        (len(s.axes), body(s.body), [(x.value, x.indices, _guards(x.access)) for x in s.stores], s.reduces) for s in kernel.stages
    ]


def _guards(access: Access) -> object:
    return access.buffer, access.guards, access.index_strides
