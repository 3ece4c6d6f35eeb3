"""Compiled programs on the CPU, for any sizes: `CpuExecutable` holds a program and its loaded kernels, `bind` makes it ready to run."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from duo_backends.binding import SizedExecutable, signature
from duo_backends.cpu.bound import CpuBound, Prepared
from duo_backends.cpu.runner import native
from duo_backends.cpu.table import LoadedKernel, build_table
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Program, Step


class CpuExecutable(SizedExecutable[CpuBound]):
    """A program and its loaded kernels. `scalars`: numbers of the inputs that are given as Python numbers."""

    def __init__(self, program: Program, kernels: Mapping[Kernel, LoadedKernel], scalars: Collection[int] = ()) -> None:
        super().__init__(program, scalars)
        self.kernels = kernels

    def make_bound(self, sizes: Mapping[str, int]) -> CpuBound:
        return CpuBound(self.prepare(sizes))

    def prepare(self, sizes: Mapping[str, int]) -> Prepared:
        """What a bound program of these sizes is made of."""
        program = self.program
        s = signature(program, sizes, self.scalars)
        table = build_table(program, self.kernels, sizes, native().copy)
        templates = any(isinstance(item, Step) and item.sizes for item in program.items)
        return Prepared(s.inputs, s.outputs, s.results, s.donations, s.safe, s.scalars, table, templates, self.kernels)
