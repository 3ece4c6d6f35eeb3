"""Pooling over windows of the spatial dims: max and average, with PyTorch's arguments.

A pooling is its taps, strided slices of the padded input, combined elementwise, so that it is one loop like any other and fuses. What its
derivative passes through (`straight_through`) is an equal expression in another form: the input cut into blocks as long as the windows'
step. In it each input element meets the few windows that hold it, so the gradient too is one loop, without a scatter. Bodies have
their channels last, as convolutions do; the transposes around them cancel between layers.

Max takes the first of equal elements in row-major order, and NaN before any number, as PyTorch does (of several NaNs the last).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from duo.dispatch import apply
from duo.functional._args import frozen, integer, per_axis, type_of
from duo.functional._ssa import elements, float_dtype, insert_axis, kept, sum_, wide
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import indexing, straight_through
from duo_ir.ops import shape as movement
from duo_ir.types import DType, TensorType, bool_, i32, i64, u8

MOST_TAPS = 25  # elements of a window up to which all its axes are combined at once; beyond, one axis after the other


class Window(NamedTuple):
    """The windows along one axis of `extent` elements: number o covers o*step - low + t*gap for t < size, of those inside."""

    extent: int
    size: int
    step: int
    low: int
    gap: int
    number: int

    @property
    def reach(self) -> int:
        return (self.size - 1) * self.gap + 1

    # Blocks of `step` elements begin at element 0, so that the input needs no shift. Window o begins `lead` elements into block o - front.
    @property
    def front(self) -> int:
        return -(-self.low // self.step)

    @property
    def lead(self) -> int:
        return self.front * self.step - self.low

    @property
    def blocks(self) -> int:
        """Blocks that a window touches."""
        return -(-(self.lead + self.reach) // self.step)

    @property
    def whole(self) -> bool:
        """Whether the windows are the first blocks themselves."""
        return self.low == 0 and self.gap == 1 and self.size == self.step and self.number * self.step <= self.extent

    @property
    def inside(self) -> bool:
        """Whether no window holds padding."""
        return self.low == 0 and (self.number - 1) * self.step + self.reach <= self.extent


Windows = tuple[Window, ...]


# ------------------------------------------------------------------------------------------------------- taps and blocks
def _taps(windows: Windows) -> Iterator[tuple[int, ...]]:
    """Each tap's offsets from the windows' beginnings, in row-major order."""
    return itertools.product(*[range(0, w.reach, w.gap) for w in windows])


def _padded(x: Value, windows: Windows, fill: Value) -> Value:
    """x, spatial axes 1, 2..., with `fill` wherever a window reaches beyond it."""
    high = [max(0, (w.number - 1) * w.step + w.reach - w.low - w.extent) for w in windows]
    if not any(high) and not any(w.low for w in windows):
        return x
    low = tuple([w.low for w in windows])
    return movement.pad(x, fill, low=(0, *low, 0), high=(0, *high, 0), interior=(0,) * x.type.rank)


def _tap(x: Value, windows: Windows, offsets: Sequence[int]) -> Value:
    """[n, counts..., c]: the element of each window at those offsets, of x padded."""
    n, c = x.type.shape[0], x.type.shape[-1]
    stop = [o + (w.number - 1) * w.step + 1 for o, w in zip(offsets, windows)]
    steps = tuple([w.step for w in windows])
    return movement.slice(x, start=(0, *offsets, 0), stop=(n, *stop, c), step=(1, *steps, 1))


def _blocks(x: Value, windows: Windows) -> Iterator[tuple[tuple[int, ...], Value]]:
    """For each way to choose one of the blocks that a window touches per axis: (the offsets of its first elements from where the block
    begins in which the window does, the blocks of all windows [n, count1, step1, count2, step2, ..., c])."""
    n, *_, c = x.type.shape
    zero = nd.constant_of(0, x.type.dtype)
    shape: list[Any] = [n]
    fill, low, high = [0], [0], [0]
    for w in windows:
        own = -(-w.extent // w.step)
        wanted = w.number - 1 + w.blocks - w.front
        shape += [own, w.step]
        fill.append(own * w.step - w.extent)
        low += [w.front, 0]
        high += [max(0, wanted - own), 0]
    if any(fill):
        x = movement.pad(x, zero, low=(0,) * x.type.rank, high=(*fill, 0), interior=(0,) * x.type.rank)
    x = nd.reshape(x, (*shape, c))
    if any(low) or any(high):
        x = movement.pad(x, zero, low=(*low, 0), high=(*high, 0), interior=(0,) * x.type.rank)
    for chosen in itertools.product(*[range(w.blocks) for w in windows]):
        start, stop = [0], [n]
        for a, w in zip(chosen, windows):
            start += [a, 0]
            stop += [a + w.number, w.step]
        part = movement.slice(x, start=(*start, 0), stop=(*stop, c), step=(1,) * x.type.rank)
        yield tuple([a * w.step for a, w in zip(chosen, windows)]), part


def _within(windows: Windows) -> tuple[int, ...]:
    """The axes of `_blocks` that count elements in a block."""
    return tuple([2 + 2 * i for i in range(len(windows))])


def _spread(x: Value, windows: Windows, like: Value) -> Value:
    """[n, counts..., c] repeated over the elements of blocks."""
    for axis in _within(windows):
        x = insert_axis(x, axis)
    return nd.broadcast_to(x, like.type.shape)


def _place(shape: Sequence[Any], axis: int, dtype: DType = i64) -> Value:
    """0, 1, 2... along `axis`, of size 1 along the others."""
    return nd.iota(tuple([d if a == axis else 1 for a, d in enumerate(shape)]), axis, dtype)


# ------------------------------------------------------------------------------------------------------------------- max
def _codes(windows: Windows) -> tuple[list[int], DType]:
    """A tap's code is its lead and offset along each axis times these factors, added up: one number, in the smallest dtype."""
    factors, total = [], 1
    for w in reversed(windows):
        factors.append(total)
        total *= w.blocks * w.step
    return factors[::-1], u8 if total <= 256 else i32


