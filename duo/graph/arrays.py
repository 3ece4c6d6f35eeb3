"""Placeholders and functions on shapes and places, with TensorFlow's names and argument orders."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import numpy as np

from duo import functional as F
from duo.eager.infer import user_location
from duo.functional import creation
from duo.graph.errors import InvalidArgumentError
from duo.graph.graph import get_default_graph
from duo.graph.states import Placeholder
from duo.graph.tensor import GraphTensor, constant, convert_to_tensor, identity_of, named, sizes_tensor
from duo.tensor import Tensor
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import indexing
from duo_ir.types import Dim, DimLike, TensorType, bool_, f32, i32, i64, product
from duo_ir.types import dtype as as_dtype

Name = str | None


# ------------------------------------------------------------------------------------------------ making tensors
def placeholder(dtype: Any, shape: Any = None, name: Name = None) -> GraphTensor:
    """A tensor to be fed. A size None is known at run time; so is one that is a string, and equal strings are equal sizes."""
    if shape is None:
        raise InvalidArgumentError(
            "a placeholder needs the number of its dims; give a shape with None for unknown sizes, such as [None, 784]"
        )
    graph = get_default_graph()
    sizes = tuple(
        [graph.new_size(d if isinstance(d, str) else None) if d is None or isinstance(d, str) else d for d in shape]
    )
    full = graph.unique_name(name or "Placeholder")
    value = graph.source(Placeholder(full, user_location()), TensorType(as_dtype(dtype), sizes))
    out = graph.wrap(value)
    graph.name_results("Placeholder", full + "/", [out])
    return out


def placeholder_with_default(input: Any, shape: Any = None, name: Name = None) -> GraphTensor:
    """A tensor that may be fed; its value is `input` when it is not."""
    x = convert_to_tensor(input)
    return named(x.graph, "PlaceholderWithDefault", name, lambda: identity_of(x))


def identity(input: Any, name: Name = None) -> GraphTensor:
    """The same value, computed here: under control_dependencies, after those."""
    x = convert_to_tensor(input)
    return named(x.graph, "Identity", name, lambda: identity_of(x))


def _of(body: Any, type: str, name: Name, *attrs: Any) -> GraphTensor:
    graph = get_default_graph()
    return named(graph, type, name, lambda: graph.apply(body, (), attrs))


def shape_of(shape: Any) -> tuple[DimLike, ...]:
    """A shape given as ints, a list that may hold sizes from tf.shape, or a tensor that such made."""
    if isinstance(shape, GraphTensor):
        if shape.known is None:
            raise InvalidArgumentError(
                f"the shape {shape.name!r} is known only when the graph runs; shapes are made of ints and of what tf.shape gives"
            )
        known = shape.known if isinstance(shape.known, tuple) else (shape.known,)
        return tuple([shape.graph.size(d) for d in known])
    if isinstance(shape, (int, np.integer, Dim)):
        return (int(shape) if not isinstance(shape, Dim) else shape,)
    if isinstance(shape, np.ndarray):
        shape = shape.tolist()
    out: list[DimLike] = []
    for d in shape:
        if isinstance(d, Dim):
            out.append(get_default_graph().size(d))
        elif d is None:
            out.append(-1)
        elif isinstance(d, GraphTensor):
            out.extend(shape_of(d))
        else:
            out.append(int(d))
    return tuple(out)


def zeros(shape: Any, dtype: Any = f32, name: Name = None) -> GraphTensor:
    return _of(creation._zeros, "zeros", name, shape_of(shape), as_dtype(dtype))


def ones(shape: Any, dtype: Any = f32, name: Name = None) -> GraphTensor:
    return _of(creation._ones, "ones", name, shape_of(shape), as_dtype(dtype))


def fill(dims: Any, value: Any, name: Name = None) -> GraphTensor:
    """A tensor of that shape, every element `value`."""
    x = convert_to_tensor(value)
    return named(x.graph, "Fill", name, lambda: x.graph.apply(creation._fill, (x,), (shape_of(dims), x.dtype)))


def zeros_like(tensor: Any, dtype: Any = None, name: Name = None, optimize: bool = True) -> GraphTensor:
    x = convert_to_tensor(tensor)
    return named(x.graph, "zeros_like", name, lambda: F.zeros_like(x, dtype=dtype))


def ones_like(tensor: Any, dtype: Any = None, name: Name = None, optimize: bool = True) -> GraphTensor:
    x = convert_to_tensor(tensor)
    return named(x.graph, "ones_like", name, lambda: F.ones_like(x, dtype=dtype))


def range(start: Any, limit: Any = None, delta: Any = 1, dtype: Any = None, name: Name = "range") -> GraphTensor:
    """start, start + delta, ... below limit (Python numbers, or for `limit` a size); int32 for ints, else float32."""
    if limit is None:
        start, limit = 0, start
    start, limit, delta = (_number(v) for v in (start, limit, delta))
    if isinstance(limit, Dim) or isinstance(start, Dim):
        if start != 0 or delta != 1:
            raise ArgumentError("range: over a size known at run time it begins at 0 and goes in steps of 1")
        return _of(_positions, "range", name, limit, as_dtype(dtype or i32))
    whole = not any(isinstance(v, float) for v in (start, limit, delta))
    wanted = as_dtype(dtype) if dtype is not None else (i32 if whole else f32)
    return _of(creation._arange, "range", name, start, limit, delta, wanted)


def _positions(n: DimLike, dtype: Any) -> Value:
    return nd.iota((n,), 0, dtype)


def _number(v: Any) -> Any:
    if isinstance(v, GraphTensor):
        (size,) = shape_of(v)
        return size
    return v.item() if isinstance(v, np.generic) else v


def linspace(start: float, stop: float, num: int, name: Name = None) -> GraphTensor:
    return _of(creation._linspace, "LinSpace", name, float(start), float(stop), int(num), f32)


lin_space = linspace


def eye(
    num_rows: int, num_columns: int | None = None, batch_shape: Any = None, dtype: Any = f32, name: Name = None
) -> GraphTensor:
    if batch_shape is not None:
        raise ArgumentError("eye: batch_shape is not supported; broadcast with tf.tile")
    return _of(creation._eye, "eye", name, num_rows, num_columns or num_rows, as_dtype(dtype))


# ------------------------------------------------------------------------------------------------ shapes
def shape(input: Any, name: Name = None, out_type: Any = i32) -> GraphTensor:
    """The sizes of `input`; what is indexed out of it can be used in shapes."""
    x = convert_to_tensor(input)
    return named(x.graph, "Shape", name, lambda: sizes_tensor(x.graph, tuple(x._type.shape), as_dtype(out_type)))


def size(input: Any, name: Name = None, out_type: Any = i32) -> GraphTensor:
    """The number of elements."""
    x = convert_to_tensor(input)
    return named(x.graph, "Size", name, lambda: sizes_tensor(x.graph, product(x._type.shape), as_dtype(out_type)))


def rank(input: Any, name: Name = None) -> GraphTensor:
    return constant(convert_to_tensor(input).ndim, name=name or "Rank")


def reshape(tensor: Any, shape: Any, name: Name = None) -> GraphTensor:
    """The elements in row-major order in another shape; one size may be -1."""
    x = convert_to_tensor(tensor)
    return named(x.graph, "Reshape", name, lambda: F.reshape(x, shape_of(shape)))


def expand_dims(input: Any, axis: int | None = None, name: Name = None, dim: int | None = None) -> GraphTensor:
    x = convert_to_tensor(input)
    at = dim if axis is None else axis
    if at is None:
        raise ArgumentError("expand_dims needs an axis")
    return named(x.graph, "ExpandDims", name, lambda: F.unsqueeze(x, at))


def squeeze(input: Any, axis: Any = None, name: Name = None, squeeze_dims: Any = None) -> GraphTensor:
    """Without dims of size 1: all, or those named (which must have size 1)."""
    x = convert_to_tensor(input)
    axes = squeeze_dims if axis is None else axis
    listed = [axes] if isinstance(axes, int) else list(axes or ())
    for a in listed:
        if x._type.shape[a] != 1:
            raise ShapeError(f"squeeze: axis {a} of {x._type} has not size 1")
    return named(x.graph, "Squeeze", name, lambda: F.squeeze(x, tuple(listed)) if listed else F.squeeze(x))


def transpose(a: Any, perm: Sequence[int] | None = None, name: Name = None, conjugate: bool = False) -> GraphTensor:
    """Dims in the order `perm`; all reversed without it."""
    x = convert_to_tensor(a)
    order = tuple(reversed(builtins.range(x.ndim))) if perm is None else tuple(perm)
    return named(x.graph, "transpose", name, lambda: F.permute(x, order))


def matrix_transpose(a: Any, name: Name = None) -> GraphTensor:
    x = convert_to_tensor(a)
    return named(x.graph, "matrix_transpose", name, lambda: F.transpose(x, -2, -1))


def concat(values: Any, axis: int, name: Name = None) -> GraphTensor:
    parts = _tensors(values)
    return named(parts[0].graph, "concat", name, lambda: F.cat(parts, axis))


def stack(values: Any, axis: int = 0, name: Name = None) -> GraphTensor:
    parts = _tensors(values)
    out = named(parts[0].graph, "stack", name, lambda: F.stack(parts, axis))
    known = (
        [v.known if isinstance(v, GraphTensor) else v for v in values] if isinstance(values, (list, tuple)) else [None]
    )
    if axis == 0 and all(isinstance(k, (int, Dim)) and not isinstance(k, bool) for k in known):
        out.known = tuple(known)
    return out


def unstack(value: Any, num: int | None = None, axis: int = 0, name: Name = None) -> list[GraphTensor]:
    x = convert_to_tensor(value)
    return named(x.graph, "unstack", name, lambda: list(F.unbind(x, axis)))


def split(value: Any, num_or_size_splits: Any, axis: int = 0, num: Any = None, name: Name = None) -> list[GraphTensor]:
    """In so many equal parts, or in parts of these sizes (one may be -1)."""
    x = convert_to_tensor(value)
    total = x._type.shape[axis]
    if isinstance(num_or_size_splits, int):
        if not isinstance(total, int) or total % num_or_size_splits:
            raise ShapeError(f"split: axis {axis} of {x._type} does not divide into {num_or_size_splits} equal parts")
        sizes = [total // num_or_size_splits] * num_or_size_splits
    else:
        sizes = list(shape_of(num_or_size_splits))  # type: ignore[arg-type]
        if -1 in sizes and isinstance(total, int):
            sizes[sizes.index(-1)] = total - sum(s for s in sizes if s != -1)
    return named(x.graph, "split", name, lambda: list(F.split(x, sizes, axis)))


def tile(input: Any, multiples: Any, name: Name = None) -> GraphTensor:
    x = convert_to_tensor(input)
    return named(x.graph, "Tile", name, lambda: F.tile(x, shape_of(multiples)))


def broadcast_to(input: Any, shape: Any, name: Name = None) -> GraphTensor:
    x = convert_to_tensor(input)
    return named(x.graph, "BroadcastTo", name, lambda: F.expand(x, shape_of(shape)))


def slice(input_: Any, begin: Any, size: Any, name: Name = None) -> GraphTensor:
    """`size` elements from `begin` along each dim; a size of -1 means all that remain."""
    x = convert_to_tensor(input_)
    starts, sizes = shape_of(begin), shape_of(size)
    if len(starts) != x.ndim or len(sizes) != x.ndim:
        raise ShapeError(f"slice: begin and size need one number for each dim of {x._type}")
    stops = [d if n == -1 else s + n for s, n, d in zip(starts, sizes, x._type.shape)]
    index = tuple([builtins.slice(s, e) for s, e in zip(starts, stops)])
    return named(x.graph, "Slice", name, lambda: Tensor.__getitem__(x, index))


def reverse(tensor: Any, axis: Any, name: Name = None) -> GraphTensor:
    x = convert_to_tensor(tensor)
    return named(x.graph, "ReverseV2", name, lambda: F.flip(x, *([axis] if isinstance(axis, int) else axis)))


def pad(
    tensor: Any, paddings: Any, mode: str = "CONSTANT", name: Name = None, constant_values: float = 0
) -> GraphTensor:
    """paddings: [before, after] for each dim."""
    x = convert_to_tensor(tensor)
    pairs = np.asarray(paddings.known if isinstance(paddings, GraphTensor) else paddings).tolist()
    flat = tuple(int(n) for before_after in reversed(pairs) for n in before_after)
    kind = {"CONSTANT": "constant", "REFLECT": "reflect"}.get(mode.upper())
    if kind is None:
        raise ArgumentError(f"pad: mode is CONSTANT or REFLECT, not {mode!r}")
    value = constant_values if kind == "constant" else None
    return named(x.graph, "Pad", name, lambda: F.pad(x, flat, kind, value))


# ------------------------------------------------------------------------------------------------ places
def gather(params: Any, indices: Any, validate_indices: Any = None, name: Name = None, axis: int = 0) -> GraphTensor:
    """params at `indices` along `axis`: the indices' dims stand where that axis was. An index out of range raises when it runs."""
    x, i = convert_to_tensor(params), convert_to_tensor(indices, like=None)
    return named(x.graph, "GatherV2", name, lambda: x.graph.apply(_gathered, (x, i), (axis,)))


