"""Updates along an axis whose index is the position itself never meet: they run side by side, in any order of the others."""

from __future__ import annotations

import conformance as c
import numpy as np
import pytest

from duo_ir import ops
from duo_ir.core import function_of
from duo_ir.kernels.kernel import ScatterKernel
from duo_ir.kernels.program import Step
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import lower
from duo_ir.types import i64


def program(axis: int, mode: str):
    """out[..., index[i, j], ...] (+)= updates[i, j]: along `axis` every update goes where the index says, along the others where it is."""

    def scatter(x, updates, index):
        places = [index if a == axis else nd.iota(index.type.shape, a, i64) for a in range(x.type.rank)]
        return (ops.scatter(x, updates, *places, axes=tuple(range(x.type.rank)), mode=mode),)

    return scatter


@pytest.mark.parametrize("mode", ["add", "set"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_repeated_places_keep_their_order(axis, mode):
    rng = np.random.default_rng(axis)
    shape = (3, 5, 17)
    x, updates = (rng.normal(size=shape).astype(np.float32) * 10.0**k for k in (0, 3))
    index = rng.integers(0, shape[axis], shape)
    arrays = [x, updates.astype(np.float32), index]
    c.check(program(axis, mode), arrays)
    function = function_of(program(axis, mode), *c.types_of(arrays))
    (kernel,) = [i.kernel for i in lower(function).items if isinstance(i, Step) and isinstance(i.kernel, ScatterKernel)]
    assert kernel.sequential == 1 and kernel.axes == (shape[axis], *[d for a, d in enumerate(shape) if a != axis])


def test_empty_axes_have_their_indices_checked():
    def scatter(x, updates, index):
        rows = nd.iota(index.type.shape, 0, i64)
        return (ops.scatter(x, updates, rows, index, axes=(0, 1), mode="add"),)

    x = np.zeros((4, 5, 0), np.float32)
    for n in (0, 3):
        c.check(scatter, [x, np.zeros((n, 2, 0), np.float32), np.ones((n, 2), np.int64)])
