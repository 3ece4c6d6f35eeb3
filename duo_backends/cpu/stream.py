"""Stores past the caches, for results that are larger than the last of them.

An ordinary store to a line that no cache holds reads the line first: a third of what a copy moves. A non-temporal one does not, but it
must be aligned, and where the result lies in the memory of an input the line has been read anyway. So such a kernel gets two functions of
the same text but for that, and one that chooses when it is called. What is written is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from duo_backends.cpu.code import SIGNATURE, Target
from duo_backends.cpu.llvm import Function, Module
from duo_backends.cpu.nest import Phase
from duo_ir.kernels.kernel import Arg, LoopKernel, Store

_BEYOND = 32 << 20  # bytes of a result that no cache keeps for whoever reads it next
_LINE = 64
_OPERANDS = ", ".join(part.strip() for part in SIGNATURE.split(","))


def with_streams(module: Module, name: str, kernel: LoopKernel, target: Target, emit: Callable[[Phase], None]) -> None:
    """Emits the kernel as function `name`; `emit` fills a Phase with its text."""
    along_outer = not any(stage.axes for stage in kernel.stages)  # the vectors of a map
    stores = [
        (store, len(kernel.axes) + len(stage.axes) - 1 if along_outer or stage.axes else -1)
        for stage in kernel.stages
        for store in stage.stores
    ]

    def phase(name: str, internal: bool, streams: frozenset[int]) -> None:
        emit(Phase(module, name, kernel, target, internal, streams))

    with_streamed_stores(module, name, kernel.args, stores, phase)


def with_streamed_stores(
    module: Module,
    name: str,
    args: Sequence[Arg],
    stores: Sequence[tuple[Store, int]],
    emit: Callable[[str, bool, frozenset[int]], None],
) -> None:
    """`emit(name, internal, streams)` makes a function that sends its stores to the arguments `streams` past the caches. `stores`: each
    with the axis that its vectors run along, -1 where it has none."""
    buffers = _streamed_buffers(args, stores)
    if not buffers:
        emit(name, False, frozenset())
        return
    emit(f"{name}_cached", True, frozenset())
    emit(f"{name}_streamed", True, buffers)
    _choose(module, name, args, buffers)


def _streamed_buffers(args: Sequence[Arg], stores: Sequence[tuple[Store, int]]) -> frozenset[int]:
    """Numbers of the arguments that whole aligned lines are stored to, in order, and that are large."""
    found: set[int] = set()
    others: set[int] = set()
    for store, axis in stores:
        arg = args[store.access.buffer]
        large = isinstance(arg.size, int) and arg.size * arg.dtype.itemsize >= _BEYOND
        (found if large and _in_lines(arg, store, axis) else others).add(store.access.buffer)
    return frozenset(found - others)


def beyond() -> int:
    """Bytes that no cache keeps."""
    return _BEYOND


def last_stores(args: Sequence[Arg], stores: Sequence[tuple[Store, int]]) -> frozenset[int]:
    """Numbers of the arguments marked `last` that whole aligned lines are stored to, in order."""
    last = [(store.access.buffer, _in_lines(args[store.access.buffer], store, axis)) for store, axis in stores]
    return frozenset(k for k, lines in last if lines and args[k].last) - {k for k, lines in last if not lines}


def _in_lines(arg: Arg, store: Store, axis: int) -> bool:
    access = store.access
    strides = list(access.at.strides)
    if axis < 0 or access.guards or access.index_strides or strides.pop(axis) != 1:
        return False
    elements = _LINE // arg.dtype.itemsize
    return all(isinstance(s, int) and s % elements == 0 for s in (*strides, access.at.offset))


def _choose(module: Module, name: str, args: Sequence[Arg], buffers: frozenset[int]) -> None:
    f = Function(module, f"define void @{name}({SIGNATURE}) #0")
    addresses = [f.pure(f"load i64, ptr {f.gep('ptr', '%args', str(k))}, align 8") for k in range(len(args))]
    good = "true"
    for k in sorted(buffers):
        low = f.pure(f"and i64 {addresses[k]}, {_LINE - 1}")
        good = f.op(f"and i1 {good}, {f.pure(f'icmp eq i64 {low}, 0')}")
        for other, arg in enumerate(args):
            if not arg.output:
                good = f.op(f"and i1 {good}, {f.pure(f'icmp ne i64 {addresses[k]}, {addresses[other]}')}")
    with f.when(good):
        f.emit(f"call void @{name}_streamed({_OPERANDS})")
        f.emit("fence seq_cst")  # such stores are ordered by nothing else
    with f.when(f.op(f"xor i1 {good}, true")):
        f.emit(f"call void @{name}_cached({_OPERANDS})")
    f.finish()