def _gathered(x: Value, i: Value, axis: int) -> Value:
    rank, axis = x.type.rank, axis % x.type.rank
    out = indexing.gather(x, nd.cast_to(i, i64), axes=(axis,))
    n = i.type.rank
    order = (*builtins.range(n, n + axis), *builtins.range(n), *builtins.range(n + axis, n + rank - 1))
    return nd.transpose(out, order)


def gather_nd(params: Any, indices: Any, name: Name = None) -> GraphTensor:
    """params at the places that the last axis of `indices` holds."""
    x, i = convert_to_tensor(params), convert_to_tensor(indices)
    return named(x.graph, "GatherNd", name, lambda: x.graph.apply(_gathered_nd, (x, i)))


def _gathered_nd(x: Value, i: Value) -> Value:
    depth = i.type.shape[-1]
    last = i.type.rank - 1
    if not isinstance(depth, int) or depth > x.type.rank:
        raise ShapeError(f"gather_nd: the last axis of {i.type} must be at most {x.type.rank}, the dims of {x.type}")
    places = [
        nd.reshape(nd.slice_axis(nd.cast_to(i, i64), last, k, k + 1), i.type.shape[:-1]) for k in builtins.range(depth)
    ]
    return indexing.gather(x, *places, axes=tuple(builtins.range(depth)))


