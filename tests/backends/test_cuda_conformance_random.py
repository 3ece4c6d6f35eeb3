"""Random programs as CUDA kernels on the emulated GPU, to the bit of `duo_ir.kernels.evaluate`; and what is reported of indices out of range."""

from __future__ import annotations

from collections.abc import Iterator

import conformance as c
import cuda_conformance as cuda
import numpy as np
import pytest
from test_conformance_random import BOUND, NAMED, Maker

from duo_backends.cuda.backend import CudaBackend
from duo_ir import ops
from duo_ir.core import Value, function_of
from duo_ir.errors import IndexOutOfRange
from duo_ir.interpret import interpret
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import lower
from duo_ir.transforms.derivatives import vjp_function
from duo_ir.types import TensorType, f32
from tests.cuda_emulator import build
from tests.cuda_emulator.support import driver, needs_emulator

pytestmark = needs_emulator
SEEDS = range(100, 116)


def random_cases(seed: int) -> Iterator[cuda.Case]:
    maker = Maker(seed)
    function = maker.function(12)
    yield from cuda.cases(f"seed {seed}", function, maker.arrays(function.param_types), fusions=(True, False))
    maker = Maker(seed, smooth=True)
    backward = vjp_function(maker.function(9))
    yield from cuda.cases(f"gradient, seed {seed}", backward, maker.arrays(backward.param_types))
    maker = Maker(seed, sizes=NAMED, ranks=2)
    function = maker.function(9)
    runs = [maker.arrays(function.param_types, sizes) for sizes in (BOUND if function.dims else BOUND[:1])]
    yield from cuda.cases(f"named sizes, seed {seed}", function, *runs)


@pytest.mark.parametrize("part", range(4))
def test_random_programs(part: int) -> None:
    tally = cuda.check([case for seed in SEEDS[part::4] for case in random_cases(seed)])
    assert len(tally.kernels) > 20


# ------------------------------------------------------------------------------------------------------------ bad indices
def indexed(name: str, x: Value, u: Value, i: Value, j: Value) -> Value:
    if name == "scatter":
        return ops.scatter(x, u, i, axes=(0,), mode="add")
    if name == "two":
        return ops.gather(x, i, axes=(0,)) * ops.gather(x, j, axes=(0,))
    if name == "softmax":
        e = ops.exp(ops.gather(x, i, axes=(0,)) * u)
        return e / nd.sum(e, (1,), True)
    if name == "summed":
        return nd.sum(ops.gather(x, i, axes=(0,)), (0,))
    return ops.gather(x, i, axes=(0,))


@pytest.mark.parametrize("name", ["gather", "scatter", "two", "softmax", "summed"])
def test_an_index_out_of_range_is_reported_as_the_interpreter_does(name: str) -> None:
    """Of several the first one of the first bad point, with its op and the user's line, under every schedule; the CPU backend says the same."""
    x, u = cuda.numbers(TensorType(f32, (5, 40)), TensorType(f32, (70, 40)))
    rng = np.random.default_rng(0)
    i, j = rng.integers(0, 5, 70), rng.integers(0, 5, 70)
    runs = [[x, u, i, j]]
    for bad, places in ((-1, [13, 50]), (5, [0]), (2**40, [69]), (-(2**63), [50, 20])):
        wrong = i.copy()
        wrong[places] = np.array([bad, 9][: len(places)])
        runs.append([x, u, wrong, j])
        if name == "two":
            runs.append([x, u, i, wrong])
    function = function_of(lambda *a: indexed(name, *a), *c.types_of(runs[0]))
    cuda.check(cuda.cases(name, function, *runs, fusions=(True, False)))
    for arrays in runs[1:]:
        with pytest.raises(IndexOutOfRange) as told:
            interpret(function, *arrays)
        with pytest.raises(IndexOutOfRange) as same:
            list(c.outcomes(function, arrays, threads=(1,)))
        assert str(same.value) == str(told.value)


def test_of_two_bad_indices_the_lower_point_is_reported_as_on_the_cpu() -> None:
    x, u = cuda.numbers(TensorType(f32, (5, 40)), TensorType(f32, (70, 40)))
    i, j = np.zeros(70, np.int64), np.zeros(70, np.int64)
    i[50], j[13] = 9, 7
    function = function_of(lambda *a: indexed("two", *a), *c.types_of([x, u, i, j]))
    with pytest.raises(IndexOutOfRange, match="index 7 is out of range") as told:
        list(c.outcomes(function, [x, u, i, j], fusions=(True,)))
    gpu = CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), exact=True)
    bound = gpu.compile(lower(function)).bind()
    for order in cuda.ORDERS:
        with cuda.schedule(order), pytest.raises(IndexOutOfRange) as same:
            bound.run([gpu.from_numpy(a) for a in (x, u, i, j)])
            gpu.synchronize()
        assert str(same.value) == str(told.value)
