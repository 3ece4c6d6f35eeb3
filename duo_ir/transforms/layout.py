"""Layout: permutations of axes move from where a program states them to where memory must have them.

Convolutions have their channels last, programs often have them first, so around every convolution stand two transposes. In one forward walk
each value is kept as another value and a permutation still to come: elementwise ops and reductions work on what is there and pass the
permutation on, until it meets its inverse, or an op that needs the axes in their places. A Function without a convolution is left alone:
there the order of the user's axes is as good as any. Bits stay: elements are only named by other indices, and a reduction is moved
only where the order in which it adds is the same.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from duo_ir.core import Builder, Function, Op, Value
from duo_ir.opdef import Convolution, Elementwise, Generate, Movement, Reduction
from duo_ir.ops import broadcasting as nd
from duo_ir.transforms.rewrite import map_regions, with_operands

Permutation = tuple[int, ...]


class Placed(NamedTuple):
    """A value that is `nd.transpose(value, order)`; None: `value` itself."""

    value: Value
    order: Permutation | None = None


def propagate_layout(function: Function) -> Function:
    """`function` with the same signature and the same bits, in which transposes have moved towards the results."""
    if not any(isinstance(op.definition.kind, Convolution) for op in function.walk()):
        return function
    walk = _Walk(_leaving(function))
    with walk.builder:
        for op in function.ops:
            walk.take(op)
        results = [walk.there(walk.placed(r)) for r in function.results]
    return Function(function.params, walk.builder.ops, results, function.name, function.names)


def _leaving(function: Function) -> set[Value]:
    """Values that elementwise ops alone lead to results (updates of weights): these are worked on in the results' order."""
    staying: set[Value] = set()
    leaving = set(function.results)
    for op in reversed(function.ops):
        if isinstance(op.definition.kind, Elementwise) and all(r in leaving and r not in staying for r in op.results):
            leaving.update(op.operands)
        else:
            staying.update(op.operands)
    return leaving - staying


class _Walk:
    def __init__(self, leaving: set[Value]) -> None:
        self.leaving = leaving
        self.builder = Builder()
        self.known: dict[Value, Placed] = {}
        self.made: dict[Placed, Value] = {}

    def placed(self, v: Value) -> Placed:
        return self.known.get(v) or Placed(v)

    def there(self, p: Placed) -> Value:
        """The value itself."""
        if p.order is None:
            return p.value
        found = self.made.get(p)
        if found is None:
            found = self.made[p] = nd.transpose(p.value, p.order)
        return found

    def take(self, op: Op) -> None:
        self.builder.loc = op.loc
        operands = [self.placed(v) for v in op.operands]
        kind = op.definition.kind
        done = None
        if isinstance(kind, Movement):
            done = self.permuted(op, operands[0])
        elif isinstance(kind, Elementwise):
            done = self.elementwise(op, operands)
        elif isinstance(kind, Reduction):
            done = self.reduced(op, operands[0])
        if done is not None:
            self.known.update(zip(op.results, done, strict=True))
            return
        values = tuple([self.there(p) for p in operands])
        new = op if values == op.operands else with_operands(op, values)
        if op.regions:
            new = map_regions(new, propagate_layout)
        self.builder.ops.append(new)
        self.known.update((a, Placed(b)) for a, b in zip(op.results, new.results) if a is not b)

    def permuted(self, op: Op, x: Placed) -> list[Placed] | None:
        order = _permutation(op)
        if order is None:
            return None
        if x.order is not None:
            order = tuple([x.order[a] for a in order])
        return [Placed(x.value, None if order == tuple(range(len(order))) else order)]

    def elementwise(self, op: Op, operands: list[Placed]) -> list[Placed] | None:
        """Works in the order that most operands are in, but on its way out in the results'; what costs nothing in any order has no say."""
        votes = Counter(p.order for p in operands if p.order is not None or not _is_free(p.value))
        if not any(order is not None for order in votes) or (None in votes and op.results[0] in self.leaving):
            return None
        most = max(votes.values())
        order = next((o for o in votes if o is not None and votes[o] == most), None)
        if order is None:
            return None
        back = _inverse(order)
        values = []
        for p in operands:
            if p.order == order:
                values.append(p.value)
            else:
                steps = back if p.order is None else tuple([p.order[a] for a in back])
                values.append(self.there(Placed(p.value, steps)))
        made = op.definition(*values, **op.attrs)
        return [Placed(v, order) for v in (made if isinstance(made, tuple) else (made,))]

    def reduced(self, op: Op, x: Placed) -> list[Placed] | None:
        if x.order is None:
            return None
        axes = [x.order[a] for a in op.attrs["axes"]]
        if axes != sorted(axes):
            return None
        kept = [a for i, a in enumerate(x.order) if i not in op.attrs["axes"]]
        order = tuple([sorted(kept).index(a) for a in kept])
        out = op.definition(x.value, **{**op.attrs, "axes": tuple(axes)})
        return [Placed(out, None if order == tuple(range(len(order))) else order)]


def _permutation(op: Op) -> Permutation | None:
    """The permutation that a movement op is: result axis i is operand axis permutation[i]; None for other movements."""
    source, result = op.operands[0].type, op.result.type
    if source.rank != result.rank or source.rank < 2 or len(op.operands) != 1:
        return None
    view = op.definition.kind.view(source.shape, result.shape, **op.attrs)  # type: ignore[union-attr]
    order = [-1] * result.rank
    for axis, (m, guard) in enumerate(zip(view.axes, view.guards or (None,) * source.rank)):
        if guard is not None or m.offset != 0 or len(m.terms) != 1 or m.terms[0][1] != 1:
            return None
        at = m.terms[0][0]
        if result.shape[at] != source.shape[axis]:
            return None
        order[at] = axis
    return None if -1 in order else tuple(order)


def _inverse(order: Permutation) -> Permutation:
    out = [0] * len(order)
    for i, a in enumerate(order):
        out[a] = i
    return tuple(out)


def _is_free(v: Value) -> bool:
    """Whether it is made of less than it has elements, so that no order of its axes is in memory."""
    op = v.op
    if op is None:
        return False
    if isinstance(op.definition.kind, Generate):
        return not op.operands
    return isinstance(op.definition.kind, Movement) and len(op.operands) == 1 and op.operands[0].type.size != v.type.size
