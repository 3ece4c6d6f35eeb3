"""Derivatives of functions: gradients, vector-Jacobian and Jacobian-vector products, Jacobians, Hessians.

They are the IR's reverse and forward mode applied to a traced function, so any of them may be applied to what another gives, and `vmap` to
all. An argument may be a tensor or a nest of tensors (tuples, lists, dicts).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from duo.eager.tensor import EagerTensor
from duo.nest import Form, flatten
from duo.tensor import Tensor
from duo.tracing import call, closed, interned, outside_of, trace
from duo_ir.core import Builder, Function, Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import concat, eq
from duo_ir.transforms.autodiff import forward, reverse_seeded, zeros
from duo_ir.transforms.batch import batch
from duo_ir.transforms.derivatives import Split, grad_function, jvp_function, linearize_split
from duo_ir.transforms.rewrite import dce
from duo_ir.transforms.simplify import simplify
from duo_ir.types import DimLike, TensorType

Argnums = int | tuple[int, ...]


class _Traced(NamedTuple):
    """A function traced on the leaves of some of its arguments. The operands of `function` are those leaves (`inputs` of them), then what it
    uses from outside; its results are the output's leaves, then those of aux."""

    function: Function
    operands: list[Any]
    inputs: int
    states: list[Any]
    output: Form
    outputs: int
    aux: Form
    fixed: list[Any]  # leaves of aux that are no tensors, None in the place of tensors

    def aux_of(self, results: Sequence[Any]) -> Any:
        rest = iter(results)
        return self.aux.build(iter([next(rest) if x is _TENSOR else x for x in self.fixed]))


_TENSOR = object()


def _trace(name: str, func: Callable, leaves: Sequence[Any], rebuild: Callable, has_aux: bool) -> _Traced:
    for x in leaves:
        if not isinstance(x, Tensor):
            raise DTypeError(f"{name}: derivatives are with respect to tensors, not {type(x).__name__}")
        if not x._type.dtype.is_float:
            raise DTypeError(f"{name}: only floating-point tensors have derivatives, not {x._type}; cast it")
    tracing, out = trace(
        lambda *given: func(*rebuild(iter(given))), [x._type for x in leaves], name, f"duo.func.{name}", None, leaves
    )
    aux: Any = ()
    if has_aux:
        if not isinstance(out, tuple) or len(out) != 2:
            raise ArgumentError(
                f"{name}: with has_aux the function returns a pair (output, aux), not {type(out).__name__}"
            )
        out, aux = out
    results, form = flatten(out)
    for x in results:
        if not isinstance(x, Tensor):
            raise ArgumentError(f"{name}: the function returns tensors, not {type(x).__name__}")
    more, aux_form = flatten(aux)
    values = [tracing.value_of(x) for x in (*results, *[x for x in more if isinstance(x, Tensor)])]
    outside = outside_of(tracing)
    states = [state for state, _, _ in tracing.states.values()]
    function = closed(tracing, values, outside)
    fixed = [_TENSOR if isinstance(x, Tensor) else x for x in more]
    return _Traced(function, [*leaves, *outside], len(leaves), states, form, len(results), aux_form, fixed)


def _chosen(name: str, args: Sequence[Any], argnums: Argnums) -> tuple[list[Any], Form, Callable]:
    """(leaves of the arguments `argnums`, their form as one tuple, leaves -> all arguments)."""
    single = isinstance(argnums, int)
    numbers: tuple[int, ...] = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not numbers or any(
        isinstance(n, bool) or not isinstance(n, int) or not -len(args) <= n < len(args) for n in numbers
    ):
        raise ArgumentError(f"{name}: argnums {argnums!r} does not name one of the {len(args)} arguments")
    places = [n % len(args) for n in numbers]
    if len(set(places)) != len(places):
        raise ArgumentError(f"{name}: argnums {argnums!r} names an argument twice")
    leaves, form = flatten(args[places[0]] if single else tuple([args[n] for n in places]))

    def rebuild(given: Any) -> tuple[Any, ...]:
        chosen = form.build(given)
        every = list(args)
        for n, x in zip(places, (chosen,) if single else chosen):
            every[n] = x
        return tuple(every)

    return leaves, form, rebuild


