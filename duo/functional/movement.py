"""Functions that place elements anew in storage of their own: flips, rolls, triangles, padding, grids."""

from __future__ import annotations

from typing import Any

from duo.dispatch import View, apply, apply_view
from duo.functional._args import choice, integer, one_axis, per_axis, some_axes, type_of
from duo.functional._ssa import Axes, along, insert_axis, move_axes, typed
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import indexing
from duo_ir.ops import reduce as red
from duo_ir.ops import shape as movement
from duo_ir.types import Shape, f32, i64


# ------------------------------------------------------------------------------------------------------ flip and roll
def _flip(x: Value, axes: Axes) -> Value:
    return movement.flip(x, axes=axes) if axes else x


def _roll(x: Value, shifts: Axes, axes: Axes) -> Value:
    for by, axis in zip(shifts, axes):
        x = _roll_one(x, by, axis)
    return x


def _roll_flat(x: Value, by: int) -> Value:
    return nd.reshape(_roll_one(nd.reshape(x, (x.type.size,)), by, 0), x.type.shape)


def _roll_one(x: Value, by: int, axis: int) -> Value:
    n = x.type.shape[axis]
    if isinstance(n, int):
        by = by % n if n else 0
    if by == 0:
        return x
    cut = n - by if by > 0 else -by
    return movement.concat(nd.slice_axis(x, axis, cut, n), nd.slice_axis(x, axis, 0, cut), axis=axis)


def flip(input: Any, *dims: Any) -> Any:
    """In reverse order along `dims`."""
    listed = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    axes = some_axes("flip", tuple(listed), type_of(input).rank) if listed else ()
    return apply(_flip, (input,), (axes,))


def fliplr(input: Any) -> Any:
    """flip along dim 1."""
    return flip(input, 1)


def flipud(input: Any) -> Any:
    """flip along dim 0."""
    return flip(input, 0)


