"""From what a run fetches and feeds to a Function: the items needed, in creation order, with states threaded through.

`lower(fetches, feeds)` is what users call to see a program; a Session calls `lowered` with the sizes that the feeds have. Parameters:
feeds in order, then states, captured arrays and scalars in canonical order; results: fetches, then the new values of written states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from duo.graph.errors import InvalidArgumentError
from duo.graph.graph import Graph, get_default_graph, located
from duo.graph.items import Assign, Deferred, Operation, Read
from duo.graph.states import Placeholder, Source, State
from duo.graph.tensor import GraphElement, array_of
from duo.lowering import canonical, renamed_sizes
from duo_ir.core import Builder, Function, Op, Value
from duo_ir.transforms.rewrite import with_operands
from duo_ir.transforms.sizes import sized, sized_type
from duo_ir.types import Dim, DimLike, TensorType

Sizes = Mapping[str, DimLike]


class Needed:
    """The items that `roots` need, when the values `fed` are given."""

    def __init__(self, graph: Graph, roots: Iterable[Any], fed: Iterable[Value]) -> None:
        self.graph, self.fed = graph, set(fed)
        self.items: set[Any] = set()
        self.sources: dict[Value, None] = {}  # parameters from outside that are read
        self._seen: set[Any] = set()
        self._stack: list[Any] = list(roots)
        while self._stack:
            self._visit(self._stack.pop())

    def _visit(self, x: Any) -> None:
        if x in self._seen:
            return
        self._seen.add(x)
        graph, push = self.graph, self._stack.extend
        if isinstance(x, Value):
            if x in self.fed:
                return
            if x.op is not None:
                self._stack.append(x.op)
            elif x in graph.reads:
                self._stack.append(graph.reads[x])
            else:
                self.sources[x] = None
        elif isinstance(x, Operation):
            push([v for t in x.outputs if (v := getattr(t, "_value", None)) is not None])
            push(x.effects)
            push(x.control_inputs)
        elif isinstance(x, GraphElement):
            if (value := getattr(x, "_value", None)) is not None:
                self._stack.append(value)
        else:
            self.items.add(x)
            push(graph.waits.get(x, ()))
            if isinstance(x, Op):
                push(x.operands)
                push(graph.follows.get(x, ()))
            elif isinstance(x, Assign):
                self._stack.append(x.value)
            elif isinstance(x, Deferred):
                push(x.needs())


class Lowering:
    """The Function under construction. `current`: the values of the states at this point."""

    def __init__(self, graph: Graph, feeds: Sequence[Value], sizes: Sizes) -> None:
        self.graph, self.sizes = graph, sizes
        self.builder = Builder("graph")
        self.env: dict[Value, Value] = {}
        self.current: dict[State, Value] = {}
        self.origins: list[int | State | Source] = []  # of each parameter: the number of a feed, a state, a source
        self.initial: dict[State, int] = {}  # number of the parameter that a state starts as
        self.written: dict[State, None] = {}
        self.memo: dict[Any, State] = {}  # states that deferred items made for this lowering
        for k, v in enumerate(feeds):
            self.env[v] = self._parameter(k, sized_type(v.type, sizes), _label(graph, v))

    def _parameter(self, origin: Any, type: TensorType, name: str) -> Value:
        self.origins.append(origin)
        return self.builder.parameter(type, name)

    def read(self, state: State) -> Value:
        """The state's value at this point."""
        value = self.current.get(state)
        if value is None:
            self.initial[state] = len(self.origins)
            value = self.current[state] = self._parameter(state, sized_type(state.type, self.sizes), state.name)
        return value

    def write(self, state: State, value: Value) -> None:
        self.read(state)  # it needs a parameter for its place among the results, even if nothing reads that
        self.current[state] = value
        self.written[state] = None

    def source(self, source: Source, type: TensorType) -> Value:
        return self._parameter(source, type, source.name)

    def value(self, value: Value) -> Value:
        """What stands for a value of the graph."""
        found = self.env.get(value)
        if found is None:
            source = self.graph.sources.get(value)
            if source is None:
                raise _inside(value)
            found = self.env[value] = self.source(source, sized_type(value.type, self.sizes))
        return found

    def place(self, item: Any, variants: Mapping[Deferred, tuple]) -> None:
        """Emits one item."""
        if isinstance(item, Read):
            if item.value not in self.env:
                self.env[item.value] = self.read(item.state)
        elif isinstance(item, Assign):
            self.write(item.state, self.value(item.value))
        elif isinstance(item, Deferred):
            item.emit(variants[item], self, [self.value(v) for v in item.needs()])
        else:
            self._op(item)

    def _op(self, op: Op) -> None:
        operands = tuple([self.value(v) for v in op.operands])
        if self.sizes:
            self.builder.loc = op.loc
            attrs = {k: sized(v, self.sizes) for k, v in op.attrs.items()}
            results = self.builder.emit(op.definition, operands, attrs)
        else:
            new = with_operands(op, operands)
            self.builder.ops.append(new)
            results = new.results
        for old, made in zip(op.results, results):
            self.env.setdefault(old, made)  # a fed value keeps what was fed


