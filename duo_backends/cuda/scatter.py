"""Scatter in CUDA C: a copy of the base, then the updates.

Window points are independent, a thread each; for each of them the update points follow one another in row-major order, so that sums have the
one order of the contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from duo_backends.cuda.body import Emitter, Scope, Value, Writer, arithmetic, convert, in_memory
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
from duo_ir.kernels.kernel import Body, ScatterKernel
from duo_ir.types import bool_, evaluate, f32, product

_THREADS = 128


def compile_scatter(kernel: ScatterKernel, target: GpuTarget) -> KernelCode:
    """CUDA C and launches of a ScatterKernel."""
    name = symbol(kernel, target)
    w = Writer()
    e = Emitter(w, kernel.args, wide_positions(kernel, kernel.axes))
    out = len(kernel.args) - 1
    with w.block(f'extern "C" __global__ void __launch_bounds__({_THREADS}) {name}_0({parameters(kernel)})'):
        w.put(f"const {e.index_type} i = ({e.index_type})blockIdx.x*{_THREADS} + threadIdx.x;")
        w.put(f"if (i < {polynomial(kernel.size)} && (const void *)a{out} != (const void *)a0) a{out}[i] = a0[i];")
    window = kernel.axes[kernel.sequential :]
    with w.block(f'extern "C" __global__ void __launch_bounds__({_THREADS}) {name}_1({parameters(kernel)})'):
        w.put(f"const {e.index_type} point = ({e.index_type})blockIdx.x*{_THREADS} + threadIdx.x;")
        size = product(window)
        w.put(f"const {e.index_type} window = {polynomial(size)};")
        w.put("if (point >= (window ? window : 1)) return;")
        if isinstance(size, int):
            _updates(e, kernel, checks_alone=size == 0)
        else:
            with w.block("if (window)"):
                _updates(e, kernel, checks_alone=False)
            with w.block("else"):
                _updates(e, kernel, checks_alone=True)

    def copies(sizes: Mapping[str, int]) -> int:
        return ceil_div(evaluate(kernel.size, sizes), _THREADS)

    def blocks(sizes: Mapping[str, int]) -> int:
        return ceil_div(max(1, points(window, sizes)), _THREADS)

    return KernelCode(w.text(), (Launch(f"{name}_0", _THREADS, copies), Launch(f"{name}_1", _THREADS, blocks)))


def _updates(e: Emitter, kernel: ScatterKernel, checks_alone: bool) -> None:
    """The loop over update points of one window point. `checks_alone`: the window has no points, so that there is nothing to read or write, but
    indices are checked."""
    updates, window = kernel.axes[: kernel.sequential], kernel.axes[kernel.sequential :]
    inner = ["0"] * len(window) if checks_alone else e.unravel("point", window)
    with e.w.block(f"for ({e.index_type} u = 0; u < {polynomial(product(updates))}; ++u)"):
        scope = Scope((*e.unravel("u", updates), *inner), "(long long)u*(window ? window : 1) + point")
        if checks_alone:
            e.emit(_needed(kernel.body, kernel.store.indices), scope)
        else:
            _update(e, kernel, scope)


def _update(e: Emitter, kernel: ScatterKernel, scope: Scope) -> None:
    w, store, dtype = e.w, kernel.store, kernel.args[-1].dtype
    values = e.emit(kernel.body, scope)
    extra = [values[k] for k in store.indices]
    target = f"a{store.access.buffer}[{e.address(store.access, scope.indices, extra)}]"
    condition = e.guards(store.access, scope.indices)
    value = values[store.value]
    with w.block(f"if ({condition})" if condition else ""):
        if kernel.mode == "set":
            w.put(f"{target} = {in_memory(value)};")
            return
        old = e.define(dtype, f"{target} != 0" if dtype is bool_ else target)
        wide = f32 if dtype.is_narrow_float else dtype
        pair = [Value(convert(v.name, v.dtype, wide), wide) for v in (old, value)]
        total = arithmetic("or_" if dtype is bool_ else "add", pair, wide)
        new = e.define(dtype, convert(f"({total})", wide, dtype))
        w.put(f"{target} = {in_memory(new)};")


def _needed(body: Body, wanted: Sequence[int]) -> Body:
    """The instructions that these depend on, and the checks."""
    keep: set[int] = set()
    for number in range(len(body) - 1, -1, -1):
        if number in wanted or body[number].op == "check" or number in keep:
            keep |= {number, *body[number].args}
    place = {old: new for new, old in enumerate(sorted(keep))}
    return tuple([replace(body[old], args=tuple([place[a] for a in body[old].args])) for old in sorted(keep)])