def _lowest(d: DType) -> Value:
    if d.is_float:
        return nd.constant_of(-math.inf, d)
    return nd.constant_of(0 if d.kind == "u" else -(2 ** (d.bits - 1)), d)


def _first_codes(windows: Windows, rank: int, dtype: DType) -> Value:
    """The code of the first tap of each window that is no padding: what is chosen where all elements are -inf."""
    factors, _ = _codes(windows)
    total: Value | None = None
    for i, (w, factor) in enumerate(zip(windows, factors)):
        at = _place([w.number if a == i + 1 else 1 for a in range(rank)], i + 1)
        missing = nd.maximum(w.low - at * w.step, 0)
        first = nd.floor_divide(missing + (w.gap - 1), w.gap) * w.gap if w.low else nd.zeros_like(at)
        code = (first + w.lead) * factor
        total = code if total is None else total + code
    assert total is not None
    return nd.cast_to(total, dtype)


def _max(x: Value, windows: Windows, indices: bool) -> tuple[Value, Value | None]:
    """(the largest element of each window, its place among the spatial elements of x) for x [n, spatial..., c]."""
    if not indices and math.prod(w.size for w in windows) > MOST_TAPS and len(windows) > 1:
        for i in range(
            len(windows) - 1, -1, -1
        ):  # the last axis first: then ties go to the first in row-major order still
            x = _along(x, i, windows[i])
        return x, None
    factors, dtype = _codes(windows)
    padded = _padded(x, windows, _lowest(x.type.dtype))
    best: Value | None = None
    chosen: Value | None = None
    for offsets in _taps(windows):
        v = _tap(padded, windows, offsets)
        if best is None or chosen is None:
            best, chosen = v, nd.broadcast_to(_first_codes(windows, v.type.rank, dtype), v.type.shape)
            continue
        code = sum((o + w.lead) * f for o, w, f in zip(offsets, windows, factors))
        takes = ew.gt(v, best)
        if v.type.dtype.is_float:
            takes = ew.or_(takes, ew.ne(v, v))
        best = ew.where(takes, v, best)
        chosen = ew.where(takes, nd.full(v.type.shape, code, dtype), chosen)
    assert best is not None and chosen is not None
    if x.type.dtype.is_float:
        best = straight_through(best, _picked(x, windows, chosen))
    return best, _places(chosen, windows) if indices else None


def _along(x: Value, axis: int, window: Window) -> Value:
    """max over the windows of one spatial axis."""
    n, *spatial, c = x.type.shape
    before, after = math.prod(spatial[:axis]), spatial[axis + 1 :]
    flat = nd.reshape(x, (n * before, spatial[axis], math.prod(after) * c))
    best, _ = _max(flat, (window,), False)
    return nd.reshape(best, (n, *spatial[:axis], window.number, *after, c))


