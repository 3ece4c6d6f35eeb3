"""Compiled programs on the CPU, for any sizes: `CpuExecutable` holds a program and its loaded kernels, `bind` makes it ready to run."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping

from duo_backends.cpu.bound import CpuBound, Prepared
from duo_backends.cpu.runner import native
from duo_backends.cpu.table import LoadedKernel, build_table
from duo_ir.errors import ArgumentError
from duo_ir.kernels.checks import written_after_checks
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Program, Step
from duo_ir.types import TensorType, evaluate

BOUND_LIMIT = 256  # sets of sizes that an executable remembers


class CpuExecutable:
    """A program and its loaded kernels. `scalars`: numbers of the inputs that are given as Python numbers."""

    def __init__(self, program: Program, kernels: Mapping[Kernel, LoadedKernel], scalars: Collection[int] = ()) -> None:
        for k in scalars:
            if not 0 <= k < len(program.inputs) or program.inputs[k].shape != ():
                raise ArgumentError(f"input {k} cannot be a Python number: it is not a 0-d input of the program")
        self.program = program
        self.kernels = kernels
        self.scalars = frozenset(scalars)
        self._bound: OrderedDict[tuple[int, ...], CpuBound] = OrderedDict()
        self._lock = threading.Lock()

    def bind(self, sizes: Mapping[str, int] | None = None) -> CpuBound:
        """The program for these values of `program.dims`. Raises ArgumentError when one is missing or negative."""
        sizes = sizes or {}
        try:
            key = tuple([sizes[name] for name in self.program.dims])
        except KeyError as error:
            raise ArgumentError(
                f"bind() needs sizes for {', '.join(self.program.dims)}; {error.args[0]!r} is missing"
            ) from None
        bound = self._bound.get(key)
        if bound is not None:
            return bound
        if any(size < 0 for size in key):
            raise ArgumentError(f"sizes must not be negative: {dict(zip(self.program.dims, key))}")
        with self._lock:
            bound = self._bound.get(key)
            if bound is None:
                bound = self._bound[key] = CpuBound(self.prepare(dict(zip(self.program.dims, key))))
                if len(self._bound) > BOUND_LIMIT:
                    self._bound.popitem(last=False)
        return bound

    def prepare(self, sizes: Mapping[str, int]) -> Prepared:
        """What a bound program of these sizes is made of."""
        program = self.program
        inputs = tuple([TensorType(t.dtype, t.static_shape(sizes)) for t in program.inputs])
        outputs = tuple([TensorType(t.dtype, t.static_shape(sizes)) for t in program.outputs])
        table = build_table(program, self.kernels, sizes, native().copy)
        safe = written_after_checks(program)  # a program that fails leaves its inputs as they were
        donations = tuple(
            (output, given)
            for output, given in program.donations
            if given not in program.results
            and given not in self.scalars
            and _nbytes(inputs[given]) >= _nbytes(outputs[output])
            and output in safe
        )
        templates = any(isinstance(item, Step) and item.sizes for item in program.items)
        results = program.results
        return Prepared(
            inputs, outputs, results, donations, frozenset(safe), self.scalars, table, templates, self.kernels
        )


def _nbytes(type: TensorType) -> int:
    return evaluate(type.nbytes, {})
