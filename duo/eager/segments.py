"""Tape segments: what an earlier flush left behind for a backward pass.

When a flush runs values that require gradients and that someone still holds, the forward values which their derivative rules will
read (the residuals) become outputs too and are kept, with the leaves, in a Segment; its backward is a Function of
residuals and cotangents, made when a backward pass asks for it and kept with the node of the path.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from duo.eager.autograd import Cotangents, Engine, Inner, number_in, walk_back
from duo.eager.build import Construction, Watch, freed_error, overwritten_error
from duo.eager.trace import NOTHING, Info, Macro, Node, Trace, Val, commit, open_trace
from duo.runtime import from_numpy
from duo_ir.core import Builder, Function, Loc, Op, Value
from duo_ir.ops import add
from duo_ir.types import TensorType

# A forward value by position in the Construction of its path: (-1, parameter number) or (op number, result number).
Position = tuple[int, int]
Point = int | Position  # where a cotangent enters a segment


class Origin:
    """Where a value came from: value `number` (or the inner value at that Position) of the path that `segment` ran. `error`: its gradient was
    freed before the flush."""

    __slots__ = ("error", "hooks", "number", "segment")

    def __init__(self, segment: Segment | None, number: Point, error: Exception | None) -> None:
        self.segment, self.number, self.error = segment, number, error
        self.hooks: list[Callable] = []


class Pullback:
    """The backward Function of one path for one set of cotangents: (residuals..., cotangents...) -> gradients of `numbers`.

    touched: numbers of the ops whose rules read forward values; readers: residual -> number of an op whose rule reads it."""

    def __init__(
        self,
        node: Node,
        low: int,
        given: Sequence[Point],
        wanted: Sequence[int],
        overwritten: Mapping[int, int] | None = None,
        places: Mapping[int, Loc] | None = None,
    ) -> None:
        construction = Construction(node, places or {})
        forward = list(construction.builder.ops)
        stale = None
        if overwritten is not None:
            construction.overwritten.update(overwritten)
            stale = construction.stale()
        free = construction.free()
        watch = Watch(stale=stale, free=free, moved=construction.moved)
        with construction.builder as builder:
            seeds = {p: builder.parameter(construction.at(p).type) for p in given}
            start: dict[Value, Value] = {}
            for p, seed in seeds.items():
                value = construction.at(p)
                start[value] = add(start[value], seed) if value in start else seed
            self.numbers, gradients = construction.backward(low, start, wanted, watch)
        number_of = {op: i for i, op in enumerate(forward)}
        self.touched = frozenset(number_of[op] for op in watch.touched)
        again = [op for op in forward if free.issuperset(op.results)]
        new_ops = [*again, *builder.ops[len(forward) :]]
        position, self.residuals, self.function = _outline(
            construction, forward, new_ops, list(seeds.values()), gradients
        )
        self.readers = {position[v]: number_of[op] for v, op in watch.readers.items()}
        self.types = tuple(g.type for g in gradients)


def _outline(
    construction: Construction, forward: list[Op], ops: list[Op], seeds: list[Value], results: Sequence[Value]
) -> tuple[dict[Value, Position], tuple[Position, ...], Function]:
    """The part of `ops` that `results` need, as a Function of the forward values it reads and the seeds. Gives (position of each forward value,
    positions of those read, the Function)."""
    position: dict[Value, Position] = {}
    for i, param in enumerate(construction.builder.params):
        position[param] = (-1, i)
    for i, op in enumerate(forward):
        for r in op.results:
            position[r] = (i, r.index)
    needed = set(results)
    kept: list[Op] = []
    for op in reversed(ops):
        if not needed.isdisjoint(op.results):
            kept.append(op)
            needed.update(op.operands)
    made = {r for op in kept for r in op.results}
    made.update(seeds)
    reads = sorted((v for v in needed if v in position and v not in made), key=lambda v: position[v])
    builder = Builder("backward")
    env = {v: builder.parameter(v.type) for v in [*reads, *seeds]}
    with builder:
        for op in reversed(kept):
            builder.loc = op.loc
            env.update(zip(op.results, builder.emit(op.definition, tuple([env[v] for v in op.operands]), op.attrs)))
    return position, tuple(position[v] for v in reads), builder.build([env[r] for r in results])


class SegmentBackward(Macro):
    """Key (SEGMENT_BACKWARD, pullback, numbers of its operands in this trace, whether the gradients can be differentiated)."""

    name = "segment_backward"

    def infer(self, parent: Node, key: tuple, trace: Trace | None = None) -> tuple[tuple[Info, ...], Any]:
        return tuple(Info(t, key[3]) for t in key[1].types) or (NOTHING,), None

    def build(self, construction: Construction, node: Node) -> tuple[Any, ...]:
        _, pullback, refs, _ = node.key
        return construction.builder.inline(pullback.function, [construction.value(n) for n in refs]) or (None,)


SEGMENT_BACKWARD = SegmentBackward()
_serial = itertools.count()


class Segment:
    """What one flush left: the path it ran, what it read, residuals by position, and the op numbers whose residuals are freed.

    sources: per parameter of the path, the value outside (or the number) that was given for it. late: what an in-place op of the path has
    replaced, number by number, when the op itself was the last thing that the path computed and so could not note it there."""

    def __init__(self, node: Node, entries: Sequence[Val], sources: list[Any], places: Mapping[int, Loc]) -> None:
        self.serial = next(_serial)
        self.node = node
        self.sources = sources
        self.places = places
        self.extras: dict[Any, Any] = {
            e.index: e.extra for e in entries if e.extra is not None and not isinstance(e.extra, Inner)
        }
        self.latest: dict[Any, int] = {}  # a leaf -> its latest entry
        self.links: dict[int, int] = {}
        for n, extra in sorted(self.extras.items()):
            if extra in self.latest:
                self.links[n] = self.latest[extra]
            self.latest[extra] = n
        self.residuals: dict[Position, Val] = {}
        self.inner: dict[
            Position, Val
        ] = {}  # residuals that a gradient can go back to, for derivatives of higher order
        self.late: dict[int, int] = {}
        self.origins: dict[int, Origin] = {}
        self.freed: set[int] = set()

    def source(self, number: int) -> Val:
        """Parameter `number` of the path as a value outside."""
        source = self.sources[number]
        if isinstance(source, Val):
            return source
        dtype = self.node.memo.scalar_dtypes[number]
        val = Val(None, -1, None, Info(TensorType(dtype, ())))
        val.buf = from_numpy(np.asarray(source, dtype.numpy))
        self.sources[number] = val
        return val

    def pullback(self, low: int, given: Sequence[Point], wanted: Sequence[int]) -> Pullback:
        table = self.node.memo.pullbacks
        key = (low, tuple(given), tuple(wanted), tuple(self.late.items()))
        found = table.get(key)
        if found is None:
            found = table[key] = Pullback(self.node, low, given, wanted, self.late, self.places)
        return found

    def note_overwritten(self, val: Val, by: Any) -> None:
        """`by`, a result of this segment that an in-place op computed, has replaced `val`."""
        for i, source in enumerate(self.sources):
            if source is val:
                self.late[self.node.memo.inputs[i][0]] = by
                self.sources[i] = unmarked(val)
        for position, kept in self.residuals.items():
            if kept is val:
                self.late[val.index] = by
                self.residuals[position] = unmarked(val)

    def walk(self, engine: Engine, seeds: Cotangents) -> None:
        """Takes the cotangents of its outputs to its leaves."""
        for extra, n in self.latest.items():
            gradient = engine.cotangents.get(extra)
            if gradient is not None and n not in seeds:
                seeds[n] = gradient
        wanted = {v: v.extra.number for v in engine.wanted if isinstance(v.extra, Origin) and v.extra.segment is self}
        hooked = [n for n, o in self.origins.items() if o.hooks]
        touched: set[int] = set()

        def extra_of(n: int) -> Any:
            return self.origins[n] if n in hooked else self.extras.get(n)

        def stage(low: int, given: Cotangents, wanted: Sequence[int]) -> Cotangents:
            pullback = self.pullback(low, list(given), wanted)
            touched.update(pullback.touched)
            if again := self.freed & pullback.touched:
                raise freed_error(Construction(self.node, self.places).builder.ops[min(again)])
            operands = [self._residual(p, pullback, engine.create) for p in pullback.residuals]
            holders: list[Any] = [None] * len(operands) + list(given.values())
            operands += [t._value() for t in given.values()]
            while True:
                trace = open_trace()
                refs = [number_in(trace, v, t) for v, t in zip(operands, holders)]
                key = (SEGMENT_BACKWARD, pullback, tuple(refs), engine.create)
                vals = commit(trace, key) if -1 not in refs else None
                if vals is not None:
                    return {n: engine.wrap(v) for n, v in zip(pullback.numbers, vals)}

        leaves, found = walk_back(
            seeds, hooked, [n for n in wanted.values() if isinstance(n, int)], extra_of, stage, self.links, self._time
        )
        engine.found.update((v, found[n]) for v, n in wanted.items() if n in found)
        engine.cotangents.update((self.extras[n], g) for n, g in leaves.items() if n in self.extras)
        if not engine.retain:
            self.freed |= touched
            if self.freed >= self.node.memo.saving:
                self.residuals.clear()

    def _residual(self, position: Position, pullback: Pullback, tracked: bool) -> Val:
        val = self.source(position[1]) if position[0] < 0 else self.residuals.get(position)
        if val is None or val.overwritten:
            op = Construction(self.node, self.places).builder.ops[pullback.readers.get(position, max(position[0], 0))]
            raise freed_error(op) if val is None else overwritten_error(op)
        if not tracked or position[0] < 0 or val.info.requires_grad or not val.info.type.dtype.is_float:
            return val
        inner = self.inner.get(position)
        if inner is None:
            inner = self.inner[position] = unmarked(val, True)
            number = Construction(self.node).number_at(position)
            point: Point = position if number is None else number
            inner.extra = self.extras.get(point) or Origin(self, point, None)
        return inner

    def _time(self, point: Point) -> float:
        """When the value at a point was made, as a number of an entry; an inner value of an entry comes before its results."""
        return point if isinstance(point, int) else Construction(self.node).entry_of(point[0]) - 0.5


def unmarked(val: Val, requires_grad: bool | None = None) -> Val:
    """The same value, not marked as overwritten."""
    out = Val(None, -1, None, val.info if requires_grad is None else Info(val.info.type, requires_grad))
    out.buf, out.extra = val.buf, val.extra
    return out
