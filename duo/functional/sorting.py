"""Sorting, and what follows from it: the first k, order statistics, quantiles, the most frequent value.

Every sort is stable and NaN is greater than any number, so in ascending order NaN comes last and in descending order first; -0.0 equals +0.0.
Gradients go to the elements that were picked.
"""

from __future__ import annotations

from typing import Any

from duo.dispatch import apply
from duo.functional._args import choice, integer, one_axis, type_of
from duo.functional._ssa import insert_axis, kept, positions, typed
from duo.functional.reduce import ValuesIndices
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.opdef import compute_dtype
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import order, running
from duo_ir.ops import reduce as red
from duo_ir.ops.checks import never_negative
from duo_ir.types import Dim, DimLike, i64

Pair = tuple[Value, Value]
_INTERPOLATIONS = ("linear", "lower", "higher", "nearest", "midpoint")


# ----------------------------------------------------------------------------------------------------------- bodies
def sorted_along(x: Value, axis: int, descending: bool = False, count: DimLike | None = None) -> Pair:
    """(values, indices) of the first `count`, or all, in order; a 0-d tensor is sorted already."""
    if not x.type.shape:
        return x, nd.full((), 0, i64)
    found: Pair = order.sort(x, axis=axis, descending=descending, count=x.type.shape[axis] if count is None else count)
    return found


def _argsort(x: Value, axis: int, descending: bool) -> Value:
    return sorted_along(x, axis, descending)[1]


def _values(x: Value, axis: int) -> Value:
    return sorted_along(x, axis)[0]


def _topk(x: Value, axis: int, k: DimLike, largest: bool) -> Pair:
    return sorted_along(x, axis, largest, k)


def _at(found: Pair, places: Value, axis: int, keepdim: bool) -> Pair:
    """The elements of sorted rows at `places` (the axis of size 1)."""
    picked = [order.take(v, places, axis) for v in found]
    shape = places.type.shape
    final = shape if keepdim else (*shape[:axis], *shape[axis + 1 :])
    return nd.reshape(picked[0], final), nd.reshape(picked[1], final)


def _one(shape: tuple[DimLike, ...], axis: int, place: DimLike) -> Value:
    """One position for every row."""
    return nd.broadcast_to(nd.size_of(place, i64), (*shape[:axis], 1, *shape[axis + 1 :]))


def _kthvalue(x: Value, axis: int, k: DimLike, keepdim: bool) -> Pair:
    if not x.type.shape:
        return sorted_along(x, 0)
    found = sorted_along(x, axis, count=k)
    return _at(found, _one(x.type.shape, axis, k - 1), axis, keepdim)


def _numbers(x: Value, axis: int) -> Value:
    """How many elements of each row are not NaN, i64, the axis kept with size 1."""
    return kept(red.sum(nd.cast_to(ew.eq(x, x), i64), axes=(axis,)), x.type.shape, (axis,))


def _median(x: Value, axis: int, keepdim: bool, skip: bool) -> Pair:
    if not x.type.shape:
        return sorted_along(x, 0)
    found, n = sorted_along(x, axis), x.type.shape[axis]
    places = _one(x.type.shape, axis, n)
    if x.type.dtype.is_float:
        some = _numbers(x, axis)
        # NaN comes after the numbers: the first of them where one counts
        middle = _half(nd.maximum(some - 1, 0))
        places = middle if skip else ew.where(ew.lt(some, places), some, middle)
    else:
        places = _half(places - 1)
    return _at(found, places, axis, keepdim)


def _half(x: Value) -> Value:
    return nd.floor_divide(x, 2)


def _flat_median(x: Value, skip: bool) -> Value:
    return _median(nd.reshape(x, (x.type.size,)), 0, False, skip)[0]


