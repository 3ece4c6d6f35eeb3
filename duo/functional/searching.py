"""Looking things up and counting them: places in sorted sequences, distinct elements, membership, histograms.

`unique` and `bincount` make shapes that depend on values. They look at the values, so they need eager tensors; where values are not known (graph
mode, inside compile, vmap or grad) they raise and name a way out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from duo.dispatch import apply
from duo.functional import elementwise as elem
from duo.functional import reduce
from duo.functional._args import integer, is_tensor, need_rank, type_of
from duo.functional._ssa import positions
from duo.functional.sorting import sorted_along
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, DuoError, ShapeError, TraceError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import indexing, order, running, shape
from duo_ir.types import DimLike, f64, i32, i64, promote


class Unique(NamedTuple):
    """What unique gives when it is asked for more than the values; what was not asked for is left out by `_chosen`."""

    values: Any
    inverse: Any
    counts: Any


def _known(name: str, tensor: Any, way_out: str) -> int:
    """The value of a 0-d tensor, on which the shape of a result depends."""
    try:
        return int(tensor.item())
    except DuoError as error:
        if hasattr(tensor, "_storage") and not isinstance(error, TraceError):
            raise
        raise TraceError(
            f"{name}: the shape of the result would depend on values, which are not known here (graph mode, or inside compile, vmap or grad);"
            f" {way_out}, or call it on eager tensors outside"
        ) from None


# -------------------------------------------------------------------------------------------------------- searchsorted
def _search(rows: Value, v: Value, right: bool) -> Value:
    """How many elements of each sorted row [..., n] are before v [..., m]: halving, one read of the row for each bit of n."""
    n = rows.type.shape[-1]
    if not isinstance(n, int):
        return _search_by_sorting(rows, v, right)
    found = nd.full(v.type.shape, 0, i64)
    if n == 0:
        return found
    last = v.type.rank - 1
    for bit in reversed(range(n.bit_length())):
        further = found + nd.full(v.type.shape, 1 << bit, i64)
        within = nd.le(further, n)
        seen = order.take(rows, nd.minimum(further, n) - 1, last)
        # an element that is NaN is behind every other: it is not less, nor equal
        behind = ew.not_(ew.gt(seen, v) if right else ew.ge(seen, v))
        found = ew.where(ew.and_(within, behind), further, found)
    return found


def _search_by_sorting(rows: Value, v: Value, right: bool) -> Value:
    """The same where the length has no number yet: rows and v sorted together, and the elements of rows before each v counted."""
    axis = v.type.rank - 1
    n, m = rows.type.shape[axis], v.type.shape[axis]
    parts = (rows, v) if right else (v, rows)  # of equals the first part comes first
    came = sorted_along(shape.concat(*parts, axis=axis), axis)[1]
    from_rows = nd.lt(came, nd.size_of(n, i64)) if right else nd.ge(came, nd.size_of(m, i64))
    before = running.cumsum(nd.cast_to(from_rows, i64), axis=axis)
    place = sorted_along(came, axis)[1]
    start = n if right else 0
    return order.take(before, nd.slice_axis(place, axis, start, start + m), axis)


def _searchsorted(rows: Value, v: Value, right: bool) -> Value:
    dtype = promote(rows.type.dtype, v.type.dtype)
    rows, v = nd.cast_to(rows, dtype), nd.cast_to(v, dtype)
    if rows.type.rank == 1:
        return nd.reshape(_search(rows, nd.reshape(v, (v.type.size,)), right), v.type.shape)
    return _search(rows, v, right)


def searchsorted(
    sorted_sequence: Any, input: Any, *, out_int32: bool = False, right: bool = False, side: str | None = None, sorter: Any = None
) -> Any:  # fmt: skip
    """Where each element of `input` [..., m] would go in the rows of `sorted_sequence` ([n], or [..., n] with equal leading dims): before equal
    elements, or with right (or side 'right') after them. NaN goes to the end. `sorter`: indices that sort the sequence."""
    if side not in (None, "left", "right") or (side == "left" and right):
        raise ArgumentError(f"searchsorted: side is 'left' or 'right', in accord with right={right}, not {side!r}")
    if sorter is not None:
        from_order = type_of(sorter)
        if from_order.shape != type_of(sorted_sequence).shape:
            raise ShapeError(
                f"searchsorted: sorter {from_order} needs the shape of the sequence, {type_of(sorted_sequence)}"
            )
        sorted_sequence = apply(_take_last, (sorted_sequence, elem.cast(sorter, i64)))
    if not is_tensor(input):
        input = sorted_sequence._lift(input)
    rows, v = type_of(sorted_sequence), type_of(input)
    if rows.rank == 0 or (rows.rank > 1 and rows.shape[:-1] != v.shape[:-1]):
        raise ShapeError(
            f"searchsorted: the sequence is [n], or [..., n] with the leading dims of the values [..., m], but they are {rows} and {v}"
        )
    found = apply(_searchsorted, (sorted_sequence, input), (right or side == "right",))
    return elem.cast(found, i32) if out_int32 else found


def _take_last(x: Value, places: Value) -> Value:
    return order.take(x, places, x.type.rank - 1)


def bucketize(input: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    """The number of the bucket between sorted `boundaries` (1-d) that each element falls in; one equal to a boundary belongs below it, or
    with right above."""
    if not is_tensor(boundaries):
        boundaries = input._lift(boundaries)
    need_rank("bucketize", "boundaries", type_of(boundaries), 1)
    return searchsorted(boundaries, input, out_int32=out_int32, right=right)


# ------------------------------------------------------------------------------------------------------------- distinct
def _groups(x: Value, ordered: bool) -> tuple[Value, Value, Value, Value]:
    """Of a flat x: its elements with equal ones together, the number of the group of each, that by the element's place in x, and how many
    groups there are."""
    n = x.type.size
    if n == 0:
        none = nd.full((0,), 0, i64)
        return x, none, none, nd.full((), 0, i64)
    values, came = sorted_along(x, 0) if ordered else (x, positions((n,), 0))
    place = positions((n,), 0)
    new = ew.or_(ew.ne(values, running.shifted(values, 0, 0)), ew.eq(place, nd.zeros_like(place)))
    group = running.cumsum(nd.cast_to(new, i64), axis=0) - 1
    inverse = indexing.scatter(nd.zeros_like(group), group, came, axes=(0,), mode="set")
    return values, group, inverse, nd.reshape(nd.slice_axis(group, 0, n - 1, n), ()) + 1


def _grouped(values: Value, group: Value, count: int) -> tuple[Value, Value]:
    """The first element of each group, and how many it has."""
    sizes = indexing.scatter(nd.full((count,), 0, i64), nd.ones_like(group), group, axes=(0,), mode="add")
    if count == 0:
        return values, sizes
    first = running.cumsum(sizes, axis=0) - sizes
    return indexing.gather(values, first, axes=(0,)), sizes


def _flat(x: Value) -> Value:
    return nd.reshape(x, (x.type.size,))


def _flat_groups(x: Value, ordered: bool) -> tuple[Value, Value, Value, Value]:
    values, group, inverse, total = _groups(_flat(x), ordered)
    return values, group, nd.reshape(inverse, x.type.shape), total


def _unique(name: str, input: Any, ordered: bool, inverse: bool, counts: bool) -> Any:
    values, group, by_place, total = apply(_flat_groups, (input,), (ordered,))
    count = _known(name, total, "sort, and compare neighbours, to work with a fixed shape")
    values, sizes = apply(_grouped, (values, group), (count,))
    chosen = Unique(values, by_place if inverse else None, sizes if counts else None)
    asked = tuple([part for part in chosen if part is not None])
    return asked[0] if len(asked) == 1 else asked


def unique(
    input: Any, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None
) -> Any:  # fmt: skip
    """The distinct elements in ascending order, always; with `return_inverse` also the number of each element's group, in the input's shape; with
    `return_counts` also the sizes of the groups. NaN equals nothing. On eager tensors alone: the shape depends on the values."""
    if dim is not None:
        raise ArgumentError(
            f"unique: slices along a dim (dim={dim!r}) are not compared; only elements are, with dim=None"
        )
    return _unique("unique", input, True, return_inverse, return_counts)


def unique_consecutive(
    input: Any, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None
) -> Any:  # fmt: skip
    """As `unique`, but each run of equal neighbours (row-major) is a group, in the input's order."""
    if dim is not None:
        raise ArgumentError(
            f"unique_consecutive: slices along a dim (dim={dim!r}) are not compared; only elements are, with dim=None"
        )
    return _unique("unique_consecutive", input, False, return_inverse, return_counts)


