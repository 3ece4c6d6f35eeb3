"""From a kernel to LLVM text: one function, dispatching on the kind of kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from duo_backends.cpu.code import KernelCode, Target
from duo_ir.core import Op
from duo_ir.kernels.kernel import (
    AttentionKernel,
    ContractKernel,
    ConvKernel,
    Kernel,
    LoopKernel,
    ScanKernel,
    ScatterKernel,
    SortKernel,
)

# Kind of kernel -> module and function that emit it; a program loads those it needs.
_EMITTERS: dict[Any, tuple[str, str]] = {
    LoopKernel: ("loops", "compile_loop"), ContractKernel: ("gemm", "compile_contract"), ConvKernel: ("conv", "compile_conv"),
    AttentionKernel: ("attention", "compile_attention"), ScanKernel: ("scan", "compile_scan"), SortKernel: ("sort", "compile_sort"),
    ScatterKernel: ("scatter", "compile_scatter"),
}  # fmt: skip


def _emitter(kind: Any) -> Callable[[Kernel, Target], KernelCode]:
    module, name = _EMITTERS[kind]
    return getattr(importlib.import_module(f"duo_backends.cpu.{module}"), name)  # type: ignore[no-any-return]


def compile_kernel(kernel: Kernel, target: Target) -> KernelCode:
    """LLVM text of `kernel` for `target`, its phases, scratch and cost. Deterministic: equal kernels give equal text."""
    return _emitter(type(kernel))(kernel, target)


def panel_columns(op: Op, target: Target) -> int | None:
    """Output channels that a kernel of this convolution works on at a time; None where it would not read panels of so many."""
    _, *places, n = op.result.type.shape
    if not all(isinstance(d, int) for d in (*places, n)):
        return None
    high, wide = (1, *places)[-2:]
    columns_for = importlib.import_module("duo_backends.cpu.conv_plan").panel_columns
    return columns_for(high, wide, n, op.result.type.dtype, target)  # type: ignore[arg-type]