def _picked(x: Value, windows: Windows, chosen: Value) -> Value:
    """The elements of x that the codes name, as a sum over blocks in which all others count as 0."""
    factors, dtype = _codes(windows)
    total: Value | None = None
    for offsets, part in _blocks(x, windows):
        code = nd.constant_of(sum(o * f for o, f in zip(offsets, factors)), dtype)
        here = nd.reshape(code, (1,) * part.type.rank)
        for axis, factor in zip(_within(windows), factors):
            here = nd.add(here, nd.mul(_place(part.type.shape, axis, dtype), nd.constant_of(factor, dtype)))
        mine = ew.eq(_spread(chosen, windows, part), nd.broadcast_to(here, part.type.shape))
        term = sum_(ew.where(mine, part, nd.zeros_like(part)), _within(windows))
        total = term if total is None else total + term
    assert total is not None
    return total


def _places(chosen: Value, windows: Windows) -> Value:
    """i64: codes as row-major positions in the spatial dims of the input."""
    factors, _ = _codes(windows)
    rest, place = nd.cast_to(chosen, i64), nd.constant_of(0, i64)
    for i, (w, factor) in enumerate(zip(windows, factors)):
        offset = nd.floor_divide(rest, factor)
        rest = rest - offset * factor
        at = _place(chosen.type.shape, i + 1) * w.step + offset - (w.low + w.lead)
        place = place * w.extent + at
    return place


# --------------------------------------------------------------------------------------------------------------- average
def _total(x: Value, windows: Windows) -> Value:
    """The sum of each window of x [n, spatial..., c], padding counting as 0."""
    taps = math.prod(w.size for w in windows)
    if taps > MOST_TAPS:
        if all(w.whole for w in windows):
            ((_, part),) = _blocks(x, windows)
            return sum_(part, _within(windows))
        if len(windows) > 1:
            n, *spatial, c = x.type.shape
            for i in range(len(windows) - 1, -1, -1):
                shape = (n * math.prod(spatial[:i]), spatial[i], math.prod(spatial[i + 1 :]) * c)
                spatial[i] = windows[i].number
                x = nd.reshape(_total(nd.reshape(x, shape), (windows[i],)), (n, *spatial, c))
            return x
    padded = _padded(x, windows, nd.constant_of(0, x.type.dtype))
    total: Value | None = None
    for offsets in _taps(windows):
        v = _tap(padded, windows, offsets)
        total = v if total is None else total + v
    assert total is not None
    return straight_through(total, _block_total(x, windows))


def _block_total(x: Value, windows: Windows) -> Value:
    """`_total` as a sum over blocks."""
    total: Value | None = None
    for offsets, part in _blocks(x, windows):
        for axis, offset, w in zip(_within(windows), offsets, windows):
            low, high = w.lead - offset, w.lead + w.size - offset
            if low > 0 or high < w.step:
                at = _place(part.type.shape, axis)
                held = nd.and_(nd.ge(at, low), nd.lt(at, high))
                part = ew.where(nd.broadcast_to(held, part.type.shape), part, nd.zeros_like(part))
        term = sum_(part, _within(windows))
        total = term if total is None else total + term
    assert total is not None
    return total


def _average(x: Value, windows: Windows, highs: tuple[int, ...], padded: bool, divisor: int) -> Value:
    """`highs`: padding behind each axis, which counts as elements if `padded` (what a window holds beyond never does)."""
    y = wide(x)
    total, divide = _total(y, windows), 1
    by: Value | None = None
    for i, (w, high) in enumerate(zip(windows, highs)):
        first, last = (-w.low, w.extent + high) if padded else (0, w.extent)
        if w.inside or (padded and (w.number - 1) * w.step - w.low + w.size <= last):
            divide *= w.size
            continue
        start = _place([w.number if a == i + 1 else 1 for a in range(y.type.rank)], i + 1) * w.step - w.low
        held = nd.minimum(start + w.size, last) - nd.maximum(start, first)
        by = held if by is None else by * held
    if divisor:
        out = total / nd.constant_like(total, divisor)
    elif by is None:
        out = total / nd.constant_like(total, divide)
    else:
        out = total / nd.broadcast_to(nd.cast_to(by * divide, y.type.dtype), total.type.shape)
    return nd.cast_to(out, float_dtype(x))


