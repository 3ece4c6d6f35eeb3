"""Layers that pad the last one, two or three axes, and distances between tensors."""

from __future__ import annotations

from typing import Any

from duo.nn import functional as F
from duo.nn.module import Module
from duo_ir.errors import ArgumentError


class _Pad(Module):
    """padding: one number for every side, or (left, right, top, bottom, front, back), as far as there are axes."""

    axes: int
    mode: str

    def __init__(self, padding: Any) -> None:
        super().__init__()
        sides = (padding,) * 2 * self.axes if isinstance(padding, int) else tuple(padding)
        if len(sides) != 2 * self.axes:
            raise ArgumentError(f"{type(self).__name__}: padding is an int or {2 * self.axes} of them, not {padding!r}")
        self.padding = sides

    def forward(self, input: Any) -> Any:
        return F.pad(input, self.padding, self.mode)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class _ConstantPad(_Pad):
    def __init__(self, padding: Any, value: float) -> None:
        super().__init__(padding)
        self.value = value

    def forward(self, input: Any) -> Any:
        return F.pad(input, self.padding, "constant", self.value)

    def extra_repr(self) -> str:
        return f"padding={self.padding}, value={self.value}"


class _ZeroPad(_ConstantPad):
    def __init__(self, padding: Any) -> None:
        super().__init__(padding, 0.0)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class ConstantPad1d(_ConstantPad):
    """The last axis with `value` around."""

    axes = 1


class ConstantPad2d(_ConstantPad):
    """The last two axes with `value` around."""

    axes = 2


class ConstantPad3d(_ConstantPad):
    """The last three axes with `value` around."""

    axes = 3


class ZeroPad1d(_ZeroPad):
    """The last axis with zeros around."""

    axes = 1


class ZeroPad2d(_ZeroPad):
    """The last two axes with zeros around."""

    axes = 2


class ZeroPad3d(_ZeroPad):
    """The last three axes with zeros around."""

    axes = 3


class ReflectionPad1d(_Pad):
    """The last axis with the input mirrored at its edge, without the edge around."""

    axes = 1
    mode = "reflect"


class ReflectionPad2d(_Pad):
    """The last two axes with the input mirrored at its edge, without the edge around."""

    axes = 2
    mode = "reflect"


class ReflectionPad3d(_Pad):
    """The last three axes with the input mirrored at its edge, without the edge around."""

    axes = 3
    mode = "reflect"


class ReplicationPad1d(_Pad):
    """The last axis with the element at the edge around."""

    axes = 1
    mode = "replicate"


class ReplicationPad2d(_Pad):
    """The last two axes with the element at the edge around."""

    axes = 2
    mode = "replicate"


class ReplicationPad3d(_Pad):
    """The last three axes with the element at the edge around."""

    axes = 3
    mode = "replicate"


class CircularPad1d(_Pad):
    """The last axis with what is at the other end around."""

    axes = 1
    mode = "circular"


class CircularPad2d(_Pad):
    """The last two axes with what is at the other end around."""

    axes = 2
    mode = "circular"


class CircularPad3d(_Pad):
    """The last three axes with what is at the other end around."""

    axes = 3
    mode = "circular"


class CosineSimilarity(Module):
    """x1 . x2 / max(|x1| |x2|, eps) along `dim`."""

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x1: Any, x2: Any) -> Any:
        return F.cosine_similarity(x1, x2, self.dim, self.eps)


class PairwiseDistance(Module):
    """The p-norm of x1 - x2 + eps along the last axis."""

    def __init__(self, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> None:
        super().__init__()
        self.norm, self.eps, self.keepdim = p, eps, keepdim

    def forward(self, x1: Any, x2: Any) -> Any:
        return F.pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim)
