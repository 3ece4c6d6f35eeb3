"""Index maps: positions affine in a kernel's loop indices, and what views, reshapes and axis splits do to them.

A `Position` is (offset, strides), one stride per axis in scope. An index of a tensor is one Position per axis. Sizes may be
symbolic; a size is known to be positive only through `nonnegative`, which uses that a named size is at least 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TypeAlias

from duo_ir.errors import DuoError
from duo_ir.opdef import View
from duo_ir.types import Dim, DimLike, Shape, exact_div, product, row_major, substitute

Position: TypeAlias = tuple[DimLike, tuple[DimLike, ...]]
Index: TypeAlias = tuple[Position, ...]
Noted: TypeAlias = dict[tuple[Dim, tuple[Dim, ...]], None]
Bounds: TypeAlias = tuple[Position, DimLike, int]  # 0 <= position < bound, divisible by step


_symbolic_div = lru_cache(4096)(exact_div)


def divide(a: DimLike, b: DimLike) -> DimLike | None:
    """`exact_div`, quick for ints and remembered for symbolic sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b != 0 and a % b == 0 else None
    return _symbolic_div(a, b)


strides_of = lru_cache(4096)(row_major)


class NeedSplit(DuoError):
    """An index needs axis `axis` of the kernel as two: the slower one and `inner` elements of the faster one."""

    def __init__(self, axis: int, inner: DimLike) -> None:
        super().__init__(f"axis {axis} is needed in pieces of {inner}")
        self.axis, self.inner = axis, inner


def identity(axes: Sequence[DimLike]) -> Index:
    """The index that walks a tensor of shape `axes` with one loop per axis."""
    return _identity(len(axes))


@lru_cache(64)
def _identity(n: int) -> Index:
    return tuple([(0, tuple([1 if j == k else 0 for j in range(n)])) for k in range(n)])


def combine(offset: DimLike, terms: Sequence[tuple[DimLike, Position]], n: int) -> Position:
    """offset + sum of factor * position, over n axes."""
    strides: list[DimLike] = [0] * n
    for factor, (o, s) in terms:
        if factor == 0:
            continue
        offset = offset + o * factor
        for k in range(n):
            stride = s[k]
            if stride != 0:
                strides[k] = strides[k] + stride * factor
    return offset, tuple(strides)


def linear(index: Index, shape: Shape, n: int) -> Position:
    """Row-major position, in elements, of `index` in a tensor of that shape."""
    return combine(0, [(s, p) for s, p in zip(strides_of(shape), index)], n)


def through(view: View, index: Index, n: int) -> tuple[Index, tuple[Bounds, ...]]:
    """The index into a view's operand, and the bounds within which it is valid."""
    out = [combine(m.offset, [(c, index[axis]) for axis, c in m.terms], n) for m in view.axes]
    bounds = []
    for k, guard in enumerate(view.guards):
        if guard is not None:
            bound, step = guard
            bounds.append((out[k], bound * step, step))
    return tuple(out), tuple(bounds)


def nonnegative(d: DimLike, loops: Sequence[DimLike] = ()) -> bool:
    """True when d >= 0 for all sizes, named ones being at least 2 (sufficient, not necessary). That something leans on it within `loops` of these
    sizes is noted (`assumptions`)."""
    if isinstance(d, int):
        return d >= 0
    if not _nonnegative(d):
        return False
    noted = _noted.get()
    if noted is not None:
        noted[d, tuple([n for n in loops if isinstance(n, Dim)])] = None
    return True


def seems_nonnegative(d: DimLike) -> bool:
    """`nonnegative`, of choices that are right either way."""
    return d >= 0 if isinstance(d, int) else _nonnegative(d)


@contextmanager
def assumptions() -> Iterator[Noted]:
    """What `nonnegative` has said yes to meanwhile, each with the free sizes of the loops around it: kernels hold where these sizes are not negative, or
    a loop is empty."""
    noted: Noted = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


_noted: ContextVar[Noted | None] = ContextVar("noted", default=None)


@lru_cache(4096)
def _nonnegative(d: Dim) -> bool:
    shifted = substitute(d, {name: Dim.symbol(name) + 2 for name in d.names})
    return shifted >= 0 if isinstance(shifted, int) else all(c >= 0 for _, c in shifted.terms)


def unravel(position: Position, shape: Shape, extents: Sequence[DimLike]) -> Index | None:
    """The index in `shape` of a row-major position, affine over loops of these extents; None where there is none.

    Raises NeedSplit when one exists once a loop is split in two."""
    offset, strides = position
    n = len(strides)
    zero: Position = (0, (0,) * n)
    dims = [j for j, d in enumerate(shape) if d != 1]
    steps = strides_of(tuple([shape[j] for j in dims]))
    # Each loop goes to the outermost dimension whose stride divides its own.
    quotients: list[list[tuple[int, DimLike]]] = [[] for _ in dims]
    low = offset
    for k, stride in enumerate(strides):
        if stride == 0 or extents[k] == 1:
            continue
        if not nonnegative(stride, extents):
            low = low + stride * (extents[k] - 1)
        for j, step in enumerate(steps):
            q = divide(stride, step)
            if q is not None:
                quotients[j].append((k, q))
                break
        else:
            return None
    starts = _digits(low, steps, extents)
    if starts is None:
        return None
    out: list[Position] = [zero] * len(shape)
    for j, terms in enumerate(quotients):
        size, start = shape[dims[j]], starts[j]
        top, begin, coefficients = start, start, [*zero[1]]
        for k, q in terms:
            span = q * (extents[k] - 1)
            if nonnegative(q, extents):
                top = top + span
            else:
                top, begin = top - span, begin - span
            coefficients[k] = q
        if not nonnegative(size - 1 - top, extents):
            for k, q in terms:
                inner = divide(size, q)
                if inner is None or inner == 1 or inner == extents[k]:
                    continue
                if divide(extents[k], inner) is not None and nonnegative(inner, extents):
                    raise NeedSplit(k, inner)
            return None
        out[dims[j]] = (begin, tuple(coefficients))
    return tuple(out)


