"""Reading and writing at places: `x[...]`, gather and scatter, embedding.

Basic indices (ints, slices, None, ...) make views. Integer tensors read and write at places found at run time: negative ones count
from the end, one outside raises IndexOutOfRange when the program runs. As in PyTorch, ints are applied before tensors; tensors that stand
side by side put their dims where they stood, others put them in front.
"""

from __future__ import annotations

import builtins
from typing import Any, NoReturn

import numpy as np

from duo.dispatch import View, apply, apply_view
from duo.functional._args import choice, integer, is_tensor, one_axis, type_of
from duo.functional._ssa import Axes, insert_axis, move_axes, stretch, typed
from duo.functional.shape import first_of_part, write_slice
from duo.symbolic import plain
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, IndexOutOfRange, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import indexing
from duo_ir.ops import shape as movement
from duo_ir.types import Dim, DimLike, DType, Shape, TensorType, bool_, broadcast_shapes, i64

# An index in normal form is a tuple with one item per dim of the result or the operand:
#   ("at", k)  an int        ("slice", start, stop, step)        ("new",)  None        ("tensor",)  the next index tensor
Item = tuple
Spec = tuple[Item, ...]
_ALL: Item = ("slice", None, None, 1)


# ------------------------------------------------------------------------------------------------------ normal form
def _bound(value: Any) -> DimLike | None:
    if value is None:
        return None
    return plain(value) if isinstance(value, Dim) else integer("index", "a slice's bound", value)


def _slice_item(s: slice) -> Item:
    step = 1 if s.step is None else integer("index", "a slice's step", s.step)
    if step < 1:
        raise ArgumentError(f"index: a slice's step must be at least 1, not {step}; use flip for the other direction")
    return ("slice", _bound(s.start), _bound(s.stop), step)


def _no_mask(input: Any) -> NoReturn:
    raise ShapeError(
        f"index: the shape of {type_of(input)}[mask] would depend on the mask's values. Use where(mask, x, other), x.masked_fill(mask,"
        " value) or x * mask; or index x.numpy() by mask.numpy()"
    )


def parse(input: Any, index: Any) -> tuple[Spec, tuple]:
    """`index` in normal form with every dim accounted for, and the index tensors in it."""
    t = type_of(input)
    items = index if isinstance(index, tuple) else (index,)
    spec: list[Item] = []
    tensors: list[Any] = []
    used, hole = 0, None
    for item in items:
        if item is None:
            spec.append(("new",))
            continue
        if item is Ellipsis:
            if hole is not None:
                raise ArgumentError("index: one ellipsis only")
            hole = len(spec)
            continue
        used += 1
        if isinstance(item, slice):
            spec.append(_slice_item(item))
            continue
        if isinstance(item, (bool, np.bool_)):
            raise ArgumentError("index: True and False index nothing; use unsqueeze for a new dim")
        if isinstance(item, (list, np.ndarray)):
            item = _lifted(input, item)
        if is_tensor(item):
            d = type_of(item).dtype
            if d is bool_:
                _no_mask(input)
            if not d.is_integer:
                raise DTypeError(f"index: index tensors hold integers, not {d.name}")
            spec.append(("tensor",))
            tensors.append(item)
            continue
        spec.append(("at", plain(item) if isinstance(item, Dim) else integer("index", "an index", item)))
    if used > t.rank:
        raise IndexOutOfRange(f"index: {used} indices for the {t.rank} dims of {t}")
    at = len(spec) if hole is None else hole
    spec[at:at] = [_ALL] * (t.rank - used)
    return tuple(spec), tuple(tensors)


def _lifted(input: Any, item: Any) -> Any:
    """A list or array of indices as a tensor of input's kind."""
    if isinstance(item, list) and any(is_tensor(v) for v in item):
        item = [v.item() if is_tensor(v) else v for v in item]
    array = np.asarray(item, dtype=np.int64 if isinstance(item, list) and not item else None)
    if array.dtype == np.bool_:
        if array.ndim != 1:
            raise ArgumentError("index: a mask array must be 1-d here; use numpy.nonzero(mask) for the indices")
        array = np.nonzero(array)[0]
    if array.dtype.kind not in "iu":
        raise DTypeError(f"index: an index array holds integers, not {array.dtype}")
    lift = getattr(input, "_lift", None)
    if lift is None:
        raise DTypeError("index: index an SSA value by SSA values, ints and slices, not by lists or arrays")
    return lift(array.astype(np.int64))


