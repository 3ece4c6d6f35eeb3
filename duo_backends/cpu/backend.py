"""The CPU backend: kernels through the emitters and LLVM, cached in memory and on disk; buffers from the allocator."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from duo_backends.binding import kernels_of
from duo_backends.cache import DiskCache, disk_cache
from duo_backends.cpu import jit
from duo_backends.cpu.code import KernelCode, Target
from duo_backends.cpu.emit import compile_kernel, panel_columns
from duo_backends.cpu.executable import CpuExecutable
from duo_backends.cpu.memory import Buffer, allocate
from duo_backends.cpu.results import mark_results
from duo_backends.cpu.table import LoadedKernel
from duo_ir.core import Op
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Copy, Program
from duo_ir.types import DType, TensorType, u8

KERNEL_LIMIT = 8192  # loaded kernels kept for programs to come


@functools.lru_cache(64)
def _copier(backend: CpuBackend, nbytes: int) -> Any:
    """A bound program that copies as many bytes."""
    memory = TensorType(u8, (nbytes,))
    return backend.compile(Program((memory,), (memory,), (), (Copy(0, 1),), (1,))).bind({})


class CpuBackend:
    """Runs programs on the host. `cpu`: what to compile for, a name of `jit.machine` (default: DUO_CPU, else this
    machine). `compile_count` counts kernels that went through the emitter, `loaded_count` those found loaded."""

    name = "cpu"

    def __init__(self, cpu: str | None = None) -> None:
        self._cpu = cpu
        self._kernels: OrderedDict[Kernel, LoadedKernel] = OrderedDict()
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_lock)
        self.compile_count = 0
        self.loaded_count = 0

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it

    @property
    def target(self) -> Target:
        """What kernels are emitted for."""
        return jit.machine(self._cpu).target

    @property
    def machine(self) -> jit.Machine:
        """The CPU compiled for."""
        return jit.machine(self._cpu)

    @property
    def disk(self) -> DiskCache:
        """Where object code is kept between processes."""
        return disk_cache()

    @property
    def code_statistics(self) -> jit.Statistics:
        """How much object code this process generated, and how much it read from disk."""
        return jit.statistics

    def compile(self, program: Program, scalars: Collection[int] = (), numerics: str = "strict") -> CpuExecutable:
        """Machine code for every kernel of `program` that is not loaded yet. `scalars`: numbers of 0-d inputs that will be Python
        numbers. `numerics`: the bits are those of "strict" in any case, as nothing here would be quicker for others."""
        program = mark_results(program)
        wanted = dict.fromkeys(kernels_of(program))
        with self._lock:
            found = {k: self._kernels[k] for k in wanted if k in self._kernels}
            for kernel in found:
                self._kernels.move_to_end(kernel)
            self.loaded_count += len(found)
        missing = [kernel for kernel in wanted if kernel not in found]
        if missing:
            found.update(zip(missing, self._load(missing)))
            with self._lock:
                self.compile_count += len(missing)
                self._kernels.update((k, found[k]) for k in missing)
                while len(self._kernels) > KERNEL_LIMIT:
                    self._kernels.popitem(last=False)
        return CpuExecutable(program, found, scalars)

    def _load(self, kernels: Sequence[Kernel]) -> list[LoadedKernel]:
        codes: list[KernelCode] = []

        def modules() -> Iterator[tuple[str, list[str]]]:
            for kernel in kernels:
                codes.append(self.emit(kernel))
                yield codes[-1].text, [phase.symbol for phase in codes[-1].phases]

        libraries = jit.build_many(modules(), jit.machine(self._cpu))
        return [
            LoadedKernel(code, tuple([library.addresses[phase.symbol] for phase in code.phases]), library)
            for code, library in zip(codes, libraries)
        ]

    def emit(self, kernel: Kernel) -> KernelCode:
        """The kernel's LLVM text for this backend's target."""
        return compile_kernel(kernel, self.target)

    def assembly(self, kernel: Kernel) -> str:
        """The kernel's machine code as assembler text."""
        return jit.assembly(self.emit(kernel).text, self.machine)

    def panel_columns(self, op: Op) -> int | None:
        """Output channels that a kernel of this convolution works on at a time; None where it would not read panels of so many."""
        return panel_columns(op, self.target)

    def allocate(self, nbytes: int) -> Buffer:
        return allocate(nbytes)

    def duplicate(self, buffer: Buffer) -> Buffer:
        """A buffer of its own with the same contents, which all threads copy."""
        (out,) = _copier(self, buffer.nbytes).run([buffer])
        return out

    def from_numpy(self, array: np.ndarray, copy: bool = True) -> Buffer:
        """See `duo_backends.base.Backend`."""
        if not copy:
            return Buffer.from_numpy(array)
        array = np.ascontiguousarray(array)
        buffer = allocate(array.nbytes)
        ctypes.memmove(buffer.ptr, array.ctypes.data, array.nbytes)
        return buffer

    def to_numpy(self, buffer: Buffer, dtype: DType, shape: Sequence[int], copy: bool = True) -> np.ndarray:
        """See `duo_backends.base.Backend`."""
        if not copy:
            return buffer.numpy(dtype, shape)
        return buffer.read(dtype, shape)

    def synchronize(self) -> None:
        """Programs have finished when `run` returns: nothing to wait for."""
