"""The CUDA backend: kernels through the emitters and NVRTC or nvcc, cached in memory and on disk; buffers from a pool; streams.

Nothing of CUDA is touched before the first program or buffer asks for it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from duo_backends.binding import kernels_of
from duo_backends.cache import DiskCache, disk_cache
from duo_backends.cuda.blas import Blas, Plan, Problem, find_blas
from duo_backends.cuda.code import GpuTarget, KernelCode
from duo_backends.cuda.compiler import Compiler, balanced, compile_cached, disassembled, find_compiler
from duo_backends.cuda.driver import Driver, PycudaDriver
from duo_backends.cuda.emit import compile_kernel, has_fast_form, source
from duo_backends.cuda.executable import CudaExecutable
from duo_backends.cuda.library import library_call
from duo_backends.cuda.memory import DeviceBuffer, Pool
from duo_backends.cuda.peaks import Peaks, measure
from duo_backends.cuda.profile import Recording
from duo_backends.cuda.streams import SCALARS_NAME, SCALARS_TEXT, Runtime
from duo_backends.cuda.work import LoadedKernel
from duo_ir.errors import ArgumentError
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Program
from duo_ir.types import DType

KERNEL_LIMIT = 8192  # loaded kernels kept for programs to come


class CudaBackend:
    """Runs programs on GPU number `device`. `memory_limit`: the most bytes that it takes there. `driver`, `compiler`, `exact` (every
    buffer an allocation of just its size) and `blas` (finds cuBLASLt for an architecture) are for tests. `compile_count` counts kernels that went through the emitter, `loaded_count` those
    found loaded."""

    name = "cuda"

    def __init__(
        self,
        device: int = 0,
        *,
        memory_limit: int | None = None,
        driver: Driver | None = None,
        compiler: Compiler | None = None,
        exact: bool = False,
        blas: Callable[[int], Blas | None] = find_blas,
    ) -> None:
        self._device, self._memory_limit, self._exact = device, memory_limit, exact
        self._given_driver, self._given_compiler, self._find_blas = driver, compiler, blas
        self._kernels: OrderedDict[tuple[Kernel, bool], LoadedKernel] = OrderedDict()
        self._lock = threading.Lock()
        self.compile_count = 0
        self.loaded_count = 0

    @cached_property
    def driver(self) -> Driver:
        """The device. Raises DeviceError where there is none, or PyCUDA is missing."""
        return self._given_driver or PycudaDriver(self._device)

    @cached_property
    def compiler(self) -> Compiler:
        """What makes machine code. Raises DeviceError where there is no CUDA compiler."""
        return self._given_compiler or find_compiler()

    @cached_property
    def runtime(self) -> Runtime:
        """The streams, the memory, and what waits to be checked."""
        pool = Pool(self.driver, self._memory_limit, self._exact, f"cuda:{self._device}")
        return Runtime(self.driver, pool, self._scalars)

    @cached_property
    def target(self) -> GpuTarget:
        """What kernels are emitted for, in strict numerics."""
        p = self.driver.properties
        return GpuTarget(p.arch, p.multiprocessors, False, p.shared)

    def recording(self, capacity: int) -> Recording:
        """A profile of the device, to be entered."""
        return Recording(self.runtime, capacity)

    @cached_property
    def peaks(self) -> Peaks:
        """What the device does at most, measured."""
        return measure(self)

    @property
    def disk(self) -> DiskCache:
        """Where machine code is kept between processes."""
        return disk_cache()

    def compile(self, program: Program, scalars: Collection[int] = (), numerics: str = "strict") -> CudaExecutable:
        """Machine code for every kernel of `program` that is not loaded yet. `scalars`: numbers of 0-d inputs that will be Python
        numbers. `numerics`: with "fast" products are computed on tensor cores (`mma.py`) and by cuBLASLt."""
        fast = numerics == "fast"
        wanted = {kernel: (kernel, fast and has_fast_form(kernel)) for kernel in kernels_of(program)}
        with self._lock:
            found = {kernel: self._kernels[key] for kernel, key in wanted.items() if key in self._kernels}
            for kernel in found:
                self._kernels.move_to_end(wanted[kernel])
            self.loaded_count += len(found)
        missing = [kernel for kernel in wanted if kernel not in found]
        if missing:
            loaded = self._load([self.emit(kernel, numerics) for kernel in missing])
            if fast:
                loaded = [replace(x, library=library_call(kernel)) for kernel, x in zip(missing, loaded)]
            found.update(zip(missing, loaded))
            with self._lock:
                self.compile_count += len(missing)
                self._kernels.update((wanted[k], found[k]) for k in missing)
                while len(self._kernels) > KERNEL_LIMIT:
                    self._kernels.popitem(last=False)
        return CudaExecutable(program, found, self.runtime, scalars, numerics, self._plan)

    def _plan(self, problem: Problem) -> Plan | None:
        return self.blas.plan(problem) if self.blas is not None else None

    @cached_property
    def blas(self) -> Blas | None:
        """cuBLASLt, where it is installed."""
        return self._find_blas(self.driver.properties.arch)

    def emit(self, kernel: Kernel, numerics: str = "strict") -> KernelCode:
        """The kernel's CUDA C for this device."""
        return compile_kernel(kernel, replace(self.target, fast=numerics == "fast" and has_fast_form(kernel)))

    def assembly(self, kernel: Kernel, numerics: str = "strict") -> str:
        """The kernel as CUDA C, and as machine code where CUDA's `cuobjdump` is installed."""
        code = self.emit(kernel, numerics)
        (cubin,) = compile_cached([source([code])], self.driver.properties.arch, self.compiler, self.disk)
        listing = disassembled(cubin)
        return code.text if listing is None else f"{code.text}\n{listing}"

    def _load(self, codes: Sequence[KernelCode]) -> list[LoadedKernel]:
        groups = balanced([len(code.text) for code in codes], self.compiler.unit)
        modules = self.load_text([source(codes[n] for n in group) for group in groups])
        most = self.driver.properties.shared  # bytes that a launch may ask for
        loaded: dict[int, LoadedKernel] = {}
        with self.driver:
            for module, group in zip(modules, groups):
                for n in group:
                    functions = [self.driver.function(module, launch.symbol, most) for launch in codes[n].launches]
                    loaded[n] = LoadedKernel(codes[n], tuple(functions), module)
        return [loaded[n] for n in range(len(codes))]

    def load_text(self, sources: Sequence[str]) -> list[Any]:
        """Modules of CUDA C, compiled or found on disk."""
        cubins = compile_cached(sources, self.driver.properties.arch, self.compiler, self.disk)
        with self.driver:
            return [self.driver.load(cubin) for cubin in cubins]

    def _scalars(self) -> Any:
        return self._scalars_loaded[0]

    @cached_property
    def _scalars_loaded(self) -> tuple[Any, Any]:
        (module,) = self.load_text([SCALARS_TEXT])
        with self.driver:
            return self.driver.function(module, SCALARS_NAME), module

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """A buffer with undefined contents. Raises OutOfMemory."""
        return self.runtime.stream.allocate(nbytes)

    def from_numpy(self, array: np.ndarray, copy: bool = True) -> DeviceBuffer:
        """See `duo_backends.base.Backend`; the device cannot address host memory, so it is always a copy."""
        return self.runtime.upload(np.ascontiguousarray(array))

    def filled(self, value: Any, dtype: DType, shape: Sequence[int]) -> DeviceBuffer:
        """A buffer whose elements are all that Python number or NumPy scalar."""
        one = np.full((), value, dtype.numpy).tobytes()
        if len(set(one)) > 1:
            return self.from_numpy(np.full(shape, value, dtype.numpy))
        return self.runtime.filled(one[0], len(one) * math.prod(shape))

    def to_numpy(self, buffer: DeviceBuffer, dtype: DType, shape: Sequence[int], copy: bool = True) -> np.ndarray:
        """See `duo_backends.base.Backend`; always a copy. Waits, and raises IndexOutOfRange for a run whose check failed."""
        out = np.empty(shape, dtype.numpy)
        if out.nbytes > buffer.nbytes:
            raise ArgumentError(f"{buffer.nbytes} bytes do not hold {dtype.name} of shape {tuple(shape)}")
        self.runtime.download(out, buffer)
        return out

    def synchronize(self) -> None:
        """Waits until everything started is done. Raises IndexOutOfRange for a run whose check failed."""
        self.runtime.synchronize()