def _quantile(x: Value, q: Any, axis: int | None, keepdim: bool, how: str, skip: bool) -> Value:
    """Of each row at rank q * (n - 1), between the two sorted elements about it. q: a number, 0-d or 1-d; its axis comes first."""
    shape = x.type.shape
    if axis is None:
        x, axis = nd.reshape(x, (x.type.size,)), 0
        final: tuple[DimLike, ...] = (1,) * len(shape) if keepdim else ()
    else:
        final = (*shape[:axis], *([1] if keepdim else []), *shape[axis + 1 :])
    d = compute_dtype(x.type.dtype)
    rows, some = sorted_along(x, axis)[0], _numbers(x, axis)
    q = typed(q, d)
    single = not q.type.shape
    q = nd.reshape(q, (1 if single else q.type.shape[0], *(1,) * x.type.rank))
    last = nd.cast_to(some - 1, d)
    if not skip:
        last = ew.where(
            ew.lt(some, _one(x.type.shape, axis, x.type.shape[axis])), nd.full(last.type.shape, float("nan"), d), last
        )
    rank = nd.mul(q, insert_axis(last, 0))
    bad = ew.ne(rank, rank)
    rank = ew.where(bad, nd.zeros_like(rank), rank)
    rank = nd.maximum(rank, 0.0)
    if how == "nearest":
        rank = ew.round(rank)
    low, high = ew.floor(rank), ew.ceil(rank)

    def pick(r: Value) -> Value:
        place = nd.cast_to(r, i64)
        whole = nd.broadcast_to(insert_axis(rows, 0), (place.type.shape[0], *rows.type.shape))
        return nd.cast_to(order.take(whole, place, axis + 1), d)

    if how in ("lower", "nearest"):
        out = pick(low)
    elif how == "higher":
        out = pick(high)
    else:
        weight = nd.full(rank.type.shape, 0.5, d) if how == "midpoint" else rank - low
        below, above = pick(low), pick(high)
        span = above - below
        near = ew.lt(weight, nd.full(weight.type.shape, 0.5, d))
        out = ew.where(near, below + weight * span, above - span * (1.0 - weight))
        out = ew.where(ew.eq(below, above), below, out)  # also where both are one infinity
    out = nd.cast_to(ew.where(bad, nd.full(out.type.shape, float("nan"), d), out), x.type.dtype)
    return nd.reshape(out, final if single else (out.type.shape[0], *final))


def _mode(x: Value, axis: int, keepdim: bool) -> Pair:
    """Runs of equal elements in sorted rows: the first of the longest ends where its length is greatest."""
    if not x.type.shape:
        return sorted_along(x, 0)
    found = sorted_along(x, axis)
    values, place = found[0], positions(x.type.shape, axis)
    before = running.shifted(values, axis, 0)
    new = ew.or_(ew.ne(values, before), ew.eq(place, nd.zeros_like(place)))
    start = running.cummax(ew.where(new, place, nd.zeros_like(place)), axis=axis)[0]
    longest = kept(red.argmax(place - start, axes=(axis,)), x.type.shape, (axis,))
    return _at(found, longest, axis, keepdim)


# -------------------------------------------------------------------------------------------------------- functions
def sort(input: Any, dim: int = -1, descending: bool = False, stable: bool = True) -> ValuesIndices:
    """(values, indices) of the elements in order along `dim`. Always stable; NaN is the greatest."""
    axis = one_axis("sort", dim, type_of(input).rank)
    return ValuesIndices(*apply(sorted_along, (input,), (axis, bool(descending))))


def argsort(input: Any, dim: int = -1, descending: bool = False, stable: bool = True) -> Any:
    """The indices that `sort` gives."""
    return apply(_argsort, (input,), (one_axis("argsort", dim, type_of(input).rank), bool(descending)))


def msort(input: Any) -> Any:
    """The values in ascending order along the first dim."""
    return apply(_values, (input,), (0,))


def _count(name: str, k: Any, input: Any, axis: int, least: int) -> DimLike:
    t = type_of(input)
    n = t.shape[axis] if t.shape else 1
    k = k if isinstance(k, Dim) else integer(name, "k", k)
    if isinstance(k, int) and (k < least or (isinstance(n, int) and k > n)):
        raise ArgumentError(f"{name}: k is {least} to {n}, the size of dim {axis} of {t}, not {k}")
    if not never_negative(n - k):
        raise ShapeError(f"{name}: k={k} may be more than {n}, the size of dim {axis} of {t}; declare that size as a number, or sort along it")
    return k


