"""Loop kernels in CUDA C: which form a kernel takes, and the form without reductions.

*map*: no inner axes; a thread takes consecutive points, read and written as vectors; what reads across what it writes goes by tiles
(`transposed.py`). *groups* (`groups.py`): all stages of an outer
point in one launch, by the threads of a group. *passes* (`passes.py`): one launch or two for each stage, for few outer points with much
to reduce. All give the same bits.
"""

from __future__ import annotations

from duo_backends.cuda.body import Emitter, Scope, Writer
from duo_backends.cuda.code import (
    GpuTarget,
    KernelCode,
    Launch,
    ceil_div,
    parameters,
    points,
    polynomial,
    symbol,
    wide_positions,
)
from duo_backends.cuda.groups import compile_groups, fits_groups
from duo_backends.cuda.packs import emit_points, pack_width
from duo_backends.cuda.passes import compile_passes
from duo_backends.cuda.transposed import compile_across, reads_across
from duo_ir.kernels.collapse import accesses, move_axis_last, simplify
from duo_ir.kernels.kernel import LoopKernel, Stage
from duo_ir.types import DimLike, evaluate, exact_div, product

THREADS = 256


def compile_loop(kernel: LoopKernel, target: GpuTarget) -> KernelCode:
    """CUDA C and launches of a LoopKernel."""
    name = symbol(kernel, target)
    plain = simplify(kernel)
    if all(not s.axes and not s.reduces for s in plain.stages):
        plain = nearest_axis_last(plain)
        across = reads_across(plain)
        return compile_map(plain, name) if across is None else compile_across(plain, across, name)
    column = _column_axis(plain)
    if column is not None:
        plain = move_axis_last(plain, column)
    if fits_groups(plain, column is not None, target):
        return compile_groups(plain, column is not None, name, target)
    return compile_passes(plain, column is not None, name)


# ------------------------------------------------------------------------------------------------------------- choices
def _access_cost(stage: Stage, axis: int) -> float:
    """Memory sectors per element when neighbouring threads lie along `axis`."""
    total = 0.0
    for access, is_store in accesses(stage):
        stride = access.at.strides[axis]
        far = stride not in (0, 1, -1)
        total += (8.0 if far else 1.0 if stride != 0 else 0.1) * (2.0 if is_store and far else 1.0)
    return total


def nearest_axis_last(kernel: LoopKernel) -> LoopKernel:
    """The map with the axis last along which its accesses lie closest together."""
    if len(kernel.axes) < 2:
        return kernel

    def cost(axis: int) -> tuple[float, int]:
        size = kernel.axes[axis]
        fill = max(1.0, 32.0 / max(size, 1)) if isinstance(size, int) else 1.0
        return fill * sum(_access_cost(s, axis) for s in kernel.stages), -axis

    best = min(range(len(kernel.axes)), key=cost)
    return simplify(move_axis_last(kernel, best)) if best != len(kernel.axes) - 1 else kernel


def _column_axis(kernel: LoopKernel) -> int | None:
    """The outer axis along which neighbouring threads should lie, where that beats the inner ones."""
    outer = len(kernel.axes)
    if not outer:
        return None
    inner = sum(_access_cost(s, outer + len(s.axes) - 1) * _fill(s.axes[-1], 16) for s in kernel.stages if s.axes)
    costs = {
        axis: sum(_access_cost(s, axis) for s in kernel.stages if s.axes) * _fill(size, 32)
        for axis, size in enumerate(kernel.axes)
    }
    best = min(costs, key=lambda k: (costs[k], -k))
    return best if costs[best] < inner else None


def _fill(size: DimLike, width: int) -> float:
    """How many times more threads there are than elements for them."""
    return 1.0 if not isinstance(size, int) else ceil_div(max(size, 1), width) * width / max(size, 1)


# ---------------------------------------------------------------------------------------------------------------- maps
def compile_map(kernel: LoopKernel, name: str) -> KernelCode:
    """One launch: a thread takes `width` consecutive points of the last axis."""
    wide = wide_positions(kernel, kernel.axes)
    w = Writer()
    e = Emitter(w, kernel.args, wide)
    last: DimLike = kernel.axes[-1] if kernel.axes else 1
    flat = len(kernel.axes) < 2
    width = pack_width(kernel.args, [(s.body, s.stores) for s in kernel.stages], last, flat) if kernel.axes else 1
    index = e.index_type
    with w.block(f'extern "C" __global__ void __launch_bounds__({THREADS}) {name}({parameters(kernel)})'):
        w.put(f"const {index} unit = ({index})blockIdx.x*{THREADS} + threadIdx.x;")
        if flat:
            with w.block("" if width == 1 else f"if (unit*{width} + {width} <= {polynomial(last)})"):
                if width == 1:
                    w.put(f"if (unit >= {polynomial(last)}) return;")
                _vectors(e, kernel, ("unit",) if width == 1 else (f"unit*{width}",), width)
            if width > 1:
                with w.block(f"else for ({index} i = unit*{width}; i < {polynomial(last)}; ++i)"):
                    _point(e, kernel, ("i",) if kernel.axes else (), "i")
        else:
            w.put(f"if (unit >= ({index})({polynomial(_units(kernel, width))})) return;")
            outer = e.unravel("unit", [*kernel.axes[:-1], _quotient(last, width)])
            if width > 1:
                w.put(f"const {index} first = {outer[-1]}*{width};")
                outer[-1] = "first"
            _vectors(e, kernel, tuple(outer), width)

    def blocks(sizes: dict[str, int]) -> int:
        count = points(kernel.axes, sizes) if not flat else evaluate(last, sizes)
        return ceil_div(ceil_div(count, width), THREADS)

    return KernelCode(w.text(), (Launch(name, THREADS, blocks),))  # type: ignore[arg-type]


def _units(kernel: LoopKernel, width: int) -> DimLike:
    return product(kernel.axes[:-1]) * _quotient(kernel.axes[-1], width)


def _quotient(size: DimLike, width: int) -> DimLike:
    found = exact_div(size, width)
    assert found is not None
    return found


def _vectors(e: Emitter, kernel: LoopKernel, indices: tuple[str, ...], width: int) -> None:
    if width == 1:
        _point(e, kernel, indices if kernel.axes else (), "unit")
        return
    for stage in kernel.stages:
        with e.w.block("") if len(kernel.stages) > 1 else e.w.nothing():
            emit_points(e, stage.body, stage.stores, indices, width, f"unit*{width}")


def _point(e: Emitter, kernel: LoopKernel, indices: tuple[str, ...], point: str) -> None:
    scope = Scope(indices, f"(long long){point}")
    for stage in kernel.stages:
        with e.w.block("") if len(kernel.stages) > 1 else e.w.nothing():
            values = e.emit(stage.body, scope)
            for store in stage.stores:
                e.store(store, values, scope)
