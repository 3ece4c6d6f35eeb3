"""Control flow and gradients: cond, while_loop, case, gradients.

The user's functions are traced into Functions of their own; what they use from outside becomes operands. States that a branch
assigns (variables, generators) become results, assigned after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from duo.eager.infer import user_location
from duo.eager.tensor import EagerTensor
from duo.graph.errors import InvalidArgumentError
from duo.graph.graph import Graph, get_default_graph, graph_of
from duo.graph.items import Frame, Operation
from duo.graph.states import State
from duo.graph.tensor import GraphElement, GraphTensor, convert_to_tensor, quiet
from duo.tensor import Tensor
from duo_ir.core import Builder, Function, Value
from duo_ir.errors import DTypeError, GradientError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import control
from duo_ir.ops import shape as movement
from duo_ir.transforms.autodiff import reverse
from duo_ir.types import bool_


class _Branch:
    """One of the user's functions, traced in a frame of its own. structure: what it returned, values: the tensors in it."""

    def __init__(
        self, graph: Graph, function: Callable[..., Any], parameters: Sequence[Value] = (), name: str = "branch"
    ) -> None:
        self.frame = frame = Frame(graph, graph.frame, name)
        if graph.frame is graph.root:
            graph.branch_reads = graph._known[-1]
        graph.frame = frame
        try:
            given = []
            for p in parameters:
                inner = frame.parameter(p.type)
                frame.own.add(inner)
                given.append(inner)
            self.parameters = given
            with quiet(graph):
                self.structure = function(*[graph.wrap(v) for v in given])
                self.values = [graph.value_of(convert_to_tensor(x)) for x in _leaves(self.structure)]
        except BaseException:
            graph.forget_branches()
            raise
        finally:
            graph.frame = frame.parent  # type: ignore[assignment]

    def outer(self) -> dict[Value, Value]:
        """Captured values of the frame around, and the parameters that stand for them."""
        parent = self.frame.parent
        assert parent is not None
        return {o: p for o, p in self.frame.captured.items() if parent.resolve(o) is o}


def _leaves(structure: Any) -> list[Any]:
    if structure is None or isinstance(structure, Operation):
        return []
    if isinstance(structure, (list, tuple)):
        return [leaf for s in structure for leaf in _leaves(s)]
    return [structure]


def _rebuild(structure: Any, tensors: Any) -> Any:
    if structure is None or isinstance(structure, Operation):
        return None
    if isinstance(structure, (list, tuple)):
        parts = [_rebuild(s, tensors) for s in structure]
        kind = structure.__class__
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    return next(tensors)


def _closed(
    branch: _Branch, operands: Sequence[Value], results: Sequence[Value], lead: Sequence[Value] = ()
) -> Function:
    """The branch as a Function of `lead` (its own parameters) and of the outer values `operands`."""
    frame = branch.frame
    captured = branch.outer()
    params = [*lead]
    for o in operands:
        inner = captured.get(o)
        if inner is None:
            inner = Value(o.type, None, 0)
        params.append(inner)
    numbered = [Value(p.type, None, i) for i, p in enumerate(params)]
    fresh = Function(params, frame.ops, results, frame.name)
    # Parameters were numbered as they were captured; a Function numbers them in its own order.
    builder = Builder(frame.name)
    with builder:
        builder.params, builder.names = numbered, [""] * len(numbered)
        out = builder.inline(fresh, numbered)
    return builder.build(out)


# ---------------------------------------------------------------------------------------------------------- cond
def cond(
    pred: Any,
    true_fn: Callable[[], Any] | None = None,
    false_fn: Callable[[], Any] | None = None,
    strict: bool = False,
    name: str | None = None,
    fn1: Callable[[], Any] | None = None,
    fn2: Callable[[], Any] | None = None,
) -> Any:
    """true_fn() where the bool `pred` holds, else false_fn(); only that one runs. Both return the same types in the same structure.

    Assignments made inside a function happen when it is the one that runs."""
    true_fn, false_fn = true_fn or fn1, false_fn or fn2
    if true_fn is None or false_fn is None:
        raise InvalidArgumentError("cond needs true_fn and false_fn")
    p = convert_to_tensor(pred, dtype=None)
    if p.dtype is not bool_:
        raise DTypeError(f"cond: the predicate is a bool, not {p.dtype.name}; compare it with zero")
    if p.ndim:
        raise ShapeError(
            f"cond: the predicate is one bool, not {p._type}; reduce it with reduce_any or reduce_all, or use tf.where"
        )
    graph = p.graph
    graph.frame.loc = user_location()
    branches = [_Branch(graph, f, name=n) for f, n in ((true_fn, "then"), (false_fn, "orelse"))]
    first, second = branches
    kinds = [[v.type for v in b.values] for b in branches]
    if kinds[0] != kinds[1]:
        raise ShapeError(
            f"cond: both functions give the same types, but true_fn gives ({', '.join(map(str, kinds[0]))}) and false_fn "
            f"({', '.join(map(str, kinds[1]))}); cast or reshape in one"
        )
    states = list(dict.fromkeys([*first.frame.current, *second.frame.current]))
    results = []
    for b in branches:
        now = []
        for s in states:
            value = b.frame.current.get(s)
            now.append(value if value is not None else b.frame.resolve(graph.read(s)))
        results.append([*b.values, *now])
    operands = list(dict.fromkeys([*first.outer(), *second.outer()]))
    functions = [_closed(b, operands, r) for b, r in zip(branches, results)]
    with graph.frame:
        out = control.cond(graph.value_of(p), *operands, then=functions[0], orelse=functions[1])
    values = out if isinstance(out, tuple) else (out,)
    return _finish(graph, "cond", name, first.structure, len(first.values), states, values, (p,))


