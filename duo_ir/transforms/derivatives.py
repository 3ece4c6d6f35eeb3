"""Whole Functions from `autodiff`: gradients, vector-Jacobian and Jacobian-vector products, and the forward/backward pair.

Each takes a Function and gives Functions, so higher orders are repetition: `grad_function(grad_function(f))`. What is emitted
but not needed is dropped; sharing and folding are left to `simplify` (differentiation comes before CSE).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from duo_ir.core import Builder, Function, Op, Value
from duo_ir.errors import GradientError
from duo_ir.opdef import Generate, Movement, Reshape
from duo_ir.ops import constant
from duo_ir.transforms.autodiff import forward, reverse_seeded, zeros
from duo_ir.transforms.rewrite import dce, with_operands
from duo_ir.types import Dim, DimLike, TensorType, bool_
from duo_ir.verify import bound_sizes, used_sizes


def _float_numbers(values: Iterable[Value]) -> tuple[int, ...]:
    return tuple(i for i, v in enumerate(values) if v.type.dtype.is_float)


def _copy(function: Function, name: str) -> tuple[Builder, list[Value]]:
    builder = Builder(name)
    return builder, [builder.parameter(p.type, n) for p, n in zip(function.params, function.names)]


def grad_function(function: Function, wrt: Sequence[int] | None = None, value: bool = False) -> Function:
    """(parameters) -> gradients of result 0, a 0-d float, for the parameters `wrt` (default: all floats).

    With `value`, all results of `function` come first. A gradient is zero where nothing flows. Raises GradientError.
    """
    if not function.results or function.results[0].type.shape or not function.results[0].type.dtype.is_float:
        got = ", ".join(map(str, function.result_types))
        raise GradientError(
            f"a gradient needs a 0-d float as first result, but @{function.name} gives {got}; reduce it to a scalar"
        )
    wrt = _float_numbers(function.params) if wrt is None else wrt
    builder, params = _copy(function, f"{function.name}_grad")
    with builder:
        results = builder.inline(function, params)
        seed = constant(value=1.0, dtype=results[0].type.dtype)
        gradients = reverse_seeded(builder.ops, [(results[0], seed)], [params[i] for i in wrt])
        out = [zeros(params[i].type) if g is None else g for i, g in zip(wrt, gradients)]
    return dce(builder.build([*results, *out] if value else out))


def vjp_function(function: Function, wrt: Sequence[int] | None = None) -> Function:
    """(parameters, one cotangent per float result) -> gradients for the parameters `wrt` (default: all floats)."""
    wrt = _float_numbers(function.params) if wrt is None else wrt
    builder, params = _copy(function, f"{function.name}_vjp")
    with builder:
        outputs = _float_numbers(function.results)
        cotangents = [builder.parameter(function.results[k].type) for k in outputs]
        results = builder.inline(function, params)
        seeds = [(results[k], g) for k, g in zip(outputs, cotangents)]
        gradients = reverse_seeded(builder.ops, seeds, [params[i] for i in wrt])
        out = [zeros(params[i].type) if g is None else g for i, g in zip(wrt, gradients)]
    return dce(builder.build(out))


def jvp_function(function: Function, wrt: Sequence[int] | None = None) -> Function:
    """(parameters, tangents of the parameters `wrt`) -> (results, tangents of the float results). `wrt`: all floats by default."""
    wrt = _float_numbers(function.params) if wrt is None else wrt
    builder, params = _copy(function, f"{function.name}_jvp")
    with builder:
        tangents = {params[i]: builder.parameter(params[i].type) for i in wrt}
        results = builder.inline(function, params)
        of = [results[k] for k in _float_numbers(results)]
        moved = forward(builder.ops, tangents, of)
        out = [zeros(v.type) if t is None else t for v, t in zip(of, moved)]
    return dce(builder.build([*results, *out]))


# -------------------------------------------------------------------------------------------- forward and backward
@dataclass(frozen=True)
class Residual:
    """A forward value that backward reads: parameter `index` of the forward function, or its result `index`."""

    is_param: bool
    index: int


@dataclass(frozen=True)
class Split:
    """A Function cut into a forward that saves what a later backward reads.

    forward: (parameters) -> (the function's results, saved values).
    backward: (residuals..., cotangents...) -> gradients that exist.
    residuals: where backward's first arguments come from, in order.
    cotangents: the results of the function that backward takes a cotangent for, in order, after the residuals.
    gradients: one per `wrt`: its number among backward's results, or None where nothing flows.
    """

    forward: Function
    backward: Function
    residuals: tuple[Residual, ...]
    cotangents: tuple[int, ...]
    gradients: tuple[int | None, ...]


def linearize_split(function: Function, wrt: Sequence[int], outputs: Sequence[int] | None = None) -> Split:
    """The forward/backward pair of `function` for gradients of results `outputs` (default: all floats) by parameters `wrt`.

    Residuals are exactly the forward values that backward reads. Backward makes for itself what costs nothing to make: constants and
    other values that depend on no parameter, and movements (reshape, transpose, broadcast...) of a parameter or of a value that is not
    larger. Where backward needs a named size that none of its arguments has, one empty saved value (`bool[sizes..., 0]`)
    carries it. Cotangents that influence no gradient are left out. The cotangent of a parameter that is also a result counts as its
    first contribution: that is how a running gradient goes on from a later segment into this one in the one order of addition.
    """
    outputs = _float_numbers(function.results) if outputs is None else outputs
    builder, params = _copy(function, function.name)
    with builder:
        results = list(builder.inline(function, params))
        forward_ops = tuple(builder.ops)
        cotangents = [builder.parameter(function.results[k].type, f"ct{k}") for k in outputs]
        seeds = [(results[k], g) for k, g in zip(outputs, cotangents)]
        found = reverse_seeded(forward_ops, seeds, [params[i] for i in wrt])
    made = [g for g in found if g is not None]
    backward_ops = list(dce(Function(builder.params, builder.ops[len(forward_ops) :], made)).ops)
    repeated, read = _recompute(backward_ops, made, params, forward_ops)
    used = {v for op in backward_ops for v in op.operands} | set(made)
    kept = [(k, g) for k, g in zip(outputs, cotangents) if g in used]

    body = [*repeated, *backward_ops]
    missing = _unbound(read, [g for _, g in kept], body)
    extra: list[Op] = []
    if missing:
        with Builder() as sizes:
            read.append(zeros(TensorType(bool_, (*[Dim.symbol(n) for n in missing], 0))))
        extra = sizes.ops
    own = set(params) | set(results)
    every = [*results, *[v for v in read if v not in own]]
    place = {v: Residual(False, i) for i, v in reversed(list(enumerate(every)))}
    place.update((v, Residual(True, i)) for i, v in enumerate(params))
    unique = list(dict.fromkeys(made))
    number = {g: i for i, g in enumerate(unique)}
    return Split(
        forward=dce(Function(params, [*forward_ops, *extra], every, function.name, function.names)),
        backward=_closed(read, [g for _, g in kept], body, unique, f"{function.name}_backward"),
        residuals=tuple(place[v] for v in read),
        cotangents=tuple(k for k, _ in kept),
        gradients=tuple(None if g is None else number[g] for g in found),
    )


def _recompute(
    backward: Sequence[Op], made: Sequence[Value], params: Sequence[Value], ops: Sequence[Op]
) -> tuple[list[Op], list[Value]]:
    """The forward ops that backward repeats, in program order, and the forward values it reads (then a residual each)."""
    parameters, own = set(params), set(ops)
    known: dict[Value, bool] = {}
    for op in ops:
        known.update(dict.fromkeys(op.results, _is_free(op, known, parameters)))
    repeated: set[Op] = set()
    read: dict[Value, None] = {}
    pending = [v for op in backward for v in op.operands] + list(made)
    pending.reverse()
    while pending:
        v = pending.pop()
        if known.get(v, False) and v.op is not None:
            if v.op not in repeated:
                repeated.add(v.op)
                pending += reversed(v.op.operands)
        elif v in parameters or v.op in own:
            read[v] = None
    return [op for op in ops if op in repeated], list(read)


def _is_free(op: Op, known: dict[Value, bool], parameters: set[Value]) -> bool:
    """Whether making `op`'s result again costs no memory and no arithmetic to speak of."""
    kind = op.definition.kind
    if isinstance(kind, Generate):
        return not op.operands
    if not isinstance(kind, (Movement, Reshape)):
        return False
    return all(v in parameters or known[v] or _at_most(v.type.size, op.result.type.size) for v in op.operands)


def _at_most(a: DimLike, b: DimLike) -> bool:
    """a <= b for every value of the named sizes (each at least 2); False where that is not plain to see."""
    difference = b - a
    if isinstance(difference, int):
        return difference >= 0
    least: dict[str, int] = dict.fromkeys(difference.names, 2)
    return all(c > 0 for mono, c in difference.terms if mono) and difference.evaluate(least) >= 0


def _unbound(read: Sequence[Value], cotangents: Sequence[Value], body: Sequence[Op]) -> list[str]:
    """Named sizes that backward uses and none of its arguments fixes, in order of first use."""
    arguments = [v.type for v in (*read, *cotangents)]
    bound = bound_sizes(arguments)
    return [n for n in used_sizes(arguments, body) if n not in bound]


def _closed(
    read: Sequence[Value], cotangents: Sequence[Value], ops: Sequence[Op], results: Sequence[Value], name: str
) -> Function:
    """The ops as a Function of its own, whose parameters stand for `read` and `cotangents`."""
    builder = Builder(name)
    env = {v: builder.parameter(v.type) for v in read}
    env.update((v, builder.parameter(v.type, f"ct{i}")) for i, v in enumerate(cotangents))
    own: list[Op] = []
    for op in ops:
        new = with_operands(op, tuple([env[v] for v in op.operands]))
        env.update(zip(op.results, new.results))
        own.append(new)
    return Function(builder.params, own, [env[r] for r in results], name, builder.names)
