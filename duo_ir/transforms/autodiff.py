"""Differentiation of SSA: reverse and forward mode over a run of ops, in the rules of the op definitions.

`reverse` and `forward` emit into the current Builder, which may still be growing (graph mode's gradients) or may hold a
recorded trace (eager mode's backward); rules are written in ordinary ops, so any order of derivative is the same call again.
`derivatives.py` beside this file makes whole Functions out of the two.

Order of accumulation, which is part of the numerics contract: ops are visited in reverse program order; within one op the operands
contribute in operand order, a value that is several operands of the op so contributing once for each; the first contribution
(a seed, where there is one) is taken as it is and every later one is added to what is there: ct = add(ct, next).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from duo_ir.core import Builder, Function, Op, Value, current_builder
from duo_ir.errors import DuoError, GradientError
from duo_ir.opdef import Control
from duo_ir.ops import add
from duo_ir.ops import broadcasting as nd
from duo_ir.transforms.rewrite import dce
from duo_ir.types import TensorType

_COND = Control("cond")


def zeros(type: TensorType) -> Value:
    """+0.0 (0, False) everywhere, emitted into the current Builder."""
    return nd.full(type.shape, 0, type.dtype)


def where_from(op: Op) -> str:
    """' (at file:line)' for messages, empty when the op has no location."""
    return f" (at {op.loc.full()})" if op.loc is not None else ""


def _active(ops: Iterable[Op], sources: Iterable[Value]) -> set[Value]:
    """The float values among `ops` that depend on `sources` through float values and ops that let derivatives pass, `sources` included."""
    active = set(sources)
    for op in ops:
        if not op.definition.stops and not active.isdisjoint(op.operands):
            active.update(r for r in op.results if r.type.dtype.is_float)
    return active


# ----------------------------------------------------------------------------------------------------- reverse mode
def reverse(
    ops: Iterable[Op],
    seeds: Mapping[Value, Value],
    wrt: Sequence[Value],
    visit: Callable[[Op, list[Op]], None] | None = None,
) -> list[Value | None]:
    """Gradients of sum(seed * value) over `seeds` with respect to each value of `wrt`; None where nothing flows.

    ops: the forward ops in program order, all in the current Builder (pass `builder.ops` itself: it is copied first). Only ops on a
    path from `wrt` to a seeded value are touched. seeds: value -> cotangent of the same type. A gradient has the type of
    its value; values that are not floats have none. `visit(op, emitted)` is told of each op gone through and of the ops its rule
    emitted for what is wanted (a rule may emit more). `wrt` may hold intermediate values; the gradient also flows on through
    them. Raises GradientError, naming the user's line, where an op on a path has no rule.
    """
    ops = tuple(ops)
    wanted = [v for v in wrt if v.type.dtype.is_float]
    active = _active(ops, wanted)
    keep = set(wanted)
    total: dict[Value, Value] = {}
    for value, seed in seeds.items():
        _check_type(seed, value, "the seed", None)
        if value in active:
            total[value] = seed
    builder = current_builder()
    loc = builder.loc
    for op in reversed(ops):
        if not any(r in total for r in op.results) or active.isdisjoint(op.operands):
            continue
        builder.loc = op.loc or loc
        take = total.get
        cotangents = [take(r) if r in keep else total.pop(r, None) for r in op.results]
        before = len(builder.ops)
        contributions = _pull(op, cotangents, active)
        if visit is not None:
            visit(op, _behind(builder.ops[before:], [v for _, v in contributions]))
        for i, contribution in contributions:
            operand = op.operands[i]
            _check_type(contribution, operand, "its gradient rule gives operand " + str(i), op)
            so_far = total.get(operand)
            total[operand] = contribution if so_far is None else add(so_far, contribution)
    builder.loc = loc
    return [total.get(v) for v in wrt]


def _behind(ops: Sequence[Op], values: Iterable[Value]) -> list[Op]:
    """Those of `ops` that `values` are computed by."""
    wanted = set(values)
    out = []
    for op in reversed(ops):
        if not wanted.isdisjoint(op.results):
            wanted.update(op.operands)
            out.append(op)
    return out[::-1]


def _pull(op: Op, cotangents: Sequence[Value | None], active: set[Value]) -> list[tuple[int, Value]]:
    """(operand number, contribution) for each active operand that gets one, in operand order."""
    d = op.definition
    numbers = [i for i, v in enumerate(op.operands) if v in active and v.type.dtype.is_float]
    if d.derivative is not None:
        (g,) = cotangents
        assert g is not None
        pairs: list[tuple[int, Value | None]] = [(i, d.derivative(op, i, g)) for i in numbers]
    elif isinstance(d.kind, Control):
        pairs = list(zip(numbers, _pull_control(op, cotangents, numbers)))
    elif d.vjp is not None:
        given = [zeros(r.type) if g is None else g for r, g in zip(op.results, cotangents)]
        contributions = d.vjp(op, *given)
        pairs = [(i, contributions[i]) for i in numbers]
    else:
        _no_rule(op, "gradient")
    return [(i, v) for i, v in pairs if v is not None]


def _no_rule(op: Op, what: str) -> NoReturn:
    raise GradientError(
        f"{op.definition.name}({', '.join(str(v.type) for v in op.operands)}){where_from(op)} has no {what} rule; "
        "detach its operands (stop_gradient), or compute it from ops that have one"
    )


def _check_type(got: Value, value: Value, what: str, op: Op | None) -> None:
    if got.type == value.type:
        return
    of = f"{op.definition.name}: " if op is not None else ""
    after = where_from(op) if op is not None else ""
    raise DuoError(f"{of}{what} has type {got.type}, but the value has type {value.type}{after}")


def _pull_control(op: Op, cotangents: Sequence[Value | None], numbers: Sequence[int]) -> Sequence[Value | None]:
    if op.definition.kind != _COND:
        raise GradientError(
            f"{op.definition.name}{where_from(op)} cannot be differentiated in reverse: how often it runs is known only when it "
            "runs, so its intermediate values are not kept. Use a fixed number of iterations unrolled in Python (a recurrent layer: "
            "sequences of a known length), or forward mode (jvp), which goes through loops"
        )
    predicate, *captured = op.operands
    given = [(k, g) for k, g in enumerate(cotangents) if g is not None]
    positions = [i - 1 for i in numbers]
    seeded = [k for k, _ in given]
    then, orelse = (_branch_vjp(op.attrs[name], seeded, positions) for name in ("then", "orelse"))
    out = op.definition(predicate, *captured, *[g for _, g in given], then=then, orelse=orelse)
    return out if isinstance(out, tuple) else (out,)


def _branch_vjp(branch: Function, seeded: Sequence[int], wrt: Sequence[int]) -> Function:
    """(parameters, cotangents of results `seeded`) -> gradients of parameters `wrt`. Computes the branch's forward again."""

    def body(b: Builder, params: list[Value]) -> list[Value]:
        cotangents = [b.parameter(branch.results[k].type) for k in seeded]
        results = b.inline(branch, params)
        grads = reverse_seeded(b.ops, [(results[k], g) for k, g in zip(seeded, cotangents)], [params[i] for i in wrt])
        return [zeros(params[i].type) if g is None else g for i, g in zip(wrt, grads)]

    return _extended(branch, f"{branch.name}_vjp", body)


