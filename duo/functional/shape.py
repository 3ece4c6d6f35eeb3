"""Shapes: the same elements, seen or placed otherwise.

What PyTorch gives as a view is one here too: `apply_view` with a `View`, whose `write` says what an in-place change through it does to
the base. Sizes may be symbolic (`Dim`) wherever the result's shape is a polynomial of them.
"""

from __future__ import annotations

import builtins
import itertools
from typing import Any

from duo.dispatch import View, apply, apply_view
from duo.functional._args import (
    infer_size,
    integer,
    one_axis,
    size_args,
    some_axes,
    type_of,
)
from duo.functional._ssa import Axes, insert_axis
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import shape as movement
from duo_ir.ops.shape import inverse_permutation
from duo_ir.types import DimLike, Shape, bool_, broadcast_shapes, exact_div, product, promote, shape_str


# ----------------------------------------------------------------------------------------------------------- reshape
def _reshape(x: Value, shape: Shape) -> Value:
    return nd.reshape(x, infer_size("reshape", shape, x.type.shape))


def _flatten(x: Value, start: int, end: int) -> Value:
    shape = x.type.shape
    return nd.reshape(x, (*shape[:start], product(shape[start : end + 1]), *shape[end + 1 :]))


def _unflatten(x: Value, axis: int, shape: Shape) -> Value:
    inner = infer_size("unflatten", shape, (x.type.shape[axis],))
    return nd.reshape(x, (*x.type.shape[:axis], *inner, *x.type.shape[axis + 1 :]))


def _squeeze(x: Value, axes: Axes) -> Value:
    return nd.reshape(x, tuple([d for a, d in enumerate(x.type.shape) if not (a in axes and d == 1)]))


def _unsqueeze(x: Value, axis: int) -> Value:
    return insert_axis(x, axis)


def _reshape_back(x: Value, new: Value, *attrs: Any) -> Value:
    return nd.reshape(new, x.type.shape)


RESHAPE = View(_reshape, _reshape_back)
FLATTEN = View(_flatten, _reshape_back)
UNFLATTEN = View(_unflatten, _reshape_back)
SQUEEZE = View(_squeeze, _reshape_back)
UNSQUEEZE = View(_unsqueeze, _reshape_back)


def reshape(input: Any, *shape: Any) -> Any:
    """The elements in row-major order as another shape; one size may be -1. Takes reshape(x, 2, 3) and reshape(x, (2, 3)). A view."""
    return apply_view(RESHAPE, input, (size_args("reshape", shape),))


view = reshape


def view_as(input: Any, other: Any) -> Any:
    """input in other's shape. A view."""
    return apply_view(RESHAPE, input, (type_of(other).shape,))


reshape_as = view_as


def flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Dims start_dim to end_dim made one; a 0-d tensor becomes 1-d. A view; `input` itself where that is one dim already."""
    rank = type_of(input).rank
    if rank == 0:
        return apply_view(RESHAPE, input, ((1,),))
    start, end = one_axis("flatten", start_dim, rank), one_axis("flatten", end_dim, rank)
    if start > end:
        raise ArgumentError(f"flatten: start_dim {start_dim} lies behind end_dim {end_dim}")
    if start == end:
        return input
    return apply_view(FLATTEN, input, (start, end))


def ravel(input: Any) -> Any:
    """All elements in one dim. A view."""
    return flatten(input)


def unflatten(input: Any, dim: int, sizes: Any) -> Any:
    """Dim `dim` split into several, of which one may be -1. A view."""
    axis = one_axis("unflatten", dim, type_of(input).rank)
    return apply_view(UNFLATTEN, input, (axis, size_args("unflatten", (tuple(sizes),))))


def squeeze(input: Any, dim: Any = None) -> Any:
    """Without its dims of size 1, or those among `dim`. A view."""
    return apply_view(SQUEEZE, input, (some_axes("squeeze", dim, type_of(input).rank),))


def unsqueeze(input: Any, dim: int) -> Any:
    """With a dim of size 1 put in at `dim` of the result. A view."""
    return apply_view(UNSQUEEZE, input, (one_axis("unsqueeze", dim, type_of(input).rank + 1),))


# --------------------------------------------------------------------------------------------------------- transpose
def _permute(x: Value, order: Axes) -> Value:
    return nd.transpose(x, order)


def _permute_back(x: Value, new: Value, order: Axes) -> Value:
    return nd.transpose(new, inverse_permutation(order))


PERMUTE = View(_permute, _permute_back)


def permute(input: Any, *dims: Any) -> Any:
    """Result dim i is input dim dims[i]. A view."""
    rank = type_of(input).rank
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    order = tuple([one_axis("permute", d, rank) for d in dims])
    if sorted(order) != list(range(rank)):
        raise ArgumentError(f"permute: dims {dims} do not name each of the {rank} dims of {type_of(input)} once")
    return apply_view(PERMUTE, input, (order,))


def transpose(input: Any, dim0: int, dim1: int) -> Any:
    """Two dims exchanged. A view."""
    rank = type_of(input).rank
    a, b = one_axis("transpose", dim0, rank), one_axis("transpose", dim1, rank)
    order = list(range(rank))
    if rank:
        order[a], order[b] = b, a
    return apply_view(PERMUTE, input, (tuple(order),))


swapaxes = swapdims = transpose


def t(input: Any) -> Any:
    """A matrix transposed; a vector or 0-d tensor as it is. A view."""
    rank = type_of(input).rank
    if rank > 2:
        raise ShapeError(f"t: it takes at most 2 dims, got {type_of(input)}; use transpose or mT")
    return apply_view(PERMUTE, input, (tuple(reversed(range(rank))),))


def matrix_transpose(input: Any) -> Any:
    """The last two dims exchanged (`.mT`). A view."""
    if type_of(input).rank < 2:
        raise ShapeError(f"mT: it takes at least 2 dims, got {type_of(input)}")
    return transpose(input, -2, -1)


def reverse_dims(input: Any) -> Any:
    """All dims in reverse order (`.T`). A view."""
    return apply_view(PERMUTE, input, (tuple(reversed(range(type_of(input).rank))),))


def movedim(input: Any, source: Any, destination: Any) -> Any:
    """Dims `source` at positions `destination`, the others in order. A view."""
    rank = type_of(input).rank
    sources = source if isinstance(source, (tuple, list)) else (source,)
    targets = destination if isinstance(destination, (tuple, list)) else (destination,)
    if len(sources) != len(targets):
        raise ArgumentError(f"movedim: {len(sources)} source dims but {len(targets)} destinations")
    sources = [one_axis("movedim", d, rank) for d in sources]
    targets = [one_axis("movedim", d, rank) for d in targets]
    if len(set(sources)) != len(sources) or len(set(targets)) != len(targets):
        raise ArgumentError(f"movedim: source {source} and destination {destination} must each name a dim once")
    placed = dict(zip(targets, sources))
    rest = iter([a for a in range(rank) if a not in sources])
    return apply_view(PERMUTE, input, (tuple([placed[a] if a in placed else next(rest) for a in range(rank)]),))


moveaxis = movedim


# --------------------------------------------------------------------------------------------------------- broadcast
def _expand(x: Value, shape: Shape) -> Value:
    lead = len(shape) - x.type.rank
    if lead < 0 or -1 in shape[:lead]:
        raise ShapeError(f"expand: {x.type} does not expand to {shape_str(shape)}; -1 keeps a size that is there")
    wanted = tuple([x.type.shape[a - lead] if d == -1 else d for a, d in enumerate(shape)])
    return nd.broadcast_to(x, wanted)


EXPAND = View(_expand, None)


def expand(input: Any, *size: Any) -> Any:
    """Dims of size 1 repeated without copying, dims put in front; -1 keeps a size. A view that takes no writes."""
    return apply_view(EXPAND, input, (size_args("expand", size),))


broadcast_to = expand


def expand_as(input: Any, other: Any) -> Any:
    """expand to other's shape."""
    return apply_view(EXPAND, input, (type_of(other).shape,))


def broadcast_tensors(*tensors: Any) -> list:
    """All expanded to their common shape."""
    shape = broadcast_shapes(*[type_of(x).shape for x in tensors])
    return [apply_view(EXPAND, x, (shape,)) for x in tensors]