def _isin(x: Value, among: Value, invert: bool) -> Value:
    dtype = promote(x.type.dtype, among.type.dtype)
    x, among = nd.cast_to(x, dtype), _flat(nd.cast_to(among, dtype))
    if among.type.size == 0:
        return nd.full(x.type.shape, invert, ew.eq(x, x).type.dtype)
    rows, v = sorted_along(among, 0)[0], _flat(x)
    place = nd.minimum(_search(rows, v, False), nd.size_of(among.type.size, i64) - 1)
    hit = ew.eq(order.take(rows, place, 0), v)
    return nd.reshape(ew.not_(hit) if invert else hit, x.type.shape)


def isin(elements: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False) -> Any:
    """Whether each element is among `test_elements` (or, with invert, is not)."""
    if not is_tensor(elements):
        elements = test_elements._lift(elements)
    if not is_tensor(test_elements):
        test_elements = elements._lift(test_elements)
    return apply(_isin, (elements, test_elements), (bool(invert),))


# ------------------------------------------------------------------------------------------------------------- counting
def _bincount(x: Value, size: DimLike) -> Value:
    ones = nd.full(x.type.shape, 1, i64)
    out: Value = indexing.scatter(nd.full((size,), 0, i64), ones, nd.cast_to(x, i64), axes=(0,), mode="add")
    return out