def reverse_seeded(ops: Iterable[Op], seeds: Iterable[tuple[Value, Value]], wrt: Sequence[Value]) -> list[Value | None]:
    """`reverse`, for seeds that may name one value several times (a function that returns a value twice): those add up in order."""
    total: dict[Value, Value] = {}
    ops = tuple(ops)
    for value, seed in seeds:
        total[value] = add(total[value], seed) if value in total else seed
    return reverse(ops, total, wrt)


def _extended(function: Function, name: str, body: Callable[[Builder, list[Value]], Sequence[Value]]) -> Function:
    """A Function with `function`'s parameters first; `body(builder, those)` adds parameters and ops and gives the results."""
    builder = Builder(name)
    with builder:
        params = [builder.parameter(p.type, n) for p, n in zip(function.params, function.names)]
        results = body(builder, params)
    return dce(builder.build(results))


# ----------------------------------------------------------------------------------------------------- forward mode
def forward(ops: Iterable[Op], tangents: Mapping[Value, Value], of: Sequence[Value]) -> list[Value | None]:
    """Tangents of the values `of`, given those of some inputs: J * tangent. None where the tangent is zero.

    ops: the forward ops in program order, in the current Builder; all of them are passed through, so give those between the
    inputs and `of`. tangents: value -> tangent of the same type; a value that has one keeps it. Raises GradientError where an op has
    no rule.
    """
    ops = tuple(ops)
    needed = _needed(ops, of)
    tangent: dict[Value, Value] = {}
    for value, t in tangents.items():
        _check_type(t, value, "the tangent", None)
        if value.type.dtype.is_float:
            tangent[value] = t
    builder = current_builder()
    loc = builder.loc
    for op in ops:
        if needed.isdisjoint(op.results) or not any(v in tangent for v in op.operands):
            continue
        if not any(r.type.dtype.is_float for r in op.results):
            continue
        builder.loc = op.loc or loc
        out = _push(op, [tangent.get(v) for v in op.operands])
        for r, moved in zip(op.results, out):
            if moved is not None and r.type.dtype.is_float and r not in tangent:
                _check_type(moved, r, "its tangent", op)
                tangent[r] = moved
    builder.loc = loc
    return [tangent.get(v) for v in of]


def _needed(ops: Sequence[Op], of: Iterable[Value]) -> set[Value]:
    needed = set(of)
    for op in reversed(ops):
        if not needed.isdisjoint(op.results):
            needed.update(op.operands)
    return needed


