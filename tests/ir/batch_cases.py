"""Batches of the op table's cases: what is batched, with the arrays of every sample. Shared by the tests of batching."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from op_table import Case, Row, cases

from duo_ir.core import Function
from duo_ir.transforms.batch import batch
from duo_ir.types import DType, f32

SIZES = (3, 1, 0)


@dataclass
class Batch:
    """A batched case: the Function of one sample, of all, and the arguments."""

    single: Function
    function: Function
    results: tuple[bool, ...]
    arguments: list[np.ndarray]
    batched: tuple[bool, ...]
    size: int

    def sample(self, i: int) -> list[np.ndarray]:
        return [a[i] if b else a for a, b in zip(self.arguments, self.batched)]


def choices(n: int) -> list[tuple[bool, ...]]:
    """Each operand alone, all, and all but the first."""
    alone = [tuple(i == k for i in range(n)) for k in range(n)]
    return list(dict.fromkeys([*alone, (True,) * n, (False, *[True] * (n - 1))])) if n else [()]


def dtype_for(row: Row) -> DType:
    return f32 if f32 in row.dtypes else row.dtypes[0]


def batched_case(case: Case, batched: tuple[bool, ...], size: int) -> Batch:
    samples = [case.arrays(i) for i in range(max(size, 1))]
    single = case.function()
    made = batch(single, batched, size)
    arguments = [np.stack([s[k] for s in samples])[:size] if b else samples[0][k] for k, b in enumerate(batched)]
    return Batch(single, made.function, made.results, arguments, batched, size)


def batches(row: Row, dtype: DType, sizes: tuple[int, ...] = SIZES) -> Iterator[tuple[str, Batch]]:
    """Every case of a row on one dtype, in every choice of batched operands and every size."""
    for case in cases([row], (dtype,)):
        for batched in choices(len(case.shapes)):
            for size in sizes:
                yield f"{case} {batched} of {size}", batched_case(case, batched, size)