def where(condition: Any, x: Any = None, y: Any = None, name: Name = None) -> GraphTensor:
    """x where the condition holds, else y; a 1-d condition chooses rows."""
    if x is None or y is None:
        raise InvalidArgumentError("where(condition) alone has a shape that depends on values; give x and y")
    c = convert_to_tensor(condition, dtype=bool_)
    a = convert_to_tensor(x, like=y if isinstance(y, Tensor) else None)
    b = convert_to_tensor(y, like=a)
    return named(c.graph, "Select", name, lambda: c.graph.apply(_selected, (c, a, b)))


def _selected(c: Value, x: Value, y: Value) -> Value:
    if c.type.rank == 1 and x.type.rank > 1:
        c = nd.reshape(c, (*c.type.shape, *([1] * (x.type.rank - 1))))
    return nd.where(c, x, y)


def one_hot(
    indices: Any,
    depth: Any,
    on_value: Any = None,
    off_value: Any = None,
    axis: int | None = None,
    dtype: Any = None,
    name: Name = None,
) -> GraphTensor:
    """A new last axis (or `axis`) of size depth: on_value (1) at the index, off_value (0) elsewhere; nothing for an index out of range."""
    i = convert_to_tensor(indices)
    wanted = as_dtype(dtype) if dtype is not None else f32
    on, off = 1 if on_value is None else on_value, 0 if off_value is None else off_value
    (n,) = shape_of(depth)
    return named(
        i.graph,
        "one_hot",
        name,
        lambda: i.graph.apply(_one_hot, (i, on, off), (n, -1 if axis is None else axis, wanted)),
    )


