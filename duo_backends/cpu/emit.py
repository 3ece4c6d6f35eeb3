"""From a kernel to LLVM text: one function, dispatching on the kind of kernel."""

from __future__ import annotations

from duo_backends.cpu.attention import compile_attention
from duo_backends.cpu.code import KernelCode, Target
from duo_backends.cpu.conv import compile_conv
from duo_backends.cpu.conv_plan import panel_columns as columns_for
from duo_backends.cpu.gemm import compile_contract
from duo_backends.cpu.loops import compile_loop
from duo_backends.cpu.scan import compile_scan
from duo_backends.cpu.scatter import compile_scatter
from duo_backends.cpu.sort import compile_sort
from duo_ir.core import Op
from duo_ir.kernels.kernel import (
    AttentionKernel,
    ContractKernel,
    ConvKernel,
    Kernel,
    LoopKernel,
    ScanKernel,
    SortKernel,
)


def compile_kernel(kernel: Kernel, target: Target) -> KernelCode:
    """LLVM text of `kernel` for `target`, its phases, scratch and cost. Deterministic: equal kernels give equal text."""
    if isinstance(kernel, LoopKernel):
        return compile_loop(kernel, target)
    if isinstance(kernel, ContractKernel):
        return compile_contract(kernel, target)
    if isinstance(kernel, ConvKernel):
        return compile_conv(kernel, target)
    if isinstance(kernel, AttentionKernel):
        return compile_attention(kernel, target)
    if isinstance(kernel, ScanKernel):
        return compile_scan(kernel, target)
    if isinstance(kernel, SortKernel):
        return compile_sort(kernel, target)
    return compile_scatter(kernel, target)


def panel_columns(op: Op, target: Target) -> int | None:
    """Output channels that a kernel of this convolution works on at a time; None where it would not read panels of so many."""
    _, *places, n = op.result.type.shape
    if not all(isinstance(d, int) for d in (*places, n)):
        return None
    high, wide = (1, *places)[-2:]
    return columns_for(high, wide, n, op.result.type.dtype, target)  # type: ignore[arg-type]
