"""Convolution: x [n, *spatial, c] with w [*kernel, c/groups, o] to [n, *out, o]. Channels last; the frontends transpose.

    result[n, p, o] = sum over kernel positions t and channels c of the group of o: x[n, (p*stride + t*w_dilation - lo) / x_dilation, c] * w[t, c, o]

Where that position lies outside x (padding) the factor is +0.0 and takes part; where it is no integer (x_dilation: between the elements
of a dilated x) there is no tap at all, so the taps of a result element depend on p mod x_dilation, its *phase*. The order is rule 2 of the numerics
contract with K running over the taps (row-major), then the channels, also for a single output column.

Both gradients are convolutions: the one for x with strides and x_dilation exchanged, the one for w with strides and w_dilation exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import gcd
from typing import Any, TypeAlias

from duo_ir.core import Op, Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.opdef import Convolution, OpDef, Phase
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import reference
from duo_ir.ops import shape as sh
from duo_ir.ops.checks import check_dims, never_negative
from duo_ir.types import DimLike, Shape, TensorType, exact_div, f32

MOST_SPATIAL = 3  # spatial dims

Ints: TypeAlias = tuple[int, ...]
Padding: TypeAlias = tuple[tuple[DimLike, DimLike], ...]


def reach(size: DimLike, dilation: int) -> DimLike:
    """Elements that `size` elements cover when they are `dilation` apart."""
    return 0 if size == 0 else (size - 1) * dilation + 1


def _floor_div(a: DimLike, b: int) -> DimLike | None:
    """floor(a / b), None where that is no polynomial."""
    if isinstance(a, int):
        return a // b
    return next((q for r in range(b) if (q := exact_div(a - r, b)) is not None), None)


def _residue(a: DimLike, b: int) -> int | None:
    """a mod b, None where that depends on named sizes."""
    if isinstance(a, int):
        return a % b
    return next((r for r in range(b) if exact_div(a - r, b) is not None), None)


def result_size(
    size: DimLike, kernel: DimLike, stride: int, lo: DimLike, hi: DimLike, xd: int, wd: int
) -> DimLike | None:
    """Positions along one spatial dim, None where that is no polynomial of the named sizes."""
    last = _floor_div(reach(size, xd) + lo + hi - reach(kernel, wd), stride)
    return None if last is None else last + 1


# ------------------------------------------------------------------------------------------------------------ phases
def axis_phases(
    size: DimLike, kernel: DimLike, result: DimLike, stride: int, lo: DimLike, xd: int, wd: int
) -> tuple[Phase, ...]:
    """The phases of one spatial axis. Raises ShapeError where they depend on named sizes."""
    step, tap_step = xd // gcd(stride, xd), xd // gcd(wd, xd)
    low = _residue(lo, xd)
    if low is None:
        raise ShapeError(f"with x_dilation {xd} a padding of {lo} must be known; give sizes that are numbers")
    out = []
    for start in range(step):
        if isinstance(result, int) and start >= result:
            break
        count = _floor_div(result - start + step - 1, step)
        first = next((t for t in range(tap_step) if (start * stride + t * wd - low) % xd == 0), None)
        taps: DimLike | None = 0
        if first is None or (isinstance(kernel, int) and first >= kernel):
            first = 0
        else:
            taps = _floor_div(kernel - first + tap_step - 1, tap_step)
        if count is None or taps is None:
            raise ShapeError(f"with x_dilation {xd} sizes {result} and {kernel} must be known; give numbers")
        offset = _floor_div(start * stride + first * wd - lo, xd)
        assert offset is not None
        out.append(
            Phase(start, step, count, first, tap_step, taps, offset, stride // gcd(stride, xd), wd // gcd(wd, xd))
        )
    return tuple(out)


def _phases(
    x: Shape,
    w: Shape,
    result: Shape,
    *,
    strides: Ints,
    padding: Padding,
    x_dilation: Ints,
    w_dilation: Ints,
    groups: int,
) -> tuple[tuple[Phase, ...], ...]:
    return tuple([
        axis_phases(x[1 + d], w[d], result[1 + d], strides[d], padding[d][0], x_dilation[d], w_dilation[d])
        for d in range(len(strides))
    ])  # fmt: skip


# --------------------------------------------------------------------------------------------------------- type rule
def _check_steps(name: str, values: object, spatial: int) -> None:
    if not isinstance(values, tuple) or len(values) != spatial:
        raise ArgumentError(f"{name} needs one int per spatial axis, a tuple of {spatial}; got {values!r}")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int) or v < 1:
            raise ArgumentError(f"{name} holds ints of at least 1, not {v!r}")


def _conv_type(
    x: TensorType, w: TensorType, *, strides: Ints, padding: Padding, x_dilation: Ints, w_dilation: Ints, groups: int
) -> TensorType:
    if x.dtype is not w.dtype:
        raise DTypeError(f"operands need one dtype, got {x.dtype.name} and {w.dtype.name}; cast one")
    if x.dtype.kind == "b":
        raise DTypeError("it takes numbers, not bool; cast both")
    spatial = x.rank - 2
    if not 1 <= spatial <= MOST_SPATIAL or w.rank != x.rank:
        raise ShapeError(
            f"operands are [n, spatial..., c] and [kernel..., c/groups, o] with 1 to {MOST_SPATIAL} spatial axes, not {x} and {w}"
        )
    for name, values in (("strides", strides), ("x_dilation", x_dilation), ("w_dilation", w_dilation)):
        _check_steps(name, values, spatial)
    if (
        not isinstance(padding, tuple)
        or len(padding) != spatial
        or not all(isinstance(p, tuple) and len(p) == 2 for p in padding)
    ):
        raise ArgumentError(
            f"padding needs one pair (low, high) per spatial axis, a tuple of {spatial}; got {padding!r}"
        )
    for pair in padding:
        check_dims("padding", pair)
    _check_channels(x, w, groups)
    sizes = [
        _checked_size(
            axis, x.shape[1 + axis], w.shape[axis], strides[axis], padding[axis], x_dilation[axis], w_dilation[axis]
        )
        for axis in range(spatial)
    ]
    return x.with_shape((x.shape[0], *sizes, w.shape[-1]))


def _check_channels(x: TensorType, w: TensorType, groups: int) -> None:
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ArgumentError(f"groups is an int of at least 1, not {groups!r}")
    c, per_group, o = x.shape[-1], w.shape[-2], w.shape[-1]
    if per_group * groups != c:
        of = f", in {groups} groups" if groups != 1 else ""
        raise ShapeError(f"the kernel reads {per_group} channels{of}, but the input has {c}: {x} and {w}")
    if exact_div(o, groups) is None:
        raise ShapeError(f"{o} output channels do not divide into {groups} groups: {w}")


def _checked_size(
    axis: int, size: DimLike, kernel: DimLike, stride: int, padding: tuple[DimLike, DimLike], xd: int, wd: int
) -> DimLike:
    lo, hi = padding
    if kernel == 0:
        raise ShapeError(f"the kernel has no elements along spatial axis {axis}")
    out = result_size(size, kernel, stride, lo, hi, xd, wd)
    if out is None:
        raise ShapeError(
            f"spatial axis {axis} has {size} elements: the result's size with stride {stride} is no polynomial of that; use a known size"
        )
    if not never_negative(out) or (out == 0 and size != 0):
        padded, covered = reach(size, xd) + lo + hi, reach(kernel, wd)
        known = "" if isinstance(out, int) else " may be"
        raise ShapeError(
            f"along spatial axis {axis} the kernel covers {covered} elements, the padded input{known} only {padded};"
            " pad more or use a smaller kernel or dilation"
        )
    if xd != 1:
        axis_phases(size, kernel, out, stride, lo, xd, wd)  # for its errors
    return out


def _reference(x: reference.Array, w: reference.Array, **attrs: Any) -> reference.Array:
    shape = _conv_type(TensorType(f32, x.shape), TensorType(f32, w.shape), **attrs).static_shape()
    return reference.convolution(x, w, shape, _phases(x.shape, w.shape, shape, **attrs), attrs["groups"])


# -------------------------------------------------------------------------------------------------------- derivatives
def _split(d: DimLike, groups: int) -> DimLike:
    part = exact_div(d, groups)
    assert part is not None  # the type rule checked it
    return part


def _x_gradient(op: Op, g: Value) -> Value:
    """The convolution of g, dilated by the strides, with w flipped in space and its channels exchanged."""
    x, w = op.operands
    attrs, groups = op.attrs, op.attrs["groups"]
    spatial = x.type.rank - 2
    if x.type.size == 0 or g.type.size == 0:
        return nd.zeros_like(x)
    flipped = sh.flip(w, axes=tuple(range(spatial)))
    kernel, c, o = w.type.shape[:spatial], w.type.shape[-2], w.type.shape[-1]
    if groups == 1:
        turned = nd.swap_last(flipped)
    else:
        each = _split(o, groups)
        parts = nd.reshape(flipped, (*kernel, c, groups, each))
        turned = nd.transpose(parts, (*range(spatial), spatial + 2, spatial + 1, spatial))
        turned = nd.reshape(turned, (*kernel, each, c * groups))
    padding = []
    for d in range(spatial):
        stride, xd, wd = attrs["strides"][d], attrs["x_dilation"][d], attrs["w_dilation"][d]
        lo = attrs["padding"][d][0]
        covered = reach(x.type.shape[1 + d], xd) - reach(g.type.shape[1 + d], stride)
        padding.append((reach(kernel[d], wd) - 1 - lo, covered + lo))
    return conv(
        g, turned, strides=attrs["x_dilation"], padding=tuple(padding), x_dilation=attrs["strides"],
        w_dilation=attrs["w_dilation"], groups=groups,
    )  # fmt: skip


def _w_gradient(op: Op, g: Value) -> Value:
    """The convolution of x with g as its kernel: the channels are the batch, the batch is the channels."""
    x, w = op.operands
    attrs, groups = op.attrs, op.attrs["groups"]
    spatial = x.type.rank - 2
    if w.type.size == 0 or g.type.size == 0 or x.type.size == 0:
        return nd.zeros_like(w)
    n, places, c = x.type.shape[0], x.type.shape[1:-1], w.type.shape[-2]
    if groups == 1:
        images = nd.transpose(x, (spatial + 1, *range(1, spatial + 1), 0))
    else:
        parts = nd.reshape(x, (n, *places, groups, c))
        images = nd.transpose(parts, (spatial + 2, *range(1, spatial + 1), spatial + 1, 0))
        images = nd.reshape(images, (c, *places, n * groups))
    kernel = nd.transpose(g, (*range(1, spatial + 1), 0, spatial + 1))
    padding = []
    for d in range(spatial):
        stride, xd, wd = attrs["strides"][d], attrs["x_dilation"][d], attrs["w_dilation"][d]
        lo = attrs["padding"][d][0]
        covered = reach(w.type.shape[d], wd) - 1 + reach(g.type.shape[1 + d], stride)
        padding.append((lo, covered - reach(places[d], xd) - lo))
    out = conv(
        images, kernel, strides=attrs["w_dilation"], padding=tuple(padding), x_dilation=attrs["x_dilation"],
        w_dilation=attrs["strides"], groups=groups,
    )  # fmt: skip
    return nd.transpose(out, (*range(1, spatial + 1), 0, spatial + 1))


def _conv_vjp(op: Op, g: Value) -> tuple[Value, Value]:
    return _x_gradient(op, g), _w_gradient(op, g)


def _conv_jvp(op: Op, tangents: Sequence[Value | None]) -> Value:
    (x, w), (s, t) = op.operands, tangents
    parts = [conv(a, b, **op.attrs) for a, b in ((s, w), (x, t)) if a is not None and b is not None]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _conv_canonical(op: Op) -> Sequence[Value] | None:
    """Padding of x with +0.0 is padding of the convolution: such taps take part as +0.0."""
    x, w = op.operands
    if x.op is None or x.op.definition is not sh.pad or any(d != 1 for d in op.attrs["x_dilation"]):
        return None
    inner, fill = x.op.operands
    low, high, interior = (x.op.attrs[name] for name in ("low", "high", "interior"))
    zero = nd.literal(fill)
    if zero is None or zero != 0 or math.copysign(1.0, zero) < 0 or any(interior):
        return None
    if low[0] != 0 or high[0] != 0 or low[-1] != 0 or high[-1] != 0:
        return None
    padding = tuple([(lo + a, hi + b) for (lo, hi), a, b in zip(op.attrs["padding"], low[1:-1], high[1:-1])])
    return (conv(inner, w, **{**op.attrs, "padding": padding}),)


conv: OpDef = OpDef(
    "conv", _conv_type, Convolution(_phases), reference=_reference, vjp=_conv_vjp, jvp=_conv_jvp, canonicalize=_conv_canonical,
    doc="[n, spatial..., c] with [kernel..., c/groups, o] to [n, out..., o], by fma over (kernel position, channel).",
)  # fmt: skip