def roll(input: Any, shifts: Any, dims: Any = None) -> Any:
    """Moved on by `shifts` along `dims`, what leaves the end coming in at the front; without dims, in row-major order."""
    if dims is None:
        return apply(_roll_flat, (input,), (integer("roll", "shifts", shifts),))
    by = shifts if isinstance(shifts, (tuple, list)) else (shifts,)
    over = dims if isinstance(dims, (tuple, list)) else (dims,)
    if len(by) != len(over):
        raise ArgumentError(f"roll: {len(by)} shifts for {len(over)} dims")
    rank = type_of(input).rank
    return apply(
        _roll, (input,),
        (tuple([integer("roll", "a shift", s) for s in by]), tuple([one_axis("roll", d, rank) for d in over])),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- triangles
def lower_triangle(shape: Shape, diagonal: int) -> Value:
    """bool: column - row <= diagonal, over the last two axes."""
    rows, columns = nd.iota(shape, len(shape) - 2, i64), nd.iota(shape, len(shape) - 1, i64)
    return nd.le(columns - rows, diagonal)


def _tril(x: Value, diagonal: int) -> Value:
    return ew.where(lower_triangle(x.type.shape, diagonal), x, nd.zeros_like(x))


def _triu(x: Value, diagonal: int) -> Value:
    return ew.where(lower_triangle(x.type.shape, diagonal - 1), nd.zeros_like(x), x)


def _need_matrix(name: str, input: Any) -> None:
    if type_of(input).rank < 2:
        raise ShapeError(f"{name}: it takes matrices (at least 2 dims), got {type_of(input)}")


def tril(input: Any, diagonal: int = 0) -> Any:
    """The part on and below a diagonal of the last two dims, the rest 0."""
    _need_matrix("tril", input)
    return apply(_tril, (input,), (integer("tril", "diagonal", diagonal),))


def triu(input: Any, diagonal: int = 0) -> Any:
    """The part on and above a diagonal of the last two dims, the rest 0."""
    _need_matrix("triu", input)
    return apply(_triu, (input,), (integer("triu", "diagonal", diagonal),))


def _diagonal(x: Value, offset: int, first: int, second: int) -> Value:
    x = move_axes(x, (first, second), (0, 1))
    rows, columns = x.type.shape[:2]
    if not isinstance(rows, int) or not isinstance(columns, int):
        if rows != columns or offset:
            raise ShapeError(f"diagonal: the diagonal {offset} of a {rows} by {columns} matrix has no known length")
        n = rows
    else:
        n = max(0, min(rows + min(offset, 0), columns - max(offset, 0)))
    at = nd.iota((n,), 0, i64)
    out = indexing.gather(x, at - min(offset, 0), at + max(offset, 0), axes=(0, 1))
    return move_axes(out, (0,), (out.type.rank - 1,))


def _diagonal_write(x: Value, new: Value, offset: int, first: int, second: int) -> Value:
    y = move_axes(x, (first, second), (0, 1))
    at = nd.iota((new.type.shape[-1],), 0, i64)
    updates = move_axes(new, (new.type.rank - 1,), (0,))
    y = indexing.scatter(y, updates, at - min(offset, 0), at + max(offset, 0), axes=(0, 1), mode="set")
    return move_axes(y, (0, 1), (first, second))


DIAGONAL = View(_diagonal, _diagonal_write)


def diagonal(input: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """The diagonal of two dims, which are dropped, as a new last dim. A view."""
    rank = type_of(input).rank
    first, second = one_axis("diagonal", dim1, rank), one_axis("diagonal", dim2, rank)
    if first == second or rank < 2:
        raise ArgumentError(f"diagonal: it needs two different dims, got {dim1} and {dim2} of {type_of(input)}")
    return apply_view(DIAGONAL, input, (integer("diagonal", "offset", offset), first, second))


def _diagonal_matrix(x: Value, offset: int) -> Value:
    n = x.type.shape[0] + abs(offset)
    low, high = max(-offset, 0), max(offset, 0)
    column = movement.pad(x, nd.constant_of(0, x.type.dtype), low=(low,), high=(high,), interior=(0,))
    on = nd.eq(nd.iota((n, n), 1, i64) - nd.iota((n, n), 0, i64), offset)
    return nd.where(on, insert_axis(column, 1), nd.constant_of(0, x.type.dtype))


def diag(input: Any, diagonal: int = 0) -> Any:
    """A vector as the diagonal of a matrix of zeros, or the diagonal of a matrix."""
    rank = type_of(input).rank
    if rank == 1:
        return apply(_diagonal_matrix, (input,), (integer("diag", "diagonal", diagonal),))
    if rank != 2:
        raise ShapeError(f"diag: it takes a vector or a matrix, got {type_of(input)}")
    return apply(_diagonal, (input,), (integer("diag", "diagonal", diagonal), 0, 1))


def _trace(x: Value) -> Value:
    d = _diagonal(x, 0, 0, 1)
    return red.sum(d if d.type.dtype.is_float else nd.cast_to(d, i64), axes=(0,))


def trace(input: Any) -> Any:
    """The sum of a matrix's diagonal."""
    if type_of(input).rank != 2:
        raise ShapeError(f"trace: it takes a matrix, got {type_of(input)}")
    return apply(_trace, (input,))


# ---------------------------------------------------------------------------------------------------------- padding
def _pad_constant(x: Value, value: Any, low: Axes, high: Axes) -> Value:
    shape = x.type.shape
    x = movement.slice(
        x,
        start=tuple([max(0, -n) for n in low]),
        stop=tuple([d - max(0, -n) for d, n in zip(shape, high)]),
        step=(1,) * len(shape),
    )
    fill = nd.reshape(typed(value, x.type.dtype), ())
    positive = [tuple([max(0, n) for n in side]) for side in (low, high)]
    return movement.pad(x, fill, low=positive[0], high=positive[1], interior=(0,) * len(shape))


def _pad_mirror(x: Value, low: Axes, high: Axes, mode: str) -> Value:
    for axis, (before, after) in enumerate(zip(low, high)):
        if before or after:
            x = _extend(x, axis, before, after, mode)
    return x


def _extend(x: Value, axis: int, before: int, after: int, mode: str) -> Value:
    n = x.type.shape[axis]
    if mode == "replicate":
        first, last = nd.slice_axis(x, axis, 0, 1), nd.slice_axis(x, axis, n - 1, n)
        front, back = _repeated(first, axis, before), _repeated(last, axis, after)
    elif mode == "circular":
        front, back = nd.slice_axis(x, axis, n - before, n), nd.slice_axis(x, axis, 0, after)
    else:
        front = movement.flip(nd.slice_axis(x, axis, 1, before + 1), axes=(axis,))
        back = movement.flip(nd.slice_axis(x, axis, n - 1 - after, n - 1), axes=(axis,))
    return movement.concat(*[p for p, k in ((front, before), (x, 1), (back, after)) if k], axis=axis)


def _repeated(x: Value, axis: int, n: int) -> Value:
    return nd.broadcast_to(x, tuple([n if a == axis else d for a, d in enumerate(x.type.shape)]))


def pad(input: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    """Padded by (last dim before, last dim after, second last before, ...) elements: of `value` (0), or with mode 'reflect',
    'replicate' or 'circular' of the tensor itself. Negative amounts remove elements ('constant' only)."""
    t = type_of(input)
    amounts = [integer("pad", "an amount", n) for n in pad]
    if len(amounts) % 2 or len(amounts) > 2 * t.rank:
        raise ArgumentError(f"pad: {len(amounts)} amounts; {t} takes pairs, for at most {t.rank} dims")
    rest = [0] * (t.rank - len(amounts) // 2)
    low, high = tuple(rest + amounts[0::2][::-1]), tuple(rest + amounts[1::2][::-1])
    choice("pad", "mode", mode, ("constant", "reflect", "replicate", "circular"))
    if mode == "constant":
        return apply(_pad_constant, (input, 0 if value is None else value), (low, high))
    if min(amounts, default=0) < 0:
        raise ArgumentError(f"pad: mode {mode!r} cannot remove elements; slice first")
    for d, a, b in zip(t.shape, low, high):
        limit = {"reflect": d - 1, "circular": d, "replicate": max(a, b) if d != 0 else 0}[mode]
        if isinstance(limit, int) and max(a, b) > max(limit, 0):
            raise ShapeError(f"pad: mode {mode!r} cannot give {max(a, b)} elements from a dim of {d}")
    return apply(_pad_mirror, (input,), (low, high, mode))


# ------------------------------------------------------------------------------------------------------------ resizing
def _nearest(x: Value, extents: Axes, sizes: Axes, steps: tuple[float, ...]) -> Value:
    """Along each of the last axes, element floor(i * step) for i < size, at most the last."""
    for axis, (extent, size, step) in enumerate(zip(extents, sizes, steps), x.type.rank - len(sizes)):
        if size == extent and step == 1.0:
            continue
        if size % extent == 0 and step == extent / size:
            stretched = insert_axis(x, axis + 1)
            shape = (*x.type.shape[: axis + 1], size // extent, *x.type.shape[axis + 1 :])
            x = nd.reshape(nd.broadcast_to(stretched, shape), (*x.type.shape[:axis], size, *x.type.shape[axis + 1 :]))
            continue
        at = nd.cast_to(ew.floor(nd.cast_to(nd.iota((size,), 0, i64), f32) * step), i64)
        found = indexing.gather(x, nd.minimum(at, extent - 1), axes=(axis,))
        x = move_axes(found, (0,), (axis,))
    return x


def interpolate(input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest") -> Any:
    """[batch, channels, spatial...] with its spatial dims resized to `size`, or by `scale_factor` (an int or float, or one per dim).

    Only mode 'nearest': element i is element floor(i / factor) of the input."""
    t = type_of(input)
    n = t.rank - 2
    if mode != "nearest":
        raise ArgumentError(f"interpolate: the mode is 'nearest', not {mode!r}")
    if n < 1:
        raise ShapeError(f"interpolate: it takes [batch, channels, spatial...], got {t}")
    if (size is None) == (scale_factor is None):
        raise ArgumentError("interpolate: give size or scale_factor, one of them")
    extents = tuple([d for d in t.shape[2:] if isinstance(d, int) and d > 0])
    if len(extents) != n:
        raise ShapeError(f"interpolate: spatial sizes must be known and not 0, got {t}")
    if size is not None:
        sizes = per_axis("interpolate", "size", size, n)
        steps = tuple([d / s for d, s in zip(extents, sizes)])
    else:
        given = tuple(scale_factor) if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * n
        factors = tuple([float(f) for f in given])
        if len(factors) != n or min(factors) <= 0:
            raise ArgumentError(f"interpolate: scale_factor is a positive number or {n} of them, not {scale_factor!r}")
        sizes = tuple([int(d * f) for d, f in zip(extents, factors)])
        if min(sizes) < 1:
            raise ShapeError(f"interpolate: nothing is left of {t} after scaling by {scale_factor}")
        steps = tuple([1.0 / f for f in factors])
    return apply(_nearest, (input,), (extents, sizes, steps))


# ------------------------------------------------------------------------------------------------- grids and classes
def _meshgrid(*arguments: Any) -> tuple[Value, ...]:
    *xs, swap = arguments
    xs = [nd.reshape(x, (x.type.size,)) for x in xs]
    shape = tuple([x.type.shape[0] for x in xs])
    out = []
    for n, x in enumerate(xs):
        grid = nd.broadcast_to(nd.reshape(x, tuple([d if a == n else 1 for a, d in enumerate(shape)])), shape)
        out.append(nd.transpose(grid, (1, 0, *range(2, len(shape)))) if swap else grid)
    return tuple(out)


def meshgrid(*tensors: Any, indexing: str = "ij") -> tuple:
    """Coordinate grids of vectors: grid n varies along dim n ('ij'), or with the first two dims exchanged ('xy')."""
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        tensors = tuple(tensors[0])
    choice("meshgrid", "indexing", indexing, ("ij", "xy"))
    out = apply(_meshgrid, tensors, (indexing == "xy" and len(tensors) > 1,))
    return out if isinstance(out, tuple) else (out,)


def _one_hot(x: Value, classes: int) -> Value:
    rank = x.type.rank
    return nd.cast_to(nd.eq(insert_axis(nd.cast_to(x, i64), rank), along(classes, rank, rank + 1)), i64)


def one_hot(input: Any, num_classes: int = -1) -> Any:
    """int64 [..., num_classes]: 1 where the class is, else 0 (a class outside gives zeros)."""
    if num_classes == -1:
        raise ArgumentError("one_hot: give num_classes; the shape cannot depend on the values")
    return apply(_one_hot, (input,), (integer("one_hot", "num_classes", num_classes),))
