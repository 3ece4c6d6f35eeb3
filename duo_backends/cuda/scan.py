"""Running folds in CUDA C: one thread per line, sequential in ascending order, as the contract has it."""

from __future__ import annotations

from collections.abc import Mapping

from duo_backends.cuda.body import Emitter, Scope, Value, Writer, literal
from duo_backends.cuda.code import (
    GpuTarget,
    KernelCode,
    Launch,
    ceil_div,
    parameters,
    points,
    polynomial,
    register,
    symbol,
    wide_positions,
)
from duo_ir.kernels.kernel import ScanKernel
from duo_ir.types import product

_THREADS = 64


def compile_scan(kernel: ScanKernel, target: GpuTarget) -> KernelCode:
    """CUDA C and launches of a ScanKernel."""
    name = symbol(kernel, target)
    w = Writer()
    e = Emitter(w, kernel.args, wide_positions(kernel, (*kernel.axes, kernel.length)))
    with w.block(f'extern "C" __global__ void __launch_bounds__({_THREADS}) {name}({parameters(kernel)})'):
        w.put(f"const {e.index_type} line = ({e.index_type})blockIdx.x*{_THREADS} + threadIdx.x;")
        w.put(f"if (line >= {polynomial(product(kernel.axes))}) return;")
        outer = e.unravel("line", kernel.axes)
        state = [Value(f"s{k}", dtype) for k, (dtype, _) in enumerate(kernel.start)]
        for part, (dtype, number) in zip(state, kernel.start):
            w.put(f"{register(dtype)} {part.name} = {literal(number, dtype)};")
        with w.block(f"for ({e.index_type} i = 0; i < {polynomial(kernel.length)}; ++i)"):
            scope = Scope((*outer, "i"), saved=state)
            values = e.emit(kernel.body, scope)
            for store in kernel.stores:
                e.store(store, values, scope)
            after = [e.define(d, values[n].name) for (d, _), n in zip(kernel.start, kernel.following)]
            for part, new in zip(state, after):
                w.put(f"{part.name} = {new.name};")

    def blocks(sizes: Mapping[str, int]) -> int:
        return ceil_div(points(kernel.axes, sizes), _THREADS)

    return KernelCode(w.text(), (Launch(name, _THREADS, blocks),))