# -------------------------------------------------------------------------------------------------------- gradients
def grad(func: Callable, argnums: Argnums = 0, has_aux: bool = False) -> Callable:
    """The function that gives the gradient of `func`, which returns a scalar, by its argument `argnums` (a tuple: a tuple of gradients).

    With has_aux, `func` returns (scalar, aux) and the result is (gradient, aux). Raises ShapeError where the scalar is none.
    """
    both = grad_and_value(func, argnums, has_aux)

    @functools.wraps(func, updated=())
    def gradient(*args: Any, **kwargs: Any) -> Any:
        found, value = both(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


def grad_and_value(func: Callable, argnums: Argnums = 0, has_aux: bool = False) -> Callable:
    """As `grad`, for (gradient, value), and with has_aux (gradient, (value, aux))."""

    @functools.wraps(func, updated=())
    def both(*args: Any, **kwargs: Any) -> Any:
        leaves, form, rebuild = _chosen("grad", args, argnums)
        t = _trace("grad", lambda *a: func(*a, **kwargs), leaves, rebuild, has_aux)
        types = t.function.result_types
        if t.output.cls is not None or types[0].shape or not types[0].dtype.is_float:
            given = ", ".join(map(str, types[: t.outputs]))
            raise ShapeError(
                f"grad: the function returns one floating-point scalar, not ({given}); reduce it (sum, mean), or use vjp or jacrev"
            )
        out = call(_gradient(t.function, t.inputs, len(t.states)), t.operands, t.states)
        found, value, rest = out[: t.inputs], out[t.inputs], out[t.inputs + 1 :]
        gradient = form.build(iter(found))
        return (gradient, (value, t.aux_of(rest))) if has_aux else (gradient, value)

    return both


@functools.lru_cache(512)
def _gradient(function: Function, inputs: int, states: int) -> Function:
    """Gradients, then all results (the states stay last)."""
    made = grad_function(function, range(inputs), value=True)
    n = len(function.results)
    return interned(Function(made.params, made.ops, [*made.results[n:], *made.results[:n]], "grad"))


def vjp(func: Callable, *primals: Any, has_aux: bool = False) -> Any:
    """(func(*primals), pull[, aux]): pull(cotangents), of the output's structure, is a tuple with the vector-Jacobian product for each primal.

    What pull needs of the forward pass is kept, not computed again.
    """
    leaves, form = flatten(primals)
    t = _trace("vjp", func, leaves, form.build, has_aux)
    floats = [k for k in range(t.outputs) if t.function.results[k].type.dtype.is_float]
    split = _split(t.function, t.inputs, tuple(floats))
    n = len(t.function.results) - len(t.states)
    held = [_held(x) for x in t.operands]  # what is written in place later must not reach pull
    out = call(_saving(split.forward, n, len(t.states)), held, t.states)
    results, saved = out[:n], out[n:]
    types = t.function.result_types

    def pull(cotangents: Any) -> Any:
        given, shape = flatten(cotangents)
        if shape.build(iter(range(len(given)))) != t.output.build(iter(range(t.outputs))) or len(given) != t.outputs:
            raise ArgumentError(f"vjp: the cotangents do not have the structure of the output, {t.outputs} tensors")
        for g, want in zip(given, types):
            if not isinstance(g, Tensor) or g._type != want:
                got = g._type if isinstance(g, Tensor) else type(g).__name__
                raise ShapeError(f"vjp: a cotangent has its output's type {want}, not {got}")
        operands = []
        for r in split.residuals:
            if r.is_param:
                operands.append(held[r.index])
            else:
                operands.append(results[r.index] if r.index < n else saved[r.index - n - len(t.states)])
        found = (
            call(split.backward, [*operands, *[given[k] for k in split.cotangents]]) if split.backward.results else []
        )
        pulled = [_zeros_like(x) if i is None else found[i] for x, i in zip(leaves, split.gradients)]
        return form.build(iter(pulled))

    output = t.output.build(iter(results[: t.outputs]))
    return (output, pull, t.aux_of(results[t.outputs :])) if has_aux else (output, pull)


@functools.lru_cache(512)
def _split(function: Function, inputs: int, outputs: tuple[int, ...]) -> Split:
    return linearize_split(function, range(inputs), outputs)


@functools.lru_cache(512)
def _saving(function: Function, kept: int, states: int) -> Function:
    """Results, saved values, then the states' new values."""
    r = function.results
    return interned(
        Function(function.params, function.ops, [*r[:kept], *r[kept + states :], *r[kept : kept + states]], "vjp")
    )


def _held(x: Tensor) -> Any:
    """A tensor with the value that x has now."""
    return EagerTensor(x._value()) if isinstance(x, EagerTensor) else x


def _zeros_like(x: Tensor) -> Any:
    return x.new_zeros(x._type.shape)


def jvp(func: Callable, primals: tuple, tangents: tuple, *, has_aux: bool = False) -> Any:
    """(func(*primals), its derivative along `tangents`[, aux]); tangents have the primals' structure and types."""
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple):
        raise ArgumentError("jvp: primals and tangents are tuples, one entry per argument")
    leaves, form = flatten(primals)
    moved, shape = flatten(tangents)
    if len(moved) != len(leaves) or shape.build(iter(range(len(moved)))) != form.build(iter(range(len(leaves)))):
        raise ArgumentError("jvp: the tangents do not have the structure of the primals")
    t = _trace("jvp", func, leaves, form.build, has_aux)
    for x, v in zip(leaves, moved):
        if not isinstance(v, Tensor) or v._type != x._type:
            got = v._type if isinstance(v, Tensor) else type(v).__name__
            raise ShapeError(f"jvp: a tangent has its primal's type {x._type}, not {got}")
    states = len(t.states)
    operands = [*t.operands, *moved]
    out = call(_pushed(t.function, t.inputs, t.outputs, states), operands, t.states)
    n = len(t.function.results) - states
    results, pushed = out[:n], out[n:]
    output, tangent = (t.output.build(iter(xs)) for xs in (results[: t.outputs], pushed))
    return (output, tangent, t.aux_of(results[t.outputs :])) if has_aux else (output, tangent)


