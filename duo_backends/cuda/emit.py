"""From kernels to CUDA C: one function, dispatching on the kind of kernel; and the source of a whole program."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import resources

from duo_backends.cuda.code import GpuTarget, KernelCode
from duo_backends.cuda.conv import compile_conv
from duo_backends.cuda.gemm import compile_contract
from duo_backends.cuda.loops import compile_loop
from duo_backends.cuda.scan import compile_scan
from duo_backends.cuda.scatter import compile_scatter
from duo_ir.kernels.kernel import ContractKernel, ConvKernel, Kernel, LoopKernel, ScanKernel, ScatterKernel


def compile_kernel(kernel: Kernel, target: GpuTarget) -> KernelCode:
    """CUDA C of `kernel`, its launches and scratch. Deterministic: equal kernels give equal text."""
    if isinstance(kernel, LoopKernel):
        return compile_loop(kernel, target)
    if isinstance(kernel, ContractKernel):
        return compile_contract(kernel, target)
    if isinstance(kernel, ConvKernel):
        return compile_conv(kernel, target)
    if isinstance(kernel, ScanKernel):
        return compile_scan(kernel, target)
    if isinstance(kernel, ScatterKernel):
        return compile_scatter(kernel, target)
    raise NotImplementedError(type(kernel).__name__)


@cache
def header() -> str:
    """The text that every source starts with."""
    return resources.files("duo_backends.cuda").joinpath("device.cuh").read_text()


def source(codes: Iterable[KernelCode]) -> str:
    """One compilation unit with these kernels, each once."""
    return header() + "\n" + "\n".join(dict.fromkeys(code.text for code in codes))