class Lowered:
    """A program for one set of fetches and feeds. origins[i]: where parameter i comes from; states[k]: the state that result
    len(fetches) + k is the next value of. `raw` is the Function before it was simplified, with `raw_origins`."""

    def __init__(self, lowering: Lowering, fetches: Sequence[Value], pinned: int, deferred: Sequence[Deferred]) -> None:
        written = list(lowering.written)
        results = [*fetches, *[lowering.current[s] for s in written]]
        self.raw = lowering.builder.build(results)
        self.raw_origins = lowering.origins
        self.raw_states = written
        numbers = {lowering.initial[s]: len(fetches) + k for k, s in enumerate(written)}
        form = canonical(self.raw, pinned, numbers)
        self.function = form.function
        self.origins = [lowering.origins[i] for i in form.params]
        self.states = [written[k - len(fetches)] for k in form.results[len(fetches) :]]
        self.fetched = len(fetches)
        self.deferred = tuple(deferred)


def lowered(
    graph: Graph,
    fetches: Sequence[Any],
    feeds: Sequence[Value],
    sizes: Sizes,
    variants: Mapping[Deferred, tuple] | None = None,
) -> Lowered:
    """The program that computes `fetches` (tensors and variables of the graph, and operations, which give no result)."""
    needed = Needed(graph, fetches, feeds)
    for value in needed.sources:
        source = graph.sources.get(value)
        if source is None:
            raise _inside(value)
        if isinstance(source, Placeholder):
            raise InvalidArgumentError(
                f"placeholder {source.name!r}{located(source.loc)}, {value.type}, must be fed: pass feed_dict={{{source.name}: ...}}"
            )
    _check_sizes(graph, needed, sizes)
    variants = variants if variants is not None else {d: d.variant() for d in deferred_of(needed)}
    lowering = Lowering(graph, feeds, sizes)
    with lowering.builder:
        for item in graph.items:
            if item in needed.items:
                lowering.place(item, variants)
    results = []
    for fetch in fetches:
        if isinstance(fetch, Operation):
            continue
        state = getattr(fetch, "_state", None)
        results.append(lowering.value(fetch._value) if state is None else lowering.read(state))
    return Lowered(lowering, results, len(feeds), deferred_of(needed))


def _inside(value: Value) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"a value {value.type} made inside tf.cond or tf.while_loop is used outside; return it from the function"
    )


def deferred_of(needed: Needed) -> list[Deferred]:
    return [item for item in needed.items if isinstance(item, Deferred)]