@functools.lru_cache(512)
def _pushed(function: Function, inputs: int, outputs: int, states: int) -> Function:
    """(operands, tangents, states) -> (results, tangents of the outputs, states). Outputs that are not floats have zeros."""
    made = jvp_function(function, range(inputs))
    n, p = len(function.results), len(function.params)
    builder = Builder("jvp")
    with builder:
        lead = [builder.parameter(v.type) for v in made.params[: p - states]]
        tangents = [builder.parameter(v.type) for v in made.params[p:]]
        last = [builder.parameter(v.type) for v in made.params[p - states : p]]
        out = builder.inline(made, [*lead, *last, *tangents])
        floats = iter(out[n:])
        pushed = [next(floats) if r.type.dtype.is_float else zeros(r.type) for r in function.results[: n - states]][
            :outputs
        ]
    return interned(dce(builder.build([*out[: n - states], *pushed, *out[n - states : n]])))


# -------------------------------------------------------------------------------------------------------- Jacobians
def jacrev(func: Callable, argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: int | None = None) -> Callable:
    """The function that gives the Jacobian of `func` by its argument `argnums`, in reverse mode: one pass for each element of the output, as a batch.

    For an output of shape [o...] and an argument of shape [x...] it has shape [o..., x...]; nests of outputs give nests of (nests of) Jacobians.
    chunk_size: how many passes are made at a time.
    """
    return _jacobian("jacrev", func, argnums, has_aux, chunk_size)


def jacfwd(func: Callable, argnums: Argnums = 0, has_aux: bool = False, *, chunk_size: int | None = None) -> Callable:
    """As `jacrev`, in forward mode: one pass for each element of the argument."""
    return _jacobian("jacfwd", func, argnums, has_aux, chunk_size)


def hessian(func: Callable, argnums: Argnums = 0) -> Callable:
    """The function that gives the Hessian of `func`, which returns a scalar: jacfwd of jacrev, of shape [x..., x...]."""
    return jacfwd(jacrev(func, argnums), argnums)


