"""Compiled programs on the GPU, for any sizes: `CudaExecutable` holds a program and its loaded kernels, `bind` makes it ready to run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from duo_backends.binding import SizedExecutable, signature
from duo_backends.cuda.blas import Plan, Problem
from duo_backends.cuda.bound import CudaBound, Prepared
from duo_backends.cuda.streams import Runtime
from duo_backends.cuda.work import LoadedKernel, build_table
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Program


class CudaExecutable(SizedExecutable[CudaBound]):
    """A program and its loaded kernels on a device. `scalars`: numbers of the inputs that are given as Python numbers; `numerics`: what the
    kernels were made for; `plan`: how cuBLASLt computes a product."""

    def __init__(
        self,
        program: Program,
        kernels: Mapping[Kernel, LoadedKernel],
        runtime: Runtime,
        scalars: Collection[int] = (),
        numerics: str = "strict",
        plan: Callable[[Problem], Plan | None] = lambda problem: None,
    ) -> None:
        super().__init__(program, scalars)
        self.kernels, self.numerics, self._runtime, self._plan = kernels, numerics, runtime, plan

    def make_bound(self, sizes: Mapping[str, int]) -> CudaBound:
        with self._runtime.driver:
            table = build_table(self.program, self.kernels, sizes, not self._runtime.pool.exact, self._plan)
        return CudaBound(Prepared(signature(self.program, sizes, self.scalars), table, self.kernels), self._runtime)
