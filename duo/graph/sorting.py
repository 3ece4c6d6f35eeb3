"""Sorting, top-k, running folds and counting, with TensorFlow's names and defaults.

Indices are int32 where TensorFlow's are. What would have a shape that depends on values raises and names a way out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from duo import functional as F
from duo.functional import searching
from duo.graph.tensor import convert_to_tensor, named
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.types import dtype as as_dtype
from duo_ir.types import i32, i64

Name = str | None


class TopK(NamedTuple):
    """What top_k gives."""

    values: Any
    indices: Any


def _descending(direction: str) -> bool:
    if direction not in ("ASCENDING", "DESCENDING"):
        raise ArgumentError(f"sort: direction is 'ASCENDING' or 'DESCENDING', not {direction!r}")
    return direction == "DESCENDING"


def sort(values: Any, axis: int = -1, direction: str = "ASCENDING", name: Name = None) -> Any:
    """The elements in order along `axis`; NaN is the greatest."""
    x, down = convert_to_tensor(values), _descending(direction)
    return named(x.graph, "sort", name, lambda: F.sort(x, axis, down).values, (x,))


def argsort(values: Any, axis: int = -1, direction: str = "ASCENDING", stable: bool = False, name: Name = None) -> Any:
    """The int32 indices that put the elements in order along `axis`, always stable."""
    x, down = convert_to_tensor(values), _descending(direction)
    return named(x.graph, "argsort", name, lambda: F.cast(F.argsort(x, axis, down), i32), (x,))


def top_k(input: Any, k: int = 1, sorted: bool = True, name: Name = None) -> TopK:
    """(values, int32 indices) of the k greatest elements along the last axis, in order; of equals the first."""
    x = convert_to_tensor(input)

    def make() -> tuple[Any, Any]:
        values, indices = F.topk(x, k)
        return values, F.cast(indices, i32)

    return TopK(*named(x.graph, "TopKV2", name, make, (x,)))


def _running(type: str, of: Callable[..., Any], x: Any, axis: int, exclusive: bool, reverse: bool, first: float, name: Name) -> Any:
    """A running fold; `exclusive` without the place itself (`first` where nothing comes before), `reverse` from the end."""
    a = convert_to_tensor(x)

    def make() -> Any:
        y = F.flip(a, axis) if reverse else a
        if exclusive:
            size = y._type.shape[axis]
            start = F.full_like(F.narrow(y, axis, 0, 1), first) if size != 0 else y
            y = F.cat([start, F.narrow(y, axis, 0, size - 1)], axis) if size != 0 else y
        total = of(y, axis)
        return F.flip(total, axis) if reverse else total

    return named(a.graph, type, name, make, (a,))


def cumprod(x: Any, axis: int = 0, exclusive: bool = False, reverse: bool = False, name: Name = None) -> Any:
    """Products of the elements up to each place; `exclusive` without the place itself, `reverse` from the end."""
    dtype = convert_to_tensor(x).dtype
    return _running("Cumprod", lambda y, d: F.cumprod(y, d, dtype=dtype), x, axis, exclusive, reverse, 1, name)


def cumulative_logsumexp(x: Any, axis: int = 0, exclusive: bool = False, reverse: bool = False, name: Name = None) -> Any:
    """log of the sum of exp of the elements up to each place; `exclusive` without the place itself, `reverse` from the end."""
    return _running("CumulativeLogsumexp", F.logcumsumexp, x, axis, exclusive, reverse, -float("inf"), name)


def searchsorted(
    sorted_sequence: Any, values: Any, side: str = "left", out_type: Any = i32, name: Name = None
) -> Any:  # fmt: skip
    """Where each value [..., m] would go in the sorted rows [..., n], before equal elements or, with side 'right', after them."""
    rows = convert_to_tensor(sorted_sequence)
    v = convert_to_tensor(values, like=rows)
    kind = as_dtype(out_type)
    return named(rows.graph, "SearchSorted", name, lambda: F.cast(F.searchsorted(rows, v, side=side), kind), (rows, v))


def bincount(
    arr: Any, weights: Any = None, minlength: int | None = None, maxlength: int | None = None, dtype: Any = i32, name: Name = None
) -> Any:  # fmt: skip
    """How often each number from 0 to n - 1 comes, or with weights the sums of theirs; greater ones are left out. n = minlength = maxlength:
    between the two, the shape would depend on values."""
    if minlength is None or minlength != maxlength:
        raise ShapeError(
            f"bincount: with minlength={minlength} and maxlength={maxlength} the shape would depend on values; give both the same number"
        )
    x = convert_to_tensor(arr)
    n = int(minlength)
    if weights is None:
        kind = as_dtype(dtype)
        make = lambda: F.cast(x.graph.apply(_counts, (x,), (n,)), kind)  # noqa: E731
        return named(x.graph, "Bincount", name, make, (x,))
    w = convert_to_tensor(weights)
    return named(x.graph, "Bincount", name, lambda: x.graph.apply(_weighted, (x, w), (n,)), (x, w))


def _weighted(x: Value, w: Value, n: int) -> Value:
    x, w = (nd.reshape(v, (v.type.size,)) for v in (nd.cast_to(x, i64), w))
    if n == 0:
        return nd.full((0,), 0, w.type.dtype)
    inside = nd.lt(x, n)
    return searching._weighted_bincount(nd.minimum(x, n - 1), ew.where(inside, w, nd.zeros_like(w)), n)


def _counts(x: Value, n: int) -> Value:
    return _weighted(x, nd.full(x.type.shape, 1, i64), n)


def histogram_fixed_width(
    values: Any, value_range: Any, nbins: int = 100, dtype: Any = i32, name: Name = None
) -> Any:  # fmt: skip
    """How many values fall in each of `nbins` equal intervals of [low, high]; those outside count in the first and the last."""
    x = convert_to_tensor(values)
    low, high = (float(v) for v in value_range)
    if not low < high:
        raise ArgumentError(f"histogram_fixed_width: value_range is (low, high), low < high, not {value_range!r}")
    kind = as_dtype(dtype)
    make = lambda: F.cast(x.graph.apply(_histogram, (x, low, high), (int(nbins),)), kind)  # noqa: E731
    return named(x.graph, "histogram_fixed_width", name, make, (x,))


def _histogram(x: Value, low: Value, high: Value, nbins: int) -> Value:
    x = nd.reshape(x, (x.type.size,))
    low, high = (nd.broadcast_to(nd.cast_to(v, x.type.dtype), x.type.shape) for v in (low, high))
    place = nd.cast_to(ew.floor(nd.mul((x - low) / (high - low), nd.full((), nbins, x.type.dtype))), i64)
    return searching._bincount(nd.minimum(nd.maximum(place, 0), nbins - 1), nbins)


def unique(x: Any, out_idx: Any = i32, name: Name = None) -> NoReturn:
    """Not available: the shape of the result would depend on values. Raises with the ways out."""
    raise ShapeError(
        f"unique: the shape of the distinct elements of {convert_to_tensor(x)._type} would depend on values; tf.sort and compare neighbours, or use"
        " duo.unique on the array that a run gives"
    )


__all__ = [
    "argsort", "bincount", "cumprod", "cumulative_logsumexp", "histogram_fixed_width", "searchsorted", "sort", "top_k", "unique",
]  # fmt: skip
