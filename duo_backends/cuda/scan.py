"""Cumulative sums in CUDA C: one thread per line, sequential from +0.0, as the contract has it."""

from __future__ import annotations

from collections.abc import Mapping

from duo_backends.cuda.body import Emitter, Scope, Value, Writer, arithmetic, convert, literal
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
    source, target_dtype = kernel.args[kernel.source.buffer].dtype, kernel.args[kernel.target.buffer].dtype
    with w.block(f'extern "C" __global__ void __launch_bounds__({_THREADS}) {name}({parameters(kernel)})'):
        w.put(f"const {e.index_type} line = ({e.index_type})blockIdx.x*{_THREADS} + threadIdx.x;")
        w.put(f"if (line >= {polynomial(product(kernel.axes))}) return;")
        outer = e.unravel("line", kernel.axes)
        w.put(f"{register(kernel.acc)} acc = {literal(0, kernel.acc)};")
        with w.block(f"for ({e.index_type} i = 0; i < {polynomial(kernel.length)}; ++i)"):
            scope = Scope((*outer, "i"))
            x = e.define(source, e.load(kernel.source, (), scope))
            wide = Value(convert(x.name, source, kernel.acc), kernel.acc)
            w.put(f"acc = {arithmetic('add', [Value('acc', kernel.acc), wide], kernel.acc)};")
            w.put(
                f"a{kernel.target.buffer}[{e.address(kernel.target, scope.indices)}] = {convert('acc', kernel.acc, target_dtype)};"
            )

    def blocks(sizes: Mapping[str, int]) -> int:
        return ceil_div(points(kernel.axes, sizes), _THREADS)

    return KernelCode(w.text(), (Launch(name, _THREADS, blocks),))