# -------------------------------------------------------------------------------------------------- slices as views
def write_slice(x: Value, new: Value, start: Shape, stop: Shape, step: Axes) -> Value:
    """x with x[start:stop:step] replaced by `new`."""
    if new.type.shape == x.type.shape:
        return new
    if new.type.size == 0:
        return x
    shape = new.type.shape
    places = {
        "low": start,
        "high": tuple([d - lo - (n - 1) * by - 1 for d, lo, n, by in zip(x.type.shape, start, shape, step)]),
        "interior": tuple([by - 1 for by in step]),
    }
    inside = movement.pad(nd.full(shape, True, bool_), nd.constant_of(False, bool_), **places)
    spread = movement.pad(new, nd.constant_of(0, new.type.dtype), **places)
    return ew.where(inside, spread, x)


def _narrow_bounds(x: Value, axis: int, start: DimLike, length: DimLike) -> tuple[Shape, Shape, Axes]:
    shape = x.type.shape
    lo = tuple([start if a == axis else 0 for a in range(x.type.rank)])
    hi = tuple([start + length if a == axis else d for a, d in enumerate(shape)])
    return lo, hi, (1,) * x.type.rank


def _narrow(x: Value, axis: int, start: DimLike, length: DimLike) -> Value:
    if isinstance(start, int) and start < 0:
        start = x.type.shape[axis] + start
    return nd.slice_axis(x, axis, start, start + length)


def _narrow_back(x: Value, new: Value, axis: int, start: DimLike, length: DimLike) -> Value:
    if isinstance(start, int) and start < 0:
        start = x.type.shape[axis] + start
    return write_slice(x, new, *_narrow_bounds(x, axis, start, length))


def _select(x: Value, axis: int, index: int) -> Value:
    at = _narrow(x, axis, index, 1)
    return nd.reshape(at, (*x.type.shape[:axis], *x.type.shape[axis + 1 :]))


def _select_back(x: Value, new: Value, axis: int, index: int) -> Value:
    return _narrow_back(x, insert_axis(new, axis), axis, index, 1)


def first_of_part(
    shape: tuple[int, ...], start: tuple[int, ...], stop: tuple[int, ...], step: Axes
) -> int | None:
    """Where the elements of a slice begin, if they lie one behind the other: along axes before the one that is cut it has one place each, along
    those behind it all."""
    if set(step) - {1} or not all(0 <= lo <= hi <= d for d, lo, hi in zip(shape, start, stop)):
        return None
    cut = [a for a, (d, lo, hi) in enumerate(zip(shape, start, stop)) if hi - lo != d]
    if any(hi - lo != 1 for lo, hi in zip(start[: cut[-1]], stop[: cut[-1]])) if cut else False:
        return None
    first = 0
    for d, lo in zip(shape, start):
        first = first * d + lo
    return first


def _narrow_part(shape: tuple[int, ...], axis: int, start: int, length: int) -> tuple[int, tuple[int, ...]] | None:
    if start < 0:
        start += shape[axis]
    lo = tuple([start if a == axis else 0 for a in range(len(shape))])
    hi = tuple([start + length if a == axis else d for a, d in enumerate(shape)])
    first = first_of_part(shape, lo, hi, (1,) * len(shape))
    return None if first is None else (first, (*shape[:axis], length, *shape[axis + 1 :]))


def _select_part(shape: tuple[int, ...], axis: int, index: int) -> tuple[int, tuple[int, ...]] | None:
    found = _narrow_part(shape, axis, index, 1)
    return None if found is None else (found[0], (*shape[:axis], *shape[axis + 1 :]))


NARROW = View(_narrow, _narrow_back, _narrow_part)
SELECT = View(_select, _select_back, _select_part)


def narrow(input: Any, dim: int, start: Any, length: Any) -> Any:
    """`length` elements from `start` on along `dim`. A view."""
    axis = one_axis("narrow", dim, type_of(input).rank)
    return apply_view(NARROW, input, (axis, *size_args("narrow", (start, length))))


def select(input: Any, dim: int, index: int) -> Any:
    """Element `index` along `dim`, which is dropped. A view."""
    t = type_of(input)
    axis = one_axis("select", dim, t.rank)
    if t.rank == 0:
        raise ShapeError("select: a 0-d tensor has no dim to select from")
    return apply_view(SELECT, input, (axis, integer("select", "index", index)))


