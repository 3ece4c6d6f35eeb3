"""From kernels to CUDA C: one function, dispatching on the kind of kernel; and the source of a whole program."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import resources

from duo_backends.cuda.attention import compile_attention
from duo_backends.cuda.code import GpuTarget, KernelCode
from duo_backends.cuda.conv import compile_conv
from duo_backends.cuda.gemm import compile_contract
from duo_backends.cuda.loops import compile_loop
from duo_backends.cuda.scan import compile_scan
from duo_backends.cuda.scatter import compile_scatter
from duo_backends.cuda.sort import compile_sort
from duo_ir.kernels.kernel import (
    AttentionKernel,
    ContractKernel,
    ConvKernel,
    Kernel,
    LoopKernel,
    ScanKernel,
    SortKernel,
)


def compile_kernel(kernel: Kernel, target: GpuTarget) -> KernelCode:
    """CUDA C of `kernel`, its launches and scratch. Deterministic: equal kernels give equal text."""
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


def has_fast_form(kernel: Kernel) -> bool:
    """Whether `fast` numerics may make another text of such a kernel."""
    return isinstance(kernel, ContractKernel | ConvKernel)


@cache
def header(name: str = "device.cuh") -> str:
    """The text of a header; every source starts with `device.cuh`."""
    return resources.files("duo_backends.cuda").joinpath(name).read_text()


def source(codes: Iterable[KernelCode]) -> str:
    """One compilation unit with these kernels, each once."""
    codes = list(codes)
    names = dict.fromkeys(["device.cuh", *[name for code in codes for name in code.headers]])
    return "\n".join([*map(header, names), *dict.fromkeys(code.text for code in codes)])
