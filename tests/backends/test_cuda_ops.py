"""Every op of the table on the CUDA backend, on the emulated GPU, under all three schedules: the interpreter's bits.

Each buffer is an allocation of its own, so an access out of bounds is an error. A part of the table is one compilation.
"""

from __future__ import annotations

import conformance as c  # finds the op table
import numpy as np
import op_table
import pytest

from duo_backends.binding import kernels_of
from duo_backends.cuda.backend import CudaBackend
from duo_ir.core import bind_dims
from duo_ir.interpret import interpret
from duo_ir.kernels.kernel import Kernel
from duo_ir.pipeline import lower
from tests.cuda_emulator import build
from tests.cuda_emulator.support import ORDERS, driver, needs_emulator

pytestmark = needs_emulator
PARTS = 8
CASES = 4  # of each op, spread over its dtypes, shapes and attributes; all of them, kernel by kernel: test_cuda_conformance_table.py


def chosen(row: op_table.Row) -> list[op_table.Case]:
    """Some cases of an op; of those without elements one."""
    cases = list(op_table.cases([row]))
    empty = [case for case in cases if any(0 in shape for shape in case.shapes)]
    full = [case for case in cases if case not in empty]
    return full[:: max(1, len(full) // CASES)][:CASES] + empty[:1]


def load(gpu: CudaBackend, kernels: list[Kernel]) -> None:
    """Compiles all of them at once."""
    gpu._kernels.update(zip(kernels, gpu._load([gpu.emit(k) for k in kernels])))


@pytest.mark.parametrize("part", range(PARTS))
def test_ops(part, monkeypatch):
    gpu = CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), exact=True)
    cases = [case for row in op_table.TABLE[part::PARTS] for case in chosen(row)]
    programs = [(case, fusion, lower(case.function(), fusion)) for case in cases for fusion in (True, False)]
    load(gpu, list(dict.fromkeys(k for _, _, program in programs for k in kernels_of(program))))
    wrong = []
    for order in ORDERS:
        monkeypatch.setenv("DUO_EMU_ORDER", order)
        for case, fusion, program in programs:
            function, arrays = case.function(), case.arrays()
            bound = gpu.compile(program).bind(bind_dims(function.param_types, [np.shape(a) for a in arrays]))
            results = bound.run([gpu.from_numpy(np.asarray(a)) for a in arrays])
            for n, (result, want) in enumerate(zip(results, interpret(function, *arrays), strict=True)):
                got = gpu.to_numpy(result, function.result_types[n].dtype, want.shape)
                if not c.same(got, want):
                    wrong.append(f"{case}, fusion {fusion}, order {order}, result {n}: {c.difference(got, want)}")
    assert not wrong, "\n".join([*wrong[:10], f"({len(wrong)} in all)"])