def split(tensor: Any, split_size_or_sections: Any, dim: int = 0) -> tuple:
    """Pieces of a size along `dim` (the last may be smaller), or of the sizes listed. Views."""
    shape = type_of(tensor).shape
    axis = one_axis("split", dim, len(shape))
    total = shape[axis]
    if isinstance(split_size_or_sections, (tuple, list)):
        lengths = size_args("split", (split_size_or_sections,))
        if sum_dims(lengths) != total:
            raise ShapeError(f"split: sizes {list(lengths)} add up to {sum_dims(lengths)}, but dim {dim} has {total}")
        return _pieces(tensor, axis, lengths)
    (size,) = size_args("split", (split_size_or_sections,))
    if isinstance(size, int) and size <= 0:
        if size == 0 and total == 0:
            return (tensor,)
        raise ArgumentError(f"split: pieces need a size of at least 1, not {size}")
    if not isinstance(total, int) or not isinstance(size, int):
        count = exact_div(total, size)
        if not isinstance(count, int):
            raise ShapeError(
                f"split: how many pieces of {size} dim {dim} has is not known of {total}; give their sizes"
            )
        return _pieces(tensor, axis, (size,) * count)
    pieces = [builtins.min(size, total - at) for at in range(0, total, size)] or [0]
    return _pieces(tensor, axis, pieces)


def sum_dims(dims: Any) -> DimLike:
    total: DimLike = 0
    for d in dims:
        total = total + d
    return total


def _pieces(tensor: Any, axis: int, lengths: Any) -> tuple:
    out, at = [], 0
    for n in lengths:
        out.append(apply_view(NARROW, tensor, (axis, at, n)))
        at = at + n
    return tuple(out)


