"""Convolutions in PyTorch's form: input [n, c, *spatial] (or unbatched [c, *spatial]), weight [o, c/groups, *kernel].

All are the one primitive `conv`, which has its channels last; the transposes around it cancel between layers (transforms/layout.py).
"""

from __future__ import annotations

import functools
from typing import Any

from duo.dispatch import apply
from duo.functional._args import frozen, integer, need_rank, type_of
from duo.functional._ssa import insert_axis
from duo.functional.linalg import same_dtype
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import shape as sh
from duo_ir.ops.conv import conv
from duo_ir.types import DimLike, TensorType, exact_div

Ints = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]


# --------------------------------------------------------------------------------------------------------- arguments
def _steps(name: str, what: str, value: Any, spatial: int, least: int = 1) -> Ints:
    """`value`, an int or one for each spatial dim."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * spatial
    if len(values) == 1:
        values = values * spatial
    if len(values) != spatial:
        raise ArgumentError(f"{name}: {what} is an int or {spatial} of them, not {value!r}")
    values = tuple([integer(name, what, v) for v in values])
    for v in values:
        if v < least:
            raise ArgumentError(f"{name}: {what} is at least {least}, not {v}")
    return values


def _padding(name: str, padding: Any, kernel: tuple[DimLike, ...], stride: Ints, dilation: Ints) -> Padding:
    """(low, high) per spatial dim. 'same' pads so that the size stays, one more at the end where that is odd."""
    if not isinstance(padding, str):
        return tuple([(p, p) for p in _steps(name, "padding", padding, len(kernel), 0)])
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding != "same":
        raise ArgumentError(f"{name}: padding is an int, {len(kernel)} of them, 'valid' or 'same', not {padding!r}")
    if any(s != 1 for s in stride):
        raise ArgumentError(f"{name}: padding 'same' needs stride 1, not {stride}")
    out = []
    for k, d in zip(kernel, dilation):
        total = d * (integer(name, "the kernel's size", k) - 1)
        out.append((total // 2, total - total // 2))
    return tuple(out)


def _check(name: str, spatial: int, x: TensorType, w: TensorType, bias: TensorType | None, channels: int) -> None:
    """`channels`: the axis of the weight that counts the result's channels, of each group where it is 1."""
    kernel = ", ".join("dhw"[3 - spatial :])
    need_rank(name, f"input, [n, c, {kernel}] or [c, {kernel}],", x, spatial + 2, spatial + 1)
    layout = f"[o, c/groups, {kernel}]" if channels == 0 else f"[c, o/groups, {kernel}]"
    need_rank(name, f"weight, {layout},", w, spatial + 2)
    if bias is not None:
        need_rank(name, "bias", bias, 1)


def _groups(name: str, groups: Any) -> int:
    groups = integer(name, "groups", groups)
    if groups < 1:
        raise ArgumentError(f"{name}: groups is at least 1, not {groups}")
    return groups


# ------------------------------------------------------------------------------------------------------- convolution
def channels_last(x: Value) -> Value:
    """[n, c, spatial...] as [n, spatial..., c]."""
    return nd.transpose(x, (0, *range(2, x.type.rank), 1))


def channels_first(x: Value) -> Value:
    """[n, spatial..., c] as [n, c, spatial...]."""
    return nd.transpose(x, (0, x.type.rank - 1, *range(1, x.type.rank - 1)))


def _convolve(
    x: Value,
    w: Value,
    b: Value | None,
    strides: Ints,
    padding: Padding,
    x_dilation: Ints,
    w_dilation: Ints,
    groups: int,
) -> Value:
    """x [n, c, spatial...] or [c, spatial...], w [kernel..., c/groups, o]."""
    unbatched = x.type.rank < w.type.rank
    if unbatched:
        x = insert_axis(x, 0)
    x, w = same_dtype(x, w)
    out = conv(
        channels_last(x),
        w,
        strides=strides,
        padding=padding,
        x_dilation=x_dilation,
        w_dilation=w_dilation,
        groups=groups,
    )
    if b is not None:
        if b.type.shape != w.type.shape[-1:]:
            raise ShapeError(f"the bias {b.type} needs {w.type.shape[-1]} elements, one for each channel of the result")
        out = out + b
    out = channels_first(out)
    return nd.reshape(out, out.type.shape[1:]) if unbatched else out


def _conv(x: Value, w: Value, *rest: Any) -> Value:
    *bias, strides, padding, dilation, groups = rest
    spatial = w.type.rank - 2
    w = nd.transpose(w, (*range(2, spatial + 2), 1, 0))
    return _convolve(x, w, bias[0] if bias else None, strides, padding, (1,) * spatial, dilation, groups)


