"""Running folds as LLVM text: sequential along one axis, so vectors run over other points where those lie together."""

from __future__ import annotations

from collections.abc import Mapping

from duo_backends.cpu.body import Scope, Value
from duo_backends.cpu.code import KernelCode, Target, no_scratch
from duo_backends.cpu.code import Phase as PhaseCode
from duo_backends.cpu.llvm import Module, literal, register_type, splat_literal, vector
from duo_backends.cpu.nest import Phase, ceil_div, lanes_for, points, symbol
from duo_ir.kernels.kernel import Access, ScanKernel
from duo_ir.types import evaluate, product

_STRIP_VECTORS = 4  # vectors of points in one work unit
_POINTS = 4  # points in one work unit, where vectors do not run over them: their steps need not wait for each other
_LONG_STEP = 24  # instructions of a step from which it pays to gather points that lie apart


def compile_scan(kernel: ScanKernel, target: Target) -> KernelCode:
    """LLVM text and phases of a ScanKernel. Units: points of `axes`, or strips of the last of them."""
    module = Module()
    name = symbol(kernel, target)
    phase = Phase(module, name, kernel, target)
    f, axes, rank = phase.f, kernel.axes, len(kernel.axes)
    last = axes[-1] if axes else 1
    # lanes that lie apart cost about as much as the rest of a short step
    together = rank > 0 and (
        len(kernel.body) > _LONG_STEP or all(a.at.strides[rank - 1] == 1 for a in _accesses(kernel))
    )
    width = lanes_for([kernel.body], target) if together and not (isinstance(last, int) and last < 4) else 1
    strip = _STRIP_VECTORS * width if width > 1 else 1
    size = phase.e.dim(last)
    strips = f.div(f.add(size, str(strip - 1), f.top), str(strip), f.top)

    count = product(axes)
    several = _POINTS if width == 1 and isinstance(count, int) and count % _POINTS == 0 else 1

    with f.loop("%begin", "%end") as units:
        if width == 1:
            first = f.mul(units.index, str(several))
            _scan(phase, kernel, [phase.unravel(f.add(first, str(k)), axes) for k in range(several)], 1, None)
        else:
            outer = phase.unravel(f.div(units.index, strips), axes[:-1]) if rank > 1 else []
            unit = f.rem(units.index, strips) if rank > 1 else units.index
            begin = f.mul(unit, str(strip))
            end = f.min(f.add(begin, str(strip)), size)
            phase.over_lanes(
                begin,
                end,
                width,
                lambda index, lanes, mask: _scan(phase, kernel, [[*outer, index]], lanes, mask),
                scalar_tail=not target.has_masks,
            )
    f.finish()
    steps = 1.0 + 0.5 * len(kernel.body)

    def units_of(sizes: Mapping[str, int]) -> int:
        if not axes:
            return 1
        return points(axes[:-1], sizes) * ceil_div(evaluate(last, sizes), strip) // several

    def cost(sizes: Mapping[str, int]) -> float:
        return 20.0 + steps * points([*axes, kernel.length], sizes) / max(width, several)

    return KernelCode(module.text(), (PhaseCode(name, units_of),), no_scratch, cost)


def _accesses(kernel: ScanKernel) -> list[Access]:
    """What is read and written at every element."""
    loads = [instr.attr for instr in kernel.body if isinstance(instr.attr, Access)]
    return [*loads, *[s.access for s in kernel.stores]]


def _scan(phase: Phase, kernel: ScanKernel, places: list[list[str]], width: int, mask: str | None) -> None:
    """These points side by side, each `width` points along the last axis."""
    f, e = phase.f, phase.e
    rank, row, size = len(places[0]), f.section(), len(kernel.start)
    state = [
        (vector(width, register_type(d)), splat_literal(width, register_type(d), literal(number, d)))
        for d, number in kernel.start
    ]
    with f.loop("0", e.dim(kernel.length), carried=state * len(places)) as loop:
        levels = (*(0 for _ in range(rank)), 1)
        following: list[str] = []
        for k, outer in enumerate(places):
            mine = loop.values[k * size : (k + 1) * size]
            scope = Scope((*outer, loop.index), levels, (row, None), rank - 1 if width > 1 else None, width, mask)

            def saved(slot: int, mine: list[str] = mine) -> Value:
                return Value(mine[slot], kernel.start[slot][0], width > 1, 1)

            values = e.emit(kernel.body, scope, saved=saved)
            following += [e.splat(scope, values[n]) for n in kernel.following]
            for store in kernel.stores:
                e.store(store, values, scope)
        loop.next = following
