"""Checks of attributes that the ops' type rules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.types import Dim, DimLike, TensorType, substitute


def never_negative(d: DimLike) -> bool:
    """Whether `d` >= 0 for all named sizes >= 2 (sufficient: no negative coefficient once each name is written 2 + n)."""
    if isinstance(d, int):
        return d >= 0
    shifted = substitute(d, {n: Dim.symbol(n) + 2 for n in d.names})
    return shifted >= 0 if isinstance(shifted, int) else all(c >= 0 for _, c in shifted.terms)


def check_shape(shape: object) -> None:
    """Raises ShapeError unless `shape` is a tuple of sizes."""
    if not isinstance(shape, tuple):
        raise ShapeError(f"a shape is a tuple of sizes, not {shape!r}")
    for d in shape:
        if isinstance(d, bool) or not isinstance(d, (int, Dim)):
            raise ShapeError(f"a size is an int or a Dim, not {d!r} (in shape {shape!r})")
        if isinstance(d, int) and d < 0:
            raise ShapeError(f"a size cannot be negative: {d} in shape {list(shape)}")


def check_per_axis(x: TensorType, **attrs: Sequence[Any]) -> None:
    """Raises ArgumentError unless each attribute is a tuple of one number per axis of x."""
    for name, values in attrs.items():
        if not isinstance(values, tuple) or len(values) != x.rank:
            raise ArgumentError(f"{name} needs one number per axis, a tuple of {x.rank}; got {values!r}")


def check_dims(name: str, dims: Sequence[Any]) -> None:
    """Raises ArgumentError unless all are ints or Dims."""
    for d in dims:
        if isinstance(d, bool) or not isinstance(d, (int, Dim)):
            raise ArgumentError(f"{name} holds ints or Dims, not {d!r}")


def check_axes(axes: object, rank: int, name: str = "axes") -> None:
    """Raises ArgumentError unless `axes` is a tuple of distinct axes in ascending order."""
    if not isinstance(axes, tuple) or any(isinstance(a, bool) or not isinstance(a, int) for a in axes):
        raise ArgumentError(f"{name} is a tuple of ints, not {axes!r}")
    if any(not 0 <= a < rank for a in axes):
        raise ArgumentError(
            f"{name} {axes} are outside 0..{rank - 1}" if rank else f"{name} {axes}: the operand is 0-d"
        )
    if list(axes) != sorted(set(axes)):
        raise ArgumentError(f"{name} {axes} must be distinct and ascending")
