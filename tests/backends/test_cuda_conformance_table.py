"""Every op of the op table as CUDA kernels on the emulated GPU, to the bit of `duo_ir.kernels.evaluate`: fused and not, with special values,
under three schedules.

An elementwise op meets each dtype on a square of special values and each shape with one dtype; of other ops, every shape and every dtype occur.
"""

from __future__ import annotations

from collections.abc import Iterator

import conformance as c
import cuda_conformance as cuda
import numpy as np
import op_table
import pytest
from test_conformance import data_operands, grid_arrays, grid_case

from duo_ir import ops
from duo_ir.opdef import Elementwise
from duo_ir.types import Dim, TensorType, f32, i64
from tests.cuda_emulator.support import needs_emulator

pytestmark = needs_emulator

PARTS = 6


def chosen(row: op_table.Row) -> Iterator[op_table.Case]:
    """Cases of a row in which each of its dtypes and each of its shapes and attributes occur."""
    found = list(op_table.cases([row]))
    dtypes = list(dict.fromkeys(case.dtype for case in found))
    variants = {d: [case for case in found if case.dtype is d] for d in dtypes}
    for n, dtype in enumerate(dtypes):
        mine = variants[dtype]
        for k, case in enumerate(mine):
            if k % len(dtypes) == n or (len(mine) < len(dtypes) and k == n % len(mine)):
                yield case


def table_cases(rows: list[op_table.Row]) -> Iterator[cuda.Case]:
    for row in rows:
        squares = set()
        for case in chosen(row):
            runs = [case.arrays(0)]
            anything = data_operands(row, len(runs[0]))
            rng = np.random.default_rng(1)
            runs.append([c.salted(a, rng) if k in anything else a for k, a in enumerate(case.arrays(1))])
            fusions = (False,) if isinstance(row.op.kind, Elementwise) else (True, False)
            yield from cuda.cases(str(case), case.function(), *runs, fusions=fusions)
        if not isinstance(row.op.kind, Elementwise):
            continue
        for case in op_table.cases([row]):
            key = (case.dtype, *sorted((k, str(v)) for k, v in case.attrs.items()))
            if key not in squares:
                squares.add(key)
                wide = grid_case(row, case)
                grid = grid_arrays(wide)
                runs = [grid, [np.ascontiguousarray(g.T) for g in grid]]
                yield from cuda.cases(str(wide), wide.function(), *runs)


@pytest.mark.parametrize("part", range(PARTS))
def test_op_table(part: int) -> None:
    rows = op_table.TABLE[part::PARTS]
    tally = cuda.check(table_cases(rows))
    assert len(tally.kernels) > len(rows) and tally.runs > 6 * len(rows)


def test_windows_of_named_sizes_may_be_empty() -> None:
    n, m = Dim.symbol("n"), Dim.symbol("m")
    i = np.array([1, 3, 0, 2, 3])
    runs = []
    for a, b in ((2, 3), (2, 0), (0, 3), (0, 0), (1, 130)):
        runs.append([*cuda.numbers(TensorType(f32, (5, a, b)), TensorType(f32, (5, a, b))), i])
    types = [TensorType(f32, (5, n, m)), TensorType(f32, (5, n, m)), TensorType(i64, (5,))]
    cases: list[cuda.Case] = []
    for mode in ("add", "set"):
        cases += cuda.cases(mode, lambda x, u, i, mode=mode: ops.scatter(x, u, i, axes=(0,), mode=mode), *runs, types=types)
    cases += cuda.cases("gather", lambda x, u, i: ops.gather(x, i, axes=(0,)) * u, *runs, types=types)
    cases += cuda.cases("cumsum", lambda x, u, i: ops.cumsum(x, axis=1), *runs, types=types)
    cuda.check(cases)
