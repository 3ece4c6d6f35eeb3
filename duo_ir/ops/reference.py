"""NumPy references in the exact orders of the numerics contract (reductions, contractions, convolution, scatter).

Each is vectorised over everything that is not reduced, and sequential where the contract is. f16 and bf16 accumulate in f32 and
round once at the end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import ml_dtypes
import numpy as np

from duo_ir.errors import IndexOutOfRange
from duo_ir.scalar.numpy_eval import convert, fma
from duo_ir.types import dtype as dtype_of
from duo_ir.types import evaluate

if TYPE_CHECKING:
    from duo_ir.opdef import Phase

Array: TypeAlias = np.ndarray
Ints: TypeAlias = tuple[int, ...]

LANES, CHUNK = 16, 1024
BLOCK, SEQUENTIAL, SPLIT = 512, 16384, 4096
_NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def widen(x: Array) -> Array:
    """f16 and bf16 as f32, all else as it is."""
    return x.astype(np.float32) if x.dtype in _NARROW else x


def narrow(x: Array, dtype: np.dtype) -> Array:
    """x rounded once to `dtype`."""
    return x if x.dtype == dtype else np.asarray(convert(x, dtype_of(dtype)))


def _is_float(x: Array) -> bool:
    return x.dtype.kind == "f"


def rows(x: Array, axes: Ints) -> Array:
    """`axes` moved behind the others and flattened, row-major in ascending order: [kept..., n]."""
    kept = [a for a in range(x.ndim) if a not in axes]
    moved = x.transpose([*kept, *axes])
    n = int(np.prod([x.shape[a] for a in axes], dtype=np.int64))
    return moved.reshape([*moved.shape[: len(kept)], n])


def adjacent_tree(parts: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """Axis 0 combined pair by pair: neighbours 2i and 2i+1, an odd last one moves up unchanged, until one is left."""
    while len(parts) > 1:
        even = len(parts) // 2 * 2
        paired = combine(parts[0:even:2], parts[1:even:2])
        parts = np.concatenate([paired, parts[even:]])
    return parts[0]


def _lanes(n: int) -> tuple[int, int]:
    """(chunks, steps per chunk) that cover n elements; at least one of each."""
    chunks = max(1, -(-n // CHUNK))
    return chunks, CHUNK // LANES if chunks > 1 else max(1, -(-n // LANES))


def _strips(x: Array, absent: float) -> Array:
    """[..., n] as [steps, chunks, 16, ...], absent elements filled."""
    n = x.shape[-1]
    chunks, steps = _lanes(n)
    full = np.full((*x.shape[:-1], chunks * steps * LANES), absent, x.dtype)
    full[..., :n] = x
    split = full.reshape(*x.shape[:-1], chunks, steps, LANES)
    return np.moveaxis(split, (-2, -3, -1), (0, 1, 2))


def _combine(lanes: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """[chunks, 16, ...] to [...]: chunks by the adjacent tree, then lanes by halving."""
    out = adjacent_tree(lanes, combine)
    half = LANES // 2
    while half:
        out = combine(out[:half], out[half : 2 * half])
        half //= 2
    return out[0]


@np.errstate(all="ignore")
def _fold(x: Array, axes: Ints, combine: np.ufunc, start: int) -> Array:
    if not _is_float(widen(x)):
        return np.asarray(combine.reduce(rows(x, axes), axis=-1, dtype=x.dtype, initial=start))
    strips = _strips(widen(rows(x, axes)), start)
    acc = np.full(strips.shape[1:], start, strips.dtype)
    for step in strips:
        acc = combine(acc, step)
    return narrow(_combine(acc, combine), x.dtype)


def sum_(x: Array, *, axes: Ints) -> Array:
    """Rule 3: chunks of 1024 over 16 lanes, in ascending order; chunks by the adjacent tree; lanes by halving."""
    return _fold(x, axes, np.add, 0)


def prod(x: Array, *, axes: Ints) -> Array:
    """Rule 3 with products, from 1."""
    return _fold(x, axes, np.multiply, 1)


@np.errstate(all="ignore")
def _extremum(x: Array, axes: Ints, pick: np.ufunc, winning_zero: float) -> Array:
    wide = rows(widen(x), axes)
    out = np.asarray(pick.reduce(wide, axis=-1))
    if _is_float(wide):  # NumPy leaves open which zero it returns
        won = ((wide == 0) & (np.signbit(wide) == np.signbit(winning_zero))).any(axis=-1)
        out = np.where(out == 0, np.where(won, winning_zero, -winning_zero).astype(out.dtype), out)
    return narrow(out, x.dtype)


def max_(x: Array, *, axes: Ints) -> Array:
    """IEEE 754-2019 maximum: NaN wins, -0 < +0."""
    return _extremum(x, axes, np.maximum, 0.0)


def min_(x: Array, *, axes: Ints) -> Array:
    """IEEE 754-2019 minimum: NaN wins, -0 < +0."""
    return _extremum(x, axes, np.minimum, -0.0)


def any_(x: Array, *, axes: Ints) -> Array:
    return np.asarray(x.any(axis=axes))


def all_(x: Array, *, axes: Ints) -> Array:
    return np.asarray(x.all(axis=axes))


def argmax(x: Array, *, axes: Ints) -> Array:
    """The first NaN, else the lowest index among the greatest."""
    return np.asarray(np.argmax(widen(x), axis=axes[0]), np.int64)


def argmin(x: Array, *, axes: Ints) -> Array:
    """The first NaN, else the lowest index among the least."""
    return np.asarray(np.argmin(widen(x), axis=axes[0]), np.int64)


# ------------------------------------------------------------------------------------------------------- contraction
@np.errstate(all="ignore")
def _sequential(a: Array, b: Array) -> Array:
    """Blocks of 512, each from +0.0 by fma in ascending k, added in order. a: [k, ..., m, 1], b: [k, ..., 1, n]."""
    total = None
    for start in range(0, len(a), BLOCK):
        acc = np.zeros((), a.dtype)
        for x, y in zip(a[start : start + BLOCK], b[start : start + BLOCK]):
            acc = fma(x, y, acc)
        total = acc if total is None else total + acc
    assert total is not None
    return np.asarray(total)


@np.errstate(all="ignore")
def dot(a: Array, b: Array) -> Array:
    """Rule 3 with fma(a, b, acc) for the addition and absent elements skipped, over the last axis of f32 or f64 arrays."""
    n = a.shape[-1]
    x, y, present = _strips(a, 0), _strips(b, 0), _strips(np.ones((1,) * (a.ndim - 1) + (n,), np.bool_), 0)
    acc = np.zeros(x.shape[1:], a.dtype)
    for step in range(len(x)):
        acc = np.where(present[step], fma(x[step], y[step], acc), acc)
    return _combine(acc, np.add)


def matmul(a: Array, b: Array) -> Array:
    """Rule 2; with one result column, `dot`."""
    if b.shape[-1] == 1 and a.size and b.size and _is_float(widen(a)):
        x, y = widen(a), widen(b)
        out = dot(x, np.broadcast_to(np.swapaxes(y, -1, -2), x.shape))[..., None]
        return narrow(out, a.dtype)
    return contract(a, b)


def contract(a: Array, b: Array) -> Array:
    """Rule 2: [..., m, k] x [..., k, n], rounded once to their dtype. Integers wrap."""
    k = a.shape[-1]
    shape = (*a.shape[:-1], b.shape[-1])
    x, y = widen(a), widen(b)
    if not _is_float(x):
        return np.matmul(a, b)
    if k == 0 or 0 in shape:
        return np.zeros(shape, a.dtype)
    left, right = np.moveaxis(x, -1, 0)[..., None], np.moveaxis(y, -2, 0)[..., None, :]
    if k <= SEQUENTIAL:
        return narrow(_sequential(left, right), a.dtype)
    parts = [_sequential(left[i : i + SPLIT], right[i : i + SPLIT]) for i in range(0, k, SPLIT)]
    return narrow(adjacent_tree(np.stack(parts), np.add), a.dtype)


def windows(x: Array, phases: Sequence[Phase]) -> Array:
    """[n, *spatial, c] to [n, *count, *taps, c]: what each tap of each result position reads, +0 outside x."""
    for d, p in enumerate(phases):
        axis, size = 1 + d, x.shape[1 + d]
        offset, count, taps = (evaluate(d, {}) for d in (p.offset, p.count, p.taps))
        at = offset + p.stride * np.arange(count)[:, None] + p.dilation * np.arange(taps)
        inside = (at >= 0) & (at < size)
        padded = np.concatenate([x, np.zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype)], axis)
        read = np.take(padded, np.where(inside, at, size), axis)  # [..., count, taps, ...]
        x = np.moveaxis(read, axis + 1, 1 + len(phases) + d)
    return x


def convolution(x: Array, w: Array, shape: Ints, phases: Sequence[Sequence[Phase]], groups: int) -> Array:
    """Rule 2 over (kernel positions, channels), phase by phase."""
    n, o = shape[0], shape[-1]
    spatial = len(phases)
    out = np.zeros(shape, x.dtype)
    for chosen in itertools.product(*phases):
        taps = tuple([slice(p.tap_start, p.tap_start + p.tap_step * p.taps, p.tap_step) for p in chosen])
        counts = [evaluate(p.count, {}) for p in chosen]
        kernel = w[taps]
        c = w.shape[-2]
        a = windows(x, chosen).reshape(*[n, *counts, *kernel.shape[:spatial]], groups, c)
        a = np.moveaxis(a, -2, 0).reshape(groups, math.prod([n, *counts]), math.prod(kernel.shape[:-1]))
        b = np.moveaxis(kernel.reshape(*kernel.shape[:-1], groups, o // groups), -2, 0)
        result = contract(a, b.reshape(groups, math.prod(kernel.shape[:-1]), o // groups))
        place = tuple([slice(p.start, None, p.step) for p in chosen])
        out[(slice(None), *place)] = np.moveaxis(result, 0, 1).reshape(n, *counts, o)
    return out


# ---------------------------------------------------------------------------------------------------------- indexing
def check_indices(name: str, indices: Sequence[Array], shape: Sequence[int], axes: Ints) -> None:
    """Raises IndexOutOfRange for the first index (row-major, operand by operand) outside its axis."""
    for index, axis in zip(indices, axes):
        bad = (index < 0) | (index >= shape[axis])
        if bad.any():
            value = index[bad].flat[0]
            raise IndexOutOfRange(
                f"{name}: index {value} is out of range for axis {axis}, which has {shape[axis]} elements"
            )


def _front(x: Array, axes: Ints) -> Array:
    """`axes` moved to the front, in their order."""
    return x.transpose([*axes, *[a for a in range(x.ndim) if a not in axes]])


def gather(x: Array, *indices: Array, axes: Ints) -> Array:
    check_indices("gather", indices, x.shape, axes)
    return np.asarray(_front(x, axes)[indices])


@np.errstate(all="ignore")
def scatter(x: Array, updates: Array, *indices: Array, axes: Ints, mode: str) -> Array:
    """One update after another in row-major order of the indices; adding rounds each time, in x's dtype."""
    check_indices("scatter", indices, x.shape, axes)
    out = x.copy()
    target = _front(out, axes)
    shape = indices[0].shape
    for point in np.ndindex(shape):
        place = tuple([int(i[point]) for i in indices])
        value = updates[point]
        target[place] = narrow(np.asarray(widen(target[place]) + widen(value)), x.dtype) if mode == "add" else value
    return out
