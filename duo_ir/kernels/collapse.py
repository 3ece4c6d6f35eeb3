"""Loop nests in their simplest form: axes of size 1 dropped, neighbours that step as one merged, maps reordered.

Two neighbouring axes merge when every affine position steps over the outer one as over a whole inner one; row-major
order, and with it the order of reductions, stays. A [64, 128] contiguous map thus becomes one flat loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from duo_ir.kernels.kernel import Access, Affine, Body, Guard, Instr, LoopKernel, Stage, Store
from duo_ir.types import DimLike

Rewrite = Callable[[Affine], Affine]


def accesses(stage: Stage) -> Iterator[tuple[Access, bool]]:
    """Every access of a stage with whether it is a store."""
    for instr in stage.body:
        if instr.op == "load":
            yield instr.attr, False  # type: ignore[misc]
    for store in stage.stores:
        yield store.access, True


def affines(stage: Stage) -> Iterator[Affine]:
    for access, _ in accesses(stage):
        yield access.at
        for guard in access.guards:
            yield guard.position
    for instr in stage.body:
        if instr.op == "index":
            yield instr.attr  # type: ignore[misc]


def _rewrite_access(access: Access, change: Rewrite) -> Access:
    guards = tuple(Guard(change(g.position), g.bound, g.step) for g in access.guards)
    return Access(access.buffer, change(access.at), guards, access.index_strides)


def rewrite_body(body: Body, change: Rewrite) -> Body:
    out = []
    for instr in body:
        if instr.op == "load":
            attr = _rewrite_access(instr.attr, change)  # type: ignore[arg-type]
        elif instr.op == "index":
            attr = change(instr.attr)  # type: ignore[arg-type, assignment]
        else:
            out.append(instr)
            continue
        out.append(Instr(instr.op, instr.args, instr.dtype, attr))
    return tuple(out)


def rewrite_stage(stage: Stage, axes: tuple[DimLike, ...], change: Rewrite) -> Stage:
    stores = tuple(Store(_rewrite_access(s.access, change), s.value, s.indices) for s in stage.stores)
    return replace(stage, axes=axes, body=rewrite_body(stage.body, change), stores=stores)


def _picker(kept: list[int]) -> Rewrite:
    return lambda a: Affine(a.offset, tuple(a.strides[k] for k in kept))


def _kept_axes(sizes: tuple[DimLike, ...], start: int, positions: list[Affine]) -> list[int]:
    """Which of the axes start, start+1, ... stay; a merged pair is represented by its inner axis."""
    live = [k for k, size in enumerate(sizes) if size != 1]
    kept: list[int] = []
    for k in live:
        if kept:
            outer = kept[-1]
            if all(a.strides[start + outer] == a.strides[start + k] * sizes[k] for a in positions):
                kept.pop()
        kept.append(k)
    return kept


def _merged_sizes(sizes: tuple[DimLike, ...], kept: list[int]) -> tuple[DimLike, ...]:
    out: list[DimLike] = []
    previous = -1
    for k in kept:
        size: DimLike = 1
        for d in sizes[previous + 1 : k + 1]:
            size = size * d
        out.append(size)
        previous = k
    for d in sizes[previous + 1 :]:
        if out:
            out[-1] = out[-1] * d  # only axes of size 1 follow the last one kept
    return tuple(out)


def simplify(kernel: LoopKernel) -> LoopKernel:
    """An equal kernel with as few axes as possible. A stage that reduces keeps at least one."""
    outer = len(kernel.axes)
    kept = _kept_axes(kernel.axes, 0, [a for s in kernel.stages for a in affines(s)])
    axes = _merged_sizes(kernel.axes, kept)
    stages = []
    for stage in kernel.stages:
        inner = _kept_axes(stage.axes, outer, list(affines(stage)))
        sizes = _merged_sizes(stage.axes, inner)
        change = _picker([*kept, *(outer + k for k in inner)])
        if stage.reduces and not sizes:
            sizes = (1,)
            change = _appending(change)
        stages.append(rewrite_stage(stage, sizes, change))
    return replace(kernel, axes=axes, stages=tuple(stages))


def _appending(change: Rewrite) -> Rewrite:
    def extended(a: Affine) -> Affine:
        b = change(a)
        return Affine(b.offset, (*b.strides, 0))

    return extended


def move_axis_last(kernel: LoopKernel, axis: int) -> LoopKernel:
    """The kernel with outer axis `axis` innermost of the outer ones."""
    return reorder(kernel, [k for k in range(len(kernel.axes)) if k != axis] + [axis])


def reorder(kernel: LoopKernel, order: list[int]) -> LoopKernel:
    """The kernel with its outer axes in another order, which is free: points are independent."""
    n = len(kernel.axes)
    stages = []
    for stage in kernel.stages:
        change = _picker([*order, *range(n, n + len(stage.axes))])
        stages.append(rewrite_stage(stage, stage.axes, change))
    return replace(kernel, axes=tuple(kernel.axes[k] for k in order), stages=tuple(stages))
