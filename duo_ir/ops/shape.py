"""Movement ops: each result element is one operand element (or a fill value) in another place. Nothing is computed.

All are linear, and each rule is another movement op or a sum. Sizes and positions may be symbolic wherever they can be
shown to be in range whatever the named sizes are (each is at least 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from duo_ir.core import Op, Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.opdef import AxisMap, Concat, Movement, OpDef, Reshape, View
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import reduce
from duo_ir.ops.checks import check_axes, check_dims, check_per_axis, check_shape, never_negative
from duo_ir.types import DimLike, Shape, TensorType, bool_, broadcast_shapes, exact_div, product, shape_str

Ints: TypeAlias = tuple[int, ...]
Replacement: TypeAlias = Sequence[Value] | None


# ----------------------------------------------------------------------------------------------------------- reshape
def _reshape_type(x: TensorType, *, shape: Shape) -> TensorType:
    check_shape(shape)
    if product(shape) != x.size:
        raise ShapeError(f"cannot reshape {x.size} elements to {shape_str(shape)}, which has {product(shape)}")
    return x.with_shape(shape)


def _reshape_canonical(op: Op) -> Replacement:
    (x,) = op.operands
    if x.type.shape == op.attrs["shape"]:
        return (x,)
    if x.op is not None and x.op.definition is reshape:
        return (nd.reshape(x.op.operands[0], op.attrs["shape"]),)
    return None


reshape: OpDef = OpDef(
    "reshape", _reshape_type, Reshape(),
    reference=lambda x, shape: x.reshape(shape),
    vjp=lambda op, g: (reshape(g, shape=op.operands[0].type.shape),),
    linear=(0,), canonicalize=_reshape_canonical, doc="The same elements in row-major order.",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- transpose
def inverse_permutation(permutation: Ints) -> Ints:
    out = [0] * len(permutation)
    for i, p in enumerate(permutation):
        out[p] = i
    return tuple(out)


def _transpose_type(x: TensorType, *, permutation: Ints) -> TensorType:
    if not isinstance(permutation, tuple) or sorted(permutation) != list(range(x.rank)):
        raise ArgumentError(f"permutation {permutation!r} does not name each of the {x.rank} axes once")
    return x.with_shape(tuple(x.shape[p] for p in permutation))


def _transpose_view(source: Shape, result: Shape, *, permutation: Ints) -> View:
    return View(tuple(AxisMap(terms=((axis, 1),)) for axis in inverse_permutation(permutation)))


def _transpose_canonical(op: Op) -> Replacement:
    x, permutation = op.operands[0], op.attrs["permutation"]
    if permutation == tuple(range(x.type.rank)):
        return (x,)
    if x.op is not None and x.op.definition is transpose:
        first = x.op.attrs["permutation"]
        return (nd.transpose(x.op.operands[0], tuple(first[p] for p in permutation)),)
    return None


transpose: OpDef = OpDef(
    "transpose", _transpose_type, Movement(_transpose_view),
    reference=lambda x, permutation: np.transpose(x, permutation),
    vjp=lambda op, g: (transpose(g, permutation=inverse_permutation(op.attrs["permutation"])),),
    batch=lambda op, xs, batched, size: transpose(xs[0], permutation=(0, *[p + 1 for p in op.attrs["permutation"]])),
    linear=(0,), canonicalize=_transpose_canonical, doc="Result axis i is operand axis permutation[i].",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- broadcast
def _broadcast_type(x: TensorType, *, shape: Shape) -> TensorType:
    check_shape(shape)
    if len(shape) < x.rank or broadcast_shapes(x.shape, shape) != shape:
        raise ShapeError(
            f"{x} does not broadcast to {shape_str(shape)}: only axes of size 1 stretch, and axes are added in front"
        )
    return x.with_shape(shape)


def _broadcast_view(source: Shape, result: Shape, *, shape: Shape) -> View:
    lead = len(result) - len(source)
    return View(tuple(AxisMap() if d == 1 else AxisMap(terms=((lead + a, 1),)) for a, d in enumerate(source)))


def _broadcast_canonical(op: Op) -> Replacement:
    x, shape = op.operands[0], op.attrs["shape"]
    if x.type.shape == shape:
        return (x,)
    if x.op is not None and x.op.definition is broadcast:
        return (nd.broadcast_to(x.op.operands[0], shape),)
    return None


def _broadcast_batch(op: Op, operands: Sequence[Value], batched: Sequence[bool], size: DimLike) -> Value:
    """The samples' axis stays in front of the axes that are added."""
    shape, own = op.attrs["shape"], op.operands[0].type.shape
    aligned = nd.reshape(operands[0], (size, *(1,) * (len(shape) - len(own)), *own))
    return nd.broadcast_to(aligned, (size, *shape))