def chunk(input: Any, chunks: int, dim: int = 0) -> tuple:
    """At most `chunks` pieces of equal size along `dim` (the last may be smaller). Views."""
    count = integer("chunk", "chunks", chunks)
    if count < 1:
        raise ArgumentError(f"chunk: chunks must be at least 1, not {chunks}")
    shape = type_of(input).shape
    axis = one_axis("chunk", dim, len(shape))
    total = shape[axis]
    if isinstance(total, int):
        return split(input, builtins.max(1, -(-total // count)), axis)
    size = exact_div(total, count)
    if size is None:
        raise ShapeError(f"chunk: {total} elements along dim {dim} are not known to be a multiple of {count}")
    return _pieces(input, axis, (size,) * count)


def tensor_split(input: Any, indices_or_sections: Any, dim: int = 0) -> tuple:
    """Pieces that differ by one in size at most (an int: how many), or that end before the indices listed. Views."""
    axis = one_axis("tensor_split", dim, type_of(input).rank)
    total = type_of(input).shape[axis]
    if not isinstance(total, int):
        raise ShapeError(f"tensor_split: dim {dim} has an unknown size {total}; use split with sizes")
    if isinstance(indices_or_sections, (tuple, list)):
        cuts = [0, *[builtins.min(i % total if i < 0 else i, total) for i in indices_or_sections], total]
        return _pieces_at(input, axis, cuts)
    n = integer("tensor_split", "sections", indices_or_sections)
    if n < 1:
        raise ArgumentError(f"tensor_split: sections must be at least 1, not {n}")
    return _pieces(input, axis, [total // n + (i < total % n) for i in range(n)])


def _pieces_at(tensor: Any, axis: int, cuts: list) -> tuple:
    pairs = itertools.pairwise(cuts)
    return tuple([apply_view(NARROW, tensor, (axis, a, builtins.max(b - a, 0))) for a, b in pairs])


def unbind(input: Any, dim: int = 0) -> tuple:
    """The slices along `dim`, without it. Views."""
    shape = type_of(input).shape
    axis = one_axis("unbind", dim, len(shape))
    if not shape:
        raise ShapeError("unbind: a 0-d tensor has no dim to unbind")
    n = shape[axis]
    if not isinstance(n, int):
        raise ShapeError(f"unbind: dim {dim} has a size known only at run time, {shape[axis]}")
    return tuple([apply_view(SELECT, input, (axis, i)) for i in range(n)])


def _read(x: Value) -> Value:
    return ew.stop_gradient(x)


def _write(x: Value, new: Value) -> Value:
    return new


DETACH = View(_read, _write)


def detach(input: Any) -> Any:
    """The same storage, cut off from differentiation. A view."""
    return _read(input) if input.__class__ is Value else input.detach()


# ------------------------------------------------------------------------------------------------ joins and repeats
def _cat(*arguments: Any) -> Value:
    *xs, axis = arguments
    dtype = xs[0].type.dtype
    for x in xs[1:]:
        dtype = promote(dtype, x.type.dtype)
    return movement.concat(*[nd.cast_to(x, dtype) for x in xs], axis=axis)


def _stack(*arguments: Any) -> Value:
    *xs, axis = arguments
    first = xs[0].type
    for x in xs:
        if x.type.shape != first.shape:
            raise ShapeError(f"stack: tensors need one shape, got {first} and {x.type}")
    return _cat(*[insert_axis(x, axis) for x in xs], axis)


def _tensors(name: str, tensors: Any) -> tuple:
    out = tuple(tensors)
    if not out:
        raise ArgumentError(f"{name}: it needs at least one tensor")
    return out


def cat(tensors: Any, dim: int = 0) -> Any:
    """Tensors one after another along `dim`, dtypes promoted."""
    xs = _tensors("cat", tensors)
    rank = type_of(xs[0]).rank
    if rank == 0:
        raise ShapeError("cat: 0-d tensors cannot be concatenated; use stack")
    return apply(_cat, xs, (one_axis("cat", dim, rank),))


concat = concatenate = cat


def stack(tensors: Any, dim: int = 0) -> Any:
    """Tensors of one shape side by side along a new dim."""
    xs = _tensors("stack", tensors)
    return apply(_stack, xs, (one_axis("stack", dim, type_of(xs[0]).rank + 1),))


def hstack(tensors: Any) -> Any:
    """cat along dim 1, or 0 for vectors."""
    xs = [reshape(x, 1) if type_of(x).rank == 0 else x for x in _tensors("hstack", tensors)]
    return cat(xs, 0 if type_of(xs[0]).rank == 1 else 1)


def vstack(tensors: Any) -> Any:
    """cat along dim 0, vectors as rows."""
    xs = _tensors("vstack", tensors)
    return cat([reshape(x, 1, -1) if type_of(x).rank < 2 else x for x in xs], 0)


def _repeat(x: Value, repeats: Axes) -> Value:
    lead = len(repeats) - x.type.rank
    shape = (*([1] * lead), *x.type.shape)
    paired = [p for d in shape for p in (1, d)]
    spread = [p for n, d in zip(repeats, shape) for p in (n, d)]
    out = nd.broadcast_to(nd.reshape(x, tuple(paired)), tuple(spread))
    return nd.reshape(out, tuple([n * d for n, d in zip(repeats, shape)]))


def repeat(input: Any, *repeats: Any) -> Any:
    """The tensor laid repeats[i] times along dim i, dims put in front as needed."""
    counts = size_args("repeat", repeats)
    if len(counts) < type_of(input).rank:
        raise ShapeError(f"repeat: {len(counts)} counts for the {type_of(input).rank} dims of {type_of(input)}")
    return apply(_repeat, (input,), (counts,))


def tile(input: Any, *dims: Any) -> Any:
    """As repeat, with 1 for the leading dims not counted."""
    counts = size_args("tile", dims)
    missing = type_of(input).rank - len(counts)
    return apply(_repeat, (input,), ((1,) * missing + counts,))


def _repeat_interleave(x: Value, n: int, axis: int) -> Value:
    shape = x.type.shape
    spread = nd.broadcast_to(insert_axis(x, axis + 1), (*shape[: axis + 1], n, *shape[axis + 1 :]))
    return nd.reshape(spread, (*shape[:axis], shape[axis] * n, *shape[axis + 1 :]))


def repeat_interleave(input: Any, repeats: int, dim: int | None = None) -> Any:
    """Each slice along `dim` (of the flattened tensor without one) `repeats` times in a row."""
    if dim is None:
        input, dim = flatten(input), 0
    axis = one_axis("repeat_interleave", dim, type_of(input).rank)
    return apply(_repeat_interleave, (input,), (integer("repeat_interleave", "repeats", repeats), axis))