def _finish(
    graph: Graph,
    type: str,
    name: str | None,
    structure: Any,
    count: int,
    states: Sequence[State],
    values: Sequence[Value],
    inputs: tuple,
) -> Any:
    tensors = [graph.wrap(v) for v in values[:count]]
    op = graph.name_results(type, name, tensors, inputs)
    made = values[0].op if values else None
    for s, v in zip(states, values[count:]):
        graph.assign(s, v, after=made)
        if graph.frame.parent is None:
            op.effects.append(graph.items[-1])
    if not _leaves(structure):
        return op
    return _rebuild(structure, iter(tensors))


def case(
    pred_fn_pairs: Any, default: Callable[[], Any] | None = None, exclusive: bool = False, name: str | None = None
) -> Any:
    """The function of the first predicate that holds, else `default`."""
    pairs = list(pred_fn_pairs.items()) if isinstance(pred_fn_pairs, dict) else list(pred_fn_pairs)
    if default is None:
        (_, default), pairs = pairs[-1], pairs[:-1]
    chosen = default
    for pred, function in reversed(pairs):
        chosen = lambda p=pred, f=function, g=chosen: cond(p, f, g, name=name)  # noqa: E731
    return chosen()


# ---------------------------------------------------------------------------------------------------------- while
def while_loop(
    cond: Callable[..., Any],
    body: Callable[..., Any],
    loop_vars: Any,
    shape_invariants: Any = None,
    parallel_iterations: int = 10,
    back_prop: bool = True,
    swap_memory: bool = False,
    name: str | None = None,
    maximum_iterations: Any = None,
    return_same_structure: bool = False,
) -> Any:
    """loop_vars = body(*loop_vars) while cond(*loop_vars) holds. Loop variables keep their types. It has no reverse-mode gradient."""
    start = [convert_to_tensor(v) for v in _leaves(list(loop_vars))]
    graph = graph_of(start)
    listed = list(loop_vars)
    counted = maximum_iterations is not None
    if counted:
        start.append(convert_to_tensor(np.int64(0)))
        limit = convert_to_tensor(maximum_iterations)

    def unpack(values: Sequence[Any]) -> list[Any]:
        feed = iter(values)
        return [_rebuild(v, feed) for v in listed]

    def test(*values: Any) -> Any:
        go = cond(*unpack(values))
        return (go & (values[-1] < _as_i64(limit))) if counted else go

    def step(*values: Any) -> Any:
        out = body(*unpack(values))
        leaves = _leaves(out if isinstance(out, (list, tuple)) else [out])
        made = [convert_to_tensor(x, like=v) for x, v in zip(leaves, values)]
        if len(leaves) != len(values) - counted:
            raise InvalidArgumentError(
                f"while_loop: body takes {len(values) - counted} loop variables, but returns {len(leaves)}"
            )
        return [*made, values[-1] + 1] if counted else made

    given = [graph.value_of(v) for v in start]
    graph.frame.loc = user_location()
    tested = _Branch(graph, test, given, "test")
    stepped = _Branch(graph, step, given, "body")
    if tested.frame.current:
        raise InvalidArgumentError(
            "while_loop: cond must not assign variables or draw random numbers; do it in the body"
        )
    for v, before, after in zip(start, given, stepped.values):
        if before.type != after.type:
            raise ShapeError(
                f"while_loop: loop variable {v.name!r} is {before.type}, but the body makes it {after.type}; a loop variable keeps its "
                "type (tf.cast, or start from another constant)"
            )
    states = list(stepped.frame.current)
    carried = [graph.read(s) for s in states]
    constants = [v for v in dict.fromkeys([*tested.outer(), *stepped.outer()]) if v not in carried]
    outer = [*carried, *constants]
    functions = [
        _closed(tested, outer, tested.values, tested.parameters),
        _closed(stepped, outer, [*stepped.values, *[stepped.frame.current[s] for s in states]], stepped.parameters),
    ]
    count = len(given) + len(carried)
    with graph.frame:
        out = control.while_(*given, *outer, test=functions[0], body=functions[1], carried=count)
    values = out if isinstance(out, tuple) else (out,)
    kept = [*values[: len(given) - counted], *values[len(given) :]]
    result = _finish(graph, "while", name, listed, len(given) - counted, states, kept, tuple(start))
    return result if len(listed) > 1 or return_same_structure else result[0]