def _digits(value: DimLike, steps: Sequence[DimLike], extents: Sequence[DimLike]) -> list[DimLike] | None:
    """`value` in the mixed radix with these place values, or None where that cannot be told."""
    out: list[DimLike] = []
    for step in steps:
        q: DimLike | None
        if value == 0:
            q = 0
        elif isinstance(value, int) and isinstance(step, int):
            if value < 0 or step == 0:
                return None
            q = value // step
        else:
            q = divide(value, step)
            if q is None:
                if not nonnegative(step - 1 - value, extents):
                    return None
                q = 0
        out.append(q)
        value = value - step * q
    return out if value == 0 else None


# ------------------------------------------------------------------------------------------------------ loop nests
def split_at(axes: Sequence[DimLike], size: DimLike) -> tuple[tuple[DimLike, ...], int] | None:
    """`axes`, one of them split in two if necessary, and the number of leading ones whose product is `size`."""
    rest = size
    for k, n in enumerate(axes):
        if rest == 1:
            return tuple(axes), k
        quotient = divide(rest, n)
        if quotient is not None:
            rest = quotient
            continue
        inner = divide(n, rest)
        if inner is None:
            return None
        return (*axes[:k], rest, inner, *axes[k + 1 :]), k + 1
    return (tuple(axes), len(axes)) if rest == 1 else None


@lru_cache(4096)
def refine(a: tuple[DimLike, ...], b: tuple[DimLike, ...]) -> tuple[DimLike, ...] | None:
    """The coarsest loop nest of which both are mergers of neighbours, or None. Products must be equal."""
    left, right = [d for d in a if d != 1], [d for d in b if d != 1]
    out: list[DimLike] = []
    i = j = 0
    x: DimLike = 1
    y: DimLike = 1
    while True:
        if x == 1 and i < len(left):
            x, i = left[i], i + 1
        if y == 1 and j < len(right):
            y, j = right[j], j + 1
        if x == 1 and y == 1:
            return tuple(out)
        if x == 0 or y == 0:
            return None
        if x == 1 or y == 1:
            return None
        small, q, side = y, divide(x, y), 0
        if q is None:
            small, q, side = x, divide(y, x), 1
        if q is None:
            return None
        out.append(small)
        x, y = (q, 1) if side == 0 else (1, q)


def expand(axes: Sequence[DimLike], fine: Sequence[DimLike]) -> list[list[int]]:
    """For each of `axes`, the numbers of the `fine` axes that it is the product of (from `refine`)."""
    out: list[list[int]] = []
    k = 0
    for d in axes:
        members: list[int] = []
        rest = d
        while rest != 1:
            q = divide(rest, fine[k])
            if q is None:
                raise DuoError(f"loops {list(fine)} do not refine {list(axes)}")
            members.append(k)
            rest, k = q, k + 1
        out.append(members)
    return out


def respread(position: Position, groups: Sequence[Sequence[int]], fine: Sequence[DimLike]) -> Position:
    """The same position over the fine axes."""
    offset, strides = position
    out: list[DimLike] = [0] * len(fine)
    for stride, members in zip(strides, groups):
        step = stride
        for k in reversed(members):
            out[k] = step
            step = step * fine[k]
    return offset, tuple(out)


def mergeable(axes: Sequence[DimLike], positions: Sequence[Position], first: int, last: int) -> list[list[int]]:
    """Neighbouring axes in [first, last) that all positions walk as one loop, as groups; axes of size 1 go into no group."""
    groups: list[list[int]] = []
    for k in range(first, last):
        size = axes[k]
        if size == 1:
            continue
        if groups:
            before = groups[-1][-1]
            for _, strides in positions:
                stride = strides[k]
                if strides[before] != (stride * size if stride != 0 else 0):
                    break
            else:
                groups[-1].append(k)
                continue
        groups.append([k])
    return groups


def merge(position: Position, groups: Sequence[Sequence[int]]) -> Position:
    return position[0], tuple([position[1][g[-1]] for g in groups])


def is_row_major(position: Position, axes: Sequence[DimLike], count: int) -> bool:
    """True when the position is the row-major one over the first `count` axes and ignores the others."""
    offset, strides = position
    if offset != 0:
        return False
    step: DimLike = 1
    for k in range(len(axes) - 1, -1, -1):
        if axes[k] == 1:
            continue
        if k >= count:
            if strides[k] != 0:
                return False
            continue
        if strides[k] != step:
            return False
        step = step * axes[k]
    return True


__all__ = [
    "Bounds", "Index", "NeedSplit", "Noted", "Position", "assumptions", "combine", "expand", "identity", "is_row_major", "linear", "merge", "mergeable",
    "nonnegative", "product", "refine", "respread", "seems_nonnegative", "split_at", "through", "unravel",
]  # fmt: skip
