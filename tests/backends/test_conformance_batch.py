"""Batched programs on the CPU backend: for every op of the table, each operand batched alone and all together, as a loop over samples."""

from __future__ import annotations

import conformance
import numpy as np
import pytest
from batch_cases import batches, dtype_for
from op_table import TABLE, Row

from duo_ir.core import Builder
from duo_ir.interpret import interpret


@pytest.mark.parametrize("row", TABLE, ids=lambda r: r.name)
def test_every_op(row: Row) -> None:
    """All cases of an op as one program, so that it is compiled once."""
    together = Builder(row.name)
    results, arguments, labels, wanted = [], [], [], []
    with together:
        for what, case in batches(row, dtype_for(row)):
            params = [together.parameter(p.type) for p in case.function.params]
            results += together.inline(case.function, params)
            arguments += case.arguments
            labels += [f"{what}, result {k}" for k in range(len(case.results))]
            rows = [interpret(case.single, *case.sample(i)) for i in range(case.size)]
            for k, batched in enumerate(case.results):
                wanted.append([r[k] for r in rows] if batched else [r[k] for r in rows][:1])
    function = together.build(results)
    for how, _, got in conformance.outcomes(function, arguments, fusions=(True,), threads=(2,)):
        for label, value, want, result in zip(labels, got, wanted, results, strict=True):
            assert value.shape == result.type.static_shape(), label
            if want:
                value = value.reshape(np.shape(want)) if len(want) == 1 else value
                stacked = np.stack(want)
                assert conformance.same(value, stacked), f"{label} ({how}): {conformance.difference(value, stacked)}"