# ------------------------------------------------------------------------------------------------------ basic views
def _at(d: DimLike, index: DimLike, axis: int) -> DimLike:
    """An index counted from the front, checked where the size is known."""
    if isinstance(index, Dim):
        return index
    if isinstance(d, int) and not -d <= index < d:
        raise IndexOutOfRange(f"index {index} is out of range for dim {axis}, which has {d} elements")
    return d + index if index < 0 else index


def _range(d: DimLike, start: DimLike | None, stop: DimLike | None, step: int) -> tuple[DimLike, DimLike]:
    """A slice's first position and its end, 0 <= first <= end <= d."""
    if isinstance(d, int) and not isinstance(start, Dim) and not isinstance(stop, Dim):
        first, end, _ = builtins.slice(start, stop, step).indices(d)
        return first, builtins.max(first, end)
    lo = 0 if start is None else (d + start if isinstance(start, int) and start < 0 else start)
    hi = d if stop is None else (d + stop if isinstance(stop, int) and stop < 0 else stop)
    return lo, hi


def _places(shape: Shape, spec: Spec) -> tuple[dict, tuple[int | None, ...]]:
    """Arguments of the slice op for `spec`, and the dims that the sliced value is seen with: 1 for a new one, None for one of its own."""
    start: list[DimLike] = []
    stop: list[DimLike] = []
    step: list[int] = []
    result: list[int | None] = []
    for item in spec:
        if item[0] == "new":
            result.append(1)
            continue
        axis = len(start)
        d = shape[axis]
        if item[0] == "at":
            lo: DimLike = _at(d, item[1], axis)
            hi, by = lo + 1, 1
        else:
            by = item[3]
            lo, hi = _range(d, item[1], item[2], by)
            result.append(None)
        start.append(lo)
        stop.append(hi)
        step.append(by)
    return {"start": tuple(start), "stop": tuple(stop), "step": tuple(step)}, tuple(result)


def _basic(x: Value, spec: Spec) -> Value:
    places, result = _places(x.type.shape, spec)
    x, places = _within(x, places)
    whole = places["stop"] == x.type.shape and not any(places["start"]) and set(places["step"]) <= {1}
    part = x if whole else movement.slice(x, **places)
    kinds = [item[0] for item in spec if item[0] != "new"]
    left = iter([d for d, kind in zip(part.type.shape, kinds) if kind == "slice"])
    return nd.reshape(part, tuple([1 if d == 1 else next(left) for d in result]))


def _within(x: Value, places: dict) -> tuple[Value, dict]:
    """Slices of a known size up to a free one, `table[:n]`, are gathered, which finds out at run time whether they lie within."""
    start, stop, step = (list(places[k]) for k in ("start", "stop", "step"))
    for axis, (d, lo, hi) in enumerate(zip(x.type.shape, start, stop)):
        if not isinstance(d, int) or (isinstance(lo, int) and isinstance(hi, int)) or step[axis] != 1:
            continue
        rows = nd.iota((hi - lo,), 0, i64) + nd.size_of(lo, i64)
        x = move_axes(indexing.gather(x, rows, axes=(axis,)), (0,), (axis,))
        start[axis], stop[axis] = 0, hi - lo
    return x, {"start": tuple(start), "stop": tuple(stop), "step": tuple(step)}


def _basic_back(x: Value, new: Value, spec: Spec) -> Value:
    places, _ = _places(x.type.shape, spec)
    part = movement.slice(x, **places)
    return write_slice(x, nd.reshape(new, part.type.shape), **places)


def _basic_part(shape: tuple[int, ...], spec: Spec) -> tuple[int, tuple[int, ...]] | None:
    places, result = _places(shape, spec)
    first = first_of_part(shape, places["start"], places["stop"], places["step"])
    if first is None:
        return None
    sizes = [hi - lo for lo, hi in zip(places["start"], places["stop"])]
    left = iter([n for n, item in zip(sizes, [item for item in spec if item[0] != "new"]) if item[0] == "slice"])
    return first, tuple([1 if d == 1 else next(left) for d in result])


INDEX = View(_basic, _basic_back, _basic_part)


# ------------------------------------------------------------------------------------------------- index tensors
def _wrapped(index: Value, n: DimLike) -> Value:
    """Negative indices counted from the end."""
    index = nd.cast_to(index, i64)
    return nd.where(nd.lt(index, 0), index + nd.size_of(n, i64), index)


