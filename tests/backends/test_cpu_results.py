"""Gradients that a training step leaves behind, sent past the caches: which results are, and that they are the same."""

from __future__ import annotations

import numpy as np
import pytest

from duo_backends.cpu import results, stream
from duo_backends.cpu.backend import CpuBackend
from duo_ir import pipeline
from duo_ir.core import Builder, Function
from duo_ir.interpret import interpret
from duo_ir.kernels.kernel import ContractKernel
from duo_ir.kernels.program import Program, Step
from duo_ir.ops import add, matmul, transpose
from duo_ir.types import TensorType, f32


def update(rows: int, columns: int) -> Function:
    """w + x' y and x' y, as of a step that updates w and leaves its gradient; a product that another reads, and that one."""
    builder = Builder("step")
    with builder:
        w = builder.parameter(TensorType(f32, (rows, columns)))
        x, y = (builder.parameter(TensorType(f32, (40, n))) for n in (rows, columns))
        gradient = matmul(transpose(x, permutation=(1, 0)), y)
        other = matmul(transpose(y, permutation=(1, 0)), x)
        return builder.build([add(w, gradient), gradient, other, matmul(other, transpose(x, permutation=(1, 0)))])


def marked(program: Program) -> list[list[bool]]:
    kernels = [item.kernel for item in program.items if isinstance(item, Step)]
    return [[arg.last for arg in k.args if arg.output] for k in kernels if isinstance(k, ContractKernel)]


def test_the_weight_that_others_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with a moment: the weight is read by another product, the moment by its own alone."""
    builder = Builder("step")
    with builder:
        w, m = (builder.parameter(TensorType(f32, (64, 96))) for _ in range(2))
        x, y = (builder.parameter(TensorType(f32, (40, n))) for n in (64, 96))
        moment = add(m, matmul(transpose(x, permutation=(1, 0)), y))
        function = builder.build([add(w, moment), moment, matmul(x, w)])
    monkeypatch.setattr(stream, "_BEYOND", 1)
    program = results.mark_results(pipeline.lower(function))
    steps = [item for item in program.items if isinstance(item, Step) and any(a.last for a in item.kernel.args)]
    assert len(steps) == 1
    inputs = {slot: arg.shared for slot, arg in zip(steps[0].slots, steps[0].kernel.args) if not arg.output}
    assert inputs == {0: True, 1: False, 2: True, 3: False}
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(p.type.static_shape()).astype("f4") for p in function.params]
    expected = interpret(function, *arrays)
    backend = CpuBackend()
    bound = pipeline.compile(function, backend).bind()
    for given in ((), (0, 1)):
        outs = bound.begin([backend.from_numpy(a) for a in arrays], given).run()
        for out, want in zip(outs, expected, strict=True):
            assert (backend.to_numpy(out, f32, want.shape) == want).all()


def test_what_nothing_reads_beside_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    program = pipeline.lower(update(64, 96))
    assert results.mark_results(program) is program  # small enough for the caches
    monkeypatch.setattr(stream, "_BEYOND", 1)
    assert sorted(marked(results.mark_results(program))) == [[False], [False], [True, True]]


@pytest.mark.parametrize("columns", (96, 90))
@pytest.mark.parametrize("given", (False, True))
def test_the_same_bits(columns: int, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of whole cache lines and others, w updated in its memory and not, again and again."""
    function, rng = update(64, columns), np.random.default_rng(columns)
    arrays = [rng.standard_normal(p.type.static_shape()).astype("f4") for p in function.params]
    expected = interpret(function, *arrays)
    monkeypatch.setattr(stream, "_BEYOND", 1)
    backend = CpuBackend()
    bound = pipeline.compile(function, backend).bind()
    for _ in range(2):
        inputs = [backend.from_numpy(a) for a in arrays]
        outs = bound.begin(inputs, (0,) if given else ()).run()
        for out, want in zip(outs, expected, strict=True):
            assert (backend.to_numpy(out, f32, want.shape) == want).all()
