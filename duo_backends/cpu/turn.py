"""Maps that read across: one load is contiguous along another axis than the stores. Squares of as many rows and columns as a vector has lanes
are loaded by whole vectors and turned in registers; element by element they would be gathered, a load each. Then the body goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from duo_backends.cpu.body import Scope, Value
from duo_backends.cpu.gemm_pack import load_square
from duo_backends.cpu.llvm import memory_type
from duo_backends.cpu.nest import BLOCK, Phase
from duo_ir.kernels.collapse import accesses
from duo_ir.kernels.kernel import Access, Instr, LoopKernel

_LONGEST = 12  # instructions of a body, which is written out for each row of a square


def can_turn(phase: Phase, kernel: LoopKernel, width: int) -> bool:
    """Whether `emit_turn` serves this map, whose last two axes are those it reads across: in each block of columns there is at least a square."""
    across, columns = _across(kernel, width), kernel.axes[-1]
    if across is None or not isinstance(columns, int):
        return False
    if columns % width == 0:
        return True
    (stage,) = kernel.stages
    # The last square overlaps the one before: vectors that need not be aligned, of what may be computed twice (a result may lie where an operand did).
    again = all(_at(i)[-1] == 0 for i in stage.body if i.op == "load" and i is not stage.body[across])
    return again and not phase.e.streams and (width <= columns <= 2 * BLOCK or columns % BLOCK >= width)


def _across(kernel: LoopKernel, width: int) -> int | None:
    """The number of the only load that is contiguous along the rows, in a map whose other accesses are so along the columns, or the same."""
    if len(kernel.stages) != 1 or len(kernel.axes) < 2 or width < 4:
        return None
    (stage,) = kernel.stages
    if len(stage.body) > _LONGEST or stage.reduces or any(i.op == "check" for i in stage.body):
        return None
    if any(access.guards or access.index_strides for access, _ in accesses(stage)):
        return None
    if any(store.access.at.strides[-1] != 1 for store in stage.stores):
        return None
    far = [k for k, i in enumerate(stage.body) if i.op == "load" and _at(i)[-1] not in (0, 1)]
    if len(far) != 1 or _at(stage.body[far[0]])[-2] != 1:
        return None
    return far[0] if stage.body[far[0]].dtype.itemsize in (4, 8) else None


def _at(load: Instr) -> tuple:
    assert isinstance(load.attr, Access)
    return load.attr.at.strides


def emit_turn(
    phase: Phase, kernel: LoopKernel, width: int, outer: Sequence[str], rows: tuple[str, int], columns: tuple[str, str]
) -> None:
    """The points of `rows` (the first, and how many: a multiple of `width`) and columns. The last square ends where the columns end."""
    f, e = phase.f, phase.e
    (stage,) = kernel.stages
    across = _across(kernel, width)
    assert across is not None
    load = stage.body[across]
    access, dtype = load.attr, load.dtype
    assert isinstance(access, Access)
    body = (*stage.body[:across], replace(load, op="acc", attr=None), *stage.body[across + 1 :])
    apart = f.mul(e.dim(access.at.strides[-1]), str(dtype.itemsize), f.top)
    section = f.section()
    axis, levels = len(outer) + 1, (*(1 for _ in outer), 2, 2)
    first, count = rows
    with f.loop(*columns, width, runs=True) as loop:
        column = f.min(loop.index, f.sub(columns[1], str(width)))
        for start in range(0, count, width):
            row = f.add(first, str(start))
            at, _, _ = e.affine(Scope.flat((*outer, row, column)), access.at)
            source = f.gep(memory_type(dtype), e.pointers[access.buffer], at)
            lanes = [f.gep("i8", source, f.mul(apart, str(lane))) for lane in range(width)]
            for number, vector in enumerate(load_square(f, phase.target, lanes, dtype, dtype)):
                indices = (*outer, f.add(row, str(number)), column)
                scope = Scope(indices, levels, (f.top, section, None), axis, width, None)
                values = e.emit(body, scope, acc=Value(vector, dtype, True, 2))
                for store in stage.stores:
                    e.store(store, values, scope)