broadcast = OpDef(
    "broadcast", _broadcast_type, Movement(_broadcast_view),
    reference=lambda x, shape: np.broadcast_to(x, shape),
    vjp=lambda op, g: (nd.sum_to(g, op.operands[0].type.shape),),
    batch=_broadcast_batch, linear=(0,), canonicalize=_broadcast_canonical, doc="NumPy's alignment: stretches axes of size 1, adds axes in front.",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ slice and pad
def _slice_size(start: DimLike, stop: DimLike, step: int) -> DimLike | None:
    """ceil((stop - start) / step), None where that is no polynomial."""
    span = stop - start
    if isinstance(span, int):
        return -(-span // step)
    # (span + r) / step is an integer with 0 <= r < step, so it is the ceiling.
    return next((q for r in range(step) if (q := exact_div(span + r, step)) is not None), None)


def _slice_type(x: TensorType, *, start: Shape, stop: Shape, step: Ints) -> TensorType:
    check_per_axis(x, start=start, stop=stop, step=step)
    check_dims("start", start)
    check_dims("stop", stop)
    shape = []
    for axis, (d, lo, hi, by) in enumerate(zip(x.shape, start, stop, step)):
        if isinstance(by, bool) or not isinstance(by, int) or by < 1:
            raise ArgumentError(
                f"step {by!r} on axis {axis}: a step is an int of at least 1; flip for the other direction"
            )
        if not (never_negative(lo) and never_negative(hi - lo) and never_negative(d - hi)):
            raise ShapeError(f"slice {lo}:{hi} on axis {axis} is not known to lie within its {d} elements")
        count = _slice_size(lo, hi, by)
        if count is None:
            raise ShapeError(
                f"slice {lo}:{hi}:{by} on axis {axis} has a size that is no polynomial; use step 1 or a known size"
            )
        shape.append(count)
    return x.with_shape(tuple(shape))


def _slice_view(source: Shape, result: Shape, *, start: Shape, stop: Shape, step: Ints) -> View:
    return View(tuple(AxisMap(lo, ((axis, by),)) for axis, (lo, by) in enumerate(zip(start, step))))


def _slice_vjp(op: Op, g: Value) -> tuple[Value]:
    start, step, source = op.attrs["start"], op.attrs["step"], op.operands[0].type.shape
    if g.type.size == 0:
        return (nd.zeros_like(op.operands[0]),)
    high = tuple(d - lo - (n - 1) * by - 1 for d, lo, n, by in zip(source, start, g.type.shape, step))
    zero = nd.constant_of(0, g.type.dtype)
    return (pad(g, zero, low=start, high=high, interior=tuple(by - 1 for by in step)),)


def _slice_batch(op: Op, operands: Sequence[Value], batched: Sequence[bool], size: DimLike) -> Value:
    start, stop, step = (op.attrs[name] for name in ("start", "stop", "step"))
    return slice(operands[0], start=(0, *start), stop=(size, *stop), step=(1, *step))


slice: OpDef = OpDef(
    "slice", _slice_type, Movement(_slice_view),
    reference=lambda x, start, stop, step: x[tuple([np.s_[a:b:c] for a, b, c in zip(start, stop, step)])],
    vjp=_slice_vjp, batch=_slice_batch, linear=(0,),
    canonicalize=lambda op: op.operands if op.operands[0].type is op.result.type else None,
    doc="x[start:stop:step] on each axis, 0 <= start <= stop <= size, step >= 1.",
)  # fmt: skip


def _pad_type(x: TensorType, fill: TensorType, *, low: Shape, high: Shape, interior: Ints) -> TensorType:
    if fill.shape != () or fill.dtype is not x.dtype:
        raise DTypeError(f"the fill value is {x.dtype.name}[], not {fill}; cast or reshape it")
    check_per_axis(x, low=low, high=high, interior=interior)
    check_dims("low", low)
    check_dims("high", high)
    shape = []
    for axis, (d, lo, hi, gap) in enumerate(zip(x.shape, low, high, interior)):
        if isinstance(gap, bool) or not isinstance(gap, int) or gap < 0:
            raise ArgumentError(f"interior padding {gap!r} on axis {axis}: it is an int of at least 0")
        if not (never_negative(lo) and never_negative(hi)):
            raise ArgumentError(f"padding {lo}, {hi} on axis {axis} may be negative; slice to remove elements")
        shape.append(lo + hi + d + (0 if d == 0 else (d - 1) * gap))
    return x.with_shape(tuple(shape))


def _pad_view(source: Shape, result: Shape, *, low: Shape, high: Shape, interior: Ints) -> View:
    axes = tuple(AxisMap(-lo, ((axis, 1),)) for axis, lo in enumerate(low))
    plain = [lo == 0 and hi == 0 and gap == 0 for lo, hi, gap in zip(low, high, interior)]
    guards = tuple(None if keep else (d, gap + 1) for d, gap, keep in zip(source, interior, plain))
    return View(axes, guards)


def _pad_reference(x: np.ndarray, fill: np.ndarray, *, low: Ints, high: Ints, interior: Ints) -> np.ndarray:
    rows = list(zip(x.shape, low, high, interior))
    out = np.full([lo + hi + d + max(d - 1, 0) * gap for d, lo, hi, gap in rows], fill, x.dtype)
    if x.size:
        out[tuple([np.s_[lo : lo + (d - 1) * (gap + 1) + 1 : gap + 1] for d, lo, _, gap in rows])] = x
    return out


def _pad_vjp(op: Op, g: Value) -> tuple[Value, Value]:
    x, _fill = op.operands
    low, step = op.attrs["low"], tuple(gap + 1 for gap in op.attrs["interior"])
    stop = tuple(lo if d == 0 else lo + (d - 1) * by + 1 for d, lo, by in zip(x.type.shape, low, step))
    inside = slice(g, start=low, stop=stop, step=step)
    marks = pad(nd.full(x.type.shape, False, bool_), nd.constant_of(True, bool_), **op.attrs)
    outside = ew.where(marks, g, nd.zeros_like(g))
    return inside, reduce.sum(outside, axes=tuple(range(g.type.rank)))


def _pad_batch(op: Op, operands: Sequence[Value], batched: Sequence[bool], size: DimLike) -> Value:
    """With a fill of each sample's own, a choice between the padded operand and the fill."""
    x, fill = operands
    widths = {name: (0, *op.attrs[name]) for name in ("low", "high", "interior")}
    if not batched[1]:
        return pad(x, fill, **widths)
    padded = pad(x, nd.zeros_like(op.operands[1]), **(widths if batched[0] else op.attrs))
    marks = pad(nd.full(op.operands[0].type.shape, False, bool_), nd.constant_of(True, bool_), **op.attrs)
    fills = nd.reshape(fill, (size, *(1,) * len(op.result.type.shape)))
    return nd.where(marks, fills, padded)


def _pad_canonical(op: Op) -> Replacement:
    if all(n == 0 for name in ("low", "high", "interior") for n in op.attrs[name]):
        return (op.operands[0],)
    return None


pad: OpDef = OpDef(
    "pad", _pad_type, Movement(_pad_view), reference=_pad_reference,
    vjp=_pad_vjp, batch=_pad_batch, linear=(0, 1), canonicalize=_pad_canonical,
    doc="pad(x, fill): `low` fills before, `high` after, `interior` between neighbours, on each axis.",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- flip
def _flip_type(x: TensorType, *, axes: Ints) -> TensorType:
    check_axes(axes, x.rank)
    return x


def _flip_view(source: Shape, result: Shape, *, axes: Ints) -> View:
    return View(
        tuple(AxisMap(d - 1, ((a, -1),)) if a in axes else AxisMap(terms=((a, 1),)) for a, d in enumerate(source))
    )


def _flip_canonical(op: Op) -> Replacement:
    x, axes = op.operands[0], op.attrs["axes"]
    left = tuple(a for a in axes if x.type.shape[a] != 1)
    if not left:
        return (x,)
    if x.op is not None and x.op.definition is flip:
        both = tuple(sorted(set(axes) ^ set(x.op.attrs["axes"])))
        return (flip(x.op.operands[0], axes=both) if both else x.op.operands[0],)
    return (flip(x, axes=left),) if left != axes else None


flip: OpDef = OpDef(
    "flip", _flip_type, Movement(_flip_view),
    reference=lambda x, axes: np.flip(x, axes),
    vjp=lambda op, g: (flip(g, axes=op.attrs["axes"]),),
    batch=lambda op, xs, batched, size: flip(xs[0], axes=tuple([a + 1 for a in op.attrs["axes"]])),
    linear=(0,), canonicalize=_flip_canonical, doc="Reverses the order along `axes`.",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- concat
def _concat_type(*xs: TensorType, axis: int) -> TensorType:
    if not xs:
        raise ArgumentError("it needs at least one operand")
    first = xs[0]
    check_axes((axis,), first.rank, "axis")
    total: DimLike = 0
    for x in xs:
        if x.dtype is not first.dtype:
            raise DTypeError(f"operands need one dtype, got {first.dtype.name} and {x.dtype.name}; cast one")
        if x.rank != first.rank or x.shape[:axis] + x.shape[axis + 1 :] != first.shape[:axis] + first.shape[axis + 1 :]:
            raise ShapeError(f"operands may differ along axis {axis} only, got {first} and {x}")
        total = total + x.shape[axis]
    return first.with_shape((*first.shape[:axis], total, *first.shape[axis + 1 :]))


def _concat_vjp(op: Op, g: Value) -> list[Value]:
    axis, out = op.attrs["axis"], []
    position: DimLike = 0
    for x in op.operands:
        end = position + x.type.shape[axis]
        out.append(nd.slice_axis(g, axis, position, end))
        position = end
    return out


def _concat_jvp(op: Op, tangents: Sequence[Value | None]) -> Value:
    parts = [nd.zeros_like(x) if t is None else t for x, t in zip(op.operands, tangents)]
    return concat(*parts, axis=op.attrs["axis"])


concat = OpDef(
    "concat", _concat_type, Concat(),
    reference=lambda *xs, axis: np.concatenate(xs, axis),
    vjp=_concat_vjp, jvp=_concat_jvp,
    canonicalize=lambda op: op.operands if len(op.operands) == 1 else None,
    doc="Operands one after another along `axis`.",
)  # fmt: skip
