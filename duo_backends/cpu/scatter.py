"""Scatter as LLVM text: a parallel copy of the base, then the updates.

Window points are independent and run in parallel, as vectors along the last window axis; for each of them the update
points follow one another in row-major order, so that sums have one order whatever the threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from duo_backends.cpu.body import Scope, Value
from duo_backends.cpu.code import KernelCode, Target, no_scratch
from duo_backends.cpu.code import Phase as PhaseCode
from duo_backends.cpu.convert import convert
from duo_backends.cpu.llvm import Module, Region, memory_type, register_type, vector
from duo_backends.cpu.nest import Phase, ceil_div, lanes_for, points, symbol
from duo_ir.kernels.collapse import move_axis_last, rewrite_stage, simplify
from duo_ir.kernels.kernel import Affine, LoopKernel, ScatterKernel, Stage
from duo_ir.types import DType, bool_, evaluate, f32

_COPY_BYTES = 16384  # a work unit of the copy
_STRIP_VECTORS = 8  # vectors of window points in a work unit


def compile_scatter(kernel: ScatterKernel, target: Target) -> KernelCode:
    """LLVM text and phases of a ScatterKernel."""
    module = Module()
    name = symbol(kernel, target)
    dtype = kernel.args[-1].dtype
    block = _COPY_BYTES // dtype.itemsize
    _emit_copy(Phase(module, f"{name}_1", kernel, target), kernel, block)
    plan = _Updates(Phase(module, f"{name}_2", kernel, target), kernel)
    plan.emit()

    def copies(sizes: Mapping[str, int]) -> int:
        return ceil_div(evaluate(kernel.size, sizes), block)

    def cost(sizes: Mapping[str, int]) -> float:
        size, updates = evaluate(kernel.size, sizes), points(kernel.axes, sizes)
        return 40.0 + size * dtype.itemsize / 20.0 + updates * (1.0 + 8.0 / plan.width)

    phases = (PhaseCode(f"{name}_1", copies), PhaseCode(f"{name}_2", plan.units))
    return KernelCode(module.text(), phases, no_scratch, cost)


def _emit_copy(phase: Phase, kernel: ScatterKernel, block: int) -> None:
    """out[begin*block : end*block] = base[...], unless they are the same memory."""
    f, e = phase.f, phase.e
    base, out = e.pointers[0], e.pointers[-1]
    element = memory_type(kernel.args[-1].dtype)
    align = kernel.args[-1].dtype.itemsize
    width = phase.target.vector_bytes // align
    begin = f.mul("%begin", str(block))
    end = f.min(f.mul("%end", str(block)), e.dim(kernel.size))
    with f.when(f.op(f"icmp ne ptr {base}, {out}")):

        def move(index: str, lanes: int, mask: str | None) -> None:
            type_ = vector(lanes, element)
            value = f.op(f"load {type_}, ptr {f.gep(element, base, index)}, align {align}")
            f.emit(f"store {type_} {value}, ptr {f.gep(element, out, index)}, align {align}")

        phase.over_lanes(begin, end, width, move, scalar_tail=True)
    f.finish()


def _as_loops(kernel: ScatterKernel) -> LoopKernel:
    """Window axes outside, update axes inside, in their simplest form."""
    n, s = len(kernel.axes), kernel.sequential
    order = [*range(s, n), *range(s)]
    stage = Stage(kernel.axes[:s], kernel.body, (kernel.store,))
    stage = rewrite_stage(stage, stage.axes, lambda a: Affine(a.offset, tuple(a.strides[k] for k in order)))
    plain = simplify(LoopKernel(kernel.args, kernel.axes[s:], (stage,), kernel.dims))
    if len(plain.axes) < 2:
        return plain
    strides = plain.stages[0].stores[0].access.at.strides
    near = [k for k in range(len(plain.axes)) if strides[k] == 1]
    return move_axis_last(plain, near[-1]) if near else plain


class _Updates:
    def __init__(self, phase: Phase, kernel: ScatterKernel) -> None:
        self.phase, self.mode, self.f, self.e = phase, kernel.mode, phase.f, phase.e
        self.loops = _as_loops(kernel)
        self.stage = self.loops.stages[0]
        axes = self.loops.axes
        # points that do not write side by side are taken one after the other
        beside = bool(axes) and self.stage.stores[0].access.at.strides[len(axes) - 1] == 1
        self.width = lanes_for([self.stage.body], phase.target) if beside else 1
        self.strip = self.width * _STRIP_VECTORS if beside else 1

    def units(self, sizes: Mapping[str, int]) -> int:
        axes = self.loops.axes
        if not axes:
            return 1
        return points(axes[:-1], sizes) * ceil_div(evaluate(axes[-1], sizes), self.strip)

    def emit(self) -> None:
        f, axes = self.f, self.loops.axes
        with f.loop("%begin", "%end") as units:
            if not axes:
                self._walk([], [f.section()], [], "", "")
            else:
                size = self.e.dim(axes[-1])
                strips = f.div(f.add(size, str(self.strip - 1), f.top), str(self.strip), f.top)
                outer = self.phase.unravel(f.div(units.index, strips), axes[:-1]) if len(axes) > 1 else []
                unit = f.rem(units.index, strips) if len(axes) > 1 else units.index
                begin = f.mul(unit, str(self.strip))
                end = f.min(f.add(begin, str(self.strip)), size)
                self._walk(outer, [f.section()], [], begin, end)
        f.finish()

    def _walk(self, outer: list[str], sections: list[Region], inner: list[str], begin: str, end: str) -> None:
        """The remaining update axes, then the strip of window points."""
        f = self.f
        if len(inner) < len(self.stage.axes):
            with f.loop("0", self.e.dim(self.stage.axes[len(inner)])) as loop:
                self._walk(outer, [*sections, f.section()], [*inner, loop.index], begin, end)
            return
        if not begin:
            self._update(self._scope([], inner, sections, None, 1, None))
            return

        def emit(column: str, lanes: int, mask: str | None) -> None:
            axis = len(outer) if lanes > 1 else None
            self._update(self._scope([*outer, column], inner, sections, axis, lanes, mask))

        scalar_tail = self.width == 1 or not self.phase.target.has_masks
        self.phase.over_lanes(begin, end, self.width, emit, scalar_tail)

    def _scope(
        self,
        window: Sequence[str],
        inner: Sequence[str],
        sections: Sequence[Region],
        axis: int | None,
        width: int,
        mask: str | None,
    ) -> Scope:
        deepest = 1 + len(sections)
        levels = [1] * len(window) + [2 + k for k in range(len(inner))]
        if window:
            levels[len(window) - 1] = deepest
        return Scope((*window, *inner), tuple(levels), (self.f.top, *sections, None), axis, width, mask)

    def _update(self, scope: Scope) -> None:
        values = self.e.emit(self.stage.body, scope)
        store = self.stage.stores[0]
        if self.mode == "set":
            self.e.store(store, values, scope)
            return
        value = values[store.value]
        dtype = value.dtype
        # the target is read where it is written, never hoisted: an earlier update may have changed it
        deepest = len(scope.regions) - 1
        here = Scope(scope.indices, (0,) * len(scope.indices), (None,), scope.vector, scope.width, scope.mask)
        indices = [values[k]._replace(level=0) for k in store.indices]
        fill = [Value("0" if dtype.kind != "f" or dtype.is_narrow_float else "0.0", dtype, False, 0)]
        old = self.e.load(store.access, [*indices, *(fill if store.access.guards else [])], dtype, here)
        lanes = value.lanes or old.lanes
        width = scope.width if lanes else 1
        names = [self.e.splat(here, v._replace(level=0)) if lanes else v.name for v in (old, value)]
        total = self._add(names[0], names[1], dtype, width)
        self.e.store(store, [*values, Value(total, dtype, lanes, deepest)], scope, len(values))

    def _add(self, x: str, y: str, dtype: DType, width: int) -> str:
        f, target = self.f, self.phase.target
        wide = f32 if dtype.is_narrow_float else dtype
        x, y = (convert(f, target, v, dtype, wide, width, None) for v in (x, y))
        code = "fadd" if wide.kind == "f" else "or" if wide is bool_ else "add"
        total = f.op(f"{code} {vector(width, register_type(wide))} {x}, {y}")
        return convert(f, target, total, wide, dtype, width, None)
