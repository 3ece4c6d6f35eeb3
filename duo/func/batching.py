"""`vmap`: a function of one sample, applied to many at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from duo import functional as F
from duo.nest import Form, flatten, spread
from duo.tensor import Tensor
from duo.tracing import call, closed, interned, outside_of, trace
from duo_ir.core import Builder, Function, Value, current_builder
from duo_ir.errors import ArgumentError, DTypeError, ShapeError, TraceError
from duo_ir.ops import broadcasting as nd
from duo_ir.transforms.batch import batch
from duo_ir.transforms.rewrite import dce
from duo_ir.types import DimLike, TensorType, i64

_NO_RANDOM = (
    "a random op inside vmap needs to know whether samples share its numbers: vmap(..., randomness='different') draws for one sample after"
    " another as a loop would, randomness='same' draws once for all"
)


def vmap(
    func: Callable, in_dims: Any = 0, out_dims: Any = 0, randomness: str = "error", *, chunk_size: int | None = None
) -> Callable:
    """`func`, written for one sample, as a function of many: vmap(func)(xs) is stack([func(x) for x in xs]), to the bit.

    in_dims: which dim of the arguments runs over the samples: an int, None (an argument that all samples share), or a tuple of those, one
      per argument, nested as the arguments are (tuples, lists, dicts). Keyword arguments are shared.
    out_dims: where that dim is put in the results; None for a result that is the same for all samples.
    randomness: 'error' refuses random ops inside; 'different' draws numbers of its own for each sample, those that a loop over the samples would draw;
      'same' draws once for all samples.
    chunk_size: how many samples are computed at a time (less memory, the same bits); None: all.

    The function is traced: it may not decide on values in Python (use duo.where or duo.cond) or write tensors in place. It may use tensors from
    outside, and gradients flow to them. Raises ShapeError for arguments of different numbers of samples, ArgumentError for dims that do not fit.
    """
    if randomness not in ("error", "different", "same"):
        raise ArgumentError(f"vmap: randomness is 'error', 'different' or 'same', not {randomness!r}")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ArgumentError(f"vmap: chunk_size is an int of at least 1 or None, not {chunk_size!r}")

    @functools.wraps(func, updated=())
    def mapped(*args: Any, **kwargs: Any) -> Any:
        leaves, form = flatten(args)
        dims = _in_dims(in_dims, form, leaves)
        size = _batch_size(leaves, dims)
        if chunk_size is None or not isinstance(size, int) or size <= chunk_size:
            return _mapped(func, kwargs, leaves, form, dims, size, out_dims, randomness)
        parts = []
        for start in range(0, size, chunk_size):
            n = min(chunk_size, size - start)
            some = [x if d is None else F.narrow(x, d, start, n) for x, d in zip(leaves, dims)]
            parts.append(flatten(_mapped(func, kwargs, some, form, dims, n, out_dims, randomness)))
        together = parts[0][1]
        axes = _out_dims(out_dims, together)
        joined = [xs[0] if d is None else F.cat(xs, d) for d, *xs in zip(axes, *[p for p, _ in parts])]
        return together.build(iter(joined))

    return mapped


def _is_dim(x: Any) -> bool:
    return x is None or (isinstance(x, int) and not isinstance(x, bool))


def _in_dims(in_dims: Any, form: Form, leaves: Sequence[Any]) -> list[int | None]:
    """The dim of each leaf of the arguments, counted from the front."""
    if isinstance(in_dims, list):
        in_dims = tuple(in_dims)
    if not _is_dim(in_dims) and not isinstance(in_dims, tuple):
        raise ArgumentError(f"vmap: in_dims is an int, None or a tuple with one entry per argument, not {in_dims!r}")
    out: list[int | None] = []
    for x, d in zip(leaves, spread(in_dims, form, _is_dim, "vmap: in_dims")):
        if d is None:
            out.append(None)
            continue
        if not isinstance(x, Tensor):
            raise DTypeError(
                f"vmap: in_dims gives dim {d} to an argument that is no tensor but {type(x).__name__}; give it None to share it"
            )
        rank = x._type.rank
        if not -rank <= d < rank:
            raise ShapeError(f"vmap: in_dims gives dim {d} to an argument {x._type}, which has {rank} dims")
        out.append(d % rank)
    return out


def _batch_size(leaves: Sequence[Any], dims: Sequence[int | None]) -> DimLike:
    sizes = [(x._type, d) for x, d in zip(leaves, dims) if d is not None]
    if not sizes:
        raise ArgumentError(
            "vmap: no argument has a dim to run over; give at least one tensor an in_dims that is not None"
        )
    first = sizes[0][0].shape[sizes[0][1]]
    if any(t.shape[d] != first for t, d in sizes):
        listed = ", ".join(f"{t.shape[d]} (dim {d} of {t})" for t, d in sizes)
        raise ShapeError(f"vmap: the arguments have different numbers of samples: {listed}")
    return first


def _out_dims(out_dims: Any, form: Form) -> list[int | None]:
    if isinstance(out_dims, list):
        out_dims = tuple(out_dims)
    if form.cls is None and isinstance(out_dims, tuple) and len(out_dims) == 1:
        out_dims = out_dims[0]
    return spread(out_dims, form, _is_dim, "vmap: out_dims")


def _mapped(
    func: Callable, kwargs: Any, leaves: Sequence[Any], form: Form, dims: Sequence[int | None], size: DimLike, out_dims: Any,
    randomness: str,
) -> Any:  # fmt: skip
    tensors = [x for x, d in zip(leaves, dims) if d is not None]
    axes = tuple([d for d in dims if d is not None])
    types = [_without(x._type, d) for x, d in zip(tensors, axes)]

    def one(*given: Any) -> Any:
        rest = iter(given)
        return func(*form.build(iter([x if d is None else next(rest) for x, d in zip(leaves, dims)])), **kwargs)

    tracing, out = trace(one, types, "vmap", "vmap", _NO_RANDOM if randomness == "error" else None, tensors)
    results, built = flatten(out)
    for x in results:
        if not isinstance(x, Tensor):
            raise ArgumentError(
                f"vmap: the function returns tensors (also in tuples, lists and dicts), not {type(x).__name__}"
            )
    values = [tracing.value_of(x) for x in results]
    outside = outside_of(tracing)
    states = [state for state, _, _ in tracing.states.values()]
    single = closed(tracing, values, outside)
    whole = _whole(single, axes, tuple(_out_dims(out_dims, built)), size, len(states), randomness == "different")
    return built.build(iter(call(whole, [*tensors, *outside], states)))


def _without(type: TensorType, axis: int) -> TensorType:
    return type.with_shape((*type.shape[:axis], *type.shape[axis + 1 :]))


@functools.lru_cache(512)
def _whole(
    single: Function,
    in_axes: tuple[int, ...],
    out_axes: tuple[int | None, ...],
    size: DimLike,
    states: int,
    different: bool,
) -> Function:
    """`single` over all samples: its first parameters have them along `in_axes`, its last `states` are states of generators."""
    builder = Builder("vmap")
    shared, kept = len(single.params) - states, len(single.results) - states
    with builder:
        arguments = []
        for k, p in enumerate(single.params):
            if k < len(in_axes):
                at, shape = in_axes[k], p.type.shape
                x = builder.parameter(p.type.with_shape((*shape[:at], size, *shape[at:])))
                x = nd.transpose(x, (at, *[a for a in range(x.type.rank) if a != at]))
            else:
                x = builder.parameter(p.type)
            arguments.append(x)
        flags = [k < len(in_axes) or (different and k >= shared) for k in range(len(single.params))]
        final: list[Value] = []
        if different:
            for k in range(states):
                each, after = _streams(single, shared + k, kept + k, arguments, size)
                arguments[shared + k] = each
                final.append(after)
        made, batched = batch(single, flags, size)
        out = list(builder.inline(made, arguments))
        results = [_placed(v, b, axis, size) for v, b, axis in zip(out[:kept], batched, out_axes)]
        if not different:
            final = out[kept:]
            assert not any(batched[kept:]), "how much is drawn depends on shapes alone"
    return interned(dce(builder.build([*results, *final])))


def _streams(
    single: Function, param: int, result: int, arguments: Sequence[Value], size: DimLike
) -> tuple[Value, Value]:
    """Each sample's state, [size, 2], where samples draw one after another; and the state after all of them."""
    advance = dce(Function(single.params, single.ops, [single.results[result]]))
    used = {v for op in advance.ops for v in op.operands} | set(advance.results)
    if not used.isdisjoint([p for k, p in enumerate(single.params) if k != param]):
        raise TraceError(
            "vmap: how much the function draws depends on its arguments; draw outside and pass the numbers in"
        )
    state = arguments[param]
    stand_in = [state if k == param else nd.full(p.type.shape, 0, p.type.dtype) for k, p in enumerate(single.params)]
    (after,) = current_builder().inline(advance, stand_in)
    step = after - state
    numbers = nd.iota((size, 2), 0, i64)
    each = nd.broadcast_to(state, (size, 2)) + nd.broadcast_to(step, (size, 2)) * numbers
    return each, state + step * nd.size_of(size, i64)


def _placed(value: Value, batched: bool, axis: int | None, size: DimLike) -> Value:
    """A result with the samples' axis where out_dims wants it."""
    if axis is None:
        if batched:
            raise ArgumentError("vmap: out_dims is None for a result that differs between samples; give it a dim")
        return value
    rank = value.type.rank + (0 if batched else 1)
    if not -rank <= axis < rank:
        raise ShapeError(f"vmap: out_dims gives dim {axis} to a result that has {rank} dims with the samples'")
    axis %= rank
    if not batched:
        value = nd.broadcast_to(value, (size, *value.type.shape))
    return nd.transpose(value, (*range(1, axis + 1), 0, *range(axis + 1, rank)))