# ---------------------------------------------------------------------------------------------------------------- bodies
def _last(x: Value, n: int, channels_first: bool) -> Value:
    """x with a batch in front and its channels behind its n spatial dims."""
    if x.type.rank == n + 1:
        x = insert_axis(x, 0)
    return nd.transpose(x, (0, *range(2, n + 2), 1)) if channels_first else x


def _back(y: Value, rank: int, channels_first: bool) -> Value:
    if channels_first:
        y = nd.transpose(y, (0, y.type.rank - 1, *range(1, y.type.rank - 1)))
    return nd.reshape(y, y.type.shape[1:]) if y.type.rank > rank else y


def _max_pool(x: Value, windows: Windows, channels_first: bool, indices: bool) -> Any:
    best, places = _max(_last(x, len(windows), channels_first), windows, indices)
    best = _back(best, x.type.rank, channels_first)
    return best if places is None else (best, _back(places, x.type.rank, channels_first))


def _avg_pool(
    x: Value, windows: Windows, channels_first: bool, highs: tuple[int, ...], padded: bool, divisor: int
) -> Value:
    y = _average(_last(x, len(windows), channels_first), windows, highs, padded, divisor)
    return _back(y, x.type.rank, channels_first)


# ------------------------------------------------------------------------------------------------------------- arguments
def spatial_sizes(name: str, t: TensorType, n: int, channels_first: bool, free: bool = False) -> tuple[int, ...]:
    """The sizes of the n spatial dims, which must be known, unless `free`."""
    if t.rank not in (n + 1, n + 2):
        layout = ("channels, " if channels_first else "") + "spatial..." + ("" if channels_first else ", channels")
        raise ShapeError(f"{name}: it takes [batch, {layout}] or [{layout}] with {n} spatial dims, got {t}")
    sizes = t.shape[t.rank - n :] if channels_first else t.shape[t.rank - n - 1 : t.rank - 1]
    for d in sizes:
        if not isinstance(d, int) and not free:
            raise ShapeError(f"{name}: spatial sizes must be known, got {t}; only the batch may be unknown")
        if d == 0:
            raise ShapeError(f"{name}: there is nothing to pool in {t}")
    return sizes  # type: ignore[return-value]