def _one_hot(i: Value, on: Value, off: Value, depth: DimLike, axis: int, dtype: Any) -> Value:
    if not i.type.dtype.is_integer:
        raise DTypeError(f"one_hot: indices are integers, not {i.type.dtype.name}")
    at = axis % (i.type.rank + 1)
    wide = nd.expand_dims(i, at)
    places = nd.reshape(nd.iota((depth,), 0, i.type.dtype), (depth, *([1] * (i.type.rank - at))))
    return nd.where(nd.eq(wide, places), nd.cast_to(on, dtype), nd.cast_to(off, dtype))


def boolean_mask(tensor: Any, mask: Any, name: Name = None, axis: Any = None) -> Any:
    raise InvalidArgumentError(
        "boolean_mask has a shape that depends on values; use tf.where(mask, x, 0), or multiply by tf.cast(mask, x.dtype)"
    )


def sequence_mask(lengths: Any, maxlen: Any, dtype: Any = bool_, name: Name = None) -> GraphTensor:
    """[..., maxlen]: whether the position is below the length."""
    x = convert_to_tensor(lengths)
    (n,) = shape_of(maxlen)
    return named(x.graph, "SequenceMask", name, lambda: x.graph.apply(_sequence_mask, (x,), (n, as_dtype(dtype))))