def topk(input: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> ValuesIndices:
    """(values, indices) of the k greatest (or, with `largest` False, least) elements along `dim`, in that order; of equals the first.
    NaN is the greatest."""
    axis = one_axis("topk", dim, type_of(input).rank)
    return ValuesIndices(*apply(_topk, (input,), (axis, _count("topk", k, input, axis, 0), bool(largest))))


def kthvalue(input: Any, k: int, dim: int = -1, keepdim: bool = False) -> ValuesIndices:
    """(values, indices) of the k-th least element along `dim`, counted from 1."""
    axis = one_axis("kthvalue", dim, type_of(input).rank)
    return ValuesIndices(*apply(_kthvalue, (input,), (axis, _count("kthvalue", k, input, axis, 1), bool(keepdim))))


def _some(name: str, input: Any, axis: int | None) -> None:
    t = type_of(input)
    if (t.size if axis is None else t.shape[axis] if t.shape else 1) == 0:
        what = "it" if axis is None else f"dim {axis}"
        raise ShapeError(f"{name}: {what} of {t} has no elements, so there is none to pick")


def _along(name: str, input: Any, dim: Any) -> int | None:
    axis = None if dim is None else one_axis(name, dim, type_of(input).rank)
    _some(name, input, axis)
    return axis


def median(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The element in the middle in order, the lower of two, NaN where there is one. Without `dim` one value of all elements, with it (values,
    indices)."""
    axis = _along("median", input, dim)
    if axis is None:
        return apply(_flat_median, (input,), (False,))
    return ValuesIndices(*apply(_median, (input,), (axis, bool(keepdim), False)))


def nanmedian(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """As `median`, of the elements that are not NaN."""
    axis = _along("nanmedian", input, dim)
    if axis is None:
        return apply(_flat_median, (input,), (True,))
    return ValuesIndices(*apply(_median, (input,), (axis, bool(keepdim), True)))


def mode(input: Any, dim: int = -1, keepdim: bool = False) -> ValuesIndices:
    """(values, indices) of the most frequent element along `dim`, the least of several, and where it is last."""
    axis = _along("mode", input, dim)
    return ValuesIndices(*apply(_mode, (input,), (axis, bool(keepdim))))


def _quantile_of(name: str, input: Any, q: Any, dim: Any, keepdim: bool, interpolation: str, skip: bool) -> Any:
    how = choice(name, "interpolation", interpolation, _INTERPOLATIONS)
    t = type_of(input)
    if not t.dtype.is_float:
        raise DTypeError(f"{name}: the input holds floats, not {t.dtype.name}; cast it")
    if isinstance(q, (list, tuple)):
        q = input._lift(q)
    if isinstance(q, (int, float)):
        if not 0 <= q <= 1:
            raise ArgumentError(f"{name}: q is within 0 to 1, not {q}")
        q = float(q)
    elif type_of(q).rank > 1:
        raise ShapeError(f"{name}: q is a number or a vector of them, not {type_of(q)}")
    axis = _along(name, input, dim)
    return apply(_quantile, (input, q), (axis if t.shape else None, bool(keepdim), how, skip))


def quantile(
    input: Any, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Any:
    """The elements at rank q * (n - 1) in order along `dim` (or of all elements), NaN where there is one. q: a number from 0 to 1, or a vector,
    whose dim comes first in the result. Between two elements: 'linear', 'lower', 'higher', 'nearest' or 'midpoint'."""
    return _quantile_of("quantile", input, q, dim, keepdim, interpolation, False)


def nanquantile(
    input: Any, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Any:
    """As `quantile`, of the elements that are not NaN."""
    return _quantile_of("nanquantile", input, q, dim, keepdim, interpolation, True)


__all__ = [
    "argsort", "kthvalue", "median", "mode", "msort", "nanmedian", "nanquantile", "quantile", "sort", "sorted_along", "topk",
]  # fmt: skip