@functools.lru_cache(4096, typed=True)
def _conv_attrs(
    spatial: int, x: TensorType, w: TensorType, bias: TensorType | None, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple:  # fmt: skip
    name = f"conv{spatial}d"
    _check(name, spatial, x, w, bias, 0)
    stride, dilation = _steps(name, "stride", stride, spatial), _steps(name, "dilation", dilation, spatial)
    return stride, _padding(name, padding, w.shape[2:], stride, dilation), dilation, _groups(name, groups)


def _conv_nd(
    spatial: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> Any:
    x, w = type_of(input), type_of(weight)
    if bias is None:
        attrs = _conv_attrs(spatial, x, w, None, frozen(stride), frozen(padding), frozen(dilation), groups)
        return apply(_conv, (input, weight), attrs)
    attrs = _conv_attrs(spatial, x, w, type_of(bias), frozen(stride), frozen(padding), frozen(dilation), groups)
    return apply(_conv, (input, weight, bias), attrs)


def conv1d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """The cross-correlation of input [n, c, l] (or [c, l]) with weight [o, c/groups, k], plus bias [o]: [n, o, l'] with
    l' = (l + 2*padding - dilation*(k-1) - 1) // stride + 1. `padding` may be 'valid' (none) or 'same' (l' = l, stride 1 only)."""
    return _conv_nd(1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """The cross-correlation of input [n, c, h, w] (or [c, h, w]) with weight [o, c/groups, kh, kw], plus bias [o]. `stride`, `padding`
    and `dilation` are ints or pairs; for sizes see `conv1d`."""
    return _conv_nd(2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """The cross-correlation of input [n, c, d, h, w] (or [c, d, h, w]) with weight [o, c/groups, kd, kh, kw], plus bias [o]; see `conv1d`."""
    return _conv_nd(3, input, weight, bias, stride, padding, dilation, groups)


# --------------------------------------------------------------------------------------------- transposed convolution
def _conv_transpose(x: Value, w: Value, *rest: Any) -> Value:
    """The gradient of a convolution for its input: of x dilated by the stride, with the kernel flipped."""
    *bias, stride, padding, output_padding, dilation, groups = rest
    spatial = w.type.rank - 2
    w = sh.flip(w, axes=tuple(range(2, spatial + 2)))
    c, each, *kernel = w.type.shape
    per_group = exact_div(c, groups)
    if per_group is None:
        raise ShapeError(
            f"conv_transpose{spatial}d: the weight's {c} input channels do not divide into {groups} groups"
        )
    parts = nd.reshape(w, (groups, per_group, each, *kernel))
    parts = nd.transpose(parts, (*range(3, spatial + 3), 1, 0, 2))
    w = nd.reshape(parts, (*kernel, per_group, groups * each))
    pads = []
    for k, p, extra, d in zip(kernel, padding, output_padding, dilation):
        covered = (k - 1) * d
        pads.append((covered - p, covered - p + extra))
    return _convolve(x, w, bias[0] if bias else None, (1,) * spatial, tuple(pads), stride, dilation, groups)


def _conv_transpose_nd(
    spatial: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, output_padding: Any, groups: Any,
    dilation: Any,
) -> Any:  # fmt: skip
    name = f"conv_transpose{spatial}d"
    _check(name, spatial, type_of(input), type_of(weight), None if bias is None else type_of(bias), 1)
    stride, dilation = _steps(name, "stride", stride, spatial), _steps(name, "dilation", dilation, spatial)
    padding = _steps(name, "padding", padding, spatial, 0)
    extra = _steps(name, "output_padding", output_padding, spatial, 0)
    for e, s, d in zip(extra, stride, dilation):
        if e >= max(s, d):
            raise ArgumentError(f"{name}: output_padding {e} must be smaller than stride {s} or dilation {d}")
    tensors = (input, weight) if bias is None else (input, weight, bias)
    return apply(_conv_transpose, tensors, (stride, padding, extra, dilation, _groups(name, groups)))


def conv_transpose1d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    """The transpose (gradient) of `conv1d`: input [n, c, l] (or [c, l]) with weight [c, o/groups, k], plus bias [o]: [n, o, l'] with
    l' = (l-1)*stride - 2*padding + dilation*(k-1) + output_padding + 1."""
    return _conv_transpose_nd(1, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    """The transpose of `conv2d`: weight [c, o/groups, kh, kw]; for sizes see `conv_transpose1d`."""
    return _conv_transpose_nd(2, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose3d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    """The transpose of `conv3d`: weight [c, o/groups, kd, kh, kw]; for sizes see `conv_transpose1d`."""
    return _conv_transpose_nd(3, input, weight, bias, stride, padding, output_padding, groups, dilation)
