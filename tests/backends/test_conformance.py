"""Every op of the op table on the CPU backend against the interpreter, to the bit: every dtype and shape, operands that are
views, special values, fused and not, one thread and two; and the same for the ops' reverse-mode derivatives.

All cases of an op are results of one Function, so that compiling stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import conformance as c
import numpy as np
import op_table
import pytest

from duo_ir.core import Builder, Function, Value
from duo_ir.errors import GradientError
from duo_ir.opdef import Elementwise
from duo_ir.transforms.derivatives import vjp_function
from duo_ir.types import TensorType

GRID = 23  # side of the square on which special values meet each other


def data_operands(row: op_table.Row, count: int) -> tuple[int, ...]:
    """The operands that may hold anything (others are indices, predicates and loop counters)."""
    if row.name == "gather":
        return (0,)
    if row.name == "scatter":
        return (0, 1)
    if row.name in ("cond", "while_"):
        return (1, 2)
    return tuple(range(count))


def grid_case(row: op_table.Row, case: op_table.Case) -> op_table.Case:
    """The elementwise op of `case` on a square."""
    return op_table.Case(row, case.dtype, ((GRID, GRID),) * len(case.shapes), case.attrs)


def grid_arrays(case: op_table.Case) -> list[np.ndarray]:
    """Special values of the first operand along the rows, of the second along the columns, the rest by chance."""
    rng = np.random.default_rng(7)
    out = []
    for k, array in enumerate(case.arrays()):
        found = c.specials(c.dtype_of(array.dtype))
        line = np.resize(rng.permutation(found) if len(found) > GRID else found, GRID)
        if k == 0:
            array = np.repeat(line[:, None], GRID, 1)
        elif k == 1:
            array = np.repeat(line[None, :], GRID, 0)
        else:
            array = c.salted(array, rng)
        out.append(np.ascontiguousarray(array))
    if len(out) == 1:  # nothing to meet: as many values of its dtype as fit
        out[0] = c.salted(np.asarray(case.arrays(3)[0]), rng, 0.7)
    return out


@dataclass
class Gathered:
    """Many cases as one Function, with the arrays of several runs."""

    builder: Builder = field(default_factory=lambda: Builder("cases"))
    results: list[Value] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    runs: list[list[np.ndarray]] = field(default_factory=lambda: [[], [], []])

    def add(self, label: str, function: Function, runs: list[list[np.ndarray]], views: int | None = None) -> None:
        """One case; with `views`, behind views of a kind that this number chooses."""
        arguments = []
        with self.builder:
            for k in range(len(function.params)):
                get: Callable[[Value], Value] = lambda v: v  # noqa: E731
                for mine, arrays in zip(self.runs, runs, strict=True):
                    given = arrays[k]
                    if views is not None:
                        given, _, get = c.as_view(given, views + k)
                    mine.append(given)
                passed = TensorType(c.dtype_of(given.dtype), given.shape)
                arguments.append(get(self.builder.parameter(passed)))
            made = self.builder.inline(function, arguments)
        self.results += made
        self.labels += [f"{label}{' (views)' if views is not None else ''} result {i}" for i in range(len(made))]

    def check(self) -> None:
        wrong = c.mismatches(self.builder.build(self.results), *self.runs, labels=self.labels)
        assert not wrong, "\n".join([*wrong[:20], f"({len(wrong)} in all)"])


def tried(row: op_table.Row) -> Iterator[tuple[op_table.Case, list[list[np.ndarray]]]]:
    """The cases of an op with the arrays of three runs: the table's, and two with special values."""
    square: set[Any] = set()
    for case in op_table.cases([row]):
        runs = [case.arrays(0)]
        for seed in (1, 2):
            rng = np.random.default_rng(seed)
            arrays = case.arrays(seed)
            anything = data_operands(row, len(arrays))
            runs.append([c.salted(a, rng) if k in anything else a for k, a in enumerate(arrays)])
        yield case, runs
        key = (case.dtype, *sorted((k, str(v)) for k, v in case.attrs.items()))
        if isinstance(row.op.kind, Elementwise) and key not in square:
            square.add(key)
            wide = grid_case(row, case)
            grid = grid_arrays(wide)
            yield wide, [grid, [np.ascontiguousarray(g.T) for g in grid], [g[::-1].copy() for g in grid]]


def thinned(case: op_table.Case, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether to leave out an elementwise op on these shapes, which compile like others that are tried."""
    return isinstance(case.row.op.kind, Elementwise) and case.shapes[0] in shapes


@pytest.mark.parametrize("row", op_table.TABLE, ids=lambda r: r.name)
def test_forward(row: op_table.Row) -> None:
    """An elementwise op meets every shape with its first dtype; with the others none, one, and as many elements as fill vectors."""
    cases = Gathered()
    for k, (case, runs) in enumerate(tried(row)):
        if case.dtype is not row.dtypes[0] and thinned(case, ((1,), (7,), (3, 5))):
            continue
        function = case.function()
        cases.add(str(case), function, runs)
        if function.params and k % (3 if isinstance(case.row.op.kind, Elementwise) else 2) == 0:
            cases.add(str(case), function, runs, views=k // 3)
    cases.check()


@pytest.mark.parametrize("row", [r for r in op_table.TABLE if any(d.is_float for d in r.dtypes)], ids=lambda r: r.name)
def test_vjp(row: op_table.Row) -> None:
    cases = Gathered()
    for k, (case, runs) in enumerate(tried(row)):
        if not case.dtype.is_float or thinned(case, ((1,), (7,), (3, 5))):
            continue
        forward = case.function()
        try:
            function = vjp_function(forward)
        except GradientError:
            assert not row.smooth
            continue
        if not function.results:
            continue
        for seed, arrays in enumerate(runs):
            rng = np.random.default_rng(seed)
            for t in function.param_types[len(arrays) :]:
                cotangent = np.asarray(rng.normal(size=t.static_shape())).astype(t.dtype.numpy)
                arrays.append(c.salted(cotangent, rng, 0.2) if seed else cotangent)
        cases.add(str(case), function, runs, views=k if k % 3 == 2 else None)
    cases.check()