def _jacobian(name: str, func: Callable, argnums: Argnums, has_aux: bool, chunk_size: int | None) -> Callable:
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ArgumentError(f"{name}: chunk_size is an int of at least 1 or None, not {chunk_size!r}")

    @functools.wraps(func, updated=())
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        leaves, form, rebuild = _chosen(name, args, argnums)
        t = _trace(name, lambda *a: func(*a, **kwargs), leaves, rebuild, has_aux)
        for r in t.function.results[: t.outputs]:
            if not r.type.dtype.is_float:
                raise DTypeError(f"{name}: only floating-point outputs have derivatives, not {r.type}")
        whole = _jacobians(t.function, t.inputs, t.outputs, len(t.states), name == "jacrev", chunk_size)
        out = call(whole, t.operands, t.states)
        count = t.inputs * t.outputs
        rows = [form.build(iter(out[k : k + t.inputs])) for k in range(0, count, t.inputs)]
        made = t.output.build(iter(rows))
        return (made, t.aux_of(out[count:])) if has_aux else made

    return jacobian


@functools.lru_cache(512)
def _jacobians(
    function: Function, inputs: int, outputs: int, states: int, backwards: bool, chunk_size: int | None
) -> Function:
    """The Jacobian of each output by each input, then the results after the outputs."""
    builder = Builder("jacobian")
    table: dict[tuple[int, int], Value] = {}
    with builder:
        params = [builder.parameter(p.type) for p in function.params]
        ends = function.result_types[:outputs]
        starts = function.param_types[:inputs]
        for n in range(outputs if backwards else inputs):
            one = _pull_one(function, n, inputs) if backwards else _push_one(function, n, outputs)
            basis = (ends if backwards else starts)[n]
            others = starts if backwards else ends
            for m, rows in enumerate(_over_basis(builder, one, params, basis, chunk_size)):
                shape, other = basis.shape, others[m].shape
                full = nd.reshape(rows, (*shape, *other))
                if backwards:
                    table[n, m] = full
                else:
                    r, axes = len(shape), range(len(shape) + len(other))
                    table[m, n] = nd.transpose(full, (*axes[r:], *axes[:r]))
        rest = builder.inline(function, params)[outputs:]
    out = [table[k, i] for k in range(outputs) for i in range(inputs)]
    return interned(simplify(builder.build([*out, *rest])))


def _pull_one(function: Function, output: int, inputs: int) -> Function:
    """(operands, cotangent of one output) -> gradients of the inputs."""
    builder = Builder("pull")
    with builder:
        params = [builder.parameter(p.type) for p in function.params]
        results = builder.inline(function, params)
        seed = builder.parameter(results[output].type)
        found = reverse_seeded(builder.ops, [(results[output], seed)], params[:inputs])
        out = [zeros(p.type) if g is None else g for p, g in zip(params, found)]
    return dce(builder.build(out))


def _push_one(function: Function, which: int, outputs: int) -> Function:
    """(operands, tangent of one input) -> tangents of the outputs."""
    builder = Builder("push")
    with builder:
        params = [builder.parameter(p.type) for p in function.params]
        tangent = builder.parameter(params[which].type)
        results = builder.inline(function, params)[:outputs]
        found = forward(builder.ops, {params[which]: tangent}, results)
        out = [zeros(r.type) if t is None else t for r, t in zip(results, found)]
    return dce(builder.build(out))


def _over_basis(
    builder: Builder, one: Function, params: Sequence[Value], basis: TensorType, chunk_size: int | None
) -> list[Value]:
    """`one`, whose last parameter is of type `basis`, for each unit vector of that type: results [elements, ...]."""
    n = basis.size
    unit = nd.reshape(nd.cast_to(eq(nd.iota((n, n), 0), nd.iota((n, n), 1)), basis.dtype), (n, *basis.shape))
    step: DimLike = n if chunk_size is None or not isinstance(n, int) else min(chunk_size, n)
    pieces: list[list[Value]] = []
    start: DimLike = 0
    while True:
        stop = n if not isinstance(n, int) or not isinstance(start, int) else min(start + step, n)  # type: ignore[type-var]
        some = nd.slice_axis(unit, 0, start, stop)
        flags = [False] * len(params) + [True]
        made, batched = batch(one, flags, some.type.shape[0])
        out = builder.inline(made, [*params, some])
        count = some.type.shape[0]
        pieces.append([v if b else nd.broadcast_to(v, (count, *v.type.shape)) for v, b in zip(out, batched)])
        start = stop
        if start == n:
            break
    return [concat(*xs, axis=0) for xs in zip(*pieces)]