def _split(spec: Spec) -> tuple[Spec, Axes]:
    """The basic part of an index, and which axes of its result the index tensors read."""
    kept = [item for item in spec if item[0] != "at"]
    axes = tuple([a for a, item in enumerate(kept) if item[0] == "tensor"])
    return tuple([_ALL if item[0] == "tensor" else item for item in spec]), axes


def _prepared(y: Value, tensors: tuple[Value, ...], axes: Axes) -> tuple[Value, ...]:
    return stretch(*[_wrapped(i, y.type.shape[a]) for i, a in zip(tensors, axes)])


def _block(axes: Axes, places: int) -> tuple[Axes, Axes]:
    """Where the indices' dims stand after gather, and where they belong."""
    side_by_side = axes == tuple(range(axes[0], axes[0] + len(axes)))
    first = axes[0] if side_by_side else 0
    return tuple(range(places)), tuple(range(first, first + places))


def _index(x: Value, *arguments: Any) -> Value:
    *tensors, spec = arguments
    basic, axes = _split(spec)
    y = _basic(x, basic)
    indices = _prepared(y, tuple(tensors), axes)
    return move_axes(indexing.gather(y, *indices, axes=axes), *_block(axes, indices[0].type.rank))


def stored(value: Any, dtype: DType) -> Value:
    """A tensor or Python number as it is stored in a tensor of `dtype`."""
    if value.__class__ is float and not dtype.is_float:
        value = int(value)
    return typed(value, dtype)


def _index_put(x: Value, value: Any, *arguments: Any) -> Value:
    *tensors, spec, mode = arguments
    basic, axes = _split(spec)
    y = _basic(x, basic)
    indices = _prepared(y, tuple(tensors), axes)
    here, there = _block(axes, indices[0].type.rank)
    window = [d for a, d in enumerate(y.type.shape) if a not in axes]
    shape = (*window[: there[0]], *indices[0].type.shape, *window[there[0] :]) if there else tuple(window)
    updates = move_axes(nd.broadcast_to(_fitting(stored(value, x.type.dtype), len(shape)), shape), there, here)
    return _basic_back(x, indexing.scatter(y, updates, *indices, axes=axes, mode=mode), basic)


def _fitting(value: Value, rank: int) -> Value:
    """Without leading dims of size 1 beyond `rank` dims, which NumPy and PyTorch let pass in assignments."""
    shape = value.type.shape
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    return nd.reshape(value, shape)


def _mask_put(x: Value, mask: Value, value: Any) -> Value:
    """x with `value` where `mask`, which covers the leading dims; value broadcasts against the others."""
    rest = x.type.rank - mask.type.rank
    if rest < 0 or mask.type.shape != x.type.shape[: mask.type.rank]:
        raise ShapeError(f"x[mask] = value: the mask {mask.type} does not cover the leading dims of {x.type}")
    value = stored(value, x.type.dtype)
    if value.type.rank > rest:
        value = nd.reshape(value, ()) if value.type.size == 1 else value
    if value.type.rank > rest:
        raise ShapeError(
            f"x[mask] = value: a value of {value.type} would be spread by the mask's values; give one that broadcasts to"
            f" {list(x.type.shape[mask.type.rank :])}, or use where(mask, value, x)"
        )
    mask = nd.reshape(mask, (*mask.type.shape, *([1] * rest)))
    shape = x.type.shape
    return ew.where(nd.broadcast_to(mask, shape), nd.broadcast_to(value, shape), x)


def getitem(input: Any, index: Any) -> Any:
    """input[index]: a view for ints, slices, None and ...; a copy for integer tensors."""
    spec, tensors = parse(input, index)
    if tensors:
        return apply(_index, (input, *tensors), (spec,))
    return apply_view(INDEX, input, (spec,))