def _weighted_bincount(x: Value, weights: Value, size: DimLike) -> Value:
    w = weights if weights.type.dtype.is_float else nd.cast_to(weights, f64)
    out: Value = indexing.scatter(nd.full((size,), 0, w.type.dtype), w, nd.cast_to(x, i64), axes=(0,), mode="add")
    return out


def counts_of(input: Any, weights: Any, size: DimLike) -> Any:
    """How often each of 0 to size - 1 comes in a vector, or the sums of their weights. Others raise IndexOutOfRange at run time."""
    if weights is None:
        return apply(_bincount, (input,), (size,))
    return apply(_weighted_bincount, (input, weights), (size,))


def bincount(input: Any, weights: Any = None, minlength: int = 0) -> Any:
    """How often each number from 0 to the greatest (or to minlength - 1 if that is more) comes in a vector of non-negative integers; with weights
    of its shape their sums. On eager tensors alone: the shape depends on the values."""
    t = type_of(input)
    need_rank("bincount", "the input", t, 1)
    if not t.dtype.is_integer:
        raise DTypeError(f"bincount: the input holds integers, not {t.dtype.name}")
    if weights is not None and type_of(weights).shape != t.shape:
        raise ShapeError(f"bincount: the weights have shape {type_of(weights)}, the input {t}; they need one")
    size = integer("bincount", "minlength", minlength)
    if size < 0:
        raise ArgumentError(f"bincount: minlength is not negative, but {size}")
    if t.size != 0:
        way = "add ones to zeros of a known size with scatter_add"
        low, high = (_known("bincount", of(input), way) for of in (reduce.amin, reduce.amax))
        if low < 0:
            raise ArgumentError(f"bincount: the input holds {low}, but it counts non-negative integers")
        size = max(size, high + 1)
    return counts_of(input, weights, size)


def _histc(x: Value, low: Any, high: Any, bins: int, of_data: bool) -> Value:
    d = x.type.dtype
    x = _flat(x)
    if of_data:
        if x.type.size == 0:
            low, high = nd.full((), 0, d), nd.full((), 1, d)
        else:
            low, high = nd.min(x), nd.max(x)
    else:
        low, high = nd.cast_to(low, d), nd.cast_to(high, d)
    one = nd.full((), 1, d)
    flat = ew.eq(low, high)
    low, high = ew.where(flat, low - one, low), ew.where(flat, high + one, high)
    low, high = (nd.broadcast_to(v, x.type.shape) for v in (low, high))
    inside = ew.and_(ew.ge(x, low), ew.le(x, high))
    scaled = nd.mul((x - low) / (high - low), nd.full((), bins, d))
    place = nd.minimum(nd.maximum(nd.cast_to(ew.floor(scaled), i64), 0), bins - 1)
    zeros = nd.full((bins,), 0, d)
    out: Value = indexing.scatter(zeros, nd.cast_to(inside, d), place, axes=(0,), mode="add")
    return out


def histc(input: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """How many elements fall in each of `bins` equal intervals from min to max, both included; others, and NaN, are left out. With min equal to
    max the least and greatest element take their places."""
    t = type_of(input)
    if not t.dtype.is_float:
        raise DTypeError(f"histc: the input holds floats, not {t.dtype.name}; cast it")
    n = integer("histc", "bins", bins)
    if n < 1:
        raise ArgumentError(f"histc: bins is at least 1, not {n}")
    if max < min:
        raise ArgumentError(f"histc: max {max} is less than min {min}")
    return apply(_histc, (input, float(min), float(max)), (n, min == max))


__all__ = [
    "bincount", "bucketize", "histc", "isin", "searchsorted", "unique", "unique_consecutive",
]  # fmt: skip