def _sequence_mask(x: Value, n: DimLike, dtype: Any) -> Value:
    return nd.cast_to(nd.lt(nd.iota((n,), 0, x.type.dtype), nd.expand_dims(x, x.type.rank)), dtype)


def meshgrid(*args: Any, indexing: str = "xy", name: Name = None) -> list[GraphTensor]:
    parts = _tensors(args)
    return named(parts[0].graph, "meshgrid", name, lambda: list(F.meshgrid(*parts, indexing=indexing)))


def stop_gradient(input: Any, name: Name = None) -> GraphTensor:
    x = convert_to_tensor(input)
    return named(x.graph, "StopGradient", name, lambda: F.stop_gradient(x))


def _tensors(values: Any) -> list[Any]:
    if isinstance(values, Tensor):
        return [values]
    like = next((v for v in values if isinstance(v, Tensor)), None)
    parts = [convert_to_tensor(v, like=like) for v in values]
    if not parts:
        raise ArgumentError("at least one tensor is needed")
    return parts


__all__ = [
    "boolean_mask", "broadcast_to", "concat", "expand_dims", "eye", "fill", "gather", "gather_nd", "identity",
    "lin_space", "linspace", "matrix_transpose", "meshgrid", "one_hot", "ones", "ones_like", "pad", "placeholder",
    "placeholder_with_default", "range", "rank", "reshape", "reverse", "sequence_mask", "shape", "size", "slice",
    "split", "squeeze", "stack", "stop_gradient", "tile", "transpose", "unstack", "where", "zeros", "zeros_like",
]  # fmt: skip
