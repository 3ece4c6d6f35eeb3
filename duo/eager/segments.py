"""Tape segments: what an earlier flush left behind for a backward pass.

When a flush runs values that require gradients and that someone still holds, the forward values which their derivative rules will
read (the residuals) become outputs too and are kept, with the leaves, in a Segment; its backward is a Function of
residuals and cotangents, made when a backward pass asks for it and kept with the node of the path.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from duo.eager.autograd import Cotangents, Engine, Inner, number_in, walk_back
from duo.eager.build import Construction, Watch, freed_error, overwritten_error
from duo.eager.steps import Position, Unable, outline
from duo.eager.trace import Stamp, Trace, Val, commit, open_trace
from duo.eager.trie import NOTHING, Info, Macro, Node
from duo.runtime import from_numpy, runnable
from duo_ir.core import Loc, Value
from duo_ir.ops import add
from duo_ir.types import TensorType

Point = int | Position  # where a cotangent enters a segment


class Origin:
    """Where a value came from (or a copy of it, where `segment` is a Moved): value `number` (or the inner value at that Position) of the path that `segment` ran. `error`: its gradient was
    freed before the flush (or what says so when asked)."""

    __slots__ = ("_error", "hooks", "number", "segment")

    def __init__(self, segment: Any, number: Point, error: Exception | Callable[[], Exception] | None) -> None:
        self.segment, self.number, self._error = segment, number, error
        self.hooks: list[Callable] = []

    @property
    def error(self) -> Exception | None:
        if callable(self._error):
            self._error = self._error()
        return self._error


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
        position, self.residuals, self.function = outline(
            construction.builder.params, forward, new_ops, list(seeds.values()), gradients
        )
        self._alone: Any = None
        self.readers = {position[v]: number_of[op] for v, op in watch.readers.items()}
        self.types = tuple(g.type for g in gradients)

    def alone(self) -> Any:
        """The program of the Function, one kernel per op."""
        if self._alone is None:
            self._alone = runnable(self.function, False).run
        return self._alone


class SegmentBackward(Macro):
    """Key (SEGMENT_BACKWARD, pullback, numbers of its operands in this trace, whether the gradients can be differentiated)."""

    name = "segment_backward"

    def infer(self, parent: Node, key: tuple, trace: Trace | None = None) -> tuple[tuple[Info, ...], Any]:
        return tuple(Info(t, key[3], parent.device) for t in key[1].types) or (NOTHING,), None

    def build(self, construction: Construction, node: Node) -> tuple[Any, ...]:
        _, pullback, refs, _ = node.key
        return construction.builder.inline(pullback.function, [construction.value(n) for n in refs]) or (None,)

    def enter(self, path: Any, node: Node) -> None:
        if node.key[3]:
            raise Unable

    def alone(self, node: Node, type_of: Callable[[int], TensorType]) -> tuple[Sequence[int], Callable[..., Any]]:
        return node.key[2], node.key[1].alone()


SEGMENT_BACKWARD = SegmentBackward()
_serial = itertools.count()


def new_serial() -> int:
    """Segments are walked back in the reverse order of these."""
    return next(_serial)


class Segment:
    """What one flush left: the path it ran, what it read, residuals by position, and the op numbers whose residuals are freed.

    sources: per parameter of the path, the value outside (or the number) that was given for it. late: what an in-place op of the path has
    replaced, number by number, when the op itself was the last thing that the path computed and so could not note it there."""

    def __init__(self, node: Node, entries: Sequence[Val], sources: list[Any], places: Mapping[int, Loc]) -> None:
        self.serial = new_serial()
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

    def source(self, number: int) -> Val | None:
        """Parameter `number` of the path as a value outside."""
        source = self.sources[number]
        if source is None or isinstance(source, Val):
            return source
        dtype = self.node.memo.scalar_dtypes[number]
        val = Val(None, -1, None, Info(TensorType(dtype, ()), False, self.node.device))
        val.buf = from_numpy(np.asarray(source, dtype.numpy), device=self.node.device)
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
        touched: set[Any] = set()

        def extra_of(n: int) -> Any:
            return self.origins[n] if n in hooked else self.extras.get(n)

        def stage(low: int, given: Cotangents, wanted: Sequence[int]) -> Cotangents:
            return self.stage(engine, low, given, wanted, touched)

        leaves, found = walk_back(
            seeds, hooked, [n for n in wanted.values() if isinstance(n, int)], extra_of, stage, self.links, self._time
        )
        engine.found.update((v, found[n]) for v, n in wanted.items() if n in found)
        engine.cotangents.update((self.extras[n], g) for n, g in leaves.items() if n in self.extras)
        if not engine.retain:
            self.free(touched)

    def stage(
        self, engine: Engine, low: int, given: Cotangents, wanted: Sequence[int], touched: set[Any]
    ) -> Cotangents:
        """Records the reverse pass over the entries after `low`; adds what must not be freed yet, or not twice, to `touched`."""
        pullback = self.pullback(low, list(given), wanted)
        touched.update(pullback.touched)
        if again := self.freed & pullback.touched:
            raise freed_error(Construction(self.node, self.places).builder.ops[max(again)])
        operands = [self._residual(p, pullback, engine.create) for p in pullback.residuals]
        holders: list[Any] = [None] * len(operands) + list(given.values())
        operands += [t._value() for t in given.values()]
        while True:
            trace = open_trace(self.node.device)
            refs = [number_in(trace, v, t) for v, t in zip(operands, holders)]
            key = (SEGMENT_BACKWARD, pullback, tuple(refs), engine.create)
            vals = commit(trace, key) if -1 not in refs else None
            if vals is not None:
                return {n: engine.wrap(v) for n, v in zip(pullback.numbers, vals)}

    def free(self, touched: set[Any]) -> None:
        """Frees what the rules of the ops `touched` read."""
        self.freed |= touched
        if self.freed >= self.saving():
            self.residuals.clear()

    def saving(self) -> Set[int]:
        """Numbers of the ops whose rules read what is kept."""
        return self.node.memo.saving  # type: ignore[no-any-return]

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
    out = Val(
        None, -1, None, val.info if requires_grad is None else Info(val.info.type, requires_grad, val.info.device)
    )
    out.buf, out.extra = val.buf, val.extra
    return out


def version_of(vals: list[Val]) -> Stamp | None:
    """The version that a saved value is of: the one that all who hold that value are of. In-place ops before this flush are known to the path."""
    if len(vals) == 1 and vals[0].stamp is None:
        vals[0].stamp = Stamp()
    stamps = {val.stamp for val in vals}
    stamp = stamps.pop() if len(stamps) == 1 else None
    return stamp if stamp is not None and not stamp.overwritten else None