def index_put(input: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    """input with input[indices] = values, or += values with every repeated place counted (`accumulate`)."""
    if is_tensor(indices) or not isinstance(indices, (tuple, list)):
        raise ArgumentError("index_put: indices is a tuple of index tensors")
    if len(indices) == 1 and is_tensor(indices[0]) and type_of(indices[0]).dtype is bool_:
        if accumulate:
            raise ArgumentError("index_put: a mask cannot accumulate; add where(mask, values, 0)")
        return apply(_mask_put, (input, indices[0], values))
    return setitem(input, tuple(indices), values, "add" if accumulate else "set")


def setitem(input: Any, index: Any, value: Any, mode: str = "set") -> Any:
    """The tensor that `input[index] = value` makes, for an index that is no basic one."""
    if is_tensor(index) and type_of(index).dtype is bool_:
        return apply(_mask_put, (input, index, value))
    spec, tensors = parse(input, index)
    if not tensors:
        raise ArgumentError("index: it holds no tensor; assign through the view")
    return apply(_index_put, (input, value, *tensors), (spec, mode))


def is_basic(index: Any) -> bool:
    """Whether an index is made of ints, slices, None and ... alone."""
    items = index if isinstance(index, tuple) else (index,)
    return not any(is_tensor(i) or isinstance(i, (list, np.ndarray)) for i in items)


# -------------------------------------------------------------------------------------------------- along one dim
def _need_indices(name: str, index: Any) -> None:
    d = type_of(index).dtype
    if not d.is_integer:
        raise DTypeError(f"{name}: the index holds integers, not {d.name}")


def _all_places(x: Value, index: Value, axis: int) -> list[Value]:
    shape = index.type.shape
    return [_wrapped(index, x.type.shape[axis]) if a == axis else nd.iota(shape, a, i64) for a in range(len(shape))]


def _gather(x: Value, index: Value, axis: int) -> Value:
    return indexing.gather(x, *_all_places(x, index, axis), axes=tuple(range(x.type.rank)))


def _leading(x: Value, shape: Shape) -> Value:
    return movement.slice(x, start=(0,) * x.type.rank, stop=shape, step=(1,) * x.type.rank)


def _scatter(x: Value, index: Value, src: Any, axis: int, mode: str) -> Value:
    if src.__class__ is not Value or src.type.rank == 0:
        updates = nd.broadcast_to(stored(src, x.type.dtype), index.type.shape)
    else:
        if src.type.dtype is not x.type.dtype:
            raise DTypeError(f"scatter: src is {src.type.dtype.name}, the tensor {x.type.dtype.name}; cast one")
        updates = _leading(src, index.type.shape)
    return indexing.scatter(x, updates, *_all_places(x, index, axis), axes=tuple(range(x.type.rank)), mode=mode)


def _one_rank(name: str, t: TensorType, index: Any) -> None:
    _need_indices(name, index)
    if type_of(index).rank != t.rank or t.rank == 0:
        raise ShapeError(f"{name}: the index needs as many dims (at least 1) as {t}, got {type_of(index)}")


def gather(input: Any, dim: int, index: Any) -> Any:
    """out[i][j] = input[index[i][j]][j] for dim 0, and so on; index has input's rank and the result's shape."""
    t = type_of(input)
    _one_rank("gather", t, index)
    return apply(_gather, (input, index), (one_axis("gather", dim, t.rank),))


def scatter(input: Any, dim: int, index: Any, src: Any = None, *, value: Any = None, reduce: str | None = None) -> Any:
    """input with out[index[i][j]][j] = src[i][j] for dim 0, and so on (the last wins where places repeat); reduce='add' adds.
    `src` is a tensor at least as large as index, or a number (also `value`)."""
    choice("scatter", "reduce", reduce, (None, "add"))
    if (src is None) == (value is None):
        raise ArgumentError("scatter: give src or value")
    t = type_of(input)
    _one_rank("scatter", t, index)
    mode = "set" if reduce is None else "add"
    return apply(
        _scatter, (input, index, value if src is None else src), (one_axis("scatter", dim, t.rank), mode)
    )  # fmt: skip


def scatter_add(input: Any, dim: int, index: Any, src: Any) -> Any:
    """input with src[i][j] added to out[index[i][j]][j] for dim 0, and so on, in row-major order."""
    return scatter(input, dim, index, src, reduce="add")


def _take_along(x: Value, index: Value, axis: int) -> Value:
    def but(shape: Shape, d: DimLike) -> Shape:
        return (*shape[:axis], d, *shape[axis + 1 :])

    common = broadcast_shapes(but(x.type.shape, 1), but(index.type.shape, 1))
    x = nd.broadcast_to(x, but(common, x.type.shape[axis]))
    return _gather(x, nd.broadcast_to(index, but(common, index.type.shape[axis])), axis)


def _take(x: Value, index: Value) -> Value:
    flat = nd.reshape(x, (x.type.size,))
    return indexing.gather(flat, _wrapped(index, x.type.size), axes=(0,))


def take(input: Any, index: Any) -> Any:
    """The elements at row-major positions `index`."""
    _need_indices("take", index)
    return apply(_take, (input, index))


def take_along_dim(input: Any, indices: Any, dim: int | None = None) -> Any:
    """As gather, the other dims broadcasting; without dim, from the flattened tensor."""
    if dim is None:
        return take(input, indices)
    t = type_of(input)
    _one_rank("take_along_dim", t, indices)
    return apply(_take_along, (input, indices), (one_axis("take_along_dim", dim, t.rank),))


def _index_select(x: Value, index: Value, axis: int) -> Value:
    index = nd.reshape(index, (index.type.size,))
    return move_axes(indexing.gather(x, _wrapped(index, x.type.shape[axis]), axes=(axis,)), (0,), (axis,))


def _index_update(x: Value, index: Value, source: Any, alpha: Any, axis: int, mode: str) -> Value:
    index = _wrapped(nd.reshape(index, (index.type.size,)), x.type.shape[axis])
    shape = (*x.type.shape[:axis], index.type.shape[0], *x.type.shape[axis + 1 :])
    updates = nd.broadcast_to(stored(source, x.type.dtype), shape)
    if alpha is not None:
        updates = nd.cast_to(updates * alpha, x.type.dtype)
    return indexing.scatter(x, move_axes(updates, (axis,), (0,)), index, axes=(axis,), mode=mode)


def _index_copy(x: Value, index: Value, source: Any, axis: int) -> Value:
    return _index_update(x, index, source, None, axis, "set")


def _index_add(x: Value, index: Value, source: Any, axis: int) -> Value:
    return _index_update(x, index, source, None, axis, "add")


def _index_add_scaled(x: Value, index: Value, source: Any, alpha: Any, axis: int) -> Value:
    return _index_update(x, index, source, alpha, axis, "add")


def index_select(input: Any, dim: int, index: Any) -> Any:
    """The slices along `dim` that a vector of indices names, in its order."""
    _need_indices("index_select", index)
    return apply(_index_select, (input, index), (one_axis("index_select", dim, type_of(input).rank),))


def index_add(input: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Any:
    """input with alpha * source[i] added to slice index[i] along `dim`, one after another."""
    _need_indices("index_add", index)
    axis = one_axis("index_add", dim, type_of(input).rank)
    if alpha.__class__ is int and alpha == 1:
        return apply(_index_add, (input, index, source), (axis,))
    return apply(_index_add_scaled, (input, index, source, alpha), (axis,))


def index_copy(input: Any, dim: int, index: Any, source: Any) -> Any:
    """input with source[i] put at slice index[i] along `dim`; the last wins."""
    _need_indices("index_copy", index)
    return apply(_index_copy, (input, index, source), (one_axis("index_copy", dim, type_of(input).rank),))


def index_fill(input: Any, dim: int, index: Any, value: Any) -> Any:
    """input with `value` at the slices that index names along `dim`."""
    _need_indices("index_fill", index)
    return apply(_index_copy, (input, index, value), (one_axis("index_fill", dim, type_of(input).rank),))


# ------------------------------------------------------------------------------------------------------- embedding
def _embedding(index: Value, weight: Value) -> Value:
    return indexing.gather(weight, nd.cast_to(index, i64), axes=(0,))


def _embedding_padded(index: Value, weight: Value, padding: int) -> Value:
    index = nd.cast_to(index, i64)
    rows = indexing.gather(weight, index, axes=(0,))
    frozen = insert_axis(nd.eq(index, padding), index.type.rank)
    return ew.where(nd.broadcast_to(frozen, rows.type.shape), ew.stop_gradient(rows), rows)


def embedding(input: Any, weight: Any, padding_idx: int | None = None) -> Any:
    """Row input[i] of the matrix `weight` for each i: [..., width]. Row `padding_idx` takes no gradient. Indices outside 0..rows-1
    raise IndexOutOfRange when the program runs."""
    _need_indices("embedding", input)
    t = type_of(weight)
    if t.rank != 2:
        raise ShapeError(f"embedding: the weight is a matrix, not {t}")
    if padding_idx is None:
        return apply(_embedding, (input, weight))
    padding, rows = integer("embedding", "padding_idx", padding_idx), t.shape[0]
    if padding < 0:
        if not isinstance(rows, int):
            raise ArgumentError("embedding: a negative padding_idx needs a known number of rows")
        padding += rows
    return apply(_embedding_padded, (input, weight), (padding,))


def masked_select(input: Any, mask: Any) -> Any:
    """Not available: the result's shape would depend on the values. Raises with the ways out."""
    _no_mask(input)
