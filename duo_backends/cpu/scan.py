"""Cumulative sums as LLVM text: sequential along one axis, so vectors run over other points where those lie together."""

from __future__ import annotations

from collections.abc import Mapping

from duo_backends.cpu.body import Scope, Value
from duo_backends.cpu.code import KernelCode, Target, no_scratch
from duo_backends.cpu.code import Phase as PhaseCode
from duo_backends.cpu.convert import convert
from duo_backends.cpu.llvm import Module, literal, register_type, splat_literal, vector
from duo_backends.cpu.nest import Phase, ceil_div, lanes_for, points, symbol
from duo_ir.kernels.kernel import Instr, ScanKernel, Store
from duo_ir.types import evaluate

_STRIP_VECTORS = 4  # vectors of points in one work unit


def compile_scan(kernel: ScanKernel, target: Target) -> KernelCode:
    """LLVM text and phases of a ScanKernel. Units: points of `axes`, or strips of the last of them."""
    module = Module()
    name = symbol(kernel, target)
    phase = Phase(module, name, kernel, target)
    f, axes, rank = phase.f, kernel.axes, len(kernel.axes)
    last = axes[-1] if axes else 1
    together = rank > 0 and kernel.source.at.strides[rank - 1] == 1 and kernel.target.at.strides[rank - 1] == 1
    source = _source(kernel)
    width = lanes_for([source], target) if together and not (isinstance(last, int) and last < 4) else 1
    strip = _STRIP_VECTORS * width if width > 1 else 1
    size = phase.e.dim(last)
    strips = f.div(f.add(size, str(strip - 1), f.top), str(strip), f.top)

    with f.loop("%begin", "%end") as units:
        if width == 1:
            _scan(phase, kernel, source, phase.unravel(units.index, axes), 1, None)
        else:
            outer = phase.unravel(f.div(units.index, strips), axes[:-1]) if rank > 1 else []
            unit = f.rem(units.index, strips) if rank > 1 else units.index
            begin = f.mul(unit, str(strip))
            end = f.min(f.add(begin, str(strip)), size)
            phase.over_lanes(
                begin,
                end,
                width,
                lambda index, lanes, mask: _scan(phase, kernel, source, [*outer, index], lanes, mask),
                scalar_tail=not target.has_masks,
            )
    f.finish()

    def units_of(sizes: Mapping[str, int]) -> int:
        if not axes:
            return 1
        return points(axes[:-1], sizes) * ceil_div(evaluate(last, sizes), strip)

    def cost(sizes: Mapping[str, int]) -> float:
        return 20.0 + 2.0 * points([*axes, kernel.length], sizes) / width

    return KernelCode(module.text(), (PhaseCode(name, units_of),), no_scratch, cost)


def _source(kernel: ScanKernel) -> tuple[Instr, ...]:
    """A body whose last value is the element in the accumulator's dtype; what guards exclude counts as zero."""
    dtype = kernel.args[kernel.source.buffer].dtype
    body = [Instr("const", (), dtype, 0), Instr("load", (0,) if kernel.source.guards else (), dtype, kernel.source)]
    if dtype is not kernel.acc:
        body.append(Instr("convert", (1,), kernel.acc))
    return tuple(body)


def _scan(
    phase: Phase, kernel: ScanKernel, source: tuple[Instr, ...], outer: list[str], width: int, mask: str | None
) -> None:
    """One point, or `width` points along the last axis."""
    f, e = phase.f, phase.e
    rank = len(outer)
    row = f.section()
    element = register_type(kernel.acc)
    type_ = vector(width, element)
    zero = splat_literal(width, element, literal(0, kernel.acc))
    with f.loop("0", e.dim(kernel.length), carried=[(type_, zero)]) as loop:
        levels = (*(0 for _ in range(rank)), 1)
        scope = Scope((*outer, loop.index), levels, (row, None), rank - 1 if width > 1 else None, width, mask)
        value = e.emit(source, scope)[-1]
        code = "fadd" if kernel.acc.kind == "f" else "add"
        total = f.op(f"{code} {type_} {loop.values[0]}, {e.splat(scope, value)}")
        loop.next = [total]
        result = kernel.args[kernel.target.buffer].dtype
        stored = convert(f, phase.target, total, kernel.acc, result, width, None)
        e.store(Store(kernel.target, 0), [Value(stored, result, width > 1, 1)], scope)
