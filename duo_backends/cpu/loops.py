"""Loop kernels as LLVM text: chooses how a kernel is vectorised, and emits maps.

Three forms: *map* (no inner axes; vectors run along the outer axis that accesses like best), *rows* (each outer point
runs its stages along the inner axes; `rows.py`) and *columns* (vectors run along an outer axis while inner axes are
walked one by one; `columns.py`). All give the same bits; the choice is by estimated memory cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from duo_backends.cpu.body import Scope
from duo_backends.cpu.chains import side_by_side
from duo_backends.cpu.code import KernelCode, Target, no_scratch
from duo_backends.cpu.code import Phase as PhaseCode
from duo_backends.cpu.columns import compile_columns
from duo_backends.cpu.llvm import Module, is_literal
from duo_backends.cpu.nest import BLOCK, Phase, ceil_div, lanes_for, points, symbol, together
from duo_backends.cpu.rows import compile_rows
from duo_backends.cpu.stream import with_streams
from duo_backends.cpu.turn import can_turn, emit_turn
from duo_ir.kernels.collapse import accesses, move_axis_last, reorder, simplify
from duo_ir.kernels.kernel import LoopKernel, Stage
from duo_ir.types import DimLike, evaluate, product

_TILE = 16  # rows of a tile: the elements of a cache line of f32
_FAR_FROM = 1 << 18  # elements from which cache lines are asked for early where several vectors are computed as one,
_AHEAD = 512  # and how many elements early
_FAR = 6.0  # cost of an element fetched by itself, in elements of a contiguous vector access


def compile_loop(kernel: LoopKernel, target: Target) -> KernelCode:
    """LLVM text and phases of a LoopKernel."""
    name = symbol(kernel, target)
    cost = _cost(kernel, target)
    plain = simplify(kernel)
    if all(not s.axes and not s.reduces for s in plain.stages):
        return _compile_map(_best_axis_last(plain, target), target, name, cost)
    column = _column_axis(plain, target)
    if column is not None:
        return compile_columns(move_axis_last(plain, column), target, name, cost)
    return compile_rows(plain, target, name, cost)


# ------------------------------------------------------------------------------------------------------- choices
def _access_cost(stage: Stage, axis: int) -> float:
    """Cost of one point of a stage when the vectors run along `axis` (a position in its scope)."""
    total = 0.25 * len(stage.body)
    for access, is_store in accesses(stage):
        stride = access.at.strides[axis]
        far = stride not in (0, 1, -1)
        total += _FAR if far else 1.0 if stride != 0 else 0.5
        if is_store and far:
            total += _FAR
    return total


def _fill(size: DimLike, width: int) -> float:
    """How much wider than its live lanes a vector along an axis of this size is."""
    if not isinstance(size, int):
        return 1.0
    return ceil_div(max(size, 1), width) * width / max(size, 1)


def _best_axis_last(kernel: LoopKernel, target: Target) -> LoopKernel:
    if len(kernel.axes) < 2:
        return kernel
    width = lanes_for([s.body for s in kernel.stages], target)

    def cost(axis: int) -> tuple[float, int]:
        return sum(_access_cost(s, axis) for s in kernel.stages) * _fill(kernel.axes[axis], width), -axis

    best = min(range(len(kernel.axes)), key=cost)
    return simplify(move_axis_last(kernel, best)) if best != len(kernel.axes) - 1 else kernel


def _column_axis(kernel: LoopKernel, target: Target) -> int | None:
    """The outer axis to run vectors along, where that beats running them along the inner ones."""
    if not kernel.axes:
        return None
    outer = len(kernel.axes)
    width = lanes_for([s.body for s in kernel.stages], target)

    def weight(stage: Stage) -> float:
        total = 1.0
        for d in stage.axes:
            total *= d if isinstance(d, int) else 256
        return max(total, 1.0)

    rows = 0.0
    for stage in kernel.stages:
        if not stage.axes:
            rows += 4.0 * len(stage.body)
            continue
        fill = _fill(stage.axes[-1], 16 if stage.reduces else width)
        rows += weight(stage) * _access_cost(stage, outer + len(stage.axes) - 1) * fill + 40.0
    columns = {}
    for axis, size in enumerate(kernel.axes):
        total = 0.0
        for stage in kernel.stages:
            total += weight(stage) * (_access_cost(stage, axis) + 1.5 * len(stage.reduces))
        columns[axis] = total * _fill(size, width)
    best = min(columns, key=lambda k: (columns[k], -k))
    return best if columns[best] < rows else None


def _cost(kernel: LoopKernel, target: Target) -> Callable[[Mapping[str, int]], float]:
    """Nanoseconds: about 4 instructions of a full vector each nanosecond, and 40 bytes of memory."""
    width = lanes_for([s.body for s in kernel.stages], target)
    work = []
    for stage in kernel.stages:
        size = sum(kernel.args[a.buffer].dtype.itemsize for a, _ in accesses(stage))
        work.append((stage.axes, len(stage.body) / (4.0 * width) + size / 40.0))

    def cost(sizes: Mapping[str, int]) -> float:
        outer = points(kernel.axes, sizes)
        return 20.0 + outer * sum(points(axes, sizes) * each for axes, each in work)

    return cost


# ---------------------------------------------------------------------------------------------------------- maps
def _compile_map(kernel: LoopKernel, target: Target, name: str, cost: Any) -> KernelCode:
    partner = _tile_axis(kernel)
    tiled = partner is not None
    if partner is not None:
        rest = [k for k in range(len(kernel.axes) - 1) if k != partner]
        kernel = reorder(kernel, [*rest, partner, len(kernel.axes) - 1])
    module = Module()
    with_streams(module, name, kernel, target, lambda phase: _emit_map(phase, kernel, tiled))
    axes = kernel.axes

    def units_of(sizes: Mapping[str, int]) -> int:
        if not axes:
            return 1
        last = evaluate(axes[-1], sizes)
        rows = points(axes[:-1], sizes)
        if tiled:
            rows = points(axes[:-2], sizes) * ceil_div(evaluate(axes[-2], sizes), _TILE)
        if len(axes) > 1 and isinstance(axes[-1], int) and last <= 2 * BLOCK:
            return rows * (last > 0)
        return rows * ceil_div(last, BLOCK)

    return KernelCode(module.text(), (PhaseCode(name, units_of),), no_scratch, cost)


def _emit_map(phase: Phase, kernel: LoopKernel, tiled: bool) -> None:
    f, e, axes = phase.f, phase.e, kernel.axes
    if not axes:
        with f.loop("%begin", "%end"):
            _emit_point(phase, kernel, Scope((), (), (f.section(),)))
        f.finish()
        return
    width = lanes_for([s.body for s in kernel.stages], phase.target)
    inner = e.dim(axes[-1])
    if len(axes) == 1:
        begin = f.mul("%begin", str(BLOCK))
        end = f.min(f.mul("%end", str(BLOCK)), inner)
        _emit_row(phase, kernel, width, [], begin, end)
    else:
        blocks = f.div(f.add(inner, str(BLOCK - 1), f.top), str(BLOCK), f.top)
        if is_literal(inner) and int(inner) <= 2 * BLOCK:
            blocks = "1"
        with f.loop("%begin", "%end") as units:
            block = f.rem(units.index, blocks)
            begin = f.mul(block, str(BLOCK))
            end = inner if blocks == "1" else f.min(f.add(begin, str(BLOCK)), inner)
            if tiled:
                size = e.dim(axes[-2])
                tiles = f.div(f.add(size, str(_TILE - 1), f.top), str(_TILE), f.top)
                number = f.div(units.index, blocks)
                outer = phase.unravel(f.div(number, tiles), axes[:-2]) if len(axes) > 2 else []
                first = f.mul(f.rem(number, tiles) if len(axes) > 2 else number, str(_TILE))
                last = f.min(f.add(first, str(_TILE)), size)
                if can_turn(phase, kernel, width):
                    whole = f.op(f"icmp eq i64 {f.sub(last, first)}, {_TILE}")
                    with f.when(whole):
                        emit_turn(phase, kernel, width, outer, (first, _TILE), (begin, end))
                    with f.when(f.op(f"xor i1 {whole}, true")):
                        _emit_tile(phase, kernel, width, outer, (first, last), (begin, end))
                else:
                    _emit_tile(phase, kernel, width, outer, (first, last), (begin, end))
            else:
                outer = phase.unravel(f.div(units.index, blocks), axes[:-1])
                _emit_row(phase, kernel, width, outer, begin, end)
    f.finish()


def _tile_axis(kernel: LoopKernel) -> int | None:
    """An axis along which some access is contiguous that is far along the last: the two are walked in tiles, so that
    every cache line is used whole while it is near."""
    rank = len(kernel.axes)
    for axis in range(rank - 1):
        size = kernel.axes[axis]
        if isinstance(size, int) and size < 4:
            continue
        for stage in kernel.stages:
            for access, _ in accesses(stage):
                if access.at.strides[axis] in (1, -1) and access.at.strides[rank - 1] not in (0, 1, -1):
                    return axis
    return None


def _emit_tile(
    phase: Phase, kernel: LoopKernel, width: int, outer: Sequence[str], rows: tuple[str, str], columns: tuple[str, str]
) -> None:
    """The points rows x columns of the last two axes: all rows for one vector of columns, then the next vector."""
    f = phase.f
    axis = len(outer) + 1
    start = f.section()
    levels = (*(1 for _ in outer), 2, 2)

    def emit(index: str, lanes: int, mask: str | None) -> None:
        with f.loop(*rows) as loop:
            scope = Scope(
                (*outer, loop.index, index), levels, (f.top, start, None), axis if lanes > 1 else None, lanes, mask
            )
            _emit_point(phase, kernel, scope)

    phase.over_lanes(*columns, width, emit, scalar_tail=not phase.target.has_masks)


def _emit_row(phase: Phase, kernel: LoopKernel, width: int, outer: Sequence[str], begin: str, end: str) -> None:
    """The points [begin, end) of the last axis."""
    f = phase.f
    axis = len(outer)
    row = f.section()
    levels = (*(1 for _ in outer), 2)

    def emit(index: str, lanes: int, mask: str | None) -> None:
        scope = Scope((*outer, index), levels, (f.top, row, None), axis if lanes > 1 else None, lanes, mask)
        if lanes > width and far:
            for stage in kernel.stages:
                phase.e.prefetch(stage.body, scope, axis, _AHEAD)
        _emit_point(phase, kernel, scope)

    size = product(kernel.axes)
    far = isinstance(size, int) and size >= _FAR_FROM
    count = min(together(stage, axis, size) for stage in kernel.stages)
    if sum(i.op == "load" for stage in kernel.stages for i in stage.body) == 1:
        count = count * 2 if count > 1 else 1  # there are registers for more
    if count > 1:
        kernel = replace(kernel, stages=tuple([side_by_side(stage) for stage in kernel.stages]))
    phase.over_lanes(begin, end, width, emit, scalar_tail=not phase.target.has_masks, together=count)


def _emit_point(phase: Phase, kernel: LoopKernel, scope: Scope) -> None:
    for stage in kernel.stages:
        values = phase.e.emit(stage.body, scope)
        for store in stage.stores:
            phase.e.store(store, values, scope)