def _check_sizes(graph: Graph, needed: Needed, sizes: Sizes) -> None:
    """Raises when sizes are being fixed and one that a needed op uses is not among them."""
    if not sizes:
        return
    for item in needed.items:
        for r in item.results if isinstance(item, Op) else ():
            missing = [n for n in r.type.names if n not in sizes]
            if missing:
                owners = [
                    s.name
                    for v, s in graph.sources.items()
                    if isinstance(s, Placeholder) and missing[0] in v.type.names
                ]
                raise InvalidArgumentError(
                    f"size {missing[0]} of {' and '.join(map(repr, owners)) or 'a tensor'} is needed by {item!r}{located(item.loc)} "
                    "and not known: feed that placeholder too"
                )


def _label(graph: Graph, value: Value) -> str:
    source = graph.sources.get(value)
    return source.name if source is not None else ""


def sizes_of(graph: Graph, feeds: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """The named sizes that make the fed tensors have these shapes. Raises InvalidArgumentError naming the tensors that disagree."""
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for tensor, shape in zip(feeds, shapes):
        kind = tensor._type
        if len(shape) != kind.rank:
            raise InvalidArgumentError(_misfit(tensor, shape))
        for d, n in zip(kind.shape, shape):
            if isinstance(d, Dim) and d.terms == (((d.names[0],), 1),):
                first = sizes.setdefault(d.names[0], n)
                owner.setdefault(d.names[0], tensor.name)
                if first != n:
                    raise InvalidArgumentError(
                        f"feeds disagree: {owner[d.names[0]]!r} and {tensor.name!r}{located(tensor.op.loc)} share a size in this "
                        f"program, but one has {first} and the other {n}"
                    )
    for tensor, shape in zip(feeds, shapes):
        for d, n in zip(tensor._type.shape, shape):
            if isinstance(d, Dim):
                known = all(name in sizes for name in d.names)
                want = d.evaluate(sizes) if known else n
            else:
                want = d
            if want != n:
                raise InvalidArgumentError(_misfit(tensor, shape))
    return sizes


def _misfit(tensor: Any, shape: Sequence[int]) -> str:
    fixed = [f"{n}{located(loc)}" for n, loc in tensor.graph.fixed_sizes if n in tensor._type.shape]
    why = f" (sizes left open that other operands have fixed: {', '.join(fixed)})" if fixed else ""
    return (
        f"cannot feed an array of shape {tuple(shape)} for {tensor.name!r}{located(tensor.op.loc)}, which has shape "
        f"{tensor.shape!r}{why}; reshape the array, or declare that size as None"
    )


def lower(fetches: Any, feeds: Any = (), *, graph: Graph | None = None) -> Function:
    """The program that a run of `fetches` with these feeds would compile, in canonical form: print it, or compare its `.hash`.

    feeds: fed tensors in order; their unknown sizes stay symbolic. Or a dict of fed tensors and example arrays, whose shapes are taken.
    """
    listed = list(_flat(fetches))
    graph = graph or next((t.graph for t in listed if hasattr(t, "graph")), None) or get_default_graph()
    elements = [graph.as_graph_element(f) for f in listed]
    keys = [graph.as_graph_element(f) for f in (feeds if not isinstance(feeds, GraphElement) else (feeds,))]
    for k in keys:
        if getattr(k, "_value", None) is None:
            raise InvalidArgumentError(f"{k!r} cannot be fed; feed a placeholder or another tensor of the graph")
    sizes: dict[str, int] = {}
    if isinstance(feeds, Mapping):
        sizes = sizes_of(graph, keys, [np.shape(array_of(v, k.dtype)) for k, v in zip(keys, feeds.values())])
    function = lowered(graph, elements, [k._value for k in keys], sizes).function
    return renamed_sizes(function)


def _flat(structure: Any) -> Iterable[Any]:
    if isinstance(structure, Mapping):
        structure = structure.values()
    elif not isinstance(structure, (list, tuple)):
        yield structure
        return
    for s in structure:
        yield from _flat(s)


__all__ = ["Lowered", "lower", "lowered", "sizes_of"]
