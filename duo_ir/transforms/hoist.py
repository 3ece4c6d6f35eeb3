"""Hoisting: what depends on parameters that seldom change is computed apart from what is computed at every call.

A Function is split in two. The prologue makes, from the constant parameters alone, the values that the rest reads: weights laid out as
a product reads them, small computations on state (the scale of a batch norm). The main Function takes them as further
parameters. It is the same ops on the same values, so bits stay. Nothing is hoisted that is larger than what it is made of, as a broadcast is: what
it views is. Reading through a view costs a kernel nothing, except a product whose rows become long. What products and convolutions read in
panels is hoisted (`panels.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from duo_ir.core import Builder, Function, Op, Value
from duo_ir.opdef import (
    Concat,
    Contraction,
    Convolution,
    Elementwise,
    Generate,
    Movement,
    Reduction,
    Reshape,
)
from duo_ir.transforms.panels import Columns, in_panels
from duo_ir.transforms.rewrite import dce, with_operands
from duo_ir.types import evaluate

WORTH = 1024  # bytes in front of products from which two programs are better than one
WIDE = 256  # elements of a row from which a product reads a matrix faster by rows than by columns (measured; 128 is slower)
_HOISTED = (Elementwise, Movement, Reshape, Concat, Reduction, Contraction, Convolution, Generate)  # these cannot fail


class Hoisted(NamedTuple):
    """`function(params)` is `main(*params, *prologue(*[params[i] for i in constants]))`."""

    prologue: Function
    main: Function
    constants: tuple[int, ...]  # that the prologue reads, of those asked for


def hoist(function: Function, constants: Iterable[int], columns: Columns | None = None) -> Hoisted | None:
    """`function`, simplified before, split at what depends on the parameters numbered `constants` alone. None where
    products and convolutions read less than `WORTH` bytes of it. `columns`: how wide a convolution's panels are; without, it has none."""
    numbers = sorted(set(constants))
    params = [function.params[i] for i in numbers]
    function, panels = in_panels(function, _sources(function, params), columns)
    cut = _Cut(function, _sources(function, params), panels)
    if cut.in_products < WORTH:
        return None
    values = list(cut.values)
    read = {p for v in values for p in cut.sources[v]}
    used = tuple([i for i in numbers if function.params[i] in read])
    return Hoisted(_prologue(function, used, values), _main(function, values), used)


Sources = dict[Value, frozenset[Value]]


def _sources(function: Function, constants: list[Value]) -> Sources:
    """Of what depends on `constants` alone, and on no free dim: on which."""
    sources: Sources = {p: frozenset([p]) for p in constants}
    for op in function.ops:
        known = all(v in sources for v in op.operands) and all(r.type.is_static for r in op.results)
        if known and isinstance(op.definition.kind, _HOISTED):
            sources.update(dict.fromkeys(op.results, frozenset([p for v in op.operands for p in sources[v]])))
    return sources


class _Cut:
    """`values`: what is hoisted, in order; `in_products`: how many bytes of it products and convolutions read."""

    def __init__(self, function: Function, sources: Sources, panels: list[Value]) -> None:
        self.sources, self.panels = sources, set(panels)
        self.values: dict[Value, None] = {}
        self.in_products = 0
        self.kept = set(function.results)
        self._seen: set[tuple[Value, bool]] = set()
        for op in function.ops:
            if not all(r in sources for r in op.results):
                for v in op.operands:
                    self.place(v, isinstance(op.definition.kind, Contraction))
        for v in function.results:
            self.place(v, False)

    def place(self, v: Value, product: bool) -> None:
        """Hoists `v`, which the rest reads (`product`: as an operand of a product), or what it is made of."""
        op = v.op
        if op is None or (v, product) in self._seen or not self.sources.get(v):
            return
        self._seen.add((v, product))
        if v in self.values:
            hoisted = True
        elif v in self.kept or _nbytes(v) > sum(map(_nbytes, self.sources[v])):
            hoisted = False
        elif isinstance(op.definition.kind, (Movement, Reshape)):
            wide = product and v.type.rank > 0 and evaluate(v.type.shape[-1], {}) >= WIDE
            hoisted = v in self.panels or wide
            hoisted = hoisted and self._is_moved(v) and _nbytes(v) <= _nbytes(op.operands[0])
        else:
            hoisted = True
        if not hoisted:
            viewed = product and isinstance(op.definition.kind, (Movement, Reshape))
            for x in op.operands:
                self.place(x, viewed)
            return
        self.values[v] = None
        if product or v in self.panels:
            self.in_products += _nbytes(v)

    def _is_moved(self, v: Value) -> bool:
        """Whether views change the order of the elements between here and what is in memory."""
        op = v.op
        if op is None or not isinstance(op.definition.kind, (Movement, Reshape)):
            return False
        return (isinstance(op.definition.kind, Movement) and _moves(op)) or self._is_moved(op.operands[0])


def _moves(op: Op) -> bool:
    """Whether a movement reads elements in another order than that of memory, or not from the first on."""
    source = op.operands[0].type.shape
    view = op.definition.kind.view(source, op.result.type.shape, **op.attrs)  # type: ignore[union-attr]
    axes = []
    for size, m, guard in zip(source, view.axes, view.guards or (None,) * len(source)):
        if size == 1:
            continue
        if guard is not None or m.offset != 0 or len(m.terms) != 1 or m.terms[0][1] != 1:
            return True
        axes.append(m.terms[0][0])
    return axes != sorted(axes)


def _nbytes(v: Value) -> int:
    return evaluate(v.type.nbytes, {})


def _prologue(function: Function, numbers: tuple[int, ...], values: list[Value]) -> Function:
    builder = Builder("prologue")
    env = {function.params[i]: builder.parameter(function.params[i].type, function.names[i]) for i in numbers}
    needed = dce(Function(function.params, function.ops, values)).ops
    for op in needed:
        new = with_operands(op, tuple([env[v] for v in op.operands]))
        builder.ops.append(new)
        env.update(zip(op.results, new.results))
    return builder.build([env[v] for v in values])


def _main(function: Function, values: list[Value]) -> Function:
    builder = Builder(function.name)
    env = {p: builder.parameter(p.type, name) for p, name in zip(function.params, function.names)}
    env.update((v, builder.parameter(v.type)) for v in values)
    rest = _without(function, set(values))
    for op in rest:
        new = with_operands(op, tuple([env[v] for v in op.operands]))
        builder.ops.append(new)
        env.update((a, b) for a, b in zip(op.results, new.results) if a not in env)
    return builder.build([env[v] for v in function.results])


def _without(function: Function, given: set[Value]) -> list[Op]:
    """The ops that the results need when the values `given` are there."""
    live = set(function.results) - given
    kept: list[Op] = []
    for op in reversed(function.ops):
        if live.isdisjoint(op.results):
            continue
        live.update(v for v in op.operands if v not in given)
        kept.append(op)
    return kept[::-1]
