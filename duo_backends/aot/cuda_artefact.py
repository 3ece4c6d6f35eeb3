"""From a Source to what a GPU is shipped: programs as launch plans, and cubins. `Artefact` (artefact.py) does the same for a CPU.

Kernels are those of the CUDA backend, compiled by NVRTC or nvcc for the target; no GPU is needed. The modules are what `Compiler.compile` gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from duo_backends.aot.artefact import run_here
from duo_backends.aot.gpu_targets import CudaTarget
from duo_backends.aot.launch_plan import Placed, launch_plan, steps_of
from duo_backends.aot.source import Source, hoisted
from duo_backends.aot.special import with_special
from duo_backends.cache import disk_cache
from duo_backends.cuda.code import KernelCode
from duo_backends.cuda.compiler import Compiler, compile_cached, find_compiler
from duo_backends.cuda.emit import compile_kernel, has_fast_form, source
from duo_ir.errors import ArgumentError, DeviceError, DuoError
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Program


@dataclass
class CudaArtefact:
    """A Source for one GPU. Raises ArgumentError for programs that cannot go there, DeviceError where there is no compiler."""

    source: Source
    lowered: Mapping[str, Program]
    target: CudaTarget
    compiler: Compiler

    @classmethod
    def of(cls, source: Source, target: CudaTarget) -> CudaArtefact:
        if source.training is not None:
            raise ArgumentError(
                f"target {target.name}: a training step goes into artefacts for CPUs only; leave the target out, or export the "
                "module itself for inference"
            )
        try:
            compiler = find_compiler()
        except DeviceError as error:
            raise DeviceError(f"target {target.name}: {error}") from None
        return cls(*with_special(hoisted(source, None, run_here)), target, compiler)

    @cached_property
    def programs(self) -> list[Program]:
        return [self.lowered[p.name] for p in self.source.programs]

    @cached_property
    def codes(self) -> dict[Kernel, KernelCode]:
        found: dict[Kernel, KernelCode] = {}
        for program in self.programs:
            for step in steps_of(program):
                if step.kernel not in found:
                    found[step.kernel] = self._code(step.kernel, step.where)
        return found

    def _code(self, kernel: Kernel, where: str) -> KernelCode:
        fast = self.target.numerics == "fast" and has_fast_form(kernel)
        try:
            return compile_kernel(kernel, replace(self.target.code, fast=fast))
        except DuoError as error:
            raise ArgumentError(f"{where or 'the program'} cannot be compiled for {self.target.name}: {error}") from error

    @property
    def _groups(self) -> list[list[KernelCode]]:
        codes, unit = list(self.codes.values()), self.compiler.unit
        return [codes[n : n + unit] for n in range(0, len(codes), unit)]

    @cached_property
    def modules(self) -> list[bytes]:
        """Cubins."""
        return compile_cached([source(g) for g in self._groups], self.target.arch, self.compiler, disk_cache())

    @cached_property
    def plan(self) -> bytes:
        """The launch plans of all programs as JSON."""
        module = {id(code): n for n, group in enumerate(self._groups) for code in group}
        kernels = {kernel: Placed(code, module[id(code)]) for kernel, code in self.codes.items()}
        rows = [
            launch_plan(p, program, kernels, self._special(p.name))
            for p, program in zip(self.source.programs, self.programs)
        ]
        return json.dumps({"programs": rows}, separators=(",", ":")).encode()

    def _special(self, name: str) -> list[Any]:
        """Numbers of the programs that stand in for that one, and when; the one that asks for most comes first."""
        found = [
            [k, dict(p.special.sizes)]
            for k, p in enumerate(self.source.programs)
            if p.special is not None and p.special.of == name
        ]
        return sorted(found, key=lambda row: -len(row[1]))