def _push(op: Op, tangents: Sequence[Value | None]) -> Sequence[Value | None]:
    """The results' tangents."""
    d = op.definition
    if d.derivative is not None:
        total: Value | None = None
        for i, t in enumerate(tangents):
            part = d.derivative(op, i, t) if t is not None else None
            if part is not None:
                total = part if total is None else add(total, part)
        return (total,)
    if isinstance(d.kind, Control):
        return _push_cond(op, tangents) if d.kind == _COND else _push_while(op, tangents)
    if d.jvp is not None:
        return _as_tuple(d.jvp(op, tangents))
    if d.linear:
        if not any(tangents[i] is not None for i in d.linear):
            return (None,) * len(op.results)
        operands: list[Value] = list(op.operands)
        for i in d.linear:
            t = tangents[i]
            operands[i] = zeros(op.operands[i].type) if t is None else t
        return _as_tuple(d(*operands, **op.attrs))
    _no_rule(op, "forward-mode")


def _as_tuple(out: Any) -> Sequence[Value | None]:
    return out if isinstance(out, (tuple, list)) else (out,)


def _push_cond(op: Op, tangents: Sequence[Value | None]) -> Sequence[Value | None]:
    predicate, *captured = op.operands
    positions = [i - 1 for i, t in enumerate(tangents) if t is not None]
    given = [t for t in tangents if t is not None]
    floats = [k for k, r in enumerate(op.results) if r.type.dtype.is_float]
    then, orelse = (_branch_jvp(op.attrs[name], positions, floats) for name in ("then", "orelse"))
    out = iter(_as_tuple(op.definition(predicate, *captured, *given, then=then, orelse=orelse)))
    return [next(out) if k in floats else None for k in range(len(op.results))]


def _branch_jvp(branch: Function, given: Sequence[int], of: Sequence[int]) -> Function:
    """(parameters, tangents of parameters `given`) -> tangents of results `of`."""

    def body(b: Builder, params: list[Value]) -> list[Value]:
        tangents = {params[i]: b.parameter(params[i].type) for i in given}
        results = b.inline(branch, params)
        out = forward(b.ops, tangents, [results[k] for k in of])
        return [zeros(results[k].type) if t is None else t for k, t in zip(of, out)]

    return _extended(branch, f"{branch.name}_jvp", body)


def _push_while(op: Op, tangents: Sequence[Value | None]) -> Sequence[Value | None]:
    """The loop again, with the tangents of its float values carried beside them."""
    test, body, count = op.attrs["test"], op.attrs["body"], op.attrs["carried"]
    carried, constants = op.operands[:count], op.operands[count:]
    moving = _moving(body, count, {i for i, t in enumerate(tangents) if t is not None})
    carried_t = [i for i in moving if i < count]
    constants_t = [i for i in moving if i >= count]
    if not carried_t:
        return [None] * count

    def given(i: int) -> Value:
        t = tangents[i]
        return zeros(op.operands[i].type) if t is None else t

    def split(b: Builder, function: Function) -> tuple[list[Value], dict[int, Value]]:
        """Parameters of the new loop's functions: carried, their tangents, constants, their tangents."""
        types = function.param_types
        main = [b.parameter(t) for t in types[:count]]
        dots = {i: b.parameter(types[i]) for i in carried_t}
        main += [b.parameter(t) for t in types[count:]]
        return main, dots | {i: b.parameter(types[i]) for i in constants_t}

    step = Builder(f"{body.name}_jvp")
    with step:
        params, dots = split(step, body)
        results = step.inline(body, params)
        out = forward(step.ops, {params[i]: t for i, t in dots.items()}, [results[i] for i in carried_t])
        out = [zeros(results[i].type) if t is None else t for i, t in zip(carried_t, out)]
    again = Builder(test.name)
    with again:
        params, _ = split(again, test)
        proceed = again.inline(test, params)
    found = op.definition(
        *carried, *[given(i) for i in carried_t], *constants, *[given(i) for i in constants_t],
        test=again.build(proceed), body=dce(step.build([*results, *[t for t in out if t is not None]])), carried=count + len(carried_t),
    )  # fmt: skip
    moved = dict(zip(carried_t, _as_tuple(found)[count:]))
    return [moved.get(i) for i in range(count)]


def _moving(body: Function, count: int, given: set[int]) -> list[int]:
    """The float parameters of a loop body whose tangent may become non-zero, when those of `given` are at the start."""
    moving = set(given)
    while True:
        active = _active(body.ops, [body.params[i] for i in moving])
        more = {i for i in range(count) if body.results[i] in active and body.params[i].type.dtype.is_float} - moving
        if not more:
            return sorted(moving)
        moving |= more


__all__ = ["forward", "reverse", "reverse_seeded", "where_from", "zeros"]