def _as_i64(x: Any) -> Any:
    return x.long()


# ---------------------------------------------------------------------------------------------------------- gradients
def gradients(
    ys: Any,
    xs: Any,
    grad_ys: Any = None,
    name: str = "gradients",
    colocate_gradients_with_ops: bool = False,
    gate_gradients: bool = False,
    aggregation_method: Any = None,
    stop_gradients: Any = None,
    unconnected_gradients: str = "none",
) -> list[Any]:
    """d sum(ys) / dx for each x of `xs`: tensors, variables, or eager parameters that the graph uses. None where y does not
    depend on x ('zero': zeros). Cotangents `grad_ys` default to ones; nothing flows through `stop_gradients`."""
    outputs = ys if isinstance(ys, (list, tuple)) else [ys]
    inputs = xs if isinstance(xs, (list, tuple)) else [xs]
    given = [None] * len(outputs) if grad_ys is None else (grad_ys if isinstance(grad_ys, (list, tuple)) else [grad_ys])
    graph = graph_of(outputs)
    frame = graph.frame
    with graph.name_scope(name), quiet(graph):
        seeds: dict[Value, Value] = {}
        for y, g in zip(outputs, given, strict=True):
            value = graph.value_of(convert_to_tensor(y))
            if not value.type.dtype.is_float:
                raise GradientError(f"gradients: {y.name!r} is {value.type}; only floats have gradients")
            with frame:
                seed = nd.ones_like(value) if g is None else graph.value_of(convert_to_tensor(g, like=y))
                if seed.type != value.type:
                    raise ShapeError(f"gradients: {y.name!r} is {value.type}, its cotangent {seed.type}")
                seeds[value] = nd.add(seeds[value], seed) if value in seeds else seed
        found = [_values_of(graph, x) for x in inputs]
        stopped = {v for s in (stop_gradients or ()) for v in _values_of(graph, s)}
        ops = [op for op in frame.ops if stopped.isdisjoint(op.results)] if stopped else list(frame.ops)
        frame.loc = user_location()
        with frame:
            flat = iter(reverse(ops, seeds, [v for values in found for v in values]))
            out: list[Any] = []
            for x, values in zip(inputs, found):
                parts = [g for g in [next(flat) for _ in values][::-1] if g is not None]
                if not parts:
                    zero = unconnected_gradients == "zero"
                    out.append(graph.wrap(nd.zeros_like(graph.value_of(x))) if zero else None)
                    continue
                total = parts[0]
                for g in parts[1:]:
                    total = nd.add(total, g)
                out.append(graph.wrap(total))
        frame.loc = None
        for x, g in zip(inputs, out):
            if g is not None:
                base = x.op.name if isinstance(x, GraphElement) else "parameter"
                graph.name_results(f"{base}_grad", None, [g])
    return out


def _values_of(graph: Graph, x: Any) -> list[Value]:
    """The values that stand for x: of a state, every read of it."""
    if isinstance(x, EagerTensor):
        state: Any = graph.share(x)
    elif isinstance(x, GraphElement):
        state = getattr(x, "_state", None)
    else:
        raise InvalidArgumentError(f"gradients: {x!r} is no tensor of the graph")
    if state is None:
        assert isinstance(x, GraphTensor)
        return [graph.value_of(x)]
    return [r.value for r in graph.reads.values() if r.state is state]


def hessians(ys: Any, xs: Any, name: str = "hessians") -> list[Any]:
    """The matrix of second derivatives for each 1-d x, one row for each element."""
    outputs = []
    for x in xs if isinstance(xs, (list, tuple)) else [xs]:
        (first,) = gradients(ys, [x])
        (n,) = x._type.shape
        if not isinstance(n, int):
            raise ShapeError("hessians: the size of x must be known")
        rows = [gradients(first[i], [x], unconnected_gradients="zero")[0] for i in range(n)]
        parts: list[Tensor] = rows
        outputs.append(get_default_graph().apply(_stacked, tuple(parts)))
    return outputs


def _stacked(*rows: Value) -> Value:
    from_rows = [nd.expand_dims(r, 0) for r in rows]
    return movement.concat(*from_rows, axis=0)