def window(
    name: str, extent: int, size: int, step: int, low: int, high: int, gap: int = 1, ceil: bool = False
) -> Window:
    """The windows along an axis padded by `low` and `high`. `ceil`: one that hangs over the end is kept if it begins inside."""
    room = extent + low + high - (size - 1) * gap - 1
    count = (-(-room // step) if ceil else room // step) + 1
    if ceil and (count - 1) * step >= extent + low:
        count -= 1
    if count < 1:
        raise ShapeError(
            f"{name}: a window over {(size - 1) * gap + 1} elements does not fit into {extent + low + high}"
        )
    return Window(extent, size, step, low, gap, count)


@functools.lru_cache(4096, typed=True)
def _windows(
    name: str, t: TensorType, n: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[Windows, tuple[int, ...]]:
    sizes = per_axis(name, "kernel_size", kernel_size, n)
    empty = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    steps = sizes if empty else per_axis(name, "stride", stride, n)
    pads, gaps = per_axis(name, "padding", padding, n, 0), per_axis(name, "dilation", dilation, n)
    for p, k, g in zip(pads, sizes, gaps):
        if p > ((k - 1) * g + 1) // 2:
            raise ArgumentError(f"{name}: padding {p} is more than half of a window over {(k - 1) * g + 1} elements")
    extents = spatial_sizes(name, t, n, True)
    rows = zip(extents, sizes, steps, pads, gaps)
    return tuple([window(name, d, k, s, p, p, g, ceil_mode) for d, k, s, p, g in rows]), pads


def max_windows(input: Any, windows: Windows, channels_first: bool, indices: bool = False) -> Any:
    """Max over these windows; with `indices` also i64 positions in the spatial dims, row-major."""
    return apply(_max_pool, (input,), (windows, channels_first, indices))


def average_windows(
    input: Any, windows: Windows, channels_first: bool, highs: tuple[int, ...], padded: bool, divisor: int = 0
) -> Any:
    """The mean over these windows. `padded`: padding (`highs` behind) counts as elements. divisor: instead of their number."""
    return apply(_avg_pool, (input,), (windows, channels_first, highs, padded, divisor))


def _max_pool_nd(n: int, input: Any, *arguments: Any) -> Any:
    kernel_size, stride, padding, dilation, ceil_mode, return_indices = arguments
    t = type_of(input)
    if t.dtype is bool_:
        raise DTypeError(f"max_pool{n}d: it takes numbers, got {t}")
    sizes = frozen(kernel_size), frozen(stride), frozen(padding), frozen(dilation)
    windows, _ = _windows(f"max_pool{n}d", t, n, *sizes, bool(ceil_mode))
    return max_windows(input, windows, True, bool(return_indices))


def _avg_pool_nd(n: int, input: Any, *arguments: Any) -> Any:
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override = arguments
    name = f"avg_pool{n}d"
    sizes = frozen(kernel_size), frozen(stride), frozen(padding)
    windows, pads = _windows(name, type_of(input), n, *sizes, 1, bool(ceil_mode))
    divisor = 0 if divisor_override is None else integer(name, "divisor_override", divisor_override)
    if divisor_override is not None and divisor == 0:
        raise ArgumentError(f"{name}: divisor_override is not 0")
    return average_windows(input, windows, True, pads, bool(count_include_pad), divisor)


# ----------------------------------------------------------------------------------------------------- max, average pools
def max_pool1d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """The largest element of each window along the last dim of [batch, channels, length] (or [channels, length]), padded with -inf.

    Windows begin every `stride` (kernel_size) elements; those of ceil_mode may hang over the end. With return_indices also i64 positions.
    The gradient goes to the first of equal elements."""
    return _max_pool_nd(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """`max_pool1d` over windows in the last two dims of [batch, channels, height, width]; indices are row * width + column."""
    return _max_pool_nd(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """`max_pool1d` over windows in the last three dims of [batch, channels, depth, height, width]."""
    return _max_pool_nd(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def avg_pool1d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True
) -> Any:  # fmt: skip
    """The mean of each window along the last dim of [batch, channels, length] (or [channels, length]); zeros of the padding
    count as elements unless count_include_pad is False."""
    return _avg_pool_nd(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:  # fmt: skip
    """`avg_pool1d` over windows in the last two dims. divisor_override: what sums are divided by instead of the number of elements."""
    return _avg_pool_nd(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:  # fmt: skip
    """`avg_pool2d` over windows in the last three dims."""
    return _avg_pool_nd(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


# -------------------------------------------------------------------------------------------------------------- adaptive
def _adapted(name: str, input: Any, output_size: Any, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(sizes, wanted sizes): None keeps a size."""
    extents = spatial_sizes(name, type_of(input), n, True)
    wanted = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * n
    if len(wanted) != n:
        raise ArgumentError(f"{name}: output_size is an int or {n} of them (None keeps a size), not {output_size!r}")
    known = tuple([d if o is None else o for d, o in zip(extents, wanted)])
    return extents, per_axis(name, "output_size", known, n)


def _even(extents: tuple[int, ...], wanted: tuple[int, ...]) -> Windows | None:
    """Windows of one size that do it, where there are."""
    if any(d % o for d, o in zip(extents, wanted)):
        return None
    return tuple([Window(d, d // o, d // o, 0, 1, o) for d, o in zip(extents, wanted)])


def _spans(extent: int, count: int, rank: int, axis: int) -> tuple[Value, Value, int]:
    """(first elements, lengths, the greatest length) of windows floor(o*d/n) to ceil((o+1)*d/n)."""
    at = _place([count if a == axis else 1 for a in range(rank)], axis)
    first = nd.floor_divide(at * extent, count)
    lengths = nd.floor_divide((at + 1) * extent + (count - 1), count) - first
    longest = max(-(-(o + 1) * extent // count) - o * extent // count for o in range(count))
    return first, lengths, longest


def _uneven(x: Value, extents: tuple[int, ...], wanted: tuple[int, ...], largest: bool, indices: bool) -> Any:
    """Adaptive pooling with windows of several sizes, which overlap: taps beyond a window's end are its last element again."""
    y = _last(x if largest else wide(x), len(wanted), True)
    rank = y.type.rank
    spans = [_spans(d, o, rank, i + 1) for i, (d, o) in enumerate(zip(extents, wanted))]
    best: Value | None = None
    place: Value | None = None
    for offsets in itertools.product(*[range(longest) for _, _, longest in spans]):
        v, held, here = y, None, nd.constant_of(0, i64)
        for axis, (t, (first, lengths, _), d) in enumerate(zip(offsets, spans, extents), 1):
            at = first + nd.minimum(lengths - 1, t)
            v = _taken(v, at, axis)
            here = here * d + at
            inside = nd.gt(lengths, t)
            held = inside if held is None else nd.and_(held, inside)
        assert held is not None
        here = nd.broadcast_to(here, v.type.shape)
        if best is None or place is None:
            best, place = v, here
        elif largest:
            takes = ew.gt(v, best)
            if v.type.dtype.is_float:
                takes = ew.or_(takes, ew.ne(v, v))
            best, place = ew.where(takes, v, best), ew.where(takes, here, place)
        else:
            best = best + ew.where(nd.broadcast_to(held, v.type.shape), v, nd.zeros_like(v))
    assert best is not None and place is not None
    if not largest:
        sizes = nd.constant_of(1, i64)
        for _, lengths, _ in spans:
            sizes = sizes * lengths
        best = nd.cast_to(best / nd.broadcast_to(nd.cast_to(sizes, best.type.dtype), best.type.shape), float_dtype(x))
    out = _back(best, x.type.rank, True)
    return (out, _back(place, x.type.rank, True)) if indices else out


def _taken(x: Value, at: Value, axis: int) -> Value:
    """x at positions `at` (of one axis) along `axis`."""
    flat = nd.reshape(at, (at.type.size,))
    found = indexing.gather(x, flat, axes=(axis,))
    return nd.transpose(found, (*range(1, axis + 1), 0, *range(axis + 1, x.type.rank)))


def _adaptive_max(n: int, input: Any, output_size: Any, return_indices: bool) -> Any:
    name = f"adaptive_max_pool{n}d"
    extents, wanted = _adapted(name, input, output_size, n)
    windows = _even(extents, wanted)
    if windows is not None:
        return max_windows(input, windows, True, bool(return_indices))
    return apply(_uneven, (input,), (extents, wanted, True, bool(return_indices)))


def _mean_of_all(x: Value, n: int) -> Value:
    y = wide(x)
    axes = tuple(range(x.type.rank - n, x.type.rank))
    total = kept(sum_(y, axes), y.type.shape, axes)
    return nd.cast_to(total / nd.size_of(elements(y.type.shape, axes), y.type.dtype, least=1), float_dtype(x))


def _adaptive_avg(n: int, input: Any, output_size: Any) -> Any:
    name = f"adaptive_avg_pool{n}d"
    if output_size in (1, (1,) * n, [1] * n):
        spatial_sizes(name, type_of(input), n, True, free=True)
        return apply(_mean_of_all, (input,), (n,))
    extents, wanted = _adapted(name, input, output_size, n)
    if all(o == 1 for o in wanted):
        return apply(_mean_of_all, (input,), (n,))
    windows = _even(extents, wanted)
    if windows is not None:
        return average_windows(input, windows, True, (0,) * n, True)
    return apply(_uneven, (input,), (extents, wanted, False, False))


def adaptive_max_pool1d(input: Any, output_size: Any, return_indices: bool = False) -> Any:
    """The largest element of each of output_size windows that cover the last dim: o*d/n to (o+1)*d/n, rounded outward."""
    return _adaptive_max(1, input, output_size, return_indices)


def adaptive_max_pool2d(input: Any, output_size: Any, return_indices: bool = False) -> Any:
    """`adaptive_max_pool1d` over the last two dims; None in output_size keeps a size."""
    return _adaptive_max(2, input, output_size, return_indices)


def adaptive_max_pool3d(input: Any, output_size: Any, return_indices: bool = False) -> Any:
    """`adaptive_max_pool1d` over the last three dims."""
    return _adaptive_max(3, input, output_size, return_indices)


def adaptive_avg_pool1d(input: Any, output_size: Any) -> Any:
    """The mean of each of output_size windows that cover the last dim: o*d/n to (o+1)*d/n, rounded outward."""
    return _adaptive_avg(1, input, output_size)


def adaptive_avg_pool2d(input: Any, output_size: Any) -> Any:
    """`adaptive_avg_pool1d` over the last two dims; None in output_size keeps a size."""
    return _adaptive_avg(2, input, output_size)


def adaptive_avg_pool3d(input: Any, output_size: Any) -> Any:
    """`adaptive_avg_pool1d` over the last three dims."""
    return _adaptive_avg(3, input, output_size)
