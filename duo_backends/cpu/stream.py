"""Stores past the caches, for results of loop kernels that are larger than the last of them.

An ordinary store to a line that no cache holds reads the line first: a third of what a copy moves. A non-temporal one does not, but it
must be aligned, and where the result lies in the memory of an input the line has been read anyway. So such a kernel gets two functions of
the same text but for that, and one that chooses when it is called. What is written is the same.
"""

from __future__ import annotations

from collections.abc import Callable

from duo_backends.cpu.code import SIGNATURE, Target
from duo_backends.cpu.llvm import Function, Module
from duo_backends.cpu.nest import Phase
from duo_ir.kernels.kernel import LoopKernel, Store

_BEYOND = 32 << 20  # bytes of a result that no cache keeps for whoever reads it next
_LINE = 64
_OPERANDS = ", ".join(part.strip() for part in SIGNATURE.split(","))


def with_streams(module: Module, name: str, kernel: LoopKernel, target: Target, emit: Callable[[Phase], None]) -> None:
    """Emits the kernel as function `name`; `emit` fills a Phase with its text."""
    buffers = streamed_buffers(kernel)
    if not buffers:
        emit(Phase(module, name, kernel, target))
        return
    emit(Phase(module, f"{name}_cached", kernel, target, internal=True))
    emit(Phase(module, f"{name}_streamed", kernel, target, internal=True, streams=buffers))
    _choose(module, name, kernel, buffers)


def streamed_buffers(kernel: LoopKernel) -> frozenset[int]:
    """Numbers of the arguments that whole aligned lines are stored to, in order, and that are large."""
    found: set[int] = set()
    others: set[int] = set()
    along_outer = not any(stage.axes for stage in kernel.stages)  # the vectors of a map
    for stage in kernel.stages:
        vectors = along_outer or bool(stage.axes)
        for store in stage.stores:
            whole = vectors and _in_lines(kernel, store, len(kernel.axes) + len(stage.axes) - 1)
            (found if whole and _is_large(kernel, store) else others).add(store.access.buffer)
    return frozenset(found - others)


def _is_large(kernel: LoopKernel, store: Store) -> bool:
    arg = kernel.args[store.access.buffer]
    return isinstance(arg.size, int) and arg.size * arg.dtype.itemsize >= _BEYOND


def _in_lines(kernel: LoopKernel, store: Store, vector_axis: int) -> bool:
    access = store.access
    if access.guards or access.index_strides:
        return False
    strides = list(access.at.strides)
    if vector_axis < 0 or strides.pop(vector_axis) != 1:
        return False
    elements = _LINE // kernel.args[access.buffer].dtype.itemsize
    return all(isinstance(s, int) and s % elements == 0 for s in (*strides, access.at.offset))


def _choose(module: Module, name: str, kernel: LoopKernel, buffers: frozenset[int]) -> None:
    f = Function(module, f"define void @{name}({SIGNATURE}) #0")
    addresses = [f.pure(f"load i64, ptr {f.gep('ptr', '%args', str(k))}, align 8") for k in range(len(kernel.args))]
    good = "true"
    for k in sorted(buffers):
        low = f.pure(f"and i64 {addresses[k]}, {_LINE - 1}")
        good = f.op(f"and i1 {good}, {f.pure(f'icmp eq i64 {low}, 0')}")
        for other, arg in enumerate(kernel.args):
            if not arg.output:
                good = f.op(f"and i1 {good}, {f.pure(f'icmp ne i64 {addresses[k]}, {addresses[other]}')}")
    with f.when(good):
        f.emit(f"call void @{name}_streamed({_OPERANDS})")
        f.emit("fence seq_cst")  # such stores are ordered by nothing else
    with f.when(f.op(f"xor i1 {good}, true")):
        f.emit(f"call void @{name}_cached({_OPERANDS})")
    f.finish()
